"""By hand, on the day a GPU is there: one command, ten minutes, one card, no network.

python tests/bench_gpu.py                        # every scenario; a table, and bench_gpu.json
python tests/bench_gpu.py --list                 # their names, and what each of them asks
python tests/bench_gpu.py --only step-ours peaks # some
python tests/bench_gpu.py --device cpu --small   # does the code of this file itself still run?

Each scenario is a process of its own with a time limit. Its result is written as it comes, so an
interruption loses nothing; what the card or a package lacks is skipped with its reason. Weights
are random, of Mixtral-8x7B's width but two layers; text is what ships with the package.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

FIRST = [  # what nobody can know without a card, in case the time does not reach
    "card",
    "nf4",
    "isolation",
    "step-ours",
    "step-stock",
    "peaks",
    "generate",
    "pretrain",
    "resume",
]
MARK = "RESULT "  # before the line of a scenario that holds its numbers
DONE = "ok"


# ---- what is measured


@dataclass(frozen=True)
class Sizes:
    "Width and batch of a model, a batch, and LoRA"

    hidden: int
    intermediate: int
    experts: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int
    batch: int
    length: int
    rank: int


REAL = Sizes(4096, 14336, 8, 32, 8, 2, 57_000, 16, 2048, 64)  # Mixtral-8x7B, two of 32 layers
SMALL = Sizes(64, 64, 4, 2, 1, 2, 300, 2, 64, 4)


@dataclass(frozen=True)
class Bench:
    "Where a scenario runs, and how large it may be"

    device: str  # cpu, or cuda:0
    sizes: Sizes
    folder: Path  # shared by all scenarios of a call

    @property
    def on_gpu(self):
        return self.device != "cpu"

    def wait(self):
        "Until the card has done what it was told"
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    def fresh_peak(self):
        import torch

        from cmixtral_nb.machine import reset_peak

        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak()

    def peak_gb(self):
        import torch

        from cmixtral_nb.machine import peak_bytes

        peak = torch.cuda.max_memory_allocated() if self.on_gpu else peak_bytes()
        return round(peak / 1e9, 3)


@dataclass(frozen=True)
class Scenario:
    "A question to the card"

    name: str
    run: Callable[[Bench], dict]  # the numbers; an exception is a failure
    asks: str
    seconds: int  # at most
    packages: tuple[str, ...]  # as imported
    gpus: int  # at least, where it runs on GPUs
    cpu: bool  # runs on a CPU too


SCENARIOS: dict[str, Scenario] = {}


def scenario(name, seconds=60, packages=(), gpus=1, cpu=True):
    "Put a function among the scenarios; its docstring is the question"

    def add(function):
        SCENARIOS[name] = Scenario(name, function, function.__doc__, seconds, packages, gpus, cpu)
        return function

    return add


# ---- models and text


def model_folder(bench, sizes, **changes):
    "A Mixtral with random weights on this disk, made by the first scenario that needs it"
    import torch
    from transformers import MixtralForCausalLM

    from cmixtral_nb.machine import default_dtype
    from cmixtral_nb.mixtral import small_config

    words = [*asdict(sizes).values(), *changes.values()]
    out = bench.folder / ("model-" + "-".join(map(str, words)))
    if out.is_dir():
        return out
    config = small_config(
        hidden=sizes.hidden,
        layers=sizes.layers,
        experts=sizes.experts,
        intermediate=sizes.intermediate,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        vocab_size=sizes.vocab,
        **changes,
    )
    torch.manual_seed(0)
    kind = getattr(torch, default_dtype(bench.device))
    torch.set_default_dtype(kind)
    with torch.device(bench.device):
        net = MixtralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    part = out.with_name(out.name + ".part")
    net.to(kind).save_pretrained(part)
    part.rename(out)
    return out


FAMILIES: dict[str, dict[str, int]] = {  # other mixtures, as wide as they are
    "qwen3_moe": dict(  # Qwen3-30B-A3B: many small experts
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
    ),
    "gpt_oss": dict(  # gpt-oss-20b: transposed, interleaved, with biases
        hidden_size=2880,
        intermediate_size=2880,
        num_local_experts=32,
        num_experts_per_tok=4,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
    ),
    "glm4_moe": dict(  # GLM-4.5-Air: a router in float32, balanced by a correction
        hidden_size=4096,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=128,
        num_experts_per_tok=8,
        n_shared_experts=1,
        num_attention_heads=96,
        num_key_value_heads=8,
        head_dim=128,
        first_k_dense_replace=1,
    ),
}
TINY = dict(  # the same keys, small
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_experts=8,
    num_local_experts=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
)


def family_folder(bench, family, vocab, small):
    "A model of another family with random weights and two layers"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cmixtral_nb.machine import default_dtype

    out = bench.folder / f"{family}-{vocab}-{small}"
    if out.is_dir():
        return out
    sizes = dict(FAMILIES[family])
    if small:
        sizes |= {name: value for name, value in TINY.items() if name in sizes}
    config = AutoConfig.for_model(family, num_hidden_layers=2, vocab_size=vocab, **sizes)
    torch.manual_seed(0)
    with torch.device(bench.device):
        kind = getattr(torch, default_dtype(bench.device))
        net = AutoModelForCausalLM.from_config(config, dtype=kind)
    part = out.with_name(out.name + ".part")
    net.save_pretrained(part)
    part.rename(out)
    return out


def packed(sizes, n_examples, document=400):
    "Examples of random tokens, a new document (token 1) every `document` tokens or so"
    import numpy as np
    from datasets import Dataset

    rng = np.random.default_rng(0)
    ids = rng.integers(3, sizes.vocab, (n_examples, sizes.length))
    ids[rng.random(ids.shape) < 1 / document] = 1
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("numpy")


def chain(bench):
    "A small base, its extension and its tokens, from the text that ships: folder of the stages"
    from cmixtral_nb.base import base
    from cmixtral_nb.corpus import corpus
    from cmixtral_nb.init import init
    from cmixtral_nb.pack import pack
    from cmixtral_nb.tokenizer import tokenizer
    from cmixtral_nb.vocab import vocab

    here = bench.folder / "chain"
    text = corpus(
        ["zh=builtin:zh", "en=builtin:en"], here / "corpus", valid_share=0.3, limit_chars=150_000
    )
    pieces = tokenizer(text, here / "pieces", n_pieces=3000, n_chars=2000)
    tok = vocab(pieces, here / "tokenizer", n_pieces=300, n_hostile=1000)
    shape = dict(hidden=64, layers=2, heads=2, kv_heads=1, intermediate=64)
    born = base(text, here / "base", steps=4, batch=2, length=64, device=bench.device, **shape)
    init(born, tok, here / "model")
    pack(text, tok, here / "tokens", mix=["1:zh", "0.5:en"], length=64, valid_chars=2000)
    return here


def pretrain_small(bench, here, out, **options):
    "The whole stage on the small chain; its statistics"
    from cmixtral_nb.pretrain import pretrain

    few = dict(rank=4, alpha=8, lr=1e-3, batch=2, steps=6, eval_every=3, save_every=2, log_every=1)
    how = {**few, "eval_chars": 1000, "device": bench.device, **options}
    return pretrain(here / "model", here / "tokens", bench.folder / out, **how)


# ---- scenarios: what is right


@scenario("card", seconds=60)
def card(bench):
    "Which card is it, what does it compute in, and which packages are there?"
    import torch

    from cmixtral_nb.machine import default_dtype, gpu_bytes, versions
    from cmixtral_nb.packages import EXTRAS, installed_version

    found = {name: installed_version(name) for name in EXTRAS if installed_version(name)}
    about = dict(dtype=default_dtype(bench.device), gpus=len(gpu_bytes()))
    if bench.on_gpu:
        about["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        about["memory_gb"] = round(gpu_bytes()[0] / 1e9, 1)
        about["bf16_emulated"] = about["dtype"] != "bfloat16"
    return {**about, "versions": {**versions(), **found}}


@scenario("plan", seconds=90)
def plan_of_paper(bench):
    "Does `cmixtral plan paper` answer, with lm-eval and without?"
    code = (
        "import sys; sys.modules.update({name: None for name in sys.argv[1:]})\n"
        "from cmixtral_nb.commands import main\nsys.exit(main(['plan', 'paper']))"
    )
    lines = {}
    for hidden in ([], ["lm_eval"]):
        run = subprocess.run(
            [sys.executable, "-c", code, *hidden],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert run.returncode == 0, run.stderr[-1000:]
        missing = [x for x in run.stdout.splitlines() if x.startswith("missing here")]
        lines["without " + hidden[0] if hidden else "as it is"] = len(missing)
    return dict(missing=lines)


@scenario("isolation", seconds=90)
def isolation(bench):
    "Do packed documents stay apart: sdpa, and Flash Attention where it is installed?"
    import torch

    from cmixtral_nb.loading import load_model
    from cmixtral_nb.pack import collate

    # Every token goes to both experts: no route can flip at the last bit
    narrow = Sizes(256, 256, 2, 4, 2, 2, 1000, 16, 256, 0)
    folder = model_folder(bench, narrow, top_k=2)
    kinds = ["sdpa", "flash_attention_2"] if has_flash(bench) else ["sdpa"]
    nets = {kind: load_model(folder, attn=kind, device=bench.device) for kind in kinds}
    found = {}
    for batch in (1, 2, 16):
        examples = list(packed(narrow, batch, document=60))
        for example in examples:
            example["input_ids"][[0, 100]] = 1  # the first document ends before token 100
        changed = [dict(input_ids=example["input_ids"].copy()) for example in examples]
        for example in changed:
            example["input_ids"][1:99] = 7  # another first document (and those up to there)
        logits = {}
        for kind, net in nets.items():
            for name, given in (("as it is", examples), ("changed", changed)):
                made = collate(given, bos=1, flash=kind != "sdpa")
                del made["labels"]
                on_card = {
                    k: v.to(bench.device) if torch.is_tensor(v) else v for k, v in made.items()
                }
                with torch.no_grad():
                    out = net(**on_card, use_cache=False).logits.float().cpu()
                logits[kind, name] = out
            moved = (logits[kind, "as it is"] - logits[kind, "changed"])[:, 100:].abs().max().item()
            found[f"{kind} {batch}: document 1 moves 2 by"] = moved
            assert moved == 0, found
        if len(nets) > 1:
            apart = (logits[kinds[0], "as it is"] - logits[kinds[1], "as it is"]).abs()
            found[f"flash - sdpa {batch}"] = round(apart.max().item(), 5)
            assert apart.max() < 0.05, found
    return found


def has_flash(bench):
    return bench.on_gpu and importlib.util.find_spec("flash_attn") is not None


@scenario("nf4", seconds=60)
def nf4(bench):
    "Are the bytes of NF4 made on the GPU those made on the CPU?"
    import bitsandbytes as bnb
    import torch

    torch.manual_seed(0)
    n_out, n_in = bench.sizes.intermediate, bench.sizes.hidden
    found = {}
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        weight = torch.randn(n_out, n_in).to(kind)
        codes, values = [], []
        for device in ("cpu", bench.device):
            quantised, state = bnb.functional.quantize_4bit(
                weight.to(device), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            codes.append(quantised.cpu())
            values.append(bnb.functional.dequantize_4bit(quantised, state).float().cpu())
        name = str(kind).removeprefix("torch.")
        found[f"{name}: bytes that differ"] = (codes[0] != codes[1]).float().mean().item()
        found[f"{name}: largest difference"] = (values[0] - values[1]).abs().max().item()
    return found


@scenario("merge", seconds=90)
def merge_on_both(bench):
    "Is a merge into 4-bit weights the same, quantised on the CPU and on the GPU?"
    import torch

    from cmixtral_nb.adapters import save_adapter
    from cmixtral_nb.checkpoints import load_tensor, tensor_files
    from cmixtral_nb.loading import load_model
    from cmixtral_nb.merge import merge
    from cmixtral_nb.qlora import add_lora

    narrow = replace(bench.sizes, hidden=256, intermediate=512, heads=4, kv_heads=2, vocab=1000)
    folder = model_folder(bench, narrow)
    net = load_model(folder, load_in_4bit=True, trainable=True, device=bench.device)
    net = add_lora(net, rank=4, alpha=8, rows="none")
    for name, p in net.named_parameters():
        if "lora_B" in name:
            p.data.fill_(0.01)
    save_adapter(net, bench.folder / "adapter")
    merged = {}
    for device in ("cpu", bench.device):
        out = bench.folder / f"merged-{device.replace(':', '')}"
        made = merge(folder, bench.folder / "adapter", out, into="dequantised", device=device)
        files = tensor_files(made.path)
        merged[device] = {name: load_tensor(files, name) for name in files}
    one, two = merged["cpu"], merged[bench.device]
    unequal = [name for name in one if not torch.equal(one[name], two[name])]
    return dict(tensors=len(one), unequal=len(unequal))


@scenario("loss", seconds=60, packages=("liger_kernel",), cpu=False)
def fused_loss(bench):
    "Is Liger's loss ours, and how long does each take, forward and backward?"
    import torch

    from cmixtral_nb.bits import _Head, _liger_loss, head_loss

    n, d, size = 8192, bench.sizes.hidden, bench.sizes.vocab
    torch.manual_seed(0)
    kind = dict(device=bench.device, dtype=torch.bfloat16)
    W = (torch.randn(size, d, **kind) / d**0.5).requires_grad_()
    h, labels = torch.randn(n, d, **kind), torch.randint(0, size, (n,), device=bench.device)
    found = {}
    for name, loss_of in (
        ("ours", lambda x: head_loss(x, W, labels)),
        ("liger", lambda x: _liger_loss(_Head(W.detach(), W, None), x, labels, None)),
    ):
        for _ in range(2):  # the first warms up
            x = h.clone().requires_grad_()
            bench.fresh_peak()
            bench.wait()
            start = time.perf_counter()
            loss = loss_of(x)
            loss.backward()
            bench.wait()
            seconds = time.perf_counter() - start
        found[name] = dict(loss=loss.item(), seconds=round(seconds, 4), peak_gb=bench.peak_gb())
    assert abs(found["ours"]["loss"] - found["liger"]["loss"]) < 0.01, found
    return found


@scenario("recompute", seconds=90)
def recompute(bench):
    "Does the forward pass that checkpointing repeats choose the same experts?"
    import torch

    from cmixtral_nb.loading import load_model
    from cmixtral_nb.qlora import add_lora

    narrow = replace(bench.sizes, hidden=256, intermediate=256, heads=4, kv_heads=2, vocab=1000)
    folder = model_folder(bench, narrow)
    ids = torch.randint(3, 1000, (2, min(1024, 8 * bench.sizes.length))).to(bench.device)
    chosen: dict[str, list] = {}
    gradients = {}

    def note(name, module, inputs, output):
        chosen.setdefault(name, []).append(output[-1].detach().cpu())

    for checkpointing in (False, True):
        net = load_model(folder, load_in_4bit=True, trainable=True, device=bench.device)
        net = add_lora(net, rank=4, alpha=8, dropout=0.0, rows="none", seed=0).train()
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": False})
            for name, module in net.named_modules():
                if type(module).__name__ == "MixtralTopKRouter":
                    module.register_forward_hook(partial(note, name))
        with torch.autocast(bench.device.split(":")[0], torch.bfloat16, enabled=bench.on_gpu):
            net(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients[checkpointing] = torch.cat(
            [p.grad.flatten().float().cpu() for p in net.parameters() if p.grad is not None]
        )
    assert all(len(twice) == 2 for twice in chosen.values()), {k: len(v) for k, v in chosen.items()}
    flipped = [(a != b).float().mean().item() for a, b in chosen.values()]
    apart = (gradients[True] - gradients[False]).norm() / gradients[False].norm()
    return dict(routes_flipped=max(flipped), gradient_difference=apart.item())


@scenario("pretrain", seconds=150)
def whole_stage(bench):
    "Does the whole stage run: rows all, new, none in 4 and 16 bits, and under Flash Attention?"
    here = chain(bench)
    found = {}
    for bits in (4, 16):
        for rows in ("all", "new", "none"):
            found[f"{rows} {bits} bits"] = last_loss(
                pretrain_small(bench, here, f"{rows}-{bits}", rows=rows, load_in_4bit=bits == 4)
            )
    if has_flash(bench):
        found["flash"] = last_loss(
            pretrain_small(bench, here, "flash", attn="flash_attention_2", checkpointing=True)
        )
    return found


@scenario("families", seconds=150)
def whole_stage_of_families(bench):
    "Does the stage run for other mixtures, in 4 and 16 bits, and are all experts met?"
    import shutil

    from cmixtral_nb.pretrain import pretrain
    from cmixtral_nb.stages import read_json
    from cmixtral_nb.tokenizer_files import load_tokenizer

    here = chain(bench)
    n_rows = len(load_tokenizer(here / "model"))
    few = dict(rank=4, alpha=8, lr=1e-3, batch=2, steps=6, eval_every=3, log_every=1)
    found = {}
    for family in FAMILIES:
        model = family_folder(bench, family, n_rows, small=True)
        for file in (here / "model").glob("tokenizer*"):
            shutil.copy(file, model)
        for bits, rows in ((4, "all"), (16, "none")):
            out = bench.folder / f"{family}-{bits}"
            how = dict(few, rows=rows, load_in_4bit=bits == 4, eval_chars=1000)
            made = pretrain(model, here / "tokens", out, device=bench.device, **how)
            loads = read_json(made / "router.json")["after"]["zh"]
            found[f"{family} {bits} bits"] = dict(
                loss=last_loss(made),
                idle=sum(share == 0 for layer in loads for share in layer),
            )
    return found


def last_loss(made):
    from cmixtral_nb.training import read_log

    losses = [line["loss"] for line in read_log(made) if "loss" in line]
    assert losses[-1] < losses[0] + 1, losses
    return round(losses[-1], 4)


@scenario("resume", seconds=120)
def resume(bench):
    "Is a run that was interrupted, with plain and with paged 8-bit Adam, the run it would be?"
    here = chain(bench)
    found = {}
    kinds = ["adamw_torch"]
    if bench.on_gpu:
        kinds.append("paged_adamw_8bit")
    for optim in kinds:
        how = dict(optim=optim, dropout=0.05)
        whole = pretrain_small(bench, here, f"whole-{optim}", **how)
        interrupt(bench, here, f"again-{optim}", **how)
        again = pretrain_small(bench, here, f"again-{optim}", **how)
        found[f"{optim}: largest difference"] = adapter_difference(whole.path, again.path)
    return found


def interrupt(bench, here, out, **how):
    "Ctrl-C in the fifth step: the checkpoint of the fourth is there"
    import cmixtral_nb.training as training

    stop_at_nan = training.stop_at_nan

    def stop(loss, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        stop_at_nan(loss, step, *rest)

    with patch.object(training, "stop_at_nan", stop):
        try:
            pretrain_small(bench, here, out, **how)
        except KeyboardInterrupt:
            return
    raise AssertionError("the run was not interrupted")


def adapter_difference(one, two):
    from safetensors.torch import load_file

    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@scenario("sft", seconds=90)
def tuned(bench):
    "Does instruction tuning run?"
    from cmixtral_nb.sft import sft

    few = dict(rank=4, steps=3, accumulation=2, n_translations=50, log_every=1, device=bench.device)
    made = sft(chain(bench) / "model", bench.folder / "sft", **few)
    return dict(loss=last_loss(made))


@scenario("evaluate", seconds=120)
def bits(bench):
    "Are bits per byte on the GPU, in 16 and in 4 bits, near those of the CPU?"
    from cmixtral_nb.bits import bits_per_byte
    from cmixtral_nb.corpora import corpus_texts
    from cmixtral_nb.loading import load_model
    from cmixtral_nb.tokenizer_files import load_tokenizer

    model = chain(bench) / "model"
    texts = list(corpus_texts("builtin:zh", "zh", limit_chars=5000))
    tok = load_tokenizer(model)
    found = {}
    for name, device, in_4bit in (
        ("cpu", "cpu", False),
        ("16 bits", bench.device, False),
        ("4 bits", bench.device, True),
    ):
        net = load_model(model, load_in_4bit=in_4bit, device=device)
        found[name] = round(bits_per_byte(net, tok, texts, length=64)["bits_per_byte"], 4)
    assert abs(found["16 bits"] / found["cpu"] - 1) < 0.02, found
    return found


@scenario("exams", seconds=120, packages=("lm_eval",))
def exams(bench):
    "Does lm-eval's automatic batch find its size?"
    from cmixtral_nb.evaluate import evaluate

    data = bench.folder / "questions"
    head = "id,question,A,B,C,D,answer,explanation\n"
    rows = "".join(f"{i},第{i}题,甲,乙,丙,丁,{'ABCD'[i % 4]},\n" for i in range(12))
    for split in ("val", "dev"):
        file = data / "ceval" / split / f"law_{split}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(head + rows)
    made = evaluate(
        chain(bench) / "model",
        bench.folder / "exam",
        tasks=["ceval-valid_law"],
        data=data,
        device=bench.device,
    )
    results = json.loads((made.path / "results.json").read_text())["results"]
    return dict(accuracy=results["ceval-valid_law"]["acc,none"])


@scenario("run", seconds=240)
def whole_run(bench):
    "Does `cmixtral run` go from text to report, every stage on the card?"
    text = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
    recipe = bench.folder / "micro.toml"
    recipe.write_text(text.split('MICRO = """')[1].split('"""')[0], encoding="utf-8")
    code = "import sys; from cmixtral_nb.commands import main; sys.exit(main())"
    words = ["run", recipe, "--out", bench.folder / "run"]
    command = [sys.executable, "-c", code, *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-2000:]
    gained = json.loads((bench.folder / "run" / "report.json").read_text())
    return dict(stages=len(gained.get("stages", [])), lines=len(run.stdout.splitlines()))


@scenario("gpu-cells", seconds=240, cpu=False)
def gpu_cells(bench):
    "Do the cells of the chapter on training that are flagged gpu run?"
    import shutil

    from cmixtral_nb.notebooks import execute

    source = Path(__file__).parents[1] / "nbs" / "09_pretrain.ipynb"
    execute(shutil.copy(source, bench.folder), "gpu")
    return {}


# ---- scenarios: how fast, how large


def timed_steps(seconds):
    "A callback that waits for the card and notes how long each step took"
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kw):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.start)

    return Clock()


def step_arguments(bench, out, batch, steps):
    from cmixtral_nb.training import training_arguments

    return training_arguments(
        out,
        bench.device,
        checkpointing=True,
        learning_rate=1e-5,
        optim="paged_adamw_8bit" if bench.on_gpu else "adamw_torch",
        per_device_train_batch_size=batch,
        max_steps=steps,
        logging_steps=1,
        eval_steps=10**6,
        save_steps=10**6,
        dataloader_drop_last=True,
    )


def our_steps(bench, net, attn, batch, steps, out):
    "Seconds of each step of our Trainer"
    from cmixtral_nb.pack import collate
    from cmixtral_nb.pretrain import trainer

    run = trainer(
        net,
        packed(bench.sizes, batch * steps),
        step_arguments(bench, out / "checkpoints", batch, steps),
        partial(collate, bos=1, flash=attn == "flash_attention_2"),
        rows_lr=1e-5,
        measure=dict,
        log=out / "log.jsonl",
    )
    seconds: list[float] = []
    run.add_callback(timed_steps(seconds))
    run.train()
    return seconds


def our_model(bench, sizes, rows="all", load_in_4bit=True, attn="sdpa"):
    from cmixtral_nb.loading import load_model
    from cmixtral_nb.pretrain import weigh_balance
    from cmixtral_nb.qlora import add_lora

    folder = model_folder(bench, sizes)
    net = load_model(
        folder, load_in_4bit=load_in_4bit, attn=attn, device=bench.device, trainable=True
    )
    weigh_balance(net, 0.02, 1)
    n_old = sizes.vocab * 32 // 57
    return folder, add_lora(net, sizes.rank, 2 * sizes.rank, 0.05, rows, n_old)


def speed(bench, seconds, net):
    "Tokens per second and utilisation from the steps after the first"
    import torch

    from cmixtral_nb.plan import peak_flops
    from cmixtral_nb.training import flops_per_token

    n_tokens = bench.sizes.batch * bench.sizes.length
    step = statistics.median(seconds[1:])
    found = dict(seconds_per_step=round(step, 3), tokens_per_second=round(n_tokens / step))
    possible = peak_flops(torch.cuda.get_device_name() if bench.on_gpu else "cpu")
    if possible:
        found["utilisation"] = round(flops_per_token(net) * n_tokens / step / possible, 4)
    return {**found, "peak_gb": bench.peak_gb()}


def step_ours(bench, attn):
    "Four steps at the recipe's batch"
    _, net = our_model(bench, bench.sizes, attn=attn)
    bench.fresh_peak()
    seconds = our_steps(bench, net, attn, bench.sizes.batch, 4, bench.folder / f"step-{attn}")
    return speed(bench, seconds, net)


@scenario("step-ours", seconds=120)
def step_sdpa(bench):
    "Tokens per second and utilisation of QLoRA at 16 x 2,048, two layers of Mixtral's width"
    return step_ours(bench, "sdpa")


@scenario("step-ours-flash", seconds=120, packages=("flash_attn",), cpu=False)
def step_flash(bench):
    "The same under Flash Attention"
    return step_ours(bench, "flash_attention_2")


@scenario("step-stock", seconds=150)
def step_stock(bench):
    "The same with stock transformers and peft: experts in 16 bits, the logits held"
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralForCausalLM, Trainer

    from cmixtral_nb.loading import nf4_config
    from cmixtral_nb.machine import default_dtype

    sizes, kind = bench.sizes, getattr(torch, default_dtype(bench.device))
    net = MixtralForCausalLM.from_pretrained(
        model_folder(bench, sizes),
        dtype=kind,
        quantization_config=nf4_config(kind),
        device_map={"": bench.device},
    )
    lora = LoraConfig(
        r=sizes.rank,
        lora_alpha=2 * sizes.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["gate_up_proj", "down_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )
    net = get_peft_model(net, lora)

    def batch_of(examples):
        ids = torch.stack([torch.as_tensor(example["input_ids"]) for example in examples])
        return dict(input_ids=ids, labels=ids)

    seconds: list[float] = []
    run = Trainer(
        model=net,
        args=step_arguments(bench, bench.folder / "stock", sizes.batch, 4),
        train_dataset=packed(sizes, 4 * sizes.batch),
        eval_dataset=packed(sizes, 1),
        data_collator=batch_of,
        callbacks=[timed_steps(seconds)],
    )
    bench.fresh_peak()
    run.train()
    return speed(bench, seconds, net)


def step_of_family(bench, family):
    "Four steps at a quarter of the recipe's batch"
    from cmixtral_nb.loading import load_model
    from cmixtral_nb.pretrain import weigh_balance
    from cmixtral_nb.qlora import add_lora, expert_bytes

    sizes = bench.sizes
    here = replace(bench, sizes=replace(sizes, batch=max(1, sizes.batch // 4)))
    folder = family_folder(here, family, sizes.vocab, small=sizes is SMALL)
    start = time.perf_counter()
    net = load_model(folder, load_in_4bit=True, device=bench.device, trainable=True)
    bench.wait()
    loading = time.perf_counter() - start
    weigh_balance(net, 0.02, 1)
    start = time.perf_counter()
    net = add_lora(net, sizes.rank, 2 * sizes.rank, 0.0, "none")
    lora = time.perf_counter() - start
    bench.fresh_peak()
    out = bench.folder / f"step-{family}"
    seconds = our_steps(here, net, "sdpa", here.sizes.batch, 4, out)
    return dict(
        speed(here, seconds, net),
        loading_seconds=round(loading, 1),
        lora_seconds=round(lora, 1),
        expert_bytes=round(expert_bytes(net)["bytes_per_param"], 4),
    )


@scenario("step-qwen3", seconds=150)
def step_qwen3(bench):
    "A step of QLoRA on two layers of Qwen3-30B-A3B: 128 experts each"
    return step_of_family(bench, "qwen3_moe")


@scenario("step-gpt-oss", seconds=150)
def step_gpt_oss(bench):
    "A step of QLoRA on two layers of gpt-oss-20b: 32 experts with biases"
    return step_of_family(bench, "gpt_oss")


@scenario("step-glm4", seconds=150)
def step_glm4(bench):
    "A step of QLoRA on two layers of GLM-4.5-Air, the first one dense"
    return step_of_family(bench, "glm4_moe")


@scenario("peaks", seconds=240)
def peaks(bench):
    "Does a step take what the plan says: rows all, new, none in 4 and in 16 bits?"
    import gc

    import torch

    from cmixtral_nb.plan import settings_plan

    sizes = replace(bench.sizes, layers=1, batch=max(1, bench.sizes.batch // 4))
    here = replace(bench, sizes=sizes)
    attn = "flash_attention_2" if has_flash(bench) else "sdpa"
    found = {}
    for bits in (4, 16):
        for rows in ("all", "new", "none"):
            name = f"{rows} {bits} bits"
            bench.fresh_peak()
            folder, net = our_model(here, sizes, rows, bits == 4, attn)
            out = bench.folder / f"peak-{rows}-{bits}"
            our_steps(here, net, attn, sizes.batch, 2, out)
            settings = dict(
                rank=sizes.rank,
                rows=rows,
                n_old=sizes.vocab * 32 // 57,
                batch=sizes.batch,
                load_in_4bit=bits == 4,
                checkpointing=True,
                optim="paged_adamw_8bit" if bench.on_gpu else "adamw_torch",
                attn=attn,
            )
            device = bench.device.split(":")[0]
            planned = settings_plan(folder, settings, sizes.length, sizes.vocab, device)["bytes"]
            expected = (planned["total"] - planned["cuda"]) / 1e9  # the context is not allocated
            measured = bench.peak_gb()
            found[name] = dict(measured_gb=measured)
            if bench.on_gpu:  # on a CPU the libraries take more than these sizes
                found[name] |= dict(
                    planned_gb=round(expected, 3),
                    ratio=round(measured / expected, 3),
                    reserved_gb=round(torch.cuda.max_memory_reserved() / 1e9, 3),
                    planned_with_gaps_gb=round(planned["total"] / 1e9, 3),
                )
            del net
            gc.collect()
    return found


@scenario("generate", seconds=120)
def generation(bench):
    "Tokens per second and memory of generation, in 16 and in 4 bits"
    import torch

    from cmixtral_nb.loading import load_model

    folder = model_folder(bench, bench.sizes)
    n_new = 32 if bench.on_gpu else 4
    ids = torch.randint(3, bench.sizes.vocab, (1, min(512, bench.sizes.length))).to(bench.device)
    found = {}
    for in_4bit in (False, True):
        bench.fresh_peak()
        net = load_model(folder, load_in_4bit=in_4bit, device=bench.device)
        how = dict(do_sample=False, eos_token_id=None, pad_token_id=0, min_new_tokens=n_new)
        took = []
        for _ in range(2):  # the first warms up
            bench.wait()
            start = time.perf_counter()
            with torch.no_grad():
                net.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=n_new,
                    use_cache=True,
                    **how,
                )
            bench.wait()
            took.append(time.perf_counter() - start)
        name = "4 bits" if in_4bit else "16 bits"
        found[name] = dict(tokens_per_second=round(n_new / took[-1], 1), peak_gb=bench.peak_gb())
        del net
    return found


# ---- scenarios: several processes, several cards


def torchrun(bench, n_processes, out, *options):
    "`cmixtral pretrain` of the small chain, by several processes; its statistics"
    here = chain(bench)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node", str(n_processes), "-m", "cmixtral_nb.commands"]
    code = "import sys; from cmixtral_nb.commands import main; sys.exit(main())"
    script = bench.folder / "main.py"
    script.write_text(code)
    words[-2:] = [str(script)]
    few = "--rank 4 --alpha 8 --lr 1e-3 --batch 2 --steps 4 --eval-every 4 --log-every 1"
    words += ["pretrain", "--model", here / "model", "--tokens", here / "tokens"]
    words += [*few.split(), "--eval-chars", "1000", "--out", bench.folder / out, *options]
    if not bench.on_gpu:
        words += ["--device", "cpu"]
    run = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-2000:]
    return dict(loss=last_loss(bench.folder / out))


@scenario("zero2", seconds=120, packages=("deepspeed",), cpu=False)
def zero2(bench):
    "Does ZeRO-2 run to its end, rows in float32 again?"
    return torchrun(bench, 1, "zero2", "--zero", "2")


@scenario("ddp", seconds=150, gpus=2)
def ddp(bench):
    "Do all cards train together under torchrun?"
    import torch

    return torchrun(bench, torch.cuda.device_count() if bench.on_gpu else 2, "ddp")


@scenario("one-of-several", seconds=90, gpus=2)
def one_of_several(bench):
    "Does one process beside several cards use one, with the loss of one?"
    here = chain(bench)
    beside = last_loss(pretrain_small(bench, here, "beside"))
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import bench_gpu as b
bench = b.Bench({bench.device!r}, b.REAL, Path({str(bench.folder)!r}))
print(b.last_loss(b.pretrain_small(bench, bench.folder / "chain", "alone")))
"""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    alone = float(run.stdout.split()[-1])
    assert abs(alone - beside) < 0.01, (alone, beside)
    return dict(alone=alone, beside=beside)


