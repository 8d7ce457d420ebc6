"Folders of stages: foreign, broken, tampered with, busy, inside each other, where none can be."

import json
import os
from pathlib import Path

from hostile import Case, changed_json, code, linked, sparse, write, write_json

CORPUS = "corpus --sources zh=builtin:zh --valid-share 0.2 --limit-chars 20000 --out o"

# ---- what may stand in place of a manifest.json or a request.json

ENTRY = {"bytes": 1, "sha256": "ab"}
CIRCLE = "a link that leads to itself"
JSON: dict[str, object] = {
    "a list": [],
    "null": None,
    "a number": 3,
    "a text": "manifest",
    "true": True,
    "an empty table": {},
    "another tool's": {"manifest_version": 3, "name": "extension", "version": "1.0"},
    "a kind and nothing else": {"kind": "corpus"},
    "a kind that is a list": {"kind": ["corpus"], "files": {}},
    "a kind of two lines": {"kind": "corpus\nStageError: all is well", "files": {}},
    "a kind of a million letters": {"kind": "c" * 10**6, "files": {}},
    "a kind in colour": {"kind": "\x1b[31mcorpus", "files": {}},
    "files as a list": {"kind": "corpus", "files": []},
    "files as null": {"kind": "corpus", "files": None},
    "a file that is a text": {"kind": "corpus", "files": {"a": "ab"}},
    "a file without a hash": {"kind": "corpus", "files": {"a": {"bytes": 1}}},
    "a file of -1 bytes": {"kind": "corpus", "files": {"a": {**ENTRY, "bytes": -1}}},
    "a file of true bytes": {"kind": "corpus", "files": {"a": {**ENTRY, "bytes": True}}},
    "a file of 1.5 bytes": {"kind": "corpus", "files": {"a": {**ENTRY, "bytes": 1.5}}},
    "a file outside": {"kind": "corpus", "files": {"../../neighbour": ENTRY}},
    "a file at the root": {"kind": "corpus", "files": {"/etc/passwd": ENTRY}},
    "a file called ''": {"kind": "corpus", "files": {"": ENTRY}},
    "a file called '.'": {"kind": "corpus", "files": {".": ENTRY}},
    "a file with NUL": {"kind": "corpus", "files": {"a\0b": ENTRY}},
    "a file with a long name": {"kind": "corpus", "files": {"a" * 5000: ENTRY}},
    "a file that is not there": {"kind": "corpus", "files": {"none": ENTRY}},
    "half a character": {"kind": "corpus", "files": {"\ud800": ENTRY}},
    "params as a list": {"kind": "corpus", "files": {}, "params": []},
    "stats as null": {"kind": "corpus", "files": {}, "stats": None},
    "inputs as a list": {"kind": "corpus", "files": {}, "inputs": ["a"]},
    "an input that is a text": {"kind": "corpus", "files": {}, "inputs": {"a": "b"}},
    "a tokenizer that is a number": {"kind": "corpus", "files": {}, "tokenizer": 7},
    "a key that is a table": {"kind": "corpus", "files": {}, "key": {}},
    "a fingerprint that is null": {"kind": "corpus", "files": {}, "fingerprint": None},
    "a schema of true": {"kind": "corpus", "files": {}, "schema": True},
}
RAW: dict[str, str | bytes] = {
    "nothing": "",
    "half a table": '{"kind": "corp',
    "brackets, 100,000 deep": "[" * 100_000 + "]" * 100_000,
    "tables, 100,000 deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "UTF-16": '{"kind": "corpus"}'.encode("utf-16"),
    "bytes": bytes(range(256)),
    "a byte-order mark": b"\xef\xbb\xbf{}",
    "NaN": "NaN",
    "a number of 10,000 digits": "9" * 10_000,
    "the same key twice": '{"kind": 1, "kind": 2}',
    "HTML": "<!doctype html><script>alert(1)</script>",
    "a pickle": b"\x80\x04cposix\nsystem\n.",
}


def put(path: Path, name: str) -> None:
    "One of the above, in place of a file"
    if name in JSON:
        write(path, json.dumps(JSON[name]))
    elif name in RAW:
        write(path, RAW[name])
    else:
        odd_path(path, name)


ODD = ["300 MB of blanks", "a folder", CIRCLE, "a link outside", "a pipe"]


def odd_path(path: Path, name: str) -> None:
    "What is no usual file"
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "300 MB of blanks":
        sparse(path, 300_000_000)
    elif name == "a folder":
        path.mkdir()
    elif name == CIRCLE:
        path.symlink_to(path.name)
    elif name == "a link outside":
        path.symlink_to("/proc/self/environ")
    else:
        os.mkfifo(path)


