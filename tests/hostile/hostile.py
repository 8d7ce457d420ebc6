"""What a hostile input is, and the runner that every case goes through.

To add a case, add it to `CASES` of one of the files `cases_*.py` here, or begin another such file:

    def truncated(here, run):
        "A model whose weights end too early"
        model = linked(run / "base", here / "bad")
        cut(model / "model.safetensors", n_bytes=100)

    CASES = [
        Case(
            "a model that ends too early",
            "init --model bad --tokenizer RUN/tokenizer --out o",
            make=truncated,
            says="model.safetensors",
        ),
    ]

`here` is an empty folder, and the folder in which the command runs; `run` (in a command: RUN) is
the finished run of the micro recipe, which no case may change: `linked` makes a copy that costs
nothing, and the helpers below write into it safely. The command is expected to be refused: exit
status 2, and nothing but lines of `StageError:`, which contain `says`. Whatever was there before
must be there after, byte by byte; there may be no new file, in `here` or beside it, but what
`leaves` names.

Forms that are many make many cases: a list comprehension over commands or values is fine.
Try yours with: pytest -n 0 tests/hostile -k "words of its name"
"""

import contextlib
import hashlib
import io
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

CPU_SECONDS = 20  # of all threads: an idle machine and a busy one judge alike
WALL_SECONDS = 90  # for a command that waits
PEAK_BYTES = 2 * 10**9  # above what the process had before
LINE_CHARS = 1000  # of one line of an error


@dataclass(frozen=True)
class Case:
    "A hostile input, a command that meets it, and what it has to say"

    name: str
    command: str | list[str]  # without `cmixtral`; RUN stands for the folder of the micro run
    make: Callable[[Path, Path], Any] | None = None  # (here, run): writes the input into `here`
    says: str | tuple[str, ...] = ()  # texts that the refusal must contain
    may_succeed: bool = False  # exit status 0 is as good
    leaves: tuple[str, ...] = ()  # new files and folders that may stay, relative to `here`
    changes: tuple[str, ...] = ()  # what was there and may change: a run that goes on, say
    apart: bool = False  # in a process of its own: for what may hang, blow up or kill Python
    stdin: str = ""
    env: dict[str, str] = field(default_factory=dict)  # set for this case
    check: Callable[[Path, Path], Any] | None = None  # (here, run): what else must hold after it


@dataclass(frozen=True)
class Outcome:
    "What a command did"

    status: int
    out: str
    err: str
    cpu_seconds: float
    peak_bytes: int


# ---- helpers for `make`


def linked(source: Path, target: Path) -> Path:
    "A copy of a folder whose files are hard links; files of less than 64 KB are copied"

    def link_or_copy(a, b):
        if os.path.getsize(a) < 65536:
            shutil.copy(a, b)
        else:
            os.link(a, b)
        return b

    shutil.copytree(source, target, copy_function=link_or_copy)
    return target


def write(path: Path, content: str | bytes) -> Path:
    "A new file, with its folders; a link to a file of the run is cut first"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    path.write_bytes(content)
    return path


def write_json(path: Path, value: Any) -> Path:
    return write(path, json.dumps(value, ensure_ascii=True))


def changed_json(path: Path, **values: Any) -> Path:
    "Some keys of a JSON file have other values; `...` takes one away"
    found = {**json.loads(path.read_text()), **values}
    return write_json(path, {key: value for key, value in found.items() if value is not ...})


def cut(path: Path, n_bytes: int) -> Path:
    "Only the first bytes of a file are left"
    return write(path, path.read_bytes()[:n_bytes])


def sparse(path: Path, n_bytes: int, head: bytes = b"") -> Path:
    "A file of any size that takes no space; reading all of it would"
    write(path, head)
    os.truncate(path, n_bytes)
    return path


def code(here: Path) -> str:
    "Python that leaves a trace if anybody runs it"
    return f"import pathlib\npathlib.Path({str(here.parent / 'code was run')!r}).touch()\n"


# ---- the runner


def _file_mark(path: Path) -> tuple:
    "What a file is: large ones by size and time alone"
    status = path.lstat()
    if path.is_symlink():
        return ("link", os.readlink(path))
    if not path.is_file():
        return ("folder" if path.is_dir() else "special", status.st_mode)
    if status.st_size > 2**24:
        return ("file", status.st_size, status.st_mtime_ns)
    return ("file", status.st_size, hashlib.sha256(path.read_bytes()).digest())


def snapshot(folder: Path) -> dict[str, tuple]:
    "Every path below a folder, links not followed"
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            found[str(path.relative_to(folder))] = _file_mark(path)
    return found


def stamps(folder: Path) -> dict[str, tuple]:
    "A quick snapshot of the run that all cases share"
    return {
        str(path): (status.st_size, status.st_mtime_ns, status.st_mode, status.st_ino)
        for path in folder.rglob("*")
        for status in [path.lstat()]
    }


class Hang(BaseException):
    "Not an Exception: no command may catch it"


