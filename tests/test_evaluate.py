"Evaluation: broken files, other forms, interruption, and lm-eval's own result"

import gzip
import json
import lzma
import math
import os
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cmixtral_nb import evaluate as ev
from cmixtral_nb import exams
from cmixtral_nb.heldout import heldout_texts
from cmixtral_nb.stages import StageError

pytest.importorskip("lm_eval")
GEO = "ceval-valid_high_school_geography"
HEAD = "id,question,A,B,C,D,answer"
VAL = [
    '0,"中国的首都是____，\n请选择。",上海,北京,广州,成都,B',
    "1,最高的山峰是____。,泰山,黄山,珠穆朗玛峰,华山,C",
    '2,长江流入____。,东海,"黄海,或渤海",南海,渤海,A',
]
DEV = [
    "0,最长的河流是____。,长江,黄河,珠江,淮河,A,解释",
    "1,地球绕____转。,月亮,太阳,火星,木星,B,解释",
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    with zipfile.ZipFile(folder / "ceval.zip", "w") as z:
        z.writestr("val/high_school_geography_val.csv", "\ufeff" + "\n".join([HEAD, *VAL]))
        z.writestr("dev/high_school_geography_dev.csv", "\n".join([HEAD + ",explanation", *DEV]))
    with zipfile.ZipFile(folder / "mmlu.zip", "w") as z:
        for split in ("test", "dev"):
            rows = '"One, two?",1,2,3,4,C\nThree?,a,b,"c, d",e,A\n'
            z.writestr(f"{split}/anatomy_{split}.csv", rows)
    shoes = dict(
        ctx="Shoes: A man sits. he", label=1, endings=["runs.", "ties a shoe.", "sings.", "eats."]
    )
    food = dict(
        ctx="Food: How to cook rice. Wash it. you",
        label=0,
        endings=["Boil it.", "Sell it.", "Paint it.", "Sing it."],
    )
    lines = f"{json.dumps(shoes)}\n{json.dumps(food)}"
    (folder / "hellaswag_val.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import torch
    from transformers import MixtralForCausalLM

    from cmixtral_nb.mixtral import small_config
    from cmixtral_nb.pieces import base_tokenizer_model
    from cmixtral_nb.tokenizer_files import write_tokenizer

    torch.manual_seed(0)
    d = write_tokenizer(base_tokenizer_model("mixtral"), tmp_path_factory.mktemp("model"))
    config = small_config(
        hidden=64, layers=1, intermediate=128, heads=4, positions=1024, aux_loss=0.0
    )
    MixtralForCausalLM(config).save_pretrained(d)
    return d


def faults(*a, **kw):
    with pytest.raises(StageError) as e:
        ev.evaluate(*a, **kw)
    return str(e.value)


def rows_of(data, task, split):
    "Questions of a split whose file is there"
    rows = exams.read_rows(data, task)[split]
    assert rows is not None
    return rows


def test_rows_keep_quotes_and_lines(bench):
    val, dev = rows_of(bench, GEO, "val"), rows_of(bench, GEO, "dev")
    assert val[0]["question"] == "中国的首都是____，\n请选择。"
    assert val[2]["B"] == "黄海,或渤海"
    assert dev[0].keys() == val[0].keys()  # datasets wants the same columns
    assert rows_of(bench, "mmlu_anatomy", "test") == [
        dict(question="One, two?", choices=list("1234"), answer=2),
        dict(question="Three?", choices=["a", "b", "c, d", "e"], answer=0),
    ]


def test_an_unpacked_folder_is_as_good(bench, tmp_path):
    zipfile.ZipFile(bench / "ceval.zip").extractall(tmp_path / "ceval")
    assert exams.read_rows(tmp_path, GEO) == exams.read_rows(bench, GEO)


def test_hellaswag_forms(bench, tmp_path):
    a, b = rows_of(bench, "hellaswag", "validation")
    assert (a["ctx_a"], a["ctx_b"]) == ("A man sits.", "he")
    assert b["ctx_b"] == ""
    (tmp_path / "hellaswag_val.jsonl.gz").write_bytes(gzip.compress(json.dumps(a).encode()))
    (tmp_path / "hellaswag_train.jsonl").write_text(json.dumps(b))
    assert exams.read_rows(tmp_path, "hellaswag") == dict(validation=[a], train=[b])


def test_every_fault_at_once(bench, tmp_path, model):
    text = faults(
        tmp_path / "none",
        tasks="helaswag,cmmlu",
        data=bench,
        shots=-1,
        batch=-1,
        out=tmp_path / "out",
    )
    assert len(text.splitlines()) == 5
    for part in (
        "shots is -1",
        "batch is -1",
        "unknown task 'helaswag', did you mean 'hellaswag'?",
        "cmmlu.zip: no such file",
        "none",
    ):
        assert part in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name,content,want",
    [
        ("ceval.zip", b"not a zip", "cannot be read (BadZipFile"),
        ("hellaswag_val.jsonl", b'{"ctx": "a", ', "cannot be read (ValueError: line 1: Expecting"),
        ("hellaswag_val.jsonl", b'{"ctx": "a"}', "no column endings, label; expected ctx"),
        ("hellaswag_val.jsonl", b"", "has no validation questions"),
        ("hellaswag_val.jsonl.xz", lzma.compress(b"{}")[:-9], "cannot be read"),
    ],
)
def test_broken_benchmarks(name, content, want, tmp_path, model):
    data = tmp_path / "data"
    data.mkdir()
    (data / name).write_bytes(content)
    task = GEO if "ceval" in name else "hellaswag"
    text = faults(model, tasks=task, data=data, out=tmp_path / "out")
    assert want in text
    assert len(text.splitlines()) == 1


def test_other_requests_that_cannot_be(bench, tmp_path, model, monkeypatch):
    assert "give their folder with --data" in faults(model, tasks=GEO, out=tmp_path / "o")
    assert "no such folder" in faults(model, tasks=GEO, data=tmp_path / "no", out=tmp_path / "o")
    assert "has no adapter_config.json" in faults(model, adapter=bench, out=tmp_path / "o")
    assert "1 other" not in faults(model, tasks="mmlu_virology", data=bench, out=tmp_path / "o")
    assert "is not a corpus" in faults(model, corpus=bench, out=tmp_path / "o")
    monkeypatch.setattr(exams, "task_files", dict)
    assert "pip install 'cmixtral_nb[eval]'" in faults(
        model, tasks="mmlu", data=bench, out=tmp_path / "o"
    )


def test_the_four_benchmarks_have_all_their_tasks():
    files = exams.task_files()

    def n_tasks(name):
        return len(set(exams.leaves(name, files)))

    assert n_tasks("ceval-valid") == 52
    assert n_tasks("cmmlu") == 67
    assert n_tasks("mmlu") == 57
    assert n_tasks("hellaswag") == 1
    outermost = exams._outermost(["mmlu", "mmlu_anatomy", "mmlu_stem", "hellaswag"])
    assert outermost == ["mmlu", "hellaswag"]


def test_equals_lm_eval_on_a_task_written_by_hand(bench, tmp_path, model):
    "Another YAML, another file format, another model class, loaded by lm-eval itself"
    import yaml
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    files = {}
    for split in exams.read_rows(bench, GEO):
        file = tmp_path / f"{split}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows_of(bench, GEO, split)))
        files[split] = str(file)
    task = dict(
        include=str(exams.task_files()[GEO]),
        task="theirs",
        dataset_path="json",
        dataset_name=None,
        dataset_kwargs=dict(data_files=files, cache_dir=str(tmp_path / "cache")),
    )
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(task))
    theirs = simple_evaluate(
        model="hf",
        model_args=dict(pretrained=str(model), dtype="float32"),
        device="cpu",
        tasks=["theirs"],
        num_fewshot=2,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    lm, tok = ev.load_model(model, device="cpu"), ev.load_tokenizer(model)
    ours = exams.run_lm_eval(lm, tok, [GEO], bench, shots=2, samples=True)
    our_samples, their_samples = ours["samples"][GEO], theirs["samples"]["theirs"]
    assert likelihoods(our_samples) == pytest.approx(likelihoods(their_samples), abs=1e-4)
    assert ours["results"][GEO]["acc,none"] == theirs["results"]["theirs"]["acc,none"]
    assert [s["arguments"] for s in our_samples] == [s["arguments"] for s in their_samples]


def likelihoods(samples):
    "Of each answer to each question"
    return [response[0][0] for sample in samples for response in sample["resps"]]


def test_hellaswag_prompt_is_the_published_one(bench, model):
    r = exams.run_lm_eval(
        ev.load_model(model, device="cpu"),
        ev.load_tokenizer(model),
        ["hellaswag"],
        bench,
        samples=True,
    )
    first = [s["arguments"] for s in r["samples"]["hellaswag"]][0]
    assert "Shoes: A man sits. He" in str(first)
    assert "ties a shoe." in str(first)


def zipped(folder, name, files):
    with zipfile.ZipFile(folder / name, "w") as z:
        for member, text in files.items():
            z.writestr(member, text)


@pytest.mark.parametrize(
    "val,want",
    [
        (
            "id,question,A,B,C,D\n0,q,1,2,3,4",
            "no column answer; expected question, A, B, C, D, answer",
        ),
        (HEAD + "\n0,q,1,2,3", "row 1 has 5 columns, expected 7"),
        (
            HEAD + "\n0,q,1,2,3,4,B\n1,q,1,2,3,4,E",
            "row 2 has the answer 'E', expected A, B, C or D",
        ),
        (HEAD, "has no val questions"),
    ],
)
def test_a_broken_table_names_its_column_or_row(val, want, tmp_path, model):
    data = tmp_path / "data"
    data.mkdir()
    zipped(
        data,
        "ceval.zip",
        {
            "val/high_school_geography_val.csv": val,
            "dev/high_school_geography_dev.csv": "\n".join([HEAD, *DEV]),
        },
    )
    text = faults(model, tasks=GEO, data=data, out=tmp_path / "out")
    assert want in text
    assert len(text.splitlines()) == 1


def test_more_shots_than_examples_and_no_template(bench, tmp_path, model):
    assert "has 2 solved examples for 3 shots" in faults(
        model, tasks=GEO, data=bench, shots=3, out=tmp_path / "o"
    )
    assert "has no chat template; leave out --chat" in faults(
        model, tasks=GEO, data=bench, chat=True, out=tmp_path / "o"
    )
    assert "dtype is 'int4', expected auto, float32" in faults(
        model, dtype="int4", out=tmp_path / "o"
    )
    assert "length is 1, expected 2 to" in faults(model, length=1, out=tmp_path / "o")


@pytest.mark.parametrize(
    "flags, dtype", [({"avx2"}, "float32"), ({"avx2", "avx512_bf16"}, "bfloat16")]
)
def test_native_is_what_the_processor_multiplies(flags, dtype, tmp_path, model, monkeypatch):
    "The manifest and the results say which type it was; the bits are nearly the same"
    monkeypatch.setattr("cmixtral_nb.machine._processor_flags", lambda: flags)
    how = dict(n_chars=400, length=64, device="cpu")
    native = ev.evaluate(model, out=tmp_path / "native", dtype="native", **how)
    named = ev.evaluate(model, out=tmp_path / "named", dtype=dtype, **how)
    config = json.loads((tmp_path / "native" / "results.json").read_text())["config"]
    assert (native.stats["dtype"], config["dtype"], native.params["dtype"]) == (
        dtype,
        dtype,
        "native",
    )
    assert native.stats["results"] == named.stats["results"]


def copy_of(model, folder, **config):
    shutil.copytree(model, folder)
    stock = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stock, **config}))
    return folder


