"Choosing a vocabulary: ALP against its definition, closed selections, bad inputs."
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmixtral_nb.artifact import StageError
from cmixtral_nb.corpus import corpus
from cmixtral_nb.search import (alp, base_pieces, choose, default_grid, heldout, knee, plot_search, read_choice, run_model, search,
                                search_table, select_pieces, sentence_runs, token_counts)
from cmixtral_nb.tokenizer import Piece, base_tokenizer_model, read_pieces, tokenizer

BASE = {"中": 0.0, "国": -1.0, "中国": -2.0}
PIECES = [Piece("人", -9, "char", 9), Piece("民", -8, "char", 5), Piece("国", -7, "char", 4), Piece("囧", -6, "char", 1),
          Piece("国人", 0, "word", 3), Piece("囧人", -1, "word", 2), Piece("人民", -2, "word", 2), Piece("中国", -3, "word", 9),
          Piece("中国人民", -4, "word", 1)]


def names(pieces):
    return [p.piece for p in pieces]


# ---- ALP

@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=1, max_size=8))
def test_alp_equals_its_definition(sentences):
    n = Counter(w for s in sentences for w in s)
    total = sum(n.values())
    naive = sum(math.log(n[w] / total) for s in sentences for w in s) / len(sentences)
    assert math.isclose(alp(np.bincount([w for s in sentences for w in s], minlength=9).astype(float), len(sentences)), naive, abs_tol=1e-9)


def test_alp_of_one_word_is_zero():
    assert alp(np.array([0., 7.]), 3) == 0


def test_sentences_and_runs():
    runs, n = sentence_runs(["中国。人民！no Han here. 中国人，民\n中国"])
    assert n == 4 and runs == Counter({"中国": 2, "人民": 1, "中国人": 1, "民": 1})


def test_token_counts_weigh_runs():
    sp = run_model(BASE, PIECES[:2])
    n = token_counts(sp, Counter({"中国人": 3, "民": 2, "囧": 1}))
    assert {sp.id_to_piece(i): int(k) for i, k in enumerate(n) if k} == {"中国": 3, "人": 3, "民": 2, "<0xE5>": 1, "<0x9B>": 1, "<0xA7>": 1}
    assert len(n) == len(sp) and token_counts(sp, Counter({"人": 1})).sum() == 1


# ---- selection

def test_selection_is_closed_and_in_order():
    assert names(select_pieces(PIECES, BASE, 9)) == ["人", "民", "囧", "国人", "囧人", "人民", "中国人民"]
    assert names(select_pieces(PIECES, BASE, 9, 4)) == ["人", "民", "国人", "人民", "中国人民"]
    assert names(select_pieces(PIECES, BASE, 3, 3)) == ["人", "国人"]
    assert names(select_pieces(PIECES, BASE, 1)) == ["人"]
    assert select_pieces(PIECES, BASE, 5, 1) == []


@given(st.integers(0, 9), st.integers(0, 6))
def test_selections_grow_by_appending(n, c):
    a, b = names(select_pieces(PIECES, BASE, n, c)), names(select_pieces(PIECES, BASE, n + 1, c))
    assert set(a) <= set(b) and len(a) <= n


def test_run_model_scores_new_pieces_below_the_base():
    sp = run_model(BASE, select_pieces(PIECES, BASE, 9))
    assert sp.encode("中国人", out_type=str) == ["中国", "人"]  # the base's merge is done before 国人
    assert sp.encode("国人", out_type=str) == ["国人"]


# ---- the knee and the choice

def test_knee_of_short_flat_and_convex_curves():
    assert knee([1, 2], [1, 2]) is None and knee([1, 2, 3], [5, 5, 5]) is None and knee([1, 2, 3, 4], [1, 4, 9, 16]) is None
    x = np.arange(1, 60)
    assert knee(list(x), list(1 - np.exp(-x / 8))) in range(10, 25)


def row(n_chars, n_pieces, a):
    return dict(n_chars=n_chars, n_pieces=n_pieces, alp=a, chars_per_token=1.)


def test_choice_takes_the_best_characters_at_the_knee():
    rows = [row(c, t, -100 + min(4 * t, 30 + t) - abs(c - 20)) for c in (10, 20, 30) for t in range(1, 31)]
    c = choose(rows)
    assert (c["n_pieces"], c["n_chars"]) == (10, 20) and "knee" in c["why"]
    c = choose([row(10, 100, -5.), row(10, 200, -4.)])
    assert c["n_pieces"] == 200 and c["why"].startswith("no knee between 100 and 200 pieces")


