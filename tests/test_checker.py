"What no notebook may have, and that the checker sees it; by hand: tests/check_notebooks.py"

import json

import pytest
from check_notebooks import NOTEBOOKS, doc_faults, faults


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_no_fault(path):
    assert faults(path) == []


def notebook(tmp_path, *cells):
    "A notebook of (source, outputs, more) cells"
    path = tmp_path / "09_x.ipynb"
    made = []
    for number, (source, outputs, more) in enumerate(cells):
        cell = {"cell_type": "code", "id": str(number), "source": [source], "outputs": outputs}
        made.append({**cell, "execution_count": None, **more})
    path.write_text(json.dumps({"cells": made}))
    return path


PICTURE = [{"output_type": "display_data", "data": {"image/png": "x"}}]


def says(text, name="stdout"):
    return [{"output_type": "stream", "name": name, "text": [text]}]


@pytest.mark.parametrize(
    "source, outputs, more, fault",
    [
        ("print(1)", [], {}, "no outputs"),
        ("1/0", [{"output_type": "error", "ename": "ZeroDivisionError"}], {}, "error"),
        ("p", says("/home/ann/x.txt"), {}, "/home/"),
        ("p", says("100%|██| 3/3 [00:01, 2.1it/s]"), {}, "progress bar"),
        ("p", says("UserWarning: old", "stderr"), {}, "standard error"),
        ("plt.plot(x)", PICTURE, {}, "without labels"),
        ("!pip install torch", says("ok"), {}, "pip install"),
        ("1", says("1"), {"execution_count": 3}, "execution count"),
        ("net = load_model('small')", [], {}, "names no device"),
        ("sorted by `_write` of the stages", [], {"cell_type": "markdown"}, "a private name"),
        ("[away](98_nowhere.ipynb)", [], {"cell_type": "markdown"}, "dead link"),
    ],
)
def test_each_fault_is_seen(tmp_path, source, outputs, more, fault):
    assert any(fault in f for f in faults(notebook(tmp_path, (source, outputs, more))))


def test_what_is_right_is_no_fault(tmp_path):
    good: tuple = (
        ("def show(): ax.set(xlabel='step', ylabel='loss')", [], {}),
        ("show()", PICTURE, {}),
        ("try_it()", says("StageError: no such file", "stderr"), {}),
        ("net = load_model('small', device='cpu')", [], {}),
        ("#| gpu\nnet = load_model('small', attn='flash_attention_2')", [], {}),
        ("[there](index.ipynb)", [], {"cell_type": "markdown"}),
    )
    assert faults(notebook(tmp_path, *good)) == []


def test_an_exported_name_must_be_shown_or_tested(tmp_path):
    path = notebook(tmp_path, ("#| default_exp options", [], {}), ("nearest('a', 'b')", [], {}))
    found = faults(path)
    assert "named_refs is exported, and neither shown nor tested" in found
    assert not any(f.startswith("nearest ") for f in found)


LONG = "    x = 1\n" * 41


@pytest.mark.parametrize(
    "source, fault",
    [
        ("def f(\n    a,  # what\n    b,\n):\n    'Doc'\n    return a\n", "b has no docment"),
        ("def f():\n    return 1\n", "no docstring"),
        (f"def f():\n    'Doc'\n{LONG}", "41 lines"),
    ],
)
def test_faults_of_functions_are_seen(source, fault):
    assert any(fault in found for found in doc_faults(source))


def test_a_long_function_with_a_reason_is_right():
    assert list(doc_faults(f"# Long: one table.\ndef f():\n    'Doc'\n{LONG}")) == []
