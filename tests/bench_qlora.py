"""By hand: what 4-bit experts save when a checkpoint of 2 GB is loaded, and what a training step
costs beside stock transformers and peft.

python tests/bench_qlora.py load DIR   # peak memory of loading, bytes of each expert parameter;
                                       # stock load_in_4bit beside it
python tests/bench_qlora.py step       # milliseconds per step, in turn: stock fused experts in
                                       # bfloat16, ours in bfloat16, ours in 4 bits, and ours as
                                       # peft would compute it, without casting once and adding
                                       # LoRA at once; at 1,024 and at 2,048 tokens a step
python tests/bench_qlora.py cpu MODEL TOKENS  # processor seconds of a step of one example, in turn:
                                       # in float32, in bfloat16, and in bfloat16 with each expert's
                                       # tokens as many as they are; MODEL and TOKENS are folders
                                       # `model` and `tokens` of a run, say of `laptop`
"""

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path


def load_alone(how: str, folder: str) -> None:
    "In a process of its own: peak memory before and after loading, bytes of an expert parameter"
    import torch
    from transformers import BitsAndBytesConfig, MixtralForCausalLM

    from cmixtral_nb.loading import load_model
    from cmixtral_nb.machine import peak_bytes, reset_peak
    from cmixtral_nb.qlora import expert_bytes

    reset_peak()
    before = peak_bytes()
    if how == "ours":
        net = load_model(folder, load_in_4bit=True, dtype="bfloat16", device="cpu")
    else:
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        net = MixtralForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=nf4
        )
    print(before, peak_bytes(), expert_bytes(net)["bytes_per_param"])


def load(folder):
    from bench_merge import LAYERS, make

    here = Path(folder) / "load"
    model, _ = make(here, LAYERS[2])
    n = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    for how in ("ours", "stock"):
        p = subprocess.run(
            [sys.executable, __file__, "load-alone", how, str(model)],
            capture_output=True,
            text=True,
        )
        assert not p.returncode, p.stderr[-2000:]
        before, peak, bytes_per = map(float, p.stdout.split())
        print(
            f"{how:5} load_in_4bit of {n / 1e9:.2f} GB: peak {peak / 1e6:,.0f} MB, "
            f"{peak / n:.2f} of the checkpoint, {before / 1e6:,.0f} MB of it the libraries; "
            f"experts {bytes_per:.3f} bytes per parameter",
            flush=True,
        )
    shutil.rmtree(here)


def models():
    "Stock Mixtral with LoRA on its fused experts, and ours, from the same checkpoint"
    import tempfile

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    from cmixtral_nb.loading import load_model
    from cmixtral_nb.qlora import add_lora

    tmp = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    MixtralForCausalLM(
        MixtralConfig(
            vocab_size=2000,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            num_local_experts=8,
        )
    ).bfloat16().save_pretrained(tmp)
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["gate_up_proj", "down_proj"],
    )
    stock = get_peft_model(MixtralForCausalLM.from_pretrained(tmp, dtype=torch.bfloat16), lora)

    def ours(bits):
        net = load_model(
            tmp, load_in_4bit=bits == 4, dtype="bfloat16", device="cpu", trainable=True
        )
        return add_lora(net, 16, 32, 0.0, "none")

    nets = {
        "stock, fused experts, bfloat16": stock,
        "ours, bfloat16": ours(16),
        "ours, 4 bits": ours(4),
        "ours, bfloat16, as peft does it": as_peft_does(ours(16)),
        "ours, 4 bits, as peft does it": as_peft_does(ours(4)),
    }
    shutil.rmtree(tmp)
    return nets


def as_peft_does(net):
    "Take the hooks off that cast once and add LoRA at once"
    from cmixtral_nb.qlora import _cast_output

    hooks = [net.get_base_model()._forward_pre_hooks]
    hooks += [module._forward_hooks for module in net.modules()]
    for held in hooks:
        for key, hook in list(held.items()):
            own = getattr(hook, "__qualname__", "") == "ready_to_train.<locals>.choose"
            if own or hook is _cast_output:
                del held[key]
    return net


def step(batch, length=256, turns=7):
    from unittest.mock import patch

    import torch

    from cmixtral_nb.experts import cast_once

    nets = models()
    found: dict = {}
    x = torch.randint(0, 2000, (batch, length), generator=torch.Generator().manual_seed(0))
    opts = {
        k: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4)
        for k, m in nets.items()
    }
    for turn in range(
        turns + 1
    ):  # in turn, so that a busy moment hits all; the first does not count
        for name, net in nets.items():
            net.train()
            cast = (lambda x: x) if name.endswith("as peft does it") else cast_once
            start = time.perf_counter()
            with (
                torch.autocast("cpu", torch.bfloat16),  # as the Trainer does it
                patch("cmixtral_nb.experts.cast_once", cast),
            ):
                net(input_ids=x, labels=x).loss.backward()
            opts[name].step()
            opts[name].zero_grad()
            if turn:
                found.setdefault(name, []).append(time.perf_counter() - start)
    median = {k: statistics.median(v) for k, v in found.items()}

    def ratio(a, b):
        return statistics.median(x / y for x, y in zip(found[a], found[b], strict=True))

    stock = next(iter(median))
    for k, v in median.items():
        print(
            f"{k:32}{1000 * v:8.0f} ms per step of {batch} x {length} tokens, "
            f"{ratio(k, stock):.2f} times stock"
        )


def with_lora(folder: Path, dtype: str):
    "A model of a run, ready to train as the recipe `laptop` does"
    from cmixtral_nb.loading import load_model
    from cmixtral_nb.pretraining import old_rows
    from cmixtral_nb.qlora import add_lora

    net = load_model(folder, load_in_4bit=True, dtype=dtype, device="cpu", trainable=True)
    return add_lora(net, 32, 64, 0.0, "new", old_rows(folder)).train()


def cpu(folder: Path, tokens: Path, turns: int = 6) -> None:
    from unittest.mock import patch

    import torch

    from cmixtral_nb.experts import in_even_parts
    from cmixtral_nb.pack import load_examples
    from cmixtral_nb.routers import as_in_training

    torch.set_num_threads(1)
    nets = {dtype: with_lora(folder, dtype) for dtype in ("float32", "bfloat16")}
    ways = {
        "float32": (nets["float32"], in_even_parts),
        "bfloat16": (nets["bfloat16"], in_even_parts),
        "bfloat16, as many as they are": (nets["bfloat16"], lambda expert, part: expert(part)),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    examples = load_examples(tokens)
    for turn in range(turns + 2):  # the first two of each do not count
        x = torch.tensor([examples[turn]["input_ids"]])
        for name, (net, parts) in ways.items():
            start = time.process_time()
            with as_in_training(net), patch("cmixtral_nb.experts.in_even_parts", parts):
                net(input_ids=x, labels=x, use_cache=False).loss.backward()
            net.zero_grad()
            if turn > 1:
                found[name].append(time.process_time() - start)
    for name, seconds in found.items():
        share = statistics.median(a / b for a, b in zip(seconds, found["float32"], strict=True))
        print(f"{name:32}{statistics.median(seconds):6.2f} s a step, {share:.2f} of float32")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["load", where]:
            load(where)
        case ["load-alone", how, model]:
            load_alone(how, model)
        case ["step"]:
            for batch in 4, 8:
                step(batch)
        case ["cpu", model, tokens]:
            cpu(Path(model), Path(tokens))
        case _:
            sys.exit(__doc__)
