"Choosing a vocabulary: ALP against its definition, closed selections, bad inputs."

import itertools
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmixtral_nb.corpus import corpus
from cmixtral_nb.pieces import Piece, base_tokenizer_model, read_pieces
from cmixtral_nb.runs import run_pattern
from cmixtral_nb.search import (
    Block,
    Heldout,
    alp,
    base_pieces,
    blocks_of,
    choose,
    default_grid,
    growth,
    knee,
    plot_search,
    prefix_counts,
    read_heldout,
    run_model,
    scores_below,
    search,
    search_table,
    select_pieces,
    spread_of,
    stretches,
    token_counts,
)
from cmixtral_nb.search_files import heldout, read_choice
from cmixtral_nb.stages import StageError
from cmixtral_nb.tokenizer import tokenizer
from cmixtral_nb.tokenizer_files import processor
from cmixtral_nb.vocab import extend_model

BASE = {"中": 0.0, "国": -1.0, "中国": -2.0, "，": -3.0}
PIECES = [
    Piece("人", -9, "char", 9),
    Piece("民", -8, "char", 5),
    Piece("国", -7, "char", 4),
    Piece("囧", -6, "char", 1),
    Piece("国人", 0, "word", 3),
    Piece("囧人", -1, "word", 2),
    Piece("人民", -2, "word", 2),
    Piece("中国", -3, "word", 9),
    Piece("中国人民", -4, "word", 1),
]


def names(pieces):
    return [p.piece for p in pieces]


# ---- ALP


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=1, max_size=8))
def test_alp_equals_its_definition(sentences):
    words = [word for sentence in sentences for word in sentence]
    n = Counter(words)
    naive = sum(math.log(n[word] / len(words)) for word in words) / len(sentences)
    counts = np.bincount(words, minlength=9).astype(float)
    assert math.isclose(alp(counts, len(sentences)), naive, abs_tol=1e-9)


def test_alp_of_one_word_is_zero():
    assert alp(np.array([0.0, 7.0]), 3) == 0


def test_heldout_takes_the_runs_out():
    texts = ["中国。人民！no Han here. 中国人，民\n中国", "  缩进"]
    h = read_heldout(texts, base_tokenizer_model())
    assert h.n_sentences == 5
    assert h.n_chars == 31
    runs = ["▁中国", "。人民", "▁中国人", "，民", "中国", "缩进"]
    assert h.runs == Counter(runs)
    assert h.rest["<0x0A>"] == 1
    assert h.rest["▁▁▁"] == 1  # the base joins the blanks, so no run begins with one


@pytest.mark.parametrize("script", ["Han", "Latin", "Han Kana", "Arabic", "Cyrillic"])
def test_with_nothing_appended_the_counts_are_the_bases(script):
    base = base_tokenizer_model()
    texts = [
        "中国。人民！--foo __init__ (bar)  龘",
        'カタカナと漢字 ، سلام, "quoted" ²',
        "It's “said”: привет, мир—и #слово",
    ]
    text = read_heldout(texts, base, script)
    counts = token_counts(run_model(base_pieces(base, script), []), text)
    assert counts == Counter(t for ts in processor(base).encode(texts, out_type=str) for t in ts)
    assert text.runs
    assert all(run_pattern(script).fullmatch(run) for run in text.runs)


def test_stretches_join_tokens_of_the_script():
    assert list(stretches(["▁", "我", "们", "，", "and"])) == ["▁我们", "，", "and"]
    assert list(stretches(["and", "我", "，", "，", "们"])) == ["and", "我", "，", "，们"]
    assert list(stretches(["a我", "们"])) == ["a我", "们"]  # what no piece could hold stays alone


def test_token_counts_weigh_runs():
    sp = run_model(BASE, PIECES[:2])
    h = Heldout(Counter({"中国人": 3, "民": 2, "囧": 1}), Counter({"▁the": 5}), 20, 2)
    assert token_counts(sp, h) == Counter(
        {"▁the": 5, "中国": 3, "人": 3, "民": 2, "<0xE5>": 1, "<0x9B>": 1, "<0xA7>": 1}
    )


