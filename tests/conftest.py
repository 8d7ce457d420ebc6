"One micro run of the whole chain, shared by the tests that need real artifacts."

import compileall
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from forks import python
from plain_install import Plain, install

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores
# glibc gives a large tensor back to the system when it is freed, and the next one is made of new
# pages, one fault for each 4 KB: half of the time of a small training. Kept, it is used again
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
if os.environ.get("CMIXTRAL_TEST_GPU") != "1":  # before PyTorch looks
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # everywhere the same numbers, and two workers at once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

MICRO = """
name = "micro"

[corpus]
sources = ["zh=builtin:zh", "en=builtin:en"]
valid_share = 0.3
limit_chars = 150000

[tokenizer]
n_pieces = 4000
n_chars = 2500

[search]
limit_chars = 20000
chars = ["1800", "2000"]
totals = ["200", "400", "600"]

[vocab]
n_pieces = 300
n_hostile = 1000

[base]
hidden = 64
layers = 2
heads = 2
kv_heads = 1
intermediate = 64
steps = 6
batch = 2
length = 64

[init]

[pack]
mix = ["1:zh", "0.5:en"]
length = 64
valid_chars = 2000

[pretrain]
rank = 4
alpha = 8
lr = 1e-3
batch = 2
steps = 6
eval_every = 3
save_every = 2
log_every = 1
eval_chars = 2000

[merge]

[sft]
steps = 3

[generate]
prompts = ["文件"]
max_new_tokens = 8

[evaluate]
length = 64
n_chars = 2000

[efficiency]
n_chars = 2000
seconds = 0.05
new_tokens = 4

[health]
n_chars = 2000
length = 64
worst = 5
"""


LONGEST_FIRST = [  # test files by the minutes they take; all others come after them
    "test_notebooks.py",
    "test_appendices.py",
    "test_hostile.py",  # makes the micro run, while the other worker needs none of it
    "test_pretrain.py",
    "test_site.py",
    "test_pipeline.py",
    "test_languages.py",
    "test_plain.py",
    "test_merge.py",
    "test_project.py",
    "test_control.py",
    "test_gguf.py",
    "test_serve.py",
    "test_report.py",
    "test_any_base.py",
]


def pytest_configure(config):
    "Python's bytecode of the package, even where PYTHONDONTWRITEBYTECODE is set: thousands load it"
    if not hasattr(config, "workerinput"):  # once, before the workers begin
        compileall.compile_dir(Path(__file__).parents[1] / "cmixtral_nb", quiet=2)


def pytest_collection_modifyitems(items):
    "The longest files first: one that began last would keep one worker busy and the other idle"
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def cmixtral(*args, cwd=None, env=None, code="", timeout=600):
    "Run the command in a process of its own; `code` runs before it (to inject a fault)"
    run = f"{code}\nimport sys\nfrom cmixtral_nb.commands import main\nsys.exit(main())"
    return python(run, *args, cwd=cwd, env=env, timeout=timeout)


def small_tokenizer(folder, sentence):
    "A BPE model of 290 pieces, bytes among them, that knows the characters of one sentence"
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter([sentence] * 9),
        model_prefix=str(folder / "small"),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "small.model"


SHORT_TRAINING = dict(  # of `pretrain`
    rank=4,
    alpha=8,
    batch=2,
    lr=1e-3,
    warmup=0,
    eval_every=2,
    save_every=2,
    log_every=1,
    eval_chars=100,
)


def once(tmp_path_factory, name, make):
    """A folder of this name, made by the first of the workers that asks for it; others wait

    `make(folder)` fills it; what it returns is what everybody gets, as text.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers
    folder, answer = root / name, root / f"{name}.answer"
    with FileLock(root / f"{name}.lock"):
        if not answer.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # left by a worker that failed
            folder.mkdir()
            answer.write_text(str(make(folder)))
    return folder, answer.read_text()


OF_THE_SESSION = ("plain", "micro", "wheel")  # folders that are not those of one file of tests


@pytest.fixture(scope="module", autouse=True)
def tidied(tmp_path_factory):
    "What the fixtures of a file of tests have left on disk goes with its last test"
    root = tmp_path_factory.getbasetemp()
    before = set(root.iterdir())
    yield
    for folder in set(root.iterdir()) - before:
        if not folder.name.startswith((*OF_THE_SESSION, "test_")):
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def plain(wheel, tmp_path_factory):
    "The package as `pip install .` leaves it, without any extra"
    file = next((wheel.parent / "dist").glob("*.whl"))
    _, python = once(tmp_path_factory, "plain", lambda folder: install(file, folder).python)
    return Plain(Path(python))


def run_micro(plain, folder):
    "The micro recipe from the corpus to the report -> what was printed"
    recipe = folder / "micro.toml"
    recipe.write_text(MICRO)
    out = plain.script("cmixtral", "run", recipe, "--out", folder / "run", cwd=folder)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-4000:]
    return out.stdout


@pytest.fixture(scope="session")
def micro(plain, tmp_path_factory):
    """(folder of the run, recipe file, what the run printed); run by the plain install

    The run is made once; each worker has a copy, in which its tests may run it again.
    """
    made, printed = once(tmp_path_factory, "micro", lambda folder: run_micro(plain, folder))
    own = shutil.copytree(made, tmp_path_factory.mktemp("micro") / "own", symlinks=True)
    return own / "run", own / "micro.toml", printed


class Cli:
    "The command in this process: cli(...) -> (exit status, standard error as lines)"

    def __init__(self, capsys):
        self.capsys = capsys
        self.out = ""  # what the last call printed

    def __call__(self, *args):
        from cmixtral_nb.commands import main

        self.capsys.readouterr()
        status = main([str(arg) for arg in args])
        printed = self.capsys.readouterr()
        self.out = printed.out
        return status, printed.err.strip().splitlines()


@pytest.fixture
def cli(capsys):
    return Cli(capsys)


def build_wheel(folder):
    "The wheel in `dist`, what it holds in `site`"
    root = Path(__file__).parents[1]
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "cmixtral_nb", folder / "cmixtral_nb", ignore=no_caches)
    for name in ["settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"]:
        shutil.copy(root / name, folder)

    def pip(*args):
        command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *args]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    pip("wheel", "--no-deps", "--no-build-isolation", "-w", "dist", ".")
    pip("install", "--no-deps", "--target", "site", *(folder / "dist").glob("*.whl"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The package as a user installs it: what the wheel holds, and beside it the wheel"
    folder, _ = once(tmp_path_factory, "wheel", build_wheel)
    return folder / "site"


@pytest.fixture(scope="module")
def chromium():
    "Of the module, not of the session: while it is open, no other test could use asyncio"
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def watched(browser, width=1280, height=900, scheme="light"):
    "An empty page that keeps what it says in the console (`said`) and what it asks for (`asked`)"
    page = browser.new_page(viewport=dict(width=width, height=height), color_scheme=scheme)
    page.said, page.asked = [], []
    page.on("console", lambda m: page.said.append(m.text))
    page.on("pageerror", lambda e: page.said.append(str(e)))
    page.on("request", lambda r: page.asked.append(r.url))
    return page
