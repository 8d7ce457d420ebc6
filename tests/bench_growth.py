"""By hand: what counting, merging, learning and packing take as the text grows.

    python tests/bench_growth.py WORK [DATA] [MB ...]

DATA is anything that `cmixtral corpus` reads; without it the shipped Chinese is repeated, whose
different runs stop growing after 7 MB. Each step runs in a process of its own, one task at a time.
A line for each size: what there is to count, processor seconds and peak memory of each step, bytes
on disk. `python tests/bench_growth.py exponents FILE` fits powers to lines that were kept.
"""

import json
import math
import multiprocessing as mp
import random
import resource
import shutil
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from cmixtral_nb.byte_pieces import counting_of, thinning_of
from cmixtral_nb.counted import count_task, counted_source, merge_task
from cmixtral_nb.documents import read_docs
from cmixtral_nb.lexicons import mix_runs
from cmixtral_nb.pack import pack
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.tokenizer import char_counts, frequent_chars, learn_pieces, split_runs
from cmixtral_nb.tokenizer_files import write_tokenizer

HOW: dict = dict(lang="zh", script="Han", base="mixtral")
SIZES = (12, 25, 50, 100)  # MB
TASKS = 4


def corpus_of(folder: Path, data: str, n_bytes: float) -> Path:
    "A corpus of documents in random order, repeated where there are too few"
    folder.mkdir(parents=True)
    texts = [row["text"] for row in read_docs(data)]
    random.Random(0).shuffle(texts)
    with open(folder / "zh.train.jsonl", "w", encoding="utf-8") as file:
        for text in cycle(texts):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            n_bytes -= len(text.encode())
            if n_bytes <= 0:
                break
    (folder / "zh.valid.jsonl").write_text('{"text": "留出的文本"}\n')
    return folder


def count(corpus: Path, parts: Path, task: int) -> None:
    count_task(counting_of(corpus, **HOW), parts, task, TASKS)


def merge(corpus: Path, parts: Path, bucket: int) -> None:
    limit, salts = thinning_of(24_000_000)
    merge_task(counting_of(corpus, **HOW), parts, bucket, TASKS, limit, salts)


def learn(parts: Path, out: Path) -> None:
    out.mkdir()
    runs = mix_runs([counted_source(parts, "zh")], 24_000_000)
    runs = split_runs(runs, frequent_chars(char_counts(runs), 4000))
    learn_pieces(runs, out / "spm.model", 20_000)


def pack_all(corpus: Path, folder: Path, out: Path) -> None:
    pack(corpus, folder, out, mix=["1:zh"])


def _child(step: Callable, args: tuple, queue) -> None:
    step(*args)
    used = resource.getrusage(resource.RUSAGE_SELF)
    queue.put((used.ru_utime + used.ru_stime, used.ru_maxrss * 1024))


def measured(step: Callable, *args) -> tuple[float, int]:
    "Processor seconds and peak bytes of a step in a process of its own, imports included"
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_child, args=(step, args, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def all_tasks(step: Callable, *args) -> tuple[float, int]:
    "Processor seconds of all tasks of a step, peak bytes of the largest"
    found = [measured(step, *args, task) for task in range(TASKS)]
    return sum(seconds for seconds, _ in found), max(peak for _, peak in found)


def size_of(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


def one(work: Path, data: str, megabytes: int) -> dict:
    "All steps on a text of this size"
    shutil.rmtree(work / "now", ignore_errors=True)
    corpus = corpus_of(work / "now/corpus", data, megabytes * 1e6)
    parts = work / "now/parts"
    row: dict = dict(mb=megabytes)
    row["count_s"], row["count_peak"] = all_tasks(count, corpus, parts)
    row["part_bytes"] = size_of(parts, "*.runs")
    row["merge_s"], row["merge_peak"] = all_tasks(merge, corpus, parts)
    row["merged_bytes"] = size_of(parts, "*bucket*.runs")
    runs = counted_source(parts, "zh")
    row["chars"], row["different_chars"] = runs.n_chars, sum((runs.sizes or {}).values())
    row["learn_s"], row["learn_peak"] = measured(learn, parts, work / "now/pieces")
    folder = work / "tokenizer"
    if not folder.exists():
        write_tokenizer(base_tokenizer_model("mixtral"), folder)
    row["pack_s"], row["pack_peak"] = measured(pack_all, corpus, folder, work / "now/tokens")
    row["token_bytes"] = size_of(work / "now/tokens/train", "*.arrow")
    shutil.rmtree(work / "now")
    return row


def exponents(file: Path) -> None:
    "The powers of the text's size with which each column grows, from the first to the last line"
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]
    first, last = rows[0], rows[-1]
    for name in first:
        power = math.log(last[name] / first[name]) / math.log(last["mb"] / first["mb"])
        print(f"{name:16} {power:5.2f}   {last[name] / last['mb']:14,.4g} for each MB at the end")


def main(args: list[str]) -> None:
    match args:
        case ["exponents", file]:
            exponents(Path(file))
        case [folder, *rest]:
            sizes = [int(word) for word in rest if word.isdecimal()] or SIZES
            data = next((word for word in rest if not word.isdecimal()), "builtin:zh")
            for megabytes in sizes:
                print(json.dumps(one(Path(folder).resolve(), data, megabytes)), flush=True)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
