"""`python -c CODE` in a fraction of the time: each is a fork of one process that has imported
the large libraries, and never the package itself.

    done = python("import torch; print(torch.__version__)", cwd=folder)
    done.returncode, done.stdout, done.stderr  # as of subprocess.run

It is a process of its own, with its own folder, arguments, search path and `__main__`, and it
ends as Python ends: what was registered for the end is called, and the status is Python's. Only
the objects are not taken apart one by one; of all those libraries that takes half a second, and
there are thousands of forks. What a library reads from the environment while it is imported was
read before, so a call with variables of its own (`env`), or on a GPU, starts Python as usual.
"""

import atexit
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

PRELOADED = [
    "accelerate",
    "bitsandbytes",
    "datasets",
    "execnb.shell",
    "matplotlib.pyplot",
    "peft",
    "sentencepiece",
    "transformers.integrations.mistral.tokenizer",  # which imports mistral_common
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.trainer",
]
# a process with threads cannot be forked safely: pyarrow's memory would be swept by one
ONE_THREAD = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


class ForkServer:
    "The process that imports once; one request at a time"

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            env={**os.environ, **ONE_THREAD},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # a buffer might hold an answer that select does not see
        )

    def answer(self, timeout: float | None) -> int | None:
        "The next number that the server writes, or None if there is none in time"
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            return None
        line = self.process.stdout.readline()
        assert line, "the server of forks has ended"
        return int(line)

    def run(self, request: dict, timeout: float | None) -> int:
        "Exit status of a fork, as subprocess gives it"
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        pid = self.answer(None)
        status = self.answer(timeout)
        if pid is not None and status is None:
            os.kill(pid, 9)
            self.answer(None)
            raise subprocess.TimeoutExpired(request["argv"], timeout or 0)
        assert status is not None
        return status


_server: list[ForkServer] = []  # of this worker, from its first call on


def _fork(request: dict, timeout: float | None) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        status = _server[0].run({**request, "out": str(out), "err": str(err)}, timeout)
        said = [file.read_text(encoding="utf-8", errors="replace") for file in (out, err)]
    return subprocess.CompletedProcess(request["argv"], status, *said)


def python(
    code: str,
    *argv: Any,
    cwd: Path | str | None = None,
    path: list[Path] | None = None,
    env: dict[str, str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    "What `python -c CODE ARGV...` does; `path` is its PYTHONPATH"
    words, folder = ["-c", *map(str, argv)], str(cwd or Path.cwd())
    environment = {**os.environ, **(env or {})}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    if env or environment.get("CMIXTRAL_TEST_GPU") == "1":
        return subprocess.run(
            [sys.executable, "-c", code, *words[1:]],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            timeout=timeout,
            env=environment,
        )
    if not _server:
        _server.append(ForkServer())
    return _fork(dict(code=code, argv=words, cwd=folder, environment=environment), timeout)


# ---- the server


def _become(request: dict) -> None:
    "In the fork: folder, streams, arguments, search path and `__main__` of a new Python"
    streams = [
        os.open(os.devnull, os.O_RDONLY),
        os.open(request["out"], os.O_WRONLY | os.O_CREAT),
        os.open(request["err"], os.O_WRONLY | os.O_CREAT),
    ]
    for wanted, stream in enumerate(streams):
        os.dup2(stream, wanted)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    found_first = os.environ.get("PYTHONPATH", "")
    sys.path[:0] = ["", *filter(None, found_first.split(os.pathsep))]
    sys.argv[:] = request["argv"]
    sys.modules["__main__"] = ModuleType("__main__")
    import numpy
    import torch

    numpy.random.seed()  # else all forks would draw what their server would have drawn;
    torch.seed()  # `random` does the same by itself


def serve() -> dict:
    "Fork for each request; returns in the forks alone"
    gc.collect()
    gc.freeze()  # or each fork looks at every object of the libraries again when it ends
    n_threads = len(os.listdir("/proc/self/task"))
    assert n_threads == 1, f"{n_threads} threads: a fork would have half of a process"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else is an answer
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            answers.close()
            return json.loads(line)
        print(pid, file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    os._exit(0)


def _run(code: str) -> int:
    "Exit status of a program, negative where a signal ended it"
    try:
        exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return (e.code or 0) & 0xFF
        print(e.code, file=sys.stderr)
        return 1
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        return -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
    return 0


def _end(status: int) -> None:
    "Wait for threads, call what waits for the end, write what is buffered, and end"
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as e:
        print(f"Exception ignored on flushing sys.stdout: {e}", file=sys.stderr)
        status = 120
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    for name in PRELOADED:
        __import__(name)
    asked = serve()
    _become(asked)
    _end(_run(asked["code"]))