def test_model_and_tokenizer_of_different_sizes(tmp_path, model):
    small = copy_of(model, tmp_path / "small", vocab_size=31000)
    said = "model.embed_tokens.weight is 32,000 x 64, the configuration says 31,000 x 64"
    assert said in faults(small, out=tmp_path / "o")
    tensors = load_file(small / "model.safetensors")
    tensors |= {name: t[:31000].clone() for name, t in tensors.items() if len(t) == 32000}
    save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    (small / "manifest.json").unlink(missing_ok=True)
    text = faults(small, out=tmp_path / "o")
    assert "has a tokenizer of 32,000 tokens" in text
    assert "a model of 31,000 rows; take the tokenizer" in text
    assert len(text.splitlines()) == 1
    (tmp_path / "small" / "tokenizer.json").unlink()
    assert "has no tokenizer.json; run: cmixtral vocab" in faults(small, out=tmp_path / "o")


def test_text_to_measure_on(tmp_path, model):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "is empty, expected held-out text" in faults(
        model, domains=[f"zh/empty={tmp_path}/empty.txt"], out=tmp_path / "o"
    )
    assert "expected LANG/NAME=REF" in faults(model, domains=["news=a.txt"], out=tmp_path / "o")
    assert "no such file" in faults(model, domains=["zh/news=a.txt"], out=tmp_path / "o")
    (tmp_path / "c").mkdir()
    for lang, text in dict(zh="", en='{"text": "a"}\n').items():
        for split in "train", "valid":
            (tmp_path / "c" / f"{lang}.{split}.jsonl").write_text(text)
    (tmp_path / "c" / "manifest.json").write_text(
        json.dumps(dict(kind="corpus", files={}, fingerprint="x"))
    )
    assert (
        "has no held-out zh text; run: cmixtral corpus --sources en=REF zh=REF --valid-share"
        in faults(model, corpus=tmp_path / "c", out=tmp_path / "o")
    )


