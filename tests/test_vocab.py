"The extended tokenizer: identity with the base, parity with sentencepiece, bad inputs."

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmixtral_nb.certificate import (
    CHECKS,
    Extension,
    certificate_texts,
    certify,
    hostile_texts,
    sentencepiece_extension,
    smallest,
    unreachable,
)
from cmixtral_nb.corpus import corpus
from cmixtral_nb.pieces import Piece, base_tokenizer_model, read_model, read_pieces
from cmixtral_nb.search import base_pieces, run_model, search, select_pieces
from cmixtral_nb.stages import Artifact, StageError, read_json, tokenizer_fingerprint, write_json
from cmixtral_nb.tokenizer import tokenizer, train_pieces
from cmixtral_nb.tokenizer_files import (
    build_fast,
    chars_per_token,
    encode_plain,
    load_tokenizer,
    processor,
    sp_merges,
    write_tokenizer,
)
from cmixtral_nb.vocab import extend_model, vocab

FEW = dict(limit_chars=30_000, n_hostile=1000)
HOSTILE = st.text(
    alphabet=st.one_of(
        st.sampled_from(" \t\n\x00ab<s>/中国词表可以使用"),
        st.characters(exclude_categories=["Cs"], exclude_characters="▁"),
    ),
    max_size=40,
)


class Made(NamedTuple):
    corpus: Artifact
    pieces: Artifact
    tokenizer: Artifact


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("vocab")
    c = corpus(
        ["zh=builtin:zh", "en=builtin:en"], out=d / "corpus", valid_share=0.1, limit_chars=150_000
    )
    p = tokenizer(c, out=d / "pieces", n_pieces=3500, n_chars=2500)
    return Made(c, p, vocab(p, out=d / "tok", n_pieces=900, n_chars=1700, corpus=c, **FEW))


@pytest.fixture(scope="module")
def both(made):
    return (
        processor(base_tokenizer_model()),
        processor(made.tokenizer / "tokenizer.model"),
        load_tokenizer(made.tokenizer),
    )


# ---- identity and parity


