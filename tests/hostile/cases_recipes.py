"Recipes that cannot be: files, names, values, languages, steps, and the values of late stages."

import os
import tomllib

from conftest import MICRO
from hostile import Case, linked, sparse, write

RUN = "run r.toml --out o"
SOURCES = '[corpus]\nsources = ["zh=builtin:zh", "en=builtin:en"]\n'


def file_case(name, content, says, command=RUN, **others):
    "A case whose recipe has this content"

    def make(here, run):
        write(here / "r.toml", content)

    return Case(f"recipe: {name}", command, make=make, says=says, **others)


def changed(table, line):
    "The micro recipe with one line more in a table; the table may be new"
    key = line.split(" = ")[0]
    head, found, rest = MICRO.partition(f"[{table}]\n")
    assert found, table
    body, mark, after = rest.partition("\n[")
    kept = [old for old in body.splitlines() if not old.startswith(f"{key} = ")]
    text = "\n".join([head + found + line, *kept]) + mark + after
    tomllib.loads(text)
    return text


# ---- the file

FILES = [
    ("is empty", "", "nothing to do"),
    ("has comments alone", "# nothing\n", "nothing to do"),
    ("has a name alone", 'name = "n"\n', "nothing to do"),
    ("is JSON", '{"corpus": {}}', "not valid TOML"),
    ("is YAML", "corpus:\n  sources: [a]\n", "not valid TOML"),
    ("is a picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not valid TOML"),
    ("is UTF-16", MICRO.encode("utf-16"), "save it as UTF-8"),
    ("is Latin-1", 'about = "é"\n'.encode("latin-1"), "save it as UTF-8"),
    ("ends inside a character", 'about = "é"'.encode()[:-2], "save it as UTF-8"),
    ("ends inside a string", 'about = "n', "not valid TOML"),
    ("holds NUL bytes", b"[corpus]\n\0\0", "not valid TOML"),
    ("has lines that end with CR alone", MICRO.replace("\n", "\r"), "not valid TOML"),
    ("begins with two byte-order marks", "\ufeff\ufeff" + MICRO, "not valid TOML"),
    ("begins with a byte-order mark", "\ufeff[corpsu]\n", "did you mean 'corpus'"),
    ("has a table twice", "[corpus]\n[corpus]\n", "not valid TOML"),
    ("has a key twice", "name = 'a'\nname = 'b'\n", "not valid TOML"),
    ("nests lists deeply", "kept = " + "[" * 10_000, "nested too deeply"),
    ("nests tables deeply", "corpus = " + "{a = " * 10_000, "nested too deeply"),
    ("nests by dots", f"corpus.{'a.' * 30_000}a = 1\n", "nested too deeply"),
    ("nests by dots outside of tables", f"{'b.' * 30_000}b = 1\n", "nested too deeply"),
    ("nests by dots and quotes", '"b" . ' * 10_000 + "b = 1\n", "nested too deeply"),
    ("is a word of 60,000 letters", "a" * 60_000, "not valid TOML"),
    ("is 30,000 quotation marks", '"' * 30_000, "not valid TOML"),
    ("has a number of 5,000 digits", "tokens = " + "9" * 5000, "not valid TOML"),
    ("has a hexadecimal number of 9,000 digits", "tokens = 0x" + "f" * 9000, "expected float"),
    ("has half of a surrogate pair", 'about = "\\ud800"\n', "not valid TOML"),
    ("is a megabyte of blanks", b" " * 2**20, "larger than"),
    ("is shell", "#!/bin/sh\nrm -rf ~\n", "not valid TOML"),
]


def folder(here, run):
    (here / "r.toml").mkdir()


def missing(here, run):
    (here / "r.toml").symlink_to("nowhere")


def loop(here, run):
    (here / "r.toml").symlink_to("r.toml")


def pipe(here, run):
    os.mkfifo(here / "r.toml")


def large(here, run):
    sparse(here / "r.toml", 40 * 10**9)


