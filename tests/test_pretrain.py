"""What the chapter 09_pretrain does not show.

A real kill -9, half a checkpoint, and requests that cannot be met."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import bench_resume
import pytest
import torch
from conftest import SHORT_TRAINING
from safetensors.torch import load_file

from cmixtral_nb.averages import with_kept
from cmixtral_nb.corpus import corpus
from cmixtral_nb.merge import merge
from cmixtral_nb.mixtral import small_config
from cmixtral_nb.pack import pack
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.pretrain import pretrain
from cmixtral_nb.stages import StageError, read_json, write_json
from cmixtral_nb.tokenizer_files import write_tokenizer
from cmixtral_nb.training import read_log, ready_checkpoints, saved_checkpoints

ARGS = dict(SHORT_TRAINING, steps=4, device="cpu")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    from transformers import MixtralForCausalLM

    d = tmp_path_factory.mktemp("pretrain")
    torch.manual_seed(0)
    small = small_config(hidden=32, layers=1, intermediate=64, heads=2)
    MixtralForCausalLM(small).save_pretrained(d / "model")
    write_tokenizer(base_tokenizer_model("mixtral"), d / "model")
    lines = [json.dumps({"text": f"第{i}篇，词表扩充。" * 3}) for i in range(60)]
    (d / "zh.jsonl").write_text("\n".join(lines))
    pack(d / "zh.jsonl", d / "model", d / "tokens", mix=["zh"], length=32, valid_share=0.2)
    return d


@pytest.fixture(scope="module")
def whole(here):
    return pretrain(here / "model", here / "tokens", here / "whole", **ARGS)


def test_log_and_files(whole):
    log = read_log(whole)
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in log if "bpb_zh" in line] == [0, 2, 4]
    assert sorted(os.listdir(whole)) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "log.jsonl",
        "logs",
        "manifest.json",
        "router.json",
    ]
    speed = [json.loads(line) for line in (whole / "logs/speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in speed] == [1, 2, 3, 4]
    for line in speed:
        assert line["tokens_per_second"] > 0
        assert line["device"] == "cpu"
        assert "utilisation" not in line
    assert list((whole / "logs").glob("events.out.tfevents.*"))
    assert whole.stats["n_trained_tokens"] == 4 * 2 * 32
    assert whole.stats["bpb"]["zh"]["before"] == log[0]["bpb_zh"]
    assert whole.manifest["tokenizer"]
    assert len(whole.stats["quantised"]) == 16
    assert whole.stats["quantised_dtype"] == "float32"
    for load in read_json(whole / "router.json")["after"]["zh"]:
        assert abs(sum(load) - 1) < 1e-3


DYING = """
import os
import signal

from transformers import Trainer

from cmixtral_nb.pretrain import pretrain

training_step = Trainer.training_step


def dying(self, *args, **kw):
    if self.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, *args, **kw)