def test_files_and_counts(made):
    v = made.tokenizer
    assert sorted(v.manifest["files"]) == [
        "certificate.json",
        "pieces.tsv",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert v.stats["n_vocab"] == 32900 == v.stats["n_base"] + v.stats["n_pieces"]
    assert v.stats["n_chars"] == 1700 - 1456
    assert v.manifest["tokenizer"] == tokenizer_fingerprint(v.path)
    assert v.stats["chars_per_token"] > 1.2 * v.stats["chars_per_token_base"]
    m = read_model(v / "tokenizer.model")
    assert m.trainer_spec.vocab_size == 32900
    in_model = [(i, p.piece, p.score) for i, p in enumerate(m.pieces)]
    in_table = [(int(r[0]), r[1], float(r[2])) for r in table_rows(v)]
    assert in_table == in_model[32000:]


def table_rows(folder):
    "Columns of each line of pieces.tsv below its head"
    lines = (folder / "pieces.tsv").read_text().splitlines()
    return [line.split("\t") for line in lines[1:]]


def test_first_pieces_are_the_bases(made):
    base = read_model(base_tokenizer_model()).pieces
    new = read_model(made.tokenizer / "tokenizer.model").pieces
    kept = [(p.piece, p.score, p.type) for p in new][:32000]
    assert kept == [(p.piece, p.score, p.type) for p in base]
    # below the blanks that carry -1e9, and apart in float32
    assert [p.score for p in new][32000:] == [-1e9 - 128 * i for i in range(1, 901)]


@given(HOSTILE)
@settings(max_examples=300, deadline=None)
def test_fast_equals_sentencepiece_and_gives_the_text_back(both, t):
    base, new, tok = both
    assert encode_plain(tok, [t])[0] == new.encode(t)
    assert new.decode(new.encode(t)) == t
    assert tok.decode(new.encode(t)) == t


@given(
    st.text(alphabet=st.characters(max_codepoint=0x2E7F, exclude_categories=["Cs"]), max_size=60)
)
@settings(max_examples=300, deadline=None)
def test_text_without_han_keeps_its_ids(both, t):
    base, new, _ = both
    assert new.encode(t) == base.encode(t)


def test_any_han_text_is_never_longer(both, made):
    base, new, _ = both
    for t in certificate_texts(made.corpus, limit_chars=30_000)[0]:
        assert len(new.encode(t)) <= len(base.encode(t))


def test_certificate(made):
    lines = read_json(made.tokenizer / "certificate.json")
    assert len(lines) == 10
    assert all(
        line["failed"] == 0 and line["cases"] > 0 and line["examples"] == [] for line in lines
    )
    assert made.tokenizer.stats["certificate"]["ids of texts without Han unchanged"]["failed"] == 0


# ---- a certificate that must fail


def edit(m, **values):
    "Piece 5000 gets other values"
    for name, value in values.items():
        setattr(m.pieces[5000], name, value)


def prefer(m, piece):
    "A piece that is chosen before all others"
    next(p for p in m.pieces if p.piece == piece).score = 1


def append(m, **values):
    m.pieces.add(**values)


OLD_PIECES = "old pieces keep ids, scores and types"
OLD_TEXTS = "ids of texts without Han unchanged"
NEW_WORD = dict(piece="囍囍囍囍", score=-4e9)


@pytest.mark.parametrize(
    "change, values, check, shown",
    [
        (edit, dict(piece="zzq"), OLD_PIECES, "END"),
        (prefer, dict(piece="nf"), "old pieces are cut as before", ""),
        (edit, dict(score=-9.0), OLD_PIECES, "END"),
        (edit, dict(type=3), OLD_PIECES, "END"),
        (edit, dict(type=5), OLD_PIECES, "END"),  # unused: no text gives it
        (append, dict(piece="e t", score=0), "new pieces reachable", "e t"),
        (append, NEW_WORD, "new pieces reachable", "囍囍囍囍"),
        (append, NEW_WORD, "new pieces have all their characters", "囍囍囍囍"),
        (prefer, dict(piece="nf"), OLD_TEXTS, "nf"),
        (append, dict(piece="<|end|>", score=0, type=4), OLD_TEXTS, "<|end|>"),
    ],
)
def test_certificate_finds(change, values, check, shown, both, tmp_path):
    m = read_model(base_tokenizer_model())
    change(m, **values)
    (tmp_path / "m.model").write_bytes(m.SerializeToString())
    tok = load_tokenizer(write_tokenizer(tmp_path / "m.model", tmp_path / "t"))
    texts = [
        "confetti painful unfair information on foot, unfold, infant",
        "we say <|end|> here",
        "词表",
        " a",
    ]
    line = certified(both[0], processor(m), tok, texts)[check]
    assert line["failed"]
    assert shown in line["examples"][0]
    assert len(line["examples"][0]) < 30


def certified(base, new, tok, texts):
    "Lines of the certificate by their check"
    ext = sentencepiece_extension(base, new, tok, texts)
    return {line["check"]: line for line in certify(ext)}


def test_few_texts_are_counted_once(both):
    base, new, tok = both
    lines = certified(base, new, tok, ["a", "词表", "the <s> end"])
    assert lines["decoding gives the text back"]["cases"] == 3
    assert lines["saved and loaded again, the same"]["cases"] == 3
    assert lines["with special tokens: BOS, then the same ids"]["cases"] == 3


def test_wrong_fast_tokenizer_is_found_with_the_smallest_text(both, made, tmp_path):
    base, new, _ = both
    t = json.loads((made.tokenizer / "tokenizer.json").read_text())
    pieces = {p.piece for p in read_pieces(made.tokenizer)}
    words = [a + b for a, b in t["model"]["merges"] if "▁" not in a]
    gone = next(word for word in words if len(word) == 2 and word in pieces)
    t["model"]["merges"] = [m for m in t["model"]["merges"] if "".join(m) != gone]
    shutil.copytree(made.tokenizer.path, tmp_path / "t")
    write_json(tmp_path / "t/tokenizer.json", t)
    texts = ["a", f"long before {gone} and long after", "词"]
    lines = certified(base, new, load_tokenizer(tmp_path / "t"), texts)
    assert lines["fast tokenizer equals sentencepiece"]["examples"] == [repr(gone)]
    assert not lines["new pieces reachable"]["failed"]


def test_control_tokens_that_text_can_spell_are_found(both, made, tmp_path):
    v = vocab(made.pieces, out=tmp_path / "v", n_pieces=50, n_chars=1480, tokens=["<|end|>"], **FEW)
    shutil.copytree(v.path, tmp_path / "t")
    t = json.loads((v / "tokenizer.json").read_text())
    end = next(a for a in t["added_tokens"] if a["content"] == "<|end|>")
    end["special"] = False  # then it is cut out of any text
    write_json(tmp_path / "t/tokenizer.json", t)
    new, tok = processor(v / "tokenizer.model"), load_tokenizer(tmp_path / "t")
    lines = certified(both[0], new, tok, ["a", "the <|end|> 词表"])
    assert lines["no control token from plain text"]["examples"][0] == repr("<|end|>")


class ByteLevelView:
    "A byte-level tokenizer as the checks see it: nothing of sentencepiece"

    reader, kept = "tokenizers", "ids"
    front: list[int] = []
    back: list[int] = []

    def __init__(self, tok):
        self.tok, self.silent = tok, set(tok.all_special_ids)

    def __len__(self):
        return len(self.tok)

    def piece(self, i):
        return self.tok.convert_ids_to_tokens(i)

    def readable(self, piece):
        return piece

    def comes_back_as(self, text):
        return text

    def entry(self, i):
        return self.piece(i), i in self.silent

    def encode(self, texts):
        return encode_plain(self.tok, texts)

    def encode_one(self, text):
        return self.encode([text])[0]

    def decode(self, ids):
        return self.tok.batch_decode(ids, clean_up_tokenization_spaces=False)

    def encode_pieces(self, pieces):
        model = self.tok.backend_tokenizer.model
        return [[t.id for t in model.tokenize(piece)] for piece in pieces]


def byte_level(merges):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tok)


