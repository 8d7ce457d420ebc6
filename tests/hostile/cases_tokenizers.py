"Tokenizers: odd bases, tables of pieces and tokenizer.json; rows that are no numbers."

# Tables of short lambdas, whose results nobody asks for:
# mypy: disable-error-code="misc, func-returns-value"

import json
import math
import os
import struct

from hostile import Case, changed_json, cut, linked, sparse, write

PIECES = "piece\tscore\tkind\tcount\n龘\t-1\tchar\t9\n靐\t-2\tchar\t8\n龘靐\t-3\tword\t7\n"
VOCAB = "vocab --pieces p.tsv --base bad.model --n-pieces 2 --out o"
VOCAB += " --n-hostile 1000 --limit-chars 10000"  # the least that a certificate takes


def base_model(here, change=None, keep=None):
    "Mixtral's tokenizer, changed, as bad.model; and pieces to append"
    from cmixtral_nb.pieces import base_tokenizer_model, read_model

    model = read_model(base_tokenizer_model())
    if keep is not None:
        del model.pieces[keep:]
    if change:
        change(model)
    write(here / "bad.model", model.SerializePartialToString())
    write(here / "p.tsv", PIECES)


def bad_base(here, make):
    "A base that `make` writes, and pieces to append"
    make(here / "bad.model")
    write(here / "p.tsv", PIECES)


def changed(change, keep=None):
    "A case's `make`"
    return lambda here, run: base_model(here, change, keep)


def piece(text, score=-1.0, kind=None):
    def change(model):
        model.pieces.add(piece=text, score=score, **({} if kind is None else {"type": kind}))

    return change


def spec(**values):
    "Other values in the trainer_spec, or in the normalizer_spec under n_..."

    def change(model):
        for name, value in values.items():
            where = model.normalizer_spec if name.startswith("n_") else model.trainer_spec
            setattr(where, name.removeprefix("n_"), value)

    return change


def all_of_type(kind):
    def change(model):
        for p in model.pieces:
            p.type = kind

    return change


def without_bytes(model):
    kept = [p for p in model.pieces if p.type != p.BYTE]
    copies = [type(p).FromString(p.SerializeToString()) for p in kept]
    del model.pieces[:]
    model.pieces.extend(copies)


def byte_names_reversed(model):
    names = [p.piece for p in model.pieces if p.type == p.BYTE]
    for p in model.pieces:
        if p.type == p.BYTE:
            p.piece = names.pop()


def empty_message(model):
    model.Clear()


BASES = {  # what is odd -> how it is made, what is said
    "bos out of range": (spec(bos_id=10**6), "bos_id is 1000000"),
    "no bos": (spec(bos_id=-1), "bos_id is -1"),
    "eos out of range": (spec(eos_id=2**31 - 1), "eos_id is 2147483647"),
    "no eos": (spec(eos_id=-1), "eos_id is -1"),
    "unk out of range": (spec(unk_id=-(2**31)), "unk_id is -2147483648"),
    "a word as bos": (spec(bos_id=5000), "bos_id is 5000"),
    "unk as eos": (spec(eos_id=0), "eos_id is 0"),
    "an empty piece": (piece(""), "is empty"),
    "the same piece twice": (piece("▁the"), "'▁the', is piece"),
    "a control piece twice": (piece("<s>", 0.0, 3), "'<s>', is piece"),
    "a piece of a million characters": (piece("中" * 10**6), "1,000,000 characters"),
    "a piece of 513 characters": (piece("中" * 513), "513 characters"),
    "a score that is NaN": (piece("中国", math.nan), "has the score nan"),
    "an infinite score": (piece("中国", math.inf), "has the score inf"),
    "the lowest score of all": (piece("中国", -3.4e38), ""),
    "control pieces alone": (all_of_type(3), "expected"),
    "unused pieces alone": (all_of_type(5), "expected"),
    "bytes alone": (all_of_type(6), "expected"),
    "words alone": (all_of_type(1), "expected"),
    "unknown pieces alone": (all_of_type(2), "expected"),
    "no bytes": (without_bytes, "0 bytes, expected 256"),
    "bytes in another order": (byte_names_reversed, ""),
    "no byte_fallback": (spec(byte_fallback=False), "expected 256 and byte_fallback"),
    "unigram": (spec(model_type=1), "is a unigram model, expected BPE"),
    "words": (spec(model_type=3), "is a word model, expected BPE"),
    "characters": (spec(model_type=4), "is a character model, expected BPE"),
    "a broken table of normalisation": (spec(n_precompiled_charsmap=b"\xff" * 99), "normalised"),
    "a table of normalisation of zeros": (spec(n_precompiled_charsmap=b"\0" * 4096), ""),
    "a table that promises 4 GB": (spec(n_precompiled_charsmap=b"\xff\xff\xff\xff" + b"x" * 9), ""),
    "blanks at the end of words": (spec(treat_whitespace_as_suffix=True), "text is normalised"),
    "blanks that are not kept": (spec(n_remove_extra_whitespaces=True), "blanks are not kept"),
    "blanks that stay blanks": (spec(n_escape_whitespaces=False), "blanks are not kept"),
    "another name for <s>": (spec(bos_piece="</s>"), ""),
    "nothing at all": (empty_message, "not a sentencepiece model"),
}
ODD_BASES = [
    Case(f"a base with {name}", VOCAB, make=changed(change), says=said, may_succeed=not said)
    for name, (change, said) in BASES.items()
] + [
    Case(
        f"a base with its first {n} pieces",
        VOCAB,
        make=changed(None, keep=n),
        says=said,
        may_succeed=not said,
    )
    for n, said in {1: "expected", 3: "expected", 259: "no piece of text", 260: ""}.items()
] + [
    Case(
        f"{name} as a base to continue",
        "tokenizer --corpus p.tsv.txt --method continued --base bad.model --n-pieces 20 --out o",
        make=lambda here, run, change=change: (
            base_model(here, change), write(here / "p.tsv.txt", "中国人民中国人民 " * 9)),
        says=said,
    )
    for name, (change, said) in BASES.items()
    if said and "is a" not in said
]  # fmt: skip

