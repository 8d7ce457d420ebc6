"""Where a reader begins: `pip install .`, no extra, no checkout. Each command without an argument,
with --help and as the README and the quickstart use it works, or says on one line what is
missing."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from plain_install import clean_environment

from cmixtral_nb.machine import package_data
from cmixtral_nb.notebooks import cells
from cmixtral_nb.recipes import MODULES

ROOT = Path(__file__).parents[1]
# an extra, or the engine that wants an environment of its own
EXTRA = r"pip install (--no-build-isolation )?['\"]cmixtral_nb\[\w+\]['\"]|pip install vllm"


@pytest.fixture(scope="module")
def desk(micro, tmp_path_factory):
    "A reader's folder: what the README's lines name, and the run of `my.toml`"
    here = tmp_path_factory.mktemp("desk")
    run, recipe, _ = micro
    (here / "my.toml").write_text(recipe.read_text().replace('name = "micro"', ""))
    shutil.copytree(run, here / "runs" / "my", copy_function=os.link)
    (here / "runs" / "tiny").symlink_to("my")  # the quickstart's ten minutes
    from_elsewhere(here)
    return here


def from_elsewhere(here):
    "Files that others made: a model, a tokenizer, an adapter, pieces, benchmarks, a text"
    there = here / "path" / "to"
    (there / "benchmarks").mkdir(parents=True)
    (there / "model").symlink_to(here / "runs" / "my" / "base")
    (there / "tokenizer.model").symlink_to(here / "runs" / "my" / "base" / "tokenizer.model")
    write_adapter(here / "runs" / "my" / "base", there / "adapter")
    zh = package_data("data/zh.jsonl.xz")
    write_pieces(here / "my_pieces", zh)
    write_japanese(here / "my.txt", zh)


def texts_of(file):
    import lzma

    with lzma.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def write_pieces(folder, zh):
    "Pieces in a table, more than 8,000 that can be built: characters of a text, and their pairs"
    from collections import Counter

    words: Counter = Counter()
    for text in texts_of(zh):
        for run in re.findall(r"[\u4e00-\u9fff]+", text):
            words.update(run)
            words.update(run[i : i + 2] for i in range(len(run) - 1))
    ordered = sorted(words, key=lambda word: (len(word), -words[word]))
    chars = [word for word in ordered if len(word) == 1][:2500]
    known = set(chars)
    pairs = [word for word in ordered if len(word) == 2 and set(word) <= known][:9000]
    rows = [f"{word}\t{-i}\t{words[word]}\n" for i, word in enumerate([*pairs, *chars])]
    folder.mkdir()
    (folder / "pieces.tsv").write_text("piece\tscore\tcount\n" + "".join(rows))


def write_japanese(file, zh):
    "Japanese of a sort: the words of another text, with kana between them"
    particles = ["の", "は", "を", "に", "が", "と", "です。", "ます。", "から", "まで", "という"]
    lines = []
    for number, text in enumerate(texts_of(zh)[:400]):
        words = re.findall(r"[\u4e00-\u9fff]{1,3}", text)[:150]
        spoken = [w + particles[(i * 7 + number) % len(particles)] for i, w in enumerate(words)]
        lines.append("".join(spoken))
    file.write_text("\n\n".join(lines) + "\n")  # an empty line ends a document


def write_adapter(base, folder):
    "LoRA of some other tool: PEFT's two files and nothing that says how it was trained"
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(base)
    made = get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, p in made.named_parameters():
        if "lora_B" in name:
            p.data.fill_(0.01)
    made.save_pretrained(folder)


def shell_lines(text):
    "The commands of a page's shell blocks that are ours"
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(cmixtral|torchrun) ", line)]


def as_shell_block(cell):
    "What a cell tells its reader to type: markdown as it is, a cell of bash as a shell block"
    if cell["cell_type"] == "markdown":
        return cell["source"] + "\n"
    bash = cell["source"].removeprefix("%%bash\n")
    return f"```sh\n{bash}\n```\n" if bash != cell["source"] else ""


def python_cells(name):
    return [c["source"] for c in cells(ROOT / "nbs" / name) if c["cell_type"] == "code"]


def fault(outcome):
    "What is wrong with the end of a command; nothing where it worked or was clearly refused"
    if outcome.status == 0 and "Traceback" not in outcome.err:
        return ""
    if outcome.refusal and len(outcome.err) < 4000:
        return ""
    return f"{outcome.line}: status {outcome.status}\n{outcome.err[-1500:]}"


def test_what_only_an_extra_brings_is_not_there(plain, tmp_path):
    absent = [
        "lm_eval",
        "jieba",
        "wordfreq",
        "snownlp",
        "opencc",
        "datatrove",
        "pytest",
        "nbdev",
        "ruff",
    ]
    found = f"import importlib.util as u; print([p for p in {absent!r} if u.find_spec(p)])"
    out = plain.script("python", "-c", found, cwd=tmp_path)
    assert out.stdout.strip() == "[]", out
    where = plain.script("python", "-c", "import cmixtral_nb as c; print(c.__file__)", cwd=tmp_path)
    assert str(plain.python.parents[1]) in where.stdout


def test_every_command_explains_itself(plain, tmp_path):
    outcomes = plain.several(["cmixtral", "cmixtral --help", "cmixtral --version"], tmp_path)
    outcomes += plain.several([f"cmixtral {name} --help" for name in MODULES], tmp_path)
    assert [o for o in outcomes if o.status or o.err or not o.out] == []


def test_every_command_without_an_argument(plain, tmp_path):
    names = [name for name in MODULES if name != "run"]  # the next test's
    outcomes = plain.several([f"cmixtral {name}" for name in names], tmp_path)
    assert [fault(o) for o in outcomes if fault(o)] == []
    worked = {o.line for o in outcomes if o.status == 0}
    assert worked == {"cmixtral plan"}
    assert all(re.search(EXTRA + "|--help|checkout", o.err) for o in outcomes if o.status)


def test_run_without_an_argument_begins_and_can_be_interrupted(plain, tmp_path):
    run = subprocess.Popen(
        [plain.python.with_name("cmixtral"), "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
        # a shell may have started the tests in the background, where SIGINT is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    until = time.monotonic() + 120
    while not (tmp_path / "runs/tiny/corpus/manifest.json").exists():
        assert time.monotonic() < until and run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)  # in the second stage
    _, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (130, "interrupted; the same command goes on from here\n")
    (shown,) = plain.several(["cmixtral status runs/tiny"], tmp_path)
    assert re.search(r"^corpus .* up to date$", shown.out, re.M)


def test_the_lines_of_the_readme(plain, desk):
    lines = shell_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(lines) >= 9
    found = {}
    for line in lines:
        if line.startswith("torchrun"):  # two processes say the same as eight
            two = shlex.split(line.replace("--nproc-per-node 8", "--nproc-per-node 2"), True)
            out = plain.script(*two, cwd=desk, timeout=300)
            assert out.returncode == 0, out.stderr[-2000:]
            assert "adapter is up to date" in out.stdout
    ours = [line for line in lines if line.startswith("cmixtral")]
    for outcome in plain.several(ours, desk):
        assert fault(outcome) == ""
        found[outcome.line] = outcome
    refused = {line: o.refusal for line, o in found.items() if o.status}
    assert len(refused) == 1, refused  # the exams; everything else works
    ((line, said),) = refused.items()
    assert line.startswith("cmixtral evaluate") and len(said) == 1
    assert "lm-eval is not installed" in said[0] and re.search(EXTRA, said[0])


def test_the_python_of_the_readme(plain, desk):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    out = plain.script("python", "-c", block.replace("tok.stats", "print(tok.stats)"), cwd=desk)
    assert out.returncode == 0 and "certificate" in out.stdout, out.stderr[-2000:]


def test_the_lines_of_the_quickstart(plain, desk):
    here = desk / "quick"
    here.mkdir()
    for name in ("my.toml", "my.txt", "path", "runs"):
        (here / name).symlink_to(desk / name)
    pages = cells(ROOT / "nbs" / "quickstart.ipynb")
    text = "\n".join(as_shell_block(c) for c in pages)
    lines = [line for line in shell_lines(text) if line != "cmixtral run"]
    assert len(lines) >= 9
    outcomes = plain.several(lines, here, typed="你好\n")
    assert [fault(o) for o in outcomes if fault(o)] == []
    assert [(o.line, o.err) for o in outcomes if o.status] == []
    saved = ["".join(o.get("text", [])) for c in pages for o in c["outputs"]]
    for outcome in outcomes:  # the page shows what a reader sees
        if "km" in outcome.line or "Khmer" in outcome.line:
            assert outcome.out in saved, outcome.line
    tokenize = next(code for code in python_cells("quickstart.ipynb") if "tokenize(" in code)
    printed = re.sub(r"^(tok\.tokenize.*)", r"print(\1)", tokenize, flags=re.M)
    code = f"from transformers import AutoTokenizer\n{printed}"
    out = plain.script("python", "-c", code, cwd=here)
    assert out.returncode == 0 and "ភាសា" in out.stdout, out.stderr[-2000:]


USES = """
cmixtral report runs/my
cmixtral card runs/my
cmixtral compare before=runs/my/evaluation/base after=runs/my/evaluation/merged --out compared
cmixtral generate --models runs/my/chat --prompts 你好 --max-new-tokens 4 --out said
cmixtral chat --model runs/my/chat --max-new-tokens 4
cmixtral evaluate --model runs/my/merged --corpus runs/my/corpus --n-chars 500 --out bits
cmixtral efficiency --models a=runs/my/base --corpus runs/my/corpus --n-chars 500 --out speed
cmixtral export --model runs/my/chat --out exported
cmixtral serve --model runs/my/chat
cmixtral page
cmixtral tokenizer --corpus runs/my/corpus --lexicons 0.2:jieba --opencc 0.1:s2t --out p
cmixtral pretrain --model runs/my/model --tokens runs/my/tokens --zero 2 --out a
"""


def test_other_commands_as_a_reader_uses_them(plain, desk):
    outcomes = plain.several(USES.strip().splitlines(), desk, typed="你好\n")
    assert [fault(o) for o in outcomes if fault(o)] == []
    refused = {o.line.split()[1]: o.refusal for o in outcomes if o.status}
    assert set(refused) == {"serve", "page", "tokenizer", "pretrain"}
    assert all(re.search(EXTRA, "\n".join(said)) for said in refused.values()), refused


def test_the_commands_of_the_book_name_their_extra_in_a_checkout(plain, tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    for outcome, extra in zip(
        plain.several(["cmixtral docs", "cmixtral prepare"], tmp_path), ("docs", "dev"), strict=True
    ):
        assert outcome.refusal and f"pip install 'cmixtral_nb[{extra}]'" in outcome.err, outcome
    assert {path.name for path in tmp_path.iterdir()} == {"settings.ini", "nbs"}