# ---- the stage

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("search")
    c = corpus(["zh=builtin:zh"], out=d / "corpus", valid_share=.3, limit_chars=120_000)
    return d, c, tokenizer(c, out=d / "pieces", n_pieces=3500, n_chars=2200)


def test_table_against_whole_models(made):
    _, c, pieces = made
    base = base_pieces(base_tokenizer_model())
    runs, n = sentence_runs(list(heldout(c))[:200])
    rows = search_table(read_pieces(pieces), base, runs, n, [300, 600], [1600, 1650, 9999])
    assert [(r["n_chars"], r["n_pieces"], r["n_new_chars"]) for r in rows] == [
        (1600, 300, 144), (1600, 600, 144), (1650, 300, 194), (1650, 600, 194), (1683, 300, 227), (1683, 600, 227)]
    assert rows[0]["n_tokens"] > rows[1]["n_tokens"] and rows[0]["alp"] < rows[1]["alp"] < 0
    sp = run_model(base, select_pieces(read_pieces(pieces), base, 600, 1650))
    assert rows[3]["n_tokens"] == sum(len(sp.encode(r)) * k for r, k in runs.items())


def test_search_writes_table_choice_and_curve(made, capsys):
    d, c, pieces = made
    s = search(pieces, c, out=d / "s", chars=["1500", "1600"], totals=[200, 400, "600"], limit_chars=20_000)
    table = (s / "table.tsv").read_text().splitlines()
    assert table[0].split("\t") == ["n_chars", "n_new_chars", "n_pieces", "n_tokens", "chars_per_token", "alp"] and len(table) == 1 + s.stats["n_tried"]
    assert read_choice(s) == (s.stats["n_pieces"], s.stats["n_chars"]) == read_choice(s / "choice.json")
    assert (s / "curve.svg").read_text().startswith("<?xml") and "vocabularies tried" in capsys.readouterr().out
    assert s.stats["chars_per_token"] > s.stats["chars_per_token_base"] and s.stats["alp"] > s.stats["alp_base"]


def test_default_grid_reaches_all_candidates():
    totals, chars = default_grid(PIECES, BASE)
    assert totals[-1] == 7 and chars[-1] == 2 + 3 and len(totals) == 10 and len(chars) == 4


def test_figure_has_a_curve_for_each_number_of_characters():
    rows = [row(c, t, -9. + t) for c in (1, 2) for t in (1, 2, 3)]
    ax = plot_search(rows, choose(rows)).axes[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["1", "2", "choice"] and "nats" in ax.get_ylabel()


def test_all_faults_at_once(tmp_path):
    with pytest.raises(StageError) as e:
        search(tmp_path / "p", tmp_path / "c", out=tmp_path / "s", base="gemma", chars=["many"], totals=[0, 5])
    assert len(e.value.args) == 5
    for words in ("chars is ['many'], expected whole numbers from 1 on", "totals is [0, 5], expected", "expected pieces; run: cmixtral tokenizer",
                  "gemma: no such tokenizer", "does not exist, expected a corpus"):
        assert words in str(e.value)


def test_nothing_held_out_and_nothing_to_cut(made, tmp_path):
    d, _, pieces = made
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": f"第{i}篇文章讲词表"}) + "\n" for i in range(9))
    c = corpus([f"zh={tmp_path}/a.jsonl"], out=tmp_path / "c", valid_share=0, min_chars=5)
    with pytest.raises(StageError, match="has no held-out zh text; run: cmixtral corpus --valid-share 0.01"):
        search(pieces, c, out=tmp_path / "s")
    with pytest.raises(StageError, match="has no en text, it has zh"):
        search(pieces, c, out=tmp_path / "s", lang="en")
    (tmp_path / "en.txt").write_text("no Han at all")
    with pytest.raises(StageError, match="has no Han characters; run: cmixtral corpus"):
        search(pieces, tmp_path / "en.txt", out=tmp_path / "s")
    with pytest.raises(StageError, match="candidates are too few for every total"):
        search(pieces, tmp_path / "a.jsonl", out=tmp_path / "s", totals=[99999])
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("content, words", [("{", "not valid JSON"), ('{"n_pieces": "9"}', "holds no choice"), ("[]", "holds no choice")])
def test_choices_that_are_none(tmp_path, content, words):
    (tmp_path / "choice.json").write_text(content)
    with pytest.raises(StageError, match=words):
        read_choice(tmp_path)
    with pytest.raises(StageError, match="no such file"):
        read_choice(tmp_path / "none")
