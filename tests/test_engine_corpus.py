"""A corpus by many tasks: the artifact of one process, whatever engine, killed at any moment.

Near-duplicates against the similarity of all pairs, filters against datatrove's own, Slurm by a
stand-in that runs a job at once, the hub by files that its library reads from this disk."""

import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmixtral_nb import shards, text_jobs
from cmixtral_nb.corpus import clean, corpus
from cmixtral_nb.documents import read_docs
from cmixtral_nb.quality import FILTERS, quality_check, words
from cmixtral_nb.shards import make_shards, own_shards, read_shard
from cmixtral_nb.stages import Artifact, StageError

pytest.importorskip("datatrove")
HERE = ["workers=1"]  # tasks one after another, in this process


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(text_jobs, "make_shards", partial(make_shards, size_bytes=700))
    monkeypatch.setattr(text_jobs, "N_BUCKETS", 8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, texts):
    lines = [json.dumps(dict(text=text), ensure_ascii=False) + "\n" for text in texts]
    Path(name).write_text("".join(lines), encoding="utf-8")


def same(one, other):
    assert (one.key, one.fingerprint, one.stats) == (other.key, other.fingerprint, other.stats)


PARAGRAPHS = [
    "这一段文字很长，足以只出现一次：扩充词表之后，同样的中文需要的词元更少，训练因此更快，生成也一样。",
    "第二段也足够长，它讲的是路由器、专家以及它们之间的平衡，还有为什么平衡的损失不能太大，也不能太小。",
    "短的段落可以重复",
    "第 三 段 有 空 格 ， 也 很 长 ， 在 别 处 写 成 没 有 空 格 的 样 子 也 算 。",
    "第三段有空格，也很长，在别处写成没有空格的样子也算。第三段有空格，也很长，在别处写成没有空格。",
    "English that is long enough to count as one paragraph of its own, 其中也有中文。",
]


@given(
    docs=st.lists(
        st.lists(st.sampled_from(PARAGRAPHS), min_size=1, max_size=4).flatmap(
            lambda ps: st.sampled_from(["\n".join(ps), "\n\n".join(ps), " ".join(ps)])
        ),
        min_size=1,
        max_size=25,
    ),
    tasks=st.integers(1, 4),
    paragraph_chars=st.sampled_from([0, 40]),
    limit=st.sampled_from([0, 150]),
)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_gives_what_one_process_gives(
    here, small_shards, docs, tasks, paragraph_chars, limit
):
    "Repeats of documents and paragraphs, in one document and across shards, and the limit"
    write("a.jsonl", [PARAGRAPHS[0], *docs[::2]])  # one document is left, whatever is drawn
    write("b.jsonl", docs[1::2] + ["zu kurz"])
    how: dict = dict(valid_share=0.0, paragraph_chars=paragraph_chars, limit_chars=limit)
    sources = ["zh=a.jsonl", "zh=b.jsonl"]
    plain = corpus(sources, out=here / "plain", force=True, **how)
    far = corpus(
        sources, out=here / "far", force=True, engine="local", tasks=tasks, where=HERE, **how
    )
    assert (plain.key, plain.fingerprint) == (far.key, far.fingerprint)
    if not limit:  # one process stops reading there, and counts no further
        assert plain.stats == far.stats


@pytest.fixture(scope="module")
def two_languages(tmp_path_factory):
    "Sources with repeats, another script and broken lines in the middle; what one process makes"
    folder = tmp_path_factory.mktemp("two")
    zh = [row["text"] for row in itertools.islice(read_docs("builtin:parallel#zh"), 3000)]
    en = [row["text"][:500] for row in itertools.islice(read_docs("builtin:en"), 150)]
    write(folder / "zh.jsonl", zh[:1500] + zh[500:600] + en[:10] + zh[1500:])
    lines = (folder / "zh.jsonl").read_bytes().splitlines(keepends=True)
    lines[700] = lines[700][:9] + b"\n"
    lines[2000] = b'{"text": "\xd6\xd0"}\n'
    (folder / "zh.jsonl").write_bytes(b"".join(lines))
    write(folder / "en.jsonl", en + en[:20])
    sources = [f"{lang}={folder}/{lang}.jsonl" for lang in ("zh", "en")]
    how: dict = dict(sources=sources, valid_share=0.05)
    return folder, how, corpus(out=folder / "plain", **how)


