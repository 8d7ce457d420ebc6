"The chain as a user runs it: whole, again, changed, killed, in parts."

import json
import shutil
import signal

import pytest
from conftest import MICRO, cmixtral

from cmixtral_nb.pipeline import run_states
from cmixtral_nb.recipes import STAGES, STEPS
from cmixtral_nb.run_report import report_data
from cmixtral_nb.stages import Artifact


def test_all_stages_and_the_report(micro):
    out, recipe, printed = micro
    assert {r["state"] for r in run_states(out)} == {"up to date"}
    for s in STEPS:
        Artifact.load(out / s.folder, verify=True)
    page = (out / "report.html").read_text()
    assert (
        page.count("<svg") >= 4
        and "文件" in page
        and "http://"
        not in page.replace("http://www.w3.org", "")
        .replace("http://purl.org", "")
        .replace("http://creativecommons.org", "")
    )
    data = json.loads((out / "report.json").read_text())
    assert (
        data["vocabulary"]["english_ids_changed"]["n_changed"] == 0
        and data["vocabulary"]["english_ids_changed"]["n_docs"] >= 3
    )
    assert set(data["bits_per_byte"]) == {"base", "model", "adapter", "merged", "chat"}
    assert data["gain"]["characters_per_token_zh"] > 1
    assert all(
        abs(sum(layer) - 1) < 1e-3
        for when in data["router_load"].values()
        for lang in when.values()
        for layer in lang
    )
    assert {r["model"] for r in data["samples"]} == {"base", "merged", "chat"}
    assert all(r["seconds"] is not None and r["peak_bytes"] > 0 for r in data["stages"])


def test_merged_is_the_adapter_within_rounding(micro):
    b = json.loads((micro[0] / "report.json").read_text())["bits_per_byte"]
    for lang in "zh", "en":
        assert abs(b["merged"][lang] / b["adapter"][lang] - 1) < 1e-4


def test_the_report_says_what_the_results_say(micro):
    out = micro[0]
    data = report_data(out)
    for name, value in data["bits_per_byte"].items():
        assert (
            value["zh"]
            == json.loads((out / "evaluation" / name / "results.json").read_text())["results"][
                "bpb"
            ]["bits_per_byte_zh"]
        )


def test_again_everything_is_up_to_date(micro):
    out, recipe, _ = micro
    before = {
        p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "recipe.toml"
    }
    again = cmixtral("run", recipe, "--out", out)
    assert again.returncode == 0 and again.stdout.count("is up to date") == len(STEPS) + 1
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_changed_value_redoes_its_stage_and_those_after_it(micro, tmp_path):
    out, recipe, _ = micro
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    changed = tmp_path / "changed.toml"
    changed.write_text(MICRO.replace("[sft]\nsteps = 3", "[sft]\nsteps = 2"))
    again = cmixtral("run", changed, "--out", copy)
    assert again.returncode == 0, again.stderr
    made = [line for line in again.stdout.splitlines() if "making it again" in line]
    assert ["sft" in made[0], "steps=3, now 2" in made[0]] == [True, True]
    assert {line.split("] ")[1].split(":")[0] for line in made} == {
        "sft",
        "chat",
        "generate",
        "evaluate",
    }
    for name in "corpus", "pieces", "tokenizer", "base", "model", "tokens", "adapter", "merged":
        assert Artifact.load(out / name).manifest == Artifact.load(copy / name).manifest


def test_from_and_to(micro, tmp_path, cli):
    out, recipe, _ = micro
    status, err = cli("run", recipe, "--out", tmp_path / "new", "--from", "pack")
    assert status == 2 and "does not exist" in err[0]
    status, err = cli("run", recipe, "--out", out, "--from", "sft", "--to", "pack")
    assert (status, err) == (2, ["StageError: --from sft comes after --to pack"])
    status, err = cli("run", recipe, "--out", out, "--to", "mrege")
    assert status == 2 and "did you mean 'merge'" in err[0]
    assert (
        cli("run", recipe, "--out", out, "--from", "corpus", "--to", "vocab")[0] == 0
        and cli.out.count("up to date") == 4
    )


KILL = """
import os, signal
import cmixtral_nb.stages as a
seal = a._seal
def dying(tmp, req, *rest):
    if tmp.name == '{folder}.tmp': os.kill(os.getpid(), signal.SIGKILL)
    return seal(tmp, req, *rest)
a._seal = dying
"""


@pytest.mark.parametrize(
    "stage, folder",
    [
        ("vocab", "tokenizer"),
        ("init", "model"),
        ("pretrain", "adapter"),
        ("merge", "merged"),
        ("sft", "sft"),
    ],
)
def test_killed_at_the_worst_moment_then_finished(micro, tmp_path, stage, folder):
    "SIGKILL when all is written but the manifest: the old folder is whole, the new one never seen, and the same command finishes"
    out, recipe, _ = micro
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / folder)
    args = ("run", recipe, "--out", copy, "--from", stage, "--to", stage)
    assert cmixtral(*args, code=KILL.format(folder=folder)).returncode == -signal.SIGKILL
    assert not (copy / folder).exists() and (copy / f"{folder}.tmp").exists()
    again = cmixtral(*args)
    assert again.returncode == 0, again.stderr
    files = lambda p: {
        k: v["sha256"]
        for k, v in Artifact.load(p / folder, verify=True).manifest["files"].items()
        if not k.startswith("logs/")
    }
    assert files(copy) == files(out)
    assert not (copy / f"{folder}.tmp").exists()


def test_status(micro, cli):
    out = micro[0]
    assert cli("status", out)[0] == 0
    assert cli.out.count("up to date") == len(STEPS)
    assert list(dict.fromkeys(s.stage for s in STEPS)) + ["report"] == STAGES


def test_an_exam_without_questions_is_missed_before_the_first_step(tmp_path, cli):
    from cmixtral_nb.preflight import hub_ids
    from cmixtral_nb.recipes import read_recipe

    recipe = tmp_path / "exam.toml"
    recipe.write_text(
        MICRO.replace("[evaluate]\n", '[evaluate]\ntasks = ["bpb", "mmlu", "ceval-vaild"]\n')
    )
    status, err = cli("run", recipe, "--out", tmp_path / "run")
    assert status == 2 and not (tmp_path / "run").exists()
    assert err == [
        "StageError: [evaluate] unknown task 'ceval-vaild', did you mean 'ceval-valid'?",
        "StageError: [evaluate] mmlu: where are the questions? give their folder with --data, or --data hub",
    ]
    assert [i for t, k, i in hub_ids(read_recipe("paper")) if k == "data"] == [
        "ceval/ceval-exam",
        "haonan-li/cmmlu",
        "cais/mmlu",
        "Rowan/hellaswag",
    ]


def test_a_recipe_that_cannot_be_read(tmp_path, cli):
    broken = tmp_path / "broken.toml"
    broken.write_text("[vocab\n")
    status, err = cli("run", broken, "--out", tmp_path / "run")
    assert status == 2 and "broken.toml: not valid TOML" in err[0]
    status, err = cli("run", "none", "--out", tmp_path / "run")
    assert (status, err) == (
        2,
        ["StageError: none: no such recipe; expected a TOML file or one of paper, tiny"],
    )
    assert not (tmp_path / "run").exists()
