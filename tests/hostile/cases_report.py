"Evaluations, names and runs that are read to be shown: report, card, compare."

import json
import re

from hostile import Case, changed_json, linked, sparse, write, write_json

SCRIPT = "</title></pre><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
OURS = "RUN/evaluation/base"


def text_of(here, *parts):
    return here.joinpath(*parts).read_text(encoding="utf-8")


# ---- files to compare


def compared(name, text, says, **more):
    "A file in place of the second evaluation"
    content = text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogatepass")
    return Case(
        f"compare with {name}",
        f"compare base={OURS} b=x.json --out o",
        make=lambda here, run: write(here / "x.json", content),
        says=says,
        **more,
    )


def results(value):
    return json.dumps(dict(results=value))


IN_RESULTS = {  # what takes the place of the results -> what is said
    "a list": ([1], "results is a list, expected an object"),
    "a number": (5, "results is 5, expected an object"),
    "null": (None, "results is null, expected an object"),
    "text": ("x", "results is 'x', expected an object"),
    "a truth value": (True, "results is True, expected an object"),
    "a number of 400 digits": (10**400, "results is a number beyond all bounds"),
    "NaN": (float("nan"), "results is nan"),
    "a task that is a list": ({"mmlu": [0.5]}, "results.mmlu is a list"),
    "a task that is a number": ({"mmlu": 0.5}, "results.mmlu is 0.5"),
    "a task that is null": ({"mmlu": None}, "results.mmlu is null"),
    "text as accuracy": ({"mmlu": {"acc,none": "0.5"}}, "acc,none is '0.5', expected a number"),
    "a list as accuracy": ({"mmlu": {"acc,none": [0.5]}}, "acc,none is a list"),
    "true as accuracy": ({"mmlu": {"acc,none": True}}, "acc,none is True"),
    "NaN as accuracy": ({"mmlu": {"acc,none": float("nan")}}, "acc,none is nan"),
    "infinity as accuracy": ({"mmlu": {"acc,none": float("inf")}}, "acc,none is inf"),
    "accuracy of 200%": ({"mmlu": {"acc,none": 2}}, "acc,none is 2, expected a number from 0 to 1"),
    "accuracy below 0": ({"hellaswag": {"acc_norm,none": -0.1}}, "acc_norm,none is -0.1"),
    "400 digits as accuracy": ({"mmlu": {"acc,none": 10**400}}, "a number beyond all bounds"),
    "no bits per byte": ({"bpb": {"bits_per_byte_km": 0}}, "km is 0, expected a number"),
    "fewer than no bits": ({"bpb": {"bits_per_byte_km": -1}}, "km is -1, expected a number"),
    "NaN bits per byte": ({"bpb": {"bits_per_byte_km": float("nan")}}, "km is nan"),
    "text as bits per byte": ({"bpb": {"bits_per_byte_km": "2"}}, "km is '2'"),
    "null as bits per byte": ({"bpb": {"bits_per_byte_km": None}}, "km is null"),
    "a language with a line break": ({"bpb": {"bits_per_byte_k\nm": []}}, "k\\nm is a list"),
    "a task that turns writing": ({"\u202emmlu\x1b[2J": 5}, "\\u202emmlu\\x1b[2J is 5"),
    "a task name of a million letters": ({"x" * 10**6: 5}, "…"),
    "nothing": ({}, "share no measure"),
    "tasks of others alone": ({"a": {"f1,none": 0.5}, "b": {}}, "share no measure"),
    "a name that is half a character": ({"\ud800": {"acc,none": 0.5}}, "share no measure"),
}