def test_scores_stay_apart_in_float32():
    for low in (0.0, -31740.0, -1e9):
        x = np.array(scores_below(low, 40_000), np.float32)
        assert (np.diff(x) < 0).all()
        assert x[0] < np.float32(low)


# ---- selection


def test_selection_is_closed_and_in_order():
    assert names(select_pieces(PIECES, BASE, 9, 9)) == [
        "人",
        "民",
        "囧",
        "国人",
        "囧人",
        "人民",
        "中国人民",
    ]
    assert names(select_pieces(PIECES, BASE, 9, 4)) == ["人", "民", "国人", "人民", "中国人民"]
    assert names(select_pieces(PIECES, BASE, 3, 3)) == ["人", "国人"]
    assert names(select_pieces(PIECES, BASE, 1)) == ["人"]
    assert select_pieces(PIECES, BASE, 5, 1) == []


def test_order_by_tokens_saved():
    # 人 saves 18, 民 10, 国人 3; 囧 saves 2 as 囧人 and 人民 do, and stands before them
    assert names(select_pieces(PIECES, BASE, 9)) == [
        "人",
        "民",
        "国人",
        "囧",
        "囧人",
        "人民",
        "中国人民",
    ]
    unknown = [p._replace(count=0) for p in PIECES]
    assert names(select_pieces(unknown, BASE, 9)) == [
        "人",
        "民",
        "囧",
        "国人",
        "囧人",
        "人民",
        "中国人民",
    ]


def test_equal_scores_of_the_base_are_joined_from_the_left():
    base = dict.fromkeys(["中", "国", "人", "国人", "中国"], 0.0)
    pieces = [Piece("中国人", -1.0, "word", 3), Piece("国人中", -2.0, "word", 2)]
    steps = growth(pieces, base)
    assert [s.parts for s in steps] == [("中国", "人"), ("国人", "中")]
    sp = run_model(base, [s.piece for s in steps[:1]])
    assert sp.encode("国人中", out_type=str) == ["国人", "中"]
    assert run_model(base, []).encode("中国人", out_type=str) == ["中国", "人"]


def test_what_cannot_be_built_is_left_out():
    "人民大 and 。人 lack a part, 中国民 is 中国 + 民"
    odd = [
        Piece("人", 0, "char", 9),
        Piece("民", 0, "char", 9),
        Piece("大", 0, "char", 9),
        Piece("人民大", 0, "word", 5),
        Piece("国民", -1, "word", 5),
        Piece("中国民", -2, "word", 4),
        Piece("。人", -3, "word", 4),
        Piece("，人", -4, "word", 4),
    ]
    assert names(select_pieces(odd, BASE, 9)) == ["人", "民", "大", "国民", "中国民", "，人"]
    assert [s.parts for s in growth(odd, BASE)][3:] == [("国", "民"), ("中国", "民"), ("，", "人")]


@given(
    st.lists(st.text(alphabet="中国人民囧，", min_size=1, max_size=9), min_size=1, max_size=30),
    st.integers(0, 6),
)
@settings(deadline=None)
def test_every_prefix_equals_the_vocabulary_built_for_it(runs, n_chars):
    steps = growth(PIECES, BASE, n_chars)
    text = Heldout(Counter(runs), Counter(x=1), 1, 1)
    totals = list(range(len(steps) + 1))
    for n, counts in prefix_counts(steps, BASE, text, totals).items():
        alone = run_model(BASE, [s.piece for s in steps[:n]])
        assert counts == token_counts(alone, text)


@given(st.integers(0, 9), st.integers(0, 6))
def test_selections_grow_by_appending(n, c):
    a, b = names(select_pieces(PIECES, BASE, n, c)), names(select_pieces(PIECES, BASE, n + 1, c))
    assert set(a) <= set(b)
    assert len(a) <= n


def test_run_model_scores_new_pieces_below_the_base():
    sp = run_model(BASE, select_pieces(PIECES, BASE, 9))
    # the base's merge is done before 国人
    assert sp.encode("中国人", out_type=str) == ["中国", "人"]
    assert sp.encode("国人", out_type=str) == ["国人"]


# ---- the knee and the choice


