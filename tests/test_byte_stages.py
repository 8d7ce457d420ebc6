"`tokenizer` and `search` for bases with a tokenizer.json: what is learned, said, refused."

import json
import random
import shutil
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmixtral_nb.byte_bases import to_letters
from cmixtral_nb.byte_pieces import (
    companions_of,
    count_within,
    exclusive_letters,
    known_base,
    letter_counts,
    merge_rule,
    own_bytes,
    read_byte_text,
    read_merge_table,
    read_merges,
    write_merges,
)
from cmixtral_nb.bytelevel import Merge, chars_per_pre_token, chars_per_token, count_words
from cmixtral_nb.documents import read_docs
from cmixtral_nb.pieces import Piece, base_tokenizer_model
from cmixtral_nb.search import (
    _SENTENCE_END,
    all_prefixes,
    base_pieces,
    byte_steps,
    choose,
    measure_base,
    read_heldout,
    search,
    search_table,
)
from cmixtral_nb.search_files import read_choice
from cmixtral_nb.stages import StageError
from cmixtral_nb.tokenizer import tokenizer

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VIETNAMESE = "được đường nước người không một những trong với các cũng để khi có thể này đó"


def texts_of(lang, n_chars):
    "The first documents of a shipped corpus"
    texts = []
    for row in read_docs(f"builtin:{lang}"):
        texts.append(row["text"])
        if sum(map(len, texts)) > n_chars:
            return texts
    return texts


def write_base(folder, by_itself=False):
    "A byte-level tokenizer that was trained on English"
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_itself)
    cut = pre_tokenizers.Split(Regex(QWEN), "isolated")
    tok.pre_tokenizer = letters if by_itself else pre_tokenizers.Sequence([cut, letters])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|end|>"]
    )
    tok.train_from_iterator(texts_of("en", 40_000), trainer)
    folder.mkdir()
    tok.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "Two bases, Khmer text to learn from and other Khmer text to judge by, a corpus of Vietnamese"
    folder = tmp_path_factory.mktemp("byte_stages")
    write_base(folder / "qwen")
    write_base(folder / "gpt2", by_itself=True)
    texts = texts_of("km", 120_000)
    half = len(texts) // 2
    (folder / "vi").mkdir()
    (folder / "km").mkdir()
    rng = random.Random(0)
    vi = [" ".join(rng.choices(VIETNAMESE.split(), k=60)) + "." for _ in range(80)]
    en = texts_of("en", 80_000)
    for name, docs in {
        "km/km.train.jsonl": texts[:half],
        "km/km.valid.jsonl": texts[half:],
        "km/en.train.jsonl": en[:9],
        "km/en.valid.jsonl": en[40:],
        "vi/vi.train.jsonl": vi[:60],
        "vi/vi.valid.jsonl": vi[60:],
        "vi/en.train.jsonl": en[:40],
        "vi/en.valid.jsonl": en[40:],
    }.items():
        lines = (json.dumps({"text": text}) for text in docs)
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder


def learned(here, name, base="qwen", n_pieces=500, **options):
    "Khmer merges for one of the bases"
    options = dict(lang="km", script="Khmer", corpus=here / "km", n_pieces=n_pieces) | options
    return tokenizer(out=here / name, base=str(here / base), **options)


@pytest.fixture(scope="module")
def pieces(here):
    "Merges with the base's own cut, and with the repaired one"
    return {
        name: learned(here, f"of_{name}", repair=name == "repaired")
        for name in ("as_it_is", "repaired")
    }


def held_out(here):
    return [
        json.loads(line)["text"] for line in open(here / "km" / "km.valid.jsonl", encoding="utf-8")
    ]


def tokens(base, text):
    return [base.bytes_of[i] for i in base.tok.encode(text, add_special_tokens=False).ids]


def fresh_counts(base, texts):
    "How often each token occurs, in letters"
    return Counter(to_letters(raw) for text in texts for raw in tokens(base, text))


# ---- learning