def test_broken_lines_are_named_where_they_stand(two_languages, tmp_path, monkeypatch):
    folder, how, plain = two_languages
    monkeypatch.setattr(text_jobs, "make_shards", partial(make_shards, size_bytes=20_000))
    assert plain.stats["zh"]["bad_lines"] == [
        f"{folder}/zh.jsonl:701: invalid JSON",
        f"{folder}/zh.jsonl:2001: invalid UTF-8",
    ]
    same(corpus(out=tmp_path / "far", engine="local", tasks=3, where=HERE, **how), plain)
    with pytest.raises(StageError) as one:
        corpus(out=tmp_path / "stop", on_error="stop", **how)
    with pytest.raises(StageError) as far:
        corpus(out=tmp_path / "stop", on_error="stop", engine="local", tasks=3, where=HERE, **how)
    assert far.value.args[0].startswith(one.value.args[0])
    assert "zh.jsonl:701:" in one.value.args[0]


# ---- interrupted


def test_a_run_that_stops_at_any_write_goes_on(two_languages, tmp_path, monkeypatch):
    _, how, plain = two_languages
    monkeypatch.setattr(text_jobs, "make_shards", partial(make_shards, size_bytes=100_000))
    monkeypatch.setattr(text_jobs, "N_BUCKETS", 8)
    left = [10**9]
    written: list[str] = []

    def stopping(write):
        def stop_or_write(path, *args):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            write(path, *args)
            written.append(path.name)

        return stop_or_write

    for name in ("_write_whole", "_write_array"):
        monkeypatch.setattr(text_jobs, name, stopping(getattr(text_jobs, name)))
    run = partial(corpus, engine="local", tasks=2, where=HERE, **how)
    same(run(out=tmp_path / "whole"), plain)
    n_writes, n_stops = len(written), 0
    written.clear()
    while True:
        left[0] = n_writes // 6
        try:
            far = run(out=tmp_path / "far")
        except KeyboardInterrupt:
            n_stops += 1
        else:
            break
    same(far, plain)
    assert n_stops >= 5
    assert len(written) < 2 * n_writes  # what was complete was not made again


CLI = "import sys; from cmixtral_nb.commands import main; sys.exit(main())"


def children(pid):
    "Processes that a process has started, directly"
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def test_a_killed_task_is_one_line_and_the_rerun_goes_on(two_languages, tmp_path):
    folder, how, plain = two_languages
    options = ["--engine", "local", "--tasks", "2", "--where", "workers=2", "--valid-share", ".05"]
    command = [sys.executable, "-c", CLI, "corpus", *options]
    command += ["--sources", *how["sources"], "--out", str(tmp_path / "far")]
    slow = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    logs = tmp_path / "far.parts/zh/logs/read/logs"
    end = time.time() + 100
    while not (logs.is_dir() and list(logs.iterdir())) and time.time() < end:
        time.sleep(0.02)
    for pid in children(slow.pid):
        name = Path(f"/proc/{pid}/cmdline")
        if name.exists() and b"spawn_main" in name.read_bytes():
            os.kill(pid, signal.SIGKILL)
    _, error = slow.communicate(timeout=100)
    if slow.returncode:  # else it was faster than we
        assert slow.returncode == 2
        assert "was ended from outside" in error or "did not begin" in error
        assert "run the same command again" in error
        assert "Traceback" not in error
    assert subprocess.run(command, capture_output=True).returncode == 0
    same(Artifact.load(tmp_path / "far", "corpus", verify=True), plain)
    assert not list((tmp_path / "far.parts").glob("*/read"))


def test_another_request_does_not_go_on_in_the_same_folder(here, small_shards):
    write("a.jsonl", PARAGRAPHS)
    (here / "far.parts/zh").mkdir(parents=True)
    (here / "far.parts/zh/request.json").write_text('{"key": "another"}')
    with pytest.raises(StageError, match="far.parts/zh holds the work of another request"):
        corpus(["zh=a.jsonl"], out="far", valid_share=0, engine="local", where=HERE)


def test_after_a_refusal_the_command_that_it_names_goes_through(here, small_shards):
    write("a.jsonl", PARAGRAPHS)
    how: dict = dict(engine="local", where=HERE)
    with pytest.raises(StageError, match="is held out at valid_share=1e-09; raise it, to 0.5"):
        corpus(["zh=a.jsonl"], out="far", valid_share=1e-9, **how)
    assert corpus(["zh=a.jsonl"], out="far", valid_share=0.5, **how).stats["zh"]["n_docs"]


# ---- Slurm and Ray

