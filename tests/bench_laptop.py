"""By hand: the defaults, measured in pairs on real weights; and into which weights to merge.

python tests/bench_laptop.py RUN WORK                     # everything: about two hours on one core
python tests/bench_laptop.py RUN WORK --only rows_lr neftune --seeds 0 1
python tests/bench_laptop.py RUN WORK --table             # what is there, nothing is trained

RUN is the folder of `cmixtral run laptop --out RUN`; of it `dense` (or `base`), `tokenizer` and
`corpus` are read, and `model` and `adapter`, where they are there, for the merge of a mixture.
WORK is filled: an arm that is there is not trained again, one that was killed goes on. Two such
commands with other seeds may run side by side once the folders `model-*` and `tokens-*` are there.

Each arm differs from another in one thing and is trained on the same seeds: the same LoRA, the
same order. A table says the paired difference with its 95% interval, Student's t over the seeds;
all arms are measured on the same held-out text, whose choice the interval does not cover.
An arm takes about four minutes on one core.
"""

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student

from cmixtral_nb.bits import bits_per_byte
from cmixtral_nb.init import init
from cmixtral_nb.loading import load_model
from cmixtral_nb.machine import say
from cmixtral_nb.merge import merge
from cmixtral_nb.pack import pack
from cmixtral_nb.pretrain import pretrain
from cmixtral_nb.pretraining import held_out_texts
from cmixtral_nb.routers import expert_choices, has_router, router_flips
from cmixtral_nb.sft import sft
from cmixtral_nb.stages import Artifact
from cmixtral_nb.tokenizer_files import encode_plain, load_tokenizer, start_id
from cmixtral_nb.training import read_log

LENGTH = 512  # tokens in an example
LR = 1e-3  # of LoRA in pre-training
SHARED: dict[str, Any] = dict(  # settings of every pre-training, also of bench_pieces
    rank=32, alpha=64, dropout=0.0, lr=LR, batch=1, warmup=0.06, log_every=5, device="cpu"
)


class Size(NamedTuple):
    "What decides how long an arm takes"

    steps: int = 50  # of pre-training; fine-tuning: twice as many
    eval_chars: int = 8000  # held-out characters of each language
    valid_share: float = 0.05  # of the conversations, held out
    dtype: str = "float32"  # native: 16 bits, in half the time where the processor multiplies them


class Arm(NamedTuple):
    "What differs from the settings that all arms share"

    rows: str = "mean"  # method of the new rows
    replay: int = 25  # per cent of the tokens that are English
    rows_lr: float = 1.0  # learning rate of the embedding rows, times LR


PRETRAIN = {
    "base": Arm(),
    "rows_lr 10x": Arm(rows_lr=10.0),
    "replay 0%": Arm(replay=0),
    "replay 10%": Arm(replay=10),
    "rows asymmetric": Arm(rows="asymmetric"),
    "rows normal": Arm(rows="normal"),
    "rows distill": Arm(rows="distill"),
}
SFT: dict[str, dict[str, Any]] = {
    "sft base": {},
    "neftune 5": dict(neftune=5.0),
    "bpe_dropout 0.1": dict(bpe_dropout=0.1),
    "loss on all": dict(loss_on="all"),
}
# group -> arms, each compared with the first
GROUPS = {
    "rows_lr": ["base", "rows_lr 10x"],
    "replay": ["base", "replay 0%", "replay 10%"],
    "rows": ["base", "rows asymmetric", "rows normal", "rows distill"],
    "neftune": ["sft base", "neftune 5"],
    "bpe_dropout": ["sft base", "bpe_dropout 0.1"],
    "loss": ["sft base", "loss on all"],
}
MEANT = {  # what the first arm of a group is, in its own words
    "rows_lr": "rows_lr 1x",
    "replay": "replay 25%",
    "rows": "rows mean",
    "neftune": "neftune 0",
    "bpe_dropout": "bpe_dropout 0",
    "loss": "loss on answers",
}
MERGES = ("dequantised", "original")


def mix_of(corpus: Path, tokenizer: Path, work: Path, replay: int) -> list[str]:
    "All Chinese once, and so much English that it is `replay` per cent of the tokens"
    if not replay:  # a few examples in a thousand: English is still measured, and hardly read
        return ["1:zh", "0.002:en"]
    sources = pack(
        corpus, tokenizer, out=work / "tokens-whole", mix=["1:zh", "1:en"], length=LENGTH
    ).stats["sources"]
    ratio = replay / (100 - replay) * sources["zh"]["n_tokens"] / sources["en"]["n_tokens"]
    return ["1:zh", f"{ratio:.3f}:en"]


def dense_of(run: Path) -> Path:
    "The model of a run before it became a mixture and got pieces"
    return run / "dense" if (run / "dense").is_dir() else run / "base"


