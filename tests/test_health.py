"Health of new pieces: what a table of frequencies scores, what was withheld, what the run leaves."

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from cmixtral_nb.audit import read_view
from cmixtral_nb.byte_vocab import BpeView
from cmixtral_nb.corpora import corpus_texts
from cmixtral_nb.corpus import corpus
from cmixtral_nb.health import (
    base_of,
    health_rows,
    health_summary,
    impossible_bytes,
    new_pieces,
    score_places,
    target_counts,
    untrained_distance,
)
from cmixtral_nb.heldout import heldout_texts
from cmixtral_nb.pack import load_examples
from cmixtral_nb.stages import Artifact, StageError
from cmixtral_nb.tokenizer import tokenizer
from cmixtral_nb.tokenizer_files import encode_plain, load_tokenizer
from cmixtral_nb.vocab import vocab

LENGTH = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "(folder with `corpus`, `small.model` and `tok`, the tokenizer): 400 pieces onto 290"
    folder = tmp_path_factory.mktemp("health")
    base = small_tokenizer(folder, "the cat sat on the mat. 的一是不了在人有我他这")
    text = corpus(["zh=builtin:zh"], out=folder / "corpus", limit_chars=300_000, valid_share=0.1)
    pieces = tokenizer(text, out=folder / "pieces", base=str(base), n_pieces=1500)
    sizes = dict(n_pieces=400, n_hostile=1000, limit_chars=10_000)
    vocab(pieces, out=folder / "tok", base=str(base), **sizes)
    return folder, load_tokenizer(folder / "tok")


def llama(n_rows: int, **sizes) -> LlamaForCausalLM:
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=n_rows, **small, **sizes)).eval()


def knows_frequencies(counts: np.ndarray) -> LlamaForCausalLM:
    "A Llama that gives each token its share of a text, whatever comes before"
    model = llama(len(counts))
    shares = torch.tensor(np.maximum(counts, 1e-3) / counts.sum()).float()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = 1.0  # every token looks alike
        model.model.layers[0].self_attn.o_proj.weight[:] = 0
        model.model.layers[0].mlp.down_proj.weight[:] = 0
        hidden = model.model(input_ids=torch.tensor([[0]])).last_hidden_state[0, 0]
        model.lm_head.weight[:] = shares.log()[:, None] * hidden / hidden.square().sum()
    return model


def test_a_table_of_frequencies_has_a_lift_of_one(made):
    "Identity: the measure of nothing but counting, exactly at the border"
    folder, tok = made
    texts = heldout_texts("zh", folder / "corpus")
    ids = [i for each in encode_plain(tok, texts) for i in each]
    counts = np.bincount(ids, minlength=len(tok))
    places = score_places(knows_frequencies(counts), tok, texts, LENGTH)
    assert places.n.tolist() == counts.tolist()
    assert places.hits.nonzero()[0].tolist() == [counts.argmax()]
    pair = new_pieces(folder / "tok", folder / "small.model")
    rows = health_rows(pair.after, pair.new_ids, places)
    assert len(rows) == 400
    lifts = [row["lift"] for row in rows if row["places"]]
    assert np.allclose(lifts, 1, rtol=1e-3)


def test_a_model_that_gives_nan_has_no_health(made):
    _, tok = made
    model = llama(len(tok))
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(StageError, match="gives NaN or infinity in float32"):
        score_places(model, tok, ["一二三"], LENGTH)