IN_FILES = {  # what takes the place of the whole file -> what is said
    "an empty file": ("", "not valid JSON"),
    "a list": ("[]", "the whole is a list, expected an object"),
    "a number": ("3", "the whole is 3"),
    "null": ("null", "the whole is null"),
    "NaN": ("NaN", "the whole is nan"),
    "text": ('"results"', "the whole is 'results'"),
    "no results": ('{"result": {}}', 'holds no "results"'),
    "brackets without end": ("[" * 10**6, "not valid JSON"),
    "objects without end": ('{"results":' * 10**5, "not valid JSON"),
    "a number of 5,000 digits": ('{"results": ' + "9" * 5000 + "}", "not valid JSON"),
    "bytes that are no UTF-8": (b'{"results": "\xff"}', "not UTF-8"),
    "UTF-16": ('{"results": {}}'.encode("utf-16"), "not UTF-8"),
    "an lzma file": (b"\xfd7zXZ\x00\x00\x04", "not UTF-8"),
    "more after the end": ('{"results": {}} {}', "not valid JSON"),
    "a config that is a list": ('{"results": {}, "config": [1]}', "config is a list"),
    "a config that is text": ('{"results": {}, "config": "x"}', "config is 'x'"),
}

LM_EVAL = dict(  # as lm-eval 0.4 writes it, with what we do not know
    results={
        "hellaswag": {
            "alias": "hellaswag",
            "acc,none": 0.4,
            "acc_stderr,none": 0.01,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": "N/A",
        },
        "gsm8k": {"exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": 0.01},
        "mmlu": {"acc,none": 1, "acc_stderr,none": 0, "alias": ["x"]},
        SCRIPT: {"acc,none": 0.5, "acc_stderr,none": [1]},
    },
    groups={},
    config={"limit": [SCRIPT], "model": "hf", "chat": {"a": 1}},
    git_hash=None,
)


def two_of_lm_eval(here, run):
    for name in "ab":
        write_json(here / name / "someone__model" / "results_2026-01-01T00.json", LM_EVAL)


def two_models_of_lm_eval(here, run):
    for name in "ab":
        write_json(here / "x" / name / "results_2026-01-01T00.json", LM_EVAL)


def shown_without_script(here, run):
    "The page of a comparison has its own script alone"
    for file in here.glob("o*/compare.html"):
        page = file.read_text(encoding="utf-8")
        assert page.count("<script") == 1 and "<img" not in page, file


FILES = [
    *(compared(f"results: {k}", results(v), says) for k, (v, says) in IN_RESULTS.items()),
    *(compared(k, text, says) for k, (text, says) in IN_FILES.items()),
    Case(
        "compare two files of lm-eval",
        "compare a b --out o",
        make=two_of_lm_eval,
        may_succeed=True,
        check=shown_without_script,
    ),
    Case(
        "compare a folder with two models of lm-eval",
        f"compare x={OURS} b=x --out o",
        make=two_models_of_lm_eval,
        says="x holds evaluations of 2 models; give one of them",
    ),
    Case(
        "compare with 3 GB",
        f"compare base={OURS} b=x.json --out o",
        make=lambda here, run: sparse(here / "x.json", 3 * 10**9, b'{"results": {}}'),
        says="x.json has 3.0 GB, expected at most 0.2",
    ),
    Case("compare with the root of all files", f"compare base={OURS} b=/ --out o", says="/"),
    Case(
        "compare with a folder of nothing",
        f"compare base={OURS} b=x --out o",
        make=lambda here, run: (here / "x").mkdir(),
        says="x",
    ),
    Case(
        "compare with a link to itself",
        f"compare base={OURS} b=x.json --out o",
        make=lambda here, run: (here / "x.json").symlink_to("x.json"),
        says="x.json",
    ),
    Case(
        "compare with a folder called results.json",
        f"compare base={OURS} b=x --out o",
        make=lambda here, run: (here / "x/results.json").mkdir(parents=True),
        says="x",
    ),
]


# ---- rows under the numbers

DOCUMENT = dict(lang="zh", domain="zh/d", id="a", bits=9.0, n_bytes=3)
QUESTION = dict(task="mmlu_anatomy", id=1, hash="h", acc=1.0, chosen=1, target=2)


def rows(kind, name, row, says, **more):
    "A row of documents.jsonl or questions.jsonl, the second of its file"
    good = DOCUMENT if kind == "documents" else QUESTION
    lines = [json.dumps(good), row if isinstance(row, str) else json.dumps(row)]

    def make(here, run):
        write_json(here / "x/results.json", dict(results={}))
        write(here / f"x/{kind}.jsonl", "\n".join(lines))

    command = f"compare base={OURS} b=x --out o"
    return Case(f"{kind}.jsonl: {name}", command, make=make, says=says, **more)