SBATCH = r"""
import os
import re
import subprocess
import sys

script = sys.argv[-1]
text = open(script).read()
subprocess.run(["bash", "-n", script], check=True)
assert "#SBATCH --partition=cpu" in text and "#SBATCH --wait\n" in text
last = int(re.search(r"--array=0-(\d+)", text)[1])
if "merge_stats" not in text:  # the last job of datatrove, which only adds up its logs
    for k in range(last + 1):
        env = dict(os.environ, SLURM_ARRAY_TASK_ID=str(k), SLURM_NODELIST="here")
        if subprocess.run(["bash", script], env=env, stdout=2).returncode:
            sys.exit(1)
print("Submitted batch job 7")
"""
# launch_pickled_pipeline of datatrove, in a process that has imported everything already
SRUN = r"""
import sys
import dill

with open(sys.argv[-1], "rb") as file:
    dill.load(file).run()
"""


def slurm(folder, monkeypatch):
    "Commands of Slurm that run a job at once, here"
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!{sys.executable}{SBATCH}")
    (folder / "srun").write_text(f"#!{sys.executable}{SRUN}")
    (folder / "scontrol").write_text("#!/bin/bash\necho here\n")
    for f in folder.iterdir():
        f.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), os.environ["PATH"]]))


def test_slurm_scripts_run_and_give_the_same_corpus(here, monkeypatch):
    slurm(here / "bin", monkeypatch)
    write("a.jsonl", [*PARAGRAPHS, *PARAGRAPHS[:3]])
    how: dict = dict(sources=["zh=a.jsonl"], valid_share=0)
    plain = corpus(out="plain", **how)
    where = ["partition=cpu", "time=01:00:00", "mem_per_cpu_gb=1"]
    same(corpus(out="far", engine="slurm", where=where, **how), plain)
    scripts = sorted((here / "far.parts").rglob("launch_script.slurm"))
    jobs = {script.parent.name for script in scripts}
    assert jobs == {"read", "documents", "marks", "paragraphs", "cut"}
    assert "#SBATCH --mem-per-cpu=1G" in scripts[0].read_text()


def test_a_task_that_fails_on_slurm_is_named(here, monkeypatch):
    slurm(here / "bin", monkeypatch)
    Path("a.jsonl").write_bytes(b'{"text": "cut o\n')
    where = ["partition=cpu", "time=01:00:00"]
    with pytest.raises(StageError, match=r"a.jsonl:1: invalid JSON .* run the same command again"):
        corpus(["zh=a.jsonl"], out="far", on_error="stop", engine="slurm", where=where)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_gives_the_same_corpus(two_languages, tmp_path):
    _, how, plain = two_languages
    same(corpus(out=tmp_path / "far", engine="ray", tasks=2, **how), plain)


@pytest.mark.parametrize(
    "options, says",
    [
        (["--engine", "moon"], "engine is 'moon', expected plain, local, slurm or ray"),
        (["--tasks", "2"], "tasks is 2, which needs --engine local, slurm or ray"),
        (["--near"], "near-duplicates are found by tasks; give --engine local, slurm or ray"),
        (["--filters", "best"], "filters: 'best' is unknown, expected gopher-quality"),
        (["--engine", "slurm"], "engine slurm: missing a required argument: 'time'; give --where"),
        (["--engine", "local", "--where", "x"], "where: 'x', expected NAME=VALUE"),
    ],
)
def test_what_cannot_be_is_said_at_once(here, cli, options, says):
    write("a.jsonl", PARAGRAPHS)
    status, lines = cli("corpus", "--sources", "zh=a.jsonl", "--out", "c", *options)
    assert status == 2
    assert len(lines) == 1 and says in lines[0]
    assert not list(here.glob("c*"))


# ---- the hub by shard


def test_a_data_set_of_the_hub_is_shared_by_its_files(here):
    Path("set").mkdir()
    for k in range(5):
        write(f"set/{k}.jsonl", [f"第{k}个文件的第{i}篇文章，讲词表扩充。" for i in range(20)])
    how: dict = dict(sources=[f"zh=hub:json@{here}/set/*.jsonl"], valid_share=0.1)
    plain = corpus(out="plain", **how)
    assert plain.stats["zh"]["n_docs"] == 100
    same(corpus(out="far", engine="local", tasks=2, where=HERE, **how), plain)


