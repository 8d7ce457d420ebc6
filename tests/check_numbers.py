"""Numbers in prose that nothing holds, one line for each; by hand:

    python tests/check_numbers.py                          # every notebook and the changelog
    python tests/check_numbers.py 03_search a12_bits       # some

A number is held by an output or the code (without comments) of its notebook; by a file that the
same cell links to or names, such as another notebook or the recipe `tiny`; by a benchmark such
as `tests/bench_init.py` that is named under the same heading of the cell; or by a link to the web
in the same sentence, which is its source. It may be rounded: 2.93 is held by 2.9304, 41.5% by
0.4153, 25 GB by 24,903,123,456; and after a word such as "about" 30,000 is held by 29,874. Whole
numbers up to twelve count things and are free, unless a unit follows. COMMON has what the whole
book speaks of, and where it comes from. tests/test_numbers.py holds every notebook to this.
"""

import ast
import io
import json
import math
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ONLINE = "https://github.com/cmixtral/cmixtral_nb/blob/main/"  # where a page links to a file
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(NBS.glob("*.ipynb"))

PAPER, PLAN = "cmixtral_nb/recipes/paper.toml", "nbs/a19_plan.ipynb"
COMMON = {  # what any chapter may say -> the file that holds it
    "57,000": PAPER,  # pieces of the seed's tokenizer
    "25,000": PAPER,  # those that it added
    "6,414": PAPER,  # single characters among them
    "42 billion": PAPER,  # tokens that it was trained on
    "30 billion": PAPER,
    "12 billion": PAPER,
    "32,000": PLAN,  # pieces of Mixtral's tokenizer
    "46.7 billion": PLAN,  # parameters of Mixtral-8x7B
    "46.9 billion": PLAN,  # with 57,000 rows
    "94 GB": PLAN,  # in 16 bits
    "25 GB": PLAN,  # in 4 bits
}
EXCEPTIONS = {  # what nothing here can measure -> why it may stand
    "64": "weights in a block of NF4, by its definition",
    "256": "values of a byte",
    "65,536": "values of two bytes",
    "95%": "what the intervals of this book hold",
}
FREE = [*COMMON, *EXCEPTIONS]

SCALES = {
    **dict.fromkeys(("k", "K", "kB", "KB", "thousand"), 1e3),
    **dict.fromkeys(("M", "MB", "MiB", "million"), 1e6),
    **dict.fromkeys(("B", "GB", "GiB", "billion"), 1e9),
    **dict.fromkeys(("TB", "trillion"), 1e12),
    **{"万": 1e4, "亿": 1e8},
}
UNITS = (
    "%|×|percent|times|GB|MB|kB|KB|TB|GiB|MiB|bytes|ms|µs|seconds?|minutes?|hours?|days?|"
    "points?|bits per byte|nats|thousand|million|billion|trillion|万|亿"
)
ABOUT = (
    r"(?i:about|some|around|roughly|nearly|almost|over|under|above|below|beyond|least|most|than|"
    r"good|≈|~|约|近|超过)\s*$"
)
NAMES = (  # what a number behind it belongs to, as its name
    r"(?:[Cc]hapters?|layers?|experts?|steps?|seeds?|exercises?|issues?|sections?|figures?|tables?|"
    r"parts?|versions?|arXiv|Python|transformers|[Tt]orch|PyTorch|peft|Llama|Gemma|Qwen|GPT|"
    r"DeepSeek|Unicode|CUDA|RTX|WCAG|GLM|Huozi|Mistral|Phi|ISO|column|line|page|item|appendi\w+|"
    r"vLLM|mergekit|releases?|llama\.cpp|lm-eval)\s(?:[\d.]+ (?:to|and|or) )?$"
)
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
TEENS = ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
ONES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = dict(zip(TEENS, range(13, 20), strict=True))
WORDS |= {word: 10 * n for n, word in enumerate(TENS, start=2)}
WORDS |= {f"{t}-{o}": WORDS[t] + i for t in TENS for i, o in enumerate(ONES, start=1)}
NUMBER = re.compile(r"(?<![A-Za-z0-9_.,^])(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(e[-+]?\d+)?(?![,.]?\d)")
IN_OUTPUT = re.compile(r"\d+(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+")


