"The page in a real browser, comparisons of any models, the card."

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import watched

from cmixtral_nb.compare import is_evaluation
from cmixtral_nb.efficiency import named
from cmixtral_nb.gain import change, changes, sentence
from cmixtral_nb.report import anchor
from cmixtral_nb.results import load_evaluation, measures


def read_json(path):
    return json.loads(Path(path).read_text())


def opened(browser, path, width, scheme):
    page = watched(browser, width, 844, scheme)
    page.goto(Path(path).resolve().as_uri())
    return page


def lightness(color):
    "0 to 255, of a colour as a browser names it: rgb(23, 24, 26)"
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_in_a_browser(micro, chromium, width, scheme):
    page = opened(chromium, micro[0] / "report.html", width, scheme)
    assert page.said == [] and len(page.asked) == 1  # the file itself
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    text = page.evaluate("getComputedStyle(document.body).color")
    bright, dark = (ground, text) if scheme == "light" else (text, ground)
    assert lightness(bright) > 200 and lightness(dark) < 60
    drawn = page.evaluate(
        "[...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill)"
    )
    assert drawn and {lightness(color) > 128 for color in drawn} == {scheme == "dark"}
    page.close()


def test_tables_sort_and_numbers_lead_to_manifests(micro, chromium):
    page = opened(chromium, micro[0] / "report.html", 1280, "light")
    stages = page.locator("#stages ~ .wide table").first
    seconds = stages.get_by_role("button", name="seconds")

    def column():
        "The numbers of the third column, from top to bottom"
        return stages.evaluate("t => [...t.tBodies[0].rows].map(r => Number(r.cells[2].dataset.v))")

    before = column()
    seconds.click()
    assert column() == sorted(before) != before
    seconds.click()
    assert column() == sorted(before, reverse=True)
    hrefs = page.evaluate(
        "[...document.querySelectorAll('td a, .tile a')].map(a => a.getAttribute('href'))"
    )
    assert len(hrefs) > 50
    for href in set(hrefs):
        assert page.evaluate(f"!!document.querySelector('{href}')"), href
    page.locator("#bits-per-byte ~ .wide td a").first.click()
    assert page.evaluate("document.querySelector(location.hash).open")
    page.close()


class Balanced(HTMLParser):
    "Every element is closed, in order"

    void = {"meta", "link", "br", "img", "path", "use"}

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


def assert_balanced(page):
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []


def test_the_report_says_what_the_manifests_say(micro):
    run = micro[0]
    page, data = (run / "report.html").read_text(), read_json(run / "report.json")
    assert_balanced(page)
    assert not re.search(r'(?:src|href)="?(?!#|data:)[^"#>]', page.replace("xlink:href", ""))
    for name in data["bits_per_byte"]:
        results = read_json(run / "evaluation" / name / "results.json")["results"]
        assert f">{results['bpb']['bits_per_byte_zh']:.4f} (" in page
        assert f'"#m-evaluation-{name}"' in page
    for folder, manifest in data["manifests"].items():
        assert manifest["fingerprint"] in page and f'id="{anchor(folder)}"' in page
    row = next(row for row in data["changes"] if row["key"] == "zh")
    merged = row["models"]["merged"]
    assert merged["paired"]
    assert merged["change_low"] <= merged["change"] <= merged["change_high"]
    assert "characters per second" in page and "temperature" in page


def test_the_card_of_a_run(micro, cli):
    from huggingface_hub import ModelCard

    run = micro[0]
    args = ("--model", "merged", "--name", "org/micro", "--licence", "mit")
    assert cli("card", run, *args)[0] == 0
    card = ModelCard((run / "cards" / "merged.md").read_text())
    head = card.data
    assert (head.license, head.language) == ("mit", ["en", "zh"])
    assert head.pipeline_tag == "text-generation"
    bits = read_json(run / "evaluation/merged/results.json")["results"]["bpb"]
    want = {lang: pytest.approx(bits[f"bits_per_byte_{lang}"], abs=1e-4) for lang in ("zh", "en")}
    assert {result.dataset_type: result.metric_value for result in head.eval_results} == want
    for part in (
        "CC-BY-SA-3.0",
        "rank 4",
        "on cpu",
        "300 pieces appended",
        "cmixtral evaluate --model ../merged",
    ):
        assert part in card.text, part
    for part in ("instruction", "CC0-1.0"):  # this model has read no conversations
        assert part not in card.text, part


