"""By hand: what the commands before training write, and what stays of it.

    python tests/bench_disk.py WORK DATA [TASKS]

DATA is Chinese text that `cmixtral corpus` reads. `corpus`, `tokenizer` and `pack` run on it with
tasks of the local engine (two of them without TASKS), and fifty times a second the size of WORK is
looked at. A line for each command: the most that lay on the disk beside what stays, and what
stays, as bytes for each byte of text.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cmixtral_nb.corpus import corpus
from cmixtral_nb.pack import pack
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.stages import Artifact
from cmixtral_nb.tokenizer import tokenizer
from cmixtral_nb.tokenizer_files import write_tokenizer


def size_of(folder: Path) -> int:
    "Bytes of all files in a folder; what is deleted meanwhile counts as nothing"
    n_bytes = 0
    for parent, _, names in os.walk(folder):  # unlike rglob it passes over what vanishes
        for name in names:
            with contextlib.suppress(OSError):
                n_bytes += os.path.getsize(os.path.join(parent, name))
    return n_bytes


def watch(folder: Path) -> None:
    "Print the size of a folder fifty times a second, until somebody ends this process"
    while True:
        print(size_of(folder), flush=True)
        time.sleep(0.02)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    "Sizes of a folder while something else runs; complete afterwards"
    sizes = [size_of(folder)]
    # a process of its own: a thread would wait while NumPy writes
    command = [sys.executable, __file__, "watch", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        try:
            yield sizes
        finally:
            watcher.terminate()
            assert watcher.stdout
            sizes += [int(line) for line in watcher.stdout if line.endswith("\n")]
            sizes.append(size_of(folder))


def main(args: list[str]) -> None:
    match args:
        case ["watch", folder]:
            watch(Path(folder))
        case [work, data, *rest] if len(rest) < 2:
            measure(Path(work).resolve(), data, int(rest[0]) if rest else 2)
        case _:
            sys.exit(__doc__)


def measure(work: Path, data: str, tasks: int) -> None:
    "Run the commands in a new folder, and print a line for each"
    work.mkdir(parents=True)
    engine: dict = dict(engine="local", tasks=tasks)
    write_tokenizer(base_tokenizer_model("mixtral"), work / "base")
    text, pieces, tokens = work / "corpus", work / "pieces", work / "tokens"
    commands: dict[str, Callable[[], Artifact]] = {
        "corpus": lambda: corpus([f"zh={data}"], text, **engine),
        "tokenizer": lambda: tokenizer(text, pieces, n_pieces=20_000, **engine),
        "pack": lambda: pack(text, work / "base", tokens, mix=["1:zh"], **engine),
    }
    for name, command in commands.items():
        with watched(work) as sizes:
            command()
        n_bytes = Artifact.load(text).stats["zh"]["n_bytes"]
        stays = sizes[-1] - sizes[0]
        temporary = max(sizes) - sizes[-1]
        print(f"{name}: {temporary / n_bytes:.2f} beside {stays / n_bytes:.2f} that stay")


if __name__ == "__main__":
    main(sys.argv[1:])
