"An audit finds what an extension broke, and nothing where nothing is broken"

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import cmixtral

from cmixtral_nb.audit import Audit, audit, char_script, is_broken, main_script, piece_scripts
from cmixtral_nb.byte_bases import LETTER_OF, ByteBase, read_byte_base, write_byte_tokenizer
from cmixtral_nb.bytelevel import Merge, extended
from cmixtral_nb.pieces import Piece, base_tokenizer_model, read_model
from cmixtral_nb.stages import StageError, read_json
from cmixtral_nb.tokenizer_files import write_tokenizer
from cmixtral_nb.vocab import extend_model

TOKENIZERS = Path(os.environ.get("CMIXTRAL_DATA", "/nowhere")) / "tokenizers"
LLAMA_2 = TOKENIZERS / "llama-2.tokenizer.model"
FEW: dict[str, Any] = dict(limit_chars=20_000, n_hostile=1000)
WORDS = ["人工", "智能", "人工智能", "软件", "本书", "选项"]


def pieces(words):
    return [Piece(word, -float(i), "word", 1) for i, word in enumerate(words)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    "A folder of our own, from which each test breaks one thing"
    folder = tmp_path_factory.mktemp("ours")
    model = extend_model(base_tokenizer_model(), pieces(WORDS))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return write_tokenizer(folder / "tokenizer.model", folder)


def broken(found):
    return {line.get("check") or line["counted"] for line in found if is_broken(line)}


def test_nothing_is_broken_in_what_we_wrote(ours, capsys):
    found = audit(ours, "mixtral", **FEW)
    assert broken(found) == set() and found.exit_status == 0
    said = capsys.readouterr().out
    assert "32,000 + 6 = 32,006 pieces" in said and "nothing broke" in said
    assert "new ones with letters of Han 6; text without Han must keep its ids" in said
    chinese = next(line for line in found if line.get("counted", "").startswith("Chinese"))
    assert chinese["changed"] and chinese["may_change"]  # but that is what they are for
    assert chinese["chars_per_token_after"] > chinese["chars_per_token_before"]
    rate = chinese["chars_per_token_after"] / chinese["chars_per_token_before"]
    assert rate == pytest.approx(chinese["tokens_before"] / chinese["tokens_after"])


def swap(model):
    "Two old pieces change places"
    a, b = model.pieces[5000], model.pieces[6000]
    a.piece, b.piece = b.piece, a.piece


def prefer(model):
    "An English piece whose score is above that of the parts it should wait for"
    model.pieces.add(piece="▁of▁the", score=0)


def dead(model):
    "A word that no two pieces make"
    model.pieces.add(piece="囍囍囍囍", score=-4e9)


@pytest.mark.parametrize(
    "change,what",
    [
        (swap, {"old pieces keep ids, scores and types"}),
        (
            prefer,
            {"ids of texts without Han unchanged", "English documents whose ids change"},
        ),
        (dead, {"new pieces reachable", "new pieces have all their characters"}),
    ],
)
def test_each_fault_is_found(ours, tmp_path, capsys, change, what):
    "A file alone, as such models are released"
    model = read_model(ours / "tokenizer.model")
    change(model)
    (tmp_path / "theirs.model").write_bytes(model.SerializeToString())
    found = audit(tmp_path / "theirs.model", "mixtral", **FEW)
    assert what <= broken(found) and found.exit_status == 1
    said = capsys.readouterr().out
    assert "BROKE" in said and f"{len(broken(found))} of {len(found)} lines broke" in said
    if change is dead:
        assert "dead pieces (1): 囍囍囍囍" in said
    if change is prefer:
        assert "such as 'of the'" in said


def test_a_fast_tokenizer_that_differs(ours, tmp_path):
    "tokenizer.json says other ids than tokenizer.model: users get the former"
    folder = shutil.copytree(ours, tmp_path / "m")
    fast = read_json(folder / "tokenizer.json")
    fast["model"]["merges"] = fast["model"]["merges"][:-3]
    (folder / "tokenizer.json").write_text(json.dumps(fast))
    found = audit(folder, "mixtral", **FEW)
    assert "fast tokenizer equals sentencepiece" in broken(found)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": 5}')
    found = audit(folder, "mixtral", **FEW)
    assert broken(found) == {"transformers loads it"}


def test_what_the_base_does_too_is_not_held_against_it():
    assert not is_broken(dict(check="x", failed=3, failed_in_base=3))
    assert is_broken(dict(check="x", failed=4, failed_in_base=3))
    assert is_broken(dict(check="x", failed=1))
    assert not is_broken(dict(counted="x", changed=5, may_change=True))
    assert Audit([dict(check="x", failed=0)]).exit_status == 0


@pytest.mark.parametrize(
    "texts,script",
    [
        (["的", "中国", " the"], "Han"),
        (["の", "です", "日本", "東"], "Han Kana"),
        (["ស្រុក", "ខ្ញុំ", "中"], "Khmer"),
        (["đường", " của", "1"], "Latin"),
        (["ⵜⴰⵎ", "ⴰⵣ"], "Tifinagh"),  # not in the table: its name says it
        (["1", "--", " "], ""),
    ],
)
def test_the_script_is_found(texts, script):
    assert main_script(piece_scripts(texts)) == script


def test_no_character_breaks_the_search_for_a_script():
    for code in [*range(0x500), *range(0xD7F0, 0xE010), *range(0xFFF0, 0x10010), 0x10FFFF]:
        assert isinstance(char_script(chr(code)), str)


def test_at_the_command_line(ours, tmp_path):
    "Status and file as documented: 0 and 1 with a report, 2 and nothing else"
    few = ["--limit-chars", 20_000, "--n-hostile", 1000]
    done = cmixtral("audit", ours, "--base", "mixtral", "--out", tmp_path / "o", *few)
    assert done.returncode == 0, done.stderr
    *lines, last = read_json(tmp_path / "o" / "certificate.json")
    assert last == dict(dead_pieces=[]) and len(lines) == 14
    done = cmixtral("audit", ours, "--base", ours, *few)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "expected an extension" in done.stderr


def test_hostile_input_is_one_line_each(cli, ours, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "manifest.json").write_text("{}")
    (tmp_path / "long.model").write_bytes(b"\x0a\xff" * 1000)
    for args, n_lines, says in (
        ([tmp_path / "none", "--base", "mixtral"], 1, "no such tokenizer"),
        ([tmp_path / "long.model", "--base", tmp_path / "none"], 2, "not a sentencepiece model"),
        ([ours, "--base", "mixtral", "--out", tmp_path / "m"], 1, "belongs to a stage"),
        ([ours, "--base", "mixtral", "--out", tmp_path / "long.model"], 1, "is a file"),
        ([ours, "--base", "mixtral", "--corpus", tmp_path / "no"], 1, "no"),
        ([ours, "--base", "mixtral", "--script", "Elvish"], 1, "script 'Elvish' is unknown"),
        ([ours, "--base", "mixtral", "--n-hostile", 3], 1, "n_hostile is 3"),
    ):
        status, err = cli("audit", *args)
        assert status == 2 and len(err) == n_lines and any(says in line for line in err), err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["long.model", "m"]


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="CMIXTRAL_DATA has no tokenizers")
def test_a_release(capsys):
    "hfl's Chinese-LLaMA-2 against Llama-2: 657 of its 23,296 pieces are dead"
    with pytest.raises(StageError, match="expected an extension"):
        audit(LLAMA_2, str(LLAMA_2))
    found = audit(
        TOKENIZERS / "chinese-llama-2.tokenizer.model",
        str(LLAMA_2),
        **FEW,
    )
    by_name = {line.get("check") or line["counted"]: line for line in found}
    assert by_name["old pieces keep ids, scores and types"]["failed"] == 0
    assert by_name["new pieces reachable"]["failed"] == 657
    assert by_name["new pieces have all their characters"]["failed"] == 3
    assert by_name["English documents whose ids change"]["changed"] == 0
    assert "dead pieces (657)" in capsys.readouterr().out


