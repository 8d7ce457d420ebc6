"""A dense model with real weights becomes a Mixtral: size, time, memory, logits on ten sentences

python tests/bench_upcycle.py SmolLM2-135M   # a folder with config.json, safetensors and a
                                             # tokenizer; needs the mixture's memory in float32
python tests/bench_upcycle.py chain SmolLM2-135M OUT [PYTHON]  # the mixture trains in 4 bits, is
                                             # merged, and is served: by transformers alone, and
                                             # by the vLLM of PYTHON
python tests/bench_upcycle.py noise          # a small Llama of bytes: dense and mixture go on
                                             # from the same weights, with and without noise
"""

import math
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

from cmixtral_nb.adapters import save_adapter
from cmixtral_nb.documents import read_docs
from cmixtral_nb.engines import export
from cmixtral_nb.loading import load_model
from cmixtral_nb.machine import package_data, peak_bytes, reset_peak
from cmixtral_nb.merge import merge
from cmixtral_nb.qlora import add_lora, expert_bytes
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


def texts_of(tok, n=8, length=64):
    "Ids of English paragraphs, as many of each"
    docs = read_docs(package_data("data/en.jsonl.xz"))
    found = (tok(doc["text"]).input_ids for doc in docs)
    return torch.tensor([ids[:length] for ids in islice((x for x in found if len(x) > length), n)])


def taught(net, ids, n_passes=3):
    "AdamW on LoRA, two paragraphs at a time; the mean loss of each pass, and seconds a step"
    trained = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=3e-4)
    net.train()
    means, start = [], time.time()
    for _ in range(n_passes):
        losses = []
        for x in ids.split(2):
            optimiser.zero_grad()
            loss = net(input_ids=x, labels=x).loss
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
    return means, (time.time() - start) / (n_passes * len(ids.split(2)))


def chain(dense, out, python=None):
    "An upcycled model trains, merges, serves"
    out = Path(out)
    mixture = upcycle(dense, out=out / "mixture").path
    net = load_model(mixture, load_in_4bit=True, dtype="float32", trainable=True, device="cpu")
    print(f"experts: {expert_bytes(net)['bytes_per_param']:.4f} bytes a weight")
    net = add_lora(net, rank=8, alpha=16, dropout=0, rows="none")
    tok = AutoTokenizer.from_pretrained(mixture)
    means, seconds = taught(net, texts_of(tok))
    told = ", ".join(f"{mean:.3f}" for mean in means)
    print(f"loss of three passes over eight paragraphs: {told}; {seconds:.1f} s a step")
    pairs = {
        name: p for name, p in net.named_parameters() if ".experts." in name and "lora_B" in name
    }
    moved = sum(bool(p.abs().max() > 0) for p in pairs.values())
    print(f"LoRA has moved on {moved} of {len(pairs)} matrices of experts")
    save_adapter(net, out / "adapter")
    merged = merge(
        mixture, out / "adapter", out=out / "merged", into="dequantised", device="cpu"
    ).path
    ids = [tok(text, return_tensors="pt").input_ids for text in SENTENCES]
    plain = load_model(merged, dtype="float32", device="cpu")
    with torch.no_grad():
        changes = [
            (net.eval()(input_ids=x).logits - plain(input_ids=x).logits).abs().max() for x in ids
        ]
    print(f"merged and 4 bits with LoRA: logits differ by at most {max(changes):.1e}")
    for to, its_python in (("hf", None), ("vllm", python)):
        if to == "hf" or python:
            print(export(merged, out=out / to, to=to, python=its_python, check="answers").stats)


def as_bytes(texts):
    "The tokens of a model of bytes"
    return torch.tensor(list(" ".join(texts).encode()))


def noise():
    "Held-out bits per byte after 300 steps more, in three orders of the batches"
    set_seed(0)
    texts = [doc["text"] for doc in islice(read_docs(package_data("data/en.jsonl.xz")), 300)]
    for_judging = as_bytes(texts[::10])  # nothing is trained on these documents
    for_training = as_bytes(text for i, text in enumerate(texts) if i % 10)

    def batch(number, n=16, length=64, data=for_training):
        generator = torch.Generator().manual_seed(number)
        starts = torch.randint(0, len(data) - length, (n, 1), generator=generator)
        return data[starts + torch.arange(length)]

    def held_out(net):
        xs = [batch(i, 64, data=for_judging) for i in range(4)]
        with torch.no_grad():
            nats = sum(net(input_ids=x, labels=x).loss.item() for x in xs) / len(xs)
        return nats / math.log(2)

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=24)
    dense = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    train(dense, batch, 800, 0)
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
            dense_bits, exact, noisy = found
            print(
                f"order {order}: dense {dense_bits:.3f}, mixture {exact:.3f}, "
                f"with noise {noisy:.3f} bits per byte"
            )


if __name__ == "__main__":
    if sys.argv[1] == "noise":
        noise()
    elif sys.argv[1] == "chain":
        chain(*sys.argv[2:])
    else:
        main(sys.argv[1])