def test_the_card_of_a_chat_model_and_of_none(micro, cli):
    run = micro[0]
    assert cli("card", run)[0] == 0
    chat = (run / "cards" / "chat.md").read_text()
    for part in (
        "| conversations, hand-written | CC0-1.0 |",
        "| translations, debian:cataclysm-dda-data | CC-BY-SA-3.0 |",
        "instruction tuning",
    ):
        assert part in chat, part
    shutil.rmtree(run / "cards")
    status, err = cli("card", run, "--model", "mreged")
    expected = "expected one of base, model, merged, chat"
    assert status == 2
    assert err == [f"StageError: unknown model 'mreged', did you mean 'merged'?; {expected}"]


def test_compare_evaluations_and_models(micro, tmp_path, cli):
    run, out = micro[0], tmp_path / "out"
    args = ("--out", out, "--n-chars", "600", "--length", "64", "--device", "cpu")
    models = (f"first={run}/base", f"second={run}/merged")
    assert cli("compare", *models, *args)[0] == 0
    assert "[" not in cli.out.split("second: ")[1]
    assert "Chinese: " in cli.out and "bits per byte than first" in cli.out
    found = read_json(out / "compare.json")
    assert [row["key"] for row in found["rows"]][:2] == ["zh", "en"] and found["unlike"] == []
    assert_balanced((out / "compare.html").read_text())

    assert cli("compare", *models, *args)[0] == 0
    assert cli.out.count("is up to date") == 2

    other = f"other={out}/evaluation/second"
    assert cli("compare", run / "evaluation/base", other, "--out", tmp_path / "two")[0] == 0
    assert "compare: asked differently: n_chars: base 2000, other 600" in cli.out
    page = (tmp_path / "two" / "compare.html").read_text()
    assert "Asked differently" in page
    assert_balanced(page)


def test_a_favourite_letter_is_no_knowledge():
    "70 of 208 right by always saying C, the share of C in C-Eval: above chance, and yet nothing"
    right = [0] * 40 + [1] * 50 + [2] * 70 + [3] * 48

    def model(chosen):
        questions = [
            dict(task="ceval-valid_law", id=i, hash=str(i), acc=float(c == t), chosen=c, target=t)
            for i, (c, t) in enumerate(zip(chosen, right, strict=True))
        ]
        return dict(results={}, documents=[], questions=questions)

    knows = [t if i % 2 else (t + i) % 4 for i, t in enumerate(right)]
    row = changes(dict(a=model([0] * 208), c=model([2] * 208), k=model(knows)))[0]
    always_c = row["models"]["c"]  # by the numbers alone it would be a gain
    assert always_c["low"] > 0.25 and always_c["change_low"] > 0
    assert [row["models"][name]["verdict"] for name in "ck"] == ["guessing", "gained"]
    assert sentence(row, "c").endswith(": both guess; c gives C to 100% of them")
    assert sentence(row, "k").endswith(": a gain")

    old = model([2] * 208)  # an evaluation without the letters
    for question in old["questions"]:
        del question["chosen"], question["target"]
    exam = measures(old)["ceval-valid"]
    assert exam["n"] == 208 and "letter" not in exam


@pytest.mark.parametrize(
    "refs, want",
    [
        (["{r}/base"], "1 model to compare, expected two or more"),
        (
            ["{r}/base", "{r}/base"],
            "two models are called 'base'; give them other names, such as base2=",
        ),
        (
            ["a={r}/base", "b=nothing/here/now"],
            "does not exist; expected an HF model folder or a hub id",
        ),
        (["a={r}/base", "b={r}/recipe.toml"], "not valid JSON"),
        (["a={r}/base", "b="], "model 'b=', expected NAME=REF"),
    ],
)
def test_comparisons_that_cannot_be(micro, tmp_path, cli, refs, want):
    status, err = cli("compare", *(r.format(r=micro[0]) for r in refs), "--out", tmp_path / "o")
    assert status == 2 and want in " ".join(err) and len(err) <= 2
    assert not (tmp_path / "o").exists()


