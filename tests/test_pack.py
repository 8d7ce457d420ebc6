"""What the chapter 07_pack does not show.

The whole stage against ten naive lines, isolation inside the Trainer, tasks, every message."""

import json
import shutil
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import small_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmixtral_nb import pack as pack_module
from cmixtral_nb import packing
from cmixtral_nb.mixtral import small_config
from cmixtral_nb.pack import (
    collate,
    cut_examples,
    load_examples,
    pack,
    positions,
    repeats,
    valid_texts,
)
from cmixtral_nb.packing import (
    ExampleWriter,
    Parts,
    encode_part,
    encoded,
    gather,
    line_spans,
    parse_mix,
    takes,
)
from cmixtral_nb.stages import Artifact, StageError
from cmixtral_nb.tokenizer_files import encode_plain, load_tokenizer, write_tokenizer


def write_corpus(folder, **langs):
    folder.mkdir(exist_ok=True)
    for lang, texts in langs.items():
        write_jsonl(folder / f"{lang}.train.jsonl", texts)
        write_jsonl(folder / f"{lang}.valid.jsonl", ["held out"])
    return folder


def write_jsonl(file, texts):
    lines = [json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts]
    file.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    d = tmp_path_factory.mktemp("pack")
    small_tokenizer(d, "号文章扩充词表讲 article of some length ")
    write_tokenizer(d / "small.model", d / "tok")
    write_jsonl(d / "zh.jsonl", [f"{i} 号文章，<s>讲词表</s>。" * (1 + i % 5) for i in range(300)])
    write_corpus(
        d / "corpus",
        zh=[f"{i} 号文章。" * (1 + i % 7) for i in range(90)],
        en=[f"Article {i}, of some length." * (1 + i % 3) for i in range(40)],
    )
    return d


@pytest.fixture(scope="module")
def tok(here):
    return load_tokenizer(here / "tok")


def naive(docs, length, bos, eos):
    flat = [token for doc in docs for token in (bos, *doc, eos)]
    return cut(flat, length)


def cut(flat, length):
    "Whole examples; what is left at the end is dropped"
    return [flat[i : i + length] for i in range(0, len(flat) - length + 1, length)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(3, 60_000), max_size=40), max_size=30),
    st.integers(2, 50),
    st.integers(1, 5),
    st.integers(1, 90),
)
def test_examples_equal_naive(docs, length, block, piece):
    flat = np.array([t for d in docs for t in (1, *d, 2)], "uint16")
    pieces = (flat[i : i + piece] for i in range(0, len(flat), piece))
    blocks = list(cut_examples(pieces, length, block))
    assert [r.tolist() for b in blocks for r in b] == naive(docs, length, 1, 2)
    # the same blocks for any pieces: the same files
    assert all(len(b) == block for b in blocks[:-1])
    assert not blocks or 0 < len(blocks[-1]) <= block


def test_no_examples():
    assert list(cut_examples([], 8)) == []
    assert list(cut_examples([np.array([1, 5, 2])], 8)) == []


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 200), st.integers(1, 400), st.integers(0, 7))
def test_a_ratio_is_exact(n, hundredths, seed):
    ratio = hundredths / 100
    got = [i for i in range(n) if takes(i, ratio, seed)]
    later = [o.tolist() for o in repeats(n, ratio, seed)]
    assert ratio < 1 or got == [*range(n)]
    assert abs(len(got) + sum(map(len, later)) - Fraction(hundredths, 100) * n) < 1
    assert all(len(set(o)) == len(o) and set(o) <= set(range(n)) for o in later)
    assert all(len(o) == n for o in later[:-1])


