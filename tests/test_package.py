"The package as others install, import and type-check it. With a clock: tests/check_package.py"

import configparser
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[1]
settings = configparser.ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    whl = next((wheel.parent / "dist").glob("*.whl"))
    names = set(zipfile.ZipFile(whl).namelist())
    inside = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "cmixtral_nb").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert {n for n in names if ".dist-info/" not in n} == inside
    assert "cmixtral_nb/py.typed" in names and any(n.endswith("LICENSE") for n in names)
    assert whl.stat().st_size < 8e6


def test_metadata(wheel):
    meta = next(wheel.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
    assert (
        f"Version: {cfg['version']}" in meta and f"Requires-Python: >={cfg['min_python']}" in meta
    )
    extras = set(re.findall(r"^Provides-Extra: (\w+)", meta, re.M))
    assert extras == {k.removesuffix("_requirements") for k in cfg if k.endswith("_requirements")}
    assert (
        "cmixtral = cmixtral_nb.commands:main"
        in next(wheel.glob("*.dist-info/entry_points.txt")).read_text()
    )
    assert "# cmixtral_nb" in meta  # the README is the long description


def test_sdist_can_be_built_again(wheel):
    "The source archive holds what setup.py reads: a wheel made from it has the same files"
    tmp = wheel.parent
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", "sdist"],
        cwd=tmp,
        check=True,
        capture_output=True,
    )
    with tarfile.open(next((tmp / "sdist").glob("*.tar.gz"))) as tar:
        tar.extractall(tmp / "unpacked", filter="data")
    src = next((tmp / "unpacked").iterdir())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "-q",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp / "again",
            src,
        ],
        check=True,
        capture_output=True,
    )
    names = [
        set(zipfile.ZipFile(next((tmp / d).glob("*.whl"))).namelist()) for d in ("dist", "again")
    ]
    assert names[0] == names[1]


def test_versions_agree():
    import cmixtral_nb

    assert cmixtral_nb.__version__ == cfg["version"]
    assert f"\n## {cfg['version']}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_requirements_have_a_floor_and_a_reason_for_a_missing_ceiling():
    open_ended = {
        "packaging",
        "protobuf",
        "regex",
        "tqdm",
        "jieba",
        "wordfreq",
        "snownlp",
        "opencc",
        "latex2mathml",
        "jupyter",
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "nbqa",
        "setuptools",
        "fastcore",
        "execnb",
        "ghapi",
    }  # small or by date; the last three have ceilings and come with nbdev
    for key in [k for k in cfg if k == "requirements" or k.endswith("_requirements")]:
        for req in cfg[key].split():
            name = re.split(r"[^\w.-]", req)[0]
            assert "==" in req or (">=" in req and "<" in req) or name in open_ended, (
                f"{key}: {req}"
            )


CLIENT = """
from pathlib import Path
from unittest.mock import patch
from cmixtral_nb.stages import Artifact, fingerprint
from cmixtral_nb.corpus import clean
from cmixtral_nb.plan import count_parameters
a: Artifact = Artifact.load(Path('x'), kind='corpus')
b: str = fingerprint({'a': 1})
c: str = clean('text')
d: dict = count_parameters('mixtral')
wrong: int = fingerprint(1)
clean(3)
"""


@pytest.fixture(scope="session")
def checked(tmp_path_factory):
    "What mypy says of the package and of a program that uses it: (file, line, message)"
    tmp = tmp_path_factory.mktemp("types")
    (tmp / "client.py").write_text(CLIENT)
    out = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            ".mypy.ini",
            "--cache-dir",
            tmp / "cache",
            "cmixtral_nb",
            tmp / "client.py",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.returncode in (0, 1), out.stdout[-1000:] + out.stderr[-1000:]
    return [
        (Path(m[1]).stem, int(m[2]), m[3])
        for m in re.finditer(r"^(\S+?\.py):(\d+): error: (.*)$", out.stdout, re.M)
    ]


def test_types_reach_a_program(checked):
    "Two errors, those of the program; the package itself, bodies and all, has none"
    lines = CLIENT.splitlines()
    assert [(f, m) for f, _, m in checked if f != "client"] == []
    assert sorted(lines[i - 1] for _, i, _ in checked) == [
        "clean(3)",
        "wrong: int = fingerprint(1)",
    ]


def test_each_package_is_in_its_extra():
    from cmixtral_nb.packages import EXTRAS

    for package, needed in EXTRAS.items():
        wanted = cfg[f"{needed.extra}_requirements"].split()
        assert needed.distribution in [re.split(r"[^\w.-]", r)[0] for r in wanted], package


def test_deepspeed_is_newer_than_those_that_round_rope():
    "0.18 to 0.19.1 cast its frequencies to bfloat16"
    from cmixtral_nb.packages import package_fault

    for version, well in (("0.18.2", False), ("0.19.1", False), ("0.19.2", True)):
        with patch("cmixtral_nb.packages.installed_version", lambda _, v=version: v):
            assert (package_fault("deepspeed") == "") is well


ASKS = """
[corpus]
sources = ["zh=builtin:zh"]
[tokenizer]
lexicons = ["0.2:jieba", "0.1:wordfreq"]
opencc = ["0.1:s2t"]
[vocab]
n_pieces = 300
[base]
lang = "zh"
[init]
[pack]
[pretrain]
zero = 2
attn = "flash_attention_2"
[evaluate]
tasks = ["cmmlu"]
data = "no_such_folder"
"""


def test_a_run_names_all_packages_that_it_lacks_before_it_begins(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("asks.toml").write_text(ASKS)
    absent = patch("cmixtral_nb.packages.installed_version", lambda name: "")
    with absent, patch("cmixtral_nb.exams.task_files", dict):
        status, lines = cli("run", "asks.toml")
        assert status == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["asks.toml"]
        for words in (
            '[pretrain] attn = "flash_attention_2": flash-attn is not installed',
            "[pretrain] zero = 2: deepspeed is not installed; run: pip install 'cmixtral_nb[gpu]'",
            "[tokenizer] lexicons: jieba is not installed",
            "[tokenizer] lexicons: wordfreq is not installed",
            "[tokenizer] opencc: opencc is not installed",
            "lm-eval is not installed; run: pip install 'cmixtral_nb[eval]'",
        ):
            assert sum(words in line for line in lines) == 1, (words, lines)
        assert cli("plan", "asks.toml")[0] == 0
        assert cli.out.count("missing here: ") >= 6


def test_each_word_list_asks_for_its_package():
    from cmixtral_nb.packages import packages_of

    asked = packages_of(dict(lexicons=["0.1:snownlp", "0.1:mine.txt"], rake="wordfreq"))
    assert asked == [("snownlp", "lexicons"), ("wordfreq", 'rake = "wordfreq"')]
    assert packages_of(dict(lexicons=None, rake="mine.txt")) == []


def test_packages_are_looked_for_without_importing_them():
    code = (
        "import sys\nfrom cmixtral_nb.packages import package_faults\n"
        "package_faults(dict(zero=2, lexicons=['0.2:jieba'], opencc=['0.1:s2t']))\n"
        "print(sorted({'torch', 'deepspeed', 'jieba', 'opencc'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"