def test_knee_of_short_flat_and_convex_curves():
    assert knee([1, 2], [1, 2]) is None
    assert knee([1, 2, 3], [5, 5, 5]) is None
    assert knee([1, 2, 3, 4], [1, 4, 9, 16]) is None
    x = np.arange(1, 60)
    assert knee(list(x), list(1 - np.exp(-x / 8))) in range(10, 25)


def row(n_chars, n_pieces, a, domain="mean", last=50.0):
    return dict(
        n_chars=n_chars,
        n_all_chars=n_chars,
        n_pieces=n_pieces,
        domain=domain,
        alp=a,
        chars_per_token=1.0,
        n_tokens=1000 - n_pieces,
        per_row=2 * last,
        per_last_row=last,
        n_params=n_pieces,
        bf16_bytes=n_pieces,
    )


def test_choice_takes_the_best_characters_at_the_knee():
    rows = [row(10, 5, 9.0, "news")]
    for n_chars in (10, 20, 30):
        for total in range(1, 31):
            bent = min(4 * total, 30 + total)  # at 10
            rows.append(row(n_chars, total, -100 + bent - abs(n_chars - 20)))
    choice = choose(rows, 1200)
    assert (choice["n_pieces"], choice["n_chars"]) == (10, 20)
    assert "the knee of the best ALP of 30 totals" in choice["why"]
    assert "17.5% fewer tokens" in choice["why"]
    choice = choose([row(10, 100, -5.0), row(10, 200, -4.0)], 2000)
    assert choice["n_pieces"] == 200
    assert "no knee, so the last of 2 totals" in choice["why"]


def test_verdict_asks_what_is_saved_and_what_will_be_trained():
    rows = [row(10, 100, -5.0, last=50.0), row(10, 200, -4.0, last=10.0)]
    little = "do not extend: 200 pieces save 5.9% of the tokens, less than 10%"
    assert choose(rows, 850)["why"].startswith(little)
    choice = choose(rows, 2000, budget=1e6)
    assert choice["n_pieces"] == 100
    assert "the largest total up to no knee, so the last (200) of 2 totals" in choice["why"]
    assert "at which one of the last tenth of the pieces is seen 20 times" in choice["why"]
    assert "one of the last tenth of the pieces 50 times" in choice["why"]
    choice = choose(rows, 1050, budget=1e6, min_saving=0.2)  # 200 pieces would save enough
    assert choice["n_pieces"] == 0
    assert choice["why"].startswith(
        "do not extend: 100 pieces save 14.3% of the tokens, less than 20%; it is the largest total"
    )
    choice = choose(rows, 2000, budget=1e5)
    assert choice["n_pieces"] == 0
    seldom = (
        "in 100,000 characters of training one of the last tenth of the pieces is seen 5.0 times "
        "with 100 pieces, fewer than 20"
    )
    assert seldom in choice["why"]


# ---- the stage


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("search")
    c = corpus(["zh=builtin:zh"], out=d / "corpus", valid_share=0.3, limit_chars=120_000)
    return d, c, tokenizer(c, out=d / "pieces", n_pieces=3500, n_chars=2200)


def test_table_against_whole_tokenizers(made):
    _, c, folder = made
    base_file = base_tokenizer_model()
    base, pieces = base_pieces(base_file), read_pieces(folder)
    texts = {domain: docs[:60] for domain, docs in heldout(c).items()}
    held = {domain: read_heldout(docs, base_file) for domain, docs in texts.items()}
    rows = search_table(pieces, base, held, [300, 600], [0, 1600, 1650, 9999])
    assert len({(r["n_chars"], r["n_pieces"]) for r in rows}) == 8
    assert {r["domain"] for r in rows} == {*texts, "mean"}
    for r in rows:
        if r["domain"] == "mean":
            continue
        docs = texts[r["domain"]]
        chosen = select_pieces(pieces, base, r["n_pieces"], r["n_chars"])
        sp = processor(extend_model(base_file, chosen))
        n = Counter(i for ids in sp.encode(docs) for i in ids)
        assert r["n_tokens"] == n.total()
        assert math.isclose(r["chars_per_token"], sum(map(len, docs)) / n.total())
        own_alp = alp(np.array(list(n.values()), float), held[r["domain"]].n_sentences)
        assert math.isclose(r["alp"], own_alp)
        n_bytes = sum(count for i, count in n.items() if sp.is_byte(i))
        assert math.isclose(r["byte_share"], n_bytes / n.total())
        assert r["n_params"] == 2 * 4096 * r["n_pieces"] == r["bf16_bytes"] / 2