ROWS = [
    rows("documents", "a list", [1], "line 2: the whole is a list"),
    rows("documents", "broken", "{", "documents.jsonl line 2: not valid JSON"),
    rows("documents", "brackets without end", "[" * 10**5, "line 2: not valid JSON"),
    rows("documents", "a line of 12 MB", '"' + "x" * 12_000_000 + '"', "line 2: not valid JSON"),
    *(
        rows(
            "documents", f"{key} is {str(value)[:20]!r}", DOCUMENT | {key: value}, f"line 2: {key}"
        )
        for key, values in {
            "lang": (None, 5, ["zh"], {}),
            "domain": (None, 5, []),
            "id": (None, ["a"], {}, 1.5, True),
            "bits": (None, "9", 0, -1, float("nan"), float("inf"), 10**400, True),
            "n_bytes": (None, 0, -3, 1.5, "3", 10**400, float("nan")),
        }.items()
        for value in values
    ),
    *(
        rows(
            "questions", f"{key} is {str(value)[:20]!r}", QUESTION | {key: value}, f"line 2: {key}"
        )
        for key, values in {
            "task": (None, 5, ["mmlu"]),
            "acc": (None, "1", 2, -1, float("nan"), True),
            "chosen": (-1, 4, "A", 1.5),
            "target": (-1, 4, "A"),
            "hash": (None, [], 1.5),
        }.items()
        for value in values
    ),
    *(
        rows("questions", f"a task {task!r}", QUESTION | {"task": task}, "", may_succeed=True)
        for task in ("mmlu_of_nowhere", "cmmlu_", "mmlu", "hellaswag", "", SCRIPT, "../../x")
    ),
    *(
        rows("documents", f"lang {lang!r}", DOCUMENT | {"lang": lang}, "", may_succeed=True)
        for lang in ("", "zh-Hant", "ar", "a\nb", "\u202e", "\ud800", SCRIPT, "$\\bad{$", "x" * 999)
    ),
]


# ---- names

NAMES_REFUSED = {
    "leads out": "../b",
    "has a slash": "a/b",
    "has a backslash": "a\\b",
    "is a point": ".",
    "is two points": "..",
    "has a line break": "a\nb",
    "has an escape": "a\x1b[2J",
    "turns writing": "a\u202eb",
    "breaks lines of Unicode": "a\u2028b",
    "is long": "n" * 61,
}
NAMES_SHOWN = [
    "a$\\bad{$",
    "$x$",
    "<script>alert(1)</script>",
    'a"b',
    "a'b",
    "a_b^c",
    "模型",
    "نموذج",
]
NAMES_SHOWN = [name.replace("\\", "").replace("/", "") for name in NAMES_SHOWN]


def evaluation_called(name):
    return lambda here, run: linked(run / "evaluation/merged", here / name)


NAMES = [
    *(
        Case(
            f"the name of a model {how}",
            ["compare", f"base={OURS}", f"{name}=RUN/evaluation/merged", "--out", "o"],
            says="expected up to 60 characters that can be shown",
        )
        for how, name in NAMES_REFUSED.items()
    ),
    *(
        Case(
            f"a model called {name!r}",
            ["compare", f"base={OURS}", f"{name}=RUN/evaluation/merged", "--out", "o"],
            may_succeed=True,
            check=shown_without_script,
        )
        for name in NAMES_SHOWN
    ),
    *(
        Case(
            f"a folder called {name!r}",
            ["compare", OURS, name, "--out", "o"],
            make=evaluation_called(name),
            says="" if name.isprintable() else "give another as NAME=REF",
            may_succeed=True,
        )
        for name in ('a"b', "a'b", "a b", "a$b", "a\nb", "a\u202eb", "a<b>")
    ),
    Case(
        "compare writes over a file",
        f"compare base={OURS} b=RUN/evaluation/merged --out o",
        make=lambda here, run: write(here / "o", "mine"),
        says="o",
    ),
    Case(
        "compare.html is a folder",
        f"compare base={OURS} b=RUN/evaluation/merged --out o",
        make=lambda here, run: write(here / "o/compare.html/mine", "mine"),
        says="compare.html",
        leaves=("o",),
    ),
]


