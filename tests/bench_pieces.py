"""By hand: how many pieces pay at which budget, on real weights.

python tests/bench_pieces.py RUN WORK                       # an hour for each seed on one core
python tests/bench_pieces.py RUN WORK --pieces 0 1000 --seeds 0 --steps 40
python tests/bench_pieces.py RUN WORK --table               # what is there, nothing is trained

RUN is the folder of `cmixtral run laptop --out RUN`; of it `dense`, `pieces` and `corpus` are read.
WORK is filled: an arm that is there is not trained again, one that was killed goes on.

An arm is the dense model with some number of new pieces, 0 being the model as it was. The text is
packed once, with the largest vocabulary, and spelled byte for byte for the others. So a step is the
same text for every arm, in the same order; with fewer pieces it has more tokens and takes longer.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from bench_laptop import LENGTH, SHARED, dense_of

from cmixtral_nb.breakeven import fit_pair, in_words, read_arm
from cmixtral_nb.control import control
from cmixtral_nb.init import init
from cmixtral_nb.pack import pack
from cmixtral_nb.pretrain import pretrain
from cmixtral_nb.stages import Artifact
from cmixtral_nb.vocab import vocab

POINTS = 8  # evaluations along a training


class Asked(NamedTuple):
    "One call of this file"

    run: Path
    work: Path
    pieces: list[int]  # ascending
    steps: int
    eval_chars: int
    dtype: str


def tokenizer_of(asked: Asked, n_pieces: int) -> Path:
    "The base's tokenizer with some pieces more; 0: as it was"
    if not n_pieces:
        return dense_of(asked.run)
    found = vocab(
        asked.run / "pieces",
        base=str(dense_of(asked.run)),
        n_pieces=n_pieces,
        out=asked.work / f"tokenizer-{n_pieces}",
    )
    return Path(found.path)


def model_of(asked: Asked, n_pieces: int) -> Path:
    "The dense model with rows for them"
    if not n_pieces:
        return dense_of(asked.run)
    tokenizer = tokenizer_of(asked, n_pieces)
    found = init(
        dense_of(asked.run), tokenizer, out=asked.work / f"model-{n_pieces}", method="mean"
    )
    return Path(found.path)


def tokens_of(asked: Asked, n_pieces: int) -> Artifact:
    "The same text for each vocabulary, example by example"
    most = max(asked.pieces)
    tokenizer = tokenizer_of(asked, most)
    packed = pack(
        asked.run / "corpus",
        tokenizer,
        out=asked.work / f"tokens-{most}",
        mix=["1:zh", "0.25:en"],
        length=LENGTH,  # in the largest vocabulary
    )
    if n_pieces == most:
        return packed
    model = model_of(asked, n_pieces)
    return control(packed, tokenizer, model, out=asked.work / f"tokens-{n_pieces}-of-{most}")


def adapter_of(asked: Asked, n_pieces: int, seed: int) -> Path:
    "Where the training of an arm lies"
    return asked.work / f"arm-{n_pieces}-of-{max(asked.pieces)}-{seed}"


def train(asked: Asked, n_pieces: int, seed: int) -> None:
    "One arm"
    pretrain(
        model_of(asked, n_pieces),
        tokens_of(asked, n_pieces),
        out=adapter_of(asked, n_pieces, seed),
        corpus=asked.run / "corpus",
        rows="new" if n_pieces else "none",
        rows_lr=2e-3,
        steps=asked.steps,
        eval_every=max(1, asked.steps // POINTS),
        eval_chars=asked.eval_chars,
        save_every=max(1, asked.steps // 2),
        seed=seed,
        dtype=asked.dtype,
        **SHARED,
    )


def seeds_there(asked: Asked, n_pieces: int) -> list[int]:
    "Seeds whose training of an arm is complete"
    found = asked.work.glob(adapter_of(asked, n_pieces, 0).name[:-1] + "*/manifest.json")
    return sorted(int(file.parent.name.rpartition("-")[2]) for file in found)


def told(asked: Asked, n_pieces: int, lang: str) -> Iterator[str]:
    "Bits per byte at the beginning, half-way and at the end, and how far the seeds are apart"
    arms = [
        read_arm(adapter_of(asked, n_pieces, seed), lang) for seed in seeds_there(asked, n_pieces)
    ]
    for place in (0, len(arms[0].bits) // 2, -1):
        bits = [float(arm.bits[place]) for arm in arms]
        spread = f" ± {statistics.stdev(bits):.3f}" if len(bits) > 1 else ""
        yield f"{statistics.mean(bits):.3f}{spread}"


def print_table(asked: Asked) -> None:
    "Each arm at three amounts of text, and where it crosses the one without pieces"
    for lang in ("zh", "en"):
        for n_pieces in asked.pieces:
            seeds = seeds_there(asked, n_pieces)
            if not seeds:
                continue
            read = read_arm(adapter_of(asked, n_pieces, seeds[0]), lang).read
            places = ", ".join(f"{read[i] / 1e6:.2f}" for i in (0, len(read) // 2, -1))
            bits = ", ".join(told(asked, n_pieces, lang))
            print(f"{lang} {n_pieces:6,} pieces, after {places} MB: {bits}", flush=True)
    for n_pieces in asked.pieces:
        for seed in seeds_there(asked, n_pieces):
            if n_pieces and seed in seeds_there(asked, 0):
                extended, plain = (adapter_of(asked, k, seed) for k in (n_pieces, 0))
                pair = fit_pair(extended, plain, lang="zh")
                words = in_words(pair.crossing(), pair.budget)
                print(f"{n_pieces:,} pieces, seed {seed}: {words}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--pieces", nargs="+", type=int, default=[0, 500, 2000, 4000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--eval-chars", type=int, default=8000)
    parser.add_argument("--dtype", choices=["float32", "native"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what is there")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    pieces = sorted(given.pieces)
    asked = Asked(given.run, given.work, pieces, given.steps, given.eval_chars, given.dtype)
    for seed in [] if given.table else given.seeds:
        for n_pieces in pieces:
            train(asked, n_pieces, seed)
    print_table(asked)


if __name__ == "__main__":
    main()