def test_merges_are_read_as_they_were_learned(here, pieces):
    found = read_merges(pieces["repaired"], here / "qwen")
    assert len(found.merges) == found.stats["n_pieces"] == 500
    assert (found.params["script"], found.params["repair"]) == ("Khmer", True)
    made = [merge.left + merge.right for merge in found.merges]
    assert len(set(made)) == 500 and not set(made) & set(found.base.bytes_of.values())
    counts = [merge.count for merge in found.merges]
    assert counts == sorted(counts, reverse=True)
    table = (pieces["repaired"] / "merges.tsv").read_text(encoding="utf-8")
    (here / "again.tsv").write_text(table, encoding="utf-8-sig")  # as Excel and Notepad write it
    assert read_merge_table(here / "again.tsv", found.base, found.own) == found.merges


def test_what_is_said_is_what_is_measured(here, pieces):
    texts = held_out(here)
    base, better = known_base(here / "qwen"), read_merges(pieces["repaired"], here / "qwen").base
    for name, cut in (("as_it_is", base), ("repaired", better)):
        stats = pieces[name].stats
        grown = read_merges(pieces[name], here / "qwen").grown()
        assert stats["before"] == pytest.approx(chars_per_token(base.tok, texts))
        assert stats["after"] == pytest.approx(chars_per_token(grown.tok, texts))
        assert stats["ceiling"] == pytest.approx(chars_per_pre_token(cut.tok, texts))
        assert stats["after"] < stats["ceiling"]
        assert (stats["n_changed_lines"], stats["n_kept_lines"] > 50) == (0, True)
    assert pieces["as_it_is"].stats["ceiling_repaired"] == pieces["repaired"].stats["ceiling"]
    assert pieces["repaired"].stats["after"] > 1.2 * pieces["as_it_is"].stats["after"]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_other_texts_keep_their_ids_with_every_kind_of_pieces(here, pieces, text):
    base = known_base(here / "qwen")
    for made in pieces.values():
        found = read_merges(made, here / "qwen")
        if not found.own.in_text(text):
            assert tokens(found.grown(), text) == tokens(base, text)


def test_a_companion_of_the_script_is_its_own(here, capsys):
    "U+200B stands between Khmer words; where the base cuts before it, it costs tokens"
    hint = "U+200B is frequent and takes several tokens; --companions 'U+200B' makes it own"
    plain = learned(here, "plain", base="gpt2", repair=True)
    assert hint in capsys.readouterr().out
    along = learned(here, "along", base="gpt2", repair=True, companions="U+200B")
    assert hint not in capsys.readouterr().out
    texts = held_out(here)
    reached = [
        chars_per_token(read_merges(made, here / "gpt2").grown().tok, texts)
        for made in (plain, along)
    ]
    assert reached[1] > 1.1 * reached[0]
    own = read_merges(along, here / "gpt2").own
    assert own.in_text("a\u200bb") and not own.in_text("a\u200cb")


@pytest.mark.parametrize("written", ["U+200B U+0964", "u+964 \u200b", "\u0964\u200b"])
def test_companions_written_in_several_ways(written):
    assert companions_of(written) == "\u0964\u200b"


def test_rule_of_characters_makes_whole_characters_or_their_own_beginning(here):
    found = read_merges(learned(here, "whole", rule="characters", repair=True), here / "qwen")
    n_broken = 0
    for merge in found.merges:
        raw = merge.left + merge.right
        try:
            raw.decode()
        except UnicodeDecodeError:
            n_broken += 1
            assert raw.removeprefix(b" ") in (b"\xe1\x9e", b"\xe1\x9f")
    assert 0 < n_broken <= 4


def test_no_piece_is_longer_than_asked_for(here):
    found = read_merges(learned(here, "short", max_chars=3, repair=True), here / "qwen")
    lengths = [len((m.left + m.right).decode(errors="replace")) for m in found.merges]
    assert max(lengths) == 4  # three characters begin in it, after the end of another one
    assert not merge_rule(found.own, "bytes", 3)("កកកក".encode())


def test_words_are_thinned_to_what_memory_holds(here):
    base, own = known_base(here / "qwen"), own_bytes("Khmer")
    texts = [text[i : i + 3000] for text in held_out(here) for i in range(0, len(text), 3000)]
    assert count_within(base, texts, own) == (count_words(base, texts, own), 1.0)
    whole, _ = count_within(base, texts, own)
    small, share = count_within(base, texts, own, memory_chars=2000)
    assert 0 < share < 1
    length = sum(
        len(b"".join(base.bytes_of[i] for i in word).decode(errors="ignore")) for word in small
    )
    assert length <= 2000
    assert sum(small.values()) / share == pytest.approx(sum(whole.values()), rel=0.1)
    assert count_within(base, texts, own, memory_chars=2000) == (small, share)


