"Text: files that are odd, endless, broken inside or not what they are called; odd options."

# Tables of short lambdas, whose results nobody asks for:
# mypy: disable-error-code="misc, func-returns-value"

import bz2
import gzip
import json
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Callable

from hostile import Case, cut, sparse, write

GOOD = "人工智能正在改变世界，扩充词表之后继续预训练。"
CORPUS = "corpus --sources zh={} --valid-share 0 --out o"


def rows(*texts):
    "JSON Lines with a document each"
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def compressed(ending, data):
    "Bytes as a file of that name holds them"
    if ending == ".zst":
        import pyarrow

        return pyarrow.compress(data, codec="zstd", asbytes=True)
    pack: dict[str, Callable] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        "": bytes,
    }
    return pack[ending](data)


def file(name, content):
    "A case's `make`: one file"
    return lambda here, run: write(here / name, content() if callable(content) else content)


def counted(reason, kept=1):
    "A case's `check`: the good document is there, the bad one is counted"

    def check(here, run):
        found = json.loads((here / "o/manifest.json").read_text())["stats"]["zh"]
        assert found["n_docs"] == kept, found
        assert not reason or reason in " ".join(found["dropped"]), found

    return check


# ---- a line that is odd: left out and counted, or one line with its number

LONG = 16_000_001
ODD_LINES = {  # what stands on the line -> the reason under which it is counted
    "a number": ("5", "no text"),
    "null": ("null", "no text"),
    "a list": ('["a"]', "no text"),
    "an empty object": ("{}", "no text"),
    "a string": ('"text"', "no text"),
    "text that is a number": ('{"text": 5}', "no text"),
    "text that is a list": ('{"text": ["a"]}', "no text"),
    "text that is null": ('{"text": null}', "no text"),
    "text that is an object": ('{"text": {"text": "a"}}', "no text"),
    "NaN": ("NaN", "no text"),
    "a number of 5,000 digits": ("1" * 5000, "invalid JSON"),
    "100,000 brackets": ("[" * 100_000, "invalid JSON"),
    "100,000 objects in each other": ('{"a":' * 100_000, "invalid JSON"),
    "no value": ('{"text": ', "invalid JSON"),
    "two values": ('{"text": "a"} {"text": "b"}', "invalid JSON"),
    "single quotes": ("{'text': 'a'}", "invalid JSON"),
    "a bare word": ("text", "invalid JSON"),
    "NUL bytes": ("\0" * 100, "invalid JSON"),
    "a NUL inside": ('{"text": "a\0b"}', "invalid JSON"),
    "half a surrogate as the text": ('{"text": "\\ud800"}', "too short"),
    "blanks as the text": (json.dumps({"text": " " * 1000}), "too short"),
    "marks of direction as the text": (json.dumps({"text": "\u202e" * 1000}), "too short"),
    "another script": (rows("only Latin letters here").rstrip(), "another script"),
    "nine combining marks on each letter": (rows(("e" + "\u0301" * 9) * 50).rstrip(), "script"),
    "a line that is too long": ('{"text": "' + "x" * LONG + '"}', "longer than 16 MB"),
    "a line of blanks that is too long": (" " * LONG, "longer than 16 MB"),
}

SKIPPED = [
    Case(
        f"a line with {name}",
        CORPUS.format("a.jsonl"),
        make=file("a.jsonl", f"{line}\n{rows(GOOD)}"),
        may_succeed=True,
        leaves=("o",),
        check=counted(reason),
    )
    for name, (line, reason) in ODD_LINES.items()
]
STOPPED = [
    Case(
        f"a line with {name}, --on-error stop",
        CORPUS.format("a.jsonl") + " --on-error stop",
        make=file("a.jsonl", f"{rows(GOOD)}{line}\n"),
        says="a.jsonl:2: ",
    )
    for name, (line, reason) in ODD_LINES.items()
    if reason in ("no text", "invalid JSON", "longer than 16 MB")
]