def test_each_repeat_has_an_order_of_its_own():
    a, b, c = repeats(500, 4)
    d = next(repeats(500, 2, seed=1))
    for x, y in ((a, b), (b, c), (a, d), (a, np.arange(500))):
        assert (x == y).mean() < 0.05
    # more passes change no earlier one
    assert all((x == y).all() for x, y in zip(repeats(500, 3), (a, b), strict=True))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("ab\r ", max_size=30), max_size=30),
    st.integers(1, 5),
    st.integers(1, 40),
    st.booleans(),
)
def test_parts_of_a_file_are_the_file(tmp_path_factory, lines, n_parts, size, ends):
    p = tmp_path_factory.getbasetemp() / "spans"
    data = "\n".join(lines).encode() + b"\n" * ends
    p.write_bytes(data)
    spans = [s for part in range(n_parts) for s in line_spans(p, part, n_parts, size)]
    assert b"".join(data[lo:hi] for lo, hi in spans) == data
    assert all(data[lo - 1 : lo] in (b"", b"\n") for lo, _ in spans)


def naive_pack(texts, tok, ratio, seed, length):
    docs = [[1, *encode_plain(tok, [t])[0], 2] for t in texts]
    order = [i for i in range(len(docs)) if takes(i, ratio, seed)]
    for again in repeats(len(docs), ratio, seed):
        order += list(again)
    flat = []
    for i in order:
        flat += docs[i]
    return cut(flat, length), len(flat)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(st.text("词表ab <s>/\n", min_size=1, max_size=12), min_size=9, max_size=40),
    ratio=st.sampled_from([0.3, 0.5, 1, 1.7, 3]),
    seed=st.integers(0, 3),
    length=st.integers(8, 20),
    tasks=st.integers(0, 3 if find_spec("datatrove") else 0),  # 0: without an engine
)
def test_pack_equals_naive(here, tok, tmp_path, monkeypatch, texts, ratio, seed, length, tasks):
    for module in (pack_module, packing):
        monkeypatch.setattr(module, "load_tokenizer", lambda _: tok)
    monkeypatch.setattr(line_spans, "__defaults__", (0, 1, 50))  # many spans of a few documents
    c, out = write_corpus(tmp_path / "c", zh=texts), tmp_path / "out"
    want, n_tokens = naive_pack(texts, tok, ratio, seed, length)
    shutil.rmtree(tmp_path / "out.parts", ignore_errors=True)  # of an example without examples
    how: dict = dict(mix=[f"{ratio}:zh"], length=length, seed=seed, force=True)
    if tasks:
        how |= dict(engine="local", tasks=tasks, where=["workers=1"])
    if not want:
        with pytest.raises(StageError, match="less than one example"):
            pack(c, here / "tok", out, **how)
        return
    a = pack(c, here / "tok", out, **how)
    assert ids_of(a).tolist() == want
    source = a.stats["sources"]["zh"]
    assert source["n_tokens"] == a.stats["n_tokens"] == n_tokens
    assert source["n_rows"] == len(want)
    if ratio == 3:
        assert source["n_chars"] == 3 * sum(map(len, texts))
        assert source["n_bytes"] == 3 * sum(len(t.encode()) for t in texts)
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "train", "valid.zh.jsonl"]


def ids_of(tokens):
    "All examples"
    return np.stack(load_examples(tokens).with_format("numpy")[:]["input_ids"])


def test_line_ends_of_unicode_stay_in_documents(here, tmp_path):
    odd = "a\u2028词\u2029表\x85b\r\nc"
    c = write_corpus(tmp_path / "c", zh=[odd] * 9)
    write_jsonl(c / "zh.valid.jsonl", [odd])
    a = pack(c, here / "tok", tmp_path / "out", mix=["zh"], length=8)
    assert a.stats["sources"]["zh"]["n_docs"] == 9
    assert valid_texts(a, "zh") == [odd]


def test_workers_change_nothing(here, tmp_path):
    texts = ["扩充词表。" * (200 + i % 50) for i in range(1000)]
    c = write_corpus(tmp_path / "c", zh=texts)
    assert len(list(line_spans(c / "zh.train.jsonl"))) > 2
    one, two = (
        pack(c, here / "tok", tmp_path / f"w{w}", mix=["1.5:zh"], length=256, workers=w)
        for w in (1, 2)
    )
    assert one.fingerprint == two.fingerprint
    assert one.stats == two.stats


