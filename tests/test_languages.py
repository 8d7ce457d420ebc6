"Any language, any number of them, and recipes that leave stages out."

import contextlib
import io
import json
import math
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from cmixtral_nb.commands import main
from cmixtral_nb.corpora import corpus_texts
from cmixtral_nb.languages import language_name, script_pattern
from cmixtral_nb.options import RANGES
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.pipeline import run_states
from cmixtral_nb.recipe_check import check_recipe
from cmixtral_nb.recipes import STEPS, anno_type, arguments, command, read_recipe, recipe_steps
from cmixtral_nb.stages import Artifact
from cmixtral_nb.tokenizer_files import encode_plain, load_tokenizer, write_tokenizer

TEXTS = Path(__file__).parent / "languages"  # where they come from: ATTRIBUTION.md

TABLES = {
    "corpus": "sources = [{sources}]\nvalid_share = 0.3\nlimit_chars = 150000",
    "tokenizer": "n_pieces = 1500",
    "search": 'limit_chars = 10000\nchars = ["0"]\ntotals = ["50", "100", "200"]',
    "vocab": "n_pieces = 150\nn_hostile = 1000\nlimit_chars = 10000",
    "base": "hidden = 32\nlayers = 2\nheads = 2\nkv_heads = 1\nintermediate = 32\n"
    "steps = 1\nbatch = 2\nlength = 64",
    "init": "",
    "pack": "length = 64\nvalid_chars = 1500",
    "pretrain": "rank = 4\nalpha = 8\nlr = 1e-3\nbatch = 2\nsteps = 2\neval_every = 2\n"
    "save_every = 2\nlog_every = 1\neval_chars = 1000",
    "merge": "",
    "sft": 'steps = 1\nlength = 128\nconversations = ["{talks}"]',
    "generate": "max_new_tokens = 4",
    "evaluate": "length = 64\nn_chars = 400",
    "efficiency": "n_chars = 400\nseconds = 0.02\nnew_tokens = 2",
}


def source(lang):
    return f"{lang}=builtin:{lang}" if lang in ("zh", "en") else f"{lang}={TEXTS}/{lang}.jsonl.xz"


def recipe_text(langs, talks="none.jsonl", without=()):
    "A recipe smaller than micro, for languages of which the first is new"
    sources = ", ".join(f'"{source(lang)}"' for lang in langs)
    tables = [
        f"[{name}]\n{text.format(sources=sources, talks=talks)}"
        for name, text in TABLES.items()
        if name not in without
    ]
    return f'name = "{"-".join(langs)}"\n\n' + "\n\n".join(tables) + "\n"


def write_recipe(folder, *args, **kwargs):
    path = folder / "r.toml"
    path.write_text(recipe_text(*args, **kwargs))
    return path


def cmixtral(*args):
    "The command in this process: what it printed; it must succeed"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(arg) for arg in args])
    assert status == 0, err.getvalue()
    return out.getvalue()


def talks_of(path):
    "Sixty conversations that are in no language"
    turns = [
        [dict(role="user", content=f"{n} + {n} = ?"), dict(role="assistant", content=f"{2 * n}.")]
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(dict(messages=turn)) + "\n" for turn in turns))
    return path


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    "(folder of a run with Khmer as the new language, Russian and Vietnamese kept; what it printed)"
    tmp = tmp_path_factory.mktemp("three")
    talks = talks_of(tmp / "talks.jsonl")
    recipe = write_recipe(tmp, ["km", "ru", "vi"], talks)
    said = cmixtral("run", recipe, "--out", tmp / "run")
    return tmp / "run", said


def copy_of(run, tmp, without):
    "The same run, and its recipe without some tables"
    shutil.copytree(run, tmp / "run")
    for page in (tmp / "run").glob("report.*"):
        page.unlink()
    talks = run.parent / "talks.jsonl"
    return write_recipe(tmp, ["km", "ru", "vi"], talks, without), tmp / "run"