ODD_BYTES = {  # a line of bytes
    "a cut character": "人".encode()[:-1],
    "Latin-1": "é".encode("latin-1"),
    "a character of six bytes": b"\xfc\x84\x80\x80\x80\x80",
    "half a surrogate in bytes": b'{"text": "\xed\xa0\x80"}',
    "an overlong slash": b'{"text": "\xc0\xaf"}',
    "UTF-16": '{"text": "a"}'.encode("utf-16"),
}
BYTES = [
    Case(
        f"a line of {name}",
        CORPUS.format("a.jsonl"),
        make=file("a.jsonl", rows(GOOD).encode() + line + b"\n"),
        may_succeed=True,
        leaves=("o",),
        check=counted("invalid"),
    )
    for name, line in ODD_BYTES.items()
]
BYTES += [
    Case(
        "a whole text in UTF-16",
        CORPUS.format("a.jsonl"),
        make=file("a.jsonl", rows(GOOD).encode("utf-16")),
        says="a.jsonl is UTF-16, expected UTF-8",
    )
]

ODD_FIELDS = {  # fields beside a good text: none of them ends a corpus
    "half a surrogate in source": '"source": "\\ud83d"',
    "a list as source": '"source": ["a", ["b"]]',
    "null as source": '"source": null',
    "a source with line ends": '"source": "a\\nb\\u2028c"',
    "a source of 100,000 letters": f'"source": "{"s" * 100_000}"',
    "900 lists as source": f'"source": {"[" * 900}{"]" * 900}',
    "a key with half a surrogate": '"\\udfff": 1',
    "text twice": '"text": "5"',
    "a split of its own": '"split": "valid"',
}
FIELDS = [
    Case(
        f"a document with {name}",
        CORPUS.format("a.jsonl"),
        make=file("a.jsonl", f'{{{field}, "text": "{GOOD}"}}\n'),
        may_succeed=True,
        leaves=("o",),
        check=counted(""),
    )
    for name, field in ODD_FIELDS.items()
]

# ---- files that are not what their names say, or end early

BROKEN = [
    Case(
        f"a {ending} file {how}",
        CORPUS.format(f"a.jsonl{ending}"),
        make=file(f"a.jsonl{ending}", content),
        says=(f"a.jsonl{ending}: cannot be read to its end", "copy or download it again"),
    )
    for ending in (".gz", ".bz2", ".xz", ".zst")
    for how, content in {
        "that is plain text": rows(GOOD).encode(),
        "that is empty but for a line end": b"\n",
        "cut in the middle": compressed(ending, rows(GOOD * 100, os.urandom(9999).hex()).encode())[
            :500
        ],
        "with a flipped byte": bytes(
            byte ^ 255 if i == 60 else byte
            for i, byte in enumerate(compressed(ending, rows(*[GOOD] * 9, "x" * 99).encode()))
        ),
    }.items()
    if (ending, how) != (".zst", "with a flipped byte")  # it has no checksum of its own
]
EMPTY = [
    Case(
        f"an empty file {name}",
        CORPUS.format(name),
        make=file(name, content),
        says="no zh document is left",
    )
    for name, content in {
        "a.jsonl": "",
        "a.txt": "",
        "b.txt": "\n \n\t\n" * 100,
        "b.jsonl": "\ufeff",
        "a.jsonl.gz": compressed(".gz", b""),
        "a.jsonl.xz": compressed(".xz", b""),
        "a.jsonl.zst": compressed(".zst", b""),
    }.items()
]


def parquet(here, table, **how):
    import pyarrow.parquet as pq

    pq.write_table(table, here / "a.parquet", **how)


def arrow(**columns):
    import pyarrow as pa

    return pa.table(columns)


def one_text_a_thousand_times(here, run):
    "9 MB that stand once in the file, for each of a thousand rows"
    import pyarrow as pa

    text = pa.DictionaryArray.from_arrays(
        pa.array([0] * 1000, pa.int32()), [GOOD + "x" * 9 * 10**6]
    )
    parquet(here, arrow(text=text), compression="zstd", dictionary_pagesize_limit=2**30)