def test_a_file_of_the_hub_that_fails_is_tried_again_and_named(here, monkeypatch):
    write("0.jsonl", ["第一个文件的文章，讲词表扩充。"])
    Path("1.jsonl").write_text('{"text": "cut o')
    monkeypatch.setattr(shards, "PAUSES", (0, 0))
    tried: Counter = Counter()
    real = text_jobs.read_shard

    def counting(shard, *args):
        tried[shard[0].file] += 1
        return real(shard, *args)

    monkeypatch.setattr(text_jobs, "read_shard", counting)
    how: dict = dict(sources=[f"zh=hub:json@{here}/*.jsonl"], valid_share=0)
    run = partial(corpus, out="far", engine="local", where=HERE, **how)
    with pytest.raises(StageError, match=r"file 2 of 2 failed 3 times: hub:json"):
        run()
    assert tried == {0: 1, 1: 3}
    write("1.jsonl", ["第二个文件的文章，也讲词表扩充。"])
    assert run().stats["zh"]["n_docs"] == 2
    assert tried == {0: 1, 1: 4}  # the file that was complete is not read again


# ---- shards


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(20, 200))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_shards_hold_every_document_once_in_order(here, lengths, size_bytes):
    for k, n in enumerate(lengths):
        write(f"{k}.jsonl", ["甲" * (i % 7) + str(i) for i in range(n)])
    names = [f"{k}.jsonl" for k in range(len(lengths))]
    want = [row["text"] for name in names for row in read_docs(name)]
    cut = make_shards(names, size_bytes)
    assert [row["text"] for shard in cut for row in read_shard(shard)] == want
    for n_tasks in (1, 3, 50):
        own = [number for task in range(n_tasks) for number in own_shards(cut, task, n_tasks)]
        assert own == list(range(len(cut)))


# ---- near-duplicates and filters


def runs(text, n):
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def similarity(a, b):
    return len(a & b) / max(1, len(a | b))


@pytest.mark.parametrize("lang, n, chars", [("zh", 10, 400), ("en", 5, 2000)])
def test_near_duplicates_are_found_and_no_others(here, lang, n, chars):
    "Copies that share nine tenths of their runs; against the similarity of all pairs"
    rng = random.Random(0)
    texts = [row["text"] for row in read_docs(f"builtin:{lang}") if len(row["text"]) > chars]
    originals = [clean(text[:chars]) for text in texts[:60]]
    copies = []
    for text in originals[:40]:
        at = rng.randrange(chars // 4, chars // 2)
        changed = "改过" if lang == "zh" else " changed here "
        copies.append(clean(text[:at] + changed + text[at:]))
    docs = [*originals, *copies]
    write("a.jsonl", docs)
    how: dict = dict(sources=[f"{lang}=a.jsonl"], valid_share=0, min_share=0, paragraph_chars=0)
    made = [
        corpus(out=f"near{tasks}", engine="local", tasks=tasks, where=HERE, near=True, **how)
        for tasks in (1, 3)
    ]
    assert made[0].fingerprint == made[1].fingerprint
    kept = [row["text"] for row in read_docs(made[0] / f"{lang}.train.jsonl")]
    sets = {text: runs(text, n) for text in {*docs, *kept}}
    gone = [text for text in docs if text not in kept]
    for text in gone:  # each has a near copy
        assert max(similarity(sets[text], sets[other]) for other in docs if other != text) > 0.5
    pairs = zip(originals, copies, strict=False)
    close = [(a, b) for a, b in pairs if similarity(sets[a], sets[b]) > 0.9]
    assert len(close) >= 25
    found = sum(not (a in kept and b in kept) for a, b in close)
    assert found >= 0.95 * len(close)


def test_filters_drop_what_datatrove_drops(here):
    from datatrove.data import Document

    rows = itertools.islice(read_docs("builtin:en"), 0, 400, 8)
    texts = [clean(row["text"][:2000]) for row in rows]
    for name, make in FILTERS.items():
        rule, check = make("en"), quality_check([name], "en")
        for text in texts:
            assert bool(check(text)) == (rule.filter(Document(text=text, id="")) is not True)
    write("a.jsonl", texts)
    names = list(FILTERS)
    how: dict = dict(sources=["en=a.jsonl"], valid_share=0, filters=names, paragraph_chars=0)
    plain = corpus(out="plain", **how)
    check = quality_check(names, "en")
    reasons = Counter(reason for text in texts if (reason := check(text)))
    dropped = plain.stats["en"]["dropped"]
    assert {k: n for k, n in dropped.items() if ":" in k} == reasons
    same(corpus(out="far", engine="local", tasks=2, where=HERE, **how), plain)