@scenario("spread", seconds=120, gpus=2)
def spread(bench):
    "Does a model that is spread over the cards answer as on one?"
    import torch

    from cmixtral_nb.loading import load_model

    narrow = replace(bench.sizes, hidden=256, intermediate=256, heads=4, kv_heads=2, layers=4)
    folder = model_folder(bench, narrow)
    ids = torch.randint(3, narrow.vocab, (1, 128))
    logits = []
    for device in (bench.device, "auto"):
        net = load_model(folder, device=device)
        with torch.no_grad():
            logits.append(net(ids.to(net.device), use_cache=False).logits.float().cpu())
    apart = (logits[0] - logits[1]).abs().max().item()
    assert apart < 0.05, apart
    return dict(largest_difference=apart)


# ---- the call


def lacking(asked, device):
    "Why a scenario cannot run here, or nothing"
    if device == "cpu" and not asked.cpu:
        return "needs a GPU"
    if device != "cpu" and asked.gpus > 1:
        import torch

        if torch.cuda.device_count() < asked.gpus:
            return f"needs {asked.gpus} GPUs, found {torch.cuda.device_count()}"
    absent = [name for name in asked.packages if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(absent)}" if absent else ""


def run_apart(asked, options, folder, seconds):
    "A scenario in a process of its own: status, seconds, numbers or words"
    command = [sys.executable, __file__, "--scenario", asked.name, "--folder", str(folder)]
    command += ["--device", options.device] + (["--small"] if options.small else [])
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # it may have children: all are ended together
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        out, _ = process.communicate(timeout=seconds)
        status = DONE if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = f"stopped after {seconds:.0f} s"
        out = ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            rest, _ = process.communicate()
            out = rest or ""
    found = [line.removeprefix(MARK) for line in out.splitlines() if line.startswith(MARK)]
    numbers = json.loads(found[-1]) if found else {}
    took = round(time.monotonic() - start, 1)
    made = dict(name=asked.name, status=status, seconds=took, numbers=numbers)
    return made if status == DONE else dict(made, says=out[-3000:])