ALL = [*JSON, *RAW, *ODD]

# ---- every command that is given a folder

FOLDERS = {  # command -> folder of the micro run that BAD stands for
    "tokenizer --corpus BAD --out o": "corpus",
    "search --pieces BAD --corpus RUN/corpus --out o": "pieces",
    "search --pieces RUN/pieces --corpus BAD --out o": "corpus",
    "vocab --pieces BAD --n-pieces 100 --out o": "pieces",
    "vocab --pieces RUN/pieces --search BAD --out o": "search",
    "vocab --pieces RUN/pieces --n-pieces 100 --corpus BAD --out o": "corpus",
    "base --corpus BAD --out o": "corpus",
    "init --model BAD --tokenizer RUN/tokenizer --out o": "base",
    "init --model RUN/base --tokenizer BAD --out o": "tokenizer",
    "pack --corpus BAD --tokenizer RUN/tokenizer --out o": "corpus",
    "pack --corpus RUN/corpus --tokenizer BAD --out o": "tokenizer",
    "pretrain --model BAD --tokens RUN/tokens --out o": "model",
    "pretrain --model RUN/model --tokens BAD --out o": "tokens",
    "pretrain --model RUN/model --tokens RUN/tokens --corpus BAD --out o": "corpus",
    "merge --model BAD --adapter RUN/adapter --out o": "model",
    "merge --model RUN/model --adapter BAD --out o": "adapter",
    "sft --model BAD --out o": "merged",
    "generate --models BAD --out o": "merged",
    "evaluate --model BAD --corpus RUN/corpus --out o": "merged",
    "evaluate --model RUN/merged --corpus BAD --out o": "corpus",
    "evaluate --model RUN/model --adapter BAD --corpus RUN/corpus --out o": "adapter",
    "efficiency --models BAD --corpus RUN/corpus --out o": "merged",
    "efficiency --models RUN/merged --corpus BAD --out o": "corpus",
}
READERS = {  # these may do without the manifest
    "export --model BAD --to hf --out o": "chat",
    "serve --model BAD": "chat",
    "card --model BAD --run RUN --out o.md": "chat",
    "compare BAD RUN/evaluation/merged --out o": "evaluation/base",
}
SOME = ["a list", "a number", "another tool's", "a file outside", "brackets, 100,000 deep"]


def spoilt(folder: str, name: str):
    "The folder of a stage with something else in place of its manifest"

    def make(here, run):
        linked(run / folder, here / "bad")
        put(here / "bad/manifest.json", name)

    return make


def broken_input(command: str, folder: str, name: str, **options) -> Case:
    called = command.split(" --out")[0].replace("RUN/", "")
    return Case(
        f"{called}: {name} as manifest",
        command.replace("BAD", "bad"),
        make=spoilt(folder, name),
        **options,
    )


INPUTS = [
    broken_input(command, folder, name, says="bad")
    for command, folder in FOLDERS.items()
    for name in SOME
]
INPUTS += [
    broken_input(command, folder, name, may_succeed=True, leaves=("o.md",))
    for command, folder in READERS.items()
    for name in SOME[:3]
]
SEARCH = (
    "search --pieces BAD --corpus RUN/corpus --chars 100 --totals 200 --limit-chars 5000 --out o"
)
PACK = "pack --corpus BAD --tokenizer RUN/tokenizer --out o"
# what is no file is no manifest: the folder is then one from elsewhere, and may be good for that
NO_FILE = ["a folder", "a pipe", CIRCLE]
INPUTS += [
    broken_input(PACK, "corpus", name, says="bad")
    for name in ALL
    if name not in SOME and name not in NO_FILE
]
INPUTS += [broken_input(SEARCH, "pieces", name, may_succeed=True) for name in NO_FILE]


# ---- a stage's folder whose numbers are not what they were


def changed_stats(folder: str):
    def make(here, run):
        stats = dict.fromkeys(["zh", "en", "n_tokens", "knee", "quantised", "n_old"], -1)
        changed_json(linked(run / folder, here / "bad") / "manifest.json", stats=stats)

    return make


STATS = [
    Case(
        f"{command.split(' --out')[0].replace('RUN/', '')}: stats that somebody changed",
        command.replace("BAD", "bad"),
        make=changed_stats(folder),
        says="checksum",
    )
    for command, folder in FOLDERS.items()
]


