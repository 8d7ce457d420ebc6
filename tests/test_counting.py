"Counting in tasks: whoever counts, and however often somebody is killed, the same is learned."

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmixtral_nb.counted import (
    bucket_limit,
    bucket_of,
    count_buckets,
    join_buckets,
    merge_bucket,
)
from cmixtral_nb.lexicons import Source, mix_runs
from cmixtral_nb.runs import (
    find_runs,
    mass,
    merged_runs,
    read_runs,
    run_finder,
    run_pattern,
    write_runs,
)

texts = st.lists(st.text("中国人民， \n文a", max_size=30), max_size=20)


@given(texts, st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_any_division_gives_the_counts_of_a_counter(tmp_path_factory, docs, n_tasks, n, most):
    folder = tmp_path_factory.mktemp("c")
    tasks = [
        count_buckets(docs[i::n_tasks], run_finder(), folder / f"t{i}", n, most)
        for i in range(n_tasks)
    ]
    files = [folder / f"b{i}" for i in range(n)]
    found = [
        merge_bucket(list(own), f) for own, f in zip(zip(*tasks, strict=True), files, strict=True)
    ]
    naive = Counter(run for text in docs for run in find_runs(text, run_pattern()))
    joined = join_buckets(files, found)
    assert list(joined.rows()) == sorted(naive.items())
    assert joined.n_chars == mass(naive.items())
    for bucket, path in enumerate(files):
        assert all(bucket_of(run, n) == bucket for run, _ in read_runs(path))


counts = st.dictionaries(
    st.text("中国人民文学", min_size=1, max_size=5), st.integers(1, 40), min_size=1
)


@given(counts, st.integers(1, 3), st.integers(1, 300), st.floats(0.05, 0.9))
@settings(max_examples=40, deadline=None)
def test_what_merges_drop_is_never_drawn(tmp_path_factory, runs, n, limit, share):
    folder = tmp_path_factory.mktemp("c")
    salts = ("", "s2t")

    def sources(text):
        "The corpus, a word list, and the corpus once more, converted"
        words = {"人民": 50, "中文": 1}
        return [
            text._replace(share=share * 0.7),
            Source(1 - share, words.items, mass(words.items())),
            text._replace(share=share * 0.3, convert=str.upper, salt="s2t"),
        ]

    rows = [(run, runs[run]) for run in sorted(runs)]
    found = []
    files = [folder / f"b{i}" for i in range(n)]
    for bucket, path in enumerate(files):
        own = write_runs(folder / "own", [row for row in rows if bucket_of(row[0], n) == bucket])
        found.append(merge_bucket([own], path, limit, salts))
    whole = Source(1.0, lambda: rows, mass(rows))
    thinned = join_buckets(files, found)
    assert mix_runs(sources(thinned), limit) == mix_runs(sources(whole), limit)
    left = sum(len(run) for run, _ in thinned.rows())
    assert left <= sum(len(run) for run in runs)


def test_a_bucket_holds_no_more_than_about_the_limit(tmp_path):
    rng = random.Random(0)
    many = {"".join(rng.choices("中国人民文学生活大小", k=9)) for _ in range(20_000)}
    own = write_runs(tmp_path / "own", [(run, 1) for run in sorted(many)])
    found = merge_bucket([own], tmp_path / "b", limit_chars=9_000)
    left = sum(len(run) for run, _ in read_runs(tmp_path / "b"))
    assert found.dropped and left == pytest.approx(9_000, rel=0.1)
    assert found.n_chars == 9 * len(many)


def test_an_equal_part_of_the_limit_is_enough_for_a_bucket_of_many_runs(tmp_path):
    rng = random.Random(0)
    runs = ["".join(rng.choices("中国人民文学生活大小", k=12)) for _ in range(30_000)]
    counts = sorted(Counter(runs + runs[:6000] * 3).items())
    files, found = [tmp_path / f"b{i}" for i in range(2)], []
    for bucket, path in enumerate(files):
        own = write_runs(tmp_path / "own", [r for r in counts if bucket_of(r[0], 2) == bucket])
        found.append(merge_bucket([own], path, bucket_limit(200_000, 2)))
    thinned, whole = join_buckets(files, found), Source(1.0, lambda: counts, mass(counts))
    assert all(bucket.dropped for bucket in found)
    assert mix_runs([thinned], 200_000) == mix_runs([whole], 200_000)
    assert sum(len(run) for run, _ in thinned.rows()) < 1.3 * 200_000


def test_more_files_than_may_be_open(tmp_path):
    files = [write_runs(tmp_path / f"{i}", [("中", 1), (f"人{i:03}", i)]) for i in range(401)]
    merged = dict(merged_runs(files, tmp_path / "tree"))
    assert merged == {"中": 401, **{f"人{i:03}": i for i in range(401)}}
    assert len(list(tmp_path.iterdir())) == 401  # inputs stay, the tree is gone