class Claim(NamedTuple):
    "A number in prose"

    text: str  # as it is written
    value: float
    slack: float  # by how much what it was rounded from may differ
    scales: tuple[float, ...]  # what the held number may be multiplied with
    sentence: str
    rest: str  # the sentence from the number on


# ---- prose


def plain(markdown: str) -> str:
    "Without code, formulas, tags and targets of links"
    text = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.M | re.S)
    text = re.sub(r"`[^`]*`", "`", text)
    text = re.sub(r"\$\$.*?\$\$|(?<!\\)\$[^$\n]+\$", "", text, flags=re.S)
    text = re.sub(r"<[^>]+>", "", text)
    return re.sub(r"!?\[([^\]]*)\]\(([^)]*)\)", link_text, text)


def link_text(found: re.Match) -> str:
    "A link to the web leaves a mark, one to a file of the book only its words"
    return (
        f"{found[1]}⟨web⟩" if found[2].startswith("http") else re.sub(r"^\w*\d\w*$", "", found[1])
    )


def sentences(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|\n(?=\|)", text):
        block = re.sub(r"^\s*(?:\d+\.|[-*])\s+", "", block)  # the number of an item
        block = re.sub(r"^#+ .*", "", block)  # headings
        yield from re.split(r"(?<=[.!?])\s+(?=[A-Z*`\d])|(?<=[。；])", block.replace("\n", " "))


def with_source(text: str) -> Iterator[tuple[str, bool]]:
    "Sentences, and whether a link to the web is their source; a table's may stand just before it"
    last = False
    for paragraph in re.split(r"\n\s*\n", text):
        is_table = paragraph.startswith("|")
        for sentence in sentences(paragraph):
            yield sentence, "⟨web⟩" in sentence or (is_table and last)
        last = "⟨web⟩" in paragraph


def names_a_benchmark(markdown: str) -> bool:
    found = re.findall(r"\b(bench_\w+)", markdown)
    return any((ROOT / "tests" / f"{name}.py").is_file() for name in found)


def without_measured(markdown: str) -> str:
    "Without the sections that name the benchmark they come from"
    sections = re.split(r"(?m)^(?=#+ )", markdown)
    return "\n\n".join(text for text in sections if not names_a_benchmark(text))


def claims(markdown: str) -> Iterator[Claim]:
    "Numbers that need something that holds them"
    for sentence, sourced in with_source(plain(without_measured(markdown))):
        if sourced:
            continue
        for word in re.findall(r"[a-z]+(?:-[a-z]+)?", sentence.lower()):
            if word in WORDS:
                yield Claim(word, WORDS[word], 0, (1,), sentence, word)
        for found in NUMBER.finditer(sentence):
            if claim := claim_of(found, sentence):
                yield claim


def claim_of(found: re.Match, sentence: str) -> Claim | None:
    "None where a number is a name, a year, or counts a few things"
    before, after = sentence[: found.start()], sentence[found.end() :]
    digits = found[1].replace(",", "")
    value = float(digits + (found[2] or "") + (found[3] or ""))
    suffix = re.match(r"\s?([A-Za-z]+|[万亿])", after)
    word = suffix[1] if suffix else ""
    unit = re.match(rf"[\s-]*(?:{UNITS})(?![A-Za-z])", after)
    if re.search(r"[A-Za-z][\w.]*-$", before) or re.search(NAMES, before):
        return None  # Llama-3, layer 1
    if re.match(r"[A-Za-z]", after) and word not in SCALES and word not in ("x", "s"):
        return None  # 8x7B, 4bit
    if re.match(r"[\s-]?bits?\b", after) and not re.match(r"\s?bits per byte", after):
        return None  # a format: 4 bits
    whole = not found[2] and not found[3]
    if whole and "," not in found[1] and 1900 <= value < 2030:
        return None
    if whole and value <= 12 and not unit:
        return None
    decimals = len(found[2] or ".") - 1
    step = 10.0**-decimals
    if whole and re.search(ABOUT, before):
        step = 10.0 ** (len(digits) - len(digits.rstrip("0")))
    if found[3]:
        step = 0.5 * 10.0 ** math.floor(math.log10(value))
    scales: tuple[float, ...] = (1,)
    if word in SCALES:
        scales = (1, 1 / SCALES[word], 1e-3, 1e3)
    if re.match(r"\s?%", after):
        scales = (1, 100)
    return Claim(found[0], value, step / 2, scales, sentence, sentence[found.start() :])


# ---- what holds it


def numbers_in(text: str) -> set[float]:
    return {float(n.replace(",", "")) for n in IN_OUTPUT.findall(text)}


def without_comments(source: str) -> str:
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, IndentationError, SyntaxError):  # a magic
        return source
    return " ".join(token.string for token in tokens if token.type != tokenize.COMMENT)


