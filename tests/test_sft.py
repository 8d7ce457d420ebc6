"What the chapter on fine-tuning does not show: bad files, hostile words, killed runs"

import codecs
import gzip
import hashlib
import json
import lzma
import re
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cmixtral_nb import finetuning
from cmixtral_nb import sft as s
from cmixtral_nb.byte_bases import tekken
from cmixtral_nb.chat_tokenizer import (
    BEGIN,
    END,
    FORMS,
    PAD,
    ColouredTokens,
    chat_tokenizer,
    form_of,
    write_chat_tokenizer,
)
from cmixtral_nb.conversations import Faults, read_conversations, to_messages
from cmixtral_nb.machine import package_data
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.stages import StageError
from cmixtral_nb.tokenizer_files import encode_plain, load_tokenizer, write_tokenizer
from cmixtral_nb.training import saved_checkpoints

TALK = [dict(role="user", content="你好"), dict(role="assistant", content="你好！")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import torch
    from transformers import MixtralForCausalLM

    from cmixtral_nb.mixtral import small_config

    torch.manual_seed(0)
    d = write_tokenizer(base_tokenizer_model("mixtral"), tmp_path_factory.mktemp("model"))
    MixtralForCausalLM(small_config(128, 1, 2, 2, 256, 2, 1, 32000, 256, 0.02)).save_pretrained(d)
    return d


@pytest.fixture(scope="module")
def tok(model, tmp_path_factory):
    return write_chat_tokenizer(model, tmp_path_factory.mktemp("tok"))


@pytest.fixture(scope="module")
def bpe(model):
    return s.load_bpe(model)


@pytest.fixture(scope="module", params=sorted(FORMS))
def either(request, model):
    return chat_tokenizer(load_tokenizer(model), request.param)


def read(path, **kw):
    counts = Faults()
    return list(read_conversations(str(path), counts=counts, **kw)), dict(counts)


def rendered_ids(tok, talk):
    "The ids of the finished text, as an engine makes them"
    text = tok.apply_chat_template(talk, tokenize=False)
    return tok(text, add_special_tokens=False)["input_ids"]


def control_tokens(tok, ids):
    control = {0, 1, 2, *tok.all_special_ids}
    return [tok.convert_ids_to_tokens(i) for i in ids if i in control]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=20),
        min_size=1,
        max_size=5,
    )
)
def test_ids_and_mask_are_those_of_the_template(either, texts):
    talk = [dict(role=("user", "assistant")[i % 2], content=t) for i, t in enumerate(texts)]
    want = either.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = s.encode_chat(either, talk)
    assert ids == want["input_ids"] and mask == want["assistant_masks"]
    assert either(s.decode_chat(either, ids), add_special_tokens=False)["input_ids"] == ids


MARKS = [mark for form in FORMS.values() for mark in (form.begin, form.end)]
OF_ANY_LANGUAGE = ["助手", "assistant\n", "ជំនួយការ", "助手はい", "ассистент", "trợ lý", "مساعد"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([*MARKS, PAD, "<s>", "</s>", "<unk>", "\n", "x", " ", *OF_ANY_LANGUAGE]),
        max_size=8,
    ).map("".join)
)
def test_no_word_becomes_control(either, text):
    "Neither in our encoding, letter by letter, nor in the template's text, which engines read"
    form = form_of(either)
    talk = [dict(role=r, content=text) for r in ("system", "user", "assistant")]
    ids, mask = s.encode_chat(either, talk)
    assert control_tokens(either, ids) == ["<s>"] + [form.begin, form.end] * 3
    answer = [i for i, m in zip(ids, mask, strict=True) if m]
    head = form.roles["assistant"] + "\n"
    n_head = len(encode_plain(either, [head])[0])
    assert answer[:-1] == encode_plain(either, [head + text])[0][n_head:]
    assert answer[-1] == either.eos_token_id
    assert control_tokens(either, rendered_ids(either, talk)) == control_tokens(either, ids)


def test_ten_thousand_hostile_messages(tok):
    """No control token that the form did not write, and no character lost.

    Where nobody typed a control token, the template's text has the same ids."""
    from cmixtral_nb.certificate import hostile_texts

    own = [BEGIN, END, PAD, "<s>", "</s>", "<unk>"]
    others = ["<|im_end|>", "[INST]", "[/INST]", f"{END}\n{BEGIN}系统\n"]
    parts = ["<", "|>", "<|endof", "utterance|>", "<</s>s>", "<s></s>"]
    texts = hostile_texts(10_000, own + others + parts + ["请", "你好", " the"])
    roles = [["user"], ["user", "assistant"], ["system", "user", "assistant"]]
    bad = []
    for k, text in enumerate(texts):
        talk = [dict(role=role, content=text) for role in roles[k % 3]]
        want = ["<s>"] + [BEGIN, END] * len(talk)
        ours = s.encode_chat(tok, talk)[0]
        theirs = rendered_ids(tok, talk)
        typed = any(mark in text for mark in own)
        same = typed or ours == theirs
        if not same or any(control_tokens(tok, ids) != want for ids in (ours, theirs)):
            bad.append(text)
    assert len(texts) == 10_000 and not bad, bad[:3]
    assert sum(any(mark in text for mark in own) for text in texts) > 4000


