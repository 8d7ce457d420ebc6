"The control arm: the same text without new pieces, and what it says about extension."

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import MICRO, cmixtral
from hypothesis import given, settings
from hypothesis import strategies as st

import cmixtral_nb.pretrain as pretrain_module
from cmixtral_nb.arms import Budget, arms_of, at_equal, same_bytes, speed_ratio
from cmixtral_nb.bits import document_bits
from cmixtral_nb.breakeven import fit_curves, forecast
from cmixtral_nb.control import Respeller, control_faults, cut_ids, id_bytes, stream_docs
from cmixtral_nb.gain import change
from cmixtral_nb.init import speller
from cmixtral_nb.pack import collate, load_examples
from cmixtral_nb.packing import even_rows
from cmixtral_nb.pipeline import run_states
from cmixtral_nb.recipe_check import check_recipe
from cmixtral_nb.recipes import read_recipe
from cmixtral_nb.results import load_evaluation, write_lines
from cmixtral_nb.stages import Artifact
from cmixtral_nb.tokenizer_files import encode_plain, load_tokenizer


def text_of(ids, table):
    return b"".join(table[i] for i in ids)


@pytest.fixture(scope="module")
def arms(micro, tmp_path_factory):
    "A copy of the micro run that was finished with a control"
    out = tmp_path_factory.mktemp("arms")
    shutil.copytree(micro[0], out / "run", symlinks=True)
    (out / "arms.toml").write_text(MICRO + "\n[control]\n")
    made = cmixtral("run", out / "arms.toml", "--out", out / "run")
    assert made.returncode == 0, made.stderr[-2000:]
    return out / "run", made.stdout


# ---- the same bytes


def test_each_example_holds_the_bytes_of_its_partner(arms):
    run, said = arms
    assert said.count("is up to date") == 17 and said.count("control") >= 2
    tables = [id_bytes(load_tokenizer(run / name)) for name in ("model", "base")]
    sets = [load_examples(run / name)[:]["input_ids"] for name in ("tokens", "control_tokens")]
    assert len(sets[0]) == len(sets[1])
    total = 0
    for a, b in zip(*sets, strict=True):
        texts = [text_of(ids, table) for ids, table in zip((a, b), tables, strict=True)]
        assert texts[0] == texts[1]
        total += len(texts[0])
    stats = Artifact.load(run / "control_tokens").stats["sources"]
    assert total == round(sum(s["n_rows"] * s["row_bytes"] for s in stats.values()))


def test_each_step_of_both_arms_reads_the_same_text(arms, tmp_path, monkeypatch):
    run, _ = arms
    plain, seen = pretrain_module.collate, []

    def note(examples, **how):
        seen.append([example["input_ids"].tolist() for example in examples])
        return plain(examples, **how)

    monkeypatch.setattr(pretrain_module, "collate", note)
    read = {}
    for arm, (model, tokens) in {
        "extended": ("model", "tokens"),
        "control": ("base", "control_tokens"),
    }.items():
        seen.clear()
        pretrain_module.pretrain(
            run / model,
            run / tokens,
            tmp_path / arm,
            rank=2,
            alpha=4,
            batch=2,
            accumulation=2,
            steps=2,
            eval_every=9,
            eval_chars=50,
            load_in_4bit=False,
            device="cpu",
        )
        table = id_bytes(load_tokenizer(run / model))
        read[arm] = [[text_of(ids, table) for ids in batch] for batch in seen]
    assert len(read["control"]) >= 4
    assert read["extended"] == read["control"]
    stats = [Artifact.load(tmp_path / arm).stats for arm in read]
    assert stats[0]["bytes_per_step"] == pytest.approx(stats[1]["bytes_per_step"], rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text("ab 中文的是é🙂\n", min_size=0, max_size=30), min_size=1, max_size=8),
    length=st.integers(8, 20),
    cut=st.integers(0, 7),
)
def test_any_text_cut_anywhere_keeps_its_bytes(respeller, micro_tokenizers, texts, length, cut):
    new, _ = micro_tokenizers
    docs = [[1, *doc, 2] for doc in encode_plain(new, texts)]
    stream = np.concatenate([np.array(doc) for doc in docs])
    stream = stream[: max(length, len(stream) - cut)]  # the last document may break off
    rows = stream[: len(stream) // length * length].reshape(-1, length)
    respeller.length = length
    found = [ids for block in respeller.examples(iter([rows[:2], rows[2:]])) for ids in block]
    assert len(found) == len(rows)
    for row, ids in zip(rows, found, strict=True):
        assert text_of(row, respeller.new_bytes) == text_of(ids, respeller.old_bytes)
        assert [i for i in row if i in (1, 2)] == [i for i in ids if i in (1, 2)]


@pytest.fixture(scope="module")
def micro_tokenizers(micro):
    return load_tokenizer(micro[0] / "model"), load_tokenizer(micro[0] / "base")


@pytest.fixture(scope="module")
def respeller(micro_tokenizers):
    new, old = micro_tokenizers
    return Respeller(new, old, length=64)


def test_whole_documents_are_spelled_as_the_old_tokenizer_spells_them(micro_tokenizers):
    new, old = micro_tokenizers
    texts = ["这个命令显示文件。", "To install it, type this.", "中英 mixed 文本"]
    doc = [i for text in texts for i in [1, *encode_plain(new, [text])[0], 2]]
    respeller = Respeller(new, old, len(doc))
    (found,) = [ids for block in respeller.examples(iter([np.array([doc])])) for ids in block]
    assert found.tolist() == [i for text in texts for i in [1, *encode_plain(old, [text])[0], 2]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=4).map(sorted))
