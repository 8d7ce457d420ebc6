"Extensions of a byte-level base: what no text may notice, for any script and any text."

import functools
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmixtral_nb.byte_bases import (
    ByteBase,
    SpacedBase,
    merge_of,
    read_byte_base,
    tekken,
    to_bytes,
    to_letters,
)
from cmixtral_nb.bytelevel import (
    OwnBytes,
    code_points,
    count_words,
    extended,
    learn_merges,
    own_characters,
    repaired,
)
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.stages import StageError
from cmixtral_nb.tokenizer_files import build_fast

SCRIPTS = ["Khmer", "Georgian", "Thai", "Tibetan", "Hangul", "Han Kana", "Ethiopic"]
BASES = [f"tekken {script}" for script in SCRIPTS]
BASES += [f"spaced {script}" for script in ("Khmer", "Tibetan", "Han Kana")]


@functools.cache
def spaced() -> SpacedBase:
    "A base of Gemma's kind: Mixtral's tokenizer as a tokenizer.json"
    return SpacedBase(json.loads(build_fast(base_tokenizer_model()).to_str()))


def texts_of(own, seed):
    "Texts of random characters of a script, from a small set so that pairs repeat"
    rng = random.Random(seed)
    some = rng.sample(sorted(own.characters), 30)
    return [" ".join("".join(rng.choices(some, k=6)) for _ in range(40)) for _ in range(20)]


@pytest.fixture(scope="module", params=BASES)
def extension(request):
    "A script, a base, and the base with 200 merges of the script"
    kind, _, script = request.param.partition(" ")
    base, own = tekken() if kind == "tekken" else spaced(), OwnBytes(own_characters(script))
    words = count_words(base, texts_of(own, 0), own)
    merges = learn_merges(words, base.bytes_of, own.in_bytes, 200)
    assert len(merges) > 50
    assert any(not merge.left for merge in merges) == (kind == "spaced")
    return own, base, extended(base, merges), merges


def ids(base, text):
    return base.tok.encode(text, add_special_tokens=False).ids


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_text_without_own_characters_keeps_its_ids(extension, text):
    own, base, grown, _ = extension
    if not own.in_text(text):
        assert ids(grown, text) == ids(base, text)
    if isinstance(base, SpacedBase) and "▁" in text:
        return  # there it cannot be told from a blank
    assert grown.tok.decode(ids(grown, text), skip_special_tokens=False) == text


def test_neighbours_of_the_script_keep_their_ids(extension):
    "Characters whose UTF-8 begins as own ones do: where a bare beginning would be seen"
    own, base, grown, _ = extension
    rng = random.Random(1)
    first = {char.encode()[:1] for char in own.characters if len(char.encode()) > 1}
    near = [chr(c) for lead in sorted(first) for c in code_points(lead) if not 0xD800 <= c < 0xE000]
    others = [char for char in near if not own.in_text(char)]
    texts = ["".join(rng.choices(others, k=8)) for _ in range(2000)] if others else []
    assert [ids(grown, text) for text in texts] == [ids(base, text) for text in texts]


def test_every_new_piece_is_reached_and_is_made_once(extension):
    own, base, grown, merges = extension
    model = grown.config["model"] | {"ignore_merges": False}
    by_merges = replace(grown, config=grown.config | {"model": model})
    made = [merge.left + merge.right for merge in merges]
    assert len({*made}) == len(made) and not {*made} & {*base.bytes_of.values()}
    for i, raw in enumerate(made, base.first_free):
        assert [token.id for token in by_merges.tok.model.tokenize(grown.spelled(raw))] == [i]
        assert own.in_bytes(raw)