FILES = {  # bytes that are no model
    "an empty file": b"",
    "text": b"piece\tscore\n",
    "zeros": bytes(10_000),
    "a length of 4 GB": b"\x0a\xff\xff\xff\xff\x0f" + b"x" * 99,
    "lengths within lengths": b"\x0a\x05" * 5000,
    "a pickle": b"\x80\x04\x95\x10" + b"." * 99,
    "a piece that is not UTF-8": b"\x0a\x06\x0a\x02\xff\xfe\x15\x00\x12\x00",
}
NO_MODEL = [
    Case(
        f"{name} as a base",
        VOCAB,
        make=lambda here, run, data=data: bad_base(here, lambda path: write(path, data)),
        says="bad.model is not a sentencepiece model",
    )
    for name, data in FILES.items()
] + [
    Case(
        "a base of 40 GB",
        VOCAB,
        make=lambda here, run: bad_base(here, lambda path: sparse(path, 40 * 10**9)),
        says="bad.model is larger than 32 MB",
    ),
    Case(
        "a base that is cut in the middle",
        VOCAB,
        make=lambda here, run: (base_model(here), cut(here / "bad.model", 300_000)),
        says="bad.model is not a sentencepiece model",
    ),
    Case(
        "a base that is a folder without a tokenizer",
        VOCAB,
        make=lambda here, run: bad_base(here, os.mkdir),
        says="bad.model holds no tokenizer.model",
    ),
    Case(
        "a base that is a byte-level tokenizer",
        VOCAB,
        make=lambda here, run: bad_base(
            here, lambda path: write(path / "tokenizer.json", '{"decoder": {"type": "ByteLevel"}}')
        ),
        says="bad.model/tokenizer.json: the whole has no 'model'",
    ),
    Case(
        "a base with a tokenizer.json of 40 GB",
        VOCAB,
        make=lambda here, run: bad_base(
            here, lambda path: sparse(path / "tokenizer.json", 40 * 10**9)
        ),
        says="tokenizer.json has 40.0 GB, expected at most",
    ),
    Case(
        "a base that leads to itself",
        VOCAB,
        make=lambda here, run: bad_base(here, lambda path: os.symlink(path.name, path)),
        says="bad.model: no such tokenizer",
    ),
]  # fmt: skip

# ---- tables of pieces