# ---- the folder that is to be written: not ours


def taken(name: str, where: str = "o"):
    "A folder with something for a manifest, and a letter in it"

    def make(here, run):
        put(here / where / "manifest.json", name)
        write(here / where / "letter", "dear")

    return make


OUTPUTS = [
    Case(f"out has {name} as manifest, {how or 'plain'}", f"{CORPUS} {how}", make=taken(name))
    for name in ALL
    for how in ("", "--force")
]


def with_manifest(**values):
    "The corpus of the micro run as `o`, its manifest changed, and a letter that it lists"

    def make(here, run):
        linked(run / "corpus", here / "o")
        write(here / "o/letter", "dear")
        changed_json(here / "o/manifest.json", **values)

    return make


TAMPERED: dict[str, dict] = {
    "another kind": dict(kind="model"),
    "another key": dict(key="0123456789abcdef"),
    "other params": dict(params={"valid_share": 0.9}),
    "other inputs": dict(inputs={"sources": {"path": "x", "fingerprint": "y"}}),
    "another fingerprint": dict(fingerprint="0123456789abcdef"),
    "other files": dict(files={"letter": {"bytes": 4, "sha256": "ab"}}),
    "no files": dict(files={}),
    "no schema": dict(schema=...),
    "no seconds": dict(seconds=...),
    "no versions": dict(versions=...),
    "seconds in words": dict(seconds="long"),
}
OUTPUTS += [
    Case(f"out has a manifest with {name}, --force", f"{CORPUS} --force", make=with_manifest(**v))
    for name, v in TAMPERED.items()
]


def keeps_letter(here, run):
    assert (here / "o.kept/letter").read_text() == "dear"
    assert not (here / "o/letter").exists()


def keeps_the_changed(here, run):
    assert (here / "o.kept/zh.valid.jsonl").read_text() == "by hand"


def changed_by_hand(here, run):
    linked(run / "corpus", here / "o")
    write(here / "o/zh.valid.jsonl", "by hand")


KEPT: dict = dict(may_succeed=True, leaves=("o", "o.kept"), changes=("o",))
OUTPUTS += [
    Case(
        "a user's file in a stage's folder is kept",
        f"{CORPUS} --force",
        make=with_manifest(),
        check=keeps_letter,
        **KEPT,
    ),
    Case(
        "a file that a user changed is kept",
        f"{CORPUS} --force",
        make=changed_by_hand,
        check=keeps_the_changed,
        **KEPT,
    ),
]


# ---- o.tmp: not ours


def temporary(path: str, content: str | bytes = "x"):
    return lambda here, run: write(here / path, content)


def mark(name: str):
    def make(here, run):
        put(here / "o.tmp/request.json", name)
        write(here / "o.tmp/precious", "x")

    return make


def link(target: str, path: str = "o.tmp"):
    def make(here, run):
        write(here / "else/precious", "x")
        (here / path).parent.mkdir(exist_ok=True)
        (here / path).symlink_to(target)

    return make


OURS = {"key": "0123456789abcdef", "pid": 1, "host": "here"}
MARKS = {
    "a key in capitals": {**OURS, "key": "0123456789ABCDEF"},
    "a key that is a list": {**OURS, "key": []},
    "a pid of true": {**OURS, "pid": True},
    "a pid of 1.0": {**OURS, "pid": 1.0},
    "a pid in words": {**OURS, "pid": "1"},
    "no host": {"key": OURS["key"], "pid": 1},
    "a host of null": {**OURS, "host": None},
    "one word more": {**OURS, "url": "http://example.com"},
    "a request that is a list": {**OURS, "asked": []},
    "a request of another key": {
        **OURS,
        "asked": {"kind": "corpus", "schema": 1, "params": {}, "inputs": {}},
    },
}


def odd_mark(value):
    def make(here, run):
        write_json(here / "o.tmp/request.json", value)
        write(here / "o.tmp/precious", "x")

    return make


