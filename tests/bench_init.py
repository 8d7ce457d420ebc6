"""By hand: memory and time of new rows. TOKENIZER has 57,000 pieces, such as bench_vocab.py makes.

python tests/bench_init.py rows TOKENIZER WORK           # the real size: 32,000 -> 57,000 rows of 4,096 bfloat16 numbers, embedding and head, each method
python tests/bench_init.py grow TOKENIZER WORK [1 2 4 8]  # synthetic Mixtrals of so many GB
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from bench_merge import LAYERS, make, measure
from safetensors.torch import save_file

from cmixtral_nb.init import METHODS
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.stages import write_json
from cmixtral_nb.tokenizer_files import write_tokenizer

INIT = """
import sys
from cmixtral_nb.init import init
init(*sys.argv[1:3], out=sys.argv[3], method=sys.argv[4])
"""


def rows(tokenizer, work):
    model = Path(work) / "rows"
    write_tokenizer(base_tokenizer_model(), model)
    for i, name in enumerate(("model.embed_tokens.weight", "lm_head.weight"), 1):
        save_file(
            {name: torch.randn(32000, 4096).bfloat16()},
            model / f"model-{i:05d}-of-00002.safetensors",
            metadata={"format": "pt"},
        )
    write_json(
        model / "model.safetensors.index.json",
        dict(
            metadata=dict(total_size=2 * 32000 * 4096 * 2),
            weight_map={
                "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
                "lm_head.weight": "model-00002-of-00002.safetensors",
            },
        ),
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
            f"{n / 1e9:.2f} GB: {seconds:.1f} s, peak {peak / 1e6:,.0f} MB; {linked} of {len(shards)} shards linked",
            flush=True,
        )
        shutil.rmtree(here)


if __name__ == "__main__":
    what = dict(rows=rows, grow=grow).get(sys.argv[1]) if len(sys.argv) > 3 else None
    what(*sys.argv[2:]) if what else sys.exit(__doc__)