def not_utf8(here, run):
    "A column that calls itself text and is not"
    import pyarrow as pa

    bad = pa.array([b"\xff\xfe", GOOD.encode()]).view(pa.string())
    parquet(here, arrow(text=bad))


def odd_dates(here, run):
    "A date in the year 292,277 beside a good text"
    import pyarrow as pa

    dates = pa.array([2**62], pa.timestamp("us"))
    parquet(here, arrow(text=[GOOD], source=[7], when=dates))


def two_columns(here, run):
    import pyarrow as pa

    parquet(here, pa.table([[GOOD], ["b"]], names=["text", "text"]))


PARQUET = [
    Case(
        "a parquet file of text",
        CORPUS.format("a.parquet"),
        make=file("a.parquet", "PAR1"),
        says="a.parquet: cannot be read to its end",
    ),
    Case(
        "a parquet file cut in the middle",
        CORPUS.format("a.parquet"),
        make=lambda here, run: (parquet(here, arrow(text=[GOOD] * 9)), cut(here / "a.parquet", 90)),
        says="a.parquet: cannot be read to its end",
    ),
    Case(
        "a parquet file whose footer promises gigabytes",
        CORPUS.format("a.parquet"),
        make=file("a.parquet", b"PAR1" + b"x" * 99 + struct.pack("<I", 2**32 - 1) + b"PAR1"),
        says="a.parquet: cannot be read to its end",
    ),
    Case(
        "a parquet file without texts",
        CORPUS.format("a.parquet"),
        make=lambda here, run: parquet(here, arrow(number=[1, 2])),
        says="no text",
    ),
    Case(
        "a parquet file whose text is a number",
        CORPUS.format("a.parquet"),
        make=lambda here, run: parquet(here, arrow(text=[1, 2])),
        says="no text",
    ),
    Case(
        "a parquet file whose text is a list",
        CORPUS.format("a.parquet"),
        make=lambda here, run: parquet(here, arrow(text=[["a"], ["b"]])),
        says="no text",
    ),
    Case(
        "a parquet file without a row",
        CORPUS.format("a.parquet"),
        make=lambda here, run: parquet(here, arrow(text=["a"]).slice(0, 0)),
        says="no zh document is left",
    ),
    Case(
        "a parquet file with two columns of one name",
        CORPUS.format("a.parquet"),
        make=two_columns,
        says="a.parquet",
    ),
    Case(
        "a parquet file with a row of 40 MB",
        CORPUS.format("a.parquet"),
        make=lambda here, run: parquet(here, arrow(text=["x" * 4 * 10**7]), compression="zstd"),
        says="longer than 16 MB",
    ),
    Case(
        "a parquet file that is not UTF-8",
        CORPUS.format("a.parquet"),
        make=not_utf8,
        may_succeed=True,
        leaves=("o",),
        check=counted("invalid UTF-8"),
    ),
    Case(
        "a parquet file with odd dates",
        CORPUS.format("a.parquet"),
        make=odd_dates,
        may_succeed=True,
        leaves=("o",),
        check=counted(""),
    ),
    Case(
        "a parquet file with one text a thousand times",
        "tokenizer --corpus a.parquet --limit-chars 20000000 --n-pieces 50 --out o",
        make=one_text_a_thousand_times,
        may_succeed=True,
        leaves=("o",),
    ),
    Case(
        "a parquet file that is compressed once more",
        CORPUS.format("a.parquet.gz"),
        make=file("a.parquet.gz", compressed(".gz", b"PAR1")),
        says="unknown form",
    ),
]

# ---- small files that are large inside

MEMBER = gzip.compress(b"x" * 2**24)  # gzip's members may stand one after the other


def endless(ending):
    "A line of ten gigabytes; the files have ten megabytes or less"

    def make(here, run):
        part = MEMBER if ending == ".gz" else compressed(ending, b"x" * 2**24)
        write(here / f"a.jsonl{ending}", part * 640)

    return make