def trained_without(withheld: list[int], made, steps: int) -> LlamaForCausalLM:
    "A model that read only those documents that hold none of some pieces"
    folder, tok = made
    documents = encode_plain(tok, list(corpus_texts(folder / "corpus", "zh")))
    kept = [ids for ids in documents if not set(withheld) & set(ids)]
    assert 0.3 < len(kept) / len(documents) < 1
    stream = torch.tensor([i for ids in kept for i in [tok.bos_token_id, *ids, tok.eos_token_id]])
    torch.manual_seed(0)
    model = llama(len(tok)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(0, len(stream) - LENGTH, (16,))
        ids = torch.stack([stream[start : start + LENGTH] for start in starts])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_withheld_pieces_are_the_sickest(made):
    "The bar: pieces whose documents training never saw are all found among the worst"
    folder, tok = made
    held_out = heldout_texts("zh", folder / "corpus")
    counts = np.bincount(sum(encode_plain(tok, held_out), []), minlength=len(tok))
    pair = new_pieces(folder / "tok", folder / "small.model")
    seldom = [i for i in pair.new_ids if 3 <= counts[i] <= 20]
    withheld = np.random.default_rng(0).choice(seldom, 8, replace=False).tolist()
    model = trained_without(withheld, made, steps=250)
    distance = untrained_distance(model.lm_head.weight.detach(), impossible_bytes(pair.after))
    places = score_places(model, tok, held_out, LENGTH)
    rows = health_rows(pair.after, pair.new_ids, places, distance)
    lift = {row["id"]: row["lift"] for row in rows if row["places"]}
    assert set(withheld) <= {row["id"] for row in rows[:20]}
    assert max(lift[i] for i in withheld) < 1 < np.median(list(lift.values()))
    nearest = sorted(rows, key=lambda row: row["distance"])
    assert set(withheld) <= {row["id"] for row in nearest[:30]}


def test_distance_finds_rows_that_drifted_together():
    "Independent of any model: half of the rows share a direction, all share a larger one"
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(200, 32, generator=generator)
    W[:100] += 2 * torch.randn(32, generator=generator)
    W += 9 * torch.randn(32, generator=generator)
    distance = untrained_distance(W, [0, 1, 2, 3])
    assert distance[4:100].max() < distance[100:].min()


def test_bytes_that_no_text_holds():
    view = read_view("tekken")
    assert isinstance(view, BpeView)
    raw = [view.base.bytes_of[i] for i in impossible_bytes(view)]
    assert sorted(raw) == [bytes([b]) for b in (0xC0, 0xC1, *range(0xF5, 0x100))]
    for each in raw:
        with pytest.raises(UnicodeDecodeError):
            each.decode()
    mixtral = read_view("mixtral")  # it has the letter À, too
    pieces = [mixtral.piece(i) for i in impossible_bytes(mixtral)]
    assert len(pieces) == 13 and all(piece.startswith("<0x") for piece in pieces)


def test_the_command_after_a_run(micro, tmp_path, cli):
    "Nothing is named but the model: the base is where the manifests lead"
    run = micro[0]
    out = tmp_path / "h"
    options = ["--corpus", run / "corpus", "--tokens", run / "tokens", "--n-chars", 3000]
    status, err = cli("health", run / "merged", *options, "--length", 64, "--out", out)
    assert status == 0, err
    assert base_of(run / "merged") == base_of(run / "chat") == run / "base"
    found = json.loads((out / "health.json").read_text())
    assert (found["n_new"], found["lang"], len(found["pieces"])) == (300, "zh", 300)
    rows = np.concatenate(load_examples(run / "tokens").with_format("numpy")[:]["input_ids"][:, 1:])
    by_id = {row["id"]: row["targets"] for row in found["pieces"]}
    assert by_id == {i: int((rows == i).sum()) for i in by_id}
    assert found["n_never"] == list(by_id.values()).count(0)
    assert health_summary(found["pieces"]) == {k: found[k] for k in health_summary([])}
    lifts = [row["lift"] for row in found["pieces"] if row["places"]]
    assert lifts == sorted(lifts) and min(lifts) < 1
    assert {path.name for path in out.iterdir()} == {
        "health.json",
        "health.md",
        "health.svg",
        "manifest.json",
    }
    assert cli("health", run / "merged", *options, "--length", 64, "--out", out)[0] == 0
    assert "is up to date" in cli.out


def test_what_is_refused(micro, tmp_path, cli, monkeypatch):
    "All at once, one line each, and nothing is written"
    run = micro[0]
    monkeypatch.chdir(tmp_path)
    bad = ["--worst", 0, "--corpus", "none", "--domains", "zh"]
    status, err = cli("health", run / "merged", *bad)
    assert status == 2 and len(err) == 3, err
    status, err = cli("health", run / "base")
    assert status == 2 and "--base DIR" in err[0]
    status, err = cli("health", run / "base", "--base", "mixtral")
    assert status == 2 and "no new piece" in err[0]
    status, err = cli("health", run / "merged", "--tokens", run / "corpus")
    assert status == 2 and "expected tokens" in err[0]
    assert not list(tmp_path.iterdir())


def test_targets_are_all_tokens_but_the_first(micro):
    examples = load_examples(micro[0] / "tokens")
    counts = target_counts(examples, Artifact.load(micro[0] / "tokens").stats["vocab_size"])
    assert counts.sum() == sum(len(row) - 1 for row in examples["input_ids"])


def test_a_chain_of_manifests_that_bites_its_tail(tmp_path):
    for name, place in (("a", "b"), ("b", "a")):
        folder = Path(tmp_path, name)
        folder.mkdir()
        inputs = dict(model=dict(path=place, fingerprint="0"))
        manifest = dict(kind="model", schema=1, inputs=inputs, files={})
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert base_of(tmp_path / "a") is None