def constants(source: str) -> set[float]:
    "Numbers of code as Python reads them: 5_000 and 4 * 1024 too"
    try:
        tree = ast.parse(re.sub(r"(?m)^\s*[!%].*$", "", source))
    except SyntaxError:
        return set()
    found = {
        float(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float)
    }
    return {n for n in found if math.isfinite(n)}


def said(output: dict) -> str:
    "Text of an output; of a picture, that of its SVG"
    data = output.get("data", {})
    texts = [
        "".join(text)
        for kind, text in data.items()
        if kind.startswith("text/") or kind == "image/svg+xml"
    ]
    return "\n".join([*texts, "".join(output.get("text", []))])


def held_by(path: Path) -> frozenset[float]:
    "Numbers that a file can hold"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return held_by_cells(text)
    return frozenset(numbers_in(text) | (constants(text) if path.suffix == ".py" else set()))


@cache
def held_by_cells(notebook: str) -> frozenset[float]:
    "Numbers of outputs and code, and those in prose that have a source on the web beside them"
    found: set[float] = set()
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        if cell["id"].startswith("colab-"):
            continue
        if cell["cell_type"] != "code":
            sourced = [text for text, has_source in with_source(plain(source)) if has_source]
            found |= numbers_in(" ".join(sourced))
            continue
        found |= numbers_in(without_comments(source)) | constants(source)
        for output in cell["outputs"]:
            found |= numbers_in(said(output))
    return frozenset(found)


def named_files(markdown: str) -> Iterator[Path]:
    "Files of the project that a cell links to or names"
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", markdown)
    yield from (NBS / link for link in links if not link.endswith((".png", ".html")))
    yield from (ROOT / path for path in re.findall(rf"\]\({re.escape(ONLINE)}([^)#\s]+)", markdown))
    for name in re.findall(r"`([\w./-]+)`", markdown):
        stem = name.removeprefix("tests/").removesuffix(".py")
        yield ROOT / "cmixtral_nb" / "recipes" / f"{name.removesuffix('.toml')}.toml"
        yield ROOT / "tests" / f"{stem}.py"
        yield NBS / f"{name}.ipynb"


def is_held(claim: Claim, held: frozenset[float] | set[float]) -> bool:
    slack = claim.slack + 1e-9 * max(1, claim.value)
    return any(abs(n * scale - claim.value) <= slack for n in held for scale in claim.scales)


def is_free(claim: Claim) -> bool:
    return any(re.match(rf"{re.escape(known)}(?![\d,.]\d|\w)", claim.rest) for known in FREE)


def faults(path: Path) -> list[str]:
    "Numbers in the prose of a notebook that nothing holds"
    out = []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "markdown" or cell["id"].startswith("colab-"):
            continue
        text = "".join(cell["source"])
        files = [path, *(file for file in named_files(text) if file.is_file())]
        held: frozenset[float] = frozenset().union(*map(held_by, files))
        for claim in claims(text):
            if not is_free(claim) and not is_held(claim, held):
                out.append(f"cell {number}: {claim.text} in {claim.sentence.strip()[:160]!r}")
    return out


def main(argv: list[str]) -> None:
    for path in NOTEBOOKS:
        if not argv or path.stem in argv:
            found = faults(path)
            print(path.stem, *(found or ["every number is held"]), sep="\n  ")


if __name__ == "__main__":
    main(sys.argv[1:])