@pytest.mark.parametrize("ref", ["new*.jsonl", "news.jsonl#body"])
def test_a_changed_file_behind_a_pattern_or_column_is_noticed(made, tmp_path, ref):
    d, c, pieces = made
    how: dict = dict(chars=["0"], totals=[200], domains=[f"news={tmp_path}/{ref}"])
    how |= dict(corpus=c, out=tmp_path / "s", limit_chars=2000)
    (tmp_path / "news.jsonl").write_text(json.dumps(dict(text="新闻", body="新闻")))
    search(pieces, **how)
    assert search.state(pieces, **how) == "up to date"
    (tmp_path / "news.jsonl").write_text(json.dumps(dict(text="再说", body="再说")))
    assert search.state(pieces, **how).startswith("stale: input domains")


def test_search_writes_table_choice_and_curve(made, capsys):
    d, c, pieces = made
    (d / "news.txt").write_text("新闻说，词表很大。\n\n再说一次，词表很大。", encoding="utf-8")
    s = search(
        pieces,
        corpus=c,
        out=d / "s",
        chars=["0", "1500", "1600"],
        totals=[200, 400, "600"],
        limit_chars=20_000,
        domains=[f"news={d}/news.txt"],
        min_seen=1,
    )
    table = (s / "table.tsv").read_text().splitlines()
    assert table[0].split("\t")[:6] == [
        "n_chars",
        "n_all_chars",
        "n_pieces",
        "n_params",
        "bf16_bytes",
        "domain",
    ]
    assert "news" in s.stats["domains"]
    assert len(table) == 1 + s.stats["n_tried"] * (len(s.stats["domains"]) + 1)
    choice = (s.stats["n_pieces"], s.stats["n_chars"])
    assert read_choice(s) == choice
    assert read_choice(s / "choice.json") == choice
    assert (s / "curve.svg").read_text().startswith("<?xml")
    assert "vocabularies tried on" in capsys.readouterr().out
    assert s.stats["chars_per_token"] > s.stats["chars_per_token_base"]
    assert s.stats["alp"] > s.stats["alp_base"]


def test_a_search_that_says_no_is_heard(made, tmp_path):
    d, c, pieces = made
    s = search(pieces, corpus=c, out=tmp_path / "s", totals=[200, 400], budget=1000)
    assert s.stats["n_pieces"] == 0
    assert s.stats["why"].startswith("do not extend: in 1,000 characters of training")
    with pytest.raises(
        StageError,
        match="says: do not extend: .*; to extend all the same, give a number: "
        "cmixtral vocab --n-pieces N",
    ):
        read_choice(s)


def test_default_grid_reaches_all_candidates():
    totals, chars = default_grid(PIECES, BASE)
    assert totals == list(range(1, 8))
    assert chars[0] == 0
    assert chars[-1] == 2 + 3
    assert len(chars) == 5


def test_figure_has_a_curve_for_each_number_of_characters():
    rows = [row(c, t, -9.0 + t) for c in (0, 1, 2) for t in (1, 2, 3)]
    figure = plot_search(rows, choose(rows, 2000))
    left, _ = figure.axes
    assert "nats" in left.get_ylabel()
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["by tokens saved", "1", "2", "choice"]


def test_all_faults_at_once(tmp_path):
    with pytest.raises(StageError) as e:
        search(
            tmp_path / "p",
            tmp_path / "c",
            out=tmp_path / "s",
            base="gemma",
            chars=["many"],
            totals=[0, 5],
        )
    assert len(e.value.args) == 5
    for words in (
        "chars is ['many'], expected whole numbers from 0 on",
        "totals is [0, 5], expected",
        "expected pieces; run: cmixtral tokenizer",
        "gemma: no such tokenizer",
        "does not exist, expected a corpus",
    ):
        assert words in str(e.value)