# ---- the report of a run


def in_run(path, content):
    "A copy of the run in which a file has other content"

    def make(here, run):
        linked(run, here / "r")
        file = here / "r" / path
        (write if isinstance(content, str | bytes) else write_json)(file, content)
        (here / "r/report.json").unlink()

    return make


def reported(name, path, content, says="", **more):
    return Case(
        f"report: {name}",
        "report r",
        make=in_run(path, content),
        says=says,
        changes=("r/report.html", "r/report.json"),
        leaves=("r/report.json",),
        **more,
    )


def one_script(here, run):
    page = text_of(here, "r/report.html")
    assert page.count("<script") == 1 and "window.ran = 1</script>" not in page
    assert not re.search(r"<[^>]*(onerror|onload)=", page)


def shown(name, path, content):
    "A report that is made all the same, and runs nothing"
    return reported(name, path, content, may_succeed=True, check=one_script)


SVG = '<svg xmlns="http://www.w3.org/2000/svg" onload="window.ran = 1">{}</svg>'
TALK = dict(model="chat", prompt=SCRIPT, text=f"```\n# x\n{SCRIPT}\n| a | b |", stop="end")
ROUTER = dict(before=dict(zh=[[0.5, 0.5]]), after=dict(zh=[[0.5, 0.5]]))
WRONG = {"a list": [1], "a number": 5, "null": None, "text": "x", "an object of lists": {"a": []}}


def everything(here, run):
    "A run in which whatever is shown is somebody's script, at once"
    linked(run, here / "r")
    write(here / "r/search/curve.svg", SVG.format(SCRIPT))
    talks = [
        TALK,
        TALK | {"text": "\ud800"},
        TALK | {"text": "سلام \u202e"},
        TALK | {"model": SCRIPT, "prompt": "\u2028"},
    ]
    write(here / "r/samples/samples.jsonl", "\n".join(map(json.dumps, talks)))
    write_json(here / "r/evaluation" / SCRIPT.replace("/", "") / "results.json", LM_EVAL)
    loads = {SCRIPT: [[1]], "": [[1]], "$\\bad{$": [[1]], "zh-Hant": [[1]]}
    write_json(here / "r/adapter/router.json", dict(before=loads, after=loads))
    write(here / "r/report.json", "[]")


REPORTS = [
    Case(
        "report: a script in everything",
        "report r",
        make=everything,
        may_succeed=True,
        changes=("r/report.html", "r/report.json"),
        check=one_script,
    ),
    shown("a drawing that is none", "search/curve.svg", b"\xff\x00</figure>"),
    shown("metadata without end", "search/curve.svg", "<svg " + "<metadata>" * 600_000),
    *(
        reported(f"samples: {k}", "samples/samples.jsonl", json.dumps(v), "samples.jsonl line 1: ")
        for k, v in {**WRONG, "a text of null": TALK | {"text": None}}.items()
    ),
    *(
        reported(
            f"results: {k}", "evaluation/base/results.json", results(v), "results.json: results"
        )
        for k, v in WRONG.items()
    ),
    *(
        reported(f"router: {k}", "adapter/router.json", v, "router.json: ")
        for k, v in {
            "a list": [1],
            "text": dict(before="x"),
            "no layers": dict(before=dict(zh=[])),
            "no experts": dict(before=dict(zh=[[]])),
            "layers of other lengths": dict(before=dict(zh=[[0.5, 0.5], [1.0]])),
            "shares above 1": dict(before=dict(zh=[[2.0]])),
            "shares that are NaN": dict(after=dict(zh=[[float("nan")]])),
            "shares that are text": dict(after=dict(zh=[["0.5"]])),
        }.items()
    ),
    *(
        reported(f"efficiency: {k}", "efficiency/efficiency.json", v, "efficiency.json: ")
        for k, v in {
            "a list": [1],
            "no tokens": dict(speed=[], writing={}),
            "tokens of text": dict(tokens="x", speed=[], writing={}),
            "a row of nothing": dict(tokens=[{}], speed=[], writing={}),
            "speed of text": dict(
                tokens=[], speed=[dict(tokenizer="a", form="b", encode="c", decode=1)], writing={}
            ),
            "writing of a list": dict(tokens=[], speed=[], writing=[1]),
        }.items()
    ),
    *(
        reported(f"log: {k}", "adapter/log.jsonl", v, "log.jsonl line 1: ")
        for k, v in {
            "a list": "[1]",
            "no step": '{"loss": 1}',
            "a step of text": '{"step": "a"}',
            "a loss of text": '{"step": 1, "loss": "low"}',
            "a loss that is NaN": '{"step": 1, "loss": NaN}',
            "a loss of 400 digits": '{"step": 1, "loss": 1' + "0" * 400 + "}",
            "cut off": '{"step": 1, "lo',
        }.items()
    ),
]


