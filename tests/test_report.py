"The page in a real browser, comparisons of any models, the card."

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import watched

from cmixtral_nb import compare
from cmixtral_nb import report as rp
from cmixtral_nb.efficiency import named
from cmixtral_nb.gain import change, changes, load_evaluation, measures, sentence


def opened(browser, path, width, scheme):
    page = watched(browser, width, 844, scheme)
    page.goto(Path(path).resolve().as_uri())
    return page


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_in_a_browser(micro, chromium, width, scheme):
    page = opened(chromium, micro[0] / "report.html", width, scheme)
    assert page.said == [] and len(page.asked) == 1  # the file itself
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    text = page.evaluate("getComputedStyle(document.body).color")
    lightness = lambda c: sum(map(int, re.findall(r"\d+", c)[:3])) / 3
    assert (
        (lightness(ground) > 200 and lightness(text) < 60)
        if scheme == "light"
        else (lightness(ground) < 60 and lightness(text) > 200)
    )
    drawn = page.evaluate(
        "[...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill)"
    )
    assert drawn and {lightness(c) > 128 for c in drawn} == {scheme == "dark"}
    page.close()


def test_tables_sort_and_numbers_lead_to_manifests(micro, chromium):
    page = opened(chromium, micro[0] / "report.html", 1280, "light")
    column = "[...document.querySelectorAll('#stages ~ .wide table')][0]"
    cells = lambda: page.evaluate(
        f"[...{column}.tBodies[0].rows].map(r => Number(r.cells[2].dataset.v))"
    )
    before = cells()
    page.locator("#stages ~ .wide table").first.get_by_role("button", name="seconds").click()
    assert cells() == sorted(before) != before
    page.locator("#stages ~ .wide table").first.get_by_role("button", name="seconds").click()
    assert cells() == sorted(before, reverse=True)
    hrefs = page.evaluate(
        "[...document.querySelectorAll('td a, .tile a')].map(a => a.getAttribute('href'))"
    )
    assert len(hrefs) > 50 and all(
        page.evaluate(f"!!document.querySelector('{h}')") for h in set(hrefs)
    )
    page.locator("#bits-per-byte ~ .wide td a").first.click()
    assert page.evaluate("document.querySelector(location.hash).open")
    page.close()


class Balanced(HTMLParser):
    void = {"meta", "link", "br", "path", "use"}

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        self.open += [tag] * (tag not in self.void)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def test_the_report_says_what_the_manifests_say(micro):
    page, data = (
        (micro[0] / "report.html").read_text(),
        json.loads((micro[0] / "report.json").read_text()),
    )
    b = Balanced()
    b.feed(page)
    assert b.open == [] and not re.search(
        r'(?:src|href)="?(?!#|data:)[^"#>]', page.replace("xlink:href", "")
    )
    for name in data["bits_per_byte"]:
        r = json.loads((micro[0] / "evaluation" / name / "results.json").read_text())["results"][
            "bpb"
        ]["bits_per_byte_zh"]
        assert f">{r:.4f} (" in page and f'"#m-evaluation-{name}"' in page
    for folder, m in data["manifests"].items():
        assert m["fingerprint"] in page and f'id="{rp.anchor(folder)}"' in page
    row = next(r for r in data["changes"] if r["key"] == "zh")
    assert (
        row["models"]["merged"]["paired"]
        and row["models"]["merged"]["change_low"]
        <= row["models"]["merged"]["change"]
        <= row["models"]["merged"]["change_high"]
    )
    assert "characters per second" in page and "temperature" in page