def test_little_text_to_judge_by_is_said(tmp_path, cli):
    "A text file of one's own, where one document in a thousand is held out"
    text, corpus_dir, pieces_dir = tmp_path / "my.txt", tmp_path / "c", tmp_path / "p"
    with open(text, "w", encoding="utf-8") as f:
        for i in range(3000):
            f.write(f"第{i}篇文章，讲词表的扩充和词汇。{chr(0x4E00 + i)}\n\n")

    def says(*args):
        status, _ = cli(*args)
        assert status == 0
        return cli.out

    assert (
        "characters are held out, too few to judge a vocabulary or a model by; "
        "give --valid-share 0.04 or more"
    ) in says("corpus", "--sources", f"zh={text}", "--out", corpus_dir)
    says("tokenizer", "--corpus", corpus_dir, "--n-pieces", 200, "--out", pieces_dir)
    said = says("search", "--pieces", pieces_dir, "--corpus", corpus_dir, "--out", tmp_path / "s")
    assert (
        "characters are few to judge by; give more with --domains, "
        "or hold out more: cmixtral corpus --valid-share"
    ) in said
    assert said.rstrip().endswith("tried on 1 domain")
    more = ("--valid-share", 0.2, "--out", tmp_path / "d")
    assert "too few" not in says("corpus", "--sources", f"zh={text}", *more)


def test_nothing_held_out_and_nothing_to_cut(made, tmp_path):
    d, _, pieces = made
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": f"第{i}篇文章讲词表"}) + "\n" for i in range(9))
    c = corpus([f"zh={tmp_path}/a.jsonl"], out=tmp_path / "c", valid_share=0, min_chars=5)
    with pytest.raises(
        StageError, match="has no held-out zh text; run: cmixtral corpus --sources zh=REF --valid"
    ):
        search(pieces, c, out=tmp_path / "s")
    with pytest.raises(
        StageError,
        match="has no en text, it has zh; give --lang zh, or "
        "run: cmixtral corpus --sources zh=REF en=REF --out DIR",
    ):
        search(pieces, c, out=tmp_path / "s", lang="en")
    (tmp_path / "en.txt").write_text("no Han at all")
    other_script = "has no Han characters; run: cmixtral corpus --sources zh=REF --out DIR"
    with pytest.raises(StageError, match=other_script):
        search(pieces, tmp_path / "en.txt", out=tmp_path / "s")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(
        StageError, match="empty.jsonl holds no text to judge by; give held-out text"
    ):
        search(pieces, tmp_path / "empty.jsonl", out=tmp_path / "s")
    with pytest.raises(StageError, match="domains: .*empty.jsonl is empty, expected held-out text"):
        search(
            pieces,
            tmp_path / "a.jsonl",
            out=tmp_path / "s",
            domains=[f"none={tmp_path}/empty.jsonl"],
        )
    with pytest.raises(StageError, match="candidates are too few for every total"):
        search(pieces, tmp_path / "a.jsonl", out=tmp_path / "s", totals=[99999])
    assert not (tmp_path / "s").exists()


def test_braces_in_a_path_are_a_path(made, tmp_path):
    pieces = made[2]
    folder = tmp_path / "{zh}{}"
    folder.mkdir()
    (folder / "a.txt").write_text("第一篇文章讲词表的扩充。", encoding="utf-8")
    (folder / "en.txt").write_text("no Han at all")
    assert search(pieces, folder / "a.txt", out=tmp_path / "s").stats["n_docs"] == 1
    with pytest.raises(StageError, match="{zh}{}/en.txt: the held-out zh text has no Han"):
        search(pieces, folder / "en.txt", out=tmp_path / "t")


def test_no_more_text_is_read_than_asked_for(made, tmp_path, monkeypatch):
    "A data set of the hub has no end that one could wait for"
    from cmixtral_nb import search_files

    def endless(ref):
        return ({"text": "词表" * 5, "source": str(i % 7)} for i in itertools.count())

    (tmp_path / "a.txt").write_text("词表", encoding="utf-8")
    monkeypatch.setattr(search_files, "read_docs", endless)
    options: dict[str, Any] = dict(
        base="mixtral", chars=None, totals=None, domains=["news=hub:a/b"]
    )
    assert search_files.search_option_faults(**options, script="Han") == []
    with pytest.raises(StageError, match="width is 0"):
        search(made[2], tmp_path / "a.txt", out=tmp_path / "s", domains=["n=hub:a/b"], width=0)
    name, docs = search_files._named_domain("news=hub:a/b", 95)
    assert (name, len(docs)) == ("news", 10)  # of all sources together