# ---- tokenizer.json


@pytest.fixture(scope="module")
def byte_base(tmp_path_factory):
    "Bytes and one merge, so that all of Khmer is spelled out"
    letters = {letter: i for i, letter in enumerate(LETTER_OF.values())}
    cut = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    model = dict(type="BPE", vocab=letters | {"th": 256}, merges=[["t", "h"]])
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=257, content="<end>", **flags)]
    base = ByteBase(
        dict(version="1.0", added_tokens=added, pre_tokenizer=cut, decoder=cut, model=model)
    )
    write_byte_tokenizer(base, folder := tmp_path_factory.mktemp("byte"))
    return folder


KA = "ក".encode()
KHMER = [Merge(KA[:1], KA[1:2], 9), Merge(KA[:2], KA[2:], 9)]


def released(byte_base, folder, merges, **changes):
    config = extended(read_byte_base(byte_base), merges).config
    return write_byte_tokenizer(ByteBase({**config, **changes}), folder)


def test_an_extension_by_own_bytes_breaks_nothing(byte_base, tmp_path):
    theirs = released(byte_base, tmp_path / "a", KHMER)
    found = audit(theirs, byte_base, **FEW)
    assert broken(found) == set() and found.exit_status == 0
    khmer = next(line for line in found if line.get("counted", "").startswith("Khmer"))
    assert khmer["may_change"] and khmer["tokens_after"] < khmer["tokens_before"]
    assert broken(audit(theirs / "tokenizer.json", byte_base / "tokenizer.json", **FEW)) == set()


