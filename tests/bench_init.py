"""By hand: memory and time of new rows. TOKENIZER has 57,000 pieces, such as bench_vocab.py makes.

python tests/bench_init.py rows TOKENIZER WORK            # the real size, each method
python tests/bench_init.py grow TOKENIZER WORK [1 2 4 8]  # synthetic Mixtrals of so many GB
python tests/bench_init.py distill TOKENIZER WORK MODEL CORPUS LANG STEPS [OTHER.jsonl ...]

distill: bits per byte at birth of mean rows and taught ones beside the model before its extension,
on held-out text of the corpus and on other text, and the seconds that each took.

The real size: embedding and head of bfloat16 numbers, from 32,000 to 57,000 rows of 4,096.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_merge import LAYERS, make, measure
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cmixtral_nb.bits import bits_per_byte
from cmixtral_nb.checkpoints import INDEX
from cmixtral_nb.corpora import corpus_langs, corpus_texts
from cmixtral_nb.documents import read_docs
from cmixtral_nb.init import METHODS, init
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.stages import write_json
from cmixtral_nb.tokenizer_files import load_tokenizer, write_tokenizer

INIT = """
import sys
from cmixtral_nb.init import init
init(*sys.argv[1:3], out=sys.argv[3], method=sys.argv[4])
"""


def rows(tokenizer, work):
    model = Path(work) / "rows"
    write_tokenizer(base_tokenizer_model(), model)
    shards = {
        "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    for name, shard in shards.items():
        save_file(
            {name: torch.randn(32000, 4096).bfloat16()}, model / shard, metadata={"format": "pt"}
        )
    write_json(
        model / INDEX, {"metadata": {"total_size": 2 * 32000 * 4096 * 2}, "weight_map": shards}
    )
    write_json(
        model / "config.json",
        dict(
            model_type="mixtral",
            architectures=["MixtralForCausalLM"],
            vocab_size=32000,
            hidden_size=4096,
        ),
    )
    for method in METHODS:
        seconds, peak = measure(INIT, model, tokenizer, Path(work) / f"rows-{method}", method)
        print(f"{method:10} {seconds:5.1f} s, peak {peak / 1e6:,.0f} MB", flush=True)


def grow(tokenizer, work, *sizes):
    seconds, peak = measure("import cmixtral_nb.init, torch, safetensors, transformers")
    print(f"an empty process that imports torch: {seconds:.1f} s, {peak / 1e6:,.0f} MB")
    for size in map(int, sizes or LAYERS):
        here = Path(work) / f"{size}gb"
        model, _ = make(here, LAYERS[size])
        write_tokenizer(base_tokenizer_model(), model)
        n = sum(f.stat().st_size for f in model.glob("*.safetensors"))
        os.sync()
        seconds, peak = measure(INIT, model, tokenizer, here / "out", "mean")
        shards = list((here / "out").glob("*.safetensors"))
        linked = sum(os.path.samefile(f, model / f.name) for f in shards)
        print(
            f"{n / 1e9:.2f} GB: {seconds:.1f} s, peak {peak / 1e6:,.0f} MB; "
            f"{linked} of {len(shards)} shards linked",
            flush=True,
        )
        shutil.rmtree(here)


N_DOCS, N_CHARS = 24, 80  # documents of each text, and how much of each


def beginnings(texts):
    "The beginnings of documents that are spread over a text"
    long = [text for text in texts if len(text) >= N_CHARS]
    return [text[:N_CHARS] for text in long[:: max(1, len(long) // N_DOCS)]][:N_DOCS]


def bits(folder, texts):
    "Bits per byte of each text, and the tokens of all of them"
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    tok = load_tokenizer(folder)
    found = {name: bits_per_byte(net, tok, documents) for name, documents in texts.items()}
    return {name: f["bits_per_byte"] for name, f in found.items()}


def distill(tokenizer, work, model, corpus, lang, steps, *others):
    texts = {lang: beginnings(corpus_texts(corpus, lang, "valid"))}
    for other in others:
        rows = [row["text"] for row in read_docs(other)]
        texts[Path(other).name.split(".")[0]] = beginnings(rows)
    for kept in corpus_langs(corpus):
        if kept != lang:
            texts[kept] = beginnings(corpus_texts(corpus, kept, "valid"))
    base = bits(model, texts)
    print("before    ", {name: round(b, 3) for name, b in base.items()}, flush=True)
    gaps = {}
    for method in ("mean", "distill"):
        start, used = time.time(), time.process_time()
        made = init(
            model,
            tokenizer,
            out=Path(work) / method,
            method=method,
            corpus=corpus if method == "distill" else None,
            steps=int(steps),
            force=True,
        )
        seconds, cpu = time.time() - start, time.process_time() - used
        found = bits(made.path, texts)
        gaps[method] = {name: b - base[name] for name, b in found.items()}
        print(
            f"{method:10}",
            {name: round(b, 3) for name, b in found.items()},
            f"{seconds:,.0f} s, {cpu:,.0f} s of processors",
            made.stats.get("distill", ""),
            flush=True,
        )
    left = {name: round(gap / gaps["mean"][name], 2) for name, gap in gaps["distill"].items()}
    print("share of mean's gap that is left:", left)


if __name__ == "__main__":
    commands: dict[str, Any] = {"rows": rows, "grow": grow, "distill": distill}
    if len(sys.argv) < 4 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
