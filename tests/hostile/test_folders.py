"The folder of a stage: any JSON in its notes, several starts at once, kills, another user's files."

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmixtral_nb import stages
from cmixtral_nb.commands import main
from cmixtral_nb.manifests import manifest_fault, ownership_fault, read_manifest
from cmixtral_nb.stages import StageError, read_json, stage

WORDS = st.sampled_from(["kind", "files", "key", "bytes", "sha256", "params", "../x", "a.txt"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | WORDS
ANY_JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)


@stage("letters", resumable=True)
def letters(out: Path, n: int = 3):
    "A stage that takes no time"
    (out / "a.txt").write_text("a" * n)
    return dict(n_letters=n)


@contextlib.contextmanager
def somewhere():
    "hypothesis draws many examples for one `tmp_path`, so each has a folder of its own"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield Path(folder)


def contents(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(call, *args, **options):
    "It is a StageError, and its fault one line"
    with pytest.raises(StageError) as caught:
        call(*args, **options)
    assert all(str(fault).strip() for fault in caught.value.args)


@settings(max_examples=150, deadline=None)
@given(ANY_JSON)
def test_any_json_as_manifest_is_refused_and_nothing_is_deleted(value):
    with somewhere() as here:
        (here / "o").mkdir()
        (here / "o/manifest.json").write_text(json.dumps(value))
        (here / "o/letter").write_text("dear")
        before = contents(here)
        if manifest_fault(value):
            refused(read_manifest, here / "o")
        else:
            read_manifest(here / "o")
        for how in ({}, {"force": True}, {"replace_stale": True}):
            refused(letters, out=here / "o", n=4, **how)
        assert contents(here) == before


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_manifest_that_somebody_changed_is_refused_and_nothing_is_deleted(data):
    "Any part of a true manifest, at any depth, has another value"
    with somewhere() as here:
        letters(out=here / "o")
        manifest = read_json(here / "o/manifest.json")
        part, name = manifest, data.draw(st.sampled_from(sorted(manifest)))
        while isinstance(part[name], dict) and part[name] and data.draw(st.booleans()):
            part, name = part[name], data.draw(st.sampled_from(sorted(part[name])))
        old = part[name]
        part[name] = data.draw(ANY_JSON)
        (here / "o/manifest.json").write_text(json.dumps(manifest))
        before = contents(here)
        if json.dumps(part[name]) != json.dumps(old):
            assert ownership_fault(here / "o")
            refused(letters, out=here / "o", n=4, force=True)
            assert contents(here) == before


@settings(max_examples=150, deadline=None)
@given(
    ANY_JSON
    | st.fixed_dictionaries(
        {"key": LEAVES, "pid": LEAVES, "host": LEAVES}, optional={"asked": ANY_JSON}
    )
)
def test_any_json_as_request_is_refused_and_nothing_is_deleted(value):
    with somewhere() as here:
        (here / "o.tmp").mkdir()
        (here / "o.tmp/request.json").write_text(json.dumps(value))
        (here / "o.tmp/letter").write_text("dear")
        before = contents(here)
        refused(letters, out=here / "o", force=True)
        assert contents(here) == before


def test_what_lies_in_a_folder_made_again_is_kept(tmp_path, capsys):
    letters(out=tmp_path / "o")
    (tmp_path / "o/mine/deep").mkdir(parents=True)
    (tmp_path / "o/mine/deep/b.txt").write_text("b")
    (tmp_path / "o/link").symlink_to("/etc")
    letters(out=tmp_path / "o", n=4, force=True)
    assert (tmp_path / "o.kept/mine/deep/b.txt").read_text() == "b"
    assert (tmp_path / "o.kept/link").is_symlink()
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["a.txt", "manifest.json"]
    assert "now in" in capsys.readouterr().out


# ---- several at once

START = """
import sys, time
from pathlib import Path
from cmixtral_nb.stages import StageError, stage
@stage("letters")
def letters(out: Path, n: int = 3):
    for i in range(n):
        (out / f"{i}.txt").write_text("a")
        time.sleep(0.05)
try:
    letters(out=Path(sys.argv[1]))
except StageError as e:
    sys.exit(str(e))
"""


def start(out, code=START):
    return subprocess.Popen(
        [sys.executable, "-c", code, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_of_four_one_wins_and_three_say_so(tmp_path):
    for n in range(3):
        out = tmp_path / f"o{n}"
        said = [(p.communicate(), p.returncode) for p in [start(out) for _ in range(4)]]
        assert sum(status == 0 for _, status in said) >= 1
        made = [text for (text, _), status in said if status == 0 and "up to date" not in text]
        assert len(made) == 1
        for (_, err), status in said:
            assert status == 0 or "is being written by" in err, err
            assert len(err.splitlines()) == (status != 0)
        assert sorted(p.name for p in out.iterdir()) == ["0.txt", "1.txt", "2.txt", "manifest.json"]
        assert not (tmp_path / f"o{n}.tmp").exists()


def test_what_another_process_finished_in_the_last_moment_is_told(tmp_path, capsys, monkeypatch):
    "Between the first look and the lock: it is found, not made again, and both say what they did"
    take_at_once = stages.take

    def take_late(out):
        monkeypatch.undo()
        letters(out=out)  # the other process
        return take_at_once(out)

    monkeypatch.setattr(stages, "take", take_late)
    assert letters(out=tmp_path / "o").stats == {"n_letters": 3}
    assert capsys.readouterr().out == f"letters: {tmp_path / 'o'} is up to date\n"
    assert not (tmp_path / "o.tmp").exists()


def test_four_commands_at_once(tmp_path):
    "The finding: after four rounds of this there was no result in any"
    words = [
        "corpus",
        "--sources",
        "zh=builtin:zh",
        "--valid-share",
        "0.2",
        "--out",
        tmp_path / "o",
    ]
    words += ["--limit-chars", 50_000]
    code = "import sys; from cmixtral_nb.commands import main; sys.exit(main())"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    said = [(p.communicate(), p.returncode) for p in started]
    assert any(status == 0 for _, status in said), said
    for (_, err), status in said:
        assert status in (0, 2) and len(err.splitlines()) == (status == 2), err
        assert status == 0 or "is being written by" in err
    assert not ownership_fault(tmp_path / "o")


FORKS = """
import os, time
from pathlib import Path
from cmixtral_nb.folders import take
take(Path("o"))
if os.fork() == 0:
    print("a child is there", flush=True)
time.sleep(30)
"""


def test_a_child_that_outlives_its_parent_has_no_lock(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline().startswith("a child")
    refused(letters, out=tmp_path / "o")
    process.kill()
    process.wait()
    try:
        assert letters(out=tmp_path / "o").stats == {"n_letters": 3}
    finally:
        os.killpg(process.pid, signal.SIGKILL)


# ---- what ends a command

DIES = """
import os, signal, sys, time
import cmixtral_nb.stages as stages
def dying(*args):
    os.kill(os.getpid(), signal.{name})
    time.sleep(5)
stages._seal = dying
from cmixtral_nb.commands import main
sys.exit(main())
"""


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_leaves_no_half_of_a_stage(tmp_path, name, status):
    words = [
        "corpus",
        "--sources",
        "zh=builtin:zh",
        "--valid-share",
        "0.2",
        "--limit-chars",
        "20000",
        "--out",
        "o",
    ]
    run = subprocess.run(
        [sys.executable, "-c", DIES.format(name=name), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert run.returncode == status, run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def raising(error):
    def status(run: Path):
        raise error

    return status


def test_a_mistake_of_ours_says_so_and_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr("cmixtral_nb.pipeline.status", raising(KeyError("x")))
    assert main(["status", "r"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "KeyError: 'x'" in line and "CMIXTRAL_TRACEBACK=1" in line
    monkeypatch.setenv("CMIXTRAL_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["status", "r"])


@pytest.mark.parametrize(
    "error, says",
    [
        (PermissionError(13, "Permission denied", "secret.txt"), "secret.txt: permission denied"),
        (OSError(28, "No space left on device", "o"), "o: no space left on device"),
        (OSError(36, "File name too long", "m" * 300), "choose a shorter name"),
        (OSError("a library\nin two lines"), "a library\\nin two lines"),
        (MemoryError(), "not enough memory"),
        (RecursionError("maximum"), "nested too deeply"),
        (StageError("a\nb\x1b[31m"), "a\\nb\\x1b[31m"),
    ],
)
def test_what_users_can_do_something_about(monkeypatch, capsys, error, says):
    monkeypatch.setattr("cmixtral_nb.pipeline.status", raising(error))
    assert main(["status", "r"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("StageError: ") and says in line


def test_pipes_and_disks_that_take_no_more(tmp_path):
    "`| true` reads nothing, /dev/full takes nothing; Python itself would complain when it ends"
    code = "import sys; from cmixtral_nb.commands import main; sys.exit(main(sys.argv[1:]))"
    run = [sys.executable, "-c", code, "--help"]
    corpus = ["corpus", "--sources", "zh=builtin:zh", "--limit-chars", "90000"]
    corpus += ["--valid-share", "0.3", "--out", str(tmp_path / "o")]
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(run, stdout=writer, stderr=subprocess.PIPE, text=True)
    stage = subprocess.run([*run[:-1], *corpus], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (0, "")
    goes_on = "standard output was closed; the same command goes on from here\n"
    assert (stage.returncode, stage.stderr) == (141, goes_on)
    assert not (tmp_path / "o").exists()
    with open("/dev/full", "w") as full:
        refused_by = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True)
    assert refused_by.returncode == 2 and "no space left" in refused_by.stderr
    assert len(refused_by.stderr.splitlines()) == 1


# ---- another user's files

CALLS = {
    "an unreadable source": "corpus --sources zh=secret.txt --out mine/o",
    "an unreadable folder of sources": "corpus --sources zh=closed --out mine/o",
    "a source in an unreadable folder": "corpus --sources zh=closed/a.txt --out mine/o",
    "an unreadable recipe": "run secret.toml --out mine/o",
    "a recipe in an unreadable folder": "run closed/a.toml --out mine/o",
    "a folder where one must not write": "corpus --sources zh=builtin:zh --out theirs/o",
    "another user's o.tmp": "corpus --sources zh=builtin:zh --out theirs/p",
    "another user's run": "run tiny --out theirs/run",
    "status of an unreadable run": "status closed",
    "report of an unreadable run": "report closed",
    "card of an unreadable run": "card --run closed",
    "an unreadable model": "init --model closed --tokenizer closed --out mine/o",
    "an unreadable manifest": "tokenizer --corpus corpus --out mine/o",
    "compare of what cannot be read": "compare closed closed/a --out mine/o",
}
AS_NOBODY = """
import contextlib, ctypes, io, json, sys
head = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version of the call, this process
no_capabilities = (ctypes.c_uint32 * 6)()
if ctypes.CDLL(None).capset(head, no_capabilities):
    sys.exit("capset")
from cmixtral_nb.commands import main
found = {}
for name, call in json.load(sys.stdin).items():
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        status = main(call.split())
    found[name] = [status, err.getvalue()]
print(json.dumps(found))
"""


def closed_things(here, run):
    for name in ("secret.txt", "secret.toml"):
        (here / name).write_text("x")
        (here / name).chmod(0)
    for name in ("mine", "theirs/run", "theirs/p.tmp", "closed/a"):
        (here / name).mkdir(parents=True)
    shutil.copytree(run / "corpus", here / "corpus")
    (here / "corpus/manifest.json").chmod(0)
    for name in ("a.txt", "a.toml", "recipe.toml", "manifest.json", "config.json"):
        (here / "closed" / name).write_text("x")
    (here / "mine").chmod(0o777)
    (here / "theirs/p.tmp/request.json").write_text("")
    (here / "theirs/p.tmp/request.json").chmod(0o444)
    for name in ("theirs", "theirs/p.tmp", "theirs/run"):
        (here / name).chmod(0o555)
    (here / "closed").chmod(0)


def test_what_another_user_closed(micro):
    "Root may do everything, so the commands run without its capabilities"
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        closed_things(here, micro[0])
        before = contents(here)
        run = subprocess.run(
            [sys.executable, "-c", AS_NOBODY],
            cwd=here,
            input=json.dumps(CALLS),
            capture_output=True,
            text=True,
        )
        if run.stderr == "capset\n":
            pytest.skip("this system does not let a process give up its capabilities")
        here.joinpath("closed").chmod(0o755)
        here.joinpath("theirs").chmod(0o755)
        assert contents(here) == before, "something was changed"
    found = json.loads(run.stdout.splitlines()[-1])
    wrong = {
        name: (status, err)
        for name, (status, err) in found.items()
        if status != 2 or any(not line.startswith("StageError: ") for line in err.splitlines())
    }
    assert set(found) == set(CALLS) and not wrong, wrong