# ---- the report that is there, and the card


def with_old(value):
    def make(here, run):
        linked(run, here / "r")
        write(here / "r/report.json", value)

    return make


def with_recipe(change):
    "A copy of the run whose recipe is changed; the card reads what it says"

    def make(here, run):
        linked(run, here / "r")
        recipe = text_of(here, "r/recipe.toml")
        write(here / "r/recipe.toml", change(recipe))

    return make


def with_manifest(folder, **values):
    def make(here, run):
        linked(run, here / "r")
        changed_json(here / "r" / folder / "manifest.json", **values)

    return make


def harmless_card(here, run):
    "No HTML, no heading, no fence that somebody's words have made"
    card = text_of(here, "c.md")
    body = card.split("\n---\n", 1)[1]
    assert "<script" not in body and "<img" not in body and "```" not in body
    assert "\n# x" not in body and body.count("\n# ") == 1


ABOUT = json.dumps(f"```\n# x\n{SCRIPT}\n| a |")
OLD = [
    Case(
        f"report: the old report.json is {how}",
        "report r",
        make=with_old(value),
        may_succeed=True,
        changes=("r/report.html", "r/report.json"),
        check=one_script,
    )
    for how, value in {"of another form": '{"made_from": [1]}', "no UTF-8": b"\xff"}.items()
]
UNCHANGED = with_recipe(str)
WORDS = ("--name", f"a/{SCRIPT}\n# x", "--licence", "mit\n---\n# x")
CARDS = [
    Case(
        "card: what it is about, its name and its licence",
        ["card", "r", "--model", "base", "--out", "c.md", *WORDS],
        make=with_recipe(lambda text: f"about = {ABOUT}\n{text}"),
        may_succeed=True,
        leaves=("c.md",),
        check=harmless_card,
    ),
    Case(
        "card: a model that leads out",
        "card r --model ../../etc",
        make=UNCHANGED,
        says="unknown model",
    ),
    Case(
        "card: a model of the chain that has no card",
        "card r --model adapter",
        make=UNCHANGED,
        says="expected one of base, model, merged, chat",
    ),
    Case(
        "report: counts of a corpus that are text",
        "report r",
        make=with_manifest("corpus", stats={"zh": "x"}),
        says="corpus/manifest.json: stats.zh is 'x', expected an object",
    ),
    Case(
        "report: a corpus without counts of training",
        "report r",
        make=with_manifest("corpus", stats={"zh": {}}),
        says="stats.zh has no 'train'",
    ),
    Case(
        "report: a tokenizer without counts",
        "report r",
        make=with_manifest("tokenizer", stats={}),
        says="tokenizer/manifest.json: stats has no 'n_base'",
    ),
    Case(
        "report: seconds of text",
        "report r",
        make=with_manifest("adapter", seconds="long"),
        says="manifest.json",
    ),
    Case("card: no run", "card nowhere", says="nowhere does not exist"),
    Case("report: no run", "report nowhere", says="nowhere does not exist"),
    Case(
        "report: a run without a recipe",
        "report r",
        make=lambda here, run: (here / "r").mkdir(),
        says="r is not a run (no recipe.toml)",
    ),
]

CASES = [*FILES, *ROWS, *NAMES, *REPORTS, *OLD, *CARDS]