def test_nothing_in_common_and_samples_without_models(micro, tmp_path, cli):
    for name, task in dict(a="mmlu", b="cmmlu").items():
        results = {task: {"acc,none": 0.5, "acc_stderr,none": 0.1}}
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(results=results)))
    args = ("compare", tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path / "o")
    status, err = cli(*args)
    assert status == 2 and "share no measure" in err[0]
    status, err = cli(*args, "--samples")
    assert (status, err) == (2, ["StageError: --samples needs models, found evaluations only"])


def test_paired_and_unpaired_exams():
    def model(is_right, ids=range(400)):
        questions = [
            dict(task="mmlu_anatomy", hash=str(i), id=i, acc=float(is_right(i))) for i in ids
        ]
        return dict(results={}, questions=questions)

    def half(i):
        return i % 2 == 1

    def more(i):
        return i % 2 == 1 or i % 20 == 0

    rows = {row["key"]: row for row in changes(dict(a=model(half), b=model(more)))}
    paired = rows["mmlu"]["models"]["b"]
    assert paired["change"] == pytest.approx(0.05)
    assert (paired["n"], paired["paired"], paired["verdict"]) == (400, True, "gained")
    assert rows["mmlu/STEM"]["kind"] == "part"
    assert "95% over 400 questions): a gain" in sentence(rows["mmlu"], "b")

    others = changes(dict(a=model(half), b=model(more, range(400, 800))))[0]["models"]["b"]
    assert not others["paired"]
    wide, narrow = (m["change_high"] - m["change_low"] for m in (others, paired))
    assert wide > 2 * narrow


def test_an_interval_covers_as_often_as_it_says():
    "Of 200 pairs of models that differ by chance alone, about one in twenty is called different"
    import numpy as np

    rng, called = np.random.default_rng(0), 0
    for _ in range(200):
        before = {i: (bits, 1) for i, bits in enumerate(rng.normal(2, 0.5, 60))}
        shifts = rng.normal(0, 0.1, 60)
        after = {i: (bits + shifts[i], n) for i, (bits, n) in before.items()}
        first, second = (dict(rows=rows, lower_is_better=True) for rows in (before, after))
        found = change(first, second, 400)
        called += not found["low"] <= 0 <= found["high"]
    assert 3 <= called <= 22


def test_lm_evals_own_result_files(tmp_path):
    scores = {"acc,none": 0.4, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.01}
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "results_2026-01-01.json"
    file.write_text(json.dumps(dict(results=dict(hellaswag=scores))))
    assert measures(load_evaluation(tmp_path))["hellaswag"]["value"] == 0.5
    assert is_evaluation(tmp_path)


def test_efficiency_of_any_tokenizer(micro, tmp_path, cli):
    run, out = micro[0], tmp_path / "o"
    found = read_json(run / "efficiency" / "efficiency.json")
    n = {(row["domain"], row["tokenizer"]): row["n_tokens"] for row in found["tokens"]}
    assert n["en", "base"] == n["en", "merged"] and n["zh", "merged"] < n["zh", "base"]
    assert {(row["tokenizer"], row["form"]) for row in found["speed"]} == {
        (name, form) for name in ("base", "merged") for form in ("fast", "sentencepiece")
    }
    assert all(speed["chars_per_second"] > 0 for speed in found["writing"].values())

    wrong = ("--tokenizers", "x=none.model", "--models", "y=none", "--new-tokens", "-1")
    status, err = cli("efficiency", *wrong, "--out", out)
    assert status == 2 and len(err) == 3 and "no such tokenizer" in err[1]
    status, err = cli("efficiency", "--out", out)
    hint = "give --tokenizers NAME=REF or --models NAME=FOLDER"
    assert (status, err) == (2, [f"StageError: nothing to measure; {hint}"])
    assert set(named(["mixtral", f"ours={run}/tokenizer"])) == {"mixtral", "ours"}
