"""By hand: packing against the bare tokenizer and the seed's two maps, and its memory.

    python tests/bench_pack.py speed WORK [DATA] [MB]    # pack against encode_batch, side by side
    python tests/bench_pack.py seed WORK [DATA] [DOCS]   # pack against the seed's method (minutes)
    python tests/bench_pack.py memory WORK [DATA]        # peak at 50, 100, 200 and 400 MB of text

DATA is anything that `cmixtral corpus` reads; without it the shipped Chinese is repeated.
WORK is a folder for the files. The runs that are compared take turns, so that what else the
machine does meets both; the ratios are medians over the turns.
"""

import io
import json
import multiprocessing as mp
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import cycle
from pathlib import Path

from cmixtral_nb.documents import read_docs
from cmixtral_nb.machine import peak_bytes, reset_peak
from cmixtral_nb.pack import load_examples, pack
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.tokenizer_files import load_tokenizer, write_tokenizer

TURNS = 3


def text(work: Path, data: str, n_bytes: float, docs: int = 10**9) -> Path:
    """A corpus of `n_bytes` of text, in random order, repeated where there are too few documents.

    Without control tokens, which the seed takes for real."""
    name = work / f"corpus-{n_bytes / 1e6:g}-{docs}"
    if not (name / "zh.valid.jsonl").exists():
        name.mkdir(parents=True, exist_ok=True)
        have = [
            r["text"]
            for r in read_docs(data)
            if not any(c in r["text"] for c in ("<s>", "</s>", "<unk>"))
        ]
        random.Random(0).shuffle(have)
        with open(name / "zh.train.jsonl", "w", encoding="utf-8") as f:
            for i, t in enumerate(cycle(have)):
                if n_bytes <= 0 or i == docs:
                    break
                f.write(json.dumps({"text": t}, ensure_ascii=False) + "\n")
                n_bytes -= len(t.encode())
        (name / "zh.valid.jsonl").write_text('{"text": "held out"}\n')
    return name


def tokenizer(work: Path) -> Path:
    if not (work / "tokenizer").exists():
        write_tokenizer(base_tokenizer_model("mixtral"), work / "tokenizer")
    return work / "tokenizer"


