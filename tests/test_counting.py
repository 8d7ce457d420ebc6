"Counting in tasks: whoever counts, and however often somebody is killed, the same is learned."

import itertools
import json
import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pack import slurm

from cmixtral_nb.counted import (
    Counting,
    bucket_limit,
    bucket_of,
    count_buckets,
    count_task,
    counted_faults,
    counted_source,
    join_buckets,
    merge_bucket,
    merge_task,
)
from cmixtral_nb.counting_jobs import tokenizer_job
from cmixtral_nb.documents import read_docs
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
from cmixtral_nb.stages import Artifact, StageError
from cmixtral_nb.tokenizer import tokenizer

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


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A corpus of two languages"
    folder = tmp_path_factory.mktemp("counting")
    (folder / "corpus").mkdir()
    for lang, n_docs in (("zh", 400), ("km", 40)):
        rows = [row["text"] for row in itertools.islice(read_docs(f"builtin:{lang}"), n_docs)]
        for split, docs in (("train", rows[: n_docs - 20]), ("valid", rows[n_docs - 20 :])):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in docs)
            (folder / f"corpus/{lang}.{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


SMALL: dict = dict(n_pieces=400, memory_chars=4000, opencc=["0.3:s2t"], workers=1)


@pytest.fixture(scope="module")
def alone(here):
    return tokenizer(here / "corpus", here / "alone", **SMALL)


def same(far, near):
    assert (far.fingerprint, far.key, far.stats) == (near.fingerprint, near.key, near.stats)


def test_tasks_on_this_machine(here, tmp_path, alone):
    out, where = tmp_path / "out", dict(workers=2)
    tokenizer_job(here / "corpus", out, tasks=3, where=where, **SMALL).run()
    same(Artifact.load(out, "pieces", verify=True), alone)
    assert sum(json.loads(f.read_text())["dropped"] for f in out_heads(out)) == 3
    assert not list(out.glob("*.runs"))


def out_heads(out):
    return Path(f"{out}.parts").glob("zh.bucket-*.json")


@pytest.mark.parametrize("way", ["rake", "continued"])
def test_other_ways_to_learn(here, tmp_path, way):
    (tmp_path / "words").write_text("我们\t9\n可以\t5\n文件\t1\n", encoding="utf-8")
    ways: dict[str, dict] = {
        "rake": dict(rake=str(tmp_path / "words")),
        "continued": dict(method="continued"),
    }
    how = dict(SMALL, **ways[way])
    near = tokenizer(here / "corpus", tmp_path / "near", **how)
    run_here(here, tmp_path / "far", 2, **how)
    same(Artifact.load(tmp_path / "far", "pieces"), near)


def run_here(here, out, tasks, **how):
    "In this process, one task after the other"
    tokenizer_job(here / "corpus", out, tasks=tasks, where=dict(workers=1), **how).run()


def test_words_of_a_byte_level_base(here, tmp_path):
    how: dict = dict(lang="km", script="Khmer", base="tekken", n_pieces=100, memory_chars=1500)
    near = tokenizer(here / "corpus", tmp_path / "near", **how)
    assert 0 < near.stats["share_of_counts"] < 1
    run_here(here, tmp_path / "far", 2, **how)
    same(Artifact.load(tmp_path / "far", "pieces"), near)


def test_what_killed_tasks_left_is_made_again(here, tmp_path, alone):
    out, parts = tmp_path / "out", tmp_path / "out.parts"
    run_here(here, out, 3, **SMALL)
    shutil.rmtree(out)
    (parts / "zh.00001-of-00003.json").unlink()  # half a part
    (parts / "zh.00001-of-00003.00002.runs").write_text("半")
    (parts / "zh.bucket-00002-of-00003.json").unlink()  # half a merge
    for end in (".runs", ".runs.merged"):
        (parts / f"zh.bucket-00002-of-00003{end}").write_text("半")
    before = {f: f.stat().st_mtime_ns for f in parts.glob("*.json")}
    run_here(here, out, 3, **SMALL)
    same(Artifact.load(out, "pieces"), alone)
    assert all(f.stat().st_mtime_ns == at for f, at in before.items())


def test_slurm(here, tmp_path, alone, monkeypatch):
    slurm(tmp_path / "bin")
    first = [str(tmp_path / "bin"), str(Path(sys.executable).parent)]
    monkeypatch.setenv("PATH", os.pathsep.join([*first, os.environ["PATH"]]))
    where = dict(partition="cpu", time="01:00:00")
    out = tmp_path / "out"
    tokenizer_job(here / "corpus", out, tasks=1, executor="slurm", where=where, **SMALL).run()
    same(Artifact.load(out, "pieces"), alone)


def test_counts_that_are_not_the_ones_asked_for(here, tmp_path):
    corpus, parts = here / "corpus", tmp_path / "parts"
    counting = Counting(corpus, "zh", run_finder(), len, ("Han", True))

    def refused(words, **more):
        with pytest.raises(StageError, match=words):
            tokenizer(corpus, tmp_path / "out", parts=parts, **{**SMALL, **more})
        assert not (tmp_path / "out").exists()

    refused("holds no counts of zh; count it again, into an empty folder")
    for part in range(2):
        count_task(counting, parts, part, 2)
    with pytest.raises(StageError, match="lacks part 2 of 3 of zh; run the missing tasks again"):
        count_task(counting, parts, 0, 3)
        count_task(counting, parts, 1, 3)
        merge_task(counting, parts, 0, 3)
    merge_task(counting, parts, 0, 2, 4000, ("", "s2t"))
    refused("holds 1 of 2 buckets of zh; run the missing tasks again")
    merge_task(counting, parts, 1, 2, 4000, ("", "s2t"))
    assert counted_faults(counting, parts, 4000) == []
    assert counted_source(parts, "zh").n_chars > 4000
    refused("was thinned to 4,000 characters", memory_chars=5000)
    refused("was thinned for other conversions", opencc=["0.3:t2s"])
    refused("was counted in another corpus, or in another way", marks=False)
    refused("limit_chars is 9, but tasks count a whole corpus; leave it out", limit_chars=9)
    (parts / "zh.bucket-00000-of-00002.json").write_text('{"identity": 3}')
    refused("identity is 3, expected text")


def test_jobs_that_cannot_be(here, tmp_path):
    def refused(words, corpus=here / "corpus", **more):
        with pytest.raises(StageError, match=words):
            tokenizer_job(corpus, tmp_path / "out", **more)

    refused("n_pieces is 0, expected 1 to 1,000,000", n_pieces=0)
    refused("tasks is 0, expected at least 1", tasks=0)
    refused("executor is 'moon', expected local, slurm, ray", executor="moon")
    refused("'time' and 'partition'; give it in where", executor="slurm")
    refused("tasks count a whole corpus", limit_chars=10)
    (tmp_path / "zh.txt").write_text("我们扩充词表。")
    refused("is no corpus and cannot be counted in parts", corpus=tmp_path / "zh.txt")
    with pytest.raises(TypeError, match="peices"):
        tokenizer_job(here / "corpus", tmp_path / "out", peices=9)
    assert [f.name for f in tmp_path.iterdir()] == ["zh.txt"]