def test_no_language_is_named_that_is_not_there(three, tmp_path):
    run, said = three
    cmixtral("card", run, "--out", tmp_path / "card.md")
    models = [f"{name}={run / 'evaluation' / name}" for name in ("base", "merged")]
    cmixtral("compare", *models, "--out", tmp_path / "compared")
    pages = [run / "report.html", tmp_path / "card.md", *(tmp_path / "compared").glob("*.html")]
    assert len(pages) == 3
    for text in [said, *(page.read_text() for page in pages)]:
        for absent in ("Chinese", "English", "中文", "builtin:zh"):
            assert absent not in text, (absent, text[max(0, text.find(absent) - 200) :][:400])
    for page in pages:
        for lang in ("km", "ru", "vi"):
            assert language_name(lang) in page.read_text(), (page.name, lang)


def test_languages_reach_every_stage(three):
    run, _ = three
    assert {row["state"] for row in run_states(run)} == {"up to date"}
    steps = recipe_steps(read_recipe(str(run / "recipe.toml")))
    params = {step.folder: Artifact.load(run / step.folder).params for step in steps}
    assert (params["pieces"]["lang"], params["pieces"]["script"]) == ("km", "Khmer")
    assert (params["search"]["lang"], params["base"]["lang"]) == ("km", "ru")
    assert params["tokens"]["mix"] == ["1:km", "0.5:ru", "0.5:vi"]
    rows = [json.loads(line) for line in (run / "samples/samples.jsonl").read_text().splitlines()]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    assert len(prompts) == 9
    assert all(script_pattern("Khmer").search(prompt) for prompt in prompts[:3])
    for name in ("base", "model", "adapter", "merged", "chat"):
        results = json.loads((run / "evaluation" / name / "results.json").read_text())["results"]
        for lang in ("km", "ru", "vi"):
            assert 0 < results["bpb"][f"bits_per_byte_{lang}"] < 20
    per_token = [
        json.loads((run / "evaluation" / name / "results.json").read_text())["results"]["bpb"]
        for name in ("base", "merged")
    ]
    assert per_token[1]["chars_per_token_km"] > 1.5 * per_token[0]["chars_per_token_km"]
    assert per_token[1]["chars_per_token_ru"] == per_token[0]["chars_per_token_ru"]


def test_a_run_may_end_before_it_is_merged(three, tmp_path):
    recipe, run = copy_of(three[0], tmp_path, ["merge", "sft"])
    for folder in ("merged", "sft", "chat", "evaluation/merged", "evaluation/chat"):
        shutil.rmtree(run / folder)
    cmixtral("run", recipe, "--out", run)
    assert not any((run / name).exists() for name in ("merged", "sft", "chat"))
    assert {row["state"] for row in run_states(run)} == {"up to date"}
    rows = (run / "samples/samples.jsonl").read_text().splitlines()
    assert {json.loads(row)["model"] for row in rows} == {"base", "model"}
    assert "Khmer" in (run / "report.html").read_text()
    cmixtral("card", run, "--model", "model", "--out", tmp_path / "card.md")


WITHOUT = {  # tables left out -> folders that are then not made
    "evaluate": {f"evaluation/{name}" for name in ("base", "model", "adapter", "merged", "chat")},
    "sft": {"sft", "chat", "evaluation/chat"},
    "base": {"base"},
}


CHANGED = {  # tables left out -> folders that are made again
    "sft": {"samples"},  # of one model less
    "base": {"pieces", "search", "tokenizer"},  # the named model's tokenizer is their base
}


@pytest.mark.parametrize("table", WITHOUT)
def test_a_run_may_leave_a_stage_out(three, tmp_path, table):
    recipe, run = copy_of(three[0], tmp_path, [table])
    text = recipe.read_text()
    if table == "base":  # the same one by its contents, from elsewhere
        text = text.replace("[init]\n", f'[init]\nmodel = "{three[0]}/base"\n')
    (run / "recipe.toml").write_text(text)
    for folder in WITHOUT[table]:
        shutil.rmtree(run / folder)
    states = {row["folder"]: row["state"] for row in run_states(run)}
    whole = recipe_steps(read_recipe(str(three[0] / "recipe.toml")))
    assert states.keys() == {step.folder for step in whole} - WITHOUT[table]
    changed = {name for name, state in states.items() if state != "up to date"}
    assert changed == CHANGED.get(table, set())
    cmixtral("report", run)
    report = (run / "report.html").read_text()
    assert "Khmer" in report and "Chinese" not in report


