"""What the chapter 09_pretrain does not show.

A real kill -9, half a checkpoint, and requests that cannot be met."""

import json
import os
import shutil
import signal
import subprocess
import sys

import bench_resume
import pytest
import torch
from safetensors.torch import load_file

from cmixtral_nb.mixtral import small_config
from cmixtral_nb.pack import pack
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.pretrain import pretrain
from cmixtral_nb.stages import StageError, read_json, write_json
from cmixtral_nb.tokenizer_files import write_tokenizer
from cmixtral_nb.training import read_log, saved_checkpoints

ARGS = dict(
    rank=4,
    alpha=8,
    batch=2,
    steps=4,
    lr=1e-3,
    warmup=0,
    eval_every=2,
    save_every=2,
    log_every=1,
    eval_chars=100,
    device="cpu",
)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    from transformers import MixtralForCausalLM

    d = tmp_path_factory.mktemp("pretrain")
    torch.manual_seed(0)
    MixtralForCausalLM(small_config(hidden=32, layers=1, intermediate=64, heads=2)).save_pretrained(
        d / "model"
    )
    write_tokenizer(base_tokenizer_model("mixtral"), d / "model")
    (d / "zh.jsonl").write_text(
        "\n".join(json.dumps({"text": f"第{i}篇，词表扩充。" * 3}) for i in range(60))
    )
    pack(d / "zh.jsonl", d / "model", d / "tokens", mix=["zh"], length=32, valid_share=0.2)
    return d


@pytest.fixture(scope="module")
def whole(here):
    return pretrain(here / "model", here / "tokens", here / "whole", **ARGS)


def test_log_and_files(whole):
    log = read_log(whole)
    assert [h["step"] for h in log if "loss" in h] == [1, 2, 3, 4] and [
        h["step"] for h in log if "bpb_zh" in h
    ] == [0, 2, 4]
    assert sorted(os.listdir(whole)) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "log.jsonl",
        "logs",
        "manifest.json",
        "router.json",
    ]
    speed = [json.loads(line) for line in (whole / "logs/speed.jsonl").read_text().splitlines()]
    assert [s["step"] for s in speed] == [1, 2, 3, 4] and all(
        s["tokens_per_second"] > 0 and s["device"] == "cpu" and "utilisation" not in s
        for s in speed
    )
    assert list((whole / "logs").glob("events.out.tfevents.*"))
    assert (
        whole.stats["n_trained_tokens"] == 4 * 2 * 32
        and whole.stats["bpb"]["zh"]["before"] == log[0]["bpb_zh"]
    )
    assert (
        whole.manifest["tokenizer"]
        and len(whole.stats["quantised"]) == 16
        and whole.stats["quantised_dtype"] == "float32"
    )
    for load in read_json(whole / "router.json")["after"]["zh"]:
        assert abs(sum(load) - 1) < 1e-3