HEAD = "piece\tscore\tkind\tcount\n"
TABLES = {
    "an empty table": ("", "no piece of Han"),
    "a head alone": (HEAD, "no piece of Han"),
    "a score that is NaN": (HEAD + "中\tnan\tchar\t1\n", "p.tsv:2: expected"),
    "an infinite score": (HEAD + "中\t-inf\tchar\t1\n", "p.tsv:2: expected"),
    "a score in words": (HEAD + "中\tlow\tchar\t1\n", "p.tsv:2: expected"),
    "a count below 0": (HEAD + "中\t-1\tchar\t-5\n", "p.tsv:2: expected"),
    "a count with a fraction": (HEAD + "中\t-1\tchar\t1.5\n", "p.tsv:2: expected"),
    "a count of 5,000 digits": (HEAD + f"中\t-1\tchar\t{'9' * 5000}\n", "p.tsv:2: expected"),
    "a column too few": (HEAD + "中\t-1\n", "p.tsv:2: expected"),
    "a column too many": (HEAD + "中\t-1\tchar\t1\tx\n", "p.tsv:2: expected"),
    "no column of scores": ("piece\tcount\n中\t1\n", "p.tsv:2: expected"),
    "a piece twice": (HEAD + "中\t-1\tchar\t1\n" * 2, "is in line 2 already"),
    "a control token": (HEAD + "<s>\t-1\tword\t1\n", "looks like a control token"),
    "an [INST]": ("中\n[INST]\n", "looks like a control token"),
    "Latin words alone": ("the\nof\n", "no piece of Han"),
    "a piece of 100,000 characters": (HEAD + f"{'中' * 100_000}\t-1\tword\t1\n", "p.tsv"),
    "bytes that are not UTF-8": (b"\xff\xfe\x00", "p.tsv is not UTF-8"),
    "half a surrogate": (b"\xed\xa0\x80\n", "p.tsv is not UTF-8"),
    "200,000 lines with a fault each": (HEAD + "中\tx\n" * 200_000, "p.tsv:2: expected"),
}
ODD_TABLES = [
    Case(
        f"a table of pieces: {name}",
        "vocab --pieces p.tsv --n-pieces 1 --out o",
        make=lambda here, run, text=text: write(here / "p.tsv", text),
        says=said,
    )
    for name, (text, said) in TABLES.items()
] + [
    Case(
        "a table of pieces of 40 GB",
        "vocab --pieces p.tsv --n-pieces 1 --out o",
        make=lambda here, run: sparse(here / "p.tsv", 40 * 10**9, HEAD.encode()),
        says="p.tsv is larger than 64 MB",
    ),
    Case(
        "a table of pieces that is a folder in itself",
        "vocab --pieces p.tsv --n-pieces 1 --out o",
        make=lambda here, run: (
            os.mkdir(here / "p.tsv"),
            os.symlink("..", here / "p.tsv/pieces.tsv"),
        ),
        says="p.tsv holds no pieces.tsv",
    ),
]  # fmt: skip

WORDS = {  # a word list's line
    "no count": "中国",
    "a count below 0": "中国 -5",
    "a count of 5,000 digits": f"中国 {'9' * 5000}",
    "a count of 400 digits": f"中国 {'9' * 400}",
    "a count in Arabic digits of 16": "中国 " + "٩" * 16,
    "a count with a fraction": "中国 1.5",
    "a line of a megabyte": "中" * 350_000,
    "bytes that are not UTF-8": b"\xff\xfe 5",
    "words of another script alone": "the 5",
    "counts of 0 alone": "中国 0",
    "nothing": "",
}
ODD_WORDS = [
    Case(
        f"a word list with {name}",
        "tokenizer --corpus a.txt --out o --n-pieces 30 --lexicons 0.1:words.txt",
        make=lambda here, run, line=line: (
            write(here / "a.txt", "人工智能正在改变世界" * 20), write(here / "words.txt", line)),
        says="words.txt",
    )
    for name, line in WORDS.items()
]  # fmt: skip