MERGE = "merge --model RUN/model --adapter RUN/adapter --out o"
TEMPORARY = [
    Case(
        "o.tmp holds a letter", f"{CORPUS} --force", make=temporary("o.tmp/precious"), says="o.tmp"
    ),
    Case("o.tmp holds a letter, resumable", MERGE, make=temporary("o.tmp/precious"), says="o.tmp"),
    Case(
        "o.tmp holds an empty folder", CORPUS, make=lambda h, r: (h / "o.tmp/a").mkdir(parents=True)
    ),
    Case("o.tmp is a file", CORPUS, make=temporary("o.tmp"), says="o.tmp is a file"),
    Case("o.tmp is an empty file", f"{CORPUS} --force", make=temporary("o.tmp", "")),
    Case("o.tmp is a link to a folder", CORPUS, make=link("else"), says="o.tmp is a link"),
    Case("o.tmp is a link to nothing", CORPUS, make=link("none"), says="o.tmp is a link"),
    Case("o.tmp is a link to itself", CORPUS, make=link("o.tmp"), says="o.tmp is a link"),
    Case("o.tmp is a link to the root", f"{CORPUS} --force", make=link("/"), says="is a link"),
    Case("o.tmp is a pipe", CORPUS, make=lambda here, run: os.mkfifo(here / "o.tmp")),
    Case(
        "request.json is a link to a file of mine",
        CORPUS,
        make=link("../else/precious", "o.tmp/request.json"),
        says="request.json",
    ),
]
TEMPORARY += [
    Case(f"o.tmp with {name} as request", f"{CORPUS} --force", make=mark(name), says="o.tmp")
    for name in ALL
]
TEMPORARY += [
    Case(f"o.tmp whose request has {name}", CORPUS, make=odd_mark(value), says="o.tmp")
    for name, value in MARKS.items()
]


def died(here, run):
    "What a stage left that was killed; its number is now that of the first process of all"
    write_json(here / "o.tmp/request.json", OURS)
    write(here / "o.tmp/half", "x")


OURS_GOES: dict = dict(make=died, may_succeed=True, changes=("o.tmp",))
TEMPORARY += [
    Case("a lock of a number that another process has", CORPUS, **OURS_GOES),
    Case("the same, resumable", MERGE, **OURS_GOES),
    Case(
        "o.tmp is empty",
        CORPUS,
        make=lambda h, r: (h / "o.tmp").mkdir(),
        may_succeed=True,
        changes=("o.tmp",),
    ),
]

# ---- places


def texts(here, run):
    write(here / "in/a.txt", "扩充词表之后，模型读得更快。\n\n" * 200)


def folder_and_link(here, run):
    texts(here, run)
    (here / "other").symlink_to("in")


def inside_o(here, run):
    linked(run / "corpus", here / "o")


