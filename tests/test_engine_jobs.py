"""`tokenizer` and `pack` by many tasks: the artifact of one process, killed at any moment.

The engines are those of test_engine_corpus, Slurm its stand-in."""

import importlib.util
import itertools
import json
import os
import re
import signal
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from conftest import small_tokenizer
from test_engine_corpus import HERE, here, same, slurm  # noqa: F401  (`here` is a fixture)

from cmixtral_nb import cluster, counting_jobs
from cmixtral_nb.documents import read_docs
from cmixtral_nb.pack import pack
from cmixtral_nb.recipe_check import check_recipe
from cmixtral_nb.stages import Artifact, StageError
from cmixtral_nb.tokenizer import tokenizer
from cmixtral_nb.tokenizer_files import write_tokenizer

pytest.importorskip("datatrove")
SLURM = ["partition=cpu", "time=01:00:00"]
STAGES = ("tokenizer", "pack")
FOLDERS = {"tokenizer": "counts", "pack": "encoded"}
PARTS = {"tokenizer": (counting_jobs, "count_task"), "pack": (cluster, "encode_part")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A corpus of three languages and a tokenizer; what one process makes of them, by stage"
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "corpus").mkdir()
    for lang, n_docs in (("zh", 400), ("km", 40), ("en", 20)):
        rows = itertools.islice(read_docs(f"builtin:{lang}"), n_docs)
        docs = [row["text"][:2000] for row in rows]
        for split, own in (("train", docs[n_docs // 10 :]), ("valid", docs[: n_docs // 10])):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in own)
            (folder / f"corpus/{lang}.{split}.jsonl").write_text(lines, encoding="utf-8")
    small_tokenizer(folder, "我们扩充词表 article of some length ")
    write_tokenizer(folder / "small.model", folder / "tok")
    return folder, {stage: run(stage, folder, folder / stage) for stage in STAGES}


def run(stage: str, folder: Path, out: Path, **options: Any) -> Artifact:
    "One of the two stages on the corpus of a folder"
    if stage == "pack":
        how = dict(mix=["1.5:zh", ".5:en"], length=64)
        return pack(folder / "corpus", folder / "tok", out, **{**how, **options})
    how = dict(n_pieces=400, memory_chars=4000, opencc=["0.3:s2t"], workers=1)
    return tokenizer(folder / "corpus", out, **{**how, **options})


def engine(n_tasks: int, name: str = "local", where: list[str] | None = None) -> dict[str, Any]:
    return dict(engine=name, tasks=n_tasks, where=HERE if where is None else where)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("n_tasks", [1, 3])
def test_tasks_make_what_one_process_makes(made, here, stage, n_tasks):  # noqa: F811
    folder, plain = made
    same(run(stage, folder, Path("far"), **engine(n_tasks)), plain[stage])
    assert [path.name for path in Path("far.parts").iterdir()] == ["logs"]
    again = run(stage, folder, Path("far"))  # without an engine: nothing to do
    assert again.fingerprint == plain[stage].fingerprint


def test_two_processes(made, tmp_path):
    folder, plain = made
    two = engine(3, where=["workers=2"])
    same(run("tokenizer", folder, tmp_path / "far", **two), plain["tokenizer"])


@pytest.mark.parametrize(
    "how",
    [
        dict(rake="words"),
        dict(method="continued"),
        dict(lang="km", script="Khmer", base="tekken", n_pieces=100, memory_chars=1500, opencc=[]),
    ],
    ids=["rake", "continued", "bytes"],
)
def test_other_ways_to_learn(made, here, how):  # noqa: F811
    folder, _ = made
    Path("words").write_text("我们\t9\n可以\t5\n文件\t1\n", encoding="utf-8")
    plain = run("tokenizer", folder, Path("plain"), **how)
    same(run("tokenizer", folder, Path("far"), **engine(2), **how), plain)


def test_a_base_by_a_path_of_this_folder(made, here):  # noqa: F811
    "A task may have another working directory, but must find the same base"
    folder, _ = made
    base = Path(cluster.__file__).parent / "none"
    assert counting_jobs._anywhere(str(base)) == str(base)
    Path("base").mkdir()
    Path("base/tokenizer.json").write_text("{}")
    assert counting_jobs._anywhere("base") == str(here / "base")
    assert counting_jobs._anywhere("tekken") == "tekken"


# ---- interrupted


def heads(parts: Path) -> set[Path]:
    "What marks parts as complete"
    return {*parts.glob("*.json"), *parts.glob("*.done")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on(made, tmp_path, monkeypatch, stage):
    "SIGKILL after a part, then before the next one is marked as complete, and so on"
    folder, plain = made
    parts = tmp_path / "far.parts" / FOLDERS[stage]
    module, name = PARTS[stage]
    real = getattr(module, name)
    go = partial(run, stage, folder, tmp_path / "far", **engine(3))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for half in (False, True, False, True):

        def killed(*args, half=half, **kwargs):
            before = heads(parts)
            real(*args, **kwargs)
            for head in heads(parts) - before:
                if half:
                    head.unlink()
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(module, name, killed)
        child = get_context("fork").Process(target=go)
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    times = {head: head.stat().st_mtime_ns for head in heads(parts)}
    assert len(times) == 2

    def checked(*args, **kwargs):
        result = real(*args, **kwargs)
        assert all(head.stat().st_mtime_ns == at for head, at in times.items())
        return result

    monkeypatch.setattr(module, name, checked)
    same(go(), plain[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_another_request_does_not_go_on_in_the_same_folder(made, here, stage):  # noqa: F811
    folder, _ = made
    Path("far.parts").mkdir()
    Path("far.parts/request.json").write_text('{"key": "another"}')
    with pytest.raises(StageError, match=r"far.parts holds the work of another request"):
        run(stage, folder, Path("far"), **engine(2))
    Path("my.parts", FOLDERS[stage]).mkdir(parents=True)
    with pytest.raises(
        StageError, match=f"my.parts/{FOLDERS[stage]} is not of this request; move it away"
    ):
        run(stage, folder, Path("my"), **engine(2))


# ---- a task that fails


def broken(folder: Path, at: Path) -> Path:
    "The same inputs, with a broken line in the Chinese text"
    (at / "tok").symlink_to(folder / "tok")
    (at / "corpus").mkdir()
    for path in (folder / "corpus").iterdir():
        (at / "corpus" / path.name).write_bytes(path.read_bytes())
    text = at / "corpus/zh.train.jsonl"
    lines = text.read_bytes().splitlines(keepends=True)
    text.write_bytes(b"".join([*lines[:299], b'{"text": 7}\n', *lines[300:]]))
    return at


@pytest.mark.parametrize("stage", STAGES)
def test_a_task_that_fails_is_named(made, here, stage):  # noqa: F811
    folder = broken(made[0], here)
    with pytest.raises(StageError) as e:
        run(stage, folder, Path("far"), **engine(3))
    assert len(e.value.args) == 1
    assert "corpus/zh.train.jsonl:300: expected an object with a string" in e.value.args[0]
    assert e.value.args[0].endswith("; what is complete is kept: run the same command again")
    assert not list(here.glob("far")) and not list(here.glob("far.tmp"))


@pytest.mark.parametrize(
    "command, says",
    [
        ("tokenizer --engine moon", "engine is 'moon', expected plain, local, slurm or ray"),
        ("pack --mix 1:zh --tasks 2", "tasks is 2, which needs --engine local, slurm or ray"),
        ("tokenizer --engine local --limit-chars 9", "limit_chars is 9, but tasks count a whole"),
        ("pack --mix 1:zh --engine local --workers 4", "workers is 4, but with --engine local"),
        ("pack --mix 1:zh --engine slurm", "engine slurm: missing a required argument: 'time'"),
        ("tokenizer --engine slurm --where tasks=3", "where: tasks is set by the command itself"),
    ],
)
def test_what_cannot_be_is_said_at_once(made, here, cli, command, says):  # noqa: F811
    folder, _ = made
    given = ["--corpus", folder / "corpus", "--out", "far"]
    if command.startswith("pack"):
        given += ["--tokenizer", folder / "tok"]
    status, lines = cli(*command.split(), *given)
    assert status == 2
    assert len(lines) == 1 and says in lines[0]
    assert not list(here.iterdir())


def test_only_a_corpus_can_be_shared(made, here):  # noqa: F811
    folder, _ = made
    Path("zh.txt").write_text("我们扩充词表。")
    words = "zh.txt is no corpus, and tasks cannot share it; run: cmixtral corpus --sources zh="
    with pytest.raises(StageError, match=words):
        tokenizer("zh.txt", "far", **engine(1))
    with pytest.raises(StageError, match=words):
        pack("zh.txt", folder / "tok", "far", mix=["1:zh"], **engine(1))
    assert [path.name for path in here.iterdir()] == ["zh.txt"]


def test_a_recipe_with_engines_is_checked_whole():
    recipe = dict(
        language="zh",
        corpus=dict(sources=["zh=builtin:zh"]),
        tokenizer=dict(engine="local", tasks=2, limit_chars=9),
        vocab={},
        pack=dict(mix=["1:zh"], engine="local", where=["partition=cpu"], workers=2),
    )
    faults = check_recipe(recipe)
    assert [fault for fault in faults if "engine" in fault or "tasks" in fault] == [
        "[tokenizer] limit_chars is 9, but tasks count a whole corpus; leave it out",
        "[pack] where: engine local takes workers=N alone, not partition",
        "[pack] workers is 2, but with --engine local tasks encode; give --tasks 2 instead",
    ]


# ---- Slurm and Ray


def test_slurm(made, here, monkeypatch):  # noqa: F811
    slurm(here / "bin", monkeypatch)
    folder, plain = made
    for stage, jobs in (("tokenizer", {"count", "merge"}), ("pack", {"encode"})):
        same(run(stage, folder, Path(stage), **engine(1, "slurm", SLURM)), plain[stage])
        scripts = list(Path(f"{stage}.parts").rglob("launch_script.slurm"))
        assert {script.parent.name for script in scripts} == jobs
        for script in scripts:
            own = rf"^#SBATCH --job-name=cmixtral-{script.parent.name}-[0-9a-f]{{6}}$"
            assert re.search(own, script.read_text(), re.M)


def test_a_task_that_fails_on_slurm_is_named(made, here, monkeypatch):  # noqa: F811
    slurm(here / "bin", monkeypatch)
    folder = broken(made[0], here)
    with pytest.raises(StageError, match=r"zh.train.jsonl:300: expected .* run the same command"):
        run("pack", folder, Path("far"), **engine(1, "slurm", SLURM))
    (here / "bin/sbatch").write_text("#!/bin/bash\necho Submitted batch job 7\n")  # runs nothing
    with pytest.raises(StageError, match="task 0 of encode did not begin; see what the engine"):
        run("pack", folder, Path("other"), **engine(1, "slurm", SLURM))


def test_an_interrupted_command_cancels_its_array_on_slurm(made, here, monkeypatch):  # noqa: F811
    slurm(here / "bin", monkeypatch)
    (here / "bin/sbatch").write_text("#!/bin/bash\nkill -INT $PPID\nexec sleep 60\n")  # Ctrl-C
    (here / "bin/scancel").write_text(f'#!/bin/bash\necho "$@" > {here}/cancelled\n')
    (here / "bin/scancel").chmod(0o755)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run("pack", made[0], Path("far"), **engine(1, "slurm", SLURM))
    finally:
        signal.signal(signal.SIGINT, before)
    (script,) = Path("far.parts").rglob("launch_script.slurm")
    (name,) = re.findall("--job-name=(.+)", script.read_text())
    assert f"--name={name}" in (here / "cancelled").read_text().split()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.parametrize("stage", STAGES)
def test_ray(made, tmp_path, stage):
    folder, plain = made
    same(run(stage, folder, tmp_path / "far", **engine(2, "ray", [])), plain[stage])


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_task_that_fails_on_ray_is_named(made, here):  # noqa: F811
    folder = broken(made[0], here)
    with pytest.raises(StageError, match=r"zh.train.jsonl:300: expected .* run the same command"):
        run("pack", folder, Path("far"), **engine(2, "ray", []))