def test_cut_ids_cuts_at_the_bytes(respeller, offsets):
    old, table = respeller.old, respeller.old_bytes
    (ids,) = encode_plain(old, ["a command line 中文 for 🙂"])
    whole = text_of(ids, table)
    offsets = [min(offset, len(whole)) for offset in offsets]
    parts = [text_of(part, table) for part in cut_ids(ids, offsets, table, speller(old))]
    places = [0, *offsets, len(whole)]
    assert parts == [whole[a:b] for a, b in zip(places, places[1:], strict=False)]


@settings(deadline=None)
@given(
    docs=st.lists(st.lists(st.integers(5, 9), max_size=6), min_size=1, max_size=6),
    same=st.booleans(),
    block=st.integers(1, 7),
)
def test_stream_docs_takes_any_stream_apart(docs, same, block):
    bos, eos = (2, 2) if same else (1, 2)
    stream = np.array([i for doc in docs for i in [bos, *doc, eos]])
    pieces = iter([stream[k : k + block] for k in range(0, len(stream), block)])
    found = [doc for part in stream_docs(pieces, eos) for doc in part]
    assert [doc.ids.tolist() for doc in found] == [[bos, *doc, eos] for doc in docs]
    assert [doc.begin for doc in found] == list(
        np.cumsum([0, *(len(doc) + 2 for doc in docs)])[:-1]
    )


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 3))
def test_even_rows_lose_nothing(sizes, seed):
    rng = np.random.default_rng(seed)
    examples = [rng.integers(5, 99, n) for n in sizes]
    rows, begins = even_rows(examples, fill=1)
    flat, n = rows.ravel(), sum(sizes)
    assert flat[:n].tolist() == np.concatenate(examples).tolist()
    assert len(flat) - n < len(examples) and (flat[n:] == 1).all()
    batch = collate([dict(input_ids=ids) for ids in examples], bos=1)
    starts = np.cumsum([0, *sizes])[:-1]
    assert (batch["position_ids"].numpy().ravel()[starts] == 0).all()
    counted = (batch["labels"][:, 1:] != -100).sum()
    assert counted <= n - 1 and not begins[:, 0].any()


# ---- the two traps


def test_both_arms_begin_with_the_same_token_and_pay_for_every_byte(arms):
    "The prefix token and truncation: a uniform model pays log2 of its vocabulary for each token"
    import torch
    from transformers import PretrainedConfig

    run, _ = arms
    texts = ["这个命令显示文件。" * 9, "To install the package, type this. " * 9]
    inputs = {}
    for name in ("model", "base"):
        tok = load_tokenizer(run / name)
        seen: list = []

        class Uniform(torch.nn.Module):
            config = PretrainedConfig(vocab_size=50_000)
            device = torch.device("cpu")

            def forward(self, input_ids, use_cache=False, seen=seen):
                seen.append(input_ids)
                return type("Out", (), dict(logits=torch.zeros(*input_ids.shape, 50_000)))

        found = document_bits(Uniform(), tok, texts, length=16, batch=4, stride=8)  # type: ignore[arg-type]
        for doc, text in zip(found, texts, strict=True):
            assert doc["n_bytes"] == len(text.encode())
            n_tokens = len(encode_plain(tok, [text])[0])
            assert doc["bits"] == pytest.approx(n_tokens * math.log2(50_000), rel=1e-5)
        inputs[name] = {int(row[0]) for batch in seen for row in batch if row[0] == 1}
    assert inputs["model"] == inputs["base"] == {1}


