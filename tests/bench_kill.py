"""By hand: end a run again and again, at any moment of any stage, restart it with the same command,
compare with a run that was left alone.

    python tests/bench_kill.py                          # the micro recipe of the tests, 100 kills
    python tests/bench_kill.py runs/tiny --kills 18     # as a finished run, once in each stage
    python tests/bench_kill.py --signals TERM --seed 7

A kill waits for a stage that was not ended in this round, and for a moment drawn between its first
and its last, or just after. When all stages have had theirs, the run is completed, compared, and a
new one begins.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from pathlib import Path

from conftest import MICRO

from cmixtral_nb.pipeline import run_states
from cmixtral_nb.recipes import command, recipe_steps
from cmixtral_nb.stages import Artifact

STEPS = recipe_steps(tomllib.loads(MICRO))

STATUS = {"KILL": -signal.SIGKILL, "TERM": 128 + signal.SIGTERM, "INT": 128 + signal.SIGINT}
RESUMABLE = ("adapter", "sft", "merged", "chat")  # besides evaluations, which keep their answers
SPEEDS = "efficiency"  # measures seconds, which are never the same


def start(recipe, out):
    "`cmixtral run`; also where it was started in the background, and SIGINT is ignored"
    return subprocess.Popen(
        ["cmixtral", "run", recipe, "--out", out],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def half_made(out, ended):
    "The folder that is being written now, if its stage was not ended before"
    for step in STEPS:
        if step.folder not in ended and (out / f"{step.folder}.tmp").exists():
            return step.folder
    return None


def end_once(process, out, ended, seconds, name, rng):
    "Wait for a stage that was not ended yet, end it at some moment; True if it was running then"
    while process.poll() is None:
        folder = half_made(out, ended)
        if folder is None:
            time.sleep(0.02)
            continue
        time.sleep(seconds[folder] * rng.uniform(0, 1.1))
        ended.append(folder)
        process.send_signal(getattr(signal, f"SIG{name}"))
        return True
    return False


def check_what_is_left(out, name, status, said):
    "Folders with a final name are whole; a signal that can be caught leaves no half of a stage"
    assert status in (STATUS[name], 0), (name, status, said[-3000:])
    assert "Traceback" not in said, said[-3000:]
    for step in STEPS:
        if (out / step.folder).exists():
            Artifact.load(out / step.folder, verify=True)
        may_stay = name == "KILL" or step.folder in RESUMABLE or step.stage == "evaluate"
        assert may_stay or not (out / f"{step.folder}.tmp").exists(), (name, step.folder)


def differing(out, reference):
    "Folders whose fingerprint is not that of the undisturbed run"

    def fingerprint(run, step):
        return Artifact.load(run / step.folder).fingerprint

    return [
        step.folder
        for step in STEPS
        if step.folder != SPEEDS and fingerprint(out, step) != fingerprint(reference, step)
    ]


def one_round(reference, out, names, rng, n_kills):
    "A run that is ended in each stage, at most `n_kills` times; how often by which signal"
    recipe = reference / "recipe.toml"
    seconds = {row["folder"]: row["seconds"] for row in run_states(reference)}
    counts: Counter = Counter()
    ended: list[str] = []
    status = 1
    while status != 0:
        name = rng.choice(names)
        with start(recipe, out) as process:
            wants_more = sum(counts.values()) < n_kills
            hit = wants_more and end_once(process, out, ended, seconds, name, rng)
            _, said = process.communicate()
        status = process.returncode
        if hit:
            counts[name] += 1
            check_what_is_left(out, name, status, said)
            print(f"{name:5}{ended[-1]:20} exit status {status}", flush=True)
        else:
            assert status == 0, said[-3000:]
    return counts


def undisturbed(given, tmp):
    "The folder of a finished run; the micro recipe is run where none is given"
    if given:
        return Path(given)
    (tmp / "micro.toml").write_text(MICRO)
    print("a run that is left alone ...", flush=True)
    return command("run")(str(tmp / "micro.toml"), out=tmp / "reference")


def main(argv=None):
    read = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    read.add_argument("run", nargs="?", help="a finished run; default: the micro recipe is run")
    read.add_argument("--kills", type=int, default=100)
    read.add_argument("--signals", nargs="+", choices=STATUS, default=list(STATUS))
    read.add_argument("--seed", type=int, default=0)
    args = read.parse_args(argv)
    tmp, rng = Path(tempfile.mkdtemp()), random.Random(args.seed)
    reference = undisturbed(args.run, tmp)
    total: Counter = Counter()
    wrong = []
    while (left := args.kills - sum(total.values())) > 0:
        total += one_round(reference, tmp / "run", args.signals, rng, left)
        wrong += differing(tmp / "run", reference)
        print(
            f"{sum(total.values())} kills {dict(total)}; folders that differ: {wrong}", flush=True
        )
        shutil.rmtree(tmp / "run")
    shutil.rmtree(tmp)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
