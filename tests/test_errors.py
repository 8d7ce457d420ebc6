"What a user can do wrong: one line each, exit status 2, nothing damaged."

import json
import os
import shutil
import stat
import subprocess

import pytest
from conftest import MICRO, cmixtral

from cmixtral_nb.stages import Artifact


def tree(path):
    return {str(p.relative_to(path)): p.stat().st_size for p in sorted(path.rglob("*"))}


def refused(cli, *args, says, lines=1):
    "Exit status 2 and `lines` lines (None: one or more, each a fault), with these words among them"
    status, err = cli(*args)
    assert status == 2, err
    assert len(err) == (lines or max(1, len(err))) and all(
        e.startswith("StageError: ") for e in err
    ), err
    for part in [says] if isinstance(says, str) else says:
        assert any(part in e for e in err), (part, err)


def test_missing_file(cli, tmp_path):
    refused(
        cli,
        "corpus",
        "--sources",
        "zh=nothing.jsonl",
        "--out",
        tmp_path / "c",
        says="nothing.jsonl",
    )
    assert tree(tmp_path) == {}


def test_empty_corpus(cli, tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    refused(
        cli, "corpus", "--sources", f"zh={tmp_path / 'a.jsonl'}", "--out", tmp_path / "c", says="zh"
    )
    assert set(tree(tmp_path)) == {"a.jsonl"}


def test_corpus_without_chinese(cli, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"text": f"Plain English, sentence number {i}, and so on and on."}) + "\n"
            for i in range(50)
        )
    )
    refused(
        cli,
        "corpus",
        "--sources",
        f"zh={tmp_path / 'a.jsonl'}",
        "--out",
        tmp_path / "c",
        says="Han",
    )


@pytest.mark.parametrize("bad", [b'{"text": "broken\n', b'{"text": "\xff\xfe broken encoding"}\n'])
def test_broken_lines_are_counted_or_stop(cli, tmp_path, bad):
    good = "".join(
        json.dumps({"text": f"第{i}篇文章讲的是如何扩充词表，让模型学会中文。"}, ensure_ascii=False)
        + "\n"
        for i in range(200)
    ).encode()
    (tmp_path / "a.jsonl").write_bytes(good + bad)
    args = (
        "corpus",
        "--sources",
        f"zh={tmp_path / 'a.jsonl'}",
        "--valid-share",
        0.1,
        "--out",
        tmp_path / "c",
    )
    refused(cli, *args, "--on-error", "stop", says=["a.jsonl", "201"])
    assert cli(*args)[0] == 0
    assert list(Artifact.load(tmp_path / "c").stats["zh"]["dropped"].values()) == [1]


def test_a_directory_that_is_not_an_artifact(cli, tmp_path, micro):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    refused(
        cli,
        "init",
        "--model",
        micro[0] / "base",
        "--tokenizer",
        micro[0] / "tokenizer",
        "--out",
        tmp_path / "mine",
        "--force",
        says="not an artifact",
    )
    refused(
        cli,
        "pretrain",
        "--model",
        micro[0] / "model",
        "--tokens",
        tmp_path / "mine",
        "--out",
        tmp_path / "o",
        says="mine",
    )
    assert set(tree(tmp_path)) == {"mine", "mine/letter.txt"}


def test_tokens_packed_with_another_tokenizer(cli, tmp_path, micro):
    refused(
        cli,
        "pretrain",
        "--model",
        micro[0] / "base",
        "--tokens",
        micro[0] / "tokens",
        "--out",
        tmp_path / "o",
        says=["tokenizer", "cmixtral pack"],
    )
    assert tree(tmp_path) == {}


def test_an_adapter_for_another_base(cli, tmp_path, micro):
    refused(
        cli,
        "merge",
        "--model",
        micro[0] / "base",
        "--adapter",
        micro[0] / "adapter",
        "--out",
        tmp_path / "o",
        says="adapter",
        lines=None,
    )
    assert tree(tmp_path) == {}


