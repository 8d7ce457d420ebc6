"""The package as `pip install .` leaves it, without the minutes: for test_plain.py.

A virtual environment of its own holds the wheel and links to those packages of this environment
that the wheel requires without any extra, and that these require in turn. What only an extra
brings (lm-eval, jieba, pytest) is not there.
"""

import json
import os
import shlex
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def canonical(name):
    "Example: canonical('Huggingface_Hub') -> 'huggingface-hub'"
    return name.lower().replace("_", "-").replace(".", "-")


def required(requirements):
    "All distributions that some requirements bring: name -> distribution"
    found: dict[str, metadata.Distribution] = {}
    extras: dict[str, set[str]] = {}  # of each distribution, those that somebody asked for
    todo = [(Requirement(text), {""}) for text in requirements]
    while todo:
        requirement, asked = todo.pop()
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in asked):
            continue
        name = canonical(requirement.name)
        if name in found and requirement.extras <= extras[name]:
            continue
        found[name] = metadata.distribution(requirement.name)
        extras[name] = extras.get(name, set()) | requirement.extras
        needs = found[name].requires or []
        todo += [(Requirement(text), {"", *extras[name]}) for text in needs]
    return found


def tops(distribution):
    "Files and folders of a distribution directly inside site-packages; scripts lie elsewhere"
    parts = {file.parts[0] for file in distribution.files or []}
    return {part for part in parts if part not in ("..", "__pycache__")}


def link(distributions, site):
    "Links to the packages of some distributions; a folder shared with others only in part"
    source = Path(next(iter(distributions.values())).locate_file(""))
    chosen = {distribution.metadata["Name"] for distribution in distributions.values()}
    others = {
        top
        for distribution in metadata.distributions()
        if distribution.metadata["Name"] not in chosen
        for top in tops(distribution)
    }
    for distribution in distributions.values():
        for top in tops(distribution):
            if top not in others:
                if not (site / top).exists():
                    (site / top).symlink_to(source / top)
                continue
            for file in distribution.files or []:  # a namespace, such as google
                if file.parts[0] == top:
                    (site / file).parent.mkdir(parents=True, exist_ok=True)
                    (site / file).symlink_to(source / file)


def write_scripts(distributions, python):
    "The commands of some distributions, torchrun among them, as pip writes them"
    for distribution in distributions.values():
        for entry in distribution.entry_points.select(group="console_scripts"):
            module, _, function = entry.value.partition(":")
            script = python.with_name(entry.name)
            call = f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n"
            script.write_text(f"#!{python}\n{call}")
            script.chmod(0o755)


@dataclass(frozen=True)
class Outcome:
    "What a command did"

    line: str  # as typed
    status: int
    out: str
    err: str

    @property
    def refusal(self):
        "The lines of a refusal; empty for success, and for anything that is no clean refusal"
        lines = self.err.strip().splitlines()
        clean = self.status == 2 and lines and all(x.startswith("StageError: ") for x in lines)
        return lines if clean else []


SEVERAL = """
import contextlib, io, json, sys, traceback
from cmixtral_nb.commands import main

outcomes = []
for words, typed in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    sys.stdin = io.StringIO(typed)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as e:  # of --help
            status = e.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    outcomes.append([status, out.getvalue(), err.getvalue()])
with open(sys.argv[1], "w") as file:
    json.dump(outcomes, file)
"""


@dataclass(frozen=True)
class Plain:
    "A plain install"

    python: Path

    def script(self, *words, **how):
        "A console script of the environment, in a process of its own"
        command = [str(self.python.with_name(words[0])), *map(str, words[1:])]
        path = f"{self.python.parent}:/usr/bin:/bin"
        return subprocess.run(
            command, capture_output=True, text=True, env=clean_environment(PATH=path), **how
        )

    def several(self, lines, cwd, typed=""):
        "Commands one after the other in one process, which imports libraries once -> outcomes"
        words = [(shlex.split(line, comments=True)[1:], typed) for line in lines]
        answer = Path(cwd) / ".outcomes.json"
        run = subprocess.run(
            [self.python, "-c", SEVERAL, answer],
            input=json.dumps(words),
            cwd=cwd,
            capture_output=True,
            text=True,
            env=clean_environment(),
        )
        assert run.returncode == 0, run.stderr[-3000:]
        found = json.loads(answer.read_text())
        answer.unlink()
        return [Outcome(line, *rest) for line, rest in zip(lines, found, strict=True)]


def clean_environment(**more):
    "The environment of the tests, without what points to the checkout"
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "HF_HUB_OFFLINE": "1", **more}


def install(wheel, folder):
    "A plain install of a wheel file"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--python", python]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    (ours,) = metadata.distributions(path=[str(site)], name="cmixtral_nb")
    distributions = required(ours.requires or [])
    link(distributions, site)
    write_scripts(distributions, python)
    return Plain(python)