def row(result):
    "A line of the table"
    numbers = result.get("says", "").strip().splitlines()[-1:] or [short(result["numbers"])]
    return f"{result['name']:16} {result['status']:12} {result['seconds']:6.1f} s  {numbers[0]}"


def short(numbers):
    "Example: short({'a': 1, 'b': {'c': 2}}) -> 'a 1, b (c 2)'"
    words = [
        f"{name} ({short(value)})" if isinstance(value, dict) else f"{name} {value}"
        for name, value in numbers.items()
        if name != "versions"
    ]
    return ", ".join(words)


def card_name(device):
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU; --device cpu --small tries the code of this file")
    return torch.cuda.get_device_name(device)


def main(options):
    from cmixtral_nb.stages import write_json

    names = options.only or [*FIRST, *(name for name in SCENARIOS if name not in FIRST)]
    if unknown := sorted(set(names) - set(SCENARIOS)):
        sys.exit(f"no scenario {', '.join(unknown)}; see --list")
    end = time.monotonic() + options.seconds
    report = dict(card=card_name(options.device), small=options.small, results=[])
    print(f"{report['card']}: {len(names)} scenarios in at most {options.seconds} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench_gpu-") as folder:
        for name in names:
            asked, left = SCENARIOS[name], end - time.monotonic()
            reason = lacking(asked, options.device) or ("no time left" if left < 10 else "")
            if reason:
                result = dict(name=name, status="skipped", seconds=0.0, numbers={}, says=reason)
            else:
                result = run_apart(asked, options, folder, min(asked.seconds * options.slow, left))
            report["results"].append(result)
            write_json(Path(options.out), report)
            print(row(result), flush=True)
    bad = [r["name"] for r in report["results"] if r["status"] not in (DONE, "skipped")]
    print(f"{options.out}: " + (f"not well: {', '.join(bad)}" if bad else "all well"))
    return int(bool(bad))