def test_one_model_from_elsewhere_is_evaluated_once(three, tmp_path):
    (tmp_path / "r.toml").write_text(
        f'[evaluate]\nmodel = "{three[0]}/merged"\ncorpus = "{three[0]}/corpus"\n'
        "length = 64\nn_chars = 400\n"
    )
    cmixtral("run", tmp_path / "r.toml", "--out", tmp_path / "run")
    assert [row["folder"] for row in run_states(tmp_path / "run")] == ["evaluation/model"]
    found = Artifact.load(tmp_path / "run/evaluation/model").stats["results"]["bpb"]
    assert found == Artifact.load(three[0] / "evaluation/merged").stats["results"]["bpb"]


def mixtral_folder(tmp):
    "A folder with the tokenizer that all of these begin with"
    write_tokenizer(base_tokenizer_model("mixtral"), tmp / "mixtral")
    return tmp / "mixtral"


@pytest.mark.parametrize("langs", ["ja en", "vi en", "ru", "zh"])
def test_the_vocabulary_of_any_language(langs, tmp_path):
    "Without search, and with one language alone"
    recipe = write_recipe(tmp_path, langs.split(), without=["search", "sft"])
    cmixtral("run", recipe, "--out", tmp_path / "run", "--to", "vocab")
    stats = Artifact.load(tmp_path / "run/tokenizer").stats
    assert (stats["n_pieces"], stats["n_vocab"]) == (150, 32_150)
    assert {line["failed"] for line in stats["certificate"].values()} == {0}
    assert ("ids of texts that take no new piece unchanged" in stats["certificate"]) == (
        langs == "vi en"  # in one script, a text may take a new piece
    )
    for lang in langs.split()[1:]:
        texts = list(corpus_texts(tmp_path / "run/corpus", lang, "valid"))
        old, new = (
            encode_plain(load_tokenizer(folder), texts)
            for folder in (mixtral_folder(tmp_path), tmp_path / "run/tokenizer")
        )
        n_changed = sum(a != b for a, b in zip(old, new, strict=True))
        assert stats["ids_changed"][lang]["n_changed"] == n_changed
    asked = read_recipe(str(recipe))
    assert check_recipe(asked) == []
    step = recipe_steps(asked)[-1]
    kept = langs.split()[1:]
    pack = next(step for step in recipe_steps(asked) if step.command == "pack")
    mix = arguments(pack, asked, tmp_path)["mix"]
    assert mix == [f"1:{langs.split()[0]}", *(f"0.5:{lang}" for lang in kept)]
    assert step.command == "efficiency"
    assert arguments(step, asked, tmp_path)["lang"] == langs.split()[0]


OUTSIDE: dict[type, list[Any]] = {
    float: [math.nan, -1.0],
    int: [-1, 2**64],
    str: ["none such"],
    bool: [],
}


WITH_OPTIONS = [name for name in dict.fromkeys(s.command for s in STEPS) if name != "control"]


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_each_option_outside_its_range_is_refused_before_its_inputs_exist(name):
    function = command(name)
    needed = dict(sources=["zh=builtin:zh"]) if name == "corpus" else {}
    n_tried = 0
    for option, param in signature(function).parameters.items():
        typ = anno_type(param.annotation)
        if option not in RANGES or isinstance(typ, list):
            continue
        for value in OUTSIDE[typ]:
            faults = function.option_faults(**needed, **{option: value})
            assert any(fault.startswith(f"{option} is ") for fault in faults), (option, value)
            n_tried += 1
    assert n_tried
