"""By hand: what many small experts cost, in processor time of one thread.

python tests/bench_experts.py load       # loading and LoRA of 18,432 matrices (48 layers of 128
                                         # experts, as Qwen3-30B has them, at width 64)
python tests/bench_experts.py step       # one layer, forward and backward with LoRA: experts one by
                                         # one, and packed with more and more weights at once
python tests/bench_experts.py few        # one layer, forward only, from one token to 512
python tests/bench_experts.py step cpu bfloat16  # the same in bfloat16, under autocast
python tests/bench_experts.py step cuda bfloat16 # on a GPU, by the clock
"""

import sys
import tempfile
import time
from functools import partial
from typing import Any

SHAPES = [  # experts, width, inner
    (8, 512, 1536),
    (16, 512, 512),
    (64, 64, 64),
    (64, 512, 256),
    (128, 256, 128),
    (128, 512, 192),
    (32, 2048, 768),
]
AT_ONCE = [1, 2**20, 2**22, 2**24, 2**40]  # weights; 1: one matrix, 2**40: all


def mixture_config(n_layers: int, n_experts: int, width: int, inner: int):
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=96,
        hidden_size=width,
        moe_intermediate_size=inner,
        num_experts=n_experts,
        num_experts_per_tok=min(8, n_experts // 4),
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def with_lora(folder: str, dtype: str, device: str, rank: int = 16):
    from cmixtral_nb.loading import load_model
    from cmixtral_nb.qlora import add_lora

    model = load_model(folder, load_in_4bit=True, dtype=dtype, device=device, trainable=True)
    return add_lora(model, rank, 2 * rank, 0.0, "none").train()


def saved(folder: str, *sizes: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = mixture_config(*sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def load(n_layers: int = 48, n_experts: int = 128) -> None:
    import torch

    from cmixtral_nb.loading import load_model
    from cmixtral_nb.qlora import add_lora

    torch.set_num_threads(1)
    n_matrices = n_layers * n_experts * 3
    with tempfile.TemporaryDirectory() as folder:
        saved(folder, n_layers, n_experts, 64, 64)
        start = time.process_time()
        model = load_model(folder, load_in_4bit=True, dtype="bfloat16", trainable=True)
        loaded = time.process_time()
        add_lora(model, 16, 32, 0.0, "none")
        added = time.process_time()
    for what, seconds in {
        "loading": loaded - start,
        "LoRA": added - loaded,
        "both": added - start,
    }.items():
        ms = 1000 * seconds / n_matrices
        print(f"{what:8} {n_matrices:,} matrices {seconds:6.1f} s of processor, {ms:.2f} ms each")


class Ways:
    "One layer of experts, computed one by one and packed"

    def __init__(
        self, n_experts: int, width: int, inner: int, n_tokens: int, device: str, dtype: str
    ):
        import torch

        from cmixtral_nb import packed_experts
        from cmixtral_nb.experts import single_experts, single_experts_class

        packed_experts.FEWEST = packed_experts.IN_A_GROUP = 1
        packed_experts.AT_ONCE[device] = 2**40
        self.device, self.limits = device, packed_experts.AT_ONCE
        with tempfile.TemporaryDirectory() as folder:
            saved(folder, 1, n_experts, width, inner)
            model = with_lora(folder, dtype, device)
        (self.mixture,) = single_experts(model).values()
        if dtype == "bfloat16":  # what the model does before each step
            with torch.autocast(device, torch.bfloat16):
                model(input_ids=torch.tensor([[1, 2, 3]], device=device))
        self.one_by_one = partial(single_experts_class().forward, self.mixture)
        self.kind = getattr(torch, dtype)
        self.x = torch.randn(n_tokens, width, dtype=self.kind, device=device).requires_grad_()
        scores = torch.randn(n_tokens, n_experts, device=device).softmax(-1)
        self.weight, self.chosen = scores.topk(min(8, n_experts // 4))

    def step(self, forward) -> None:
        import torch

        in_16_bits = self.kind == torch.bfloat16
        with torch.autocast(self.device, torch.bfloat16, enabled=in_16_bits):
            y = forward(self.x, self.chosen, self.weight)
        y.float().square().sum().backward()

    def forward(self, forward) -> None:
        import torch

        in_16_bits = self.kind == torch.bfloat16
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=in_16_bits):
            forward(self.x, self.chosen, self.weight)

    def milliseconds(self, run, forward) -> float:
        import torch

        now = time.process_time
        if self.device == "cuda":
            torch.cuda.synchronize()
            now = time.perf_counter
        start = now()
        run(forward)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (now() - start)

    def compare(self, run, limits: list[int], turns: int = 5) -> dict[str, float]:
        "The least of some turns for each way, in turn; the first turn does not count"
        best: dict[str, float] = {}
        for turn in range(turns + 1):
            for limit in [0, *limits]:
                self.limits[self.device] = limit or 1
                name = f"2^{limit.bit_length() - 1}" if limit else "single"
                ms = self.milliseconds(run, self.mixture if limit else self.one_by_one)
                if turn:
                    best[name] = min(ms, best.get(name, ms))
        return best


def show(sizes: tuple, ways: Ways, found: dict[str, float]) -> None:
    n_experts, width, inner = sizes
    n_tokens, k = ways.chosen.shape
    times = "  ".join(f"{name} {ms:.1f}" for name, ms in found.items())
    print(
        f"{n_experts} experts of {width} x {inner}, {n_tokens} tokens, "
        f"{n_tokens * k / n_experts:.2f} rows an expert: {times} ms",
        flush=True,
    )


def table(what: str, device: str = "cpu", dtype: str = "float32") -> None:
    import torch

    torch.set_num_threads(1)
    for sizes in SHAPES:
        step_tokens = (64, 1024 if sizes[1] < 1000 else 512)  # the widest takes long enough
        for n_tokens in step_tokens if what == "step" else (1, 4, 16, 64, 512):
            ways: Any = Ways(*sizes, n_tokens, device, dtype)
            limits = AT_ONCE if what == "step" else [2**22]
            run = ways.step if what == "step" else ways.forward
            if what == "few":
                ways.mixture.eval()
                from cmixtral_nb import packed_experts

                packed_experts.pays = lambda layout, n_rows: True
            show(sizes, ways, ways.compare(run, limits))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["load"]:
            load()
        case ["load", layers]:
            load(int(layers))
        case ["step" | "few" as what, *where]:
            table(what, *where)
        case _:
            sys.exit(__doc__)