OPTIONS = [
    Case(
        f"vocab {' '.join(options)}",
        ["vocab", "--pieces", "p.tsv", "--out", "o", *options],
        make=lambda here, run: write(here / "p.tsv", PIECES),
        says=said,
    )
    for options, said in [
        (["--n-pieces", "-1"], "n_pieces is -1"),
        (["--n-pieces", "1000000000"], "n_pieces"),
        (["--n-pieces", "4"], "were asked for"),
        (["--n-pieces", "1", "--n-chars", "-1"], "n_chars is -1"),
        (["--n-pieces", "1", "--multiple", "-8"], "multiple is -8"),
        (["--n-pieces", "1", "--multiple", "1000000000"], "multiple is 1000000000"),
        (["--n-pieces", "1", "--n-hostile", "-1"], "n_hostile is -1"),
        (["--n-pieces", "1", "--n-hostile", "1000000000"], "n_hostile is 1000000000"),
        (["--n-pieces", "1", "--limit-chars", "-1"], "limit_chars is -1"),
        (["--n-pieces", "1", "--script", "Common"], "script"),
        (["--n-pieces", "1", "--script", "Elvish"], "script 'Elvish' is unknown"),
        (["--n-pieces", "1", "--tokens", ""], "expected control tokens"),
        (["--n-pieces", "1", "--tokens", "<s>"], "expected control tokens"),
        (["--n-pieces", "1", "--tokens", "two words"], "expected control tokens"),
        (["--n-pieces", "1", "--tokens", "<a>", "<a>"], "expected control tokens"),
        (["--n-pieces", "1", "--tokens", "中"], "expected control tokens"),
        (["--n-pieces", "1", "--tokens", "x" * 10_000], "expected control tokens"),
        (["--n-pieces", "1", "--seed", "-1"], "seed"),
        (["--search", "nowhere"], "nowhere"),
        (["--search", "p.tsv"], "p.tsv"),
        (["--n-pieces", "1", "--corpus", "p.tsv"], "p.tsv"),
    ]
]

# ---- search

SEARCH = "search --pieces p.tsv --corpus a.jsonl --out o"
TEXT = "人工智能龘靐改变世界，扩充词表龘靐。" * 30


def judged(here, source="a", base=None):
    "Pieces, and three documents to judge them by"
    base_model(here, base)
    row = json.dumps({"text": TEXT, "source": source})
    write(here / "a.jsonl", f"{row}\n" * 3)


SEARCHES = (
    [
        Case(
            f"a search on a base with {name}",
            f"{SEARCH} --base bad.model",
            make=lambda here, run, change=change: judged(here, base=change),
            says=said,
        )
        for name, (change, said) in BASES.items()
        if said and name not in ("nothing at all", "another name for <s>")
    ]
    + [
        Case(
            f"a search with {' '.join(options)}",
            [*SEARCH.split(), *options],
            make=lambda here, run: judged(here),
            says=said,
        )
        for options, said in [
            (["--domains", "x"], "expected NAME=REF"),
            (["--domains", "x=nowhere"], "nowhere: no such file"),
            (["--domains", "=a.jsonl"], "expected NAME=REF"),
            (["--chars", "many"], "chars is ['many']"),
            (["--chars", "-1"], "chars is"),
            (["--chars", "1e9"], "chars is"),
            (["--totals", "0"], "totals is"),
            (["--limit-chars", "-1"], "limit_chars is -1"),
            (["--budget", "-5"], "budget is -5"),
            (["--script", "Khmer"], "has no piece of Khmer characters"),
            (["--base", "nowhere"], "nowhere: no such tokenizer"),
            (["--corpus", "nowhere"], "nowhere does not exist"),
            (["--pieces", "nowhere"], "nowhere: no such file or folder"),
        ]
    ]
    + [
        Case(
            f"a search on a source called {source!r}",
            SEARCH,
            make=lambda here, run, source=source: judged(here, source),
            may_succeed=True,
            leaves=("o",),
        )
        for source in ("a$\\bad{", "a\nb\tc", "<script>", "../../x", "\ud800", "", "x" * 5000)
    ]
)

# ---- a tokenizer for a model, and a model whose rows are no numbers

INIT = "init --model {} --tokenizer {} --out o"


def tokenizer_with(**values):
    "The run's tokenizer with other values in its tokenizer.json"

    def make(here, run):
        changed_json(linked(run / "tokenizer", here / "t") / "tokenizer.json", **values)

    return make


