"""By hand: memory and time of new rows. TOKENIZER has 57,000 pieces, such as bench_vocab.py makes.

python tests/bench_init.py rows TOKENIZER WORK            # the real size, each method
python tests/bench_init.py grow TOKENIZER WORK [1 2 4 8]  # synthetic Mixtrals of so many GB

The real size: embedding and head of bfloat16 numbers, from 32,000 to 57,000 rows of 4,096.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from bench_merge import LAYERS, make, measure
from safetensors.torch import save_file

from cmixtral_nb.checkpoints import INDEX
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


if __name__ == "__main__":
    commands = {"rows": rows, "grow": grow}
    if len(sys.argv) < 4 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
