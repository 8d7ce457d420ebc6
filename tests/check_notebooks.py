"""What the notebooks are made of, one line for each; by hand:

    python tests/check_notebooks.py            # the table, and what is over the budget
    python tests/check_notebooks.py --names    # also the exported names that are neither shown nor tested
    python tests/check_notebooks.py --fresh [03_search ...]   # run them anew (minutes): which saved outputs are stale

"median" is that of the cells that are not exported, "wpl" words of prose for each line of code, "row" the most code cells without prose between
them. tests/test_checker.py holds what no notebook may have."""

import ast
import difflib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
CHAPTERS = sorted(NBS.glob("[0-9]*.ipynb"))
BUDGET = dict(
    cells=(40, 70),
    words=(800, 1800),
    lines=(150, 300),
    median=(3, 5),
    export=(1, 30),
    row=(0, 4),
    shown=(80, 100),
    tested=(60, 100),
    kB=(0, 150),
)
PRIVATE = set(
    re.findall(
        r"^(?:def|class) (_\w+)",
        "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "cmixtral_nb").glob("*.py")),
        re.M,
    )
)
HOME = r"/home/|/root/|/tmp/|/Users/|C:\\|hf_[A-Za-z]{20}|it/s\]"


def cells(path):
    return [
        dict(
            c,
            text="".join(c["source"]),
            flags=set(re.findall(r"^#\| *([\w-]+)", "".join(c["source"]), re.M)),
        )
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
    ]


def module_of(cs):
    return next((m[1] for c in cs if (m := re.search(r"default_exp (\w+)", c["text"]))), None)


def names_of(module):
    tree = ast.parse((ROOT / "cmixtral_nb" / f"{module}.py").read_text(encoding="utf-8"))
    return next(
        (
            ast.literal_eval(n.value)
            for n in tree.body
            if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
        ),
        [],
    )


def body(c):  # code without directives
    return re.sub(r"^#\|.*\n?", "", c["text"], flags=re.M).strip("\n")


def survey(path):
    "Counts of a notebook: what STYLE.md gives a budget for"
    cs = [c for c in cells(path) if not c.get("id", "").startswith("colab-")]
    code = [c for c in cs if c["cell_type"] == "code" and body(c)]
    text = [c for c in cs if c["cell_type"] == "markdown"]
    exports = [c for c in code if "export" in c["flags"]]
    use = [c for c in code if "export" not in c["flags"]]
    shown = [c for c in use if "hide" not in c["flags"]]
    tests = [c for c in use if re.search(r"\b(test_\w+|assert|expect_fail|raises)\b", c["text"])]
    row = longest = 0
    for c in cs:  # visible code cells one after another
        row = row + 1 if c in code and "hide" not in c["flags"] else 0 if c in text else row
        longest = max(longest, row)
    module = module_of(cs)
    names = names_of(module) if module else []
    found = lambda group: {
        n for n in names if any(re.search(rf"\b{n}\b", c["text"]) for c in group)
    }
    n_words, n_lines = (
        sum(len(re.findall(r"\w+", c["text"])) for c in text),
        sum(len(body(c).splitlines()) for c in code),
    )
    share = lambda group: round(100 * len(found(group)) / len(names)) if names else 100
    outputs = [o for c in code for o in c.get("outputs", [])]
    return dict(
        name=path.stem,
        cells=len(cs),
        words=sum(len(c["text"].split()) for c in text),
        lines=n_lines,
        wpl=round(n_words / max(1, n_lines), 1),
        median=statistics.median([len(body(c).splitlines()) for c in use] or [0]),
        export=max([len(body(c).splitlines()) for c in exports] or [0]),
        row=longest,
        shown=share(shown),
        tested=share(tests),
        figures=sum(k.startswith("image") for o in outputs for k in o.get("data", {})),
        kB=round(sum(len(json.dumps(o)) for o in outputs) / 1e3),
        unshown=sorted(set(names) - found(shown)),
        untested=sorted(set(names) - found(tests)),
    )


def over_budget(s):
    return [
        f"{k} {s[k]:g}, expected {lo} to {hi}"
        for k, (lo, hi) in BUDGET.items()
        if not lo <= s[k] <= hi
    ]