def test_killed_for_real(here, whole):
    code = f"""
import os, signal
from transformers import Trainer
from cmixtral_nb.pretrain import pretrain
step = Trainer.training_step
def dying(self, *a, **kw):
    if self.state.global_step == 3: os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *a, **kw)
Trainer.training_step = dying
pretrain({str(here / "model")!r}, {str(here / "tokens")!r}, {str(here / "again")!r}, **{ARGS!r})
"""
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert p.returncode == -signal.SIGKILL, p.stderr
    kept = here / "again.tmp/checkpoints"
    assert not (here / "again").exists() and [c.name for c in saved_checkpoints(kept)] == [
        "checkpoint-2"
    ]
    shutil.copytree(kept / "checkpoint-2", kept / "checkpoint-3")  # a newer one, cut short
    (kept / "checkpoint-3/complete").unlink()
    (kept / "checkpoint-3/adapter_model.safetensors").write_bytes(b"half")
    b = pretrain(here / "model", here / "tokens", here / "again", **ARGS)
    assert (
        b.fingerprint == whole.fingerprint
        and (b / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    )


def test_another_seed_is_another_run(here, whole):
    b = pretrain(here / "model", here / "tokens", here / "seed", **{**ARGS, "seed": 1, "steps": 1})
    assert read_log(b)[1]["loss"] != read_log(whole)[1]["loss"]


def test_refused_before_loading(here, tmp_path, monkeypatch):
    monkeypatch.setattr("cmixtral_nb.pretrain.load_model", lambda *a, **kw: pytest.fail("loaded"))

    def fails(words, model="model", tokens="tokens", **kw):
        with pytest.raises(StageError, match=words):
            pretrain(here / model, here / tokens, tmp_path / "out", **{**ARGS, **kw})
        assert not list(tmp_path.glob("out*"))

    fails("rank is 0, expected at least 1", rank=0, rows="none")
    fails("rank is -1, expected at least 0", rank=-1)
    fails("zero is 3", zero=3)
    fails("dropout is 1", dropout=1)
    fails("rows is", rows="some")
    fails("epochs is 0", steps=0, epochs=0)
    fails("a step takes 90", batch=90)
    fails("expected a tokens", tokens="nothing")
    fails("no manifest.json", tokens="model")
    fails("does not exist", model="nothing")
    other = here / "other"
    shutil.copytree(here / "model", other)
    t = read_json(other / "tokenizer.json")
    t["added_tokens"].append(dict(id=32000, content="<|x|>", special=True))
    write_json(other / "tokenizer.json", t)
    fails("was made with tokenizer .*run: cmixtral pack", model="other")
    few = here / "few"
    shutil.copytree(here / "model", few)
    c = read_json(few / "config.json")
    write_json(few / "config.json", dict(c, vocab_size=31000))
    fails("has 31,000 embedding rows; run: cmixtral init", model="few")


def test_two_processes_killed_and_resumed_equal_one(tmp_path):
    bench_resume.make(tmp_path)
    kw = dict(steps=4, save_every=2, eval_every=2, dropout=0, aux=0)
    bench_resume.train(tmp_path, "one", 1, batch=4, **kw)
    assert bench_resume.train(tmp_path, "two", 2, kill_at=3, batch=2, **kw)
    assert not (tmp_path / "two").exists() and [
        c.name for c in saved_checkpoints(tmp_path / "two.tmp/checkpoints")
    ] == ["checkpoint-2"]
    bench_resume.train(tmp_path, "two", 2, batch=2, **kw)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [h["step"] for h in one] == [h["step"] for h in two] and sum(
        "bpb_zh" in h for h in two
    ) == 3
    for a, b in zip(one, two, strict=True):
        for k in ("loss", "grad_norm", "bpb_zh"):
            assert abs(a.get(k, 0) - b.get(k, 0)) < 1e-4
    orders = [
        (tmp_path / f"{n}.order.{r}").read_text().splitlines()
        for n, r in (("one", 0), ("two", 0), ("two", 1))
    ]
    assert [json.loads(a) for a in orders[0]][-1] == [
        i for o in orders[1:] for i in json.loads(o[-1])
    ]  # the two share the batch of one


def test_rows_first(here):
    a = pretrain(
        here / "model", here / "tokens", here / "rows", **{**ARGS, "rows_steps": 2, "save_every": 9}
    )
    b = pretrain(
        here / "model", here / "tokens", here / "rows only", **{**ARGS, "rank": 0, "save_every": 9}
    )
    pairs = zip(read_log(a), read_log(b), strict=True)
    same = [x["loss"] == y["loss"] for x, y in pairs if "loss" in x]
    assert same[:3] == [True] * 3  # LoRA has not moved when the loss of step 3 is taken
    assert any(
        k.endswith("lora_B.weight") and t.abs().sum()
        for k, t in load_file(a / "adapter_model.safetensors").items()
    )
    assert not any("lora_" in k for k in load_file(b / "adapter_model.safetensors"))


def test_a_bad_batch_is_named(here, tmp_path, monkeypatch):
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "training_step", lambda self, *a, **kw: torch.tensor(float("nan")))
    with pytest.raises(
        StageError, match=r"^loss is nan at step 1, examples \d+, \d+; lower --lr \(now 0.001\)"
    ):
        pretrain(here / "model", here / "tokens", tmp_path / "bad", **ARGS)


def test_stages_of_one_process_refuse_torchrun(here, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(
        StageError, match="^pack runs in one process, found 8; start it without torchrun$"
    ):
        pack(here / "zh.jsonl", here / "model", tmp_path / "t", mix=["zh"])
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(StageError) as e:
        pretrain(here / "model", here / "nothing", tmp_path / "out", **ARGS)
    assert str(e.value) == ""  # the first process says it