def test_the_checks_serve_another_kind_of_tokenizer():
    "Old merges kept, new ones after them: what an extension of a byte-level vocabulary will be"
    old, han = [("t", "h"), ("th", "e")], [("ä", "¸"), ("ä¸", "Ń")]  # 中 in bytes
    base, texts = byte_level(old), ["the 中国", "the end", *hostile_texts(200, ["中"])]
    for merges, n_failed in (
        ([*old, *han], 0),
        ([("t", "x"), *old, *han], 3),  # every later id has moved: two checks see it, and texts
    ):
        tok = byte_level(merges)
        ext = Extension(ByteLevelView(base), ByteLevelView(tok), tok, texts)
        lines = certify(ext)
        assert len(lines) == 10 == len(CHECKS)
        assert sum(line["failed"] > 0 for line in lines) == n_failed


@given(st.text(max_size=30), st.sampled_from(["ab", "中", " \t"]), st.text(max_size=30))
def test_smallest_finds_the_culprit(before, culprit, after):
    got = smallest(before + culprit + after, lambda t: culprit in t)
    assert got == culprit


def test_a_failing_line_stops_the_stage(made, monkeypatch, tmp_path):
    import cmixtral_nb.vocab as module

    few = [Piece("的人", 0, "word", 0), Piece("人民", -1, "word", 0)]
    odd = [Piece("the", 0, "word", 0), Piece("he r", 0, "word", 0)]
    monkeypatch.setattr(module, "scores_below", lambda low, n: [9e5 - i for i in range(n)])
    monkeypatch.setattr(module, "read_pieces", lambda *a: few)
    monkeypatch.setattr(module, "select_pieces", lambda *a: odd)
    with pytest.raises(
        StageError,
        match="certificate: new pieces reachable: 1 of 1 failed, such as 'he r'; "
        "append other pieces",
    ):
        vocab(made.pieces, out=tmp_path / "v", n_pieces=2, **FEW)
    assert not (tmp_path / "v").exists()
    assert not (tmp_path / "v.tmp").exists()