def test_every_added_token_in_every_role(model, tmp_path):
    "Tokens of others, too: the template knows all that the tokenizer has"
    tok = load_tokenizer(model)
    tok.add_tokens(["[INST]", "secret"], special_tokens=True)
    tok.add_tokens(["<tool>"])
    chat_tokenizer(tok)
    added = {i: t.content for i, t in tok.added_tokens_decoder.items()}
    base = {"<s>", "</s>", "<unk>", "[INST]", "secret", "<tool>"}
    assert set(added.values()) == base | {BEGIN, END, PAD}
    marks = ["<s>"] + [BEGIN, END] * 3
    for t in added.values():
        talk = [dict(role=r, content=f"a{t}b {t}") for r in ("system", "user", "assistant")]
        found = [added[i] for i in rendered_ids(tok, talk) if i in added]
        assert [name for name in found if name != "<tool>"] == marks, t
        # what is no special token is text and stays as it is, here as in training
        trained = [added.get(i) for i in encode_plain(tok, [talk[0]["content"]])[0]]
        assert found.count("<tool>") == 3 * trained.count("<tool>"), t


def test_words_in_parts(either):
    "Some clients send a list of parts; here, too, words stay words"
    parts = [
        dict(role="user", content=[dict(type="text", text="a</s>"), dict(type="text", text="b")])
    ]
    whole = [dict(role="user", content="a</s>\nb")]
    text = either.apply_chat_template(parts, tokenize=False)
    assert text == either.apply_chat_template(whole, tokenize=False)
    assert "</s>" not in text


@pytest.mark.parametrize(
    "roles,says",
    [
        (["tool"], "unknown role tool, expected system, user or assistant"),
        (["user", "user"], "two turns of user in a row"),
    ],
)
def test_the_template_refuses(tok, roles, says):
    import jinja2

    with pytest.raises(jinja2.exceptions.TemplateError, match=says):
        tok.apply_chat_template([dict(role=r, content="x") for r in roles], tokenize=False)


def test_colours_are_the_mask(tok):
    ids, mask = s.encode_chat(
        tok, [dict(role="user", content="<b>\n你好"), dict(role="assistant", content="好\n<i>")]
    )
    page = ColouredTokens(tok, ids, mask)._repr_html_()
    assert page.count("#bfe3c0") == sum(mask)
    assert page.count("#ddd") == 4
    assert "<" not in re.sub("</?(div|span|br)[^>]*>", "", page)


def test_bpe_dropout_cuts_only_words(tok, model):
    cut = s.dropout_encoder(s.load_bpe(model), 0.5, 3)
    talk = [
        dict(role="user", content="Please translate: the quick brown fox\nand more"),
        dict(role="assistant", content="Every word of it is here\nand there."),
    ]
    ids, mask = s.encode_chat(tok, talk, encode=cut)
    plain, _ = s.encode_chat(tok, talk)
    assert len(ids) > len(plain) and len(ids) == len(mask)
    assert tok.decode(ids) == tok.decode(plain)
    answer = tok.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert answer.removesuffix(END).strip() == talk[1]["content"]


@settings(max_examples=150, deadline=None)
@given(
    st.text(
        st.one_of(
            st.characters(codec="utf-8", exclude_characters="▁"), st.sampled_from("the  ab你好\n。")
        ),
        max_size=40,
    )
)
def test_without_dropout_merges_are_those_of_sentencepiece(bpe, text):
    assert bpe(text) == bpe.sp.encode(text)


@pytest.fixture(scope="module")
def pairs():
    tok = tekken().tok
    return s.PairBPE(tok), tok


@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("the  ab's19\n。ភាសា"))))
def test_without_dropout_pairs_are_those_of_the_library(pairs, text):
    bpe, tok = pairs
    ids = bpe(text)
    assert ids == tok.encode(text, add_special_tokens=False).ids
    assert tok.decode(bpe(text, 0.5, 1)) == tok.decode(ids)


def test_dropout_is_the_same_everywhere(bpe):
    "A number that another process has to find, too"
    text = "the quick brown fox jumps over the lazy dog"
    cuts = str([bpe(text, 0.3, k) for k in range(20)])
    assert hashlib.sha256(cuts.encode()).hexdigest()[:8] == "6032e1c2"
    kept = [bpe(text, 0.5, k, keep=9) for k in range(9)]
    assert all(ids[:2] == bpe(text)[:2] for ids in kept) and len({str(k) for k in kept}) > 5


def test_every_form(tmp_path):
    rows = [
        dict(
            conversations=[
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"},
            ]
        ),
        dict(messages=TALK),
        dict(instruction="q", input="i", output="o", history=[["a", "b"]], system="s"),
        dict(
            conversation=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ),
    ]
    lines = "\n\n".join(map(json.dumps, rows)).encode()
    for name, data in (
        ("a.json", json.dumps(rows, indent=1).encode()),
        ("a.jsonl.xz", lzma.compress(lines)),
        ("a.jsonl.zst", pa.compress(lines, codec="zstd", asbytes=True)),
    ):
        (tmp_path / name).write_bytes(data)
        talks, counts = read(tmp_path / name)
        assert not counts and [[m["role"][0] for m in t] for t in talks] == [
            list("sua"),
            list("ua"),
            list("suaua"),
            list("ua"),
        ]
        assert talks[2][3]["content"] == "q\ni" and talks[0][-1]["content"] == "b"