def test_the_card_of_a_run(micro, cli):
    from huggingface_hub import ModelCard

    assert (
        cli("card", micro[0], "--model", "merged", "--name", "org/micro", "--licence", "mit")[0]
        == 0
    )
    c = ModelCard((micro[0] / "cards" / "merged.md").read_text())
    assert (c.data.license, c.data.language, c.data.pipeline_tag) == (
        "mit",
        ["en", "zh"],
        "text-generation",
    )
    want = {
        l: json.loads((micro[0] / "evaluation/merged/results.json").read_text())["results"]["bpb"][
            f"bits_per_byte_{l}"
        ]
        for l in ("zh", "en")
    }
    assert {r.dataset_type: r.metric_value for r in c.data.eval_results} == {
        k: pytest.approx(v, abs=1e-4) for k, v in want.items()
    }
    for part in (
        "CC-BY-SA-3.0",
        "rank 4",
        "on cpu",
        "300 pieces appended",
        "cmixtral evaluate --model ../merged",
        "instruction",
    ):
        assert (part in c.text) == (part != "instruction"), part
    assert (
        "CC0-1.0" not in c.text and cli("card", micro[0])[0] == 0
    )  # the chat model has read conversations as well
    chat = (micro[0] / "cards" / "chat.md").read_text()
    for part in (
        "| conversations, hand-written | CC0-1.0 |",
        "| translations, debian:cataclysm-dda-data | CC-BY-SA-3.0 |",
        "instruction tuning",
    ):
        assert part in chat, part
    shutil.rmtree(micro[0] / "cards")
    status, err = cli("card", micro[0], "--model", "mreged")
    assert (status, err) == (
        2,
        [
            "StageError: unknown model 'mreged', did you mean 'merged'?; expected one of base, model, merged, chat"
        ],
    )


def test_compare_evaluations_and_models(micro, tmp_path, cli, monkeypatch):
    run = micro[0]
    args = ("--out", tmp_path / "out", "--n-chars", "600", "--length", "64", "--device", "cpu")
    assert cli("compare", f"first={run}/base", f"second={run}/merged", *args)[0] == 0
    assert (
        "[" not in cli.out.split("second: ")[1]
        and "Chinese: " in cli.out
        and "bits per byte than first" in cli.out
    )
    got = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [r["key"] for r in got["rows"]][:2] == ["zh", "en"] and got["unlike"] == []
    assert (
        cli("compare", f"first={run}/base", f"second={run}/merged", *args)[0] == 0
        and cli.out.count("is up to date") == 2
    )
    assert (
        cli(
            "compare",
            run / "evaluation/base",
            f"other={tmp_path}/out/evaluation/second",
            "--out",
            tmp_path / "two",
        )[0]
        == 0
    )
    assert (
        "compare: asked differently: n_chars: base 2000, other 600" in cli.out
        and "Asked differently" in (tmp_path / "two" / "compare.html").read_text()
    )


def test_a_favourite_letter_is_no_knowledge():
    "70 of 208 right by always saying C, the share of C in C-Eval: above chance, and yet nothing"
    right = [0] * 40 + [1] * 50 + [2] * 70 + [3] * 48

    def model(chosen):
        qs = [
            dict(task="ceval-valid_law", id=i, hash=str(i), acc=float(c == t), chosen=c, target=t)
            for i, (c, t) in enumerate(zip(chosen, right, strict=True))
        ]
        return dict(results={}, documents=[], questions=qs)

    knows = [t if i % 2 else (t + i) % 4 for i, t in enumerate(right)]
    row = changes(dict(a=model([0] * 208), c=model([2] * 208), k=model(knows)))[0]
    assert (
        row["models"]["c"]["low"] > 0.25 and row["models"]["c"]["change_low"] > 0
    )  # by the numbers alone it would be a gain
    assert [row["models"][n]["verdict"] for n in "ck"] == ["guessing", "gained"]
    assert sentence(row, "c").endswith(": both guess; c gives C to 100% of them") and sentence(
        row, "k"
    ).endswith(": a gain")
    old = dict(
        results={},
        documents=[],
        questions=[
            {k: v for k, v in q.items() if k not in ("chosen", "target")}
            for q in model([2] * 208)["questions"]
        ],
    )
    assert measures(old)["ceval-valid"]["n"] == 208 and "letter" not in measures(old)["ceval-valid"]


@pytest.mark.parametrize(
    "refs, want",
    [
        (["{r}/base"], "1 model to compare, expected two or more"),
        (["{r}/base", "{r}/base"], "two models are called 'base'; give them names, such as base2="),
        (
            ["a={r}/base", "b=nothing/here/now"],
            "does not exist; expected an HF model folder or a hub id",
        ),
        (["a={r}/base", "b={r}/recipe.toml"], "not valid JSON"),
        (["a={r}/base", "b="], "'b=': expected NAME=REF"),
    ],
)
def test_comparisons_that_cannot_be(micro, tmp_path, cli, refs, want):
    status, err = cli("compare", *(r.format(r=micro[0]) for r in refs), "--out", tmp_path / "o")
    assert status == 2 and want in " ".join(err) and len(err) <= 2
    assert not (tmp_path / "o").exists()