# ---- Latin


def test_exclusive_letters_are_what_others_lack():
    counts = letter_counts(["đường được ăn é ß đ"] * 30 + ["Škoda"], "Latin")
    assert exclusive_letters(counts, Counter(), "Latin") == "ĂăĐđƯưỜờỢợ"
    others = letter_counts(["ăn ăn"], "Latin")
    assert exclusive_letters(counts, others, "Latin") == "ĐđƯưỜờỢợ"
    russian = letter_counts(["қазақ тілі"] * 9, "Cyrillic")
    assert exclusive_letters(russian, Counter(), "Cyrillic") == "ІіҚқ"


def test_latin_is_exclusive_unless_said_and_each_rule_is_measured(here, capsys):
    options = dict(lang="vi", script="Latin", corpus=here / "vi", n_pieces=60)
    stats = learned(here, "vi_default", **options).stats
    said = capsys.readouterr().out
    assert "taken: exclusive, change it with --letters" in said
    beyond = {letter for word in VIETNAMESE.split() for letter in word if ord(letter) > 0xFF}
    assert set(stats["own_letters"]) == beyond | {letter.upper() for letter in beyond}
    trials = {trial["letters"]: trial for trial in stats["trials"]}
    assert list(trials) == ["exclusive", "any", "free"]
    assert trials["exclusive"]["n_changed"] == stats["n_changed_lines"] == 0
    assert trials["free"]["n_changed"] > 0
    reached = [trial["chars_per_token"] for trial in trials.values()]
    assert reached == sorted(reached)

    free = learned(here, "vi_free", letters="free", **options)
    found = read_merges(free, here / "qwen")
    assert free.stats["n_changed_lines"] == trials["free"]["n_changed"]
    assert found.own.in_text("any text") and "as asked" in capsys.readouterr().out
    assert stats["after"] == pytest.approx(trials["exclusive"]["chars_per_token"])


def test_a_language_without_letters_of_its_own_has_to_choose(here):
    options = dict(lang="en", script="Latin", corpus=here / "vi", n_pieces=60)
    with pytest.raises(
        StageError, match="no Latin letter that other languages lack; give --letters"
    ):
        learned(here, "none", **options)


# ---- search


@pytest.mark.parametrize("name", ["as_it_is", "repaired"])
def test_every_prefix_equals_a_fresh_encoding(here, pieces, name):
    found, texts = read_merges(pieces[name], here / "qwen"), held_out(here)[:10]
    steps = byte_steps(found)
    cut = read_byte_text(texts, found.grown(), "Khmer", _SENTENCE_END)
    sizes = [0, 1, 57, 200, len(steps)]
    for size, counts in all_prefixes(cut.counts, steps, sizes).items():
        assert counts == fresh_counts(found.grown(size), texts)


def test_the_search_measures_what_tokenizers_do(here, pieces):
    made = search(
        pieces["repaired"],
        here / "km",
        here / "s",
        base=str(here / "qwen"),
        lang="km",
        totals=["100", "300", "9000"],
        limit_chars=0,
    )
    texts, found = held_out(here), read_merges(pieces["repaired"], here / "qwen")
    head, *lines = (made / "table.tsv").read_text().splitlines()
    rows = [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]
    assert [int(row["n_pieces"]) for row in rows if row["domain"] == "mean"] == [100, 300, 500]
    for row in rows:
        grown = found.grown(int(row["n_pieces"]))
        expected = chars_per_token(grown.tok, texts)
        assert float(row["chars_per_token"]) == pytest.approx(expected, abs=1e-4)
    base = known_base(here / "qwen")
    assert made.stats["chars_per_token_base"] == pytest.approx(chars_per_token(base.tok, texts))
    assert made.stats["ceiling"] == pytest.approx(chars_per_pre_token(found.base.tok, texts))
    assert read_choice(made) == (made.stats["n_pieces"], 0)
    assert made.stats["n_pieces"] in (100, 300, 500)
    assert 1 < made.stats["chars_per_token"] < made.stats["ceiling"]