FROM_IN = "corpus --sources zh=in --valid-share 0.2"
PLACES = [
    Case("out inside a source", f"{FROM_IN} --out in/o", make=texts, says="lies in"),
    Case(
        "out deep inside a source",
        f"{FROM_IN} --out in/a/b/o",
        make=texts,
        says="lies in",
        leaves=("in/a",),
    ),
    Case(
        "out inside a source by a link",
        f"{FROM_IN} --out other/o",
        make=folder_and_link,
        says="lies in",
    ),
    Case("out is the source", f"{FROM_IN} --out in --force", make=texts, says="in"),
    Case(
        "out is the source, with dots",
        f"{FROM_IN} --out in/../in --force",
        make=texts,
        says="in",
    ),
    Case(
        "the source is here, and out too",
        "corpus --sources zh=. --out o",
        make=texts,
        says="lies in",
    ),
    Case("the source is the root", "corpus --sources zh=/ --out o", says=""),
    Case(
        "a source inside out",
        "corpus --sources zh=o/zh.train.jsonl --out o --force",
        make=inside_o,
        says="lies in",
    ),
    Case(
        "a source inside o.tmp",
        "corpus --sources zh=o.tmp/a.txt --out o",
        make=temporary("o.tmp/a.txt"),
        says="o",
    ),
    Case(
        "the second source is the folder",
        "corpus --sources zh=builtin:zh en=in --out in/o",
        make=texts,
        says="lies in",
    ),
    Case(
        "a model inside out",
        "init --model o/base --tokenizer RUN/tokenizer --out o",
        make=lambda h, r: linked(r / "base", h / "o/base"),
        says="inside",
    ),
    Case(
        "out inside the model",
        "init --model m --tokenizer RUN/tokenizer --out m/o",
        make=lambda h, r: linked(r / "base", h / "m"),
        says="inside",
    ),
    Case(
        "out inside the adapter",
        "merge --model RUN/model --adapter a --out a/o",
        make=lambda h, r: linked(r / "adapter", h / "a"),
        says="inside",
    ),
    Case(
        "out is a model to compare",
        "generate --models m --out m",
        make=lambda h, r: linked(r / "base", h / "m"),
        says="the same",
    ),
    Case(
        "out is the corpus",
        "tokenizer --corpus c --out c --force",
        make=lambda h, r: linked(r / "corpus", h / "c"),
        says="the same",
    ),
]
PLACES += [
    Case(f"--out {name}", [*CORPUS.split()[:-1], out], make=make, says=says)
    for name, out, make, says in [
        ("of no letters", "", None, "--out is '.'"),
        ("is a dot", ".", None, "--out is '.'"),
        ("is two dots", "..", None, "--out is '..'"),
        ("is the root", "/", None, "--out is '/'"),
        ("ends in two dots", "o/..", None, "--out is 'o/..'"),
        ("is a file", "o", temporary("o"), "not an artifact"),
        ("is below a file", "f/o", temporary("f"), "f"),
        ("is a device", "/dev/null", None, "/dev/null"),
        ("is below a device", "/dev/null/o", None, "/dev/null"),
        ("is where nothing can be", "/proc/o", None, "/proc"),
        ("is read-only", "/sys/o", None, "/sys"),
        ("has 300 letters", "o" * 300, None, "name too long"),
        ("has 252 letters, too many with .tmp", "o" * 252, None, "name too long"),
        ("is 5,000 letters deep", "o/" * 2500, None, "name too long"),
        ("is a link to nothing", "o", link("none", "o"), "leads to no folder"),
        ("is a link to itself", "o", link("o", "o"), "leads to no folder"),
        ("is a link to a file", "o", link("else/precious", "o"), "leads to no folder"),
        ("is below a link to itself", "l/o", link("l", "l"), "l"),
        ("is a link to a folder of mine", "o", link("else", "o"), "not an artifact"),
        ("is a pipe", "o", lambda here, run: os.mkfifo(here / "o"), "not an artifact"),
    ]
]
ODD_NAMES = {
    "a line break": "o\nStageError: x",
    "colours": "o\x1b[31m",
    "half a character": "o\udcff",
    "a turn to the left": "o\u202egnp",
    "blanks": " o ",
    "a quote": "o'\"$(touch x)`touch y`",
    "a percent sign": "o%s%d%n",
    "a brace": "o{0}{out}",
    "a dash first": "./-o",
    "an equals sign": "a=o",
    "a star": "o*?[a]",
}
PLACES += [
    Case(
        f"a name with {name}",
        [*CORPUS.split()[:-1], out],
        may_succeed=True,
        leaves=(os.path.normpath(out),),
    )
    for name, out in ODD_NAMES.items()
]
PLACES += [
    Case(f"a source with {name}", ["corpus", "--sources", f"zh={text}.txt", "--out", "o"])
    for name, text in ODD_NAMES.items()
]

# ---- a whole run over folders of strangers


def run_with(name: str, where: str):
    "A copy of the micro run, one of its manifests replaced, and a letter beside it"

    def make(here, run):
        linked(run, here / "r")
        write(here / "r" / where / "letter", "dear")
        put(here / "r" / where / "manifest.json", name)

    return make


RUN_FILES = ("r/recipe.toml",)
RUNS = [
    Case(
        f"a run over {name} as manifest of {where} {how}".strip(),
        f"run r/recipe.toml --out r --from {stage} --to {stage} {how}",
        make=run_with(name, where),
        says="manifest.json",
        changes=RUN_FILES,
    )
    for name in ("null", "another tool's", "files as a list", "half a table")
    for where, stage in (("corpus", "corpus"), ("adapter", "pretrain"))
    for how in ("", "--force")
]
RUNS += [
    Case(
        f"{command} of a run with {name} as manifest of {where}",
        f"{command} r" + " --out o.md" * (command == "card --run"),
        make=run_with(name, where),
        may_succeed=True,
        leaves=("o.md",),
        changes=("r/report.html", "r/report.json"),
    )
    for command in ("status", "report", "card --run")
    for name in ("null", "another tool's", "a file outside", "stats as null")
    for where in ("corpus", "search", "adapter", "evaluation/merged")
    if command != "status" or where in ("corpus", "search")  # the others import much
]


def evil(here, run):
    "Code in every place where a stage might look for some"
    write(here / "sitecustomize.py", code(here))
    write(here / "json.py", code(here))
    write(here / "cmixtral_nb/__init__.py", code(here))
    write(here / "conftest.py", code(here))


PLACES += [
    Case("modules lie where the command runs", "status none", make=evil, says="none", apart=True),
    Case(
        "modules in the model's folder",
        "init --model . --tokenizer RUN/tokenizer --out ../x",
        make=evil,
    ),
]

CASES = INPUTS + STATS + OUTPUTS + TEMPORARY + PLACES + RUNS