def test_the_system_prompt_is_kept_wherever_it_stands():
    system = dict(role="system", content="s")
    said = [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}]
    beside = dict(system="s", conversations=said)
    assert to_messages(beside) == to_messages(dict(beside, system=[dict(text="s")]))
    assert to_messages(beside) == [system, *TALK]
    empties: list[Any] = ["", " ", None, []]
    for empty in empties:
        first = dict(system, content=empty)
        assert to_messages(dict(messages=[first, *TALK])) == TALK
        assert to_messages(dict(system="s", messages=[first, *TALK])) == [system, *TALK]
        assert to_messages(dict(system=empty, instruction="你好", output="你好！")) == TALK
    with pytest.raises(ValueError, match="content that is no text"):
        to_messages(dict(system=3, messages=TALK))
    with pytest.raises(ValueError, match="no answer"):
        to_messages(dict(messages=[dict(system, content="")]))


def line(roles="", contents=(), **more):
    "A line of OpenAI's form; roles by their first letters"
    names = dict(u="user", a="assistant", t="tool", s="system")
    turns = [
        dict(role=names[role], content=words) for role, words in zip(roles, contents, strict=True)
    ]
    return json.dumps(more or dict(messages=turns)).encode()


@pytest.mark.parametrize(
    "row,reason",
    [
        (b'{"messages": [', "invalid JSON"),
        (b'{"a": ' + b"[" * 100_000, "invalid JSON"),
        (b"\xff{}", "invalid UTF-8"),
        (b"[1]x", None),
        (b"[" * 100_000, None),
        (b"3", "not an object"),
        (line(text="a"), "unknown form"),
        (line("u", "a"), "no answer"),
        (line("t", "a"), "unknown role 'tool'"),
        (line(messages=[dict(role=["user"], content="a")]), r"unknown role \"\['user'\]\""),
        (line(messages=[dict(role={}, content="a")]), r"unknown role '{}'"),
        (line("ua", [None, "a"]), "empty turn of user"),
        (line("a", "a"), "begins with assistant"),
        (line(instruction="a", output=""), "empty answer"),
        (line("uua", "aaa"), "two turns of user in a row"),
        (line("usa", "aaa"), "turns do not alternate"),
        (line(messages="hello"), "turns that are no list of objects"),
        (line(messages=[3]), "turns that are no list of objects"),
        (line("ua", [{"a": 1}, "a"]), "content that is no text"),
        (line("ua", ["\ud800", "a"]), "half a character"),
        (line("ua", ["a", "长" * 1_000_001]), "more than 1,000,000 characters"),
        (line(instruction=3, output="a"), "content that is no text"),
        (line(instruction="a", output="a", history=5), "history that is no list of pairs"),
        (line(instruction="a", output="a", history=[["b"]]), "history that is no list of pairs"),
    ],
)
def test_bad_rows_are_counted_or_stop(row, reason, tmp_path):
    f = tmp_path / "a.jsonl"
    if reason is None:
        f.write_bytes(row)
        with pytest.raises(StageError, match="not valid JSON"):
            read(f)
        return
    f.write_bytes(json.dumps(dict(messages=TALK)).encode() + b"\n" + row + b"\n")
    read_talks, counts = read(f)
    assert read_talks == [TALK] and list(counts.values()) == [1]
    assert re.fullmatch(reason, *counts)
    with pytest.raises(StageError, match=f"a.jsonl:2: {reason}; correct this entry"):
        read(f, on_error="stop")


def test_forms_and_faults_are_counted_file_by_file(model, tmp_path, capsys):
    "All faults of all files at once, with their lines; or a line for each file"
    tok = chat_tokenizer(load_tokenizer(model))
    parts = [dict(type="text", text="一"), dict(type="text", text="二")]
    lines = [
        dict(messages=TALK),
        dict(messages=[dict(role="user", content=parts), TALK[1]]),
        dict(instruction="a", output="b"),
        dict(x=1),
        dict(x=2),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    records = [dict(conversations=sharegpt), dict(messages=TALK), 7]
    (tmp_path / "b.json").write_text(json.dumps(records))
    encode = partial(s.encode_chat, tok)
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.json")]
    talks = finetuning.select_talks(files, encode, "skip", 0, 64, 0)
    assert talks.sources == {
        files[0]: dict(OpenAI=2, Alpaca=1),
        files[1]: dict(ShareGPT=1, OpenAI=1),
    }
    assert talks.train[1][0]["content"] == "一\n二"
    assert talks.dropped == {"unknown form": 2, "not an object": 1, "repeated": 1}
    encoded = [s.encode_chat(tok, talk) for talk in talks.train]
    assert talks.n_tokens == sum(len(ids) for ids, _ in encoded)
    assert talks.n_answer_tokens == sum(sum(mask) for _, mask in encoded)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"sft: {files[0]}: 2 OpenAI, 1 Alpaca; dropped: unknown form 2 (line 4, 5)",
        f"sft: {files[1]}: 1 ShareGPT, 1 OpenAI; dropped: not an object 1 (line 3), repeated 1",
    ]
    with pytest.raises(StageError) as e:
        finetuning.select_talks(files, encode, "stop", 0, 64, 0)
    assert [fault.split("; ")[0] for fault in e.value.args] == [
        f"{files[0]}:4: unknown form",
        f"{files[0]}:5: unknown form",
        f"{files[1]}:3: not an object",
    ]
    (tmp_path / "d.jsonl").write_text("{}\n" * 50)
    with pytest.raises(StageError, match="and 30 more"):
        finetuning.select_talks([str(tmp_path / "d.jsonl")], encode, "stop", 0, 64, 0)


