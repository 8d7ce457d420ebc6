"Conversations, options of fine-tuning, and chat templates that came with a model."

import gzip
import json

from hostile import Case, code, linked, write

GOOD = json.dumps(
    dict(messages=[dict(role="user", content="hi"), dict(role="assistant", content="Hello!")])
)
QUICK = (
    "--steps 1 --batch 1 --accumulation 1 --rank 2 --length 64 --valid-share 0 --bpe-dropout 0 "
    "--no-load-in-4bit --device cpu"
)
SFT = f"sft --model RUN/merged --out o --conversations talks.jsonl {QUICK}"
GZ = SFT.replace("talks.jsonl", "talks.jsonl.gz")


def talks(*lines, name="talks.jsonl"):
    "What writes a file of conversations"
    parts = [line if isinstance(line, bytes) else line.encode("utf-8", "replace") for line in lines]
    return lambda here, run: write(here / name, b"\n".join(parts) + b"\n")


def turns(*contents, **more):
    "A line of OpenAI's form, in which user and assistant take turns"
    said = [
        dict(role=("user", "assistant")[k % 2], content=content)
        for k, content in enumerate(contents)
    ]
    return json.dumps(dict(messages=said) | more)


def alpaca(**fields):
    return json.dumps(dict(instruction="a", output="b") | fields)


LINES = {  # a line that is no conversation -> the reason
    b'{"messages": [': "invalid JSON",
    b"{'messages': []}": "invalid JSON",
    b'{"messages": NaN': "invalid JSON",
    b'{"a": ' + b"[" * 200_000: "invalid JSON",
    b'{"a": ' + b'{"a":' * 200_000: "invalid JSON",
    b'{"a": ' + b"9" * 5000 + b"}": "invalid JSON",
    b'{"a": 1e999}': "unknown form",
    b"\xff\xfe{\x00}\x00": "invalid UTF-8",
    b"\x00\x00\x00": "invalid JSON",
    b"\xef\xbb\xbf": "invalid JSON",
    b"null": "not an object",
    b'"text"': "not an object",
    b"3": "not an object",
    b"{}": "unknown form",
    b'{"messages": null, "conversations": []}': "unknown form",
    b'{"messages": 5}': "turns that are no list of objects",
    b'{"messages": {"role": "user"}}': "turns that are no list of objects",
    b'{"messages": [[]]}': "turns that are no list of objects",
    b'{"messages": ["hi"]}': "turns that are no list of objects",
    b'{"messages": [{}]}': "unknown role",
    b'{"messages": [{"role": null}]}': "unknown role",
    b'{"messages": [{"role": ["user"], "content": "a"}]}': "unknown role",
    b'{"messages": [{"role": {}, "content": "a"}]}': "unknown role",
    b'{"messages": [{"role": "\\ud800", "content": "a"}]}': "unknown role",
    b'{"messages": [{"role": "a\\nStageError: b", "content": "a"}]}': "unknown role",
    b'{"messages": [{"role": "' + b"r" * 10**6 + b'", "content": "a"}]}': "unknown role",
    b'{"messages": [{"from": 5, "value": "a"}]}': "unknown role",
    turns(5, "a").encode(): "content that is no text",
    turns({"text": "a"}, "a").encode(): "content that is no text",
    turns([{"text": 5}], "a").encode(): "content that is no text",
    turns([["a"]], "a").encode(): "content that is no text",
    turns("a", True).encode(): "content that is no text",
    turns("a", None).encode(): "empty answer",
    turns("a", "").encode(): "empty answer",
    turns("a", "\u3000\u2003").encode(): "empty answer",
    turns("", "a").encode(): "empty turn of user",
    turns("\ud800", "a").encode(): "half a character",
    turns("a", "\udfff").encode(): "half a character",
    turns("a", "x" * 10_000_000).encode(): "more than 1,000,000 characters",
    turns(*["abcd"] * 300_000).encode(): "more than 1,000,000 characters",
    turns("x" * 20_000_000, "a").encode(): "longer than 16 MB",
    turns("a").encode(): "no answer",
    alpaca(history=5).encode(): "history that is no list of pairs",
    alpaca(history={"a": 1}).encode(): "history that is no list of pairs",
    alpaca(history=[["a"]]).encode(): "history that is no list of pairs",
    alpaca(history=[["a", 5]]).encode(): "content that is no text",
    alpaca(instruction=5).encode(): "content that is no text",
    alpaca(instruction=None).encode(): "empty turn of user",
    alpaca(output=["b"]).encode(): "content that is no text",
    alpaca(system=["b"]).encode(): "content that is no text",
    alpaca(input={}).encode(): "content that is no text",
}