@pytest.mark.parametrize(
    "content, words",
    [("{", "not valid JSON"), ('{"n_pieces": "9"}', "holds no choice"), ("[]", "holds no choice")],
)
def test_choices_that_are_none(tmp_path, content, words):
    (tmp_path / "choice.json").write_text(content)
    with pytest.raises(StageError, match=words):
        read_choice(tmp_path)
    with pytest.raises(StageError, match="no such file"):
        read_choice(tmp_path / "none")


# ---- how sure the knee is


def block(*sizes, n_sentences=1):
    "A block with these counts of its tokens at 0, 1, 2 ... pieces"
    return Block({n: Counter(counts) for n, counts in enumerate(sizes)}, n_sentences)


def test_spread_of_equal_blocks_has_no_width():
    one = block(dict(a=8, b=4), dict(a=5, c=4), dict(c=4, d=4), dict(e=6))
    spread = spread_of({"x": [one] * 5, "y": [one]}, 1)
    assert spread.saved == pytest.approx((1 - 9 / 12, 1 - 9 / 12))
    assert spread.knee[0] == spread.knee[1]


def test_spread_against_draws_of_documents():
    "The saving of 40 blocks, half of which are saved nothing: a binomial of 40"
    saved, not_saved = block(dict(a=10), dict(b=5)), block(dict(a=10), dict(a=10))
    low, high = spread_of({"x": [saved] * 20 + [not_saved] * 20}, 1, n_draws=1000).saved
    assert (low, high) == pytest.approx((0.5 * 14 / 40, 0.5 * 26 / 40), abs=0.5 / 40 + 1e-9)


def test_spread_is_the_same_again_and_each_domain_has_one_vote():
    few, many = block(dict(a=4), dict(b=2)), block(dict(a=400), dict(b=400))
    blocks = {"few": [few] * 3, "many": [many, few]}
    assert spread_of(blocks, 1, seed=3) == spread_of(blocks, 1, seed=3)
    with_empty = blocks_of(
        {"x": ["甲", ""], "y": [""]}, lambda docs: block({}, n_sentences=len("".join(docs)))
    )
    assert {domain: len(own) for domain, own in with_empty.items()} == {"x": 2}


def test_spread_lies_around_the_number_that_all_documents_give():
    "Half of the documents have no character of the script; their tokens count as well"
    docs = [f"词表{i}" if i % 2 else f"list {i}" for i in range(20)]

    def cut(own):
        n_han = sum("词" in doc for doc in own)
        tokens = Counter(a=10 * len(own))
        return Block({0: tokens, 1: tokens - Counter(a=5 * n_han)}, n_han)

    low, high = spread_of(blocks_of({"x": docs}, cut), 1).saved
    assert low < 0.25 < high < 0.5


def test_few_documents_give_no_interval(made, tmp_path, capsys):
    d, _, pieces = made
    for n_docs in (4, 5):
        texts = "\n\n".join(f"第{i}篇文章讲词表的扩充。" for i in range(n_docs))
        (tmp_path / "a.txt").write_text(texts, encoding="utf-8")
        found = search(pieces, tmp_path / "a.txt", out=tmp_path / f"s{n_docs}").stats
        assert (found["saved_range"] is None) == (n_docs == 4) == (found["knee_range"] is None)
    said = capsys.readouterr().out
    assert "no interval: 4 documents are too few" in said and "like these 5:" in said


def test_blocks_together_are_the_documents():
    docs = [f"{i}" for i in range(47)]
    seen = blocks_of({"x": docs}, lambda own: Block({0: Counter(own)}, 1))["x"]
    assert len(seen) == 20
    assert sum((b.counts[0] for b in seen), Counter()) == Counter(docs)
    assert max(b.counts[0].total() for b in seen) - min(b.counts[0].total() for b in seen) <= 1
