"Training and reading pieces: parity with the naive version, foreign files, bad inputs."
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmixtral_nb.artifact import StageError
from cmixtral_nb.corpus import corpus
from cmixtral_nb.tokenizer import (Piece, base_tokenizer_model, char_counts, describe_pieces, frequent_chars, mix_lexicon, read_lexicon,
                                   read_model, read_pieces, script_runs, split_runs, tokenizer, train_pieces, word_counts, write_pieces)

TEXTS = [f"扩充词表之后，继续预训练 model {i}。中文词表，中文模型！" for i in range(30)] + ["囧 only once"]
HAN = st.text(alphabet="中国人民大学生活", min_size=1, max_size=12)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    return tmp_path


# ---- runs

@given(st.lists(st.text(alphabet="中国a，1 ", max_size=20)))
def test_runs_hold_every_character_of_the_script_and_no_other(texts):
    runs = script_runs(texts)
    assert char_counts(runs) == Counter(c for t in texts for c in t if c in "中国")


@given(st.dictionaries(HAN, st.integers(1, 9), max_size=20), st.integers(1, 8), st.integers(1, 5))
def test_split_runs_keeps_the_mass_of_the_kept_characters(runs, n_chars, longest):
    chars = frequent_chars(runs := Counter(runs), n_chars)
    out = split_runs(runs, chars, longest) if chars else Counter()
    assert char_counts(out) == Counter({c: n for c, n in char_counts(runs).items() if c in chars})
    assert all(len(r) <= longest for r in out)


def test_frequent_chars_breaks_ties_by_code_point():
    assert frequent_chars(Counter({"国中": 2, "人": 3}), 2) == ["人", "中"] and len(frequent_chars(Counter({"国中": 2, "人": 3}), 0)) == 3


# ---- training

def naive_bpe(runs, n_merges):
    words, merges = {tuple(r): k for r, k in runs.items()}, []
    for _ in range(n_merges):
        pairs = Counter()
        for w, k in words.items():
            for p in zip(w, w[1:], strict=False):
                pairs[p] += k
        best = max(pairs, key=pairs.get)
        merges.append("".join(best))
        new = Counter()
        for w, k in words.items():
            out, i = [], 0
            while i < len(w):
                n = 1 + (w[i:i + 2] == best)
                out.append("".join(w[i:i + n]))
                i += n
            new[tuple(out)] += k
        words = new
    return merges


def test_merges_equal_the_naive_ones_where_no_counts_are_equal(tmp_path):
    runs = Counter({"甲乙": 100, "丙丁": 61, "甲乙戊": 37, "丙丁己": 19, "庚辛壬": 11, "庚辛": 5})
    n = len(char_counts(runs))
    pieces = describe_pieces(train_pieces(runs, tmp_path / "m.model", n + 5), runs)
    assert [p.piece for p in pieces if p.kind == "word"] == naive_bpe(runs, 5)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.model"]


def test_parts_come_before_wholes_and_only_han(here):
    words = [p.piece for p in read_pieces(tokenizer("a.txt", out="p", n_pieces=60, n_chars=0)) if p.kind == "word"]
    chars = {p.piece for p in read_pieces("p") if p.kind == "char"}
    for i, w in enumerate(words):
        assert any({w[:k], w[k:]} <= chars | set(words[:i]) for k in range(1, len(w))), w
    assert all("\u4e00" <= c <= "\u9fff" for w in words for c in w)


def test_two_trainings_are_equal(here):
    a, b = (tokenizer("a.txt", out=o, n_pieces=60, n_chars=0) for o in "ab")
    assert a.fingerprint == b.fingerprint and sorted(a.manifest["files"]) == ["pieces.tsv", "spm.model"]


def test_fewer_merges_than_asked_for_is_no_error(here):
    (here / "few.txt").write_text("中国，中国，中国", encoding="utf-8")
    p = tokenizer("few.txt", out="p", n_pieces=500, n_chars=0)
    assert p.stats["n_chars"] == 2 and [q.piece for q in read_pieces(p)] == ["中", "国", "中国"]


def test_very_long_runs_are_not_lost(here):
    (here / "long.txt").write_text("中国人民" * 5000, encoding="utf-8")
    p = tokenizer("long.txt", out="p", n_pieces=20, n_chars=0)
    assert p.stats["n_script_chars"] == 20000 and "中国" in {q.piece for q in read_pieces(p)}


def test_other_scripts(here):
    (here / "ru.txt").write_text("слово слова слову\n\nслово", encoding="utf-8")
    p = tokenizer("ru.txt", out="p", lang="ru", script="Cyrillic", n_pieces=20, n_chars=0)
    assert "слов" in {q.piece for q in read_pieces(p, "Cyrillic")}
    with pytest.raises(StageError, match="has no piece of Han characters alone"):
        read_pieces(p)


# ---- tables and foreign models

@given(st.lists(st.tuples(HAN, st.integers(-99, 0), st.integers(0, 99)), max_size=20, unique_by=lambda x: x[0]))
@settings(deadline=None, max_examples=30)
def test_table_round_trip(tmp_path_factory, rows):
    f = tmp_path_factory.mktemp("t") / "pieces.tsv"
    pieces = [Piece(t, float(s), "char" if len(t) == 1 else "word", n) for t, s, n in rows]
    write_pieces(f, pieces)
    if pieces:
        assert sorted(read_pieces(f)) == sorted(pieces)