def bad_lines(first, n=6):
    "Some of the lines, each of which is told with its number"
    some = list(LINES.items())[first : first + n]
    told = [f"talks.jsonl:{k}: {reason}" for k, (_, reason) in enumerate(some, 2)]
    return Case(
        f"bad lines {first} to {first + len(some) - 1}, {some[0][0][:40]!r} and others",
        f"{SFT} --on-error stop",
        make=talks(GOOD, *[line for line, _ in some]),
        says=tuple(told),
    )


BAD_LINES = [bad_lines(first) for first in range(0, len(LINES), 6)]


def bomb(here, run):
    "A few kilobytes that hold a line of a gigabyte"
    with gzip.open(here / "talks.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"messages": "')
        for _ in range(100):
            file.write(b"x" * 10**7)


def cut_short(here, run):
    packed = gzip.compress("\n".join([GOOD] * 1000).encode())
    write(here / "talks.jsonl.gz", packed[: len(packed) // 2])


FILES = [
    Case(
        "good lines among all that is bad",
        SFT,
        make=talks(GOOD, *[line for line in LINES if len(line) < 10**6], turns("a", "\x00b\ufeff")),
        may_succeed=True,
    ),
    Case("only bad lines", SFT, make=talks(*LINES), says="no conversation left to train on"),
    Case("brackets without end", SFT, make=talks("[" * 10**6), says="too deep"),
    Case("a list that is cut off", SFT, make=talks(f"[{GOOD},"), says="not valid JSON"),
    Case("two lists", SFT, make=talks(f"[{GOOD}]", f"[{GOOD}]"), says="more after the end"),
    Case("a list of lists", SFT, make=talks(f"[[{GOOD}]]"), says="not an object"),
    Case("an empty list", SFT, make=talks("[]"), says="no conversation left"),
    Case("an empty file", SFT, make=talks(""), says="no conversation left"),
    Case("UTF-16", SFT, make=talks(GOOD.encode("utf-16")), says="invalid"),
    Case("no gzip", GZ, make=talks(GOOD, name="talks.jsonl.gz"), says="cannot be read"),
    Case("a gzip that is cut short", GZ, make=cut_short, says="cannot be read"),
    Case("a line of 1 GB", GZ, make=bomb, says=("talks.jsonl.gz", "MB")),
    Case(
        "a folder called talks.jsonl",
        SFT,
        make=lambda here, run: (here / "talks.jsonl").mkdir(),
        says="no such file",
    ),
    Case(
        "a link to itself",
        SFT,
        make=lambda here, run: (here / "talks.jsonl").symlink_to("talks.jsonl"),
        says="no such file",
    ),
    Case("a device", SFT.replace("talks.jsonl", "/dev/zero"), says="no such file"),
    Case("no file", SFT, says="talks.jsonl: no such file"),
    Case("builtin of another name", SFT.replace("talks.jsonl", "builtin:x"), says="no such file"),
    Case("a name with NUL", [*SFT.split()[:5], "--conversations", "a\0b"], says="no such file"),
    Case("a name of 5,000 letters", SFT.replace("talks", "t" * 5000), says="no such file"),
    Case(
        "nothing ships in Khmer",
        "sft --model RUN/merged --out o --lang km --kept en",
        says=("no conversations in Khmer (km) ship", "--conversations FILE"),
    ),
    Case(
        "a language that does not exist",
        ["sft", "--model", "RUN/merged", "--out", "o", "--lang", "../../x\n\x1b[31m"],
        says="no conversations in",
    ),
    Case("kept alone", "sft --model RUN/merged --out o --kept en", says="kept is given without"),
]

VALUES = {
    "length": ("2", "15", "-1", "0"),
    "warmup": ("-1",),
    "lr": ("0", "-1"),
    "rows-lr": ("-1",),
    "eval-every": ("0", "-1"),
    "save-every": ("0", "-1"),
    "log-every": ("0", "-1"),
    "batch": ("0", "-1"),
    "accumulation": ("0",),
    "rank": ("0", "-1"),
    "alpha": ("0", "-1"),
    "dropout": ("-0.1", "1"),
    "bpe-dropout": ("-0.1", "1"),
    "neftune": ("-1",),
    "aux": ("-1",),
    "steps": ("-1",),
    "epochs": ("0", "-1"),
    "valid-share": ("-0.1", "1"),
    "n-translations": ("-1",),
    "seed": ("-1", "4294967296"),
    "rows": ("new", "''"),
    "template": ("alpaca", "../huozi"),
    "on-error": ("ignore",),
}
OPTIONS = [
    Case(
        f"sft --{option} {value}",
        f"sft --model RUN/merged --out o --{option}={value}",
        says=f"{option.replace('-', '_')} is ",
    )
    for option, values in VALUES.items()
    for value in values
]

RECIPE = """
name = "late"
[corpus]
sources = ["zh=builtin:zh", "en=builtin:en"]
[tokenizer]
[vocab]
[base]
[init]
[pack]
[pretrain]
[merge]
[sft]
{}
"""


def recipe(line):
    return lambda here, run: write(here / "late.toml", RECIPE.format(line))


RECIPES = [
    Case(
        f"a recipe with [sft] {line}",
        "run late.toml --out o",
        make=recipe(line),
        says=says,
    )
    for line, says in {
        "length = 2": "length is 2, expected at least 16",
        "seed = 4294967296": "seed is 4294967296",
        "warmup = nan": "expected float",
        'template = "alpaca"': "template is 'alpaca', expected huozi or chatml",
        'conversations = ["none.jsonl"]': "none.jsonl: no such file",
        'conversations = [["none.jsonl"]]': "expected list of str",
    }.items()
]


def template(text, file="chat_template.jinja"):
    "What makes a copy of the chat model with another template"

    def make(here, run):
        model = linked(run / "chat", here / "bad")
        write(model / file, text)
        (model / "manifest.json").unlink()  # which knows the size of the file

    return make


ASKED = "{{ bos_token }}{% for m in messages %}{{ m.content WORDS }}{% endfor %}"
PYTHON = "().__class__.__base__.__subclasses__()"
TEMPLATES = {
    "{% for a in range(9999) %}" * 4 + "{% set b = a %}" + "{% endfor %}" * 4: "more than 5 s",
    "{{ 10 ** (10 ** 10) }}": "more than 5 s",
    "{{ ('x' * 10**10) | length }}": "MemoryError",
    "{{ '%10000000000d' % 1 }}": "MemoryError",
    "{{ 'x' | center(10 ** 10) }}": "MemoryError",
    "{{ 'x' * 20000000 }}": "20,000,000 characters",
    "{{ [1] * 10 ** 10 }}": "MemoryError",
    "{{ range(10 ** 9) | list }}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "recursion",
    "{{ " + PYTHON + " }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ lipsum.__globals__['os'].system('x') }}": "does not render",
    "{% include '/etc/passwd' %}": "does not render",
    "{% import 'os' as os %}{{ os }}": "does not render",
    "{{ messages[": "does not render",
    "{{ messages[0]['content'] + 1 }}": "does not render",
    "{{ messages[5].content.x.y }}": "does not render",
    "{{ raise_exception('a\nStageError: b\x1b[31m') }}": "does not render",
    "{{ raise_exception('x' * 100000) }}": "does not render",
    "hello": "leaves them out",
    "\x00": "leaves them out",
    **{
        ASKED.replace("WORDS", words): "changes the words"
        for words in (
            "| upper",
            "[1:-1]",
            "[:5]",
            "| reverse",
            "| length",
            "| title",
            "| urlencode",
        )
    },
}
CHATS = [
    Case(
        f"chat template {k}, {text[:40]!r}",
        "generate --models m=bad --prompts hi --max-new-tokens 2 --device cpu --out o",
        make=template(text),
        says=("chat template", says),
    )
    for k, (text, says) in enumerate(TEMPLATES.items())
]
TALKS = [
    Case(
        "chat with a template that shouts",
        "chat --model bad --device cpu",
        make=template(ASKED.replace("WORDS", "| upper")),
        says="changes the words",
        stdin="hi\n",
    ),
    Case(
        "a template that opens a file",
        "generate --models m=bad --prompts hi --max-new-tokens 2 --device cpu --out o",
        make=lambda here, run: (
            template("{{ cycler.__init__.__globals__.os.popen('python evil.py').read() }}")(
                here, run
            ),
            write(here / "evil.py", code(here)),
        ),
        says="does not render",
    ),
]
CASES = [*BAD_LINES, *FILES, *OPTIONS, *RECIPES, *CHATS, *TALKS]
