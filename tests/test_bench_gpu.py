"What bench_gpu.py promises for the day when there is a GPU; its scenarios run here in small"

import json
import subprocess
import sys
from pathlib import Path

import bench_gpu
from bench_gpu import SCENARIOS, SMALL, Bench, lacking, short

FILE = Path(bench_gpu.__file__)


def bench(tmp_path, *words):
    "The command in small, on the CPU: what it printed, its json"
    out = tmp_path / "out.json"
    command = [sys.executable, FILE, "--device", "cpu", "--small", "--out", out, *words]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    return run, json.loads(out.read_text()) if out.exists() else {}


def test_results_are_kept_and_what_is_lacking_is_said(tmp_path):
    run, report = bench(tmp_path, "--only", "nf4", "zero2")
    assert run.returncode == 0, run.stdout + run.stderr
    measured, skipped = report["results"]
    assert report["card"] == "cpu" and measured["status"] == "ok"
    assert set(measured["numbers"].values()) == {0.0} and len(measured["numbers"]) == 6
    assert (skipped["status"], skipped["says"]) == ("skipped", "needs a GPU")
    assert [line.split()[:2] for line in run.stdout.splitlines()[1:3]] == [
        ["nf4", "ok"],
        ["zero2", "skipped"],
    ]


def test_a_scenario_that_takes_too_long_is_ended_and_the_next_begins(tmp_path):
    run, report = bench(tmp_path, "--only", "plan", "zero2", "--slow", "0.01")
    assert run.returncode == 1 and "not well: plan" in run.stdout
    assert [r["status"].split()[0] for r in report["results"]] == ["stopped", "skipped"]


def test_list_and_unknown_names(tmp_path):
    run, _ = bench(tmp_path, "--list")
    assert [line.split()[0] for line in run.stdout.splitlines()] == list(SCENARIOS)
    run, report = bench(tmp_path, "--only", "nosuch")
    assert run.returncode and "no scenario nosuch" in run.stderr and report == {}


def test_what_a_scenario_needs():
    assert lacking(SCENARIOS["card"], "cpu") == ""
    assert lacking(SCENARIOS["ddp"], "cpu") == ""  # two processes do
    assert lacking(SCENARIOS["zero2"], "cpu") == "needs a GPU"
    assert short({"a": 1, "b": {"c": 2}}) == "a 1, b (c 2)"


def test_isolation_is_measured(tmp_path):
    found = bench_gpu.isolation(Bench("cpu", SMALL, tmp_path))
    assert found == {f"sdpa {batch}: document 1 moves 2 by": 0 for batch in (1, 2, 16)}