def test_table_and_choice_have_the_shape_of_every_search(here, pieces, tmp_path):
    made = search(
        pieces["as_it_is"], here / "km", tmp_path / "s", base=str(here / "qwen"), lang="km"
    )
    base_file = base_tokenizer_model("mixtral")
    have = base_pieces(base_file)
    texts = {"one": read_heldout(["中国人民。中国人"], base_file)}
    candidates = [Piece("中国", 0.0, "word", 2), Piece("人民", -1.0, "word", 1)]
    rows = search_table(candidates, have, texts, [1, 2], [0])
    choice = choose(rows, measure_base(have, texts)["n_tokens"])
    assert (made / "table.tsv").read_text().splitlines()[0].split("\t") == list(rows[0])
    assert list(json.loads((made / "choice.json").read_text())) == list(choice)
    assert {"ceiling"} == set(made.stats) - {"n_tried"} - {
        *choice,
        "chars_per_token_base",
        "alp_base",
        "budget",
        "n_sentences",
        "domains",
        "n_docs",
        "knee_range",
        "saved_range",
    }


# ---- what is refused


def refusal(cli, *args):
    "The one line that a command says"
    status, lines = cli(*args)
    assert status == 2 and len(lines) == 1, lines
    return lines[0]


def changed(folder, like, change):
    "A base whose file was changed"
    config = json.loads((like / "tokenizer.json").read_text())
    change(config)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(config))
    return folder


def no_merges(config):
    config["model"]["merges"] = []


def a_hole(config):
    vocab = config["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab[last] += 5


def wordpiece(config):
    config["model"] = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}


def unigram(config):
    config["model"] = {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}


def whitespace(config):
    config["pre_tokenizer"] = {"type": "Whitespace"}


BASES = [
    (no_merges, "it has no merges"),
    (a_hole, "belong to no piece"),
    (wordpiece, "is a WordPiece tokenizer, expected byte-level BPE"),
    (unigram, "is a Unigram tokenizer, expected byte-level BPE"),
    (whitespace, "does not turn text into bytes"),
]


@pytest.mark.parametrize("change, words", BASES, ids=lambda v: getattr(v, "__name__", ""))
def test_bases_that_cannot_grow(here, pieces, tmp_path, cli, change, words):
    base = changed(tmp_path / "odd", here / "qwen", change)
    asked = ("--corpus", here / "km", "--lang", "km", "--script", "Khmer", "--base", base)
    assert words in refusal(cli, "tokenizer", *asked, "--out", tmp_path / "p")
    asked = ("--pieces", pieces["repaired"], "--corpus", here / "km", "--base", base)
    status, lines = cli("search", *asked, "--lang", "km", "--out", tmp_path / "s")
    assert status == 2 and words in lines[0]


OPTIONS = [
    (
        ["--script", "Han", "--repair"],
        "repair: there is nothing to repair, the script has no marks",
    ),
    (["--script", "Latin", "--repair"], "repair: there is nothing to repair"),
    (["--script", "Klingon"], "script 'Klingon' is unknown"),
    (["--lexicons", "0.1:jieba"], "lexicons is ['0.1:jieba'], which a byte-level base has no use"),
    (["--opencc", "0.1:s2t"], "opencc is"),
    (["--n-chars", "100"], "n_chars is 100"),
    (["--no-marks"], "marks is False"),
    (["--letters", "some"], "letters is 'some', expected exclusive, any, free or nothing"),
    (["--rule", "words"], "rule is 'words', expected bytes or characters"),
    (["--companions", "a"], "companions: 'a' is in texts of every language"),
    (["--companions", "U+ZZ"], "companions: 'U+ZZ' is no character"),
    (["--companions", "U+110000"], "is no character"),
    (["--max-chars", "0"], "max_chars is 0"),
    (["--script", "Thai"], "holds no Thai characters to join"),
]


@pytest.mark.parametrize("options, words", OPTIONS, ids=lambda v: v[-1] if type(v) is list else "")
def test_options_that_cannot_be(here, tmp_path, cli, options, words):
    asked = ["--corpus", here / "km", "--lang", "km", "--base", here / "qwen"]
    script = [] if "--script" in options else ["--script", "Khmer"]
    out = ("--out", tmp_path / "p")
    assert words in refusal(cli, "tokenizer", *asked, *script, *options, *out)
    assert not (tmp_path / "p").exists()