TOKENIZERS: dict[str, dict] = {
    "no model": dict(model=...),
    "a model that is null": dict(model=None),
    "a model that is a list": dict(model=[]),
    "a model of no type": dict(model={"vocab": {}}),
    "an unknown type": dict(model={"type": "Evil", "vocab": {}, "merges": []}),
    "no piece": dict(model={"type": "BPE", "vocab": {}, "merges": []}),
    "an id below 0": dict(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
    "an id of 4,294,967,295": dict(model={"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}),
    "an id of 2**64": dict(model={"type": "BPE", "vocab": {"a": 2**64}, "merges": []}),
    "ids that are text": dict(model={"type": "BPE", "vocab": {"a": "0"}, "merges": []}),
    "one id twice": dict(model={"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}),
    "merges without pieces": dict(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}),
    "merges of three": dict(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a", "a"]]}),
    "merges that are numbers": dict(model={"type": "BPE", "vocab": {"a": 0}, "merges": [1]}),
    "an added token without an id": dict(added_tokens=[{"content": "<x>"}]),
    "an added token with an id below 0": dict(
        added_tokens=[dict(id=-1, content="<x>", special=True)]
    ),
    "an added token with an id of a million": dict(
        added_tokens=[
            dict(
                id=10**6,
                content="<x>",
                single_word=False,
                lstrip=False,
                rstrip=False,
                normalized=False,
                special=True,
            )
        ]
    ),
    "added tokens that are a number": dict(added_tokens=5),
    "a normaliser of no kind": dict(normalizer={"type": "Evil"}),
    "a pattern that is endless": dict(
        pre_tokenizer={
            "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False
        }
    ),
    "a pattern that is broken": dict(
        pre_tokenizer={
            "type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False
        }
    ),
    "a version from the future": dict(version="99.0"),
}  # fmt: skip
ODD_TOKENIZERS = [
    Case(
        f"a tokenizer.json with {name}",
        INIT.format("RUN/base", "t"),
        make=tokenizer_with(**values),
        may_succeed=name in ("a pattern that is endless", "an added token with an id of a million"),
        says="t",
    )
    for name, values in TOKENIZERS.items()
] + [
    Case(
        f"a tokenizer.json that is {name}",
        INIT.format("RUN/base", "t"),
        make=lambda here, run, text=text: write(
            linked(run / "tokenizer", here / "t") / "tokenizer.json", text
        ),
        says="t",
    )
    for name, text in {
        "empty": "",
        "a number": "5",
        "null": "null",
        "a list": "[]",
        "a string": '"a"',
        "half of it": '{"model": {"type": "BPE", ',
        "not UTF-8": b"\xff\xfe",
        "100,000 brackets": "[" * 100_000,
        "NaN": "NaN",
    }.items()
]


def rows_with(number, name="lm_head.weight", dtype=None):
    "The run's base, with one number of its rows changed"

    def make(here, run):
        from cmixtral_nb.checkpoints import read_header, tensor_files

        model = linked(run / "base", here / "m")
        path = tensor_files(model)[name]
        entry = read_header(path)[name]
        data = bytearray(path.read_bytes())
        start = 8 + struct.unpack("<Q", data[:8])[0] + entry["data_offsets"][0]
        size = {"F32": "<f", "BF16": None}[entry["dtype"]]
        bits = struct.pack("<f", number)
        new = bits if size else bits[2:]
        data[start : start + len(new)] = new
        write(path, bytes(data))

    return make


ROWS = [
    Case(
        f"a base with {number} in {name}",
        INIT.format("m", "RUN/tokenizer"),
        make=rows_with(number, name),
        says=(name, "holds NaN or infinity in 1 rows"),
    )
    for number, name in (
        (math.nan, "lm_head.weight"),
        (-math.inf, "model.embed_tokens.weight"),
    )
] + [
    Case(f"init {' '.join(options)}", [*INIT.format("RUN/base", "RUN/tokenizer").split(), *options],
         says=said)
    for options, said in [
        (["--method", "zero"], "method is 'zero'"),
        (["--method", ""], "method is ''"),
        (["--seeds", "0"], "seeds is 0"),
        (["--seeds", "1000000000"], "seeds is 1000000000"),
        (["--steps", "-1"], "steps is -1"),
        (["--seed", "-1"], "seed is -1"),
        (["--seed", "4294967296"], "seed is 4294967296"),
        (["--probe", "nowhere"], "nowhere is no corpus"),
        (["--probe", "RUN/base"], "is no corpus"),
    ]
]  # fmt: skip

CASES = [
    *ODD_BASES,
    *NO_MODEL,
    *ODD_TABLES,
    *ODD_WORDS,
    *OPTIONS,
    *SEARCHES,
    *ODD_TOKENIZERS,
    *ROWS,
]
