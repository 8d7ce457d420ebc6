"Exams: zips, tables and questions that are odd, endless, or not what they are called."

# Tables of short lambdas, whose results nobody asks for:
# mypy: disable-error-code="misc, func-returns-value"

import gzip
import json
import os
import zipfile

from hostile import Case, sparse, write

EVALUATE = "evaluate --model RUN/base --tasks {} --data d --out o"
HEAD = "question,A,B,C,D,answer\n"
QUESTION = "What?,1,2,3,4,A\n"
SUBJECT = "ceval-valid_law"
TALK = {"ctx": "Food: How to cook rice. Wash it.", "endings": list("abcd"), "label": 0}


def zipped(content, member="val/law_val.csv", **how):
    "A case's `make`: ceval.zip with one file of questions as given, the other one sound"

    def make(here, run):
        (here / "d").mkdir()
        with zipfile.ZipFile(here / "d/ceval.zip", "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("dev/law_dev.csv", HEAD + QUESTION)
            z.writestr(member, content, **how)

    return make


TABLES = {  # the file of questions -> what is said
    "nothing": ("", "law"),
    "a head alone": (HEAD, "has no val questions"),
    "no column of answers": ("question,A,B,C,D\nWhat?,1,2,3,4\n", "no column answer"),
    "a column twice": ("question,question,A,B,C,D\n", "no column answer"),
    "a row that ends early": (HEAD + "What?,1\n", "row 1 has 2 columns"),
    "an answer E": (HEAD + "What?,1,2,3,4,E\n", "row 1 has the answer 'E'"),
    "an empty answer": (HEAD + "What?,1,2,3,4,\n", "row 1 has the answer ''"),
    "an answer AB": (HEAD + "What?,1,2,3,4,AB\n", "row 1 has the answer 'AB'"),
    "a small answer": (HEAD + "What?,1,2,3,4,a\n", "row 1 has the answer 'a'"),
    "a field of 200,000 letters": (HEAD + f"{'x' * 200_000},1,2,3,4,A\n", "not CSV"),
    "an open quote": (HEAD + '"What?,1,2,3,4,A\n', "row 1 has 1 columns"),
    "bytes that are not UTF-8": (HEAD.encode() + b"\xff\xfe,1,2,3,4,A\n", "cannot be read"),
    "UTF-16": ((HEAD + QUESTION).encode("utf-16"), "cannot be read"),
    "tabs for commas": ((HEAD + QUESTION).replace(",", "\t"), "no column question"),
    "semicolons for commas": ((HEAD + QUESTION).replace(",", ";"), "no column question"),
    "JSON": (json.dumps(TALK), "no column question"),
    "HTML": ("<html><body>404</body></html>", "no column question"),
    "NUL bytes": (bytes(5000), "law"),
    "a megabyte of commas": (HEAD + "," * 10**6, "row 1 has the answer ''"),
    "line ends alone": ("\n" * 10**6, "law"),
}
ODD_TABLES = [
    Case(f"a table of questions: {name}", EVALUATE.format(SUBJECT), make=zipped(text), says=said)
    for name, (text, said) in TABLES.items()
]


def password(here, run):
    "A zip that says that its files are encrypted"
    zipped(HEAD + QUESTION)(here, run)
    path = here / "d/ceval.zip"
    data = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(mark)
        while at >= 0:
            data[at + flags] |= 1
            at = data.find(mark, at + 4)
    path.write_bytes(data)


def other_compression(here, run):
    "A zip whose files are compressed in a way that nobody knows"
    zipped(HEAD + QUESTION)(here, run)
    path = here / "d/ceval.zip"
    data = bytearray(path.read_bytes())
    for mark, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = data.find(mark)
        while at >= 0:
            data[at + method : at + method + 2] = b"\x63\x00"
            at = data.find(mark, at + 4)
    path.write_bytes(data)


def flipped(here, run):
    "A zip with a flipped byte in its compressed part"
    zipped(HEAD + QUESTION * 900)(here, run)
    path = here / "d/ceval.zip"
    data = bytearray(path.read_bytes())
    data[data.rfind(b"law_val.csv", 0, -200) + 20] ^= 255
    path.write_bytes(data)


def lies(here, run):
    "A zip whose table of contents promises ten bytes for a gigabyte"
    zipped(b"x" * 10**8)(here, run)
    path = here / "d/ceval.zip"
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02")
    data[at + 24 : at + 28] = (10).to_bytes(4, "little")
    path.write_bytes(data)


ZIPS = [
    Case("a zip with five gigabytes in a table", EVALUATE.format(SUBJECT), make=lambda here, run: (
        zipped(b"x" * 10**7)(here, run)), says="law_val.csv has 10 MB, expected at most 8"),
    Case("a zip that promises ten bytes for a hundred megabytes", EVALUATE.format(SUBJECT),
         make=lies, says="law"),
    Case("a zip with a password", EVALUATE.format(SUBJECT), make=password, says="encrypted"),
    Case("a zip with an unknown compression", EVALUATE.format(SUBJECT), make=other_compression,
         says="cannot be read"),
    Case("a zip with a flipped byte", EVALUATE.format(SUBJECT), make=flipped, says="law"),
    Case("a zip that is text", EVALUATE.format(SUBJECT),
         make=lambda here, run: write(here / "d/ceval.zip", HEAD), says="BadZipFile"),
    Case("a zip that is empty", EVALUATE.format(SUBJECT),
         make=lambda here, run: write(here / "d/ceval.zip", b""), says="BadZipFile"),
    Case("a zip that is cut in the middle", EVALUATE.format(SUBJECT), make=lambda here, run: (
        zipped(QUESTION * 99)(here, run), os.truncate(here / "d/ceval.zip", 300)),
        says="BadZipFile"),
    Case("a zip without the subject", EVALUATE.format(SUBJECT),
         make=zipped(HEAD + QUESTION, "val/art_val.csv"), says="has no val questions"),
    Case("a zip with the subject outside of it", EVALUATE.format(SUBJECT),
         make=zipped(HEAD + QUESTION, "../../val/law_val.csv"), says="has no val questions"),
    Case("a zip that is a folder", EVALUATE.format(SUBJECT),
         make=lambda here, run: (here / "d/ceval.zip").mkdir(parents=True), says="ceval.zip"),
    Case("a zip that leads to itself", EVALUATE.format(SUBJECT),
         make=lambda here, run: (
             (here / "d").mkdir(), os.symlink("ceval.zip", here / "d/ceval.zip")),
         says="ceval.zip"),
    Case("an unpacked table of 40 GB", EVALUATE.format(SUBJECT),
         make=lambda here, run: (
             write(here / "d/ceval/val/law_val.csv", ""),
             sparse(here / "d/ceval/val/law_val.csv", 40 * 10**9, HEAD.encode())),
         says="larger than 8 MB"),
    Case("a folder of exams that is a file", EVALUATE.format(SUBJECT),
         make=lambda here, run: write(here / "d", "x"), says="d: no such folder"),
    Case("more solved examples than there are", EVALUATE.format(SUBJECT) + " --shots 5",
         make=zipped(HEAD + QUESTION), says="has 1 solved examples for 5 shots"),
]  # fmt: skip

LINES = {  # a line of HellaSwag
    "a number": "5",
    "null": "null",
    "a list": "[]",
    "a string": '"ctx"',
    "an empty object": "{}",
    "nothing": "",
    "half a line": '{"ctx": "a',
    "a context that is a number": json.dumps({**TALK, "ctx": 5}),
    "a context that is null": json.dumps({**TALK, "ctx": None}),
    "a context in parts, one of them null": json.dumps(
        {**TALK, "ctx_a": "a", "ctx_b": None, "activity_label": "Food"}
    ),
    "a context in parts without a label": json.dumps({**TALK, "ctx_a": "a", "ctx_b": "b"}),
    "endings that are a text": json.dumps({**TALK, "endings": "abcd"}),
    "endings that are numbers": json.dumps({**TALK, "endings": [1, 2, 3, 4]}),
    "three endings": json.dumps({**TALK, "endings": list("abc")}),
    "no ending": json.dumps({**TALK, "endings": []}),
    "a label of 4": json.dumps({**TALK, "label": 4}),
    "a label below 0": json.dumps({**TALK, "label": -1}),
    "a label that is a list": json.dumps({**TALK, "label": [0]}),
    "a label that is null": json.dumps({**TALK, "label": None}),
    "an empty label": json.dumps({**TALK, "label": ""}),
    "100,000 brackets": "[" * 100_000,
    "a number of 5,000 digits": "1" * 5000,
    "bytes that are not UTF-8": b"\xff\xfe",
    "two megabytes": json.dumps({**TALK, "ctx": "x" * 2_000_000}),
}
HELLASWAG = [
    Case(
        f"a line of HellaSwag: {name}",
        EVALUATE.format("hellaswag"),
        make=lambda here, run, line=line: write(here / "d/hellaswag_val.jsonl", line),
        says="hellaswag",
    )
    for name, line in LINES.items()
] + [
    Case(
        "HellaSwag with a line of ten gigabytes",
        EVALUATE.format("hellaswag"),
        make=lambda here, run: write(
            here / "d/hellaswag_val.jsonl.gz", gzip.compress(b"x" * 2**24) * 640
        ),
        says="hellaswag",
    ),
    Case(
        "HellaSwag with 300,000 good questions",
        EVALUATE.format("hellaswag"),
        make=lambda here, run: write(
            here / "d/hellaswag_val.jsonl.gz",
            gzip.compress((json.dumps(TALK) + "\n").encode() * 1000) * 300,
        ),
        says="more than 200,000 questions",
    ),
    Case(
        "HellaSwag that is called .gz and is not",
        EVALUATE.format("hellaswag"),
        make=lambda here, run: write(here / "d/hellaswag_val.jsonl.gz", json.dumps(TALK)),
        says="cannot be read",
    ),
]

TASKS = [
    Case(
        f"the task {task!r}",
        ["evaluate", "--model", "RUN/base", "--data", "d", "--out", "o", "--tasks", task],
        make=lambda here, run: (here / "d").mkdir(),
        says=said,
    )
    for task, said in {
        "helaswag": "did you mean 'hellaswag'?",
        "../../evil": "unknown task",
        "cmmlu_": "unknown task",
        "x" * 500: "unknown task",
        "[": "unknown task",
        "hellaswag": "no such file",
        "mmlu": "no such file",
    }.items()
]

CASES = [*ODD_TABLES, *ZIPS, *HELLASWAG, *TASKS]