def test_a_base_that_keeps_marks_is_not_repaired(here, cli, tmp_path):
    def keep_marks(config):
        cut = config["pre_tokenizer"]["pretokenizers"][0]
        cut["pattern"]["Regex"] = QWEN.replace(r"\p{L}+", r"[\p{L}\p{M}]+")

    base = changed(tmp_path / "base", here / "qwen", keep_marks)
    asked = ("--corpus", here / "km", "--lang", "km", "--script", "Khmer", "--repair")
    said = refusal(cli, "tokenizer", *asked, "--base", base, "--out", tmp_path / "p")
    assert "the base keeps marks with their letters already" in said


def test_options_of_byte_level_bases_say_nothing_of_others(here, cli, tmp_path):
    asked = ("--letters", "any", "--companions", "U+200B", "--repair", "--rule", "characters")
    corpus = ("--corpus", here / "km", "--out", tmp_path / "p")
    status, lines = cli("tokenizer", *corpus, *asked)
    assert status == 2
    assert len([line for line in lines if "the base is no tokenizer.json" in line]) == 4


def test_pieces_and_base_belong_together(here, pieces, cli, tmp_path):
    text = ("--corpus", here / "km", "--lang", "km", "--out", tmp_path / "s")
    of = ("--pieces", pieces["repaired"])

    def says(*asked):
        return refusal(cli, "search", *of, *asked, *text)

    assert "was made for another base" in says("--base", here / "gpt2")
    assert "expected pieces for a sentencepiece base; give --base" in says()
    qwen = ("--base", here / "qwen")
    assert "script is 'Thai', but" in says(*qwen, "--script", "Thai")
    assert "chars is ['20'], expected none" in says(*qwen, "--chars", "20")
    assert "totals is ['0'], expected whole numbers from 1 on" in says(*qwen, "--totals", "0")


def test_sentencepiece_pieces_are_none_of_a_byte_level_base(here, cli, tmp_path):
    (tmp_path / "zh.txt").write_text("中国人民使用文件。" * 50, encoding="utf-8")
    tokenizer(tmp_path / "zh.txt", tmp_path / "p", n_pieces=30)
    asked = ("--pieces", tmp_path / "p", "--corpus", tmp_path / "zh.txt", "--base", here / "qwen")
    said = refusal(cli, "search", *asked, "--out", tmp_path / "s")
    assert "its pieces are for a sentencepiece base" in said


KA = "ក".encode()
TABLES = [
    (b"left\tright\tcount\n", "holds no merge"),
    (b"piece\tscore\n", "expected left, right, count"),
    (b"\xff\xfe", "is not UTF-8"),
    (b"left\tright\tcount\na\tb\n", ":2: expected two parts and a count"),
    (b"left\tright\tcount\n\xe4\xb8\xad\tb\t1\n", ":2: expected two parts and a count"),
    ([Merge(KA[:2], KA[2:], 3)], ":2: no piece"),
    ([Merge(KA[:1], KA[1:2], 3), Merge(KA[:1], KA[1:2], 3)], ":3: 'áŀ' is a piece already"),
    ([Merge(b"q", b"\xff", 3)], ":2: 'qÿ' holds no own character"),
]


@pytest.mark.parametrize("table, words", TABLES, ids=range(len(TABLES)))
def test_tables_that_are_none(here, pieces, tmp_path, table, words):
    "A table that somebody changed, and made to fit its manifest"
    file = tmp_path / "merges.tsv"
    if isinstance(table, bytes):
        file.write_bytes(table)
    else:
        write_merges(file, table)
    with pytest.raises(StageError, match=".*") as e:
        read_merge_table(file, known_base(here / "qwen"), own_bytes("Khmer"))
    assert words in str(e.value)


def test_a_changed_table_is_noticed(here, pieces, tmp_path):
    copy = shutil.copytree(pieces["repaired"], tmp_path / "copy")
    with open(copy / "merges.tsv", "a", encoding="utf-8") as f:
        f.write("a\tb\t1\n")
    with pytest.raises(StageError, match="merges.tsv has .* bytes, expected"):
        read_merges(copy, here / "qwen")
