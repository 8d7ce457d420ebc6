"Reading, cleaning and splitting text: bad inputs, edge cases, properties."

import bz2
import gzip
import json
import lzma
import zlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmixtral_nb.corpora import corpus_langs, corpus_texts, lang_faults, missing_language
from cmixtral_nb.corpus import (
    Deduplicator,
    clean,
    clean_docs,
    corpus,
    is_heldout,
)
from cmixtral_nb.documents import (
    TOO_LONG,
    UNREADABLE,
    doc_files,
    open_text,
    parse_sources,
    read_docs,
)
from cmixtral_nb.languages import lang_script, script_pattern, script_share
from cmixtral_nb.stages import StageError

ROWS = [{"text": f"第{i}篇文章，讲词表扩充。", "source": "a"} for i in range(40)]


def jsonl(path, rows):
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def texts(ref, **kw):
    return [r["text"] for r in read_docs(ref, **kw)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- forms


def test_every_form_gives_the_same_texts(here):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = jsonl(here / "a.jsonl", ROWS).read_bytes()
    (here / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (here / "b.jsonl.xz").write_bytes(lzma.compress(data))
    (here / "b.jsonl.bz2").write_bytes(bz2.compress(data))
    with pa.output_stream("b.jsonl.zst", compression="zstd") as f:
        f.write(data)
    pq.write_table(pa.Table.from_pylist(ROWS), "b.parquet")
    want = [r["text"] for r in ROWS]
    (here / "b.txt").write_text("\n\n\n".join(want) + "\n", encoding="utf-8")
    for name in (
        "a.jsonl",
        "b.jsonl.gz",
        "b.jsonl.xz",
        "b.jsonl.bz2",
        "b.jsonl.zst",
        "b.parquet",
        "b.txt",
    ):
        assert texts(name) == want, name


def test_bom_crlf_and_blank_lines(here):
    (here / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    (here / "a.txt").write_bytes("\ufeff甲\r\n乙\r\n \r\n\r\n丙".encode())
    assert texts("a.jsonl") == ["one", "two"]
    assert texts("a.txt") == ["甲\n乙", "丙"]


def test_folder_glob_and_column(here):
    (here / "d/e").mkdir(parents=True)
    jsonl(here / "d/b.jsonl", [{"text": "b"}])
    jsonl(here / "d/e/a.jsonl", [{"text": "a"}])
    (here / "d/manifest.json").write_text("{}")
    (here / "d/notes.doc").write_text("no")
    assert sorted(texts("d")) == ["a", "b"]
    assert texts("d/*.jsonl") == ["b"]
    jsonl(here / "c.jsonl", [{"body": "x", "text": "y"}])
    assert texts("c.jsonl#body") == ["x"]
    assert texts("c.jsonl") == ["y"]
    jsonl(here / "c#1.jsonl", [{"text": "z"}])
    assert texts("c#1.jsonl") == ["z"]


def test_texts_of_parquet_in_any_type(here):
    "pandas writes a category as a dictionary, other libraries write views"
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = pa.array([row["text"] for row in ROWS])
    sources = pa.array(["poems", "debian:manual"] * 20).dictionary_encode()
    for kind in (pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        is_category = pa.types.is_dictionary(kind)
        column = words.dictionary_encode() if is_category else words.cast(kind)
        pq.write_table(pa.table(dict(text=column, source=sources)), "a.parquet")
        rows = list(read_docs("a.parquet"))
        assert rows == [
            dict(text=row["text"], source=source)
            for row, source in zip(ROWS, sources.to_pylist(), strict=True)
        ]
    pq.write_table(pa.table(dict(text=words.cast(pa.binary()))), "b.parquet")
    counts: Counter = Counter()
    assert not list(read_docs("b.parquet", counts=counts)) and counts == {"no text": len(ROWS)}
    with pytest.raises(StageError, match='b.parquet:1: expected a column of texts .* "text"'):
        list(read_docs("b.parquet", on_error="stop"))


def test_whatever_is_written_can_be_read(here):
    "A document that is short enough as text may be too long as a line of JSON, or as UTF-8"
    import pyarrow as pa
    import pyarrow.parquet as pq

    (here / "quotes.txt").write_text('"' * 9_000_000)  # each takes two bytes in JSON
    pq.write_table(pa.table(dict(text=["长" * 6_000_000, "短" * 20])), "a.parquet")
    jsonl(here / "a.jsonl", ROWS)
    made = corpus(["xx=quotes.txt", "xx=a.parquet", "xx=a.jsonl"], out="c", valid_share=0.5)
    assert made.stats["xx"]["dropped"] == {TOO_LONG: 2}
    read = [*corpus_texts("c", "xx"), *corpus_texts("c", "xx", "valid")]
    assert sorted(read) == sorted(["短" * 20, *(row["text"] for row in ROWS)])


def test_no_document_is_empty(here):
    "Whatever is asked for: where nothing is left there is none"
    jsonl(here / "a.jsonl", [{"text": "\x00"}, {"text": " \n"}, *ROWS, {"text": "一" * 50}])
    jsonl(here / "b.jsonl", [{"text": "一" * 50 + "\n" + "一" * 50}])
    made = corpus(["xx=a.jsonl", "xx=b.jsonl"], out="c", min_chars=0, valid_share=0.5)
    assert made.stats["xx"]["dropped"]["too short"] == 2
    assert made.stats["xx"]["dropped"]["only repeated paragraphs"] == 1
    assert all([*corpus_texts("c", "xx"), *corpus_texts("c", "xx", "valid")])


def test_builtin_parallel_keeps_both_sides():
    row = next(read_docs("builtin:parallel"))
    assert row["text"] == row["zh"]
    assert row["en"]
    assert next(read_docs("builtin:parallel#en"))["text"] == row["en"]


# ---- bad lines

BAD = [
    b'{"text": "good"}',
    b'{"text": "cut',
    b'{"text": "\xd6\xd0"}',
    b'["text"]',
    b'{"text": 7}',
    b'{"title": "x"}',
    b'{"text": "last"}',
]


def test_bad_lines_are_counted(here):
    (here / "r.jsonl").write_bytes(b"\n".join(BAD))
    n = Counter()
    assert texts("r.jsonl", counts=n) == ["good", "last"]
    assert n == {"invalid JSON": 1, "invalid UTF-8": 1, "no text": 3}


@pytest.mark.parametrize(
    "i, words",
    [
        (1, "r.jsonl:1: invalid JSON"),
        (2, "r.jsonl:1: invalid UTF-8 (0xd6 is byte 11 of the line)"),
        (3, 'r.jsonl:1: expected an object with a string under "text"'),
        (4, 'under "text"'),
    ],
)
def test_stop_names_the_line(here, i, words):
    (here / "r.jsonl").write_bytes(BAD[i])
    with pytest.raises(StageError) as e:
        texts("r.jsonl", on_error="stop")
    assert words in str(e.value)
    assert "--on-error skip" in str(e.value)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b'\n{"text": "next"}\n'])
@pytest.mark.parametrize(
    "line, says",
    [
        (
            b'{"text": "cut',
            "invalid JSON (the line ends in the middle of a string that starts at column 10, "
            "expected a closing quote)",
        ),
        (
            b'{"text": "cut\\',
            "invalid JSON (the line ends in the middle of a string that starts at column 10, "
            "expected a closing quote)",
        ),
        (
            b'{"te',
            "invalid JSON (the line ends in the middle of a string that starts at column 2, "
            "expected a closing quote)",
        ),
        (b'{"text"', "invalid JSON (the line ends too early, expected ':' delimiter)"),
        (b'{"text": ', "invalid JSON (the line ends too early, expected value)"),
        (b'{"text": "cut"', "invalid JSON (the line ends too early, expected ',' delimiter)"),
        (
            '{"text": "切断'.encode()[:-1],
            "invalid UTF-8 (the line ends in the middle of a character)",
        ),
        (b'{"text": "a\tb"}', "invalid JSON (Invalid control character at column 12)"),
        (b'{"text": "a"} {}', "invalid JSON (Extra data at column 15)"),
    ],
)
def test_a_line_that_was_cut_off_is_reported_as_such(here, line, says, end):
    "The end of the line is no part of it: whether one follows or not, the report is the same"
    (here / "r.jsonl").write_bytes(line + end)
    with pytest.raises(StageError) as e:
        texts("r.jsonl", on_error="stop")
    assert str(e.value).startswith(f"r.jsonl:1: {says}; ")


def test_deeply_nested_json_is_a_bad_line(here):
    (here / "r.jsonl").write_text("[" * 100_000 + "\n" + '{"text": "after"}')
    assert texts("r.jsonl") == ["after"]


@pytest.mark.parametrize(
    "name, compress", [("cut.jsonl.gz", gzip.compress), ("cut.jsonl.xz", lzma.compress)]
)
def test_truncated_archive(here, name, compress):
    data = compress(jsonl(here / "a", ROWS).read_bytes())
    (here / name).write_bytes(data[:-40])
    with pytest.raises(StageError, match="cannot be read to its end .*; copy or download it again"):
        texts(name)


def test_a_flipped_bit_in_an_archive(here):
    "What gzip does not wrap: zlib's own error, which is no OSError"
    head = gzip.compress(b"")[:10]
    (here / "flipped.jsonl.gz").write_bytes(head + b"\x07")  # deflate has no block of type 3
    with pytest.raises(zlib.error) as e, open_text(here / "flipped.jsonl.gz") as f:
        f.read()
    assert isinstance(e.value, UNREADABLE) and not isinstance(e.value, OSError | ValueError)
    with pytest.raises(StageError, match="cannot be read to its end .*; copy or download it again"):
        texts("flipped.jsonl.gz")


@pytest.mark.parametrize("name", ["not.jsonl.gz", "not.jsonl.xz", "not.parquet", "not.jsonl.zst"])
def test_not_what_its_name_says(here, name):
    (here / name).write_text("plain text")
    with pytest.raises(StageError, match="cannot be read to its end"):
        texts(name)


@pytest.mark.parametrize(
    "ref, words",
    [
        ("none.jsonl", "none.jsonl: no such file"),
        ("*.parquet", "no such file"),
        ("builtin:fr", "no such corpus, expected builtin:zh"),
        ("hub:", "names no data set"),
        ("a.pdf", "a.pdf: unknown form, expected .jsonl"),
        ("empty", "empty: holds no file of the forms"),
    ],
)
def test_references_that_cannot_be_read(here, ref, words):
    (here / "a.pdf").write_text("x")
    (here / "empty").mkdir()
    with pytest.raises(StageError) as e:
        texts(ref)
    assert words in str(e.value)


def test_on_error_must_be_known(here):
    with pytest.raises(StageError, match="on_error is 'ignore', expected skip or stop"):
        texts(jsonl(here / "a.jsonl", ROWS), on_error="ignore")


# ---- the hub, without a network


def test_hub_reference_is_taken_apart(monkeypatch):
    import datasets

    seen = {}

    def load(ident, config, **kw):
        seen.update(kw, ident=ident, config=config)
        return iter([{"content": "甲"}, {"content": None}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    n = Counter()
    assert texts("hub:org/name:sub@data/2022*#content", counts=n) == ["甲"]
    assert seen == dict(
        ident="org/name", config="sub", data_files="data/2022*", split="train", streaming=True
    )
    assert n["no text"] == 1


def test_hub_failure_is_one_line(monkeypatch):
    import datasets

    def load(*a, **kw):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(StageError) as e:
        texts("hub:org/name")
    assert (
        str(e.value)
        == "hub:org/name: ConnectionError: no route; check the id, the network and HF_HUB_OFFLINE"
    )


# ---- cleaning, scripts, repetition, split


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_clean_is_idempotent_and_encodable(t):
    c = clean(t)
    assert clean(c) == c
    assert "\r" not in c
    assert "\x00" not in c
    c.encode("utf-8")


@given(
    st.text(
        alphabet=st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=1, max_size=50
    )
)
def test_clean_leaves_chinese_alone(t):
    assert clean(t) == t
    assert script_share(t, "Han") == 1


def test_scripts():
    assert lang_script("zh-Hant") == "Han"
    assert lang_script("en") == "Latin"
    assert lang_script("xx") == ""
    assert script_pattern("Han Kana").fullmatch("日本のカナ")
    assert script_share("日本 ab", "Han") == 0.5
    assert script_share("12 !", "Han") == 0
    with pytest.raises(StageError, match="script 'Elvish' is unknown, expected Han, Kana"):
        script_pattern("Elvish")


@given(st.lists(st.text(alphabet="ab \n", max_size=6)))
def test_deduplicator_equals_a_set_of_normal_forms(docs):
    deduplicator = Deduplicator()
    seen: set[str] = set()
    for doc in docs:
        normal = "".join(doc.casefold().split())
        assert deduplicator.is_new(doc) == (normal not in seen)
        seen.add(normal)


def test_paragraphs_stand_once():
    long = "这是一段足够长的文字，" * 5
    first, second = "第一页的标题在这里", "第二页的标题也在这里"
    pages = [f"{first}\n{long}", f"{second}\n{long}", long]
    rows = [{"text": page, "source": "s"} for page in pages]
    n = Counter()
    kept = list(clean_docs(rows, "zh", n, min_chars=5))
    assert [r["text"] for r in kept] == [f"{first}\n{long}", second]
    assert n == {"repeated paragraph": 2, "only repeated paragraphs": 1}
    assert len(list(clean_docs(rows, "zh", paragraph_chars=0))) == 3


@given(st.text(max_size=30), st.floats(0, 1), st.floats(0, 1))
def test_larger_share_only_adds(t, a, b):
    assert is_heldout(t, min(a, b)) <= is_heldout(t, max(a, b))
    assert not is_heldout(t, 0)
    assert is_heldout(t, 1)


def test_split_does_not_depend_on_the_order():
    one = {r["text"]: r["split"] for r in clean_docs(ROWS, "zh", valid_share=0.3)}
    two = {r["text"]: r["split"] for r in clean_docs(ROWS[::-1], "zh", valid_share=0.3)}
    assert one == two
    assert set(one.values()) == {"train", "valid"}


# ---- the stage


def test_corpus_counts_and_reads_back(here, capsys):
    jsonl(
        here / "a.jsonl",
        ROWS + ROWS[:3] + [{"text": "短"}, {"text": "an English page of some length"}],
    )
    c = corpus(["zh=a.jsonl"], out="c", valid_share=0.2)
    s = c.stats["zh"]
    assert s["dropped"] == {"repeated document": 3, "too short": 1, "another script": 1}
    assert s["n_docs"] == 40
    assert s["train"]["n_docs"] + s["valid"]["n_docs"] == 40
    assert s["n_bytes"] == sum(len(r["text"].encode()) for r in ROWS)
    both = [*corpus_texts(c, "zh"), *corpus_texts(c, "zh", "valid")]
    assert sorted(both) == sorted(r["text"] for r in ROWS)
    assert corpus_langs(c) == ["zh"]
    assert "3 repeated document" in capsys.readouterr().out
    assert set(json.loads((here / "c/zh.train.jsonl").read_text().splitlines()[0])) == {
        "text",
        "source",
    }


def test_only_some_sources(here):
    rows = [dict(row, source=f"{'shop' if i % 4 else 'novel'}:{i}") for i, row in enumerate(ROWS)]
    jsonl(here / "a.jsonl", rows)
    how: dict = dict(sources=["zh=a.jsonl"], valid_share=0)
    some = corpus(out="some", only=["novel:*", "shop:1"], **how)
    assert list(corpus_texts(some, "zh")) == [rows[0]["text"], rows[1]["text"]] + [
        row["text"] for row in rows[4::4]
    ]
    assert some.stats["zh"]["dropped"] == {"another source": 29}
    far = corpus(out="far", only=["novel:*", "shop:1"], engine="local", where=["workers=1"], **how)
    assert far.fingerprint == some.fingerprint
    with pytest.raises(StageError, match="no zh document is left .*40 another source"):
        corpus(out="none", only=["shops:*"], **how)


def test_corpus_key_sees_the_contents_of_its_sources(here, capsys):
    f = jsonl(here / "a.jsonl", ROWS)
    a = corpus(["zh=a.jsonl"], out="c", valid_share=0.2)
    assert corpus(["zh=a.jsonl"], out="c", valid_share=0.2).key == a.key
    assert "up to date" in capsys.readouterr().out
    jsonl(f, ROWS[:-1])
    with pytest.raises(StageError, match="input files .*--force"):
        corpus(["zh=a.jsonl"], out="c", valid_share=0.2)


def test_all_faults_at_once(here):
    with pytest.raises(StageError) as e:
        corpus(
            ["zh=none.jsonl", "oops", "EN=builtin:en", "en=builtin:xx"],
            out="c",
            valid_share=1.5,
            on_error="no",
            min_share=2,
        )
    assert len(e.value.args) == 7
    assert not (here / "c").exists()
    assert not (here / "c.tmp").exists()
    for words in (
        "none.jsonl: no such file",
        "source 'oops': expected LANG=REF",
        "source 'EN=builtin:en'",
        "builtin:xx: no such corpus",
        "valid_share is 1.5, expected 0 to below 1",
        "on_error is 'no', expected skip or stop",
        "min_share is 2, expected 0 to 1",
    ):
        assert words in str(e.value)
    with pytest.raises(StageError, match="no sources, expected LANG=REF"):
        parse_sources([])


@pytest.mark.parametrize(
    "rows, share, words",
    [
        ([], 0.1, "no zh document is left (the sources hold no document)"),
        (
            [{"text": "only English here, page after page"}],
            0.1,
            "no zh text, expected documents with Han characters (1 another script)",
        ),
        ([{"text": "短"}], 0.1, "no zh document is left (1 too short)"),
        (
            ROWS[:2],
            0.000001,
            "none of 2 zh documents is held out at valid_share=1e-06; raise it, to 0.5 say: "
            "cmixtral corpus --valid-share (in a text file a blank line ends a document)",
        ),
        (ROWS[:2], 0.999999, "all 2 zh documents are held out"),
    ],
)
def test_corpora_that_nothing_can_use(here, rows, share, words):
    jsonl(here / "a.jsonl", rows)
    with pytest.raises(StageError) as e:
        corpus(["zh=a.jsonl"], out="c", valid_share=share)
    assert words in str(e.value)
    assert "cmixtral corpus" in str(e.value)
    assert not (here / "c").exists()


def test_stop_at_a_broken_line_leaves_nothing(here):
    (here / "r.jsonl").write_bytes(b"\n".join([json.dumps(ROWS[0]).encode(), BAD[2]]))
    with pytest.raises(StageError, match="r.jsonl:2: invalid UTF-8"):
        corpus(["zh=r.jsonl"], out="c", on_error="stop", valid_share=0)
    assert not (here / "c").exists()
    assert not (here / "c.tmp").exists()


def test_limits_and_languages(here):
    jsonl(here / "a.jsonl", ROWS)
    c = corpus(["zh=a.jsonl"], out="c", valid_share=0, limit_chars=100)
    assert 100 <= c.stats["zh"]["train"]["n_chars"] < 120
    assert len(list(corpus_texts(c, "zh", limit_chars=20))) == 2
    with pytest.raises(
        StageError,
        match="c has no en text, it has zh; run: cmixtral corpus --sources zh=REF en=REF",
    ):
        list(corpus_texts(c, "en"))
    assert [*corpus_texts("a.jsonl", "zh")] == [r["text"] for r in ROWS]
    assert [p.name for p in doc_files("builtin:zh")] == ["zh.jsonl.xz"]


def test_a_missing_language_is_one_line_everywhere(here):
    jsonl(here / "a.jsonl", ROWS)
    c = corpus(["zh=a.jsonl"], out="c", valid_share=0)
    no_en = "c has no en text, it has zh; run: cmixtral corpus --sources zh=REF en=REF --out DIR"
    assert missing_language(c, "en", ["zh"]) == no_en
    assert lang_faults(c, "en") == [no_en.replace("run:", "give --lang zh, or run:")]
    assert lang_faults(c, "zh") == []
    assert lang_faults("a.jsonl", "en") == []
    for split, words in {"train": "en text", "valid": "held-out en text"}.items():
        with pytest.raises(StageError) as e:
            list(corpus_texts(c, "en", split))
        assert str(e.value) == no_en.replace("en text", words)
    assert missing_language(c, "zh", ["zh"], "valid") == (
        "c has no held-out zh text; "
        "run: cmixtral corpus --sources zh=REF --valid-share 0.01 --out DIR"
    )


def test_attribution_names_every_source_that_ships():
    from cmixtral_nb.machine import package_data

    text = package_data("data/ATTRIBUTION.md").read_text(encoding="utf-8")
    n_docs = Counter()
    for name in ("zh", "en"):
        for r in read_docs(f"builtin:{name}"):
            n_docs[name, r["source"], r["licence"].split("/")[0]] += 1
    n_parallel = sum(1 for _ in read_docs("builtin:parallel"))
    n_docs["parallel", "cataclysm-dda-data", "CC-BY-SA-3.0"] = n_parallel
    for (name, source, licence), n in n_docs.items():
        of_file = [s for s in text.splitlines() if s.startswith(f"| {name}.jsonl.xz")]
        row = next(s for s in of_file if source in s)
        assert f"| {n:,} |" in row
        assert row.endswith(f"| {licence} |"), row


@pytest.mark.parametrize(
    "n_docs, valid_share, advice",
    [
        (40, 0.5, "add text"),  # no more than half may be held out
        (900, 0.02, "give --valid-share 0.1 or more"),  # what the characters ask for
        (2000, 0.03, "give --valid-share 0.06 or more"),  # more than was given, at least
    ],
)
def test_what_would_hold_out_enough(tmp_path, capsys, n_docs, valid_share, advice):
    rows = [
        json.dumps({"text": f"第{i:05}篇文章，讲词表的扩充和词汇，{i}。"}) for i in range(n_docs)
    ]
    (tmp_path / "zh.jsonl").write_text("\n".join(rows))
    corpus([f"zh={tmp_path}/zh.jsonl"], tmp_path / "out", valid_share=valid_share, min_chars=5)
    assert f"too few to judge a vocabulary or a model by; {advice}\n" in capsys.readouterr().out