def test_workers_with_texts_of_another_origin(here, tok):
    jobs = [["扩充", "a"], ["词表"], ["b" * 50]]
    how: dict = dict(bos=1, eos=2, dtype="uint16")
    with_workers, alone = encoded(jobs, tok, 2, **how), encoded(jobs, tok, **how)
    for (ids, counts), (ids_alone, counts_alone) in zip(with_workers, alone, strict=True):
        assert ids.tolist() == ids_alone.tolist()
        assert counts.tolist() == counts_alone.tolist()


def test_a_text_file_is_split_by_hash(here, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("\n\n".join(f"第{i}篇文章。" + "扩充词表。" * (i % 7) for i in range(400)))

    def source_of(out, mix):
        how = dict(mix=[mix], length=32, valid_share=0.1)
        return pack(mine, here / "tok", tmp_path / out, **how).stats["sources"]["zh"]

    own, half = source_of("own", "zh"), source_of("half", ".5:zh")
    assert 20 < own["n_valid"] < 80
    assert own["n_docs"] + own["n_valid"] == 400
    assert abs(half["n_docs"] - own["n_docs"] / 2) < 1
    assert half["n_valid"] == own["n_valid"]
    with pytest.raises(StageError, match="mix names 2 languages"):
        pack(mine, here / "tok", tmp_path / "own2", mix=["zh", "en"])
    with pytest.raises(StageError, match="less than one example"):
        pack(mine, here / "tok", tmp_path / "own2", mix=["zh"], length=2**20)
    with pytest.raises(StageError, match="tasks cannot share it; run: cmixtral corpus"):
        encode_part(mine, here / "tok", tmp_path / "p", "zh", n_parts=2)
    assert not list(tmp_path.glob("own2*"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([1, 2, 7, 9]), min_size=6, max_size=6), min_size=1, max_size=4
    )
)
def test_positions_by_hand(ids):
    for example, got in zip(ids, positions(np.array(ids), 1), strict=True):
        position = -1
        want = []
        for token in example:
            position = 0 if token == 1 else position + 1
            want.append(position)
        assert got.tolist() == want


def test_collate_masks_only_starts():
    b = collate([{"input_ids": [1, 5, 2, 1, 6, 2]}], bos=1)
    assert b["labels"].tolist() == [[-100, 5, 2, -100, 6, 2]]
    assert b["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert "attention_mask" not in b


def worst(model, ids, logits):
    "Largest difference of a logit between documents in examples and the same documents alone"
    largest = 0.0
    for example, got in zip(ids, logits, strict=True):
        starts = [i for i in range(1, len(example)) if example[i] == 1]
        for start, end in pairwise([0, *starts, len(example)]):
            alone = model(input_ids=example[None, start:end], use_cache=False).logits[0]
            largest = max(largest, (alone - got[start:end]).abs().max().item())
    return largest


SIZES = dict(hidden=32, layers=2, intermediate=64, heads=2)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("dense", [False, True])
def test_documents_are_isolated(attn, dense):
    from transformers import LlamaForCausalLM, MixtralForCausalLM

    torch.manual_seed(0)
    config = llama_config() if dense else small_config(vocab_size=99, **SIZES)
    config._attn_implementation = attn
    model = (LlamaForCausalLM if dense else MixtralForCausalLM)(config).eval()
    for p in model.parameters():
        p.data *= 3
    g = torch.Generator().manual_seed(1)
    data = torch.randint(3, 99, (2, 40), generator=g)
    data[0, [0, 13, 14, 30]] = 1
    data[1, [7, 25]] = 1  # a row may start inside a document
    batch = collate([{"input_ids": r.numpy()} for r in data], bos=1)
    del batch["labels"]

    def difference(**kw):
        with torch.no_grad():
            return worst(model, data, model(**batch, **kw).logits)

    assert difference(use_cache=False) < 1e-5
    # both of these are what a collator or a default may bring back
    assert difference(use_cache=False, attention_mask=torch.ones_like(data)) > 1e-2
    assert difference(use_cache=True) > 1e-2


def llama_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=2,
    )


