"Hostile files and odd calls: one line each, exit status 2, nothing lost, no code run (hostile.py)."

from importlib import import_module
from pathlib import Path

import hostile
import pytest

MODULES = sorted(file.stem for file in Path(__file__).parent.glob("cases_*.py"))
CASES = [(module, case) for module in MODULES for case in import_module(module).CASES]
NAMES = [f"{module.removeprefix('cases_')}: {case.name}" for module, case in CASES]


def test_each_case_has_a_name_of_its_own():
    assert len(set(NAMES)) == len(NAMES), sorted({n for n in NAMES if NAMES.count(n) > 1})


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=NAMES)
def test_hostile(case, tmp_path, micro):
    hostile.check(case, tmp_path, micro[0])


FAULTS = {  # what a command might do -> what the runner must find in it
    "says nothing": ("sys.exit(2)", "nothing was said"),
    "ends with 1": ("sys.exit(1)", "exit status 1"),
    "a traceback": ("1/0", "no line of an error: Traceback"),
    "two lines": ("sys.exit(print('StageError: a\\nb', file=sys.stderr) or 2)", "no line of"),
    "a long line": ("sys.exit(print('StageError: ' + 'x' * 2000, file=sys.stderr) or 2)", "2,012"),
    "other words": ("sys.exit(print('StageError: b', file=sys.stderr) or 2)", "'wanted' was not"),
    "a new file": ("open('new', 'w')", "here/new is new"),
    "a file beside": ("open('../new', 'w')", "new is new"),
    "a lost file": ("os.unlink('mine')", "here/mine is gone"),
    "a changed file": ("open('mine', 'w')", "here/mine has changed"),
    "a lost folder": ("os.rmdir('folder')", "here/folder is gone"),
    "memory": ("b'x' * 2_100_000_000", "2.1 GB, expected"),
    "code": ("exec(open('evil.py').read())", "code was run is new"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_runner_sees_what_is_wrong(name, tmp_path, monkeypatch):
    "A runner that finds no fault in anything would pass every case"
    does, found = FAULTS[name]
    monkeypatch.setattr(hostile, "ALONE", f"import os, sys\n{does}")

    def make(here, run):
        hostile.write(here / "mine", "letter")
        (here / "folder").mkdir()
        hostile.write(here / "evil.py", hostile.code(here))

    (tmp_path / "run").mkdir()
    case = hostile.Case(name, "corpus", make=make, says="wanted", apart=True)
    with pytest.raises(AssertionError, match=found.replace("(", "\\(")):
        hostile.check(case, tmp_path, tmp_path / "run")
