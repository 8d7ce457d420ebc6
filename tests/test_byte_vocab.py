"`vocab` and `init` for bases with a tokenizer.json: the certificate, the files, the rows."

import json
import random
from dataclasses import replace
from functools import cache
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cmixtral_nb.byte_bases import (
    ByteBase,
    SpacedBase,
    config_folder,
    read_byte_base,
    to_letters,
    write_byte_tokenizer,
)
from cmixtral_nb.byte_vocab import (
    RANKS,
    BpeView,
    ByteExtension,
    append_merges,
    byte_checks,
    forged,
    load_as_in_model,
    model_rows,
    neighbours,
    stock_frame,
    tiktoken_of,
    why_no_ranks,
    with_tokens,
)
from cmixtral_nb.bytelevel import (
    OwnBytes,
    count_words,
    extended,
    learn_merges,
    own_characters,
    repaired,
)
from cmixtral_nb.certificate import certify, hostile_texts
from cmixtral_nb.init import init
from cmixtral_nb.llama_rules import rule_tokenizer
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.stages import StageError, read_json
from cmixtral_nb.tokenizer import tokenizer
from cmixtral_nb.tokenizer_files import build_fast, encode_plain, load_tokenizer
from cmixtral_nb.vocab import vocab

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SCRIPTS = ["Khmer", "Thai", "Georgian", "Hangul", "Kana"]
ENGLISH = "the other thing that we want is to keep the text as it is, and not to change it"
FEW: dict[str, Any] = dict(limit_chars=10_000, n_hostile=1000)
ROWS = 512  # of the model; its tokenizer has fewer ids


def tiny_base():
    "A byte-level base with Qwen's expression and normaliser, some English, two control tokens"
    letters = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    cut = dict(type="Split", pattern={"Regex": QWEN}, behavior="Isolated", invert=False)
    pieces = ByteBase({}).byte_pieces
    vocab = {piece: i for i, piece in enumerate(pieces)}
    base = ByteBase(
        dict(
            version="1.0",
            added_tokens=[],
            normalizer=dict(type="NFC"),
            pre_tokenizer=dict(type="Sequence", pretokenizers=[cut, letters]),
            decoder=letters,
            model=dict(type="BPE", vocab=vocab, merges=[["t", "h"]])
            | {"vocab": {**vocab, "th": 256}},
        )
    )
    everything = OwnBytes({chr(code) for code in range(32, 127)})
    words = count_words(base, [ENGLISH] * 3, everything)
    grown = extended(base, learn_merges(words, base.bytes_of, lambda raw: True, 60))
    last, first = to_letters(b"\x80"), to_letters(b"\xe1")  # of two characters, as in real bases
    grown = forged(grown, {last + first: grown.first_free}, [[last, first]])
    return with_tokens(grown, ["<|endoftext|>", "<|im_end|>"])