def hungry_xz():
    "An .xz whose header says that 2 GB are needed to read it"
    data = bytearray(compressed(".xz", rows(GOOD).encode()))
    data[16] = 38  # of the block's header: the size of the dictionary
    data[20:24] = struct.pack("<I", zlib.crc32(data[12:20]))
    return bytes(data)


BOMBS = [
    Case(
        f"a line of ten gigabytes in a {ending} file",
        CORPUS.format(f"a.jsonl{ending}"),
        make=endless(ending),
        says="longer than 960 MB",
    )
    for ending in (".gz", ".xz", ".zst")
] + [
    Case(
        "a text of 50 MB without a blank line",
        CORPUS.format("a.txt"),
        make=file("a.txt", f"{GOOD}\n" * 800_000),
        says="longer than 16 MB",
    ),
    Case(
        "a long line among good ones, in a text",
        CORPUS.format("a.txt"),
        make=file("a.txt", f"{GOOD}\n\n{'x' * LONG}\n\n{GOOD}!"),
        may_succeed=True,
        leaves=("o",),
        check=counted("longer than 16 MB", kept=2),
    ),
    Case(
        "an .xz that asks for 1.5 GB of memory",
        CORPUS.format("a.jsonl.xz"),
        make=file("a.jsonl.xz", hungry_xz),
        says="a.jsonl.xz: cannot be read to its end",
    ),
    Case(
        "a sparse file of 40 GB",
        CORPUS.format("a.jsonl"),
        make=lambda here, run: sparse(here / "a.jsonl", 40 * 10**9, rows(GOOD).encode()),
        says="longer than 960 MB",
    ),
    Case(
        "a corpus part of 40 GB for the tokenizer",
        "tokenizer --corpus a.jsonl --out o --n-pieces 30",
        make=lambda here, run: sparse(here / "a.jsonl", 40 * 10**9, rows(GOOD).encode()),
        says="longer than 960 MB",
    ),
    Case(
        "a word list of one endless line",
        "tokenizer --corpus a.txt --out o --n-pieces 30 --lexicons 0.1:words.txt.gz",
        make=lambda here, run: (
            write(here / "a.txt", GOOD),
            write(here / "words.txt.gz", MEMBER * 640),
        ),
        says="words.txt.gz: cannot be read to its end",
    ),
]

# ---- where sources are, and what they are called

