"""By hand: kill -9 in the middle of every stage of a recipe, restart with the same command, compare with a run that was left alone.

python tests/bench_kill.py runs/tiny        # a finished run: says how long each stage takes and what it must give
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


def main(reference, seed=0):
    reference, rng = Path(reference), random.Random(seed)
    seconds = {r["folder"]: r["seconds"] for r in run_states(reference)}
    tmp = Path(tempfile.mkdtemp())
    shutil.copy(reference / "recipe.toml", tmp / "recipe.toml")
    out, killed, starts = tmp / "run", [], 0
    command = ["cmixtral", "run", str(tmp / "recipe.toml"), "--out", str(out)]
    while True:
        starts += 1
        p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while p.poll() is None:
            half = next(
                (s for s in STEPS if s.folder not in killed and (out / f"{s.folder}.tmp").exists()),
                None,
            )
            if half is None:
                time.sleep(0.01)
                continue
            time.sleep(seconds[half.folder] * rng.uniform(0.1, 0.8))
            if p.poll() is None and (out / f"{half.folder}.tmp").exists():
                p.send_signal(signal.SIGKILL)
                p.wait()
                killed.append(half.folder)
                whole = [s.folder for s in STEPS if (out / s.folder).exists()]
                for name in whole:
                    Artifact.load(out / name, verify=True)
                print(
                    f"killed in {half.folder}; {len(whole)} folders exist, all of them whole",
                    flush=True,
                )
                break
        p.wait()
        if p.returncode == 0:
            break
        assert p.returncode == -signal.SIGKILL, p.stderr.read()
    same = [
        s.folder
        for s in STEPS
        if Artifact.load(out / s.folder).fingerprint
        == Artifact.load(reference / s.folder).fingerprint
    ]
    print(
        f"killed in {len(killed)} of {len(STEPS)} stages, {starts} starts; {len(same)} of {len(STEPS)} folders have the fingerprint of the undisturbed run"
    )
    print("differ:", [s.folder for s in STEPS if s.folder not in same])
    shutil.rmtree(tmp)


if __name__ == "__main__":
    main(*sys.argv[1:])
