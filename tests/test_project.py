"The project itself: notebooks and package say the same, nothing of one machine in it, safe and quick to start."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NBS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [p for p in NBS if p.stem[0].isdigit()]  # the others are pages of the site
MODULES = sorted(p.stem for p in (ROOT / "cmixtral_nb").glob("*.py") if not p.name.startswith("_"))


def sources(path):
    return [("".join(c["source"]), c) for c in json.loads(path.read_text())["cells"]]


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    "The package exported anew, in a copy of the checkout"
    tmp = tmp_path_factory.mktemp("export")
    for name in "nbs", "cmixtral_nb":
        shutil.copytree(ROOT / name, tmp / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", tmp)
    code = "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__(); from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp, check=True, capture_output=True)
    return tmp


def test_package_is_what_the_notebooks_export(exported):
    for p in (ROOT / "cmixtral_nb").glob("*.py"):
        assert (exported / "cmixtral_nb" / p.name).read_text() == p.read_text(), p.name


def test_notebooks_are_clean(exported):
    for p in NBS:
        assert (exported / "nbs" / p.name).read_text() == p.read_text(), p.name


def test_readme_is_the_index():
    from cmixtral_nb.site import readme

    before = (ROOT / "README.md").read_text()
    try:
        readme(ROOT)
        assert (ROOT / "README.md").read_text() == before
    finally:
        (ROOT / "README.md").write_text(before)


def test_chapters_in_order():
    assert [p.stem.split("_")[0] for p in CHAPTERS] == sorted(
        [*[f"{i:02}" for i in range(16)], "05b", "12b", "13b", "13c"]
    )


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
            shown = json.dumps(
                {k: v for k, v in o.get("data", {}).items() if not k.startswith("image")}
            ) + "".join(o.get("text", []))
            assert not re.search(r"/home/|/tmp/|/Users/|hf_[A-Za-z]{20}|it/s\]", shown), text
            assert str(ROOT) not in shown and str(Path.home()) not in shown, text
    assert n_outputs
    assert path.stat().st_size < 400_000


def test_safe_by_default():
    for m in MODULES:
        text = (ROOT / "cmixtral_nb" / f"{m}.py").read_text()
        assert not re.search(
            r"trust_remote_code\s*=\s*True|^\s*import pickle|pickle\.loads?\(|torch\.save\(|torch\.load\(|home\(\)|expanduser",
            text,
            re.M,
        ), m


@pytest.mark.parametrize("module", MODULES)
def test_import_is_light(module):
    code = f"import sys, cmixtral_nb.{module}; print([m for m in ('torch', 'transformers', 'numpy', 'datasets', 'matplotlib', 'sentencepiece') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_no_module_imports_a_later_one():
    order = {
        re.search(r"default_exp (\w+)", "".join(t for t, _ in sources(p)))[1]: i
        for i, p in enumerate(CHAPTERS)
    }
    for m, i in order.items():
        for name in re.findall(
            r"from \.(\w+) import|from cmixtral_nb\.(\w+) import|import cmixtral_nb\.(\w+)",
            (ROOT / "cmixtral_nb" / f"{m}.py").read_text(),
        ):
            dep = next(filter(None, name))
            assert order[dep] <= i, f"{m} imports {dep}"