Trainer.training_step = dying
"""  # runs in a process of its own


def test_killed_for_real(here, whole):
    model, tokens, out = (str(here / name) for name in ("model", "tokens", "again"))
    code = f"{DYING}\npretrain({model!r}, {tokens!r}, {out!r}, **{ARGS!r})"
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert p.returncode == -signal.SIGKILL, p.stderr
    assert not (here / "again").exists()
    kept = here / "again.tmp/checkpoints"
    assert [c.name for c in saved_checkpoints(kept)] == ["checkpoint-2"]
    shutil.copytree(kept / "checkpoint-2", kept / "checkpoint-3")  # a newer one, cut short
    (kept / "checkpoint-3/complete").unlink()
    (kept / "checkpoint-3/adapter_model.safetensors").write_bytes(b"half")
    (kept / "checkpoint-backup").mkdir()  # by a careful user
    mark = kept / "checkpoint-2/complete"
    assert mark.read_text() == "1"
    mark.write_text("2")
    with pytest.raises(StageError, match="begun with 2 processes, found 1; .*-per-node 2"):
        pretrain(here / "model", here / "tokens", here / "again", **ARGS)
    mark.write_text("1")
    again = pretrain(here / "model", here / "tokens", here / "again", **ARGS)
    assert again.fingerprint == whole.fingerprint
    assert (again / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()


def test_stopped_after_its_last_step_it_trains_no_more(here, whole, monkeypatch):
    from transformers import Trainer

    def killed(model):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr("cmixtral_nb.pretrain.full_precision", killed)
        pretrain(here / "model", here / "tokens", here / "ended", **ARGS)
    kept = saved_checkpoints(here / "ended.tmp/checkpoints")
    assert [c.name for c in kept] == ["checkpoint-2", "checkpoint-4"]
    with pytest.raises(StageError, match="holds unfinished work, made with log_every=1, now 5; "):
        pretrain(here / "model", here / "tokens", here / "ended", **{**ARGS, "log_every": 5})

    def busy(*args, **kw):
        raise StageError("not enough memory on the GPU")  # another process has it

    with monkeypatch.context() as m, pytest.raises(StageError, match="not enough memory"):
        m.setattr("cmixtral_nb.pretrain.load_model", busy)
        pretrain(here / "model", here / "tokens", here / "ended", **ARGS)
    assert saved_checkpoints(here / "ended.tmp/checkpoints") == kept
    monkeypatch.setattr(Trainer, "training_step", lambda *a, **kw: pytest.fail("a fifth step"))
    again = pretrain(here / "model", here / "tokens", here / "ended", **ARGS)
    assert again.fingerprint == whole.fingerprint
    assert again.stats["steps"] == 4


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def garbage(path):
    path.write_bytes(b"\0" * 1000)


def flip(path):
    found = bytearray(path.read_bytes())
    found[len(found) // 2] ^= 1
    path.write_bytes(found)


DAMAGES = {
    "optimizer.pt": [cut, garbage, flip, os.remove],
    "scheduler.pt": [cut, os.remove, lambda path: torch.save({}, path)],
    "rng_state.pth": [cut, garbage, lambda path: torch.save(Evil(), path)],
    "trainer_state.json": [cut, os.remove, lambda path: write_json(path, {"global_step": 2})],
    "adapter_model.safetensors": [cut, garbage, os.remove],
}


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    here, whole, tmp_path, capsys, monkeypatch
):
    from transformers import Trainer

    monkeypatch.chdir(tmp_path)  # where the pickle would write
    out, kept = tmp_path / "out", tmp_path / "out.tmp/checkpoints"
    real = Trainer.training_step

    def stopped(self, *args, **kw):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kw)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Trainer, "training_step", stopped)
        pretrain(here / "model", here / "tokens", out, **{**ARGS, "save_every": 1})
    assert [c.name for c in ready_checkpoints(kept)] == ["checkpoint-2", "checkpoint-3"]
    for name, damages in DAMAGES.items():
        for damage in damages:
            copied = shutil.copytree(kept, tmp_path / "copied")
            damage(copied / "checkpoint-3" / name)
            capsys.readouterr()
            assert [c.name for c in ready_checkpoints(copied)] == ["checkpoint-2"]
            fault = "missing" if damage is os.remove else "cannot be read"
            assert capsys.readouterr().out == (
                f"training: checkpoint-3 is damaged ({name} {fault}); "
                "continuing from checkpoint-2\n"
            )
            shutil.rmtree(copied)
    assert not (tmp_path / "pwned").exists()
    cut(kept / "checkpoint-3/optimizer.pt")
    again = pretrain(here / "model", here / "tokens", out, **{**ARGS, "save_every": 1})
    assert again.fingerprint == whole.fingerprint
    assert "training: checkpoint-3 is damaged" in capsys.readouterr().out


def test_in_16_bits_on_a_cpu(here, whole, tmp_path):
    "Weights are in bfloat16 as on a GPU, what is trained in float32; it learns what 32 bits learn"
    half = pretrain(here / "model", here / "tokens", tmp_path / "half", **ARGS, dtype="bfloat16")
    assert half.stats["quantised_dtype"] == "bfloat16"
    assert whole.stats["quantised_dtype"] == "float32"
    kept = load_file(half.path / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    for when in ("before", "after"):
        in_32 = whole.stats["bpb"]["zh"][when]
        assert half.stats["bpb"]["zh"][when] == pytest.approx(in_32, rel=0.02), when


@pytest.mark.parametrize("asked", ["float16", "auto", "int8"])
def test_a_dtype_that_cannot_be_trained(here, tmp_path, asked):
    with pytest.raises(StageError, match="expected float32, bfloat16"):
        pretrain(here / "model", here / "tokens", tmp_path / "out", **ARGS, dtype=asked)


def test_another_seed_is_another_run(here, whole):
    b = pretrain(here / "model", here / "tokens", here / "seed", **{**ARGS, "seed": 1, "steps": 1})
    assert read_log(b)[1]["loss"] != read_log(whole)[1]["loss"]


def test_refused_before_loading(here, tmp_path, monkeypatch):
    from transformers import MixtralForCausalLM

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
    fails("expected tokens", tokens="nothing")
    fails("no manifest.json", tokens="model")
    fails("does not exist", model="nothing")
    fails("(?s)expected tokens.*dropout is 1", tokens="nothing", dropout=1)  # both at once
    fails("rows_steps is 4, expected below steps, 4: LoRA would not be trained", rows_steps=4)
    fails("rows_steps is 99, .* below steps, 54", rows_steps=99, steps=0, epochs=2)  # 27 an epoch
    fails("rows_steps is 1, but rows is none", rows_steps=1, rows="none")
    fails("missing does not exist|missing is neither", corpus=here / "missing")
    both = here / "both"
    both.mkdir()
    for name in ("zh.train", "zh.valid", "en.train", "en.valid"):
        shutil.copy(here / "zh.jsonl", both / f"{name}.jsonl")
    pack(both, here / "model", here / "two", mix=["1:zh", "1:en"], length=32)
    (both / "en.valid.jsonl").unlink()
    fails("zh.jsonl is no corpus, .*two needs", tokens="two", corpus=here / "zh.jsonl")
    fails(
        "has no held-out en text; run: cmixtral corpus --sources .*en=REF.*--valid",
        tokens="two",
        corpus=both,
    )
    tokenizer_file = shutil.copytree(here / "model", here / "other") / "tokenizer.json"
    larger = read_json(tokenizer_file)
    larger["added_tokens"].append(dict(id=32000, content="<|x|>", special=True))
    write_json(tokenizer_file, larger)
    fails("was made with tokenizer .*run: cmixtral pack", model="other")
    fails("(?s)was made with tokenizer .*dropout is 1", model="other", dropout=1)
    few = small_config(hidden=32, layers=1, intermediate=64, heads=2, vocab_size=31000)
    MixtralForCausalLM(few).save_pretrained(shutil.copytree(here / "model", here / "few"))
    fails("has 31,000 embedding rows; run: cmixtral init", model="few")


def test_two_processes_killed_and_resumed_equal_one(tmp_path):
    bench_resume.make(tmp_path)
    how = dict(steps=4, save_every=2, eval_every=2, dropout=0, aux=0)
    bench_resume.train(tmp_path, "one", 1, batch=4, **how)
    assert bench_resume.train(tmp_path, "two", 2, kill_at=3, batch=2, **how)
    assert not (tmp_path / "two").exists()
    assert [c.name for c in saved_checkpoints(tmp_path / "two.tmp/checkpoints")] == ["checkpoint-2"]
    bench_resume.train(tmp_path, "two", 2, batch=2, **how)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert sum("bpb_zh" in line for line in two) == 3
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "bpb_zh"):
            assert abs(ours.get(name, 0) - theirs.get(name, 0)) < 1e-4

    def last_batch(run, process):
        lines = (tmp_path / f"{run}.order.{process}").read_text().splitlines()
        return json.loads(lines[-1])

    # the two share the batch of one
    assert last_batch("one", 0) == last_batch("two", 0) + last_batch("two", 1)


def test_rows_first(here):
    def run(out, **kw):
        return pretrain(here / "model", here / "tokens", here / out, **{**ARGS, **kw})

    first = run("rows", rows_steps=2, save_every=9)
    only = run("rows only", rank=0, save_every=9)
    pairs = zip(read_log(first), read_log(only), strict=True)
    same = [a["loss"] == b["loss"] for a, b in pairs if "loss" in a]
    assert same[:3] == [True] * 3  # LoRA has not moved when the loss of step 3 is taken
    adapter = load_file(first / "adapter_model.safetensors")
    assert any(t.any() for name, t in adapter.items() if name.endswith("lora_B.weight"))
    assert not any("lora_" in name for name in load_file(only / "adapter_model.safetensors"))


def test_an_alarm_stops_a_run_and_the_same_command_goes_on(here, capsys):
    "Random weights that read Chinese, and nearly nothing else, lose English"
    words = ["river", "stone", "light", "morning", "window", "garden", "letter", "winter"]
    rng = random.Random(0)
    texts = {
        "zh": [f"第{i}篇，词表扩充，读第{i * 7}页。" * 20 for i in range(40)],
        "en": [" ".join(rng.choices(words, k=200)) for _ in range(40)],
    }
    for lang, documents in texts.items():
        lines = [json.dumps({"text": text}) for text in documents]
        (here / f"{lang}.long.jsonl").write_text("\n".join(lines))
    sources = [f"{lang}={here}/{lang}.long.jsonl" for lang in texts]
    text = corpus(sources, here / "text", valid_share=0.3)
    mix = ["1:zh", "0.1:en"]
    tokens = pack(text, here / "model", here / "long", mix=mix, length=64)
    how = {**ARGS, "lr": 0.1, "steps": 6, "batch": 4, "eval_chars": 20_000, "save_every": 9}
    how["alarm_bits"] = 0.01
    whole = pretrain(here / "model", tokens, here / "alarmed", **how)
    log = read_log(whole)
    measured = [line for line in log if "bpb_en" in line]
    assert [line["step"] for line in measured] == [0, 2, 4, 6]
    assert all({"gain_en", "gain_error_en"} <= line.keys() for line in measured)
    assert not any("gain_zh" in line for line in measured)  # nobody watches it
    assert measured[-1]["bpb_zh"] < measured[0]["bpb_zh"] - 1
    alarms = [line for line in log if "alarm" in line]
    assert [line["step"] for line in alarms] == [4, 6]
    before, now = measured[0]["bpb_en"], measured[2]["bpb_en"]
    told = f"English: bits per byte {before:.3f} → {now:.3f}, {now / before - 1:+.1%}"
    told += ", expected at most +1.0%"
    assert alarms[0]["alarm"] == told
    assert whole.stats["alarms"][0] == f"step 4: {told}"
    assert f"training: alarm at step 4: {told}\n" in capsys.readouterr().out

    with pytest.raises(StageError) as e:
        pretrain(here / "model", tokens, here / "stopped", stop_on_alarm=True, **how)
    assert str(e.value) == (
        f"stopped at step 4: {told}; train anew with more of it in --mix or with lower rates; "
        "the same command without --stop-on-alarm goes on from here"
    )
    kept = saved_checkpoints(here / "stopped.tmp/checkpoints")
    assert [c.name for c in kept] == ["checkpoint-4"]
    again = pretrain(here / "model", tokens, here / "stopped", **how)
    assert again.fingerprint == whole.fingerprint

    other = {**how, "alarm_bits": 10, "stop_on_alarm": True}
    wide = pretrain(here / "model", tokens, here / "wide", **other)
    assert not wide.stats["alarms"]
    with pytest.raises(StageError, match="^stop_on_alarm watches de, .* has zh, en; name a lang"):
        pretrain(here / "model", tokens, here / "none", **other, kept=["de"])
    assert not pretrain.option_faults(**{**how, "alarm_gain": 0.2})
    assert pretrain.option_faults(**{**how, "alarm_gain": 2, "alarm_bits": -1}) == [
        "alarm_bits is -1, expected at least 0",
        "alarm_gain is 2, expected 0 to 1",
    ]


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


def test_the_last_adapters_are_kept_and_averaged(here, whole, tmp_path):
    "The final adapter of four steps, and those of the two checkpoints before it"
    how = {**ARGS, "save_every": 1, "keep_last": 3}
    a = pretrain(here / "model", here / "tokens", tmp_path / "a", **how)
    members = with_kept(a)
    assert [m.path.name for m in members] == ["00000002", "00000003", "a"]
    assert not a.damage(verify=True)
    weights = "adapter_model.safetensors"
    assert (a / weights).read_bytes() == (whole / weights).read_bytes()
    merged = merge(here / "model", a, out=tmp_path / "m", average=True, device="cpu")
    how = dict(into=merged.stats["into"], check=False, device="cpu")
    each = []
    for i, member in enumerate(members):
        one = merge(here / "model", member.path, out=tmp_path / f"m{i}", **how)
        each.append(load_file(one / "model.safetensors"))
    found = load_file(merged / "model.safetensors")
    for name, W in found.items():
        mean = torch.stack([t[name].double() for t in each]).mean(0)
        assert (W.double() - mean).abs().max() <= 3e-7
    assert any(not torch.equal(found[name], W) for name, W in each[-1].items())
