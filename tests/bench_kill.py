"""By hand: kill -9 in the middle of every stage of a recipe, restart with the same command, compare
with a run that was left alone.

    python tests/bench_kill.py runs/tiny    # a finished run: what each stage takes and must give
"""

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cmixtral_nb.pipeline import run_states
from cmixtral_nb.recipes import STEPS
from cmixtral_nb.stages import Artifact


def half_made(out, killed):
    "The folder that is being written now, if it was not killed before"
    for step in STEPS:
        if step.folder not in killed and (out / f"{step.folder}.tmp").exists():
            return step.folder
    return None


def kill_once(process, out, killed, seconds, rng):
    "Wait for a stage that was not killed yet, and kill it somewhere in its middle"
    while process.poll() is None:
        folder = half_made(out, killed)
        if folder is None:
            time.sleep(0.01)
            continue
        time.sleep(seconds[folder] * rng.uniform(0.1, 0.8))
        if process.poll() is None and (out / f"{folder}.tmp").exists():
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed.append(folder)
            whole = [step.folder for step in STEPS if (out / step.folder).exists()]
            for name in whole:
                Artifact.load(out / name, verify=True)
            print(f"killed in {folder}; {len(whole)} folders exist, all of them whole", flush=True)
            return


def differing(out, reference):
    "Folders whose fingerprint is not that of the undisturbed run"
    return [
        step.folder
        for step in STEPS
        if Artifact.load(out / step.folder).fingerprint
        != Artifact.load(reference / step.folder).fingerprint
    ]


def main(reference, seed=0):
    reference, rng = Path(reference), random.Random(seed)
    seconds = {row["folder"]: row["seconds"] for row in run_states(reference)}
    tmp = Path(tempfile.mkdtemp())
    recipe = shutil.copy(reference / "recipe.toml", tmp / "recipe.toml")
    out, n_starts, status = tmp / "run", 0, None
    killed: list[str] = []
    while status != 0:
        n_starts += 1
        command = ["cmixtral", "run", recipe, "--out", out]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as p:
            kill_once(p, out, killed, seconds, rng)
            said = p.stderr.read() if p.stderr else b""
        status = p.returncode
        assert status in (0, -signal.SIGKILL), said.decode()
    wrong = differing(out, reference)
    print(f"killed in {len(killed)} of {len(STEPS)} stages, {n_starts} starts")
    print(f"{len(STEPS) - len(wrong)} of {len(STEPS)} folders have the undisturbed fingerprint")
    print("differ:", wrong)
    shutil.rmtree(tmp)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