def test_plain_list_and_foreign_model(here):
    (here / "list.txt").write_text("中国\n人\nabc\n人民，\n大学\n", encoding="utf-8")
    assert [p.piece for p in read_pieces("list.txt")] == ["人", "中国", "大学"]
    (here / "t.tsv").write_text("id\tpiece\tscore\n9\t中国\t-1\n7\t人\t-2\n", encoding="utf-8")
    assert read_pieces("t.tsv") == [Piece("人", -2., "char", 0), Piece("中国", -1., "word", 0)]
    mixtral = read_pieces(base_tokenizer_model("mixtral"))
    assert (len(mixtral), [p.piece for p in mixtral[-3:]]) == (1459, ["数据", "获取", "一个"])


@pytest.mark.parametrize("name, content, words", [
    ("bad.tsv", "piece\tscore\tkind\tcount\n中\tx\tchar\t1\n",
     "bad.tsv:2: expected piece, score, kind, count with tabs between them, score and count being numbers"),
    ("bad.tsv", "piece\tscore\n中\n", "bad.tsv:2: expected piece, score with tabs"), ("gbk.tsv", b"\xd6\xd0", "gbk.tsv is not UTF-8"),
    ("latin.tsv", "abc\n", "has no piece of Han characters alone"), ("bad.model", b"\x00\x01rubbish", "bad.model is not a sentencepiece model"),
    ("empty.model", b"", "is not a sentencepiece model")])
def test_files_that_are_no_pieces(here, name, content, words):
    (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StageError) as e:
        read_pieces(name)
    assert words in str(e.value)


def test_missing_pieces(here):
    with pytest.raises(StageError, match="none: no such file or folder, expected pieces; run: cmixtral tokenizer --out none"):
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
    (here / "m/tokenizer.model").write_bytes(b"x")
    assert base_tokenizer_model("m") == base_tokenizer_model("m/tokenizer.model")
    with pytest.raises(StageError, match="llama: no such tokenizer; expected mixtral, a folder"):
        base_tokenizer_model("llama")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StageError, match="run: pip install mistral-common"):
        base_tokenizer_model()


# ---- lexicon

def test_lexicon(here):
    (here / "w.txt").write_text("葡萄 30 n\n石榴 20\nC++ 9\n坏行\n零 0\n", encoding="utf-8")
    words = read_lexicon("w.txt")
    assert words == {"葡萄": 30, "石榴": 20}
    mixed = mix_lexicon(runs := Counter({"中国": 3000, "石榴": 10}), words, .25)
    added = mixed - runs
    assert abs(sum(len(w) * k for w, k in added.items()) / sum(len(w) * k for w, k in mixed.items()) - .25) < .001
    p = tokenizer("a.txt", out="p", n_pieces=80, n_chars=0, lexicon="w.txt", lexicon_share=.3)
    assert {"葡萄", "石榴"} <= {q.piece for q in read_pieces(p)}
    (here / "no.txt").write_text("葡萄\n")
    with pytest.raises(StageError, match='no.txt: no line of the form "word count" with Han characters'):
        tokenizer("a.txt", out="q", n_pieces=80, n_chars=0, lexicon="no.txt")


# ---- the stage

def test_counts_of_words_cover_the_text(here):
    runs = script_runs(TEXTS)
    m = train_pieces(runs, here / "m.model", 60)
    n = word_counts(runs, m)
    assert sum(len(t) * k for t, k in n.items()) == sum(len(r) * k for r, k in runs.items())


def test_reads_a_corpus(here):
    with open("a.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS)
    c = corpus(["zh=a.jsonl"], out="c", valid_share=.2)
    p = tokenizer(c, out="p", n_pieces=60, n_chars=0)
    assert p.manifest["inputs"]["corpus"]["fingerprint"] == c.fingerprint
    with pytest.raises(StageError, match="c has no en text, it has zh; run: cmixtral corpus --sources en=REF"):
        tokenizer(c, out="q", lang="en")


def test_all_faults_at_once(here):
    with pytest.raises(StageError) as e:
        tokenizer("none", out="p", n_pieces=0, n_chars=-1, script="Elvish", lexicon="gone", lexicon_share=1.)
    assert len(e.value.args) == 6
    for words in ("none does not exist, expected a corpus; run: cmixtral corpus", "script 'Elvish' is unknown", "n_pieces is 0, expected at least 1",
                  "n_chars is -1, expected at least 0", "gone: no such file, expected a lexicon", "lexicon_share is 1.0, expected more than 0"):
        assert words in str(e.value)


@pytest.mark.parametrize("kw, words", [
    (dict(n_pieces=5, n_chars=9), "n_chars is 9, more than all 5 pieces"),
    (dict(n_pieces=5, n_chars=0), "different characters, more than 5 pieces; raise n_pieces or set n_chars"),
    (dict(script="Thai", n_pieces=60, n_chars=0), "a.txt holds no Thai characters")])
def test_sizes_that_do_not_fit(here, kw, words):
    with pytest.raises(StageError) as e:
        tokenizer("a.txt", out="p", **kw)
    assert words in str(e.value) and not (here / "p").exists()
