"What no notebook may have, and that the checker sees it; the table and the budgets: python tests/check_notebooks.py"

import json
import re

import pytest
from check_notebooks import BUDGET, CHAPTERS, NBS, body, cells, faults, over_budget, survey


@pytest.mark.parametrize("path", sorted(NBS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_has_no_fault(path):
    assert faults(path) == []


def test_the_table_counts_every_chapter():
    for s in map(survey, CHAPTERS):
        assert s["cells"] > 20 and s["words"] > 300 and 0 < s["wpl"] < 10, s["name"]
        assert 0 <= s["tested"] <= 100 and set(s["unshown"]) <= set(s["unshown"] + s["untested"])


@pytest.mark.parametrize("name", [p.stem for p in CHAPTERS])
def test_names_are_shown_and_tested_and_outputs_are_light(name):
    assert not {w.split()[0] for w in over_budget(survey(NBS / f"{name}.ipynb"))} & {
        "cells",
        "words",
        "median",
        "row",
        "shown",
        "tested",
        "kB",
    }


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_long_cell_of_the_package_has_its_reason_beside_it(path):
    cs = cells(path)
    for i, c in enumerate(cs):
        if "export" in c["flags"] and len(body(c).splitlines()) > BUDGET["export"][1]:
            beside = " ".join(
                next((x["text"] for x in part if x["cell_type"] == "markdown"), "")
                for part in (cs[i::-1], cs[i:])
            )
            assert re.search(r"\b(long|longer|whole|cannot be cut)\b", beside), c["text"][:200]


def notebook(tmp_path, *cells):
    path = tmp_path / "09_x.ipynb"
    path.write_text(
        json.dumps(
            dict(
                cells=[
                    dict(
                        dict(
                            cell_type="code", id=str(i), source=[s], outputs=o, execution_count=None
                        ),
                        **more,
                    )
                    for i, (s, o, more) in enumerate(cells)
                ]
            )
        )
    )
    return path


PICTURE = [dict(output_type="display_data", data={"image/png": "x"})]


def says(text, name="stdout"):
    return [dict(output_type="stream", name=name, text=[text])]


@pytest.mark.parametrize(
    "source, outputs, more, fault",
    [
        ("print(1)", [], {}, "no outputs"),
        ("1/0", [dict(output_type="error", ename="ZeroDivisionError")], {}, "error"),
        ("p", says("/home/ann/x.txt"), {}, "/home/"),
        ("p", says("100%|██| 3/3 [00:01, 2.1it/s]"), {}, "it/s"),
        ("p", says("UserWarning: old", "stderr"), {}, "standard error"),
        ("plt.plot(x)", PICTURE, {}, "without labels"),
        ("!pip install torch", says("ok"), {}, "pip install"),
        ("1", says("1"), dict(execution_count=3), "execution count"),
        (
            "into `_docs`, sorted by `_seal` of the first chapter",
            [],
            dict(cell_type="markdown"),
            "a private name",
        ),
    ],
)
def test_each_fault_is_seen(tmp_path, source, outputs, more, fault):
    assert any(fault in f for f in faults(notebook(tmp_path, (source, outputs, more))))


def test_what_is_right_is_no_fault(tmp_path):
    good = (
        ("def show(): ax.set(xlabel='step', ylabel='loss')", [], {}),
        ("show()", PICTURE, {}),
        ("try_it()", says("StageError: no such file", "stderr"), {}),
    )
    assert faults(notebook(tmp_path, *good)) == []