PLACES = [
    Case(
        "a corpus inside its source",
        "corpus --sources zh=in --valid-share 0 --out in/o",
        make=lambda here, run: write(here / "in/a.jsonl", rows(GOOD)),
        says="in/o lies in in, which is read",
    ),
    Case(
        "a corpus inside a glob",
        ["corpus", "--sources", "zh=in/**/*.jsonl", "--out", "in/o"],
        make=lambda here, run: write(here / "in/a.jsonl", rows(GOOD)),
        says="which is read",
    ),
    Case(
        "a corpus in place of its source",
        "corpus --sources zh=in --valid-share 0 --out in",
        make=lambda here, run: write(here / "in/a.jsonl", rows(GOOD)),
        says="in",
    ),
    Case(
        "a source that is a pipe",
        CORPUS.format("pipe.jsonl"),
        make=lambda here, run: os.mkfifo(here / "pipe.jsonl"),
        says="pipe.jsonl: no such file",
    ),
    Case(
        "a source that leads to itself",
        CORPUS.format("a.jsonl"),
        make=lambda here, run: os.symlink("a.jsonl", here / "a.jsonl"),
        says="a.jsonl",
    ),
    Case(
        "a folder that leads to itself",
        CORPUS.format("in"),
        make=lambda here, run: (os.mkdir(here / "in"), os.symlink("..", here / "in/up")),
        says="in: holds no file of the forms",
    ),
    Case(
        "a folder called a.jsonl",
        CORPUS.format("a.jsonl"),
        make=lambda here, run: os.mkdir(here / "a.jsonl"),
        says="a.jsonl: holds no file",
    ),
    Case(
        "a source with a name of 300 characters",
        CORPUS.format("x" * 300 + ".jsonl"),
        says="x" * 300,
    ),
    Case(
        "a source with NUL in its name",
        ["corpus", "--sources", "zh=a\0b.jsonl", "--out", "o"],
        says="no such file",
    ),
    Case("a source that may not be read", CORPUS.format("/proc/kmsg.jsonl"), says="no such file"),
    Case(
        "no language",
        "corpus --sources a.jsonl --out o",
        make=file("a.jsonl", rows(GOOD)),
        says="expected LANG=REF",
    ),
    Case(
        "a language that is a path",
        "corpus --sources ../../evil=a.jsonl --out o",
        make=file("a.jsonl", rows(GOOD)),
        says="expected LANG=REF",
    ),
    Case(
        "a language in capitals",
        "corpus --sources ZH=a.jsonl --out o",
        make=file("a.jsonl", rows(GOOD)),
        says="expected LANG=REF",
    ),
    Case(
        "a column that no row has",
        CORPUS.format("a.jsonl#body"),
        make=file("a.jsonl", rows(GOOD)),
        says="no text",
    ),
    Case(
        "a column with an odd name",
        ["corpus", "--sources", 'zh=a.jsonl#"\\', "--out", "o"],
        make=file("a.jsonl", rows(GOOD)),
        says="no text",
    ),
    Case(
        "a glob with an open bracket",
        ["corpus", "--sources", "zh=[a-.jsonl", "--out", "o"],
        says="no such file",
    ),
    Case(
        "a form that nobody reads",
        CORPUS.format("a.docx"),
        make=file("a.docx", "x"),
        says="unknown form",
    ),
    Case(
        "a zip of texts",
        CORPUS.format("a.jsonl.zip"),
        make=lambda here, run: zipfile.ZipFile(here / "a.jsonl.zip", "w").close(),
        says="unknown form",
    ),
]

# ---- options

ODD_OPTIONS = {
    "corpus --sources zh=a.jsonl": {
        "valid-share": ["nan", "inf", "-0.1", "1", "1e999"],
        "min-share": ["nan", "2", "-1"],
        "limit-chars": ["-5"],
        "min-chars": ["-5"],
        "paragraph-chars": ["-1"],
        "on-error": ["ignore", ""],
    },
    "tokenizer --corpus a.jsonl": {
        "n-pieces": ["-1", "0", "99999999999"],
        "n-chars": ["-1", "41000"],
        "max-chars": ["0", "513", "-7"],
        "workers": ["0", "-1", "100000"],
        "memory-chars": ["0", "-3"],
        "limit-chars": ["-1"],
        "lexicons": ["nan:jieba", "inf:jieba", "-0.1:jieba", "1:jieba", ":jieba", "0.1:", "0.1"],
        "opencc": ["nan:s2t", "0.1:../s2t", "0.1:/etc/passwd", "2:s2t"],
        "script": ["Elvish", "Common", "", "Han Common", "[^a]", "Zzzz", "Han Zyyy"],
        "method": ["unigram", "BPE"],
        "lang": ["en/../..", ""],
    },
}
OPTIONS = [
    Case(
        f"{command.split()[0]} --{option} {value}",
        [*command.split(), f"--{option}={value}", "--out", "o"],
        make=file("a.jsonl", rows(GOOD)),
        may_succeed=option == "lang",  # a file of one's own has no known language
        leaves=("o",),
    )
    for command, options in ODD_OPTIONS.items()
    for option, values in options.items()
    for value in values
]

CASES = [
    *SKIPPED,
    *STOPPED,
    *BYTES,
    *FIELDS,
    *BROKEN,
    *EMPTY,
    *PARQUET,
    *BOMBS,
    *PLACES,
    *OPTIONS,
]