def test_every_beginning_of_the_merges_undoes_the_rest(extension):
    "The tokens of a prefix are those of the whole list with later pieces taken apart"
    own, base, grown, merges = extension
    half = extended(base, merges[: len(merges) // 2])
    parts = {merge.left + merge.right: (merge.left, merge.right) for merge in merges}
    for text in texts_of(own, 2):
        tokens = [grown.bytes_of[i] for i in ids(grown, text)]
        for merge in reversed(merges[len(merges) // 2 :]):
            whole = merge.left + merge.right
            pieces = parts[whole] if merge.left else [whole[i : i + 1] for i in range(len(whole))]
            tokens = [part for raw in tokens for part in (pieces if raw == whole else [raw])]
        assert tokens == [half.bytes_of[i] for i in ids(half, text)]


def test_a_lacking_character_saves_the_tokens_that_its_count_says():
    "An entry is worth its bytes less one, each time; the rarest of all are left in bytes"
    base, own = spaced(), OwnBytes(own_characters("Ethiopic"))
    train = ["ሀ ሀ ሀ ለ ለ é ሐ"]
    merges = learn_merges(count_words(base, train, own), base.bytes_of, own.in_bytes, 10)
    entries = {merge.right.decode(): merge.count for merge in merges if not merge.left}
    assert entries == {"ሀ": 3, "ለ": 2}
    before, after = (len(ids(one, train[0])) for one in (base, extended(base, merges[:2])))
    assert [merge.right.decode() for merge in merges[:2]] == ["ሀ", "ለ"]
    assert before - after == 3 * 2 + 2 * 2


def test_a_rule_that_allows_all_changes_other_texts():
    "The promise is not empty: without the rule, bytes within characters become pieces"
    base, own = tekken(), OwnBytes(own_characters("Khmer"))
    words = count_words(base, ["ក ខ គ ឃ ង"] * 5, own)
    careless = extended(base, learn_merges(words, base.bytes_of, lambda raw: True, 50))
    careful = extended(base, learn_merges(words, base.bytes_of, own.in_bytes, 50))
    others = [chr(code) for code in range(0x3400, 0x4E00)]  # rare Chinese characters
    assert any(ids(careless, char) != ids(base, char) for char in others)
    assert not any(ids(careful, char) != ids(base, char) for char in others)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=40))
def test_letters_are_bytes(raw):
    assert to_bytes(to_letters(raw)) == raw


def test_a_merge_is_found_again_from_ranks():
    base = tekken()
    rank_of = {raw: i for i, raw in base.bytes_of.items()}
    vocab = base.config["model"]["vocab"]
    for left, right in random.Random(0).sample(base.config["model"]["merges"], 500):
        raw = to_bytes(left + right)
        assert merge_of(raw, rank_of) == [to_bytes(left), to_bytes(right)]
        assert vocab[left + right] > max(vocab[left], vocab[right])


def test_repair_changes_no_text_without_own_marks():
    base, own = tekken(), OwnBytes(own_characters("Khmer"))
    config = json.loads(json.dumps(base.config))
    letters = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    config["pre_tokenizer"] = letters
    gpt2 = ByteBase(config)
    mended = repaired(gpt2, own)
    assert mended is not None
    rng = random.Random(3)
    chars = [chr(rng.randint(32, 0xD7FF)) for _ in range(3000)] + list(" \n\t'") * 300
    for _ in range(3000):
        text = "".join(rng.choices(chars, k=10))
        if not own.in_text(text):
            assert ids(mended, text) == ids(gpt2, text)
    assert len(mended.tok.pre_tokenizer.pre_tokenize_str("សាសនា")) == 1
    assert len(gpt2.tok.pre_tokenizer.pre_tokenize_str("សាសនា")) > 1


@settings(max_examples=100, deadline=None)
@given(
    model=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=8,
    )
)
def test_any_json_as_a_tokenizer_is_one_line(tmp_path_factory, model):
    file = tmp_path_factory.getbasetemp() / "any.json"
    for found in (model, {"model": model}, {"model": {"type": "BPE", "vocab": model}}):
        file.write_text(json.dumps(found))
        with pytest.raises(StageError) as e:
            read_byte_base(file)
        assert all("\n" not in line for line in e.value.args)
