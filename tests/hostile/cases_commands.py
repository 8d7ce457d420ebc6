"Odd calls: options out of all bounds, words that are no words, terminals and pipes that are odd."

import inspect

from hostile import Case, write

from cmixtral_nb.recipes import MODULES, anno_type, command

# ---- every number of every command, out of its bounds

CALLS = {  # a call that would be good
    "corpus": "--sources zh=builtin:zh --out o",
    "tokenizer": "--corpus RUN/corpus --out o",
    "search": "--pieces RUN/pieces --corpus RUN/corpus --out o",
    "vocab": "--pieces RUN/pieces --n-pieces 100 --out o",
    "base": "--corpus RUN/corpus --out o",
    "init": "--model RUN/base --tokenizer RUN/tokenizer --out o",
    "pack": "--corpus RUN/corpus --tokenizer RUN/tokenizer --out o",
    "pretrain": "--model RUN/model --tokens RUN/tokens --out o",
    "merge": "--model RUN/model --adapter RUN/adapter --out o",
    "sft": "--model RUN/merged --out o",
    "generate": "--models RUN/base --out o",
    "evaluate": "--model RUN/base --corpus RUN/corpus --out o",
    "efficiency": "--models RUN/base --corpus RUN/corpus --out o",
    "export": "--model RUN/chat --to hf --out o",
    "compare": "RUN/evaluation/base RUN/evaluation/merged --out o",
    "plan": "tiny",
    "serve": "--model RUN/chat",
    "chat": "--model RUN/chat",
    "page": "",
}


def numbers(name: str) -> list[tuple[str, type]]:
    "Options of a command that take numbers"
    found = []
    for key, param in inspect.signature(command(name)).parameters.items():
        typ = anno_type(param.annotation)
        typ = typ[0] if isinstance(typ, list) else typ
        if typ in (int, float) and not key.startswith("_"):
            found.append((key, typ))
    return found


def option(key: str) -> str:
    return "--" + key.replace("_", "-")


NUMBERS = [(name, key, typ) for name in CALLS for key, typ in numbers(name)]
BOUNDS = [
    Case(
        f"{name} {option(key)} {value}",
        f"{name} {CALLS[name]} {option(key)}={value}",
        says=(key.replace("_", "-"),) if value != "-7" else (),
    )
    for name, key, typ in NUMBERS
    for value in (("-7", "9" * 30) if typ is int else ("-7", "nan", "inf"))
]
BOUNDS += [
    Case(f"a number written as {text!r}", ["base", *CALLS["base"].split(), f"--steps={text}"])
    for text in ("", " ", "0x10", "1e3", "1.0", "ten", "-", "--", "1,000", "9" * 5000, "1/2")
]

# ---- words

