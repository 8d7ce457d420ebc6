"The site as a reader meets it: built, opened from disk and under a path, in a browser."

import ast
import functools
import html
import http.server
import json
import re
import shutil
import sys
import threading
import time
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import cmixtral, watched
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cmixtral_nb.book import chain_svg
from cmixtral_nb.notebooks import COLAB_EXTRAS, cells, checkout, execute
from cmixtral_nb.pages import exported, messages, module_of, package_messages
from cmixtral_nb.site import docs
from cmixtral_nb.stages import StageError

ROOT = Path(__file__).parents[1]
NBS = sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb"))
COLABS = {*sys.stdlib_module_names, "cmixtral_nb", "IPython"}  # there before our cell
BRINGS = metadata.packages_distributions()  # package that is imported -> distributions
HERE = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}
MODULES = [p for p in sorted((ROOT / "cmixtral_nb").glob("*.py")) if not p.name.startswith("_")]
TERMS = [
    "knee",
    "fingerprint",
    "perplexity",
    "NF4",
    "replay",
    "BOS",
    "certificate",
    "router",
    "held out",
    "no space left on device",
    "词表",
]


def page_of(notebook):
    return re.sub(r"^\d+[a-z]?_", "", notebook) + ".html"


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The site, built by the command in a copy of the checkout"
    tmp = tmp_path_factory.mktemp("book")
    for name in "nbs", "cmixtral_nb":
        shutil.copytree(ROOT / name, tmp / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", tmp)
    out = cmixtral("docs", "--no-quarto", cwd=tmp, env={"PYTHONPATH": str(tmp)})
    assert out.returncode == 0, out.stderr[-3000:]
    assert "index.html" in out.stdout
    return tmp / "_docs"


class Page(HTMLParser):
    "Ids, links, loaded files and text of a page"

    def __init__(self, path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.skip = 0  # depth of scripts and styles
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids.update(a[key] for key in ("id", "name") if a.get(key))
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        loaded = a.get("href" if tag == "link" else "src")
        if tag in ("script", "link", "img", "iframe", "source") and loaded:
            self.loads.append(loaded)
        self.skip += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.skip -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.skip:
            self.words.append(data)


@pytest.fixture(scope="session")
def pages(site):
    return {p.name: Page(p) for p in site.glob("*.html")}


def test_each_notebook_has_a_page_that_the_sidebar_names(pages):
    assert set(pages) == {page_of(n) for n in NBS}
    for n in NBS:
        assert page_of(n) in pages["contributing.html"].links, f"{n} is missing in nbs/book.toml"


def test_internal_links_and_anchors(pages, site):
    for name, page in pages.items():
        for link in page.links + page.loads:
            u = urlsplit(link)
            if u.scheme or link.startswith("//"):
                continue
            target = unquote(u.path) or name
            assert (site / target).is_file(), f"{name}: {link}"
            if u.fragment and target in pages:
                assert unquote(u.fragment) in pages[target].ids, f"{name}: {link}"


def test_no_link_to_the_published_pages_and_nothing_loaded_from_elsewhere(pages, site):
    for name, page in pages.items():
        assert not [x for x in page.links if "cmixtral.github.io" in x], name
        assert not [x for x in page.loads if re.match(r"(https?:)?//", x)], name
    for p in site.rglob("*.css"):
        assert not re.search(
            r"@import[^;]*//|url\([\"']?(https?:)?//", p.read_text(encoding="utf-8")
        ), p.name


def test_every_error_message_stands_on_the_page(pages):
    "Found here in another way: every piece of text inside a call of require or StageError"
    said = pages["troubleshooting.html"].text
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for text in error_texts(node):
                for part in text.split("; "):
                    words = " ".join(part.split())
                    n_letters = len(re.sub(r"[\W\d_]", "", words))
                    assert n_letters < 6 or words in said, f"{path.name}: {words!r}"


def error_texts(node):
    "Constant texts in a call of require or StageError, without those inside of what is filled in"
    name = getattr(getattr(node, "func", None), "id", "")
    if not isinstance(node, ast.Call) or name not in ("require", "StageError"):
        return
    for argument in node.args[1:] if name == "require" else node.args:
        parts = list(ast.walk(argument))
        filled_in = {
            id(inner)
            for part in parts
            if isinstance(part, ast.FormattedValue)
            for inner in ast.walk(part)
        }
        for part in parts:
            if not isinstance(part, ast.Constant) or id(part) in filled_in:
                continue
            if isinstance(part.value, str):
                yield part.value


def test_what_the_command_says_is_on_the_page(pages, cli, tmp_path):
    "Real errors: each line is on the page, which has … or ‹name› for what is filled in"
    found = [m["text"] for of_module in package_messages().values() for m in of_module]
    rows = [re.split(r"…|‹[^›]*›", text) for text in found]
    known = [re.compile(".*".join(map(re.escape, row)) + "$") for row in rows]
    out, none = ["--out", tmp_path / "o"], tmp_path / "none"
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.toml").write_text("[vocab]\nn_pices = 3\n[pretrian]\n")
    for args in (
        ["corpus", "--sources", "zh=nothing.jsonl", "en", *out],
        ["corpus", "--sources", f"zh={tmp_path / 'empty.jsonl'}", *out],
        ["tokenizer", "--corpus", none, *out, "--n-pieces", "0"],
        ["vocab", "--pieces", none, *out],
        ["init", "--model", none, "--tokenizer", tmp_path, *out],
        ["merge", "--model", none, "--adapter", none, *out],
        ["generate", "--models", "x", *out],
        ["base", "--corpus", "builtin:en", "--hidden", "65", "--steps", "0", *out],
        ["run", tmp_path / "bad.toml"],
        ["run", "nothing"],
        ["status", tmp_path],
        ["docs", "--root", tmp_path],
        ["marge"],
        ["merge", "--modle", "x"],
    ):
        status, err = cli(*args)
        assert status == 2, args
        assert err, args
        for line in err:
            assert any(pattern.search(line) for pattern in known), line
    said = pages["troubleshooting.html"].text
    sentences = [sentence for row in rows for part in row for sentence in part.split("; ")]
    for sentence in sentences:
        assert " ".join(sentence.split()) in said, sentence


def test_messages_of_every_kind_are_read():
    source = """
def _faults(x):
    yield f'{x}: no such thing'
def f():
    faults.append('first fault' if a else 'second fault')
    faults += ['third fault']
"""
    assert [m["text"] for m in messages(source)] == [
        "…: no such thing",
        "first fault",
        "second fault",
        "third fault",
    ]


def test_commands_and_functions_stand_on_their_pages(pages):
    from cmixtral_nb.commands import parser
    from cmixtral_nb.recipes import MODULES as COMMANDS

    commands = pages["commands.html"].text
    for command in COMMANDS:
        assert f"cmixtral {command}" in commands
        options = [o for action in parser(command)._actions for o in action.option_strings]
        for option in {*options} - {"-h", "--help"}:
            assert option in commands, option
    links = set(pages["api.html"].links)
    books = {module_of(ROOT / "nbs" / f"{n}.ipynb"): page_of(n) for n in NBS}
    for path in MODULES:
        for definition in exported(path.read_text(encoding="utf-8")):
            name = definition["name"]
            assert f"{books[path.stem]}#{name.lower()}" in links, name


def test_the_gpu_page_says_what_plan_says(pages, cli):
    assert cli("plan", "paper")[0] == 0
    page = pages["gpu.html"].text
    for line in cli.out.splitlines():
        if m := re.match(r"(\d+) GB × (\d)\s+set (.*)", line):
            assert m[3] in page.replace("“", '"').replace("”", '"'), line
    assert page.count("fits") > 4


def test_the_tables_of_the_gpu_page_are_those_of_today():
    "Its cell is run by hand: cmixtral_nb.notebooks.execute, with the flag `notest`"
    from cmixtral_nb.pages import gpu_page

    (cell,) = [c for c in cells(ROOT / "nbs/gpu.ipynb") if "gpu_page()" in c["source"]]
    (shown,) = cell["outputs"]
    assert "".join(shown["data"]["text/markdown"]) == gpu_page()


def test_the_picture_is_the_one_that_is_drawn():
    assert (ROOT / "nbs" / "chain.svg").read_text() == chain_svg()


def test_commands_in_the_pages_exist():
    "Each line `cmixtral ...` of a shell block has options that exist, and all that it must have"
    import shlex

    from cmixtral_nb.commands import parser

    commands = [
        command for n in NBS if n in NO_BADGE or n == "quickstart" for command in commands_in(n)
    ]
    assert len(commands) > 15
    for command in commands:
        stage, *words = shlex.split(command, comments=True)
        got = vars(parser(stage).parse_args(words))
        if stage == "tokenizer":  # what the first newcomer ran into
            assert got["n_chars"] <= got["n_pieces"], command


def commands_in(notebook):
    "Commands in shell blocks and cells of bash of a notebook, without the word cmixtral"
    text = "\n".join(c["source"] + "\n\n" for c in cells(ROOT / "nbs" / f"{notebook}.ipynb"))
    for block in re.findall(r"```sh\n(.*?)```|%%bash\n(.*?)\n\n", text, re.S):
        yield from re.findall(r"^(?:torchrun .*--no-python )?cmixtral (.+)$", "".join(block), re.M)


def test_messages_on_the_chinese_page_are_ours():
    "Each line of its table quotes what some message says"
    page = "\n".join(c["source"] for c in cells(ROOT / "nbs" / "zh.ipynb"))
    table = page.split("## 常见报错")[1]
    quoted = re.findall(r"^\| `(.+?)` \|", table, re.M)
    found = [m["text"] for of_module in package_messages().values() for m in of_module]
    assert len(quoted) >= 8
    for words in quoted:
        assert any(words in text for text in found), words


def test_a_kept_run_says_what_its_report_says(micro, tmp_path):
    from cmixtral_nb.showcase import keep_run, result_table, results

    run = micro[0]
    report = json.loads((run / "report.json").read_text())
    prompt = report["samples"][0]["prompt"]
    keep_run(run, tmp_path / "kept.json", sentence="我们学习中文。", prompts=[prompt])
    kept = json.loads((tmp_path / "kept.json").read_text())
    for name, bits in report["bits_per_byte"].items():
        for lang, value in bits.items():
            assert kept["languages"][lang]["models"][name]["value"] == pytest.approx(value)
    assert [s["text"] for s in kept["samples"]] == [s["text"] for s in report["samples"]]
    assert {s["prompt"] for s in kept["samples"] if s["shown"]} == {prompt}
    for cut in kept["cuts"].values():
        assert sum(cut["n_bytes"]) == len(cut["text"].encode())
        assert cut["text"].strip() == "我们学习中文。"
    assert not any(kept["cuts"]["base"]["is_new"])
    assert any(kept["cuts"]["tokenizer"]["is_new"])
    for lang in "en", "zh":
        page = results([kept], "cuts.svg", lang)
        assert result_table(kept, lang) in page
        assert f"{report['bits_per_byte']['merged']['zh']:.2f}" in page
    with pytest.raises(StageError, match="no sample after 'nobody asked'"):
        keep_run(run, tmp_path / "kept.json", prompts=["nobody asked"])


def test_the_second_seed_of_laptop_is_measured_as_the_first():
    from cmixtral_nb.showcase import kept_run

    first, second = kept_run("laptop"), kept_run("laptop_seed1")
    one, other = first["control"], second["control"]
    assert (other["bytes_read"], other["saved"]) == (one["bytes_read"], one["saved"])
    for lang, found in one["text"].items():
        assert other["text"][lang]["n"] == found["n"]
        assert other["text"][lang]["change"] != found["change"]
    for arm, points in second["points"].items():
        assert [p["step"] for p in points] == [p["step"] for p in first["points"][arm]]


def test_docs_refuse_what_is_no_checkout(tmp_path, monkeypatch):
    with pytest.raises(StageError, match="expected a checkout"):
        checkout(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StageError, match="--no-quarto"):
        docs(ROOT, quarto=True)


def test_badges_are_those_that_colab_makes(tmp_path):
    from cmixtral_nb.notebooks import colab

    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for n in NBS:
        p = ROOT / "nbs" / f"{n}.ipynb"
        if "colab-setup" not in p.read_text():
            assert n in NO_BADGE, f"{n}: call cmixtral_nb.notebooks.colab on it"
            continue
        shutil.copy(p, tmp_path / "nbs")
        colab(tmp_path / "nbs" / p.name)
        assert (tmp_path / "nbs" / p.name).read_text() == p.read_text(), n
        assert cells(p)[2]["flags"] >= {"hide", "eval: false"}


@functools.cache
def installed_with(extra):
    "Distributions that the plain install brings (extra empty) or an extra, with all that they need"
    found, waiting = set(), [("cmixtral_nb", extra)]
    while waiting:
        name, asked = waiting.pop()
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker and not needed.marker.evaluate(dict(extra=asked)):
                continue
            key = canonicalize_name(needed.name)
            if key not in found and key in HERE:
                waiting += [(key, more) for more in ("", *needed.extras)]
            found.add(key)
    return found


def imported(source):
    "Packages that a cell imports as it runs; what its functions import may be missing"
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("notebook", NBS)
def test_colab_has_what_a_notebook_imports(notebook):
    "Its first cell installs the plain package, or the extra that `COLAB_EXTRAS` names"
    extra = COLAB_EXTRAS.get(notebook, "")
    there = installed_with(extra)
    for cell in cells(ROOT / "nbs" / f"{notebook}.ipynb"):
        if cell["cell_type"] != "code" or "eval: false" in cell["flags"]:
            continue
        if cell["source"].startswith("%%"):  # of bash
            continue
        for package in imported(cell["source"]):
            if package not in COLABS:
                brought_by = {canonicalize_name(name) for name in BRINGS.get(package, [])}
                assert brought_by & there, f"{package}: name its extra in COLAB_EXTRAS"


def test_a_cell_that_says_nothing_any_more_keeps_no_output(tmp_path):
    said = [dict(output_type="stream", name="stdout", text=["old\n"])]
    code = ["x = 1", "print(x)", "#| slow\nprint(2)"]
    rows = [
        dict(
            cell_type="code",
            id=str(i),
            source=[source],
            outputs=said,
            execution_count=None,
            metadata={},
        )
        for i, source in enumerate(code)
    ]
    notebook = tmp_path / "a.ipynb"
    notebook.write_text(json.dumps(dict(cells=rows, metadata={}, nbformat=4, nbformat_minor=5)))
    execute(notebook)
    outputs = [output for c in cells(notebook) for output in c["outputs"]]
    # the slow cell did not run
    assert ["".join(output["text"]) for output in outputs] == ["1\n", "old\n"]


# pages without anything to run
NO_BADGE = {
    "index",
    "zh",
    "gpu",
    "commands",
    "api",
    "troubleshooting",
    "from_seed",
    "glossary",
    "contributing",
}


class Browser:
    "Pages in Chromium, with what they log and what they ask for"

    def __init__(self, chromium):
        self.page = watched(chromium)
        self.errors, self.asked = self.page.said, self.page.asked

    def forget(self):
        "What was logged and asked for until now"
        self.errors.clear()
        self.asked.clear()

    def width(self):
        return self.page.evaluate("document.documentElement.scrollWidth")

    def background(self):
        "Sum of red, green and blue: 0 is black, 765 white"
        colour = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(n) for n in re.findall(r"\d+", colour)[:3])

    def wait_for_dark(self, name):
        "The page is dark within ten seconds: the scheme changes in an event, not at once"
        deadline = time.monotonic() + 10
        while self.background() >= 200:
            assert time.monotonic() < deadline, f"{name} stays light: {self.background()}"
            self.page.wait_for_timeout(20)

    def find(self, term):
        "Texts and links of what the search finds"
        box = self.page.locator(".smalldocs-search input").first
        box.fill(term)
        self.page.wait_for_selector(".search-result, .search-none")
        self.page.wait_for_timeout(200)
        found = self.page.locator(".search-result")
        return found.all_inner_texts(), found.evaluate_all("a => a.map(x => x.href)")


# Code blocks of a page whose lines are longer than what is seen of them.
CUT_CODE = """[...document.querySelectorAll('main pre.sourceCode')]
    .filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent.slice(0, 80))"""
# LaTeX commands outside of code, as a formula leaves them that could not be drawn.
RAW_LATEX = r"""(() => {
    const main = document.querySelector('main').cloneNode(true);
    main.querySelectorAll('pre, code, annotation, table').forEach(e => e.remove());
    return main.textContent.match(/\\[a-zA-Z]{2,}/g) || [];
})()"""


@pytest.fixture(scope="module")
def browser(chromium):
    return Browser(chromium)


def test_every_page_in_a_browser(browser, site, pages):
    "From disk: no error, no request elsewhere, no page wider than the screen, light and dark"
    browser.forget()
    for name in sorted(pages):
        browser.page.set_viewport_size(dict(width=1280, height=900))
        browser.page.emulate_media(color_scheme="light")
        browser.page.goto((site / name).as_uri())
        assert browser.width() <= 1280, name
        assert browser.page.evaluate(CUT_CODE) == [], name
        assert browser.page.evaluate(RAW_LATEX) == [], name
        assert browser.background() > 600, name
        browser.page.set_viewport_size(dict(width=390, height=844))
        browser.page.emulate_media(color_scheme="dark")
        assert browser.width() <= 390, f"{name} is {browser.width()} pixels wide on a phone"
        assert browser.page.evaluate(CUT_CODE) == [], name
        browser.wait_for_dark(name)
        broken = browser.page.evaluate(
            "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        )
        assert not broken, (name, broken)
    assert browser.errors == []
    assert not [u for u in browser.asked if not u.startswith(("file:", "data:"))]


def test_search_from_disk(browser, site, pages):
    browser.forget()
    browser.page.set_viewport_size(dict(width=1280, height=900))
    browser.page.goto((site / "index.html").as_uri())
    for term in TERMS:
        texts, links = browser.find(term)
        found = [Path(unquote(urlsplit(u).path)).name for u in links]
        assert term.lower() in pages[found[0]].text.lower(), (term, texts[:3])
    browser.page.locator(".search-result").first.click()
    browser.page.wait_for_load_state()
    assert browser.page.url.startswith("file:")
    assert "index.html" not in browser.page.url
    assert browser.errors == []


def test_under_a_path(browser, site):
    "Served below /a/b/, as on a project page: the same links and search, nothing from the root"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            if not path.startswith("/a/b/"):
                return "/nonexistent"
            return str(site / unquote(urlsplit(path).path).removeprefix("/a/b/"))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/a/b/"
    try:
        browser.forget()
        browser.page.goto(base + "index.html")
        browser.page.click("text=for the impatient")
        browser.page.wait_for_url(base + "quickstart.html")
        assert browser.find("manifest")[0]
        elsewhere = [u for u in browser.asked if not u.startswith((base, "data:"))]
        assert elsewhere in ([], [base.replace("/a/b/", "/favicon.ico")])
        assert [e for e in browser.errors if "favicon" not in e and "404" not in e] == []
    finally:
        server.shutdown()


def test_scheme_can_be_switched_by_hand(browser, site):
    browser.page.emulate_media(color_scheme="light")
    browser.page.goto((site / "search.html").as_uri())
    assert browser.background() > 600
    browser.page.click(".quarto-color-scheme-toggle")
    browser.wait_for_dark("search.html")
    browser.page.click(".quarto-color-scheme-toggle")


def test_formulas_are_drawn(browser, site):
    browser.page.goto((site / "search.html").as_uri())
    boxes = browser.page.locator("math").evaluate_all(
        "m => m.map(x => x.getBoundingClientRect().height)"
    )
    assert len(boxes) > 3
    assert all(h >= 8 for h in boxes)  # a lone n is 8 pixels high
    assert "\\frac" not in html.unescape(browser.page.locator("main").inner_text())