def one(options):
    "A scenario, in this process"
    from cmixtral_nb.machine import grow_segments

    sizes = SMALL if options.small else REAL
    device = "cpu" if options.device == "cpu" else "cuda:0"
    bench = Bench(device, sizes, Path(options.folder))
    grow_segments()  # as the command does
    try:
        numbers = SCENARIOS[options.scenario].run(bench)
    except Exception as e:
        traceback.print_exc(file=sys.stdout)
        print(f"{type(e).__name__}: {e}")
        return 1
    print(MARK + json.dumps(numbers))
    return 0


def arguments(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--list", action="store_true")
    p.add_argument("--only", nargs="+", default=[], metavar="NAME")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--small", action="store_true", help="tiny sizes: for the code, not the card")
    p.add_argument("--seconds", type=int, default=570, help="for all together (default 570)")
    p.add_argument("--slow", type=float, default=1, help="factor on the limit of each scenario")
    p.add_argument("--out", default="bench_gpu.json")
    p.add_argument("--scenario", help=argparse.SUPPRESS)
    p.add_argument("--folder", help=argparse.SUPPRESS)
    return p.parse_args(argv)


if __name__ == "__main__":
    given = arguments()
    if given.list:
        for known in SCENARIOS.values():
            print(f"{known.name:16} {known.asks}")
    elif given.scenario:
        sys.exit(one(given))
    else:
        try:
            sys.exit(main(given))
        except KeyboardInterrupt:
            sys.exit(f"interrupted; what was measured is in {given.out}")