WORDS = [
    Case("an unknown command", "mrege --model x", says="did you mean 'merge'"),
    Case("a command of no letters", ["", "x"], says="unknown command"),
    Case("a command with a line break", ["merge\nStageError: x"], says="unknown command"),
    Case("a command in colour", ["\x1b[31mmerge\x1b[0m"], says="\\x1b[31mmerge"),
    Case("a command of 100,000 letters", ["m" * 100_000], says="unknown command"),
    Case("a command of half a character", ["merge\udcff"], says="unknown command"),
    Case("a command with dots", ["../merge"], says="unknown command"),
    Case("a private name for a command", ["__class__"], says="unknown command"),
    Case("a module for a command", ["stages"], says="unknown command"),
    Case("an option of half a character", ["merge", "--\udcff"], says="cmixtral merge"),
    Case("an option in colour", ["merge", *CALLS["merge"].split(), "--\x1b[31m"], says="\\x1b"),
    Case("an option twice", f"base {CALLS['base']} --layers 2 --layers 0", says="layers"),
    Case("an option without its value", f"base {CALLS['base']} --layers", says="--layers"),
    Case("an option of another command", f"corpus {CALLS['corpus']} --adapter x", says="--adapter"),
    Case("a word too many", f"corpus {CALLS['corpus']} --force yes", says="yes"),
    Case("a switch with a value", f"corpus {CALLS['corpus']} --force=no", says="--force"),
    Case("two recipes", "run tiny tiny --out o", says="tiny"),
    Case("no out", "corpus --sources zh=builtin:zh", says="--out"),
    Case("nothing at all after merge", "merge", says="--model, --adapter, --out"),
    Case("a minus", "merge -", says="cmixtral merge"),
    Case("two minuses", "merge --", says="cmixtral merge"),
    Case(
        "10,000 models", ["generate", "--models", *["x"] * 10_000, "--out", "o"], says="two models"
    ),
    Case("a device that is none", f"pretrain {CALLS['pretrain']} --device=toaster", says="toaster"),
    Case("a card of many", f"pretrain {CALLS['pretrain']} --device=cuda:99", says="no GPU"),
    Case("an optimiser that is none", f"pretrain {CALLS['pretrain']} --optim=magic", says="magic"),
    Case("attention that is none", f"pretrain {CALLS['pretrain']} --attn=best", says="best"),
    Case("rows that are none", f"pretrain {CALLS['pretrain']} --rows=some", says="rows is 'some'"),
    Case("a task that is none", f"evaluate {CALLS['evaluate']} --tasks=magic", says="magic"),
    Case(
        "a language in colour",
        ["tokenizer", "--corpus", "RUN/corpus", "--lang", "\x1b[31m", "--out", "o"],
    ),
    Case(
        "a script that is none", f"tokenizer {CALLS['tokenizer']} --script=Klingon", says="Klingon"
    ),
]
REFS = {
    "no letters": "",
    "blanks": "  ",
    "a line break": "a\nb",
    "colours": "\x1b[31mx",
    "half a character": "\udcff",
    "300 letters": "m" * 300,
    "5,000 folders": "m/" * 2500,
    "a device": "/dev/zero",
    "another device": "/dev/null",
    "the root": "/",
    "a folder of the system": "/proc/self",
    "a home": "~nobody/model",
    "an address": "https://example.com/model",
    "a file's address": "file:///etc/passwd",
    "a way out": "../../../../etc",
    "an equals sign": "=",
    "a name and nothing": "x=",
    "code": "$(touch ran)`touch ran`;touch ran",
    "a hub id with three parts": "a/b/c",
}
REFERENCES = [
    Case(f"{what} --{name} is {form}", [*called, f"--{name}={ref}"])
    for what, name, called in [
        ("init", "model", ["init", "--tokenizer", "RUN/tokenizer", "--out", "o"]),
        ("init", "tokenizer", ["init", "--model", "RUN/base", "--out", "o"]),
        ("tokenizer", "corpus", ["tokenizer", "--out", "o"]),
        ("merge", "adapter", ["merge", "--model", "RUN/model", "--out", "o"]),
        ("generate", "models", ["generate", "--out", "o"]),
        ("export", "model", ["export", "--to", "hf", "--out", "o"]),
    ]
    for form, ref in REFS.items()
]
REFERENCES += [
    Case(f"{name} of {form}", [name, *option, ref], leaves=("README.md",))
    for name, option in [
        ("status", []),
        ("report", []),
        ("card", ["--run"]),
        ("run", []),
        ("plan", []),
    ]
    for form, ref in REFS.items()
    if ref or name not in ("run", "plan")
]

# ---- terminals, pipes, limits

AROUND = [
    Case(
        "a terminal of ASCII",
        "corpus --sources zh=没有.jsonl --out o",
        says="no such file",
        apart=True,
        env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"},
    ),
    Case(
        "an unknown locale",
        "status 没有",
        says="does not exist",
        apart=True,
        env={"LC_ALL": "xx_XX"},
    ),
    Case(
        "a home that is not there",
        "status x",
        says="x",
        apart=True,
        env={"HOME": "/none", "HF_HOME": "/none"},
    ),
    Case("no place for temporary files", "status x", says="x", apart=True, env={"TMPDIR": "/none"}),
    Case("a rank in words", f"corpus {CALLS['corpus']}", apart=True, env={"RANK": "first"}),
    Case("a world of many", f"corpus {CALLS['corpus']}", says="torchrun", env={"WORLD_SIZE": "4"}),
    Case("a world in words", f"corpus {CALLS['corpus']}", apart=True, env={"WORLD_SIZE": "all"}),
    Case(
        "a recipe in the environment",
        "run",
        says="o",
        apart=True,
        env={"PYTHONWARNINGS": "error"},
        make=lambda here, run: write(here / "runs", "o"),
    ),
]

CASES = BOUNDS + WORDS + REFERENCES + AROUND
assert set(CALLS) <= set(MODULES)
