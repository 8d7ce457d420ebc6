"""By hand: training killed at random steps and resumed, and several processes against one.

    python tests/bench_resume.py kill WORK [N]   # N kills (5) with one process and with two
    python tests/bench_resume.py processes WORK  # losses of two gloo processes, and with ZeRO-2

What is compared after a kill: weights, optimiser, order of the examples.
"""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

STEPS = 20
ARGS = dict(
    rank=4,
    alpha=8,
    steps=STEPS,
    lr=1e-3,
    warmup=0.1,
    eval_every=10,
    save_every=4,
    log_every=1,
    eval_chars=100,
    device="cpu",
)


def worker(args, out, order):
    "`pretrain` in one process of a run; notes what it reads, and dies in the step KILL_AT"
    from transformers import Trainer

    from cmixtral_nb.machine import process_rank, world_size
    from cmixtral_nb.pretrain import pretrain
    from cmixtral_nb.training import Numbered

    kill_at = int(os.environ.get("KILL_AT", 0))
    collate = Numbered.collate
    rmtree = shutil.rmtree
    training_step = Trainer.training_step

    def recorded(self, make_batch):
        inner = collate(self, make_batch)

        def record(pairs):
            with open(f"{order}.{process_rank()}", "a") as file:
                print([i for i, _ in pairs], file=file)
            return inner(pairs)

        return record

    def keep(path, *args, **kw):  # the last checkpoint stays, to be compared
        if os.path.basename(path) != "checkpoints":
            rmtree(path, *args, **kw)

    def dying(self, *args, **kw):
        is_last = process_rank() == world_size() - 1
        if kill_at and self.state.global_step == kill_at and is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, *args, **kw)

    with (
        patch.object(Numbered, "collate", recorded),
        patch.object(shutil, "rmtree", keep),
        patch.object(Trainer, "training_step", dying),
    ):
        pretrain(out=out, **json.loads(args))


def make(work):
    import torch
    from transformers import MixtralForCausalLM

    from cmixtral_nb.mixtral import small_config
    from cmixtral_nb.pack import pack
    from cmixtral_nb.pieces import base_tokenizer_model
    from cmixtral_nb.tokenizer_files import write_tokenizer

    torch.manual_seed(0)
    MixtralForCausalLM(small_config(hidden=32, layers=1, intermediate=64, heads=2)).save_pretrained(
        work / "model"
    )
    write_tokenizer(base_tokenizer_model("mixtral"), work / "model")
    (work / "zh.jsonl").write_text(
        "\n".join(json.dumps({"text": f"第{i}篇，词表扩充。" * 3}) for i in range(400))
    )
    pack(
        work / "zh.jsonl", work / "model", work / "tokens", mix=["zh"], length=32, valid_share=0.05
    )


def train(work, out, processes=1, kill_at=0, **kw):
    "Exit status of a training run, in one process or in several of torchrun"
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(processes)]
    args = json.dumps(dict(ARGS, model=str(work / "model"), tokens=str(work / "tokens"), **kw))
    env = dict(
        os.environ,
        OMP_NUM_THREADS="1",
        KILL_AT=str(kill_at),
        ACCELERATE_USE_CPU="true",
        HF_HUB_OFFLINE="1",
    )
    p = subprocess.run(
        [*start, __file__, "worker", args, str(work / out), str(work / f"{out}.order")],
        env=env,
        capture_output=True,
        text=True,
    )
    if not kill_at and p.returncode:
        sys.exit(p.stderr[-3000:])
    return p.returncode


def state(work, out, processes):
    "Adapter, optimiser and the examples that each process read in the steps that counted"
    import torch
    from safetensors.torch import load_file

    last = work / out / "checkpoints" / f"checkpoint-{STEPS}"
    orders = [(work / f"{out}.order.{r}").read_text().splitlines() for r in range(processes)]
    return (
        load_file(work / out / "adapter_model.safetensors"),
        torch.load(last / "optimizer.pt", weights_only=True)["state"],
        orders,
    )


def last_checkpoint(folder):
    "Step of the last complete checkpoint, 0 where there is none"
    found = [p for p in folder.glob("checkpoint-*") if (p / "complete").exists()]
    return max((int(p.name.split("-")[1]) for p in found), default=0)


def require_same(killed, whole, n_steps):
    "The same weights, optimiser, and order of the examples in the last steps"
    import torch

    weights, moments, orders = whole
    w, m, o = killed
    assert w.keys() == weights.keys() and all(torch.equal(w[k], weights[k]) for k in weights)
    for k in moments:
        for x in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(m[k][x], moments[k][x])
    assert [x[-n_steps:] for x in o] == [x[-n_steps:] for x in orders], "another order"


def kill(work, n=5, seed=0):
    rng = random.Random(seed)
    for processes in (1, 2):
        undisturbed, batch = f"whole{processes}", 4 // processes
        train(work, undisturbed, processes, batch=batch)
        whole = state(work, undisturbed, processes)
        for i in range(n):
            at, out = rng.randrange(1, STEPS), f"killed{processes}-{i}"
            assert train(work, out, processes, at, batch=batch) not in (0, 2)
            first = last_checkpoint(work / f"{out}.tmp/checkpoints")
            for r in range(processes):
                (work / f"{out}.order.{r}").unlink()
            train(work, out, processes, batch=batch)
            require_same(state(work, out, processes), whole, STEPS - first)
            log, whole_log = (work / run / "log.jsonl" for run in (out, undisturbed))
            assert log.read_text() == whole_log.read_text()
            print(
                f"{processes} process(es), killed in step {at + 1}, resumed from step {first}: "
                "weights, optimiser, log and order of the examples are the same bits",
                flush=True,
            )


def processes(work):
    def log(out):
        return [json.loads(line) for line in (work / out / "log.jsonl").read_text().splitlines()]

    train(work, "one", 1, batch=4, dropout=0, aux=0)
    runs: dict[str, dict] = {"two processes": {}}
    if importlib.util.find_spec("deepspeed"):
        runs["two processes, ZeRO-2"] = dict(zero=2)
    for name, kw in runs.items():
        out = name.replace(" ", "").replace(",", "")
        train(work, out, 2, batch=2, dropout=0, aux=0, **kw)
        worst = max(
            abs(a["loss"] - b["loss"])
            for a, b in zip(log("one"), log(out), strict=True)
            if "loss" in a
        )
        print(
            f"{name}: the loss differs by at most {worst:.0e} over {STEPS} steps "
            "from one process with the same batch",
            flush=True,
        )


def main(args):
    match args:
        case ["worker", settings, out, order]:
            worker(settings, out, order)
        case [("kill" | "processes") as what, folder, *numbers]:
            work = Path(folder) / "resume"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            make(work)
            if what == "kill":
                kill(work, *map(int, numbers))
            else:
                processes(work)
            shutil.rmtree(work)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