PLACES = [
    Case("recipe: is a folder", RUN, make=folder, says="r.toml: is a folder"),
    Case("recipe: is a link to nothing", RUN, make=missing, says="no such recipe"),
    Case("recipe: is a link to itself", RUN, make=loop, says="no such recipe"),
    Case("recipe: is a pipe", RUN, make=pipe, says="no such recipe"),
    Case("recipe: has 40 GB", RUN, make=large, says="larger than", apart=True),
    Case("recipe: /dev/zero", "run /dev/zero --out o", says="no such recipe"),
    Case("recipe: /etc/passwd", "run /etc/passwd --out o", says="/etc/passwd: not valid TOML"),
    Case("recipe: a shipped one by a path", "run ../recipes/tiny --out o", says="no such recipe"),
    Case("recipe: no name", ["run", "", "--out", "o"], says="no such recipe"),
    Case("recipe: a name of two lines", ["run", "a\nb", "--out", "o"], says="a\\nb: no such"),
    Case("recipe: a long name", ["run", "a" * 5000, "--out", "o"], says="no such recipe"),
    Case("recipe: a deep name", ["run", "a/" * 3000, "--out", "o"], says="no such recipe"),
    Case("recipe: a hub id", "run mistralai/Mixtral-8x7B-v0.1 --out o", says="no such recipe"),
    Case("recipe: of plan, missing", "plan none", says="none: no such recipe"),
]

# ---- names and other keys above the tables

NAMES = ["", ".", "..", "../../evil", "/tmp/evil", "a/b", "a\\\\b", "-rf", " ", ".git", "a ", "a."]
NAMES += ["a\\nb", "a\\u0000b", "\\u202eevil", "\\u001b[31mred", "n" * 101, "$(id)", "a;b", "*"]
TOP = [(f'name = "{name}"', "name = ") for name in NAMES]
TOP += [
    (line, f"{line.split(' = ')[0]} = ")
    for line in [
        "name = 5",
        "name = true",
        "name = 1979-05-27",
        'name = ["a"]',
        "name = {a = 1}",
        "about = 5",
        'about = "\\u0000"',
        "about = 07:32:00",
        'tokens = "many"',
        "tokens = true",
        "tokens = nan",
        "tokens = inf",
        "tokens = 1e999",
        "tokens = 9223372036854775808",
        "tokens = 1979-05-27T07:32:00Z",
        "language = 5",
        "language = {km = 1}",
        'language = ["zh"]',
        'kept = "en"',
        "kept = [5]",
        'kept = [["en"]]',
        "kept = {en = 1}",
    ]
]
TOP += [
    ("tokens = -1", "tokens is -1, expected above 0"),
    ("tokens = 0", "tokens is 0"),
    ('language = ""', "language names"),
    ('language = "Chinese"', 'such as "km"'),
    ('language = "../zh"', 'such as "km"'),
    ('language = "km"', "which no source has; the sources have zh, en"),
    ('kept = ["en", "en"]', "2 times"),
    ('kept = ["fr"]', "kept names 'fr', which no source has"),
    ('kept = ["en", "EN"]', "kept names"),
    ('language = "zh"\nkept = ["zh"]', "the new language"),
    ("stages = 3", "unknown key [stages]"),
    ('"a\\nb" = 1', "unknown key [a\\nb]"),
    ('"\\u001b[2J" = {}', "unknown table [\\u001b[2J]"),
    ("corpus = 5", "corpus = 5: expected a table [corpus]"),
    ("corpus = 1979-05-27", "expected a table [corpus]"),
    ("corpus = []", "corpus = []: expected a table [corpus]"),
    ('corpus = "zh=builtin:zh"', "expected a table [corpus]"),
    ("[[corpus]]\nsources = []", "expected a table [corpus]"),
    ("[report]", "unknown table [report]"),
    ("[chat]", "unknown table [chat]"),
    ("[run]", "unknown table [run]"),
]