def test_a_list_with_a_byte_order_mark(tmp_path):
    f = tmp_path / "a.json"
    f.write_bytes(codecs.BOM_UTF8 + json.dumps([dict(messages=TALK), {}]).encode())
    assert read(f) == ([TALK], {"unknown form": 1})
    with pytest.raises(StageError, match="a.json:2: unknown form; correct this entry"):
        read(f, on_error="stop")


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_file_that_is_cut_off(compress, as_list, tmp_path):
    talks = [[dict(role="user", content=str(i)), TALK[1]] for i in range(2000)]
    lines = [json.dumps(dict(messages=talk)) for talk in talks]
    text = f"[{','.join(lines)}]" if as_list else "\n".join(lines)
    packed = compress(text.encode())
    f = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.xz")
    f.write_bytes(packed)
    assert read(f) == (talks, {})
    f.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(StageError, match=f"{f}: cannot be read to its end .*download it again"):
        read(f)


def test_a_long_talk_is_not_measured(model):
    "Bits of a part over the bytes of the whole would be too few; training reads a part"
    tok = chat_tokenizer(load_tokenizer(model))
    talk = [TALK[0], dict(role="assistant", content="长" * 100)]
    n = len(s.encode_chat(tok, talk)[0])
    encode = partial(s.encode_chat, tok)
    measured, dropped, trained = (finetuning.Selection() for _ in range(3))
    assert measured.add(talk, encode, n, 0.999) == "" and measured.valid == [talk]
    assert dropped.add(talk, encode, n - 1, 0.999) == "held out, but longer than length"
    assert dropped.valid == dropped.train == []
    assert trained.add(talk, encode, n - 1, 0) == "" and trained.train == [talk]
    assert trained.n_tokens == n - 1

    from cmixtral_nb.loading import load_model

    net = load_model(model)
    net.resize_token_embeddings(len(tok))
    assert s.answer_bits(net, tok, [talk], n) > 1
    with pytest.raises(StageError, match=f"has {n} tokens, expected at most length, {n - 1}"):
        s.answer_bits(net, tok, [talk], n - 1)


def test_a_megabyte_in_one_message(model):
    "Too long to answer within the length: dropped and counted; as an answer it is cut"
    tok, big = chat_tokenizer(load_tokenizer(model)), "长" * 350_000
    read_talks = [
        [dict(role="user", content=big), TALK[1]],
        [TALK[0], dict(role="assistant", content=big)],
        TALK,
    ]
    with patch.object(finetuning, "read_conversations", lambda *a: iter(read_talks)):
        talks = finetuning.select_talks(["builtin"], partial(s.encode_chat, tok), "skip", 0, 256, 0)
    assert talks.train == read_talks[1:]
    assert talks.dropped == {"no answer within length": 1}
    assert talks.n_tokens < 512
    batch = s.collate_chat([s.encode_chat(tok, talk) for talk in talks.train], 256)
    assert batch["input_ids"].shape[1] < 512


def test_a_chat_model_keeps_its_rows(model, tmp_path):
    "Tuned a second time, in the same form, the marks start from the rows they have"
    from cmixtral_nb.merge import merge

    kw = dict(
        conversations=["builtin:handwritten"],
        rank=2,
        alpha=4,
        steps=1,
        batch=1,
        accumulation=1,
        length=64,
        valid_share=0,
        lr=1e-9,
        device="cpu",
        load_in_4bit=False,
        neftune=0.0,
    )
    from safetensors.torch import load_file, save_file

    one = merge(model, adapter=s.sft(model, out=tmp_path / "a", **kw), out=tmp_path / "chat")
    f = next((tmp_path / "chat").glob("*.safetensors"))
    w = load_file(f)
    d = tmp_path / "mine"
    d.mkdir()
    for x in (tmp_path / "chat").iterdir():
        if x.name not in (f.name, "manifest.json"):
            (d / x.name).write_bytes(x.read_bytes())
    for k in ("model.embed_tokens.weight", "lm_head.weight"):
        w[k][32000:] = 7.0
    save_file(w, d / f.name, metadata=dict(format="pt"))
    two = load_file(s.sft(d, out=tmp_path / "b", **kw) / "adapter_model.safetensors")
    assert one.kind and all(
        (v[32000:] - 7).abs().max() < 1e-3 and v.shape[0] == 32003
        for k, v in two.items()
        if "embed_tokens" in k or "lm_head" in k
    )


def test_what_ships_is_whole():
    talks, counts = read("builtin")
    assert not counts and len(talks) == 2067 and len({json.dumps(t) for t in talks}) == len(talks)
    lines = package_data("data/conversations.jsonl").read_text().splitlines()
    assert all(json.loads(line)["licence"] == "CC0-1.0" for line in lines)


def test_the_end_is_learned_and_the_label_is_the_next_token(tok):
    ids, mask = s.encode_chat(tok, TALK)
    b = s.collate_chat([(ids, mask), (ids + ids[1:], mask + mask[1:])], 1000)
    assert (b["labels"] == tok.eos_token_id).sum() == 3
    assert b["input_ids"].shape == (1, 3 * len(ids) - 1)
    assert b["position_ids"][0].tolist() == [*range(len(ids)), *range(2 * len(ids) - 1)]
    counted = b["labels"] != -100
    assert (b["labels"][counted] == b["input_ids"][counted]).all()
    assert (b["input_ids"][0][b["logits_to_keep"] + 1] == b["shift_labels"][0]).all()
    assert b["shift_labels"].shape[1] == 3 * sum(mask)
    assert s.collate_chat([(ids, mask)] * 2, 4)["input_ids"].shape == (1, 8)


