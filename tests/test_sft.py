"What the chapter on fine-tuning does not show: bad files, hostile words, killed runs"

import hashlib
import json
import lzma
import re
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmixtral_nb import conversations
from cmixtral_nb import sft as s
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.stages import StageError
from cmixtral_nb.tokenizer_files import encode_plain, load_tokenizer, write_tokenizer

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
    return s.write_chat_tokenizer(model, tmp_path_factory.mktemp("tok"))


@pytest.fixture(scope="module")
def bpe(model):
    return s._bpe(model)


@pytest.fixture(scope="module", params=sorted(s.FORMS))
def either(request, model):
    return s.chat_tokenizer(load_tokenizer(model), request.param)


def read(path, **kw):
    counts = Counter()
    return list(conversations.read_conversations(str(path), counts=counts, **kw)), dict(counts)


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


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.sampled_from([s.BEGIN, s.END, s.PAD, "<s>", "</s>", "<unk>", "\n", "助手", "x", " "]),
        max_size=8,
    ).map("".join)
)
def test_no_word_becomes_control(tok, text):
    "In our encoding, where words are kept to the letter, and in the finished text of the template, which other engines read"
    talk = [dict(role=r, content=text) for r in ("system", "user", "assistant")]
    ids, mask = s.encode_chat(tok, talk)
    assert [tok.convert_ids_to_tokens(i) for i in ids if i in {0, 1, 2, *tok.all_special_ids}] == [
        "<s>"
    ] + [s.BEGIN, s.END] * 3
    answer = [i for i, m in zip(ids, mask) if m]
    assert (
        answer[:-1] == encode_plain(tok, [f"助手\n{text}"])[0][4:]
        and answer[-1] == tok.eos_token_id
    )
    theirs = tok(tok.apply_chat_template(talk, tokenize=False), add_special_tokens=False)[
        "input_ids"
    ]
    assert [
        tok.convert_ids_to_tokens(i) for i in theirs if i in {0, 1, 2, *tok.all_special_ids}
    ] == ["<s>"] + [s.BEGIN, s.END] * 3


def test_ten_thousand_hostile_messages(tok, model):
    "No control token that the form did not write, and no character lost; in the template's text, of messages without control tokens the same ids"
    from cmixtral_nb.certificate import hostile_texts

    marks = [
        s.BEGIN,
        s.END,
        s.PAD,
        "<s>",
        "</s>",
        "<unk>",
        "<|im_end|>",
        "[INST]",
        "[/INST]",
        f"{s.END}\n{s.BEGIN}系统\n",
        "<",
        "|>",
        "<|endof",
        "utterance|>",
        "<</s>s>",
        "<s></s>",
    ]
    texts = hostile_texts(10_000, marks + ["请", "你好", " the"])
    control = {0, 1, 2, *tok.all_special_ids}
    want = [
        [tok.bos_token_id]
        + [i for _ in range(n) for i in tok.convert_tokens_to_ids([s.BEGIN, s.END])]
        for n in (1, 2, 3)
    ]
    bad = []
    for k, t in enumerate(texts):
        talk = [
            dict(role=r, content=t)
            for r in (["user"], ["user", "assistant"], ["system", "user", "assistant"])[k % 3]
        ]
        ours = s.encode_chat(tok, talk)[0]
        theirs = tok(tok.apply_chat_template(talk, tokenize=False), add_special_tokens=False)[
            "input_ids"
        ]
        if any([i for i in ids if i in control] != want[k % 3] for ids in (ours, theirs)) or (
            not any(m in t for m in ("<s>", "</s>", "<unk>", s.BEGIN, s.END, s.PAD))
            and ours != theirs
        ):
            bad.append(t)
    assert len(texts) == 10_000 and not bad, bad[:3]
    assert sum(any(m in t for m in marks[:6]) for t in texts) > 4000


def test_every_added_token_in_every_role(model, tmp_path):
    "Tokens of others, too: the template knows all that the tokenizer has"
    tok = load_tokenizer(model)
    tok.add_tokens(["[INST]", "secret"], special_tokens=True)
    tok.add_tokens(["<tool>"])
    s.chat_tokenizer(tok)
    added = {i: t.content for i, t in tok.added_tokens_decoder.items()}
    assert {"<s>", "</s>", "<unk>", "[INST]", "secret", "<tool>", s.BEGIN, s.END, s.PAD} == set(
        added.values()
    )
    for t in added.values():
        talk = [dict(role=r, content=f"a{t}b {t}") for r in ("system", "user", "assistant")]
        ids = tok(tok.apply_chat_template(talk, tokenize=False), add_special_tokens=False)[
            "input_ids"
        ]
        assert [added[i] for i in ids if i in added] == ["<s>"] + [s.BEGIN, s.END] * 3, t