def above(line):
    "The micro recipe with a line of its own above the tables"
    key = line.split(" = ")[0].split("\n")[0]
    text = MICRO.replace('name = "micro"\n', "")
    if "corpus" in line:
        before, _, rest = text.partition("[corpus]\n")
        text = before + rest[rest.index("[tokenizer]") :]
    return text + line if line.startswith("[") else f"{line}\n{text}" if key else text


# ---- values of tables

VALUES = [
    ("corpus", "sources = 5", "[corpus] sources = 5: expected list of str"),
    ("corpus", "sources = [5]", "expected list of str"),
    ("corpus", "sources = []", "no sources"),
    ("corpus", 'sources = ["zh"]', "expected LANG=REF"),
    ("corpus", 'sources = ["zh=none.jsonl"]', "none.jsonl: no such file"),
    ("corpus", 'sources = ["zh=~/texts.jsonl"]', '"~" is not expanded'),
    ("corpus", 'sources = ["zh=a\\u0000b"]', "NUL"),
    ("corpus", "sources = {zh = 'a'}", "expected list of str"),
    ("corpus", "limit_chars = -5", "limit_chars is -5"),
    ("corpus", "valid_share = 1.5", "valid_share is 1.5"),
    ("corpus", "valid_share = nan", "valid_share = NaN"),
    ("corpus", 'out = "here"', "leave it out, and give run --out DIR"),
    ("corpus", "force = true", "give run --force"),
    ("corpus", "min_chars = true", "min_chars = true: expected int"),
    ("corpus", '"a\\nb" = 1', "unknown key 'a\\nb'"),
    ("corpus", "seed.a = 1", "unknown key 'seed'"),
    ("tokenizer", "n_pieces = -1", "[tokenizer] n_pieces is -1, expected"),
    ("tokenizer", "n_chars = 5000", "more than all 4000 pieces"),
    ("tokenizer", "workers = 0", "workers is 0"),
    ("tokenizer", "max_chars = 100000", "max_chars is"),
    ("tokenizer", 'script = "Klingon"', "script 'Klingon' is unknown"),
    ("tokenizer", 'method = "unigram"', "method is 'unigram'"),
    ("tokenizer", 'lexicons = ["0.5:none.txt"]', "none.txt"),
    ("tokenizer", 'lang = "en"', "[tokenizer] lang is 'en'"),
    ("search", 'totals = ["many"]', "totals is ['many']"),
    ("search", 'chars = ["-1"]', "chars is ['-1']"),
    ("search", "budget = -1", "budget is -1"),
    ("search", 'domains = ["news"]', "expected NAME=REF"),
    ("search", 'domains = ["news=none.txt"]', "none.txt: no such file"),
    ("search", "min_saving = 2.0", "min_saving is 2.0"),
    ("search", 'base = "gemma"', "gemma"),
    ("vocab", 'tokens = ["<s>"]', "tokens: '<s>'"),
    ("vocab", "multiple = -1", "multiple is -1"),
    ("vocab", "multiple = 9223372036854775807", "multiple is"),
    ("vocab", "n_hostile = 0", "n_hostile is 0"),
    ("vocab", "n_pieces = 1e3", "n_pieces = 1000.0: expected int"),
    ("init", 'method = "best"', "method is 'best'"),
    ("init", 'model = "~/model"', '"~" is not expanded'),
    ("init", 'model = ""', 'model = "": expected'),
    ("init", "seed = 4294967296", "seed is 4294967296, expected 0 to 4,294,967,295"),
    ("init", "seeds = 0", "seeds is 0"),
    ("pack", "length = 4", "length is 4"),
    ("pack", 'mix = ["1:fr"]', "[pack] mix names 'fr', which no source has"),
    ("pack", 'mix = ["0:zh"]', "mix has '0:zh'"),
    ("pack", 'mix = ["1:zh", "zh"]', "mix names zh twice"),
    ("pack", "mix = []", "mix is empty"),
    ("pack", "valid_chars = -1", "valid_chars is -1"),
    ("pretrain", "lr = -1.0", "lr is -1.0"),
    ("pretrain", "lr = nan", "lr = NaN: expected float"),
    ("pretrain", "lr = inf", "lr = Infinity: expected float"),
    ("pretrain", 'lr = "1e-4"', 'lr = "1e-4": expected float'),
    ("pretrain", "batch = 0", "batch is 0"),
    ("pretrain", "dropout = 1.0", "dropout is 1.0"),
    ("pretrain", "save_every = 0", "save_every is 0"),
    ("pretrain", "zero = 1", "zero is 1"),
    ("pretrain", 'rows = "some"', "rows is 'some'"),
    ("pretrain", "rank = 9223372036854775808", "expected int"),
    ("pretrain", "epochs = 2", "epochs has no effect beside steps"),
    ("pretrain", "warmup = -1", "warmup is -1"),
    ("merge", 'into = "bf16"', "into is 'bf16'"),
    ("merge", "shard_bytes = 0", "shard_bytes is 0"),
    ("sft", "length = 2", "[sft] length is 2"),
    ("sft", "neftune = -1.0", "neftune is -1.0"),
    ("sft", "warmup = -1.0", "warmup is -1.0"),
    ("sft", 'conversations = ["none.jsonl"]', "none.jsonl"),
    ("sft", 'template = "none"', "template"),
    ("generate", "temperature = -1.0", "[generate] temperature is -1.0"),
    ("generate", "top_p = 0.0", "top_p is 0.0"),
    ("generate", "max_new_tokens = 0", "max_new_tokens is 0"),
    ("generate", 'prompts = [""]', "empty prompt"),
    ("evaluate", "shots = -1", "shots is -1"),
    ("evaluate", "length = 1", "length is 1"),
    ("evaluate", 'dtype = "int8"', "dtype is 'int8'"),
    ("evaluate", 'tasks = ["bbp"]', "bbp"),
    ("evaluate", 'domains = ["news=none.txt"]', "news=none.txt"),
    ("evaluate", 'model = "RUN/base"', "[evaluate] model has no effect"),
    ("evaluate", 'adapter = "RUN/adapter"', "[evaluate] adapter has no effect"),
    ("efficiency", "seconds = 0.0", "seconds is 0.0"),
    ("efficiency", "new_tokens = -1", "new_tokens is -1"),
    ("efficiency", 'tokenizers = ["none"]', "none"),
]
BASE = [
    ("hidden = 0", "hidden is 0"),
    ("hidden = -4", "hidden is -4"),
    ("hidden = 1000000000", "GB to be trained"),
    ("hidden = 4611686018427387904", "GB to be trained"),
    ("hidden = 65", "hidden=65 and heads=2"),
    ("layers = 0", "layers is 0"),
    ("layers = 1000000000", "GB to be trained"),
    ("heads = 0", "heads is 0"),
    ("heads = 3", "hidden=64 and heads=3"),
    ("kv_heads = 3", "heads=2, kv_heads=3"),
    ("kv_heads = 0", "kv_heads is 0"),
    ("experts = 0", "experts is 0"),
    ("experts = 100000000", "GB to be trained"),
    ("intermediate = 1000000000000", "GB to be trained"),
    ("top_k = 99", "top_k is 99"),
    ("batch = 0", "batch is 0"),
    ("length = 1", "length is 1"),
    ("lr = -1.0", "lr is -1.0"),
    ("lr = nan", "lr = NaN"),
    ("lr = inf", "lr = Infinity"),
    ("seed = -1", "seed is -1"),
    ("seed = 4294967296", "seed is 4294967296"),
    ("steps = 0", "steps is 0"),
    ("warmup = 2.0", "warmup is 2.0"),
    ("weight_decay = -1.0", "weight_decay is -1.0"),
    ("aux_loss = -1.0", "aux_loss is -1.0"),
    ('lang = "fr"', "[base] lang names 'fr'"),
    ('tokenizer = "none"', "none: no such tokenizer"),
]