def texts_of(script, seed):
    "Texts of random characters of a script, from a small set so that pairs repeat"
    rng = random.Random(seed)
    some = rng.sample(sorted(own_characters(script)), 30)
    return [" ".join("".join(rng.choices(some, k=6)) for _ in range(40)) for _ in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The tiny base as the folder of a Qwen3 model with tied and padded rows"
    path = tmp_path_factory.mktemp("bytes") / "base"
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8)
    config = Qwen3Config(
        vocab_size=ROWS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        **sizes,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    write_byte_tokenizer(tiny_base(), path)
    said = dict(
        tokenizer_class="Qwen2Tokenizer",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template="{{ messages[0].content }}",
    )
    (path / "tokenizer_config.json").write_text(json.dumps(said))
    return path


@pytest.fixture(scope="module")
def pieces(folder):
    rows = [json.dumps(dict(text=text)) for text in texts_of("Khmer", 0)]
    (folder.parent / "km.jsonl").write_text("\n".join(rows))
    return tokenizer(
        folder.parent / "km.jsonl",
        out=folder.parent / "pieces",
        base=str(folder),
        lang="km",
        script="Khmer",
        n_pieces=150,
        repair=True,
    )


@pytest.fixture(scope="module")
def made(folder, pieces):
    how = dict(n_pieces=140, tokens=["<|tool|>"], multiple=64)
    return vocab(pieces, out=folder.parent / "tok", base=str(folder), **how, **FEW)


# ---- the files


def test_ids_go_on_after_all_ids_in_use(folder, made):
    old, new = load_tokenizer(folder), load_tokenizer(made)
    before, after = old.get_vocab(), new.get_vocab()
    assert before.items() <= after.items()
    assert sorted(after.values()) == list(range(len(old) + 141))  # no holes, and no unused tokens
    assert after["<|tool|>"] == len(old) + 140  # the model's rows are enough, and 512 is 8 * 64
    assert (new.eos_token, new.pad_token, new.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert new.chat_template == old.chat_template
    assert made.stats["n_vocab"] == len(new) and made.stats["n_special"] == 1


def test_table_of_what_is_new(folder, made):
    tok, old = load_tokenizer(made), load_tokenizer(folder)
    head, *rows = (made / "pieces.tsv").read_text().splitlines()
    assert head.split("\t") == ["id", "piece", "kind", "count"]
    rows = [row.split("\t") for row in rows]
    assert [int(row[0]) for row in rows] == list(range(len(old), len(tok)))
    for i, piece, kind, count in rows:
        if kind == "word":
            assert tok.decode([int(i)]) == piece.replace("▁", " ")
        assert (int(count) > 0) == (kind != "control")
    assert {row[2] for row in rows} >= {"char", "word", "control"}


def test_every_reader_gives_the_same_ids(made, folder, monkeypatch):
    "tokenizers, AutoTokenizer beside the model's configuration, and tiktoken from the ranks"
    from tiktoken.load import load_tiktoken_bpe

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # it keeps files by their path
    grown = read_byte_base(made.path)
    view = BpeView(grown)
    texts = [*texts_of("Khmer", 1), *hostile_texts(300, ["ខ្មែ"]), "the <|im_end|> text"]
    ids = view.encode(texts)
    assert encode_plain(load_as_in_model(made.path, folder), texts) == ids
    ranks = load_tiktoken_bpe(str(made / RANKS))
    assert ranks == {raw: i for i, raw in grown.bytes_of.items()}
    normal = [view.normal(text) for text in texts]
    assert tiktoken_of(grown).encode_batch(normal, disallowed_special=()) == ids


def test_certificate_and_ceiling(made):
    lines = read_json(made / "certificate.json")
    checks = [line for line in lines if "check" in line]
    assert len(checks) == 14 and all(line["cases"] for line in checks)
    assert {line["failed"] for line in checks} == {0}
    (repair,) = [line for line in lines if "repair" in line.get("counted", "")]
    assert 0 < repair["changed"] <= repair["cases"]


# ---- valid extensions pass


own_of = cache(lambda script: OwnBytes(own_characters(script)))
BASE = tiny_base()


def grown_from(base, script, n_merges, repair, n_tokens):
    own = own_of(script)
    working = (repaired(base, own) if repair else None) or base
    words = count_words(working, texts_of(script, 0)[:5], own)
    merges = learn_merges(words, base.bytes_of, own.in_bytes, n_merges)
    names = [f"<|token {i}|>".replace(" ", "_") for i in range(n_tokens)]
    return own, with_tokens(extended(working, merges), names)


def failed_lines(before, after, own, texts, tok=None):
    ext = ByteExtension(BpeView(before), BpeView(after), tok, texts, "it", own)
    lines = certify(ext, byte_checks(ext))
    assert len(lines) >= 10
    return {line["check"]: line for line in lines if line.get("failed")}


@settings(max_examples=10, deadline=None)
@given(
    script=st.sampled_from(SCRIPTS),
    n_merges=st.integers(1, 120),
    repair=st.booleans(),
    n_tokens=st.integers(0, 2),
    texts=st.lists(st.text(max_size=30), max_size=30),
)
def test_any_valid_extension_passes(script, n_merges, repair, n_tokens, texts):
    base = BASE
    own, grown = grown_from(base, script, n_merges, repair, n_tokens)
    texts += [*texts_of(script, 1)[:3], *neighbours(own, 50), ENGLISH]
    assert failed_lines(base, grown, own, texts) == {}


def test_a_vocabulary_of_characters_passes():
    "Mixtral's tokenizer in the form of Gemma's: characters that it lacks become pieces"
    base = SpacedBase(json.loads(build_fast(base_tokenizer_model()).to_str()))
    own, grown = grown_from(base, "Khmer", 100, False, 1)
    texts = [text.replace("▁", "_") for text in (*texts_of("Khmer", 1), *neighbours(own, 50))]
    assert failed_lines(base, grown, own, [*texts, ENGLISH]) == {}
    assert "characters" in why_no_ranks(grown)


# ---- careless ones fail, and the line says where


def careless_rule(base, own, grown):
    words = count_words(base, texts_of("Khmer", 0), own)
    return extended(base, learn_merges(words, base.bytes_of, lambda raw: True, 100))


def another_way(base, own, grown):
    "A new piece by other parts than its own: of three pieces in a row, the other two first"
    vocab = grown.config["model"]["vocab"]
    for left, right in grown.config["model"]["merges"][::-1]:
        whole = left + right
        for cut in range(1, len(whole)):
            if whole[:cut] != left and {whole[:cut], whole[cut:]} <= vocab.keys():
                return forged(grown, merges=[[whole[:cut], whole[cut:]]])
    raise AssertionError("no piece has two ways")


def moved(base, own, grown):
    i = base.config["model"]["vocab"]
    return forged(grown, {"Ġthe": i["Ġto"], "Ġto": i["Ġthe"]})


def moved_control(base, own, grown):
    added = [dict(token) for token in grown.config["added_tokens"]]
    for token, i in zip(added, [token["id"] for token in added[::-1]], strict=True):
        token["id"] = i
    vocab = {token["content"]: token["id"] for token in added}
    return forged(grown, vocab, added_tokens=added)


def old_made_again(base, own, grown):
    return forged(grown, merges=[grown.config["model"]["merges"][0]])  # again, and so later


def english(base, own, grown):
    return forged(grown, {"Ġthet": grown.first_free}, [["Ġthe", "t"]])


def unreachable(base, own, grown):
    return forged(grown, {"áĢ": grown.first_free})


def other_cut(base, own, grown):
    return forged(grown, pre_tokenizer=base.config["pre_tokenizer"]["pretokenizers"][1])


@pytest.mark.parametrize(
    "change, checks",
    [
        (careless_rule, ["new pieces hold an own character", "ids of texts without it unchanged"]),
        (another_way, ["new pieces have one merge of known parts"]),
        (moved, ["old pieces keep ids, merges and flags", "ids of texts without it unchanged"]),
        (moved_control, ["old pieces keep ids, merges and flags"]),
        (old_made_again, ["old pieces keep ids, merges and flags"]),
        (english, ["new pieces hold an own character", "ids of texts without it unchanged"]),
        (unreachable, ["new pieces reachable", "new pieces have one merge of known parts"]),
        (other_cut, ["texts without own marks are cut as before"]),
    ],
)
def test_certificate_finds(change, checks):
    base = BASE
    own, grown = grown_from(base, "Khmer", 60, False, 0)
    texts = [
        "the t, the other",
        "we are in the thett",
        *neighbours(own, 3000),
        *texts_of("Khmer", 1),
    ]
    failed = failed_lines(base, change(base, own, grown), own, texts)
    assert {*checks} <= {*failed}
    assert len(failed) < 8


def test_a_lost_regular_expression_is_found(made, folder, tmp_path):
    "transformers' Qwen2Tokenizer brings its own"
    config = json.loads((made / "tokenizer_config.json").read_text())
    write_byte_tokenizer(read_byte_base(made.path), tmp_path, made.path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | dict(tokenizer_class="Qwen2Tokenizer"))
    )
    own = OwnBytes(own_characters("Khmer"))
    lost = load_tokenizer(tmp_path)
    texts = texts_of("Khmer", 1)[:5]
    failed = failed_lines(read_byte_base(folder), read_byte_base(made.path), own, texts, lost)
    assert "fast tokenizer equals tokenizers" in failed


def test_a_stage_stops_at_a_failing_line(made, folder, pieces, tmp_path, monkeypatch):
    import cmixtral_nb.byte_vocab as module

    def mended(found):
        grown = extended(found.base, found.merges)
        return forged(grown, merges=[grown.config["model"]["merges"][0]])

    monkeypatch.setattr(module.BytePieces, "grown", mended)
    with pytest.raises(
        StageError, match="certificate: old pieces keep ids, merges and flags: 1 of"
    ):
        append_merges(tmp_path, pieces, str(folder), 10, **FEW)


# ---- what is refused


def test_all_faults_at_once(folder, pieces, tmp_path):
    with pytest.raises(StageError) as e:
        vocab(
            pieces,
            out=tmp_path / "v",
            base=str(folder),
            n_pieces=10**6,
            tokens=["<|im_end|>", "a b"],
            n_hostile=1,
        )
    assert "1,000,000 were asked for" in str(e.value)
    assert "'<|im_end|>', 'a b': expected control tokens" in str(e.value)
    assert "no tokenizer without a certificate" in str(e.value)
    assert not (tmp_path / "v").exists()


def test_another_base_is_refused(folder, pieces, tmp_path):
    write_byte_tokenizer(forged(BASE, {"zzz": BASE.first_free}), tmp_path / "other", folder)
    with pytest.raises(StageError, match="was made for another base"):
        vocab(pieces, out=tmp_path / "v", base=str(tmp_path / "other"), n_pieces=5)


def test_a_repair_that_would_be_lost(folder, pieces, tmp_path):
    "transformers cuts the texts of every Qwen2 model by the class's own expression"
    other = tmp_path / "qwen2"
    write_byte_tokenizer(read_byte_base(folder), other, folder)
    (other / "config.json").write_text(json.dumps(dict(model_type="qwen2")))
    assert (other / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    with pytest.raises(StageError, match="would be lost; run: cmixtral tokenizer without --repair"):
        vocab(pieces, out=tmp_path / "v", base=str(other), n_pieces=5)


# ---- rows


def old_parts(view, i, n_old):
    "Old ids that a new one is made of, merge by merge"
    if i < n_old:
        return [i]
    ((_, left, right),) = view.merges_of[view.piece(i)]
    return [old for part in (left, right) for old in old_parts(view, view.id_of[part], n_old)]


def test_rows_are_means_of_the_parts(folder, made, tmp_path):
    "Also of a piece that ends within a character; padded rows are filled before any is added"
    model = init(folder, made, out=tmp_path / "model")
    old = AutoModelForCausalLM.from_pretrained(folder)
    new = AutoModelForCausalLM.from_pretrained(model.path)
    W, V = old.get_input_embeddings().weight, new.get_input_embeddings().weight
    assert new.lm_head.weight is V
    n_old, view = len(load_tokenizer(folder)), BpeView(read_byte_base(made.path))
    assert V.shape == W.shape == (ROWS, 16)
    assert torch.equal(V[:n_old], W[:n_old]) and torch.equal(V[len(view) :], W[len(view) :])
    kinds = set()
    for i in range(n_old, len(view) - 1):
        parts = old_parts(view, i, n_old)
        assert torch.allclose(V[i], W[parts].mean(0), atol=1e-6)
        kinds.add("<0x" in view.readable(view.piece(i)))
    assert kinds == {True, False}
    assert encode_plain(load_tokenizer(model), ["the"]) == encode_plain(
        load_tokenizer(folder), ["the"]
    )


def test_more_pieces_than_rows(folder, pieces, tmp_path):
    "The padded rows give way first, then the matrix grows to the multiple that was asked for"
    names = [f"<|{i}|>" for i in range(70)]
    how = dict(n_pieces=150, tokens=names, multiple=64)
    v = vocab(pieces, out=tmp_path / "v", base=str(folder), **how, **FEW)
    assert v.stats["n_base"] + 150 + 70 > ROWS
    assert v.stats["n_vocab"] == ROWS + 64
    model = init(folder, v, out=tmp_path / "model")
    assert model.stats["n_rows"] == ROWS + 64 == len(load_tokenizer(v))
    net = AutoModelForCausalLM.from_pretrained(model.path)
    assert len(net.get_input_embeddings().weight) == net.config.vocab_size == ROWS + 64
    rows = [line.split("\t")[2] for line in (v / "pieces.tsv").read_text().splitlines()[1:]]
    assert [kind for kind, _ in groupby(rows)][-2:] == ["control", "unused"]


def test_what_stands_in_front_stays(folder, tmp_path):
    "A base whose template puts BOS in front of a text and EOS behind it"
    from cmixtral_nb.byte_bases import template
    from cmixtral_nb.byte_vocab import write_extended

    base = read_byte_base(folder)
    bos, eos = ("<|endoftext|>", base.first_free - 2), ("<|im_end|>", base.first_free - 1)
    framed = replace(base, config={**base.config, "post_processor": template([bos], [eos])})
    write_byte_tokenizer(framed, tmp_path / "base", folder)
    own, grown = grown_from(framed, "Khmer", 20, False, 0)
    before, after = write_extended(tmp_path / "new", grown, tmp_path / "base")
    loaded = load_tokenizer(tmp_path / "new")
    assert stock_frame(loaded) == ([bos[1]], [eos[1]]) == (before.front, before.back)
    assert failed_lines(framed, after.base, own, texts_of("Khmer", 1), loaded) == {}


# ---- files that say more than a tokenizer should


def test_no_text_is_cut_off_or_filled_up(folder, tmp_path):
    "A fine-tune may have left a length in its file"
    config = json.loads((folder / "tokenizer.json").read_text())
    side = dict(direction="Right", strategy="LongestFirst", max_length=3, stride=0)
    fill = dict(strategy={"Fixed": 9}, direction="Right", pad_id=0, pad_type_id=0, pad_token="!")
    config |= dict(truncation=side, padding=fill | dict(pad_to_multiple_of=None))
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    texts = ["c", ENGLISH]
    whole = encode_plain(load_tokenizer(folder), texts)
    base = read_byte_base(tmp_path)
    assert BpeView(base).encode(texts) == whole == encode_plain(rule_tokenizer(config), texts)
    loaded = load_tokenizer(tmp_path)
    assert encode_plain(loaded, texts) == whole != [[], whole[1][:3]]
    write_byte_tokenizer(base, tmp_path / "new")
    written = read_json(tmp_path / "new" / "tokenizer.json")
    assert written["truncation"] is written["padding"] is None


def test_tekken_takes_nothing_of_the_working_directory(folder, monkeypatch):
    "Where another model's files may be"
    monkeypatch.chdir(folder)
    assert (model_rows("."), model_rows("tekken")) == (ROWS, 0)
    assert not (config_folder("tekken") / "tokenizer_config.json").exists()
