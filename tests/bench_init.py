"""By hand: new rows at the real size, 32,000 -> 57,000 rows of 4,096 numbers in bfloat16, in embedding and head.

    python tests/bench_init.py TOKENIZER WORK     # a tokenizer of 57,000 pieces, such as bench_vocab.py makes
"""
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from cmixtral_nb.artifact import write_json
from cmixtral_nb.init import METHODS, init
from cmixtral_nb.tokenizer import base_tokenizer_model
from cmixtral_nb.vocab import write_tokenizer


def main(tokenizer, work):
    model = Path(work) / "rows"
    write_tokenizer(base_tokenizer_model(), model)
    for i, name in enumerate(("model.embed_tokens.weight", "lm_head.weight"), 1):
        save_file({name: torch.randn(32000, 4096).bfloat16()}, model / f"model-{i:05d}-of-00002.safetensors", metadata={"format": "pt"})
    write_json(model / "model.safetensors.index.json", dict(metadata=dict(total_size=2 * 32000 * 4096 * 2), weight_map={
        "model.embed_tokens.weight": "model-00001-of-00002.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"}))
    write_json(model / "config.json", dict(model_type="mixtral", architectures=["MixtralForCausalLM"], vocab_size=32000, hidden_size=4096))
    import multiprocessing as mp
    for method in METHODS:
        job = mp.get_context("spawn").Process(target=one, args=(method, model, Path(tokenizer), Path(work) / f"rows-{method}"))
        job.start()
        job.join()


def one(method, model, tokenizer, out):
    start = time.time()
    init(model, tokenizer, out=out, method=method, force=True)
    print(f"{method:10} {time.time() - start:5.1f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
