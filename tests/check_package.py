"""By hand: build wheel and sdist, install the wheel into an empty environment, measure imports,
run the tiny chain from an empty folder.

    python tests/check_package.py [--extras eval,docs] [--lowest] [--run]

--lowest installs the lowest versions that settings.ini allows instead of the newest (with uv). It
prints what it measured and leaves the environment in a folder that it names.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = {
    "import cmixtral_nb": "import cmixtral_nb",
    "cmixtral --help": "from cmixtral_nb.commands import main; main(['--help'])",
    "an empty Python": "pass",
}


def sh(*args, **kw):
    print("+", *args, flush=True)
    return subprocess.run(list(map(str, args)), check=True, **kw)


def seconds(python, code, cwd, n=7):
    "The median of n runs, in a process of its own each"
    out = []
    for _ in range(n):
        start = time.perf_counter()
        subprocess.run([python, "-c", code], cwd=cwd, check=True, stdout=subprocess.DEVNULL)
        out.append(time.perf_counter() - start)
    return sorted(out)[n // 2]


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--extras", default="")
    p.add_argument(
        "--torch",
        default="torch==2.13.0",
        help="installed first, so that no other build is fetched",
    )
    p.add_argument("--lowest", action="store_true")
    p.add_argument(
        "--run", action="store_true", help="run the tiny recipe with the installed package"
    )
    a = p.parse_args()
    requirements = (
        (ROOT / "settings.ini")
        .read_text(encoding="utf-8")
        .split("\nrequirements = ")[1]
        .split("\n")[0]
        .split()
    )
    tmp = Path(tempfile.mkdtemp(prefix="cmixtral-package-"))
    shutil.copytree(
        ROOT,
        tmp / "src",
        ignore=shutil.ignore_patterns(
            ".git", "runs", "_docs", "_proc", "__pycache__", ".venv", "build", "dist"
        ),
    )
    sh(sys.executable, "-m", "venv", tmp / "venv")
    python = tmp / "venv" / "bin" / "python"
    sh(
        python,
        "-m",
        "pip",
        "-q",
        "install",
        "build",
        "setuptools",
        "wheel",
        *(["uv"] if a.lowest else []),
    )
    sh(
        python,
        "-m",
        "build",
        "-q",
        "--no-isolation" if a.lowest else "-q",
        "-o",
        tmp / "dist",
        tmp / "src",
        stdout=subprocess.DEVNULL,
    )
    for f in sorted((tmp / "dist").iterdir()):
        print(f"{f.name}: {f.stat().st_size / 1e6:.2f} MB")
    whl = str(next((tmp / "dist").glob("*.whl"))) + (f"[{a.extras}]" if a.extras else "")
    start = time.perf_counter()
    sh(python, "-m", "pip", "-q", "install", a.torch)
    if a.lowest:  # torch stays as it is: an older one would be another build
        (tmp / "floor.txt").write_text(
            "\n".join(r for r in requirements if not r.startswith("torch")) + "\n"
        )
        (tmp / "over.txt").write_text(a.torch + "\n")
        sh(
            python,
            "-m",
            "uv",
            "pip",
            "install",
            "-q",
            "--python",
            python,
            "--resolution",
            "lowest-direct",
            "--override",
            tmp / "over.txt",
            "-r",
            tmp / "floor.txt",
        )
        sh(python, "-m", "uv", "pip", "install", "-q", "--python", python, "--no-deps", whl)
    else:
        sh(python, "-m", "pip", "-q", "install", whl)
    print(f"installed in {time.perf_counter() - start:.0f} s")
    wanted = {re.split(r"[^\w.-]", r)[0].lower() for r in requirements}
    have = subprocess.run(
        [python, "-m", "pip", "list", "--format", "freeze"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    print("with", *[h for h in have if h.split("==")[0].lower().replace("_", "-") in wanted])
    empty = tmp / "empty"
    empty.mkdir()
    for name, code in IMPORTS.items():
        print(f"{name}: {seconds(python, code, empty):.2f} s")
    cmixtral = tmp / "venv" / "bin" / "cmixtral"
    sh(cmixtral, "--version", cwd=empty)
    if a.run:
        start = time.perf_counter()
        sh(
            cmixtral,
            "run",
            cwd=empty,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
        print(f"cmixtral run: {time.perf_counter() - start:.0f} s")
    print("left behind:", tmp)


if __name__ == "__main__":
    main()
