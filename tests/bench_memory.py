"""By hand: peak memory and time of a bfloat16 training step with and without logits, side by side,
and what the plan says. A narrow Mixtral with 57,000 embedding rows, 2 x 2,048 tokens of packed
documents, with autocast, checkpointing and blocks of logits as on a GPU, but on the CPU.

python tests/bench_memory.py peak      # peak of a step with all logits and without, and the plan
python tests/bench_memory.py plan      # peaks against the plan: rows, bits, checkpointing, dropout
python tests/bench_memory.py time      # milliseconds per step, in turn
"""

import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cmixtral_nb import bits
from cmixtral_nb.loading import load_model
from cmixtral_nb.mixtral import small_config
from cmixtral_nb.plan import memory_plan
from cmixtral_nb.qlora import add_lora

V, N_OLD = 57_000, 32_000
NARROW = dict(hidden=256, layers=4, experts=8, intermediate=512, heads=4, kv_heads=2)
BATCH, LENGTH, RANK = 2, 2048, 16


def narrow(folder: str) -> None:
    "A narrow Mixtral of random weights in bfloat16"
    from transformers import MixtralForCausalLM

    torch.manual_seed(0)
    config = small_config(**NARROW, vocab_size=V)
    MixtralForCausalLM(config).bfloat16().save_pretrained(folder)


def trainable(folder: str, rows: str = "all", four: bool = True, dropout: float = 0.0):
    "With LoRA, as `pretrain` has it on a GPU"
    how: dict[str, Any] = dict(load_in_4bit=four, dtype="bfloat16", device="cpu", trainable=True)
    return add_lora(load_model(folder, **how), RANK, 2 * RANK, dropout, rows, N_OLD).train()


def checkpoint(net, on: bool = True) -> None:
    "Keep the inputs of layers only, as the Trainer does"
    if on:
        net.gradient_checkpointing_enable({"use_reentrant": False})
        net.enable_input_require_grads()
    else:
        net.gradient_checkpointing_disable()


def step(net, ids) -> float:
    "One batch, forward and backward"
    half = ids.shape[1] // 2
    places = torch.arange(half).repeat(2).expand(len(ids), -1)  # two documents in each example
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(input_ids=ids, labels=ids, position_ids=places, use_cache=False).loss
    loss.backward()
    return loss.item()


def bytes_added(net, ids) -> int:
    "The most that a step holds beyond what was there before it, in bytes, as the allocator counts"
    step(net, ids[:1, :64])  # from now on the weights have gradients
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step(net, ids)
    held = most = 0
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def planned_bytes(rows: str = "all", four: bool = True, dropout: float = 0.0, on: bool = True):
    "What the plan says of the same"
    plan = memory_plan(
        small_config(**NARROW, vocab_size=V),
        rank=RANK,
        rows=rows,
        n_old=N_OLD,
        load_in_4bit=four,
        batch=BATCH,
        length=LENGTH,
        dropout=dropout,
        checkpointing=on,
        attn="sdpa",
    )
    return plan["bytes"]["peak"]


def tokens(seed: int = 0):
    return torch.randint(0, V, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def peak(folder: str) -> None:
    net, few, found = trainable(folder), bits.FEW_LOGITS, []
    checkpoint(net)
    for name, bound in (("all logits", 2**62), ("without logits", few)):
        bits.FEW_LOGITS = bound
        found.append(bytes_added(net, tokens()))
        print(f"{name:16}{found[-1] / 1e6:8,.0f} MB at the peak of a step", flush=True)
    print(f"without / with {found[1] / found[0]:.3f}; planned {planned_bytes() / 1e6:,.0f} MB")


def plan(folder: str) -> None:
    for rows, four, dropout, on in (
        ("all", True, 0.0, True),
        ("all", True, 0.05, True),
        ("new", True, 0.05, True),
        ("none", True, 0.05, True),
        ("all", False, 0.05, True),
        ("all", True, 0.05, False),
        ("none", True, 0.0, False),
    ):
        net = trainable(folder, rows, four, dropout)
        checkpoint(net, on)
        measured, planned = bytes_added(net, tokens()), planned_bytes(rows, four, dropout, on)
        print(
            f"rows {rows:4} {'4' if four else '16':>2} bits, dropout {dropout:.2f}, checkpointing "
            f"{on!s:5}: measured {measured / 1e6:7,.1f} MB, planned {planned / 1e6:7,.1f} MB, "
            f"planned / measured {planned / measured:.3f}",
            flush=True,
        )


def times(folder: str, turns: int = 5) -> None:
    few, net = bits.FEW_LOGITS, trainable(folder)
    checkpoint(net)
    found: dict[str, list[float]] = {"all logits": [], "without logits": []}
    for turn in range(turns + 1):  # in turn, so that a busy moment hits both; the first is warm-up
        for name, bound in (("all logits", 2**62), ("without logits", few)):
            bits.FEW_LOGITS = bound
            start = time.perf_counter()
            step(net, tokens(turn))
            net.zero_grad()
            if turn:
                found[name].append(time.perf_counter() - start)
    for name, seconds in found.items():
        print(f"{name:16}{1000 * statistics.median(seconds):8,.0f} ms per step")
    pairs = zip(found["without logits"], found["all logits"], strict=True)
    print(f"without / with {statistics.median(a / b for a, b in pairs):.3f}")


if __name__ == "__main__":
    chosen = {"peak": peak, "plan": plan, "time": times}.get("".join(sys.argv[1:]))
    if chosen is None:
        sys.exit(__doc__)
    bits.BLOCKS["cpu"] = bits.BLOCKS["cuda"]
    with tempfile.TemporaryDirectory() as folder:
        narrow(folder)
        chosen(folder)