def test_documents_are_isolated_in_the_trainer(here, tmp_path, monkeypatch):
    from transformers import MixtralForCausalLM, Trainer

    from cmixtral_nb.pretrain import pretrain

    torch.manual_seed(0)
    model = MixtralForCausalLM(small_config(vocab_size=290, **SIZES))
    for p in model.parameters():
        p.data *= 3
    model.save_pretrained(here / "model")
    write_tokenizer(here / "small.model", here / "model")
    tokens = pack(here / "corpus", here / "model", tmp_path / "tokens", mix=["zh"], length=64)
    loss = Trainer.compute_loss
    seen = []

    def spy(self, model, inputs, *a, **kw):
        unlabelled = {name: x for name, x in inputs.items() if name != "labels"}
        with torch.no_grad():
            logits = model(**unlabelled, output_router_logits=False).logits
            difference = worst(model, inputs["input_ids"], logits)
        seen.append((set(inputs), logits.shape[1], difference))
        return loss(self, model, inputs, *a, **kw)

    monkeypatch.setattr(Trainer, "compute_loss", spy)
    pretrain(
        here / "model",
        tokens,
        tmp_path / "adapter",
        rank=2,
        alpha=2,
        batch=2,
        steps=2,
        lr=1e-3,
        warmup=0,
        eval_every=2,
        save_every=2,
        dropout=0.0,
        eval_chars=20,
        device="cpu",
    )
    assert len(seen) == 2
    for names, n, diff in seen:
        assert "attention_mask" not in names
        assert n == 64
        assert diff < 1e-5


def test_large_ids_and_shards(tmp_path):
    from datasets import load_from_disk

    writer = ExampleWriter(tmp_path / "train", 4, "uint32", shard_examples=3)
    for k in range(4):
        writer.write(np.full((2, 4), 70_000 + k, "uint32"), k)
    writer.finish("key")
    examples = load_from_disk(str(tmp_path / "train"))
    assert len(writer.files) == 3
    assert examples["source"][:] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert examples["input_ids"][:] == [[70_000 + k] * 4 for k in examples["source"][:]]


def test_text_never_becomes_control(here, tmp_path):
    a = pack(
        here / "zh.jsonl", here / "tok", tmp_path / "t", mix=["zh"], length=32, valid_share=0.1
    )
    ids = ids_of(a)
    n_docs = a.stats["sources"]["zh"]["n_docs"]
    assert n_docs - 1 <= (ids == 1).sum() <= n_docs
    assert n_docs - 1 <= (ids == 2).sum() <= n_docs
    assert a.stats["dtype"] == "uint16"
    assert a.manifest["tokenizer"]
    assert len(valid_texts(a, "zh")) == a.stats["sources"]["zh"]["n_valid"]
    assert len(valid_texts(a, "zh", limit_chars=1)) == 1
    with pytest.raises(StageError, match="run: cmixtral pack --mix 1:fr"):
        valid_texts(a, "fr")


@pytest.mark.parametrize(
    "mix, words",
    [
        ([], "mix is empty"),
        (["0:zh"], "above 0"),
        (["x:zh"], "RATIO:LANG"),
        (["1:"], "RATIO:LANG"),
        (["1:../../x"], "RATIO:LANG"),
        (["1:[z]h"], "RATIO:LANG"),
        (["nan:zh"], "above 0"),
        (["1:zh", ".5:zh"], "mix names zh twice; give one ratio, such as 1.5:zh"),
    ],
)
def test_bad_mix(mix, words):
    with pytest.raises(StageError, match=words):
        parse_mix(mix)


def test_faults_come_together_and_leave_nothing(here, tmp_path):
    with pytest.raises(StageError) as e:
        pack(
            tmp_path / "none.jsonl", here, tmp_path / "t", mix=["zh"], length=3, seed=-1, workers=0
        )
    for words in (
        "neither a corpus nor a text file",
        "length is 3",
        "holds no tokenizer.json",
        "seed is -1, expected 0 to 4,294,967,295",
        "workers is 0, expected 1 to 256",
    ):
        assert words in str(e.value)
    assert len(e.value.args) == 5
    assert not list(tmp_path.iterdir())
    with pytest.raises(StageError, match="has no fr text, it has en, zh"):
        pack(here / "corpus", here / "tok", tmp_path / "t", mix=["fr"])


