"What a user can do wrong: one line each, exit status 2, nothing damaged."

import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from conftest import MICRO, cmixtral

import cmixtral_nb
from cmixtral_nb.stages import Artifact, StageError


def tree(path):
    return {str(p.relative_to(path)): p.stat().st_size for p in sorted(path.rglob("*"))}


def refused(cli, *words, says, lines: int | None = 1, **options):
    """Exit status 2 and `lines` lines with these words among them; None: at least one line

    Example: refused(cli, "merge", model="x", force=True, says="x: no such folder")
    runs `cmixtral merge --model x --force`
    """
    status, err = cli(*words, *flags(options))
    assert status == 2, err
    if lines is None:
        assert err
    else:
        assert len(err) == lines, err
    assert all(line.startswith("StageError: ") for line in err), err
    for part in [says] if isinstance(says, str) else says:
        assert any(part in line for line in err), (part, err)


def flags(options):
    "Example: dict(valid_share=0.1, force=True) -> ['--valid-share', 0.1, '--force']"
    words = []
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(value)
    return words


def jsonl(file, texts):
    lines = [json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def test_missing_file(cli, tmp_path):
    refused(cli, "corpus", sources="zh=nothing.jsonl", out=tmp_path / "c", says="nothing.jsonl")
    assert tree(tmp_path) == {}


STAGE = re.compile(r'^@stage\(\s*"(\w+)".*?^def (\w+)', re.MULTILINE | re.DOTALL)


def test_what_is_missing_is_named_with_a_command_that_makes_it(tmp_path):
    package = Path(cmixtral_nb.__file__).parent
    stages = [m for file in sorted(package.glob("*.py")) for m in STAGE.findall(file.read_text())]
    assert ("adapter", "pretrain") in stages and len(stages) >= 15
    for kind in {kind for kind, _ in stages}:
        with pytest.raises(StageError) as told:
            Artifact.load(tmp_path / "none", kind)
        what, command = re.findall(r"expected (.*); run: cmixtral (\w+)", str(told.value))[0]
        assert (kind, command) in stages
        assert what == "a corpus" or not re.match(r"a ([aeio]|\w+s$)", what), what


def test_empty_corpus(cli, tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [])
    refused(cli, "corpus", sources=f"zh={file}", out=tmp_path / "c", says="zh")
    assert set(tree(tmp_path)) == {"a.jsonl"}


def test_corpus_without_chinese(cli, tmp_path):
    texts = [f"Plain English, sentence number {i}, and so on and on." for i in range(50)]
    file = jsonl(tmp_path / "a.jsonl", texts)
    refused(cli, "corpus", sources=f"zh={file}", out=tmp_path / "c", says="Han")


@pytest.mark.parametrize("bad", [b'{"text": "broken\n', b'{"text": "\xff\xfe broken encoding"}\n'])
def test_broken_lines_are_counted_or_stop(cli, tmp_path, bad):
    texts = [f"第{i}篇文章讲的是如何扩充词表，让模型学会中文。" for i in range(200)]
    file = jsonl(tmp_path / "a.jsonl", texts)
    file.write_bytes(file.read_bytes() + bad)
    options = dict(sources=f"zh={file}", valid_share=0.1, out=tmp_path / "c")
    refused(cli, "corpus", **options, on_error="stop", says=["a.jsonl", "201"])
    assert cli("corpus", *flags(options))[0] == 0
    assert list(Artifact.load(tmp_path / "c").stats["zh"]["dropped"].values()) == [1]


def test_a_directory_that_is_not_an_artifact(cli, tmp_path, micro):
    run, mine = micro[0], tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    refused(
        cli,
        "init",
        model=run / "base",
        tokenizer=run / "tokenizer",
        out=mine,
        force=True,
        says="not an artifact",
    )
    refused(cli, "pretrain", model=run / "model", tokens=mine, out=tmp_path / "o", says="mine")
    assert set(tree(tmp_path)) == {"mine", "mine/letter.txt"}


def test_tokens_packed_with_another_tokenizer(cli, tmp_path, micro):
    run = micro[0]
    refused(
        cli,
        "pretrain",
        model=run / "base",
        tokens=run / "tokens",
        out=tmp_path / "o",
        says=["tokenizer", "cmixtral pack", "cmixtral init"],
        lines=2,  # all faults at once: its ids do not fit the model either
    )
    assert tree(tmp_path) == {}


def test_an_adapter_for_another_base(cli, tmp_path, micro):
    run = micro[0]
    refused(
        cli,
        "merge",
        model=run / "base",
        adapter=run / "adapter",
        out=tmp_path / "o",
        says="adapter",
        lines=None,
    )
    assert tree(tmp_path) == {}


def test_recipe_faults_are_listed_at_once(cli, tmp_path):
    text = MICRO.replace("[vocab]\nn_pieces = 300", "[vocab]\nn_pices = 300")
    text = text.replace("lr = 1e-3", 'lr = "1e-3"') + "\n[pretrian]\n"
    bad = tmp_path / "bad.toml"
    bad.write_text(text)
    refused(
        cli,
        "run",
        bad,
        out=tmp_path / "o",
        says=["did you mean 'n_pieces'", "expected float", "did you mean 'pretrain'"],
        lines=3,
    )
    assert set(tree(tmp_path)) == {"bad.toml"}


def truncated(src, dst):
    shutil.copytree(src, dst, copy_function=shutil.copy)
    f = next(dst.glob("*.safetensors"))
    os.truncate(f, f.stat().st_size // 2)
    return f


def test_truncated_safetensors(cli, tmp_path, micro):
    run, out = micro[0], tmp_path / "o"
    for name in "ours", "foreign":
        model = tmp_path / name
        shard = truncated(run / "base", model)
        if name == "foreign":
            (model / "manifest.json").unlink()
        before = tree(tmp_path)
        refused(cli, "init", model=model, tokenizer=run / "tokenizer", out=out, says=shard.name)
        refused(cli, "evaluate", model=model, out=out, says=shard.name)
        refused(
            cli, "merge", model=model, adapter=run / "adapter", out=out, says=shard.name, lines=None
        )
        assert tree(tmp_path) == before


def test_pickle_checkpoint(cli, tmp_path, micro):
    run, out = micro[0], tmp_path / "o"
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for p in (run / "base").glob("*"):
        is_weights = p.suffix == ".safetensors" or "index" in p.name
        if p.is_file() and p.name != "manifest.json" and not is_weights:
            shutil.copy(p, pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    refused(
        cli,
        "init",
        model=pickled,
        tokenizer=run / "tokenizer",
        out=out,
        says=["pytorch_model.bin", "safetensors"],
    )
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    (adapter / "manifest.json").unlink()
    refused(cli, "merge", model=run / "model", adapter=adapter, out=out, says="safetensors")


def test_files_of_an_artifact_follow_the_umask(micro, tmp_path):
    "safetensors makes files that nobody but their owner can read"
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in micro[0].rglob("*") if p.is_file()}
    (tmp_path / "new").touch()
    assert any(p.suffix == ".safetensors" for p in modes)
    assert set(modes.values()) == {stat.S_IMODE((tmp_path / "new").stat().st_mode)}


def test_options(cli):
    status, err = cli("merge", "--model", "x", "--adapter", "y", "--out", "z", "--fource")
    assert (status, len(err)) == (2, 1)
    assert "did you mean '--force'" in err[0]
    status, err = cli("mrege")
    assert (status, len(err)) == (2, 1)
    assert "did you mean 'merge'" in err[0]
    status, err = cli("pretrain", "--model", "x", "--tokens", "y", "--out", "z", "--lr", "fast")
    assert (status, len(err)) == (2, 1)
    assert "--lr" in err[0]


def test_status_of_nothing(cli, tmp_path):
    refused(cli, "status", tmp_path / "none", says="does not exist")
    refused(cli, "status", tmp_path, says="not a run")


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 3 MB"
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("stage", ["corpus", "init", "pretrain"])
def test_full_disk(small_disk, micro, stage):
    run = micro[0]
    options: dict = dict(
        corpus=dict(sources="zh=builtin:zh", valid_share=0.02),
        init=dict(model=run / "base", tokenizer=run / "tokenizer"),
        pretrain=dict(
            model=run / "model", tokens=run / "tokens", batch=1, steps=2, rank=4, eval_every=100
        ),
    )
    out = cmixtral(stage, *flags(options[stage]), "--out", small_disk / "o")
    assert out.returncode == 2, out.stderr
    err = out.stderr.strip().splitlines()
    assert len(err) == 1, err
    assert "space" in err[0], err
    assert not (small_disk / "o").exists()


def test_the_paper_recipe_is_refused_early_with_all_that_is_missing():
    out = cmixtral("run", "paper", "--out", "nowhere", env={"HF_HUB_OFFLINE": "1"}, timeout=120)
    err = out.stderr.strip().splitlines()
    assert out.returncode == 2, out.stderr
    assert all(line.startswith("StageError: ") for line in err), out.stderr
    assert any("SkyPile" in line for line in err)
    assert any("mistralai/Mixtral-8x7B-v0.1" in line for line in err)
    assert not os.path.exists("nowhere")