def test_an_extension_that_touches_english(byte_base, tmp_path, capsys):
    theirs = released(byte_base, tmp_path / "a", [*KHMER, Merge(b"th", b"e", 9)])
    found = audit(theirs, byte_base, script="Khmer", **FEW)
    assert broken(found) >= {
        "new pieces hold an own character",
        "ids of texts without Khmer unchanged",
        "English documents whose ids change",
    }
    english = next(line for line in found if line.get("counted", "").startswith("English"))
    assert "the" in english["examples"]


def test_ids_that_moved(byte_base, tmp_path):
    "New pieces before the control token, which gets a higher id, as some tools do"
    config = extended(read_byte_base(byte_base), KHMER).config
    vocab = {piece: i for piece, i in config["model"]["vocab"].items() if piece != "<end>"}
    vocab = {piece: i - (i > 257) for piece, i in vocab.items()}
    added = [dict(config["added_tokens"][0], id=259)]
    model = {**config["model"], "vocab": vocab}
    moved = ByteBase({**config, "added_tokens": added, "model": model})
    found = audit(write_byte_tokenizer(moved, tmp_path / "a"), byte_base, **FEW)
    assert "old pieces keep ids, merges and flags" in broken(found)


def test_kinds_are_not_mixed_and_odd_files_are_one_line(cli, byte_base, ours, tmp_path):
    for name, model in (
        ("unigram", dict(type="Unigram", vocab={}, merges=[])),
        ("holes", dict(type="BPE", vocab={"a": 0}, merges=[["b", "c"]])),
        ("text", dict(type="BPE", vocab={"a": "0"}, merges=[])),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(model=model)))
    for theirs, base, says in (
        (ours, byte_base, "is a sentencepiece model, its base a tokenizer.json"),
        (byte_base, "mixtral", "is a tokenizer.json, its base a sentencepiece model"),
        (tmp_path / "unigram.json", byte_base, "is a Unigram tokenizer"),
        (tmp_path / "holes.json", byte_base, "tokenizers cannot read it"),
        (tmp_path / "text.json", byte_base, "vocab.a is '0'"),
        (byte_base, byte_base, "expected an extension"),
    ):
        status, err = cli("audit", theirs, "--base", base)
        assert status == 2 and len(err) == 1 and says in err[0], err