@contextlib.contextmanager
def _limits(more_bytes: int) -> Iterator[None]:
    "A command that waits or takes all memory ends here, and not the machine"

    def stop(*_):
        raise Hang(f"no end after {WALL_SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, hard))
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(WALL_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run_here(argv: list[str], case: Case, here: Path) -> Outcome:
    "The command in this process"
    from cmixtral_nb.commands import main
    from cmixtral_nb.machine import peak_bytes, reset_peak

    out, err = io.StringIO(), io.StringIO()
    reset_peak()
    memory, start = peak_bytes(), time.process_time()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(here))
        stack.enter_context(patch.dict(os.environ, case.env))
        stack.enter_context(patch.object(sys, "stdin", io.StringIO(case.stdin)))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(_limits(more_bytes=2 * PEAK_BYTES))
        try:
            status = main(argv)
        except SystemExit as e:  # argparse, after --help
            status = e.code if isinstance(e.code, int) else 1
    seconds = time.process_time() - start
    return Outcome(status, out.getvalue(), err.getvalue(), seconds, peak_bytes() - memory)


ALONE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (24 * 10**9,) * 2)
from cmixtral_nb.commands import main
sys.exit(main())
"""


def run_apart(argv: list[str], case: Case, here: Path) -> Outcome:
    "The command in a process of its own"
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", ALONE, *argv],  # -P: no modules from `here`
            cwd=here,
            env={**os.environ, **case.env},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
        )
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(case.stdin.encode())
            process.stdin.close()
        status, usage = _wait(process)
        process.returncode = status
        out.seek(0)
        err.seek(0)
        said = [file.read().decode(errors="replace") for file in (out, err)]
    seconds = usage.ru_utime + usage.ru_stime
    return Outcome(status, said[0], said[1], seconds, usage.ru_maxrss * 1024)


def _wait(process: subprocess.Popen) -> tuple[int, resource.struct_rusage]:
    "Exit status and what the process used; it is ended where it does not end itself"
    end = time.monotonic() + WALL_SECONDS
    while time.monotonic() < end:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), usage
        time.sleep(0.02)
    process.kill()
    _, _, usage = os.wait4(process.pid, 0)
    raise Hang(f"no end after {WALL_SECONDS} s, {usage.ru_maxrss / 1e6:.1f} GB")


def arguments(command: str | list[str], run: Path) -> list[str]:
    "The words of a command line, with the folder of the micro run in them"
    words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    return [word.replace("RUN", str(run)) for word in words]


def text_faults(case: Case, outcome: Outcome) -> list[str]:
    "What is wrong with the exit status and with what was said"
    lines = outcome.err.splitlines()
    if outcome.status == 0 and case.may_succeed:
        return ["a traceback"] if "Traceback" in outcome.err else []
    faults = []
    if outcome.status != 2:
        faults.append(f"exit status {outcome.status}, expected 2")
    if not lines:
        faults.append("nothing was said")
    faults += [f"no line of an error: {line}" for line in lines if line[:12] != "StageError: "]
    faults += [f"{len(line):,} characters in a line" for line in lines if len(line) > LINE_CHARS]
    wanted = [case.says] if isinstance(case.says, str) else case.says
    faults += [f"{text!r} was not said" for text in wanted if text not in outcome.err]
    return faults


def file_faults(case: Case, before: dict, after: dict, refused: bool) -> list[str]:
    "What vanished, changed or is new"

    def is_below(path: str, names: tuple[str, ...]) -> bool:
        return any(path == f"here/{name}" or path.startswith(f"here/{name}/") for name in names)

    lost = [f"{path} is gone" for path in before if path not in after]
    other = [
        f"{path} has changed" for path in before if after.get(path, before[path]) != before[path]
    ]
    changed = [
        fault for fault in lost + other if not is_below(fault.rsplit(" ", 2)[0], case.changes)
    ]
    may_be_new = case.leaves if refused else (*case.leaves, "o")
    new = [path for path in after if path not in before and not is_below(path, may_be_new)]
    new = [path for path in new if not is_below(path, case.changes)]
    return changed + [f"{path} is new" for path in new]


def limit_faults(outcome: Outcome) -> list[str]:
    "What took too long or too much"
    faults = []
    if outcome.cpu_seconds > CPU_SECONDS:
        faults.append(f"{outcome.cpu_seconds:.0f} s, expected at most {CPU_SECONDS}")
    if outcome.peak_bytes > PEAK_BYTES:
        faults.append(f"{outcome.peak_bytes / 1e9:.1f} GB, expected at most {PEAK_BYTES / 1e9:.0f}")
    return faults


def check(case: Case, root: Path, run: Path) -> None:
    "Run a case in `root/here`; an assertion with all that is wrong"
    here = root / "here"
    here.mkdir()
    write(root / "neighbour", "not yours")
    if case.make:
        case.make(here, run)
    before, of_run = snapshot(root), stamps(run)
    outcome = (run_apart if case.apart else run_here)(arguments(case.command, run), case, here)
    faults = text_faults(case, outcome) + limit_faults(outcome)
    faults += file_faults(case, before, snapshot(root), refused=outcome.status != 0)
    if stamps(run) != of_run:
        faults.append("the micro run has changed")
    assert not faults, "\n".join([*faults, f"--- said:\n{outcome.err[-3000:]}"])
    if case.check:
        case.check(here, run)