def test_arms_with_other_ends_are_refused(arms, tmp_path):
    run, _ = arms
    assert control_faults(run / "tokens", run / "model", run / "base") == []
    other = tmp_path / "base"
    shutil.copytree(run / "base", other)
    (other / "manifest.json").unlink()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = other / name
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(bos_token="</s>")))
    (fault,) = control_faults(run / "tokens", run / "model", other)
    assert "start and end with" in fault and "bos_token" in fault


def test_arms_on_other_bytes_say_so(arms, tmp_path):
    run, _ = arms
    both = [load_evaluation(run / "evaluation" / name) for name in ("merged", "control")]
    assert same_bytes(*both) == ""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    file = copy / "evaluation" / "control" / "documents.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["n_bytes"] -= 1
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = arms_of(copy, "zh", ["en"])
    assert found and found["sentences"][0].startswith("the arms were evaluated on different text")


def test_arms_that_were_trained_on_more_text_say_so(arms, tmp_path):
    run, _ = arms
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    file = copy / "adapter" / "manifest.json"
    manifest = json.loads(file.read_text())
    before = arms_of(copy, "zh", ["en"])
    assert before and not before["fault"]
    manifest["stats"]["steps"] *= 2
    file.write_text(json.dumps(manifest))
    found = arms_of(copy, "zh", ["en"])
    assert found and found["sentences"][0].startswith("the arms were trained on different text")


def test_a_language_that_fills_no_example_is_left_out(arms, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(arms[0], copy, symlinks=True)
    file = copy / "control_tokens" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["stats"]["sources"]["en"]["row_tokens"] = 0.0
    file.write_text(json.dumps(manifest))
    found = arms_of(copy, "zh", ["en"])
    assert found and list(found["text"]) == ["zh"] == list(found["saved"])


# ---- the run


def test_the_report_the_card_and_the_state(arms, tmp_path):
    run, _ = arms
    assert {row["state"] for row in run_states(run)} == {"up to date"}
    report = json.loads((run / "report.json").read_text())
    assert list(report["bits_per_byte"]) == [
        "base",
        "model",
        "adapter",
        "merged",
        "chat",
        "control",
    ]
    found = report["control"]
    rows = [
        {r["id"]: r for r in load_evaluation(run / "evaluation" / name)["documents"]}
        for name in ("merged", "control")
    ]
    bits = [sum(r["bits"] for r in d.values() if r["lang"] == "zh") for d in rows]
    assert found["text"]["zh"]["change"] == pytest.approx(bits[0] / bits[1] - 1)
    assert found["text"]["zh"]["verdict"] == "too few"  # fifteen documents
    assert "undecided" in found["sentences"][0]
    assert set(found["budgets"]) == {"compute", "time"}
    page = (run / "report.html").read_text()
    assert "Does extension pay?" in page and found["sentences"][0].split("(")[0] in page
    assert cmixtral("card", run, "--model", "merged", "--out", tmp_path / "c.md").returncode == 0
    assert "## With and without new pieces" in (tmp_path / "c.md").read_text()
    samples = [json.loads(line) for line in (run / "samples/samples.jsonl").open()]
    assert "control" in {row["model"] for row in samples}


def test_the_control_is_trained_like_the_other(arms):
    run, _ = arms
    params = [Artifact.load(run / name).params for name in ("adapter", "control_adapter")]
    assert params[0] == params[1]
    steps = [Artifact.load(run / name).stats["steps"] for name in ("adapter", "control_adapter")]
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("tables", "want"),
    [
        (dict(control={}), "[control] has no effect"),
        (dict(init=dict(model="m", tokenizer="t"), control={}), "[control] has no effect"),
        (dict(control=dict(batch=3)), "[control] unknown key 'batch'"),
    ],
)
def test_recipes_that_can_have_no_control(tables, want):
    assert any(fault.startswith(want) for fault in check_recipe(tables, here=False))
    assert check_recipe(dict(read_recipe("tiny"), control={})) == []


# ---- the comparison


def measured(bits, sizes):
    rows = {i: (float(b * n), int(n)) for i, (b, n) in enumerate(zip(bits, sizes, strict=True))}
    return dict(name="x", kind="language", lower_is_better=True, n=len(rows), rows=rows)


