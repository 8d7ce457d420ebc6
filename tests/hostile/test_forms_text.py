"Any JSON, any bytes, any field: text, tables, models and questions are read, or refused in words."

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmixtral_nb.documents import read_docs
from cmixtral_nb.exams import csv_rows, hellaswag_row
from cmixtral_nb.lexicons import read_lexicon
from cmixtral_nb.pieces import base_tokenizer_model, read_model, read_pieces
from cmixtral_nb.stages import StageError
from cmixtral_nb.tokenizer_files import processor, read_bpe

FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
any_text = st.text(st.characters(), max_size=30)  # halves of surrogate pairs among them
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=12,
)


def fields(*names):
    "Objects in which some of these fields hold any JSON"
    return st.dictionaries(st.sampled_from(names), any_json, max_size=len(names))


@FEW
@given(st.lists(any_json | fields("text", "source", "content"), max_size=6))
def test_any_json_as_lines_of_a_corpus(tmp_path, values):
    "Each line is a document or is counted, and what comes out can be written"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    counts: Counter[str] = Counter()
    rows = list(read_docs(path, counts=counts))
    assert len(rows) + counts.total() == len(values)
    for row in rows:
        (row["text"] + row["source"]).encode()


@FEW
@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".txt", ".gz", ".xz", ".zst", ".bz2"]))
def test_any_bytes_as_a_corpus(tmp_path, data, ending):
    path = tmp_path / (f"a.jsonl{ending}" if ending[1] in "gxzb" else f"a{ending}")
    path.write_bytes(data)
    try:
        for row in read_docs(path):
            (row["text"] + row["source"]).encode()
    except StageError as e:
        if "is UTF-16" not in str(e):
            assert "cannot be read to its end" in str(e)
            assert ending not in (".jsonl", ".txt")


@FEW
@given(any_json | fields("ctx", "endings", "label", "ctx_a", "ctx_b", "activity_label"))
def test_any_json_as_a_question_of_hellaswag(value):
    try:
        row = hellaswag_row(value)
    except ValueError:
        return
    assert len(row["endings"]) == 4 and row["label"] in list("0123")
    assert all(isinstance(row[name], str) for name in ("activity_label", "ctx_a", "ctx_b"))


@FEW
@given(
    st.text(st.sampled_from('ABCDE,";\n\r\t\0x問'), max_size=60), st.sampled_from(["cmmlu", "mmlu"])
)
def test_any_text_as_a_table_of_questions(text, benchmark):
    try:
        rows = csv_rows(text, benchmark)
    except ValueError:
        return
    for row in rows:
        assert row.get("Answer", "A") in list("ABCD") and row.get("answer", 0) in range(4)


@FEW
@given(st.text(st.sampled_from("中国<s>[]\t\n -1.en0piecescore"), max_size=60), st.booleans())
def test_any_text_as_a_table_of_pieces(tmp_path, text, has_head):
    path = tmp_path / "p.tsv"
    path.write_text(("piece\tscore\tcount\n" if has_head else "") + text)
    try:
        pieces = read_pieces(path)
    except StageError:
        return
    texts = [p.piece for p in pieces]
    assert texts and len(set(texts)) == len(texts) and all(p.count >= 0 for p in pieces)


@FEW
@given(st.binary(max_size=80) | st.text(st.sampled_from("中国 \t\n59x"), max_size=40))
def test_any_text_as_a_word_list(tmp_path, content):
    path = tmp_path / "words.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        words = read_lexicon(path)
    except StageError:
        return
    assert words and all(0 < count < 10**15 for count in words.values())


# ---- sentencepiece models


@pytest.fixture(scope="module")
def small():
    "Control pieces, bytes and the first hundred words of Mixtral's"
    model = read_model(base_tokenizer_model())
    del model.pieces[359:]
    return model.SerializeToString()


def settable(message):
    "The fields of a protobuf message that hold one number, text or switch"
    return [f for f in message.DESCRIPTOR.fields if f.type != f.TYPE_MESSAGE and not is_list(f)]


def is_list(field):
    try:
        return field.is_repeated
    except AttributeError:  # of protobuf before 6
        return field.label == field.LABEL_REPEATED


def odd_value(field):
    "Values that a field of this type may hold"
    if field.type == field.TYPE_ENUM:
        return st.sampled_from([value.number for value in field.enum_type.values])
    return {
        field.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 400),
        field.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
        field.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
        field.CPPTYPE_FLOAT: st.floats(width=32),
        field.CPPTYPE_BOOL: st.booleans(),
        field.CPPTYPE_STRING: (
            st.binary(max_size=40) if field.type == field.TYPE_BYTES else st.text(max_size=9)
        ),
    }[field.cpp_type]


@settings(FEW, max_examples=150)
@given(st.data())
def test_any_field_of_a_base(tmp_path, small, data):
    "Refused in words, or a model that cuts text"
    from sentencepiece import sentencepiece_model_pb2 as pb

    model = pb.ModelProto.FromString(small)  # type: ignore[attr-defined]  # made when it is imported
    places = [model.trainer_spec, model.normalizer_spec, model.denormalizer_spec]
    places += [model.pieces[i] for i in (0, 1, 2, 3, 258, 259, 358)]
    for _ in range(data.draw(st.integers(1, 3))):
        message = data.draw(st.sampled_from(places))
        field = data.draw(st.sampled_from(settable(message)), label="field")
        setattr(message, field.name, data.draw(odd_value(field), label=field.name))
    path = tmp_path / "bad.model"
    path.write_bytes(model.SerializePartialToString())
    try:
        sp = processor(read_bpe(path))
    except StageError:
        return
    assert sp.encode("中国 the a\n") and sp.decode(sp.encode("the")) is not None


@FEW
@given(st.binary(max_size=200))
def test_any_bytes_as_a_model(tmp_path, data):
    path = tmp_path / "bad.model"
    path.write_bytes(data)
    with pytest.raises(StageError):
        read_bpe(path)


@FEW
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
def test_any_bytes_inside_a_model(tmp_path, small, at, data):
    path, at = tmp_path / "bad.model", at % len(small)
    path.write_bytes(small[:at] + data + small[at + len(data) :])
    try:
        sp = processor(read_bpe(path))
    except StageError:
        return
    assert sp.encode("中国 the a\n")