class Count:
    "Forward passes so far; the next one after `stop` is a Ctrl-C"

    n = 0
    stop: int | None = None

    def watch(self, model):
        forward = model.forward

        def counted_forward(*args, **kw):
            if self.n == self.stop:
                raise KeyboardInterrupt
            self.n += 1
            return forward(*args, **kw)

        model.forward = counted_forward
        return model


@pytest.fixture
def counted(monkeypatch):
    "Counts the forward passes of every model that is loaded from now on"
    count, load = Count(), ev.load_model
    monkeypatch.setattr(ev, "load_model", lambda *args, **kw: count.watch(load(*args, **kw)))
    return count


def test_questions_longer_than_the_context(bench, tmp_path, model, counted, capsys):
    short = copy_of(model, tmp_path / "short", max_position_embeddings=70)
    text = faults(short, tasks=GEO, data=bench, out=tmp_path / "o", device="cpu")
    said = "3 questions with their answers are longer than the context of the model; leave the task"
    assert said in text
    assert counted.n == 0  # lm-eval hands all requests over at once: nothing is asked in vain
    assert not (tmp_path / "o").exists()
    ev.evaluate(short, tasks=GEO, data=bench, shots=2, out=tmp_path / "o", device="cpu")
    assert (
        "3 prompts are longer than the context of the model: lm-eval cuts off their beginning"
        in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "o" / "results.json").read_text())["n_long"] == 3
    tiny = copy_of(model, tmp_path / "tiny", max_position_embeddings=2)
    assert "an answer of 4 tokens" in faults(
        tiny, tasks="hellaswag", data=bench, out=tmp_path / "o2", device="cpu"
    )