def _raw(corpus, folder, part, n_parts, barrier, queue):
    if n_parts > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [
        json.loads(line)["text"]
        for line in (corpus / "zh.train.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[part::n_parts]
    ]
    barrier.wait()
    start, cpu = time.perf_counter(), time.process_time()
    for i in range(0, len(texts), 500):
        tok.encode_batch(texts[i : i + 500], add_special_tokens=False)
    queue.put((time.perf_counter() - start, time.process_time() - cpu))


def raw(corpus, folder, workers):
    "Wall and processor seconds of `encode_batch` alone: texts in memory, results thrown away"
    ctx = mp.get_context("spawn")
    barrier, queue = ctx.Barrier(workers), ctx.Queue()
    jobs = [
        ctx.Process(target=_raw, args=(corpus, folder, k, workers, barrier, queue))
        for k in range(workers)
    ]
    for j in jobs:
        j.start()
    found = [queue.get() for _ in jobs]
    for j in jobs:
        j.join()
    return max(f[0] for f in found), sum(f[1] for f in found)


def _cpu():
    return sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def ours(corpus, folder, out, workers, mix="1:zh"):
    "Wall and processor seconds of the whole stage, from files to hashed files"
    shutil.rmtree(out, ignore_errors=True)
    start, cpu = time.perf_counter(), _cpu()
    with redirect_stdout(io.StringIO()):
        a = pack(corpus, folder, out, mix=[mix], workers=workers)
    return time.perf_counter() - start, _cpu() - cpu, a


def speed(work, data, megabytes=60):
    corpus, folder = text(work, data, megabytes * 1e6), tokenizer(work)
    ours(text(work, data, 1e5), folder, work / "warm", 1)  # imports
    for workers in (1, 2):
        ratios = []
        for turn in range(TURNS):
            if turn % 2 == 0:
                theirs = raw(corpus, folder, workers)
            wall, cpu, a = ours(corpus, folder, work / "out", workers)
            if turn % 2 == 1:
                theirs = raw(corpus, folder, workers)
            ratios.append((theirs[0] / wall, theirs[1] / cpu))
            print(
                f"  {workers} processes, turn {turn + 1}: "
                f"encode_batch {theirs[0]:.1f} s ({theirs[1]:.1f} s of processor), "
                f"pack {wall:.1f} s ({cpu:.1f} s), {a.stats['n_tokens'] / wall:,.0f} tokens/s",
                flush=True,
            )
        wall_ratio = statistics.median(wall for wall, _ in ratios)
        cpu_ratio = statistics.median(cpu for _, cpu in ratios)
        print(
            f"{workers} processes, {megabytes} MB: throughput of pack divided by that of "
            f"encode_batch {wall_ratio:.0%}; by processor time {cpu_ratio:.0%}",
            flush=True,
        )


def seed_maps(path, tok, length, cache, out, n_proc):
    "The seed's data/preprocess_datasets.py: one map that encodes, one that joins by sum(lists, [])"
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()

    def group(examples):
        joined: dict[str, list] = {k: sum(examples[k], []) for k in examples}
        total = len(joined["input_ids"]) // length * length
        result = {
            k: [t[i : i + length] for i in range(0, total, length)] for k, t in joined.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    raw_rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    encoded = raw_rows.map(
        lambda e: tok(e["text"]),
        batched=True,
        batch_size=3000,
        num_proc=n_proc,
        remove_columns=raw_rows.column_names,
    )
    encoded.map(group, batched=True, num_proc=n_proc).save_to_disk(str(out))
    return encoded


def seed(work, data, docs=4000):
    import numpy as np

    corpus, folder = text(work, data, 1e12, docs), tokenizer(work)
    tok, ratios = load_tokenizer(folder), []
    for turn in range(2):
        shutil.rmtree(work / "cache", ignore_errors=True)
        start = time.perf_counter()
        theirs = seed_maps(corpus / "zh.train.jsonl", tok, 2048, work / "cache", work / "seed", 2)
        seconds = time.perf_counter() - start
        mine, _, a = ours(corpus, folder, work / "out", 2)
        flat = np.concatenate(load_examples(a).with_format("numpy")[:]["input_ids"])
        want = np.concatenate([np.array(x) for x in theirs["input_ids"]])
        got = flat[flat != a.stats["eos"]]
        equal = np.array_equal(got, want[: len(got)]) and len(want) - len(got) < 2048
        ratios.append(seconds / mine)
        print(
            f"  turn {turn + 1}: the seed {seconds:.1f} s, pack {mine:.1f} s, "
            f"{'equal' if equal else 'DIFFERENT'} tokens ({len(want):,}, without EOS)",
            flush=True,
        )
    print(
        f"{docs} documents: pack is {statistics.median(ratios):.0f} times as fast "
        "as the seed's two maps",
        flush=True,
    )


def peak(corpus, folder, out):
    """Print peak bytes of this process and of its largest worker, and the tokens packed.

    Half of the text is repeated."""
    reset_peak()
    a = ours(Path(corpus), Path(folder), Path(out), 2, "1.5:zh")[2]
    print(
        json.dumps(
            [
                peak_bytes(),
                resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
                a.stats["n_tokens"],
            ]
        )
    )


def memory(work, data):
    folder = tokenizer(work)
    for megabytes in (50, 100, 200, 400):
        corpus = text(work, data, megabytes * 1e6)
        run = [sys.executable, __file__, "peak", str(corpus), str(folder), str(work / "out")]
        here, worker, n = json.loads(
            subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[
                -1
            ]
        )
        print(
            f"{megabytes} MB of text, {n:,} tokens: peak {here / 1e6:,.0f} MB, "
            f"and {worker / 1e6:,.0f} MB in the larger of two workers",
            flush=True,
        )
        shutil.rmtree(corpus)


COMMANDS: dict[str, Callable] = {"speed": speed, "seed": seed, "memory": memory}


def main(args):
    match args:
        case ["peak", *rest]:  # what `memory` runs in a process of its own
            sys.exit(peak(*rest))
        case [what, folder, *rest] if what in COMMANDS:
            data, *numbers = rest or ["builtin:zh"]
            work = Path(folder).resolve()
            work.mkdir(parents=True, exist_ok=True)
            COMMANDS[what](work, data, *map(int, numbers))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