def test_every_conversation_is_read_once_a_round(tok):
    talks = [[dict(role="user", content=str(i)), TALK[1]] for i in range(7)]
    r = s.Rounds(talks, tok, None, 21, seed=4)
    each_once = sorted(str(s.encode_chat(tok, talk)) for talk in talks)
    for first in (0, 7, 14):
        assert sorted(str(r[k]) for k in range(first, first + 7)) == each_once
    assert r.order(0) != r.order(1)
    assert r.order(0) == s.Rounds(talks, tok, None, 1, seed=4).order(0)
    assert r.order(0) != s.Rounds(talks, tok, None, 1, seed=5).order(0)


def test_dropout_leaves_an_answer_within_length(tok, bpe):
    "A question that dropout makes longer than `length` is cut as ever"
    question = "How long may a question be until nothing is read of its answer? " * 3
    talk = [dict(role="user", content=question), TALK[1]]
    ids, mask = s.encode_chat(tok, talk)
    length = mask.index(1) + 1  # one token of the answer
    cut = s.Rounds([talk], tok, bpe, 20, bpe_dropout=0.3, length=length)
    assert all(any(cut[k][1][:length]) for k in range(20))
    assert cut[0] == (ids, mask)
    free = s.Rounds([talk], tok, bpe, 20, bpe_dropout=0.3)
    assert not any(any(free[k][1][:length]) for k in range(20))


def test_the_loss_may_count_prompts_too(tok):
    "All tokens but the first of each conversation, before which is nothing; the same are read"
    talks = [[dict(role="user", content=str(i)), TALK[1]] for i in range(7)]
    on_answers, on_all = (
        [s.Rounds(talks, tok, None, 3, seed=4, loss_on=loss_on)[k] for k in range(3)]
        for loss_on in ("answers", "all")
    )
    assert [ids for ids, _ in on_answers] == [ids for ids, _ in on_all]
    b = s.collate_chat(on_all, 1000)
    firsts = (b["position_ids"] == 0).nonzero()[:, 1]
    assert len(firsts) == 3 and (b["labels"][0][firsts] == -100).all()
    assert (b["labels"] != -100).sum() == b["labels"].numel() - 3
    assert b["logits_to_keep"].tolist() == [
        i for i in range(b["labels"].numel() - 1) if i + 1 not in firsts
    ]


def test_both_losses_are_measured_alike(model, tmp_path):
    "The same conversations and the same bits before training; other weights after it"
    kw: dict[str, Any] = dict(rank=2, alpha=4, lr=1e-2, steps=2, batch=2, accumulation=1, length=96)
    kw |= dict(valid_share=0.2, eval_every=2, load_in_4bit=False, neftune=0, bpe_dropout=0)
    kw |= dict(conversations=[own_file(tmp_path, KHMER)], lang="km", kept=["en"], device="cpu")
    with patch.object(s, "answer_bits", wraps=s.answer_bits) as measured:
        on_answers, on_all = (
            s.sft(model, out=tmp_path / loss_on, loss_on=loss_on, **kw)
            for loss_on in ("answers", "all")
        )
    assert all(call.kwargs["batch"] == 2 for call in measured.call_args_list)  # as in training
    assert on_all.manifest["params"]["loss_on"] == "all"
    for count in ("n_conversations", "n_valid", "n_tokens", "n_answer_tokens"):
        assert on_answers.stats[count] == on_all.stats[count]
    bits = [made.stats["bpb"]["answers"] for made in (on_answers, on_all)]
    assert bits[0]["before"] == bits[1]["before"] and bits[0]["after"] != bits[1]["after"]


def test_every_fault_at_once(model, tmp_path):
    with pytest.raises(StageError) as e:
        s.sft(
            tmp_path / "none",
            out=tmp_path / "o",
            conversations=["no.jsonl", "builtin:x"],
            rank=0,
            dropout=1.0,
            lr=0.0,
            batch=0,
            accumulation=0,
            epochs=0,
            length=3,
            neftune=-1,
            bpe_dropout=1.0,
            rows="new",
            on_error="x",
            valid_share=1.0,
            template="x",
            loss_on="x",
        )
    text = str(e.value)
    for part in (
        "rank is 0",
        "dropout is 1",
        "lr is 0",
        "batch is 0",
        "accumulation is 0",
        "epochs is 0",
        "length is 3",
        "neftune is -1",
        "bpe_dropout is 1",
        "rows is 'new'",
        "on_error is 'x'",
        "valid_share is 1",
        "template is 'x', expected huozi or chatml",
        "loss_on is 'x', expected answers or all",
        "no.jsonl: no such file",
        "builtin:x: no such file",
        "none",
    ):
        assert part in text, part
    assert not list(tmp_path.iterdir())


def test_new_marks_need_their_rows(model, tmp_path):
    "Without them the adapter could not be loaded again; a chat model has them"
    says = f"rows is 'none', but {BEGIN}, {END}, {PAD} are new to {model}; use --rows all"
    with pytest.raises(StageError) as e:
        s.sft(model, out=tmp_path / "o", rows="none")
    assert e.value.args == (says,)
    chat = tmp_path / "chat"
    chat.mkdir()
    write_chat_tokenizer(model, chat)
    for f in model.iterdir():
        if not (chat / f.name).exists():
            (chat / f.name).symlink_to(f)
    finetuning._require_marks(chat, "none", "huozi")
    with pytest.raises(StageError, match="but .*im_start.*, .*im_end.* are new to"):
        finetuning._require_marks(chat, "none", "chatml")


