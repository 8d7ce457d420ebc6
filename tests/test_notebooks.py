"""Each notebook is a test: it runs top to bottom in a process of its own, without slow and GPU
cells, in an empty folder and against the installed wheel, so that nothing of the checkout can
help it. Figures that it draws must have their axes labelled, and what its commands say must be
what the notebook holds, but for numbers (run_notebook.py).
"""

import re
import shutil
from pathlib import Path

import pytest
from forks import python

from cmixtral_nb.notebooks import cells

NOTEBOOKS = sorted((Path(__file__).parents[1] / "nbs").glob("*.ipynb"))
APPENDICES = [p for p in NOTEBOOKS if re.match(r"a\d", p.stem)]  # run by test_appendices.py
RUN = Path(__file__).with_name("run_notebook.py")


def run(path, site, folder):
    copy = shutil.copy(path, folder)
    for kept in path.parent.glob("*.json"):  # numbers of runs, which lie beside the pages
        shutil.copy(kept, folder)
    return python(RUN.read_text(encoding="utf-8"), copy, site, cwd=folder, path=[site])


STORIES_AND_PAGES = [path for path in NOTEBOOKS if path not in APPENDICES]


@pytest.mark.parametrize("path", STORIES_AND_PAGES, ids=lambda p: p.stem)
def test_notebook(path, wheel, tmp_path):
    out = run(path, wheel, tmp_path)
    assert out.returncode == 0, out.stderr[-3000:]


ON_DRAWING = {"a03c_figures", "a33_notebooks"}  # what is drawn there shows a helper at work


@pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if p.stem not in ON_DRAWING], ids=lambda p: p.stem
)
def test_figures_are_in_the_style_of_the_book(path):
    "Who draws with pyplot sets the style first"
    code = [cell["source"] for cell in cells(path) if cell["cell_type"] == "code"]
    drawing = [
        i for i, source in enumerate(code) if re.search(r"^ *[^#\n]*plt\.subplots", source, re.M)
    ]
    styled = [i for i, source in enumerate(code) if re.search(r"^set_style\(\)$", source, re.M)]
    assert not drawing or styled and styled[0] <= drawing[0]


UNLABELLED = """import matplotlib.pyplot as plt
fig, ax = plt.subplots()
ax.plot([1, 2])
fig.savefig('a.png')
"""


@pytest.mark.parametrize(
    "source, says",
    [
        ("1/0", "ZeroDivisionError"),
        (UNLABELLED, "label on y"),
        ("print('corpus: one', 1)", "says ['corpus: one #'], the notebook holds ['corpus: two #']"),
    ],
)
def test_that_a_bad_notebook_fails(source, says, wheel, tmp_path):
    from cmixtral_nb.stages import write_json

    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": source.splitlines(True)}
    stored = {"output_type": "stream", "name": "stdout", "text": ["corpus: two 2\n"]}
    cell |= {"outputs": [stored], "execution_count": None}
    (tmp_path / "from").mkdir()
    bad = tmp_path / "from" / "bad.ipynb"
    write_json(bad, {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]})
    out = run(bad, wheel, tmp_path)
    assert out.returncode and says in out.stderr