@pytest.mark.parametrize("seed", range(3))
def test_an_equal_budget_is_between_the_two_ends(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(100, 900, 60)
    hard = rng.normal(1.8, 0.3, 60)
    control = measured(hard, sizes)
    extended = measured(hard * 1.01 + rng.normal(0, 0.01, 60), sizes)
    curve = [(0.0, 2.4), (0.5, 1.9), (1.0, 1.8)]
    curves = dict(extended=curve, control=curve)
    for share in (0.5, 0.8, 1.0, 1.3):
        found = at_equal(extended, control, Budget(share, 1.0), curves)
        end = change(control, extended)["change"]
        assert found["change"][0] <= end <= found["change"][1]
        assert found["change_low"] <= found["change"][0] <= found["change"][1]
        assert found["change"][1] <= found["change_high"]
    half = at_equal(extended, control, Budget(0.5, 1.0), curves)
    assert half["change"][0] == pytest.approx((1 + end) * 1.8 / 1.9 - 1)
    assert half["verdict"] == "not shown"  # one end below zero, one above


def test_the_ratio_of_speeds_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        speeds = [rng.normal(mean, 0.1 * mean, 6) for mean in (30, 20)]
        a, b = (
            dict(chars_per_second=x.mean(), chars_per_second_std=x.std(), n_texts=6) for x in speeds
        )
        found = speed_ratio(a, b)
        hits += found["low"] <= 1.5 <= found["high"]
    assert hits / 2000 >= 0.94


def test_a_folder_without_a_control_has_no_arms(micro):
    assert arms_of(Path(micro[0]), "zh", ["en"]) is None


def test_a_forecast_finds_the_ratio_of_known_curves():
    "It says 90%; with the same draws for both arms it would hold six of ten"
    read = np.linspace(0, 1e6, 11)
    truth = dict(extended=(1.2, 1.5), control=(1.25, 0.6))  # floor, drop
    held: dict[float, int] = dict.fromkeys((1e6, 3e6, 1e7), 0)
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(0, 0.003, (2, 11))
        extended, control = (
            fit_curves(read, floor + drop / (1 + read / 2e5) + noise[number], 1000, seed=number)
            for number, (floor, drop) in enumerate(truth.values())
        )
        for n_bytes in held:
            a, b = (floor + drop / (1 + n_bytes / 2e5) for floor, drop in truth.values())
            found = forecast(extended, control, n_bytes)
            assert found.low <= found.middle <= found.high
            held[n_bytes] += found.low <= a / b - 1 <= found.high
    assert min(held.values()) >= 32


def test_a_pilot_that_cannot_say_is_refused(arms, tmp_path, cli):
    run, _ = arms
    status, err = cli("plan", "tiny", "--pilot", tmp_path / "none")
    assert status == 2 and len(err) == 2 and "expected a run with [control]" in err[0]
    status, err = cli("plan", "tiny", "--pilot", run)
    assert status == 2 and "was evaluated 3 times, expected at least 5" in err[0]


def test_a_pilot_is_asked_about_a_budget(arms, tmp_path, cli):
    "Of curves whose control stays lower for good, at budgets near and far"
    run = shutil.copytree(arms[0], tmp_path / "pilot", symlinks=True)
    for folder, floor in (("adapter", 1.3), ("control_adapter", 1.0)):
        rows = [dict(step=step, bpb_zh=floor + 1 / (1 + step)) for step in range(7)]
        write_lines(run / folder / "log.jsonl", rows)
        manifest = json.loads((run / folder / "manifest.json").read_text())
        del manifest["checksum"]
        manifest["files"]["log.jsonl"]["bytes"] = (run / folder / "log.jsonl").stat().st_size
        (run / folder / "manifest.json").write_text(json.dumps(manifest))

    def says(*more):
        status, err = cli("plan", "tiny", "--pilot", run, *more)
        assert (status, err) == (0, [])
        (line,) = [x for x in cli.out.splitlines() if x.startswith("by the pilot")]
        return line

    unasked = says()
    assert unasked.endswith("to ask about a budget, add --budget-mb MB")
    read = re.search(r"which read ([\d.]+) MB", unasked)
    assert read
    near = 2 * float(read[1])
    assert f"extension costs at {near:.3g} MB: +" in says("--budget-mb", near)
    assert says("--budget-mb", 5000).endswith("5,000 MB is too far to say more")