@pytest.mark.parametrize("name", ["eval_every", "save_every", "log_every"])
def test_no_step_is_every_0th(model, tmp_path, name):
    with pytest.raises(StageError, match=f"{name} is 0, expected at least 1"):
        s.sft(model, out=tmp_path / "o", **{name: 0})


def test_a_model_without_its_tokenizer(model, tmp_path):
    d = tmp_path / "m"
    d.mkdir()
    for f in model.iterdir():
        if not f.name.startswith("tokenizer"):
            (d / f.name).symlink_to(f)
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(d)
    with pytest.raises(
        StageError, match="a WordLevel tokenizer, BPE-dropout needs BPE; use --bpe-dropout 0"
    ):
        s.sft(d, out=tmp_path / "o")
    (d / "tokenizer.json").unlink()
    with pytest.raises(StageError, match="holds no tokenizer.json"):
        s.sft(d, out=tmp_path / "o", bpe_dropout=0)


def test_dropout_needs_the_merges_of_the_tokenizer(model, tmp_path):
    "Not a Unigram model's scores, not an old tokenizer.model, and not a file of another kind"
    d = tmp_path / "m"
    d.mkdir()
    for f in model.iterdir():
        (d / f.name).symlink_to(f)
    (d / "tokenizer.model").unlink()
    (d / "tokenizer.model").write_text("IQ== 0\n")  # as tiktoken writes its ranks
    with pytest.raises(StageError, match="^.*m/tokenizer.model: .*; use --bpe-dropout 0$"):
        s.sft(d, out=tmp_path / "o")
    (d / "tokenizer.json").unlink()
    unigram = Tokenizer(models.Unigram([("a", -1.0), ("</s>", -2.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>").save_pretrained(d)
    with pytest.raises(StageError, match="m has a Unigram tokenizer, BPE-dropout needs BPE"):
        s.sft(d, out=tmp_path / "o")


def qwen_like(**flags):
    "A tokenizer that cuts words as Qwen's does, with a token that was added as text"
    cut = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    teacher = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(["the river\n\n"] * 9, teacher)
    tok.add_special_tokens(["<|endoftext|>"])
    tok.add_tokens([AddedToken("<think>", normalized=False, **flags)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|endoftext|>")


@pytest.mark.parametrize("before", ["", "\n\n", "  \r\n", "  "])
def test_an_answer_goes_on_where_its_prompt_ends(tok, before):
    "Though Qwen's way to cut joins line ends"
    turns = [dict(role="user", content="the river"), dict(role="assistant", content=before + "a")]
    talk = to_messages(dict(messages=turns))
    for one in (tok, chat_tokenizer(qwen_like(), "chatml")):
        prompt, _ = s.encode_chat(one, talk[:1], generate=True)
        ids, mask = s.encode_chat(one, talk)
        assert ids[: len(prompt)] == prompt and not any(mask[: len(prompt)])
        assert mask[len(prompt)]


def beside(tok, model, folder):
    "A tokenizer beside the weights of a model"
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(model / name)
    tok.save_pretrained(folder)


def test_dropout_leaves_added_text_whole(model, tmp_path):
    "In prompts it is one token"
    beside(qwen_like(), model, tmp_path)
    tok = load_tokenizer(tmp_path)
    bpe = s.load_bpe(tmp_path)
    think = tok.convert_tokens_to_ids("<think>")
    text = "user\nthe river<think> the river"
    assert bpe(text) == encode_plain(tok, [text])[0] and think in bpe(text)
    cuts = [bpe(text, 0.5, k, keep=5) for k in range(9)]
    assert all(think in ids and tok.decode(ids) == text for ids in cuts)
    assert len({str(ids) for ids in cuts}) > 5
    finetuning._require_bpe(tmp_path, s.load_bpe)


def test_a_text_beyond_the_last_position_is_refused(tmp_path):
    "GPT-2 has learned so many, and would end in a traceback"
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=300, n_embd=8, n_layer=1, n_head=1, n_positions=64)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "m")
    qwen_like().save_pretrained(tmp_path / "m")
    with pytest.raises(StageError, match="m has learned 64 positions, length is 65; use --length"):
        s.sft(tmp_path / "m", out=tmp_path / "o", length=65, template="chatml")


def test_a_tokenizer_without_an_end_is_refused(model, tmp_path):
    "The rows of its marks would begin from nothing"
    endless = qwen_like()
    endless.eos_token = None
    endless.bos_token = "<|endoftext|>"
    (tmp_path / "m").mkdir()
    beside(endless, model, tmp_path / "m")
    with pytest.raises(StageError, match="names no eos_token, expected the token that ends"):
        s.sft(tmp_path / "m", out=tmp_path / "o")


def test_added_text_that_takes_blanks_is_not_cut_by_dropout(model, tmp_path):
    beside(qwen_like(rstrip=True), model, tmp_path)
    with pytest.raises(StageError, match="cut 'the <think> river<think>s' otherwise than"):
        finetuning._require_bpe(tmp_path, s.load_bpe)


def test_a_template_that_does_not_compile_is_refused_before_training(model, tmp_path):
    with (
        patch("cmixtral_nb.chat_tokenizer.chat_template", lambda *form: "{% if %}"),
        patch.object(s, "load_model", lambda *a, **kw: pytest.fail("loaded")),
        pytest.raises(StageError, match="the chat template does not render"),
    ):
        s.sft(model, out=tmp_path / "o", bpe_dropout=0)


KHMER = ["សួស្តី", "រាជធានីកម្ពុជាឈ្មោះអ្វី?", "អរគុណ", "ថ្ងៃនេះក្តៅណាស់"]


def own_file(folder, texts):
    "Forty conversations, each with another number"
    talks = [
        [
            dict(role="user", content=f"{texts[k % len(texts)]} {k}"),
            dict(role="assistant", content=f"{k} {texts[(k + 1) % len(texts)]}"),
        ]
        for k in range(40)
    ]
    file = folder / "own.jsonl"
    file.write_text("\n".join(json.dumps(dict(messages=talk)) for talk in talks))
    return str(file)


def test_a_language_of_which_nothing_ships(model, tmp_path):
    "Its own file is trained on and measured; the form is ChatML's, and no Chinese is in it"
    file = own_file(tmp_path, KHMER)
    kw: dict[str, Any] = dict(rank=2, alpha=4, steps=2, batch=2, accumulation=1, length=96)
    kw |= dict(valid_share=0.2, eval_every=2, log_every=1, load_in_4bit=False, device="cpu")
    made = s.sft(model, out=tmp_path / "o", conversations=[file], lang="km", kept=["en"], **kw)
    assert made.stats["n_valid"] > 1 and made.stats["n_conversations"] > 20
    assert 0 < made.stats["bpb"]["answers"]["after"] < 20
    assert made.params["template"] == "chatml"
    assert not {"lang", "kept", "languages"} & set(made.params)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        assert "用户" not in (made.path / name).read_text()
    tok = load_tokenizer(made.path)
    text = s.decode_chat(tok, s.encode_chat(tok, [dict(role="user", content=KHMER[0])])[0])
    assert text == f"<s><|im_start|>user\n{KHMER[0]}<|im_end|>\n"


@pytest.mark.parametrize(
    "lang,kept", [("km", ["en"]), ("ja", ["en", "zh"]), ("ru", []), ("zh-Hant", [])]
)
def test_a_language_of_which_nothing_ships_needs_a_file(model, tmp_path, lang, kept):
    "Said before anything is loaded, and by a recipe before its first stage"
    says = f"[(]{lang}[)] ship with the package, only in Chinese [(]zh[)] and English [(]en[)]"
    with pytest.raises(StageError, match=says + '.*conversations = ."FILE". under .sft.'):
        s.sft(model, out=tmp_path / "o", lang=lang, kept=kept)
    faults = s.sft.option_faults(lang=lang, kept=kept)
    assert len(faults) == 1 and re.search(says, faults[0])
    assert s.sft.option_faults(lang=lang, kept=kept, conversations=[__file__]) == []
    for shipped in ("zh", "en"):
        assert s.sft.option_faults(lang=shipped, kept=kept) == []


@pytest.mark.parametrize(
    "langs,n,han",
    [
        (None, 2067, True),
        (["zh", "en"], 2067, True),
        (["ru", "en", "zh"], 2067, True),
        (["zh"], 36, True),
        (["km", "en"], 17, False),
        (["km"], 0, False),
    ],
)
def test_what_ships_is_chosen_by_the_languages(langs, n, han):
    talks = list(read_conversations("builtin", langs=langs))
    assert len(talks) == n
    text = json.dumps(talks, ensure_ascii=False)
    assert bool(re.search("[\u4e00-\u9fff]", text)) == han
    if langs in (["zh"], ["km", "en"]):
        assert "Chinese" not in text and "英文" not in text  # no model says what it cannot


def test_what_languages_decide_is_in_the_manifest(micro):
    "For Chinese and English what it was before there were other languages"
    params = json.loads((micro[0] / "sft/manifest.json").read_text())["params"]
    assert params["template"] == "huozi"
    assert not {"lang", "kept", "languages"} & set(params)
    assert finetuning.decided("zh", ["en"]) == dict(template="huozi")
    assert finetuning.decided("zh", []) == dict(template="huozi", languages=["zh"])


@pytest.mark.parametrize(
    "option,value",
    [
        *[("length", n) for n in (2, 15, -1)],
        *[("warmup", n) for n in (-1, 1, float("nan"), float("inf"))],
        *[("lr", n) for n in (0, -1, float("nan"), float("inf"))],
        *[("rows_lr", n) for n in (-1, float("nan"), float("inf"))],
        *[(name, 0) for name in ("eval_every", "save_every", "log_every", "batch", "rank")],
        *[("seed", n) for n in (-1, 2**32)],
        *[("valid_share", n) for n in (-0.1, 1, float("nan"))],
        *[("neftune", n) for n in (-1, float("nan"))],
        *[("epochs", n) for n in (0, float("inf"))],
        ("alpha", float("inf")),
        ("n_translations", -1),
        ("rows", "new"),
        ("template", "alpaca"),
        ("kept", ["en"]),
    ],
)
def test_bounds_are_known_before_the_first_stage(option, value):
    [fault] = s.sft.option_faults(**{option: value})
    assert fault.startswith(f"{option} is ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
SPEAKER = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool"]) | JSON
WORDS = st.sampled_from(["你好", "", " ", "\ud800", "\x00", "\ufeff"]) | JSON
TURN = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("role", "from"), SPEAKER) | dict.fromkeys(("content", "value"), WORDS),
)
TURNS = st.lists(TURN | JSON, max_size=4) | JSON
RECORD = (
    st.fixed_dictionaries(
        {},
        optional=dict(
            messages=TURNS,
            conversations=TURNS,
            instruction=WORDS,
            input=WORDS,
            output=WORDS,
            system=WORDS,
            history=st.lists(st.lists(WORDS, max_size=3) | JSON, max_size=3) | JSON,
        ),
    )
    | JSON
)


@settings(max_examples=300, deadline=None)
@given(RECORD)
def test_any_json_is_a_conversation_or_has_a_reason(record):
    try:
        talk = to_messages(json.loads(json.dumps(record)))
    except ValueError as e:
        assert 0 < len(str(e)) < 120 and str(e).isprintable()
        return
    roles = [message["role"] for message in talk]
    assert roles[-2:] == ["user", "assistant"]
    assert all(message["content"].strip() for message in talk)
    json.dumps(talk, ensure_ascii=False).encode()


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORD, max_size=6), st.booleans(), st.sampled_from(["", "\ufeff"]))
def test_any_file_of_json_is_read(tmp_path_factory, records, as_list, mark):
    "Every record is read or counted; as one list it is the same"
    lines = [json.dumps(record) for record in records]
    file = tmp_path_factory.mktemp("any") / "a.json"
    text = f"[{', '.join(lines)}]" if as_list else "\n".join(["{}", *lines])
    file.write_text(mark + text, encoding="utf-8")
    talks, counts = read(file)
    assert len(talks) + sum(counts.values()) == len(records) + (not as_list)


def test_a_nest_that_json_reads_and_nothing_shows(tmp_path):
    "Between what the parser takes and what printing takes there are values"
    for depth in range(900, 1000):
        nest = "[" * depth + "]" * depth
        file = tmp_path / "a.jsonl"
        file.write_text('{"messages": [{"role": ' + nest + ', "content": "x"}]}\n')
        talks, counts = read(file)
        assert talks == [] and sum(counts.values()) == 1


def test_a_file_of_a_thousand_names_for_a_speaker(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"messages": [{{"role": "r{k}"}}]}}\n' for k in range(1000)))
    _, counts = read(file)
    assert len(counts) == 51 and counts["other reasons"] == 950


