"A fork says, returns and sees what `python -c` does"

import os
import subprocess
import sys

import pytest
from forks import PRELOADED, python

SAME = {
    "says and ends": "import sys; print(sys.argv[1:]); print('no', file=sys.stderr); sys.exit(3)",
    "words as a status": "import sys; sys.exit('StageError: no')",
    "main": "print(__name__, globals().get('__file__'), __import__('__main__').__name__)",
    "folder and path": "import os, sys; print(os.getcwd(), sys.path)",
    "environment": "import os; print({k: v for k, v in os.environ.items() if k[:6] != 'PYTEST'})",
    "nothing to read": "import sys; print(sys.stdin.read())",
    "at the end": "import atexit; atexit.register(print, 'last'); print('first')",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "a pool that forks": "import multiprocessing as m\n"
    "with m.get_context('fork').Pool(2) as p: print(p.map(abs, [-1, 2]))",
    "a pool that spawns": "import multiprocessing as m\n"
    "with m.get_context('spawn').Pool(1) as p: print(p.map(abs, [-1, 2]))",
    "a product of matrices": "import torch\n"
    "torch.manual_seed(0)\n"
    "print((torch.randn(99, 99) @ torch.randn(99, 99)).sum().item(), torch.get_num_threads())",
    "the package is not there yet": "import sys; print('cmixtral_nb' in sys.modules)",
    "files that are open": "import os; print(len(os.listdir('/proc/self/fd')))",
}


@pytest.mark.parametrize("code", SAME.values(), ids=SAME)
def test_as_a_new_python(code, tmp_path):
    before = filter(None, [os.environ.get("PYTHONPATH")])
    plain = subprocess.run(
        [sys.executable, "-c", code, "a", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *before])},
    )
    fork = python(code, "a", 1, cwd=tmp_path, path=[tmp_path])
    assert (fork.returncode, fork.stdout, fork.stderr) == (
        plain.returncode,
        plain.stdout,
        plain.stderr,
    )


def test_an_error_is_a_traceback():
    done = python("1/0")
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_forks_know_nothing_of_each_other(tmp_path):
    "Neither modules, nor the environment, nor random numbers"
    draws = (
        "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1))"
    )
    python(f"import os, json; os.environ['LEFT'] = json.left = '1'; {draws}")
    assert python("import os, json; print('LEFT' in os.environ, hasattr(json, 'left'))").stdout == (
        "False False\n"
    )
    assert len({word for _ in range(3) for word in python(draws).stdout.split()}) >= 6


def test_the_libraries_are_there_before_the_first_line():
    loaded = python("import sys; print(*sys.modules)").stdout.split()
    assert set(PRELOADED) <= set(loaded)


def test_another_environment_starts_python_as_usual():
    code = "import os, sys; print(os.environ['NEW'], 'torch' in sys.modules)"
    assert python(code, env={"NEW": "1"}).stdout == "1 False\n"


def test_what_does_not_end_is_killed():
    with pytest.raises(subprocess.TimeoutExpired):
        python("import time; time.sleep(60)", timeout=0.5)
    assert python("print('the next one')").stdout == "the next one\n"
