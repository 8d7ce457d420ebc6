"""A dense model with real weights becomes a Mixtral: size, time, memory, logits on ten sentences

python tests/bench_upcycle.py SmolLM2-135M   # a folder with config.json, safetensors and a
                                             # tokenizer; needs the mixture's memory in float32
python tests/bench_upcycle.py noise          # a small Llama of bytes: dense and mixture go on
                                             # from the same weights, with and without noise
"""

import shutil
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from cmixtral_nb.documents import read_docs
from cmixtral_nb.machine import package_data, peak_bytes, reset_peak
from cmixtral_nb.upcycle import upcycle

SENTENCES = [
    "The river rises in the mountains and flows to the sea.",
    "To install the package, run the following command:",
    "In the beginning there was nothing but a single expert.",
    "She opened the letter, read it twice, and put it into the fire.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) +",
    "The capital of France is",
    "Water boils at a lower temperature on top of a mountain because",
    "人工智能正在改变我们的生活。",
    "3 + 4 = 7, 12 - 5 = 7, 21 / 3 =",
    "Once upon a time, in a village without a name, there lived a",
]


@torch.no_grad()
def logits(folder):
    "Logits of each sentence, in float32, and what the model writes on"
    tok = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [tok(text, return_tensors="pt").input_ids for text in SENTENCES]
    written = net.generate(ids[5], max_new_tokens=12, do_sample=False)
    return [net(input_ids=x).logits for x in ids], tok.decode(written[0])


def main(dense):
    with tempfile.TemporaryDirectory() as folder:
        mixture = Path(folder) / "mixture"
        reset_peak()
        before, start = peak_bytes(), time.time()
        stats = upcycle(dense, mixture, experts=4, top_k=2, check=False).stats
        seconds, added = time.time() - start, peak_bytes() - before
        size = sum(file.stat().st_size for file in mixture.glob("*.safetensors"))
        print(
            f"{size / 1e6:,.0f} MB written in {seconds:.1f} s, {added / 1e6:,.0f} MB more memory; "
            f"{stats['n_params'] / 1e6:,.1f}M parameters, {stats['n_active'] / 1e6:,.1f}M active"
        )
        (of_dense, says), (of_mixture, says_too) = logits(dense), logits(mixture)
        changes = [(a - b).abs().max().item() for a, b in zip(of_dense, of_mixture, strict=True)]
        largest = max(a.abs().max().item() for a in of_dense)
        print(f"logits up to {largest:.1f}; largest difference on each of ten sentences:")
        print(" ".join(f"{change:.1e}" for change in changes), f"at most {max(changes):.1e}")
        print(f"both write: {says!r}" if says == says_too else f"{says!r} and {says_too!r}")


def train(net, batch, steps, first, **balance):
    "AdamW on all parameters"
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for i in range(first, first + steps):
        x = batch(i)
        optimiser.zero_grad()
        net(input_ids=x, labels=x, **balance).loss.backward()
        optimiser.step()


def noise():
    "Held-out loss after 300 steps more, in three orders of the batches"
    set_seed(0)
    docs = islice(read_docs(package_data("data/en.jsonl.xz")), 300)
    data = torch.tensor(list(" ".join(doc["text"] for doc in docs).encode()))

    def batch(number, n=16, length=64):
        generator = torch.Generator().manual_seed(number)
        starts = torch.randint(0, len(data) - length, (n, 1), generator=generator)
        return data[starts + torch.arange(length)]

    def held_out(net):
        xs = [batch(10**6 + i, 64) for i in range(4)]
        with torch.no_grad():
            return sum(net(input_ids=x, labels=x).loss.item() for x in xs) / len(xs)

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=24)
    dense = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    train(dense, batch, 300, 0)
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(f"{folder}/dense")
        for order in range(3):
            found = []
            for share in (None, 0.0, 0.1):
                model = f"{folder}/dense"
                if share is not None:
                    model = f"{folder}/mixture"
                    shutil.rmtree(model, ignore_errors=True)
                    upcycle(f"{folder}/dense", model, seed=order, noise=share, check=False)
                net = AutoModelForCausalLM.from_pretrained(model).train()
                balance = {} if share is None else dict(output_router_logits=True)
                train(net, batch, 300, 1000 * (order + 1), **balance)
                found.append(held_out(net))
            print("order {}: dense {:.3f}, mixture {:.3f}, with noise {:.3f}".format(order, *found))


if __name__ == "__main__":
    noise() if sys.argv[1] == "noise" else main(sys.argv[1])
