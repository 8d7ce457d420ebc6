"""Training as on a GPU, on this CPU: `as_gpu` says what is imitated and what is not."""

import json
import os
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from as_gpu import as_deepspeed, as_gpu
from conftest import SHORT_TRAINING, small_tokenizer
from safetensors.torch import load_file
from test_experts import FAMILIES, SIZES
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    Trainer,
)

from cmixtral_nb import bits
from cmixtral_nb import pretrain as pretrain_module
from cmixtral_nb.base import base
from cmixtral_nb.loading import load_model
from cmixtral_nb.mixtral import small_config
from cmixtral_nb.pack import collate, load_examples, pack
from cmixtral_nb.pretrain import pretrain
from cmixtral_nb.qlora import add_lora
from cmixtral_nb.sft import sft
from cmixtral_nb.stages import Artifact, StageError, read_json
from cmixtral_nb.tokenizer_files import load_tokenizer, write_tokenizer
from cmixtral_nb.training import keep_documents_apart, read_log

ARGS = dict(SHORT_TRAINING, steps=2)
DETERMINISTIC = {"FLASH_ATTENTION_DETERMINISTIC": "1"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A model so small that a stage takes a second, and examples that hold several documents each"
    d = tmp_path_factory.mktemp("gpu")
    small_tokenizer(d, "第篇词表扩充 number 0123456789")
    (d / "model").mkdir()
    write_tokenizer(d / "small.model", d / "model")
    n_rows = len(load_tokenizer(d / "model"))
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        small_config(hidden=64, layers=2, intermediate=64, heads=2, vocab_size=n_rows)
    )
    for name, p in model.named_parameters():
        if "self_attn" in name:
            p.data *= 8  # what leaks from one document to another is seen at once
    model.save_pretrained(d / "model")
    texts = [f"第{i}篇，词表扩充。"[: 4 + i % 7] for i in range(400)]
    (d / "zh.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    pack(d / "zh.jsonl", d / "model", d / "tokens", mix=["zh"], length=32, valid_share=0.2)
    return d


@pytest.fixture(scope="module")
def train(here):
    "`pretrain` of the small model; each call has a folder of its own"
    n = iter(range(1000))

    def run(out=None, model=None, **kw):
        out = out or here / f"run {next(n)}"
        n_old = Artifact.load(here / "tokens").stats["vocab_size"] - 20
        args = {**ARGS, "n_old": n_old, "device": "cuda:0", **kw}
        return pretrain(model or here / "model", here / "tokens", out, **args)

    return run


@pytest.fixture(scope="module")
def on_cpu(train):
    "The same run in float32 on the CPU, in 4 bits or not"
    return {in_4bit: train(load_in_4bit=in_4bit, device="cpu") for in_4bit in (True, False)}


@pytest.mark.parametrize("zero", [False, True], ids=["alone", "ZeRO-2"])
@pytest.mark.parametrize("in_4bit", [True, False], ids=["4-bit", "16-bit"])
@pytest.mark.parametrize("rows", ["all", "new", "none"])
def test_every_way_to_train(train, on_cpu, rows, in_4bit, zero):
    with as_gpu() as gpu, as_deepspeed() if zero else nullcontext():
        adapter = train(rows=rows, load_in_4bit=in_4bit)
    assert gpu.devices == ["cuda:0"]
    assert adapter.stats["quantised_dtype"] == "bfloat16"
    loss, exact = adapter.stats["loss"], on_cpu[in_4bit].stats["loss"]
    assert abs(loss["first"] - exact["first"]) < 0.01  # bfloat16 against float32
    assert loss["last"] < loss["first"] - 0.005
    loads = read_json(adapter / "router.json")
    for when in ("before", "after"):
        assert [round(sum(layer), 2) for layer in loads[when]["zh"]] == [1, 1]
    weights = load_file(adapter / "adapter_model.safetensors")
    trained = [t for name, t in weights.items() if "lora_" in name]
    if rows == "new":
        trained += [t for name, t in weights.items() if "trainable_tokens_delta" in name]
    assert {t.dtype for t in trained} == {torch.float32}
    assert any((t != t.bfloat16()).any() for t in trained)  # not rounded on the way


# --- other families of mixtures


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def other(request, here):
    "A model of another family with the same tokenizer: 64 wide, four experts"
    folder = here / request.param
    folder.mkdir()
    write_tokenizer(here / "small.model", folder)
    torch.manual_seed(0)
    n_rows = len(load_tokenizer(folder))
    config = AutoConfig.for_model(
        request.param, **{**SIZES, **FAMILIES[request.param], "vocab_size": n_rows}
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, p in model.named_parameters():
        if "self_attn" in name and p.ndim == 2:
            p.data *= 8
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_on_cpu(train, other):
    "The same run in float32 on the CPU, in 4 bits or not"
    how = dict(model=other, dropout=0, device="cpu")
    return {in_4bit: train(load_in_4bit=in_4bit, **how) for in_4bit in (True, False)}


@pytest.mark.parametrize(
    "rows, in_4bit, zero, native_bf16",
    [
        ("all", True, False, True),
        ("all", False, True, True),
        ("new", True, True, True),
        ("none", False, False, True),
        ("all", True, False, False),
    ],
    ids=["4-bit", "16-bit ZeRO-2", "new rows ZeRO-2", "no rows 16-bit", "T4"],
)
def test_other_families_train(train, other, other_on_cpu, rows, in_4bit, zero, native_bf16):
    with as_gpu(native_bf16=native_bf16), as_deepspeed() if zero else nullcontext():
        adapter = train(model=other, rows=rows, load_in_4bit=in_4bit, dropout=0)
    dtype = "bfloat16" if native_bf16 else "float16"
    assert adapter.stats["quantised_dtype"] == dtype
    loss, exact = adapter.stats["loss"], other_on_cpu[in_4bit].stats["loss"]
    assert abs(loss["first"] - exact["first"]) < 0.01  # 16 bits against float32
    if rows == "all":
        assert abs(loss["last"] - exact["last"]) < 0.01
    in_4_bits = [name for name in adapter.stats["quantised"] if ".experts." in name]
    n_layers = 1 if other.name == "qwen3_moe" else 2  # the first one is dense
    assert len(in_4_bits) == (n_layers * 4 * 3 if in_4bit else 0)
    loads = read_json(adapter / "router.json")
    for when in ("before", "after"):
        assert [round(sum(layer), 2) for layer in loads[when]["zh"]] == [1] * n_layers
    weights = load_file(adapter / "adapter_model.safetensors")
    moved = {name: t for name, t in weights.items() if name.endswith("lora_B.weight")}
    assert sum(".experts." in name for name in moved) == n_layers * 4 * 3
    assert all(t.any() and t.dtype == torch.float32 for t in moved.values())


def test_documents_stay_apart_in_other_families(here, other):
    examples, bos, document = examples_of(here, 2)
    batch = collate(examples, bos)
    found, _ = logits(other, batch, "sdpa")
    first = document == document[0, 0]
    batch["input_ids"] = torch.where(first & (batch["input_ids"] != bos), 3, batch["input_ids"])
    changed, _ = logits(other, batch, "sdpa")
    assert found.std() > 0.1
    assert (changed[first] - found[first]).abs().max() > 0.1
    assert (changed[~first] - found[~first]).abs().max() < 0.01  # an expert adds in another order


def test_other_families_under_flash_attention(train, other, monkeypatch):
    one = dict(model=other, batch=2, steps=1, dropout=0)
    if other.name == "gpt_oss":  # it has sinks, for which transformers would fetch a kernel
        monkeypatch.setattr(pretrain_module, "load_model", lambda *a, **kw: pytest.fail("loaded"))
        words = 'attn = "flash_attention_2": gpt_oss cannot be computed so; use attn = "sdpa"'
        with as_gpu(), pytest.raises(StageError, match=f"^{words}$"):
            train(attn="flash_attention_2", **one)
        return
    with as_gpu() as gpu:
        flash, sdpa = (train(attn=attn, **one) for attn in ("flash_attention_2", "sdpa"))
    assert "varlen" in gpu.flash
    (found,), (expected,) = (
        [line for line in read_log(run) if "loss" in line] for run in (flash, sdpa)
    )
    assert abs(found["loss"] - expected["loss"]) < 2e-3
    assert abs(found["grad_norm"] - expected["grad_norm"]) < 0.02 * expected["grad_norm"]


# --- Flash Attention


def examples_of(here, n):
    "Packed examples with the document of each place, counted through the batch"
    rows = load_examples(here / "tokens").select_columns("input_ids").with_format("numpy")
    bos = Artifact.load(here / "tokens").stats["bos"]
    examples = [rows[i] for i in range(n)]
    positions = collate(examples, bos)["position_ids"]
    return examples, bos, (positions == 0).flatten().cumsum(0).view(positions.shape)


def logits(model, batch, attn):
    with as_gpu() as gpu, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net = load_model(model, attn=attn, device="cuda:0")
        keep_documents_apart(net)
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        return net(**inputs, use_cache=False).logits.float(), gpu


@pytest.mark.parametrize("n", [1, 2, 16])
def test_documents_stay_apart_under_flash_attention(here, n):
    examples, bos, document = examples_of(here, n)
    batch = collate(examples, bos, flash=True)
    found, gpu = logits(here / "model", batch, "flash_attention_2")
    assert set(gpu.flash) == {"varlen"}
    expected, _ = logits(here / "model", collate(examples, bos), "sdpa")
    assert found.std() > 0.1
    assert (found - expected).abs().max() <= 0.005
    # another first document changes no logit of the others
    first = document == document[0, 0]
    batch["input_ids"] = torch.where(first & (batch["input_ids"] != bos), 3, batch["input_ids"])
    changed, _ = logits(here / "model", batch, "flash_attention_2")
    assert not torch.equal(changed[first], found[first])
    assert torch.equal(changed[~first], found[~first])


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_training_under_flash_attention_is_that_under_sdpa(train, batch):
    one = dict(batch=batch, steps=1, dropout=0)
    with as_gpu() as gpu:
        flash = train(attn="flash_attention_2", **one)
    assert "varlen" in gpu.flash
    assert {call for call in gpu.flash[-4:]} <= {"dense", "varlen"}
    with as_gpu():
        sdpa = train(attn="sdpa", **one)
    (found,), (expected,) = (
        [line for line in read_log(run) if "loss" in line] for run in (flash, sdpa)
    )
    assert abs(found["loss"] - expected["loss"]) < 2e-3
    assert abs(found["grad_norm"] - expected["grad_norm"]) < 0.02 * expected["grad_norm"]


def stopped_at(step):
    "A Trainer that is interrupted before that step"
    real = Trainer.training_step

    def training_step(self, *args, **kw):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return real(self, *args, **kw)

    return patch.object(Trainer, "training_step", training_step)


def test_a_run_under_flash_attention_is_resumed_exactly_when_told(train, tmp_path, capsys):
    how = dict(attn="flash_attention_2", optim="paged_adamw_8bit", steps=4)
    with as_gpu() as gpu, patch.dict(os.environ, DETERMINISTIC):
        capsys.readouterr()
        whole = train(**how)
        assert "FLASH_ATTENTION_DETERMINISTIC" not in capsys.readouterr().out
        with stopped_at(3), pytest.raises(KeyboardInterrupt):
            train(tmp_path / "again", **how)
        again = train(tmp_path / "again", **how)
    assert gpu.deterministic == {True}
    assert again.fingerprint == whole.fingerprint
    with as_gpu() as gpu:
        untold = train(**how)
    assert gpu.deterministic == {False}
    assert untold.fingerprint != whole.fingerprint
    assert (
        "training: gradients of Flash Attention differ in their last bits from run to run; "
        "for an exact resume set FLASH_ATTENTION_DETERMINISTIC=1" in capsys.readouterr().out
    )


def test_a_conversation_is_answered_alone_under_flash_attention(here, tmp_path):
    talks = [
        {
            "messages": [
                dict(role="user", content="词表"),
                dict(role="assistant", content="扩充" * n),
            ]
        }
        for n in range(1, 25)
    ]
    file = tmp_path / "talks.jsonl"
    file.write_text("\n".join(json.dumps(talk) for talk in talks))
    how = dict(conversations=[str(file)], rank=4, batch=4, accumulation=2, steps=2, length=64)
    how |= dict(neftune=0, dropout=0, bpe_dropout=0, lr=1e-3, log_every=1, device="cuda:0")
    losses = {}
    for attn in ("sdpa", "flash_attention_2"):
        with as_gpu() as gpu:
            adapter = sft(here / "model", tmp_path / attn, attn=attn, **how)
        losses[attn] = [line["loss"] for line in read_log(adapter) if "loss" in line]
        assert gpu.devices == ["cuda:0"]
    assert gpu.flash.count("varlen") >= 2 * 4
    for found, expected in zip(*losses.values(), strict=True):
        assert abs(found - expected) < 5e-3


# --- several GPUs, and one process


def test_one_process_uses_one_of_several_gpus(train, capsys):
    with as_gpu():
        alone = train()
    capsys.readouterr()
    with as_gpu(n_gpus=2):
        beside = train()
    assert read_log(beside) == read_log(alone)
    assert beside.stats["n_trained_tokens"] == 2 * 2 * 32
    assert (
        "training: on cuda:0, one of 2 GPUs; for all of them put in front of the command: "
        "torchrun --nproc-per-node 2 --no-python\n" in capsys.readouterr().out
    )


@pytest.mark.parametrize("in_4bit", [True, False], ids=["4-bit", "16-bit"])
def test_the_gpu_that_was_named_is_used(train, in_4bit):
    with as_gpu(n_gpus=2) as gpu:
        train(load_in_4bit=in_4bit, device="cuda:1")
        assert torch.cuda.current_device() == 1
    assert gpu.devices == ["cuda:1"]


def test_base_trains_beside_several_gpus(here, tmp_path):
    sizes = dict(hidden=32, layers=1, heads=2, kv_heads=1, intermediate=32, length=32)
    how = dict(tokenizer=str(here / "small.model"), steps=2, batch=2, lang="zh", **sizes)
    with as_gpu():
        alone = base(here / "zh.jsonl", tmp_path / "one", **how)
    with as_gpu(n_gpus=2):
        beside = base(here / "zh.jsonl", tmp_path / "two", **how)
    assert (beside / "log.jsonl").read_text() == (alone / "log.jsonl").read_text()


# --- optimiser, cards without bfloat16, devices


@pytest.fixture
def runs(monkeypatch):
    "The Trainers of the stages that run meanwhile"
    seen = []
    real = pretrain_module.run_to_end

    def run_to_end(run, *args, **kw):
        seen.append(run)
        real(run, *args, **kw)

    monkeypatch.setattr(pretrain_module, "run_to_end", run_to_end)
    return seen


def moments(run, optimizer):
    "Name of a trained parameter -> dtype of its moments"
    states = {id(p): state["state1"].dtype for p, state in optimizer.state.items()}
    return {name: states[id(p)] for name, p in run.model.named_parameters() if id(p) in states}


@pytest.mark.parametrize("rows", ["all", "new"])
def test_moments_are_those_of_the_trainer(train, runs, rows):
    with as_gpu():
        train(optim="paged_adamw_8bit", rows=rows)
        run = runs[0]
        found = moments(run, run.optimizer.optimizer)
        stock = Trainer(run.model, run.args, eval_dataset=run.eval_dataset)
        theirs = stock.create_optimizer()
        for p in run.model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        theirs.step()
    assert found == moments(run, theirs)
    if rows == "all":
        assert {found[name] for name in found if "embed_tokens" in name} == {torch.float32}
        assert {found[name] for name in found if "lm_head" in name} == {torch.uint8}


@pytest.mark.parametrize("rows, in_4bit", [("all", True), ("new", False), ("none", True)])
def test_a_card_without_bfloat16_trains_in_float16(train, runs, on_cpu, rows, in_4bit):
    with as_gpu(native_bf16=False):
        adapter = train(rows=rows, load_in_4bit=in_4bit, steps=4)
    assert adapter.stats["quantised_dtype"] == "float16"
    (run,) = runs
    assert run.args.fp16 and not run.args.bf16
    assert run.accelerator.scaler.get_scale() > 1
    loss = adapter.stats["loss"]
    assert abs(loss["first"] - on_cpu[in_4bit].stats["loss"]["first"]) < 0.005
    assert loss["last"] < loss["first"] - 0.005


def test_small_gradients_survive_float16(train, runs, monkeypatch):
    norms = {}
    for native in (True, False):
        with as_gpu(native_bf16=native):
            log = read_log(train(rows="all", dropout=0, steps=3))
        norms[native] = [line["grad_norm"] for line in log if "loss" in line][-1]
    assert abs(norms[False] / norms[True] - 1) < 0.05


@pytest.mark.parametrize("few", [0, 2**27], ids=["without logits", "with logits"])
def test_a_step_makes_its_tensors_on_the_models_device(here, monkeypatch, few):
    monkeypatch.setattr(bits, "FEW_LOGITS", few)
    examples, bos, _ = examples_of(here, 2)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    config = LlamaConfig(vocab_size=400, num_attention_heads=2, use_cache=False, **sizes)
    net = add_lora(LlamaForCausalLM(config).requires_grad_(False), rank=4).train().to("meta")
    batch = {name: x.to("meta") for name, x in collate(examples, bos).items()}
    del batch["position_ids"]  # the library asks for their values, which meta has not
    batch["attention_mask"] = torch.zeros(2, 1, 32, 32, device="meta")
    with as_gpu():  # which answers for autocast: the device meta has none
        loss = net(**batch).loss
        loss.backward()
        assert all(p.grad.device.type == "meta" for p in net.parameters() if p.requires_grad)
        net.get_base_model().model.norm.to_empty(device="cpu")
        with pytest.raises(RuntimeError, match="device"):  # PyTorch refuses to mix the two
            net(**batch)
    assert loss.device.type == "meta"