def test_nothing_in_common_and_samples_without_models(micro, tmp_path, cli):
    for name, task in dict(a="mmlu", b="cmmlu").items():
        (tmp_path / f"{name}.json").write_text(
            json.dumps(dict(results={task: {"acc,none": 0.5, "acc_stderr,none": 0.1}}))
        )
    status, err = cli("compare", tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path / "o")
    assert status == 2 and "share no measure" in err[0]
    status, err = cli(
        "compare", tmp_path / "a.json", tmp_path / "b.json", "--samples", "--out", tmp_path / "o"
    )
    assert (status, err) == (2, ["StageError: --samples needs models, found evaluations only"])


def test_paired_and_unpaired_exams():
    def run(right, ids=range(400)):
        return dict(
            results={},
            questions=[
                dict(task="mmlu_anatomy", hash=str(i), id=i, acc=float(right(i))) for i in ids
            ],
        )

    a, b = run(lambda i: i % 2), run(lambda i: i % 2 or i % 20 == 0)
    row = {r["key"]: r for r in changes(dict(a=a, b=b))}
    m = row["mmlu"]["models"]["b"]
    assert (m["change"], m["n"], m["paired"], m["verdict"]) == (
        pytest.approx(0.05),
        400,
        True,
        "gained",
    )
    assert row["mmlu/STEM"]["kind"] == "part" and "95% over 400 questions): a gain" in sentence(
        row["mmlu"], "b"
    )
    other = changes(dict(a=a, b=run(lambda i: i % 2 or i % 20 == 0, range(400, 800))))[0]["models"][
        "b"
    ]
    assert not other["paired"] and other["change_high"] - other["change_low"] > 2 * (
        m["change_high"] - m["change_low"]
    )


def test_an_interval_covers_as_often_as_it_says():
    "Of 200 pairs of models that differ by chance alone, about one in twenty is called different"
    import numpy as np

    rng, called = np.random.default_rng(0), 0
    for _ in range(200):
        a = {i: (x, 1) for i, x in enumerate(rng.normal(2, 0.5, 60))}
        shifts = rng.normal(0, 0.1, 60)
        b = {i: (x[0] + d, 1) for (i, x), d in zip(a.items(), shifts, strict=True)}
        c = change(dict(rows=a, lower_is_better=True), dict(rows=b, lower_is_better=True), 400)
        called += not c["low"] <= 0 <= c["high"]
    assert 3 <= called <= 22


def test_lm_evals_own_result_files(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "results_2026-01-01.json").write_text(
        json.dumps(
            dict(
                results={
                    "hellaswag": {
                        "acc,none": 0.4,
                        "acc_norm,none": 0.5,
                        "acc_norm_stderr,none": 0.01,
                    }
                }
            )
        )
    )
    m = measures(load_evaluation(tmp_path))
    assert m["hellaswag"]["value"] == 0.5 and compare._is_evaluation(tmp_path)


def test_efficiency_of_any_tokenizer(micro, tmp_path, cli):
    run = micro[0]
    e = json.loads((run / "efficiency" / "efficiency.json").read_text())
    n = {(r["domain"], r["tokenizer"]): r["n_tokens"] for r in e["tokens"]}
    assert n["en", "base"] == n["en", "merged"] and n["zh", "merged"] < n["zh", "base"]
    assert {(r["tokenizer"], r["form"]) for r in e["speed"]} == {
        (t, f) for t in ("base", "merged") for f in ("fast", "sentencepiece")
    }
    assert all(r["chars_per_second"] > 0 for r in e["writing"].values())
    status, err = cli(
        "efficiency",
        "--tokenizers",
        "x=none.model",
        "--models",
        "y=none",
        "--new-tokens",
        "-1",
        "--out",
        tmp_path / "o",
    )
    assert status == 2 and len(err) == 3 and "no such tokenizer" in err[1]
    assert cli("efficiency", "--out", tmp_path / "o") == (
        2,
        ["StageError: nothing to measure; give --tokenizers NAME=REF or --models NAME=FOLDER"],
    )
    assert set(named(["mixtral", f"ours={run}/tokenizer"])) == {"mixtral", "ours"}