def test_the_certificate_cannot_be_skipped(made, tmp_path):
    with pytest.raises(StageError) as e:
        vocab(made.pieces, out=tmp_path / "v", n_pieces=2, limit_chars=0, n_hostile=0)
    assert str(e.value).count("there is no tokenizer without a certificate") == 2


# ---- control tokens and padding


def test_control_tokens_and_padding(made, tmp_path):
    from transformers import AutoTokenizer

    chat = ["<|beginofutterance|>", "<|endofutterance|>"]
    v = vocab(
        made.pieces, out=tmp_path / "v", n_pieces=100, n_chars=1500, tokens=chat, multiple=64, **FEW
    )
    m, tok = read_model(v / "tokenizer.model"), AutoTokenizer.from_pretrained(str(v.path))
    assert len(m.pieces) == v.stats["n_vocab"] == len(tok) == 32128
    assert v.stats["n_special"] == 28
    assert [p.piece for p in m.pieces[32100:32102]] == chat
    assert tok.convert_tokens_to_ids(chat) == [32100, 32101]
    assert tok(chat[0])["input_ids"] == [1, 32100]
    from_text = encode_plain(tok, [f"a{chat[0]}{chat[1]} <unused0>"])[0]
    assert not {32100, 32101} & set(from_text)
    ids = [32100, *encode_plain(tok, ["词表"])[0]]
    assert tok.decode(ids, skip_special_tokens=True).strip() == "词表"
    rows = table_rows(v)
    assert [r[3] for r in rows[100:]] == ["control"] * 2 + ["unused"] * 26
    assert rows[-1][1] == "<unused25>"


@pytest.mark.parametrize("tokens", [["<s>"], ["a b"], [""], ["<|x|>", "<|x|>"], ["▁x"]])
def test_control_tokens_that_are_refused(made, tmp_path, tokens):
    with pytest.raises(
        StageError,
        match="expected control tokens without blanks, each once, that the base does not have",
    ):
        vocab(made.pieces, out=tmp_path / "v", n_pieces=2, tokens=tokens)


# ---- reachability


def test_dead_pieces_are_left_out():
    base = base_tokenizer_model()
    odd = [
        Piece("葡", 0, "char", 9),
        Piece("萄", 0, "char", 8),
        Piece("葡萄美酒", -1, "word", 0),
        Piece("葡萄", -2, "word", 0),
        Piece("美酒", -3, "word", 0),
    ]
    chosen = select_pieces(odd, base_pieces(base), 9)
    # the whole after its parts
    assert [p.piece for p in chosen] == ["葡", "萄", "葡萄", "美酒", "葡萄美酒"]
    assert unreachable(processor(extend_model(base, chosen)), 32000) == []
    odd.pop()
    assert [p.piece for p in select_pieces(odd, base_pieces(base), 9)] == ["葡", "萄", "葡萄"]
    assert unreachable(processor(extend_model(base, odd)), 32000) == ["葡萄美酒"]


def test_indentation_before_a_piece_with_a_blank_stays(both):
    base, new, _ = both
    for n in range(2, 20):
        text = " " * n + "一个文件"
        before, after = base.encode(text, out_type=str), new.encode(text, out_type=str)
        assert after[:-2] == [piece for piece in before if piece.startswith("▁")]
        assert "".join(after) == "▁" * (n + 1) + "一个文件"


def test_chars_per_token_of_nothing():
    assert chars_per_token(processor(base_tokenizer_model()), []) == 0