def test_words_in_parts(either):
    "Some clients send a list of parts; here, too, words stay words"
    parts = [
        dict(role="user", content=[dict(type="text", text="a</s>"), dict(type="text", text="b")])
    ]
    whole = [dict(role="user", content="a</s>\nb")]
    assert either.apply_chat_template(parts, tokenize=False) == either.apply_chat_template(
        whole, tokenize=False
    ) and "</s>" not in either.apply_chat_template(parts, tokenize=False)


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
    page = s.ColouredTokens(tok, ids, mask)._repr_html_()
    assert (
        page.count("#bfe3c0") == sum(mask)
        and page.count("#ddd") == 4
        and "<" not in re.sub("</?(div|span|br)[^>]*>", "", page)
    )


def test_bpe_dropout_cuts_only_words(tok, model):
    cut = s.dropout_encoder(s._bpe(model), 0.5, 3)
    talk = [
        dict(role="user", content="Please translate: the quick brown fox\nand more"),
        dict(role="assistant", content="Every word of it is here\nand there."),
    ]
    ids, mask = s.encode_chat(tok, talk, encode=cut)
    plain, _ = s.encode_chat(tok, talk)
    assert len(ids) > len(plain) and len(ids) == len(mask)
    assert tok.decode(ids) == tok.decode(plain)
    assert (
        tok.decode([i for i, m in zip(ids, mask) if m]).removesuffix(s.END).strip()
        == talk[1]["content"]
    )


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


def test_dropout_is_the_same_everywhere(bpe):
    "A number that another process has to find, too"
    text = "the quick brown fox jumps over the lazy dog"
    assert (
        hashlib.sha256(str([bpe(text, 0.3, k) for k in range(20)]).encode()).hexdigest()[:8]
        == "6032e1c2"
    )
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
    for name, data in (
        ("a.json", json.dumps(rows, indent=1).encode()),
        ("a.jsonl.xz", lzma.compress("\n\n".join(map(json.dumps, rows)).encode())),
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


@pytest.mark.parametrize(
    "row,reason",
    [
        (b'{"messages": [', "invalid JSON"),
        (b"\xff{}", "invalid UTF-8"),
        (b"[1]x", None),
        (b"3", "not an object"),
        (b'{"text": "a"}', "unknown form"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no answer"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}', "unknown role 'tool'"),
        (
            b'{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}',
            "empty turn of user",
        ),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "begins with assistant"),
        (b'{"instruction": "a", "output": ""}', "empty answer"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]}',
            "two turns of user in a row",
        ),
        (b'{"messages": "hello"}', "turns that are no list of objects"),
        (b'{"messages": [3]}', "turns that are no list of objects"),
        (
            b'{"messages": [{"role": "user", "content": {"a": 1}}, {"role": "assistant", "content": "a"}]}',
            "content that is no text",
        ),
        (
            b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}',
            "half a character",
        ),
        (b'{"instruction": 3, "output": "a"}', "content that is no text"),
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
    assert read(f) == ([TALK], {reason: 1})
    with pytest.raises(StageError, match=f"a.jsonl:2: {reason}; mend the line"):
        read(f, on_error="stop")


def test_forms_and_faults_are_counted_file_by_file(model, tmp_path, capsys):
    "All faults of all files at once, with their lines; or a line for each file"
    tok = s.chat_tokenizer(load_tokenizer(model))
    parts = dict(
        messages=[
            dict(role="user", content=[dict(type="text", text="一"), dict(type="text", text="二")]),
            TALK[1],
        ]
    )
    (tmp_path / "a.jsonl").write_text(
        "\n".join(
            map(
                json.dumps,
                [
                    dict(messages=TALK),
                    parts,
                    dict(instruction="a", output="b"),
                    dict(x=1),
                    dict(x=2),
                ],
            )
        )
    )
    (tmp_path / "b.json").write_text(
        json.dumps(
            [
                dict(
                    conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
                ),
                dict(messages=TALK),
                7,
            ]
        )
    )
    files = [str(tmp_path / n) for n in ("a.jsonl", "b.json")]
    train, _, counts, n = s._talks(files, tok, "skip", 0, 64, 0)
    assert (
        n["forms"] == {files[0]: dict(OpenAI=2, Alpaca=1), files[1]: dict(ShareGPT=1, OpenAI=1)}
        and train[1][0]["content"] == "一\n二"
    )
    assert counts == {"unknown form": 2, "not an object": 1, "repeated": 1}
    assert (n["tokens"], n["answers"]) == tuple(
        sum(map(f, (s.encode_chat(tok, t) for t in train)))
        for f in (lambda x: len(x[0]), lambda x: sum(x[1]))
    )
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"sft: {files[0]}: 2 OpenAI, 1 Alpaca; dropped: unknown form 2 (line 4, 5)",
        f"sft: {files[1]}: 1 ShareGPT, 1 OpenAI; dropped: not an object 1 (line 3), repeated 1",
    ]
    with pytest.raises(StageError) as e:
        s._talks(files, tok, "stop", 0, 64, 0)
    assert [f.split("; ")[0] for f in e.value.args] == [
        f"{files[0]}:4: unknown form",
        f"{files[0]}:5: unknown form",
        f"{files[1]}:3: not an object",
    ]
    (tmp_path / "d.jsonl").write_text("{}\n" * 50)
    with pytest.raises(StageError, match="and 30 more"):
        s._talks([str(tmp_path / "d.jsonl")], tok, "stop", 0, 64, 0)