# ---- which steps

STEPS = [
    ("merge alone", "[merge]\n", "[merge] model is missing: give it"),
    ("generate alone", "[generate]\n", "[generate] models is missing: give it"),
    ("evaluate alone", "[evaluate]\n", "[evaluate] model is missing: give it"),
    ("efficiency alone", "[efficiency]\n", "nothing to measure"),
    ("sft without merge", "[sft]\n", "[sft] model is missing: give it, or add the table [merge]"),
    ("vocab without pieces", "[vocab]\n", "add the table [tokenizer] that makes it"),
    ("a vocabulary of no size", SOURCES + "[tokenizer]\n[vocab]\n", "how many pieces?"),
    ("a base for nothing", SOURCES + '[base]\n[init]\nmodel = "o/m"\n', "[base] has no effect"),
    (
        "a model for nothing",
        SOURCES + '[init]\nmodel = "m"\ntokenizer = "t"\n[pretrain]\nmodel = "n"\ntokens = "k"\n',
        "[init] has no effect",
    ),
    (
        "one fault in each of many stages",
        changed("sft", "length = 2")
        .replace("[generate]\n", "[generate]\ntemperature = -1.0\n")
        .replace("n_pieces = 4000", "n_pieces = -1")
        .replace('name = "micro"', "name = 5"),
        ("name = 5", "[tokenizer] n_pieces", "[sft] length is 2", "[generate] temperature"),
    ),
    ("a language without a script", '[corpus]\nsources = ["tlh=a"]\n[tokenizer]\n', "'tlh'"),
]