# ---- loading and control tokens


def test_control_tokens_in_text_are_text(both):
    _, new, tok = both
    t = "a</s><s> <unk>"
    ids = encode_plain(tok, [t, ""])
    assert ids == [new.encode(t), []]
    assert not {0, 1, 2} & set(ids[0])
    stock = tok(t)["input_ids"]  # a stock call is as it was, also after encode_plain
    assert stock[0] == 1
    assert 2 in stock
    base = base_tokenizer_model()
    assert encode_plain(build_fast(base), ["</s>"]) == [processor(base).encode("</s>")]


def test_added_special_tokens_in_text_are_text(made):
    tok = load_tokenizer(made.tokenizer)
    tok.add_special_tokens({"additional_special_tokens": ["<|endofutterance|>"]})
    assert 32900 not in encode_plain(tok, ["x<|endofutterance|>"])[0]
    assert 32900 in tok("x<|endofutterance|>")["input_ids"]


def test_stock_loading_with_and_without_a_model_config(both, tmp_path):
    from transformers import AutoTokenizer

    base = both[0]
    write_tokenizer(base_tokenizer_model(), tmp_path)
    write_json(
        tmp_path / "config.json",
        dict(model_type="mixtral", architectures=["MixtralForCausalLM"], vocab_size=32000),
    )
    tok = AutoTokenizer.from_pretrained(str(tmp_path))
    for t in ("    return x", "A  B", "中 国\t"):
        assert tok(t)["input_ids"] == [1, *base.encode(t)]
        assert tok(t, add_special_tokens=False)["input_ids"] == base.encode(t)
        assert tok.decode(tok(t)["input_ids"], skip_special_tokens=True) == t
    assert (tok.bos_token, tok.eos_token, tok.unk_token) == ("<s>", "</s>", "<unk>")
    assert tok.pad_token is None
    assert len(tok) == 32000
    tok.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again("A  B")["input_ids"] == [1, *base.encode("A  B")]
    assert tokenizer_fingerprint(tmp_path / "again") == tokenizer_fingerprint(tmp_path)


def test_writing_over_itself_keeps_the_model(tmp_path):
    f = Path(shutil.copyfile(base_tokenizer_model(), tmp_path / "tokenizer.model"))
    before = f.read_bytes()
    write_tokenizer(f, tmp_path)
    assert f.read_bytes() == before


def test_sp_merges_are_ordered_by_score():
    m = read_model(base_tokenizer_model())
    score = {p.piece: p.score for p in m.pieces}
    found = [score[a + b] for a, b in sp_merges(m)]
    assert found == sorted(found, reverse=True)


def test_hostile_texts_depend_on_the_seed_alone():
    texts = hostile_texts(50, ["中"], 3)
    assert hostile_texts(50, ["中"], 3) == texts
    assert hostile_texts(50, ["中"], 4) != texts
    assert "▁" not in "".join(hostile_texts(3000, ["中"]))


# ---- foreign bases and bad inputs


def test_another_bpe_base(made, tmp_path):
    write_tokenizer(made.tokenizer / "tokenizer.model", tmp_path / "base")
    v = vocab(
        made.pieces,
        out=tmp_path / "v",
        base=str(tmp_path / "base"),
        n_pieces=200,
        n_chars=1720,
        **FEW,
    )
    assert (v.stats["n_base"], v.stats["n_vocab"], v.stats["n_chars"]) == (32900, 33100, 20)


def test_a_base_with_tokens_that_its_model_lacks(made, tmp_path):
    "Control tokens of a fine-tune, whose ids the new pieces would get"
    folder = write_tokenizer(base_tokenizer_model(), tmp_path / "base")
    config = read_json(folder / "tokenizer.json")
    config["added_tokens"].append(dict(config["added_tokens"][0], id=32000, content="<|im_end|>"))
    write_json(folder / "tokenizer.json", config)
    with pytest.raises(
        StageError, match="such as '<.im_end.>', and new pieces would get their ids"
    ):
        vocab(made.pieces, out=tmp_path / "v", base=str(folder), n_pieces=200)
    with pytest.raises(StageError, match="give --base .*tokenizer.json"):
        search(made.pieces, made.corpus, out=tmp_path / "s", base=str(folder))