def pretrained(run: Path, work: Path, name: str, seed: int, size: Size) -> Artifact:
    "The adapter of an arm, trained if it is not there"
    arm = PRETRAIN[name]
    dense = dense_of(run)
    corpus, tokenizer = run / "corpus", run / "tokenizer"
    text = {"corpus": corpus} if arm.rows == "distill" else {}  # which learns from it
    model = init(dense, tokenizer, out=work / f"model-{arm.rows}", method=arm.rows, **text)
    mix = mix_of(corpus, tokenizer, work, arm.replay)
    tokens = pack(corpus, tokenizer, out=work / f"tokens-{arm.replay}", mix=mix, length=LENGTH)
    sources = tokens.stats["sources"]
    share = sources["en"]["n_tokens"] / tokens.stats["n_tokens"]
    say("bench", f"{name}, seed {seed}: {share:.1%} of the tokens are English")
    return pretrain(
        model,
        tokens,
        out=work / "pretrain" / f"{name.replace(' ', '-')}-{seed}",
        corpus=corpus,  # the same text for each arm, English also where none is replayed
        rows="new",
        rows_lr=LR * arm.rows_lr,
        steps=size.steps,
        eval_every=max(1, size.steps // 2),
        eval_chars=size.eval_chars,
        save_every=max(1, size.steps // 2),
        seed=seed,
        dtype=size.dtype,
        **SHARED,
    )


def finetuned(run: Path, work: Path, name: str, seed: int, size: Size) -> Artifact:
    "The chat adapter of an arm; all arms start from the merged first arm of pre-training"
    adapter = pretrained(run, work, "base", 0, size)
    merged = merge(work / "model-mean", adapter, out=work / "merged")
    options = dict(neftune=0.0, bpe_dropout=0.0) | SFT[name]
    say("bench", f"{name}, seed {seed}")
    return sft(
        merged,
        out=work / "sft" / f"{name.replace(' ', '-')}-{seed}",
        template="chatml",  # whose marks SmolLM2 knows
        rank=16,
        alpha=32,
        dropout=0.0,
        lr=5e-4,
        batch=4,
        accumulation=1,
        steps=2 * size.steps,
        length=256,
        valid_share=size.valid_share,
        load_in_4bit=False,  # 4 bits would take most of the pre-training away again
        eval_every=size.steps,
        save_every=size.steps,
        log_every=5,
        seed=seed,
        dtype=size.dtype,
        device="cpu",
        **options,
    )


def measures(adapter: Artifact) -> dict[str, float]:
    "Bits per byte on the way and at the end, such as 'zh at 25'"
    found = {}
    for line in read_log(adapter.path):
        for name, bits in line.items():
            if name.startswith("bpb_"):
                found[f"{name.removeprefix('bpb_')} at {line['step']}"] = bits
    return found


def interval(differences: list[float]) -> tuple[float, float] | None:
    "95% interval of their mean; None of fewer than two"
    n = len(differences)
    if n < 2:
        return None
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    middle = statistics.mean(differences)
    return middle - half, middle + half


def line_of(name: str, before: list[float], after: list[float]) -> str:
    "A measure of two arms on the same seeds, their difference, and what may be said"
    differences = [b - a for a, b in zip(before, after, strict=True)]
    ends = interval(differences)
    if ends is None:
        said = "one seed, no interval"
    else:
        low, high = ends
        verdict = "better" if high < 0 else "worse" if low > 0 else "not shown"
        said = f"({low:+.4f} to {high:+.4f}) {verdict}"
    return (
        f"  {name:14} {statistics.mean(before):.4f} -> {statistics.mean(after):.4f}  "
        f"{statistics.mean(differences):+.4f} {said}"
    )


def print_group(group: str, found: dict[tuple[str, int], dict[str, float]]) -> None:
    "What is known of a group: each arm against the first, on the seeds that both have"
    first, *others = GROUPS[group]
    for other in others:
        seeds = sorted(seed for name, seed in found if name == other and (first, seed) in found)
        if not seeds:
            continue
        pairs = [(found[first, seed], found[other, seed]) for seed in seeds]
        print(f"{MEANT[group]} -> {other}, seeds {', '.join(map(str, seeds))}", flush=True)
        for name in pairs[0][0]:
            if all(name in each for pair in pairs for each in pair):
                before, after = ([pair[i][name] for pair in pairs] for i in (0, 1))
                if before == after and name.endswith(" at 0"):
                    continue  # nothing that differs has been used yet
                print(line_of(name, before, after), flush=True)


def windows_of(tok, texts: dict[str, list[str]]) -> list[list[int]]:
    "Ids of all texts, each in windows"
    documents = [text for some in texts.values() for text in some]
    ids = [[start_id(tok), *one] for one in encode_plain(tok, documents)]
    return [one[i : i + LENGTH] for one in ids for i in range(0, len(one), LENGTH)]


def merged_both_ways(model: Path, adapter: Path, texts: dict[str, list[str]]) -> dict[str, dict]:
    "Bits per byte and router flips of an adapter on 4 bits, and of both merges in 16 and 4 bits"
    tok = load_tokenizer(model)
    windows = windows_of(tok, texts)

    def measured(net) -> tuple[dict[str, float], dict]:
        choices = expert_choices(net, windows) if has_router(net) else {}
        bits = {
            f"bpb_{lang}": bits_per_byte(net, tok, some, LENGTH, 1)["bits_per_byte"]
            for lang, some in texts.items()
        }
        return bits, choices

    found: dict[str, dict] = {}
    net = load_model(model, adapter=adapter, load_in_4bit=True, device="cpu")
    found["4 bits + adapter"], trained = measured(net)
    del net
    for into in MERGES:
        with TemporaryDirectory(dir=adapter.parent) as place:
            merged = merge(model, adapter, out=Path(place) / "merged", into=into)
            net = load_model(merged, device="cpu")
            bits, choices = measured(net)
            net = load_model(merged, load_in_4bit=True, device="cpu")
            again, _ = measured(net)
            del net
        flips = list(router_flips(trained, choices).values())
        if flips:
            bits |= dict(flips=statistics.mean(flips), flips_most=max(flips))
        found[into] = bits
        found[f"{into}, 4 bits"] = again
    return found


def merges(run: Path, work: Path, seeds: list[int], size: Size) -> None:
    "Each adapter of the first arm, and that of the run, merged into both kinds of weights"
    pairs = [
        (work / "model-mean", Path(pretrained(run, work, "base", seed, size).path))
        for seed in seeds
    ]
    if (run / "adapter" / "manifest.json").is_file():
        pairs.append((run / "model", run / "adapter"))
    for model, adapter in pairs:
        file = work / f"merge-{adapter.parent.name}-{adapter.name}.json"
        if not file.is_file():
            tokens = work / "tokens-25"
            texts = held_out_texts(tokens, run / "corpus", size.eval_chars)
            file.write_text(json.dumps(merged_both_ways(model, adapter, texts), indent=1))


def print_merges(work: Path) -> None:
    "Both merges beside the model that was trained"
    files = sorted(work.glob("merge-*.json"))
    all_found = [json.loads(file.read_text()) for file in files]
    for file, found in zip(files, all_found, strict=True):
        print(file.stem, flush=True)
        for name, measured in found.items():
            print(f"  {name:19}", *(f"{key} {x:.5f}" for key, x in measured.items()), flush=True)
    own = [f for file, f in zip(files, all_found, strict=True) if "pretrain" in file.stem]
    if len(own) > 1:
        print(f"dequantised -> original, {len(own)} adapters of the dense model")
        for name in ("bpb_zh", "bpb_en"):
            before, after = ([found[into][name] for found in own] for into in MERGES)
            print(line_of(name, before, after), flush=True)


def there(work: Path) -> dict[tuple[str, int], dict[str, float]]:
    "(arm, seed) -> measures of all arms that are trained"
    found = {}
    for kind, names in (("pretrain", PRETRAIN), ("sft", SFT)):
        for name in names:
            for folder in sorted((work / kind).glob(f"{name.replace(' ', '-')}-[0-9]*")):
                if (folder / "manifest.json").is_file():
                    seed = int(folder.name.rpartition("-")[2])
                    found[name, seed] = measures(Artifact.load(folder, "adapter"))
    return found


def train(run: Path, work: Path, asked: list[str], seeds: list[int], size: Size) -> None:
    "All arms of some groups, one seed after another, so that a table is soon there"
    for seed in seeds:
        for group in asked:
            for name in GROUPS.get(group, []):
                make = pretrained if name in PRETRAIN else finetuned
                make(run, work, name, seed, size)
            if group in GROUPS:
                print_group(group, there(work))
    if "merge" in asked:
        merges(run, work, seeds, size)


def main() -> None:
    choices = [*GROUPS, "merge"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", choices=choices, default=choices)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for name, default in Size()._asdict().items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what is there")
    asked = parser.parse_args()
    size = Size(*(getattr(asked, name) for name in Size._fields))
    torch.set_num_threads(asked.threads)
    if not asked.table:
        asked.work.mkdir(parents=True, exist_ok=True)
        train(asked.run, asked.work, asked.only, asked.seeds, size)
    print("\nBits per byte, paired on the same seeds; in brackets 95% of the difference")
    for group in asked.only:
        if group in GROUPS:
            print_group(group, there(asked.work))
    if "merge" in asked.only:
        print_merges(asked.work)


if __name__ == "__main__":
    main()