def foreign_recipe(here, run):
    write(here / "r.toml", MICRO)
    write(here / "mine/recipe.toml", "eggs = 3\n")


def file_in_place(here, run):
    write(here / "r.toml", MICRO)
    write(here / "mine", "letter")


def broken_run(content):
    "A run whose recipe is now something else"

    def make(here, run):
        write(linked(run, here / "r") / "recipe.toml", content)

    return make


FOLDERS = [
    Case(
        "recipe: the folder has another recipe.toml",
        "run r.toml --out mine",
        make=foreign_recipe,
        says="no recipe of ours",
    ),
    Case(
        "recipe: a file is in the place of the folder",
        "run r.toml --out mine",
        make=file_in_place,
        says="mine is a file",
    ),
    *[
        Case(
            f"recipe: status of a run whose recipe {what}",
            "status r",
            make=broken_run(text),
            says=says,
        )
        for what, text, says in [
            ("is empty", "", "nothing to do"),
            ("is no TOML", "[", "not valid TOML"),
            ("has another type", "corpus = 5", "expected a table [corpus]"),
        ]
    ],
    *[
        Case(f"recipe: run {words}", f"run RUN/recipe.toml --out RUN {words}", says=says)
        for words, says in [
            ("--from none", "unknown stage 'none'"),
            ("--from sft --to pack", "--from sft comes after --to pack"),
            ("--to evaluat", "did you mean 'evaluate'"),
        ]
    ],
    file_case(
        "a stage that the recipe has not",
        SOURCES,
        "no stage 'sft'; it has corpus",
        command="run r.toml --out o --to sft",
    ),
    file_case("plan of a late value", changed("sft", "length = 2"), "[sft] length", "plan r.toml"),
]

CASES = [
    *[file_case(*row) for row in FILES],
    *PLACES,
    *[file_case(line.replace("\n", ", ")[:60], above(line), says) for line, says in TOP],
    *[file_case(f"[{table}] {line}", changed(table, line), says) for table, line, says in VALUES],
    *[file_case(f"[base] {line}", changed("base", line), says) for line, says in BASE],
    *[file_case(*row) for row in STEPS],
    *FOLDERS,
]