def test_a_megabyte_in_one_message(model):
    "Too long to answer within the length: dropped and counted; as an answer it is cut"
    tok, big = s.chat_tokenizer(load_tokenizer(model)), "长" * 350_000
    f = [
        [dict(role="user", content=big), TALK[1]],
        [TALK[0], dict(role="assistant", content=big)],
        TALK,
    ]
    with patch.object(s, "read_conversations", lambda *a: iter(f)):
        train, _, counts, n = s._talks(["builtin"], tok, "skip", 0, 256, 0)
    assert train == f[1:] and counts == {"no answer within length": 1} and n["tokens"] < 512
    assert s.collate_chat([s.encode_chat(tok, t) for t in train], 256)["input_ids"].shape[1] < 512


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
    rows = [
        json.loads(l) for l in s.package_data("data/conversations.jsonl").read_text().splitlines()
    ]
    assert all(r["licence"] == "CC0-1.0" for r in rows)


def test_the_end_is_learned_and_the_label_is_the_next_token(tok):
    ids, mask = s.encode_chat(tok, TALK)
    b = s.collate_chat([(ids, mask), (ids + ids[1:], mask + mask[1:])], 1000)
    assert (b["labels"] == tok.eos_token_id).sum() == 3 and b["input_ids"].shape == (
        1,
        3 * len(ids) - 1,
    )
    assert b["position_ids"][0].tolist() == [*range(len(ids)), *range(2 * len(ids) - 1)]
    assert (b["labels"][b["labels"] != -100] == b["input_ids"][b["labels"] != -100]).all()
    assert (b["input_ids"][0][b["logits_to_keep"] + 1] == b["shift_labels"][0]).all() and b[
        "shift_labels"
    ].shape[1] == 3 * sum(mask)
    assert s.collate_chat([(ids, mask)] * 2, 4)["input_ids"].shape == (1, 8)


def test_every_conversation_is_read_once_a_round(tok):
    talks = [[dict(role="user", content=str(i)), TALK[1]] for i in range(7)]
    r = s.Rounds(talks, tok, None, 21, seed=4)
    assert [sorted(str(r[k]) for k in range(l, l + 7)) for l in (0, 7, 14)] == 3 * [
        sorted(str(s.encode_chat(tok, t)) for t in talks)
    ]
    assert r.order(0) != r.order(1) and r.order(0) == s.Rounds(talks, tok, None, 1, seed=4).order(
        0
    ) != s.Rounds(talks, tok, None, 1, seed=5).order(0)


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
        "no.jsonl: no such file",
        "builtin:x: no such file",
        "none",
    ):
        assert part in text, part
    assert not list(tmp_path.iterdir())


def test_a_model_without_its_tokenizer(model, tmp_path):
    d = tmp_path / "m"
    d.mkdir()
    for f in model.iterdir():
        if f.name != "tokenizer.model":
            (d / f.name).symlink_to(f)
    with pytest.raises(
        StageError, match="holds no tokenizer.model, which BPE-dropout needs; use --bpe-dropout 0"
    ):
        s.sft(d, out=tmp_path / "o")
    (d / "tokenizer.json").unlink()
    with pytest.raises(StageError, match="holds no tokenizer.json"):
        s.sft(d, out=tmp_path / "o", bpe_dropout=0)


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
    s.write_chat_tokenizer(model, tok_dir)
    whole, step, n = s.sft(model, out=tmp_path / "whole", **kw), Trainer.training_step, 0

    def dying(self, *a, **k):
        nonlocal n
        n += 1
        if n == 4:
            raise KeyboardInterrupt
        return step(self, *a, **k)

    with patch.object(Trainer, "training_step", dying), pytest.raises(KeyboardInterrupt):
        s.sft(model, out=tmp_path / "two", **kw)
    assert not (tmp_path / "two").exists() and [
        p.name for p in s.checkpoints(tmp_path / "two.tmp/checkpoints")
    ] == ["checkpoint-2"]
    with patch.object(
        Trainer, "training_step", lambda self, *a, **k: steps.append(1) or step(self, *a, **k)
    ):
        steps = []
        two = s.sft(model, out=tmp_path / "two", **kw)
    assert len(steps) == 2 and (two / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
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


def test_a_loss_that_is_no_number(model, tmp_path):
    with pytest.raises(StageError, match="loss is nan at step 1, rows 0; lower --lr"):
        from transformers import Trainer

        with patch.object(
            Trainer, "training_step", lambda self, *a, **k: __import__("torch").tensor(float("nan"))
        ):
            s.sft(
                model,
                out=tmp_path / "o",
                conversations=["builtin:handwritten"],
                steps=1,
                batch=1,
                accumulation=1,
                length=64,
                rank=2,
                valid_share=0,
                device="cpu",
            )
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.tmp").exists()