def test_a_bad_line_is_named(here, tmp_path):
    c = write_corpus(tmp_path / "c", zh=["词表"] * 9)
    f = c / "zh.train.jsonl"
    for bad in ('{"text": ', '{"txt": "a"}', '{"text": 7}', '{"text": ' + "[" * 100_000):
        f.write_text('{"text": "词表"}\n' * 4 + bad + "\n")
        with pytest.raises(
            StageError, match='zh.train.jsonl:5: expected an object with a string under "text"'
        ):
            pack(c, here / "tok", tmp_path / "t", mix=["zh"], length=8)
    assert not list(tmp_path.glob("t*"))


def test_half_a_character_is_left_out(here, tmp_path):
    "As where a corpus is made; files from elsewhere may hold it"
    c = write_corpus(tmp_path / "c", zh=["词表"] * 9)
    half, whole = tmp_path / "half", tmp_path / "whole"
    for out, line in ((half, r'{"text": "\uD83d词表\uDE00"}'), (whole, '{"text": "词表"}')):
        (c / "zh.train.jsonl").write_text(f"{line}\n" * 9)
        pack(c, here / "tok", out, mix=["zh"], length=8)
    assert load_examples(half)[:] == load_examples(whole)[:]


def test_a_source_shorter_than_an_example_is_said(here, tmp_path):
    "Else its tokens would be counted, and no example would hold one"
    c = write_corpus(tmp_path / "c", zh=["词表扩充"] * 40, en=["a word"] * 4)
    mix = ["1:zh", "0.5:en"]
    with pytest.raises(StageError, match="tokens of en, less than one example of 64; give more"):
        pack(c, here / "tok", tmp_path / "t", mix=mix, length=64)
    assert not list(tmp_path.glob("t*"))
    made = pack(c, here / "tok", tmp_path / "t", mix=mix, length=8)
    assert made.stats["sources"]["en"]["n_rows"] == 2
    with pytest.raises(StageError, match="gives 0 tokens of en"):
        pack(c, here / "tok", tmp_path / "n", mix=["1:zh", "1e-7:en"], length=8)


def test_a_worker_that_dies(tok, monkeypatch):
    def died(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(packing, "ahead", died)
    with pytest.raises(StageError, match="a process that encodes died.*--workers 1"):
        list(encoded([["a"]], tok, 2, bos=1, eos=2, dtype="uint16"))


def test_not_tokens(here):
    with pytest.raises(StageError, match="no manifest.json"):
        load_examples(here)
    with pytest.raises(StageError, match="expected tokens"):
        Artifact.load(here / "nothing", "tokens")


def test_a_part_that_is_there_is_left(here, tmp_path, monkeypatch):
    a = encode_part(here / "corpus", here / "tok", tmp_path, "zh")
    monkeypatch.setattr(packing, "encoded", lambda *_, **__: pytest.fail("encoded again"))
    assert encode_part(here / "corpus", here / "tok", tmp_path, "zh") == a
    with pytest.raises(pytest.fail.Exception):
        encode_part(here / "corpus", here / "tok", tmp_path, "en")
    assert not list(tmp_path.glob("en*.json"))  # half a part has no head


def test_gather_across_parts(here, tmp_path):
    for k in range(3):
        encode_part(here / "corpus", here / "tok", tmp_path, "zh", part=k, n_parts=3)
    encode_part(here / "corpus", here / "tok", tmp_path / "one", "zh")
    three, one = Parts(tmp_path, "zh"), Parts(tmp_path / "one", "zh")
    order = np.random.default_rng(0).permutation(90)
    assert three.stats == one.stats
    assert (three.counts() == one.counts()).all()
    from_three = np.concatenate(list(gather(three, order, three.counts(), 7)))
    from_one = np.concatenate(list(gather(one, order, one.counts())))
    assert from_three.tolist() == from_one.tolist()