def test_recipe_faults_are_listed_at_once(cli, tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text(
        MICRO.replace("[vocab]\nn_pieces = 300", "[vocab]\nn_pices = 300").replace(
            "lr = 1e-3", 'lr = "1e-3"'
        )
        + "\n[pretrian]\n"
    )
    refused(
        cli,
        "run",
        bad,
        "--out",
        tmp_path / "o",
        says=["did you mean 'n_pieces'", "expected float", "did you mean 'pretrain'"],
        lines=3,
    )
    assert set(tree(tmp_path)) == {"bad.toml"}


def truncated(src, dst):
    shutil.copytree(src, dst, copy_function=shutil.copy)
    f = next(p for p in dst.glob("*.safetensors"))
    os.truncate(f, f.stat().st_size // 2)
    return f


def test_truncated_safetensors(cli, tmp_path, micro):
    for name in "ours", "foreign":
        f = truncated(micro[0] / "base", tmp_path / name)
        if name == "foreign":
            (tmp_path / name / "manifest.json").unlink()
        before = tree(tmp_path)
        refused(
            cli,
            "init",
            "--model",
            tmp_path / name,
            "--tokenizer",
            micro[0] / "tokenizer",
            "--out",
            tmp_path / "o",
            says=f.name,
        )
        refused(cli, "evaluate", "--model", tmp_path / name, "--out", tmp_path / "o", says=f.name)
        refused(
            cli,
            "merge",
            "--model",
            tmp_path / name,
            "--adapter",
            micro[0] / "adapter",
            "--out",
            tmp_path / "o",
            says=f.name,
            lines=None,
        )
        assert tree(tmp_path) == before


def test_pickle_checkpoint(cli, tmp_path, micro):
    src = tmp_path / "pickled"
    src.mkdir()
    for p in (micro[0] / "base").glob("*"):
        if (
            p.suffix != ".safetensors"
            and p.name != "manifest.json"
            and p.is_file()
            and "index" not in p.name
        ):
            shutil.copy(p, src)
    (src / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    refused(
        cli,
        "init",
        "--model",
        src,
        "--tokenizer",
        micro[0] / "tokenizer",
        "--out",
        tmp_path / "o",
        says=["pytorch_model.bin", "safetensors"],
    )
    adapter = tmp_path / "adapter"
    shutil.copytree(micro[0] / "adapter", adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    (adapter / "manifest.json").unlink()
    refused(
        cli,
        "merge",
        "--model",
        micro[0] / "model",
        "--adapter",
        adapter,
        "--out",
        tmp_path / "o",
        says="safetensors",
    )


def test_files_of_an_artifact_follow_the_umask(micro, tmp_path):
    "safetensors makes files that nobody but their owner can read"
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in micro[0].rglob("*") if p.is_file()}
    (tmp_path / "new").touch()
    assert any(p.suffix == ".safetensors" for p in modes)
    assert set(modes.values()) == {stat.S_IMODE((tmp_path / "new").stat().st_mode)}


def test_options(cli):
    status, err = cli("merge", "--model", "x", "--adapter", "y", "--out", "z", "--fource")
    assert (status, len(err)) == (2, 1) and "did you mean '--force'" in err[0]
    status, err = cli("mrege")
    assert (status, len(err)) == (2, 1) and "did you mean 'merge'" in err[0]
    status, err = cli("pretrain", "--model", "x", "--tokens", "y", "--out", "z", "--lr", "fast")
    assert (status, len(err)) == (2, 1) and "--lr" in err[0]


def test_status_of_nothing(cli, tmp_path):
    refused(cli, "status", tmp_path / "none", says="does not exist")
    refused(cli, "status", tmp_path, says="not a run")


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 3 MB"
    mnt = tmp_path / "disk"
    mnt.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mnt)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system needs root")
    yield mnt
    subprocess.run(["umount", str(mnt)], check=True)


@pytest.mark.parametrize("stage", ["corpus", "init", "pretrain"])
def test_full_disk(small_disk, micro, stage):
    run = micro[0]
    args = dict(
        corpus=["--sources", "zh=builtin:zh", "--valid-share", "0.02"],
        init=["--model", run / "base", "--tokenizer", run / "tokenizer"],
        pretrain=[
            "--model",
            run / "model",
            "--tokens",
            run / "tokens",
            "--batch",
            1,
            "--steps",
            2,
            "--rank",
            4,
            "--eval-every",
            100,
        ],
    )[stage]
    out = cmixtral(stage, *args, "--out", small_disk / "o")
    assert out.returncode == 2, out.stderr
    err = out.stderr.strip().splitlines()
    assert len(err) == 1 and "space" in err[0], err
    assert not (small_disk / "o").exists()


def test_the_paper_recipe_is_refused_early_with_all_that_is_missing():
    out = cmixtral("run", "paper", "--out", "nowhere", env={"HF_HUB_OFFLINE": "1"}, timeout=120)
    err = out.stderr.strip().splitlines()
    assert out.returncode == 2 and all(e.startswith("StageError: ") for e in err), out.stderr
    assert any("SkyPile" in e for e in err) and any("mistralai/Mixtral-8x7B-v0.1" in e for e in err)
    assert not os.path.exists("nowhere")