@pytest.mark.parametrize("tasks", ["bpb", GEO])
def test_a_model_that_gives_nan_has_no_evaluation(bench, tmp_path, model, tasks):
    broken = copy_of(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"][5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    said = faults(broken, tasks=tasks, data=bench, n_chars=300, out=tmp_path / "o", device="cpu")
    assert "the model gives NaN or infinity in float32" in said
    assert not (tmp_path / "o").exists()


def test_interrupted_and_restarted_asks_nothing_twice(bench, tmp_path, model, counted):
    args = dict(
        tasks=[GEO, "mmlu_anatomy", "hellaswag", "bpb"],
        data=bench,
        shots=1,
        batch=2,
        length=64,
        n_chars=1500,
        samples=True,
        device="cpu",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    kept = tmp_path / "parts.tmp" / "answers.jsonl"
    ev.evaluate(model, out=whole, **args)
    n_whole = counted.n
    counted.n = 0
    for stop in (1, n_whole - 4, n_whole - 2):  # in the bits per byte, in the exams
        counted.stop = stop
        with pytest.raises(KeyboardInterrupt):
            ev.evaluate(model, out=parts, **args)
        with open(kept, "a") as file:
            file.write('["cut o')  # what a kill can leave
    counted.stop = None
    ev.evaluate(model, out=parts, **args)
    n_redone = counted.n - n_whole  # of bits per byte: the domain that was begun
    assert 0 <= n_redone <= 1
    for f in "results.json", "tables.md", "questions.jsonl", "documents.jsonl", "samples.jsonl":
        assert (parts / f).read_bytes() == (whole / f).read_bytes(), f
    assert not (parts / "answers.jsonl").exists()


@pytest.mark.parametrize("left,n", [('["a", 1]\n["b", [2, true]]\n["c', 2), ('["a', 0), ("", 0)])
def test_a_line_that_was_cut_off_is_dropped(left, n, tmp_path):
    (tmp_path / "a.jsonl").write_text(left)
    a = exams.Answers(tmp_path / "a.jsonl")
    assert len(a.known) == n
    assert a.n_asked == 0
    a.add(["q"], 3)
    a.flush()
    a.add(["r"], 4)  # the second never reached the file
    again = exams.Answers(tmp_path / "a.jsonl")
    assert len(again.known) == n + 1
    assert again[["q"]] == 3
    assert ["r"] not in again


def test_answers_of_the_harness_are_never_asked_twice(bench, model, counted):
    lm, tok = ev.load_model(model, device="cpu"), ev.load_tokenizer(model)

    def ask(answers):
        tasks = [GEO, "hellaswag"]
        return exams.run_lm_eval(lm, tok, tasks, bench, batch=1, samples=True, answers=answers)

    all_answers = exams.Answers()
    whole = ask(all_answers)
    n_forwards, n_asked = counted.n, all_answers.n_asked
    half = exams.Answers()
    half.known = dict(list(all_answers.known.items())[: n_asked // 2])
    counted.n = 0
    assert ask(half) == whole
    assert half.n_asked == n_asked - n_asked // 2
    assert 0 < counted.n < n_forwards


def test_the_command_in_the_results_repeats_them(bench, tmp_path, model, cli, monkeypatch):
    a = ev.evaluate(
        model, tasks=[GEO, "bpb"], data=bench, shots=1, length=64, n_chars=500, out=tmp_path / "a"
    )
    r = json.loads((a / "results.json").read_text())
    assert r["packages"]["lm_eval"]
    assert r["config"]["shots"] == 1
    assert r["versions"][GEO]
    monkeypatch.chdir(tmp_path)
    assert cli(*shlex.split(r["command"])[1:])[0] == 0
    assert (tmp_path / "again" / "results.json").read_text() == (a / "results.json").read_text()


def test_the_table_says_what_lm_eval_says(bench, tmp_path, model):
    a = ev.evaluate(model, tasks=[GEO, "hellaswag"], data=bench, out=tmp_path / "a")
    r = json.loads((a / "results.json").read_text())
    value = {(row["part"], row["metric"]): row["value"] for row in r["table"]}
    accuracy = r["results"][GEO]["acc,none"]
    assert value["high_school_geography", "acc"] == accuracy
    assert value["mean of subjects", "acc"] == accuracy
    assert value["all questions", "acc_norm"] == r["results"]["hellaswag"]["acc_norm,none"]


def test_the_letters_are_those_of_the_likelihoods(bench, tmp_path, model, capsys):
    "Letters as in C-Eval, numbers as in MMLU; HellaSwag has none"
    tasks = [GEO, "mmlu_anatomy", "hellaswag"]
    a = ev.evaluate(model, tasks=tasks, data=bench, samples=True, out=tmp_path / "a")
    said = capsys.readouterr().out
    questions, samples = read_lines(a / "questions.jsonl"), read_lines(a / "samples.jsonl")
    for q, sample in zip(questions, samples, strict=True):
        assert (q["task"], q["id"]) == (sample["task"], sample["doc_id"])
        assert q["acc"] == (q["chosen"] == q["target"])
    assert {q["target"] for q in questions if q["task"] == GEO} == {0, 1, 2}
    assert [q["target"] for q in questions if "mmlu" in q["task"]] == [2, 0]
    letters = json.loads((a / "results.json").read_text())["letters"]
    assert letters == exams.letters(questions)
    assert set(letters) == {"ceval-valid", "mmlu"}
    tables = (a / "tables.md").read_text()
    for family, most in letters.items():
        says = f"{family}: {most['letter']} is the answer"
        assert f"{says} to {most['share']:.0%} of {most['n']} questions" in tables
        assert (says in said) == (most["share"] >= 0.9)


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def reference_bits(model, tok, text, length):
    "Bits of a text in a few lines: one token at a time, half a window of context at least"
    import torch

    ids = [tok.bos_token_id, *tok(text, add_special_tokens=False)["input_ids"]]
    last = len(ids) - 1
    bits = 0.0
    start, end = 0, min(length, last)
    for i in range(1, len(ids)):
        if i > end:
            end = min(end + length // 2, last)
            start = end - length
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:i]])).logits[0, -1].double()
        nats = logits.exp().sum().log() - logits[ids[i]]
        bits += nats.item() / math.log(2)
    return bits


def test_bits_per_byte_equals_a_reference_for_any_batch(model):
    from cmixtral_nb.bits import bits_per_byte

    lm, tok = ev.load_model(model, device="cpu"), ev.load_tokenizer(model)
    texts = heldout_texts("zh", n_chars=400) + heldout_texts("en", n_chars=400)
    docs = [*(text[:120] for text in texts), "x", "汉"]
    n_bytes = sum(len(doc.encode()) for doc in docs)
    want = pytest.approx(sum(reference_bits(lm, tok, doc, 16) for doc in docs) / n_bytes, rel=1e-6)
    for batch in 1, 3, 8:
        assert bits_per_byte(lm, tok, docs, 16, batch, stride=8)["bits_per_byte"] == want
    n_bits = 0.0
    for part in (docs[:2], docs[2:5], docs[5:]):
        got = bits_per_byte(lm, tok, part, 16, 8, 8)
        n_bits += got["bits_per_byte"] * got["n_bytes"]
    assert n_bits / n_bytes == want


def test_a_uniform_model_pays_the_log_of_its_vocabulary_for_each_token(model):
    from cmixtral_nb.bits import bits_per_byte

    lm, tok = ev.load_model(model, device="cpu"), ev.load_tokenizer(model)
    lm.lm_head.weight.data.zero_()
    r = bits_per_byte(lm, tok, ["一二三 and four", "five"], 8, 2, 4)
    assert r["bits_per_byte"] == pytest.approx(
        math.log2(32000) * r["n_tokens"] / r["n_bytes"], rel=1e-6
    )
    with pytest.raises(StageError, match="the tokenizer gives the id .*, the model has 300 rows"):
        lm.config.vocab_size = 300
        bits_per_byte(lm, tok, ["汉字"])


def test_windows_roll_as_in_lm_eval():
    from hypothesis import given
    from hypothesis import strategies as st
    from lm_eval.utils import get_rolling_token_windows

    from cmixtral_nb.bits import windows

    @given(st.lists(st.integers(3, 99), max_size=60), st.integers(1, 20), st.data())
    def check(ids, length, data):
        stride = data.draw(st.integers(1, length))
        assert windows(ids, length, 1, stride) == list(
            get_rolling_token_windows(ids, 1, length, length - stride + 1)
        )

    check()


@pytest.mark.skipif("CMIXTRAL_DATA" not in os.environ, reason="CMIXTRAL_DATA is not set")
def test_the_real_files():
    data, files = Path(os.environ.get("CMIXTRAL_DATA", ".")) / "eval", exams.task_files()

    def n_rows(name, split):
        return sum(len(rows_of(data, task, split)) for task in exams.leaves(name, files))

    assert n_rows("ceval-valid", "val") == 1346
    assert n_rows("cmmlu", "test") == 11582
    assert n_rows("mmlu", "test") == 14042
    assert n_rows("mmlu", "dev") == 285
    rows = rows_of(data, "hellaswag", "validation")
    assert len(rows) == 10042
    assert sum(row["ctx_b"] != "" for row in rows) == 3235
    assert not exams.task_faults(["ceval-valid", "cmmlu", "mmlu", "hellaswag"], data)