def faults(path):
    "What no notebook may have, as text; empty where all is well"
    out, cs = [], cells(path)
    ran = [
        c
        for c in cs
        if c["cell_type"] == "code"
        and body(c)
        and not {"notest", "eval", "export", "hide"} & c["flags"]
        and not all(re.match("from |import |#", l) for l in body(c).splitlines())
    ]
    if ran and not any(c["outputs"] for c in cs if c["cell_type"] == "code"):
        out.append("no outputs are saved; run: cmixtral docs, or execute() of 15_site")
    for i, c in enumerate(cs):
        if c["cell_type"] != "code":
            for name in sorted(PRIVATE & set(re.findall(r"`(_[A-Za-z]\w*)`", c["text"]))):
                out.append(
                    f"cell {i}: `{name}` in prose becomes a link, and a private name has no place to lead to"
                )
            continue
        if re.search(r"^\s*[!%]\s*pip install", c["text"], re.M) and "hide" not in c["flags"]:
            out.append(f"cell {i}: pip install")
        if c.get("execution_count"):
            out.append(f"cell {i}: has an execution count; run: nbdev_clean")
        for o in c["outputs"]:
            said = json.dumps(
                {k: v for k, v in o.get("data", {}).items() if not k.startswith("image")},
                ensure_ascii=False,
            ) + "".join(o.get("text", []))
            if o["output_type"] == "error":
                out.append(f"cell {i}: ends in an error")
            if m := re.search(HOME, said):
                out.append(f"cell {i}: an output shows {m[0]}")
            if o.get("name") == "stderr" and not "".join(o["text"]).startswith("StageError"):
                out.append(f"cell {i}: prints to standard error: {said[:60]}")
            if any(k.startswith("image") for k in o.get("data", {})) and not labelled(c, cs):
                out.append(f"cell {i}: a figure without labels")
    return out


def labelled(cell, cs):
    "The cell, or a function of the notebook that it calls, names its axes, or the picture has none"
    text, known = (
        cell["text"],
        {
            m: c["text"]
            for c in cs
            if c["cell_type"] == "code"
            for m in re.findall(r"^def (\w+)", c["text"], re.M)
        },
    )
    for _ in range(3):
        text += "".join(
            v for k, v in known.items() if re.search(rf"\b{k}\(", text) and v not in text
        )
    return bool(
        re.search(r"xlabel|ylabel|axis\(['\"]off|xticks=\[\], yticks=\[\]|SVG\(", text)
        or re.search(r"\b(plot|draw)_\w+\(|_figure\(|\bimport_module\b", text)
    )


def fresh(path):
    "Cells whose output differs when the notebook runs anew; digits count as equal, since seconds and losses are not of this book"
    with tempfile.TemporaryDirectory() as tmp:
        shutil.copy(path, tmp)
        copy = Path(tmp) / path.name
        code = f"import os; from pathlib import Path; import cmixtral_nb.notebooks as s; s.execute({str(copy)!r})"
        r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if r.returncode:
            return [r.stderr.strip().splitlines()[-1]]
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__({str(copy)!r})",
            ],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        shape = lambda o: re.sub(
            r"\d+(\.\d+)?",
            "0",
            "".join(o.get("text", []) or o.get("data", {}).get("text/plain", [])),
        )
        out = []
        for i, (a, b) in enumerate(zip(cells(path), cells(copy), strict=True)):
            x, y = ([shape(o) for o in c.get("outputs", [])] for c in (a, b))
            if x != y:
                out.append(
                    f"cell {i}: "
                    + " | ".join(
                        l
                        for l in difflib.ndiff("".join(x).splitlines(), "".join(y).splitlines())
                        if l[:1] in "+-"
                    )[:200]
                )
        return out


def main(argv):
    names = [a for a in argv if not a.startswith("--")]
    chosen = [p for p in CHAPTERS if not names or p.stem in names]
    if "--fresh" in argv:
        for p in chosen:
            print(p.stem, *(fresh(p) or ["fresh"]), sep="\n  ", flush=True)
        return
    table = [survey(p) for p in chosen]
    keys = [k for k in table[0] if k not in ("name", "unshown", "untested")]
    print(f"{'':14}" + "".join(f"{k:>9}" for k in keys))
    for s in table:
        print(f"{s['name']:14}" + "".join(f"{s[k]:>9g}" for k in keys))
    for p, s in zip(chosen, table, strict=True):
        print(f"\n{s['name']}: " + ("; ".join(over_budget(s)) or "within the budget"))
        if "--names" in argv:
            print(
                "  not shown:",
                " ".join(s["unshown"]) or "-",
                "\n  not tested:",
                " ".join(s["untested"]) or "-",
            )
        for f in faults(p):
            print("  FAULT", f)


if __name__ == "__main__":
    main(sys.argv[1:])