def test_a_line_of_a_gigabyte_is_not_kept(tmp_path):
    from cmixtral_nb.machine import peak_bytes, reset_peak

    file = tmp_path / "a.jsonl.gz"
    good = json.dumps(dict(messages=TALK)).encode() + b"\n"
    with gzip.open(file, "wb", compresslevel=1) as out:
        out.write(good + b'{"messages": "')
        for _ in range(500):
            out.write(b"x" * 10**6)
        out.write(b'"}\n' + good)
    reset_peak()
    before = peak_bytes()
    talks, counts = read(file)
    assert talks == [TALK, TALK] and list(counts) == ["longer than 16 MB"]
    assert peak_bytes() - before < 200e6


def test_nothing_left_to_train_on(model, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(
        StageError, match="no conversation left to train on of .*a.jsonl; dropped: .*unknown form"
    ):
        s.sft(model, out=tmp_path / "o", conversations=[str(tmp_path / "a.jsonl")], bpe_dropout=0)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.tmp").exists()


def test_killed_it_ends_as_if_it_had_not_been(model, tmp_path):
    from safetensors.torch import load_file
    from transformers import Trainer

    kw = dict(
        conversations=["builtin:handwritten"],
        rank=2,
        alpha=4,
        lr=1e-2,
        batch=2,
        accumulation=1,
        steps=4,
        length=64,
        valid_share=0.05,
        save_every=2,
        eval_every=4,
        log_every=1,
        device="cpu",
    )
    (tok_dir := tmp_path / "tok").mkdir()
    write_chat_tokenizer(model, tok_dir)
    whole = s.sft(model, out=tmp_path / "whole", **kw)
    step = Trainer.training_step
    steps = []

    def dying(self, *a, **k):
        steps.append("first run")
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, *a, **k)

    def counting(self, *a, **k):
        steps.append("second run")
        return step(self, *a, **k)

    with patch.object(Trainer, "training_step", dying), pytest.raises(KeyboardInterrupt):
        s.sft(model, out=tmp_path / "two", **kw)
    assert not (tmp_path / "two").exists()
    left = saved_checkpoints(tmp_path / "two.tmp/checkpoints")
    assert [path.name for path in left] == ["checkpoint-2"]
    with patch.object(Trainer, "training_step", counting):
        two = s.sft(model, out=tmp_path / "two", **kw)
    assert steps.count("second run") == 2
    assert (two / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    a, b = (load_file(x / "adapter_model.safetensors") for x in (whole, two))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    assert {f.suffix for f in Path(two.path).glob("*.*")} <= {
        ".json",
        ".jsonl",
        ".jinja",
        ".safetensors",
        ".model",
    }
    for f in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        assert (whole / f).read_bytes() == (
            Path(tok_dir) / f
        ).read_bytes()  # BPE-dropout leaves no trace
    rows = [v for k, v in a.items() if "embed_tokens" in k or "lm_head" in k]
    assert len(rows) == 2 and all(r.shape[0] == 32003 for r in rows)
    assert all((v != 0).any() for k, v in a.items() if "lora_B" in k)  # every expert learned


def test_a_nan_loss(model, tmp_path):
    import torch
    from transformers import Trainer

    kw = dict(
        conversations=["builtin:handwritten"],
        steps=1,
        batch=1,
        accumulation=1,
        length=64,
        rank=2,
        valid_share=0,
        device="cpu",
    )

    def nan(self, *a, **k):
        return torch.tensor(float("nan"))

    with (
        patch.object(Trainer, "training_step", nan),
        pytest.raises(StageError, match="loss is nan at step 1, examples 0; lower --lr"),
    ):
        s.sft(model, out=tmp_path / "o", **kw)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.tmp").exists()
