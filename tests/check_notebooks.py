"""Faults that no notebook may have, one line for each; by hand:

    python tests/check_notebooks.py                          # every notebook
    python tests/check_notebooks.py 03_search a12_bits       # some
    python tests/check_notebooks.py --fresh [03_search ...]  # run them anew (minutes): which
                                                             # saved outputs are stale

tests/test_checker.py holds every notebook to this.
"""

import ast
import difflib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cmixtral_nb.notebooks import cells, is_run
from cmixtral_nb.pages import module_of, module_source, modules

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(NBS.glob("*.ipynb"))
HOME = r"/home/|/root/|/tmp/|/Users/|C:\\|hf_[A-Za-z]{20}"
BAR = r"it/s\]|s/it\]"  # of tqdm
LONGEST = 40  # lines of a function without signature and docstring
REASON = r"# Long\b"  # how the comment begins that says why a function is longer


def code_of(cell):
    "Source without directives"
    return re.sub(r"\A(#\|.*\n?)*", "", cell["source"]).strip("\n")


def is_export(cell):
    return bool({"export", "exporti"} & cell["flags"])


def is_import(cell):
    "Whether a cell holds nothing but imports and comments"
    try:
        body = ast.parse(code_of(cell)).body
    except SyntaxError:  # a magic
        return False
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def private_names():
    "Names of the package that have no place on the site"
    return set(re.findall(r"^(?:def|class) (_\w+)", "\n".join(map(module_source, modules())), re.M))


def exported_names(module):
    "`__all__` of a module"
    for node in ast.parse(module_source(module)).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def text_faults(number, cell):
    "Links to files that do not exist, private names"
    for name in sorted(private_names() & set(re.findall(r"`(_[A-Za-z]\w*)`", cell["source"]))):
        yield (
            f"cell {number}: `{name}` in prose becomes a link, "
            "and a private name has no place to lead to"
        )
    for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", cell["source"]):
        if not (NBS / link).exists():
            yield f"cell {number}: dead link to {link}"


def output_faults(number, cell, others):
    "Errors, paths of one machine, progress bars, warnings, figures without labels"
    for output in cell["outputs"]:
        data = output.get("data", {})
        words = {kind: text for kind, text in data.items() if not kind.startswith("image")}
        said = json.dumps(words, ensure_ascii=False) + "".join(output.get("text", []))
        if output["output_type"] == "error":
            yield f"cell {number}: ends in an error"
        if found := re.search(HOME, said):
            yield f"cell {number}: an output shows {found[0]}"
        if re.search(BAR, said):
            yield f"cell {number}: an output shows a progress bar"
        if output.get("name") == "stderr" and not said.startswith("{}StageError"):
            yield f"cell {number}: prints to standard error: {said[2:60]}"
        if any(kind.startswith("image") for kind in data) and not is_labelled(cell, others):
            yield f"cell {number}: a figure without labels"


def device_faults(number, cell):
    "Models that would be loaded onto a GPU where there is one, while their ids stay on the CPU"
    try:
        tree = ast.parse(code_of(cell))
    except SyntaxError:  # a magic
        return
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "load_model":
            continue
        if not {"device", None} & {keyword.arg for keyword in call.keywords}:  # None: **how
            yield (
                f"cell {number}: load_model names no device, so that a GPU would hold the "
                'model and the CPU its ids; write device="cpu", or flag the cell gpu'
            )


def is_labelled(cell, others):
    "The cell, or a function that it calls, names its axes, or the picture has none"
    defined = {
        name: other["source"]
        for other in others
        if other["cell_type"] == "code"
        for name in re.findall(r"^def (\w+)", other["source"], re.M)
    }
    text = cell["source"]
    for _ in range(3):  # functions that call functions
        text += "".join(
            source
            for name, source in defined.items()
            if re.search(rf"\b{name}\(", text) and source not in text
        )
    labels = r"xlabel|ylabel|axis\(['\"]off|xticks=\[\], yticks=\[\]|SVG\("
    drawn_by_package = r"\b(plot|draw)_\w+\(|_figure\(|\bimport_module\b"
    return bool(re.search(labels, text) or re.search(drawn_by_package, text))


def doc_faults(source):
    "Parameters of exported functions without a comment; functions that are too long"
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
        length = (node.end_lineno or 0) - first.lineno + 1
        around = "\n".join(lines[max(0, node.lineno - 4) : first.lineno])
        if length > LONGEST and not re.search(REASON, around):
            yield f"{node.name} has {length} lines, at most {LONGEST} without a reason"
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{node.name} has no docstring"
        arguments = [*node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            if "#" not in "\n".join(lines[argument.lineno - 1 : (argument.end_lineno or 0) + 1]):
                yield f"{node.name}: {argument.arg} has no docment"


def module_faults(path, found):
    "Exported functions and classes that are neither shown nor tested; a constant shows itself"
    module = module_of(path)
    if not module:
        return
    use = [c for c in found if c["cell_type"] == "code" and not is_export(c) and not is_import(c)]
    text = "\n".join(code_of(cell) for cell in use)
    for name in exported_names(module):
        if not name.isupper() and not re.search(rf"\b{name}\b", text):
            yield f"{name} is exported, and neither shown nor tested"
    yield from doc_faults(module_source(module))


def faults(path):
    "What no notebook may have, as text; empty where all is well"
    found = cells(path)
    out = []
    code = [cell for cell in found if cell["cell_type"] == "code" and code_of(cell)]
    runs = [c for c in code if is_run(c) and not is_export(c) and not is_import(c)]
    if any("hide" not in c["flags"] for c in runs) and not any(c["outputs"] for c in code):
        out.append(f"no outputs are saved; run: cmixtral prepare --run {path.stem}")
    for number, cell in enumerate(found):
        if cell["cell_type"] != "code":
            out += text_faults(number, cell)
            continue
        if not is_export(cell) and "gpu" not in cell["flags"]:
            out += device_faults(number, cell)
        if re.search(r"^\s*[!%]\s*pip install", cell["source"], re.M) and not is_hidden(cell):
            out.append(f"cell {number}: pip install")
        out += output_faults(number, cell, found)
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell.get("execution_count"):
            out.append(f"cell {number}: has an execution count; run: nbdev_clean")
    return out + list(module_faults(path, found))


def is_hidden(cell):
    return "hide" in cell["flags"]


def fresh(path):
    "Cells whose output differs when the notebook runs anew; digits count as equal"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(path, folder))
        code = f"from cmixtral_nb.notebooks import execute; execute({str(copy)!r})"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if run.returncode:
            return [run.stderr.strip().splitlines()[-1]]
        pairs = zip(cells(path), cells(copy), strict=True)
        return [
            f"cell {number}: {difference}"
            for number, (old, new) in enumerate(pairs)
            if (difference := changed(said(old), said(new)))
        ]


def said(cell):
    "What a cell printed, with 0 for each number: seconds and losses are not of this book"
    texts = [
        "".join(output.get("text", []) or output.get("data", {}).get("text/plain", []))
        for output in cell["outputs"]
    ]
    return re.sub(r"\d+(\.\d+)?", "0", "".join(texts)).splitlines()


def changed(old, new):
    return " | ".join(line for line in difflib.ndiff(old, new) if line[:1] in "+-")[:200]


def main(argv):
    names = [arg for arg in argv if not arg.startswith("--")]
    for path in NOTEBOOKS:
        if names and path.stem not in names:
            continue
        found = fresh(path) if "--fresh" in argv else faults(path)
        print(path.stem, *(found or ["well"]), sep="\n  ", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