def test_a_unigram_base_is_refused(made, tmp_path):
    import sentencepiece as spm

    text = [f"word{i} other{i % 7} thing" for i in range(300)]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(tmp_path / "u"),
        model_type="unigram",
        vocab_size=40,
        minloglevel=2,
    )
    with pytest.raises(
        StageError, match="u.model is a unigram model, expected BPE; extend another base"
    ):
        vocab(made.pieces, out=tmp_path / "v", base=str(tmp_path / "u.model"), n_pieces=10)


def test_search_decides(made, tmp_path):
    write_json(tmp_path / "choice.json", dict(n_pieces=300, n_chars=1600, why=""))
    v = vocab(made.pieces, out=tmp_path / "v", search=tmp_path / "choice.json", **FEW)
    assert (v.stats["n_pieces"], v.stats["n_chars"]) == (300, 144)
    new = [
        p.piece
        for p in select_pieces(
            read_pieces(made.pieces), base_pieces(base_tokenizer_model()), 300, 1600
        )
    ]
    rows = (v / "pieces.tsv").read_text().splitlines()[1:]
    assert [row.split("\t")[1] for row in rows] == new
    assert run_model({}, []).encode("字") != []


def test_khmer_from_text_to_certificate(tmp_path):
    "Nothing assumes Han: other texts keep their ids, Khmer takes fewer tokens"
    text = corpus(["km=builtin:km"], out=tmp_path / "c", valid_share=0.1, limit_chars=150_000)
    khmer = dict(lang="km", script="Khmer")
    pieces = tokenizer(text, out=tmp_path / "p", n_pieces=400, method="continued", **khmer)
    assert all("ក" <= p.piece[-1] <= "៿" for p in read_pieces(pieces, "Khmer"))
    few = dict(n_hostile=1000, limit_chars=10_000, script="Khmer", corpus=text)
    made = vocab(pieces, out=tmp_path / "v", n_pieces=200, **few)
    certificate = made.stats["certificate"]
    assert certificate["ids of texts without Khmer unchanged"]["cases"] > 500
    assert not any(line["failed"] for line in certificate.values())
    assert made.stats["chars_per_token"] > 1.5 * made.stats["chars_per_token_base"]


def test_all_faults_at_once(tmp_path):
    with pytest.raises(StageError) as e:
        vocab(tmp_path / "p", out=tmp_path / "v", base="gemma", n_chars=-1, corpus=tmp_path / "c")
    assert len(e.value.args) == 5
    for words in (
        "n_chars is -1, expected at least 0",
        "how many pieces? give a number or a search",
        "expected pieces; run: cmixtral tokenizer",
        "gemma: no such tokenizer",
        "expected a corpus; run: cmixtral corpus",
    ):
        assert words in str(e.value)


def test_too_few_pieces_and_a_folder_without_a_tokenizer(made, tmp_path):
    with pytest.raises(
        StageError, match="were asked for; lower n_pieces, or run: cmixtral tokenizer --n-pieces N"
    ):
        vocab(made.pieces, out=tmp_path / "v", n_pieces=9999)
    with pytest.raises(
        StageError, match="holds no tokenizer.json, expected a tokenizer; run: cmixtral vocab"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StageError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_pieces_trained_elsewhere(tmp_path):
    from collections import Counter

    m = train_pieces(Counter({"葡萄美酒": 9, "葡萄": 5, "夜光杯": 4}), tmp_path / "other.model", 12)
    v = vocab(m, out=tmp_path / "v", n_pieces=5, **FEW)
    assert v.stats["n_vocab"] == 32005
