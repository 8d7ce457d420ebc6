"""By hand: `corpus` by one process and by tasks: speed, memory, near-duplicates.

    python tests/bench_corpus.py speed WORK [MB] [DATA]    # plain, one task, two tasks
    python tests/bench_corpus.py memory WORK [MB] [DATA]   # peak of a task at a quarter and at all
    python tests/bench_corpus.py near WORK [MB] [DATA]     # planted near-duplicates: found, false

MB is the size of the text, 1000 for the bars of the project. The text is made of the sentences of
DATA (anything `cmixtral corpus` reads; the shipped Chinese without it) in random order, so that no
two documents are alike but by plan: one in ten has a near-duplicate, with one run of characters in
about 400 changed, one in twenty an exact copy. Its rows say which is which in `source`.
"""

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from cmixtral_nb.corpus import corpus
from cmixtral_nb.documents import read_docs
from cmixtral_nb.machine import peak_bytes
from cmixtral_nb.stages import Artifact

NEAR, EXACT = 0.1, 0.05  # of the documents
TURNS = 3


def sentences(data: str) -> list[str]:
    "The sentences of some text that are long enough to differ"
    found: set[str] = set()
    for row in read_docs(data):
        cut = row["text"].replace("\n", "。").replace(". ", "。").split("。")
        found.update(s.strip() for s in cut if 15 <= len(s.strip()) <= 120)
    return sorted(found)


def changed(rng: random.Random, text: str) -> str:
    "A copy in which a few words are others"
    for _ in range(max(1, len(text) // 400)):
        at = rng.randrange(len(text))
        text = f"{text[:at]}改过了{text[at + 3 :]}"
    return text


def planted(work: Path, megabytes: float, data: str) -> Path:
    "A file of documents of random sentences, with copies at known rates"
    path = work / f"planted-{megabytes:g}.jsonl"
    if path.exists():
        return path
    pool, rng = sentences(data), random.Random(0)
    n_bytes = number = 0
    waiting: list[tuple[str, str]] = []  # copies come later in the file than their originals
    work.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".tmp"), "w", encoding="utf-8") as file:

        def write(text: str, source: str) -> int:
            line = json.dumps(dict(text=text, source=source), ensure_ascii=False) + "\n"
            file.write(line)
            return len(line.encode())

        while n_bytes < megabytes * 1e6:
            chosen = [rng.choice(pool) for _ in range(rng.randrange(12, 60))]
            lines = ["。".join(chosen[i : i + 4]) + "。" for i in range(0, len(chosen), 4)]
            text = "\n".join(lines)
            n_bytes += write(text, f"original {number}")
            draw = rng.random()
            if draw < NEAR:
                waiting.append((changed(rng, text), f"near {number}"))
            elif draw < NEAR + EXACT:
                waiting.append((text, f"exact {number}"))
            if len(waiting) > 1000 or (waiting and rng.random() < 0.1):
                n_bytes += write(*waiting.pop(rng.randrange(len(waiting))))
            number += 1
        for text, source in waiting:
            write(text, source)
    path.with_suffix(".tmp").rename(path)
    return path


def run(path: Path, out: Path, **how) -> tuple[float, Artifact]:
    "Wall seconds of the whole stage, from the file to hashed files"
    for folder in (out, out.with_name(out.name + ".parts")):
        shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        made = corpus([f"zh={path}"], out=out, valid_share=0.01, min_share=0, **how)
    return time.perf_counter() - start, made


def speed(work: Path, megabytes: float, data: str):
    path = planted(work, megabytes, data)
    size = path.stat().st_size / 1e6
    kinds: dict[str, dict] = {
        "plain": {},
        "one task": dict(engine="local", tasks=1),
        "two tasks": dict(engine="local", tasks=2),
        "one task, near": dict(engine="local", tasks=1, near=True),
        "two tasks, near": dict(engine="local", tasks=2, near=True),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    made: dict[str, str] = {}
    for _ in range(TURNS):  # they take turns, so that what else the machine does meets all
        for kind, how in kinds.items():
            seconds, artifact = run(path, work / "out", **how)
            times[kind].append(seconds)
            assert made.setdefault(kind, artifact.fingerprint) == artifact.fingerprint
    assert made["plain"] == made["one task"] == made["two tasks"]
    assert made["one task, near"] == made["two tasks, near"]
    for kind, found in times.items():
        best = min(found)
        print(f"{kind:16} {best:7.1f} s {size / best:6.1f} MB/s  of", *[f"{s:.1f}" for s in found])
    for kind in ("", ", near"):
        ratio = min(times["one task" + kind]) / min(times["two tasks" + kind])
        print(f"two tasks{kind}: {ratio:.2f} times as fast as one")


def tree(pid: int) -> list[int]:
    "A process and all that it has started"
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [pid, *[p for child in found.stdout.split() for p in tree(int(child))]]


class Peak(threading.Thread):
    "The largest resident memory of any process below this one"

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self.over = 0, threading.Event()

    def run(self):
        while not self.over.wait(0.5):
            for pid in tree(os.getpid())[1:]:
                with contextlib.suppress(OSError, IndexError, ValueError):
                    status = Path(f"/proc/{pid}/status").read_text()
                    kilobytes = int(status.split("VmHWM:")[1].split()[0])
                    self.bytes = max(self.bytes, kilobytes * 1024)


def memory(work: Path, megabytes: float, data: str):
    for size in (megabytes / 4, megabytes):
        path = planted(work, size, data)
        for near in (False, True):
            peak = Peak()
            peak.start()
            run(path, work / "out", engine="local", tasks=2, near=near)
            peak.over.set()
            peak.join()
            name = "near-duplicates too" if near else "exact copies"
            print(f"{size:7g} MB, {name:20} a task {peak.bytes / 1e6:6.0f} MB, ", end="")
            print(f"the command {peak_bytes() / 1e6:.0f} MB")


def near(work: Path, megabytes: float, data: str):
    path = planted(work, megabytes, data)
    _, made = run(path, work / "out", engine="local", tasks=2, near=True, paragraph_chars=0)
    there = {row["source"] for row in read_docs(path)}
    kept = {
        row["source"]
        for split in ("train", "valid")
        for row in read_docs(made / f"zh.{split}.jsonl")
    }
    planted_near = [name.split()[1] for name in there if name.startswith("near")]
    found = [n for n in planted_near if len({f"near {n}", f"original {n}"} & kept) == 1]
    alone = {name for name in there if name.startswith("original")}
    alone -= {f"original {n}" for n in planted_near}
    false = alone - kept
    dropped = made.stats["zh"]["dropped"]
    print(f"{len(there):,} documents; dropped: {dropped}")
    print(f"near-duplicates found {len(found)} of {len(planted_near)}", end="")
    print(f" ({len(found) / len(planted_near):.2%}); lost with both {lost(planted_near, kept)}")
    print(f"others dropped {len(false)} of {len(alone):,} ({len(false) / len(alone):.3%})")


def lost(numbers: list[str], kept: set[str]) -> int:
    "Pairs of which nothing is left"
    return sum(not {f"near {n}", f"original {n}"} & kept for n in numbers)


if __name__ == "__main__":
    what, work, *rest = sys.argv[1:]
    size = float(rest[0]) if rest else 1000
    source = rest[1] if len(rest) > 1 else "builtin:zh"
    dict(speed=speed, memory=memory, near=near)[what](Path(work), size, source)
