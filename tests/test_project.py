"The project: notebooks and package say the same, nothing of one machine, safe, quick to start."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cmixtral_nb.book import read_book
from cmixtral_nb.pages import module_of

ROOT = Path(__file__).parents[1]
NBS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [p for p in NBS if module_of(p)]  # the others are pages of the site
STORIES = [p for p in CHAPTERS if p.stem[0].isdigit()]
MODULES = sorted(p.stem for p in (ROOT / "cmixtral_nb").glob("*.py") if not p.name.startswith("_"))


def sources(path):
    return [("".join(c["source"]), c) for c in json.loads(path.read_text())["cells"]]


def test_prepare_changes_nothing(tmp_path):
    "Exported, cleaned, formatted, linted, typed: the tree is as `cmixtral prepare` leaves it"
    ignored = shutil.ignore_patterns("__pycache__", ".venv", ".git", "runs", "_docs", "_proc")
    checkout = shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored)
    code = "import sys; from cmixtral_nb.commands import main; sys.exit(main())"
    out = subprocess.run(
        [sys.executable, "-c", code, "prepare", "--check"],
        cwd=checkout,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    assert "prepare: 0 files changed" in out.stdout


def test_readme_has_two_commands_that_do_all_the_set_up():
    "One line each: the main job, and the tests, which continuous integration reads from there"
    readme = (ROOT / "README.md").read_text().splitlines()
    set_up = "python3 -m venv .venv && .venv/bin/pip install -e "
    commands = [line for line in readme if line.startswith(set_up)]
    assert [line.split("/")[-1] for line in commands] == ["cmixtral run", "pytest"]


def test_the_book_has_each_notebook_once():
    named = [chapter.notebook for part in read_book(ROOT) for chapter in part.chapters]
    assert sorted(named) == [p.stem for p in NBS]


def test_an_appendix_ends_with_its_neighbours():
    "`prepare` fills that cell; without it a reader who came by a link would not find back"
    for part in read_book(ROOT):
        for chapter in part.chapters if part.appendix else ():
            text, cell = sources(ROOT / "nbs" / f"{chapter.notebook}.ipynb")[-1]
            assert cell["id"] == "neighbours" and "](" in text, chapter.notebook


def test_the_book_names_each_command_once():
    from cmixtral_nb.recipes import MODULES as COMMANDS

    chapters = [chapter for part in read_book(ROOT) for chapter in part.chapters]
    named = [command for chapter in chapters for command in chapter.commands]
    assert sorted(named) == sorted(COMMANDS)
    for chapter in chapters:
        for command in chapter.commands:  # in the chapter whose module has it
            assert module_of(ROOT / "nbs" / f"{chapter.notebook}.ipynb") == COMMANDS[command]


def test_chapters_in_order():
    numbers = [p.stem.split("_")[0] for p in STORIES]
    assert numbers == sorted([*[f"{i:02}" for i in range(1, 15)], "04b", "05b", "13b"])
    appendices = [p.stem.split("_")[0] for p in CHAPTERS if p not in STORIES]
    assert len(set(appendices)) == len(appendices)
    plain = [number for number in appendices if number[-1].isdigit()]  # a24b follows a24
    assert plain == [f"a{i:02}" for i in range(1, len(plain) + 1)]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_outputs_are_saved_and_belong_to_no_machine(path):
    n_outputs = 0
    for text, c in sources(path):
        outputs = c.get("outputs", [])
        n_outputs += len(outputs)
        assert (
            not re.search(r"^[!%]?\s*pip install", text, re.M)
            or c["cell_type"] == "markdown"
            or "#| hide" in text
        )
        for o in outputs:
            assert o["output_type"] != "error", text
            data = {k: v for k, v in o.get("data", {}).items() if not k.startswith("image")}
            shown = json.dumps(data) + "".join(o.get("text", []))
            assert not re.search(r"/home/|/tmp/|/Users/|hf_[A-Za-z]{20}|it/s\]", shown), text
            assert str(ROOT) not in shown and str(Path.home()) not in shown, text
    assert n_outputs
    assert path.stat().st_size < 400_000


def test_safe_by_default():
    for m in MODULES:
        text = (ROOT / "cmixtral_nb" / f"{m}.py").read_text()
        assert not re.search(
            r"trust_remote_code\s*=\s*True|^\s*import pickle|pickle\.loads?\(|torch\.save\("
            r"|torch\.load\((?!path, map_location=\"cpu\", weights_only=True)|home\(\)|expanduser",
            text,
            re.M,
        ), m


@pytest.mark.parametrize("module", MODULES)
def test_import_is_light(module):
    heavy = ("torch", "transformers", "numpy", "datasets", "matplotlib", "sentencepiece")
    code = f"import sys, cmixtral_nb.{module}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def imports(module):
    "Modules of the package that a module imports, anywhere"
    text = (ROOT / "cmixtral_nb" / f"{module}.py").read_text()
    found = re.findall(r"from \.(\w+) import|(?:from|import) cmixtral_nb\.(\w+)", text)
    return {own or full for own, full in found} - {module}  # a process of its own may name itself


def test_a_story_imports_no_later_story():
    order = {module_of(p): i for i, p in enumerate(STORIES)}
    for module, place in order.items():
        for other in imports(module) & set(order):
            assert order[other] <= place, f"{module} imports {other}"


@pytest.mark.parametrize("path", STORIES, ids=lambda p: p.stem)
def test_a_story_runs_no_later_story(path):
    "Its cells, too, use appendices and earlier stories only"
    order = {module_of(p): i for i, p in enumerate(STORIES)}
    text = "\n".join(text for text, c in sources(path) if c["cell_type"] == "code")
    for other in set(re.findall(r"(?:from|import) cmixtral_nb\.(\w+)", text)) & set(order):
        assert order[other] <= order[module_of(path)], f"{path.stem} imports {other}"


def test_imports_have_no_circle():
    below: dict[str, set] = {}  # module -> everything that it needs

    def need(module, way):
        assert module not in way, " -> ".join([*way, module])
        if module not in below:
            below[module] = set()
            for other in imports(module) & set(MODULES):
                below[module] |= {other} | need(other, [*way, module])
        return below[module]

    for module in MODULES:
        need(module, [])
    ground_floor = {"machine", "files", "manifests", "folders", "shapes", "options"}
    assert below["stages"] <= ground_floor


def test_no_star_imports():
    for path in [*NBS, *(ROOT / "cmixtral_nb").glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        assert not re.search(r"^\s*\"?from [\w.]+ import \*", path.read_text(), re.M), path.name
