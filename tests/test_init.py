"06_init: checkpoints of other shapes, what is linked, what is refused"

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralForCausalLM,
)

from cmixtral_nb import checkpoints, distill
from cmixtral_nb.checkpoints import INDEX, embedding_rows, load_tensor, resolve_model, tensor_files
from cmixtral_nb.corpus import corpus
from cmixtral_nb.distill import Sample, stretches
from cmixtral_nb.heads import log_shares
from cmixtral_nb.init import (
    METHODS,
    init,
    n_chars,
    new_rows,
    piece_bytes,
    pieces_of,
    probe_methods,
    spell,
)
from cmixtral_nb.loading import load_model
from cmixtral_nb.mixtral import small_config
from cmixtral_nb.pieces import Piece, base_tokenizer_model
from cmixtral_nb.probe import paired_differences, rank_methods, train_briefly
from cmixtral_nb.recipes import arguments, recipe_steps
from cmixtral_nb.stages import (
    StageError,
    input_fingerprint,
    read_json,
    tokenizer_fingerprint,
    write_json,
)
from cmixtral_nb.tokenizer_files import encode_plain, load_tokenizer, write_tokenizer
from cmixtral_nb.vocab import extend_model

OLD = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abc中国大"]
NEW = ["中国", "中国大", "龙"]


def save_tok(t, path, **special):
    "A tokenizer as transformers reads it, with its special tokens by their roles"
    path.mkdir(exist_ok=True)
    t.save(str(path / "tokenizer.json"))
    config = dict(special, tokenizer_class="PreTrainedTokenizerFast")
    write_json(path / "tokenizer_config.json", config)
    return path


def write_tok(path, vocab):
    words = [piece for piece in vocab if len(piece) > 1 and piece[0] != "<"]
    merges = [(word[:-1], word[-1]) for word in words]
    t = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(vocab)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    return save_tok(t, path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def tok(tmp_path):
    return write_tok(tmp_path / "tok", OLD + NEW)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    p = write_tok(tmp_path / "model", OLD)
    net = MixtralForCausalLM(
        small_config(hidden=16, layers=2, intermediate=24, heads=2, kv_heads=1, vocab_size=len(OLD))
    ).bfloat16()
    net.save_pretrained(p, max_shard_size="20KB")
    return p


def all_tensors(p):
    files = tensor_files(p)
    return {name: load_tensor(files, name) for name in files}


def test_rows_by_hand(model, tok, tmp_path):
    a = init(model, tok, out=tmp_path / "out")
    was, now = all_tensors(model), all_tensors(a.path)
    ids = {p: i for i, p in enumerate(OLD)}
    spelled = [
        [ids["中"], ids["国"]],
        [ids["中"], ids["国"], ids["大"]],
        [ids[f"<0x{b:02X}>"] for b in "龙".encode()],
    ]
    for n in ("model.embed_tokens.weight", "lm_head.weight"):
        want = torch.stack([was[n][s].float().mean(0).bfloat16() for s in spelled])
        assert torch.equal(now[n], torch.cat([was[n], want]))
    assert all(torch.equal(was[n], now[n]) for n in was if "layers" in n)
    assert (a.stats["n_old"], a.stats["n_new"], a.stats["n_rows"]) == (len(OLD), 3, len(OLD) + 3)


def test_transformers_loads_the_result(model, tok, tmp_path):
    a = init(model, tok, out=tmp_path / "out")
    net, info = AutoModelForCausalLM.from_pretrained(a.path, output_loading_info=True)
    assert net.config.vocab_size == net.get_input_embeddings().weight.shape[0] == len(OLD) + 3
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_index_and_fingerprint_of_the_tokenizer(model, tok, tmp_path):
    a = init(model, tok, out=tmp_path / "out")
    index = read_json(a / INDEX)
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in all_tensors(a.path).values()
    )
    assert index["metadata"]["total_parameters"] == sum(
        t.numel() for t in all_tensors(a.path).values()
    )
    assert index["weight_map"].keys() == read_json(model / INDEX)["weight_map"].keys()
    assert a.manifest["tokenizer"] == tokenizer_fingerprint(tok) != tokenizer_fingerprint(model)


def test_source_is_untouched_and_most_shards_are_links(model, tok, tmp_path):
    before = input_fingerprint(model)
    a = init(model, tok, out=tmp_path / "out")
    same = [f.name for f in model.glob("*.safetensors") if os.path.samefile(f, a / f.name)]
    holds_rows = {
        tensor_files(model)[n].name for n in ("model.embed_tokens.weight", "lm_head.weight")
    }
    assert set(same) == {f.name for f in model.glob("*.safetensors")} - holds_rows and same
    assert input_fingerprint(model) == before


def test_copies_where_links_are_impossible(model, tok, tmp_path, monkeypatch):
    def no(*a):
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", no)
    a = init(model, tok, out=tmp_path / "out")
    assert not any(os.path.samefile(f, a / f.name) for f in model.glob("*.safetensors"))
    assert resolve_model(a.path)


def test_tied_model(tok, tmp_path):
    p = write_tok(tmp_path / "tied", OLD)
    LlamaForCausalLM(
        LlamaConfig(**dict(LLAMA, num_hidden_layers=1), tie_word_embeddings=True)
    ).save_pretrained(p)
    a = init(p, tok, out=tmp_path / "out")
    net = AutoModelForCausalLM.from_pretrained(a.path)
    assert net.lm_head.weight is net.model.embed_tokens.weight
    assert len(net.lm_head.weight) == len(OLD) + 3


@pytest.mark.parametrize("same", [True, False])
def test_tied_model_that_is_stored_twice(tok, tmp_path, same):
    "It stays tied, whatever the method; where the two differ, nothing says that they are tied"
    p = write_tok(tmp_path / "tied", OLD)
    config = LlamaConfig(**dict(LLAMA, num_hidden_layers=1), tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(p)
    t = all_tensors(p)
    t["lm_head.weight"] = t["model.embed_tokens.weight"] * (1 if same else 2)
    save_file(t, p / "model.safetensors", {"format": "pt"})
    a = init(p, tok, out=tmp_path / "out", method="asymmetric")
    net = AutoModelForCausalLM.from_pretrained(a.path)
    assert (net.lm_head.weight is net.model.embed_tokens.weight) == same
    assert read_json(a.path / "config.json")["tie_word_embeddings"] == same


LLAMA = dict(
    vocab_size=len(OLD),
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)


def class_and_config(kind):
    "Of a small model of that kind"
    if kind == "llama":
        return LlamaForCausalLM, LlamaConfig(**LLAMA)
    if kind == "mistral":
        return MistralForCausalLM, MistralConfig(**LLAMA, sliding_window=None)
    sizes = dict(hidden=16, layers=2, intermediate=24, heads=2, kv_heads=1)
    return MixtralForCausalLM, small_config(**sizes, vocab_size=len(OLD))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral"])
def test_any_model_with_embedding_and_head(tok, tmp_path, kind, tied):
    model_class, config = class_and_config(kind)
    config.tie_word_embeddings = tied
    net = model_class(config).eval()
    net.save_pretrained(write_tok(tmp_path / "m", OLD), max_shard_size="20KB")
    wide, info = AutoModelForCausalLM.from_pretrained(
        init(tmp_path / "m", tok, out=tmp_path / "out").path, output_loading_info=True
    )
    x = torch.tensor([[1, 261, 262, 263]])
    with torch.no_grad():
        a, b = net(x).logits, wide.eval()(x).logits
    assert type(wide) is type(net)
    assert b.shape[-1] == len(OLD) + 3 and not info["missing_keys"]
    assert torch.allclose(a, b[..., : len(OLD)], atol=1e-6)
    assert (wide.lm_head.weight is wide.get_input_embeddings().weight) == tied


def test_a_model_that_sees_pictures(tok, tmp_path):
    "Gemma 3 keeps the sizes of its language model in `text_config`"
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    text = dict(sizes, vocab_size=len(OLD), num_key_value_heads=1, head_dim=8, pad_token_id=0)
    config = Gemma3Config(text_config=text, vision_config=dict(sizes, image_size=28, patch_size=14))
    folder = write_tok(tmp_path / "seeing", OLD)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    said = read_json(folder / "config.json")
    assert "vocab_size" not in said
    assert embedding_rows(folder) == len(OLD) == said["text_config"]["vocab_size"]
    a = init(folder, tok, out=tmp_path / "out")
    assert embedding_rows(a.path) == len(OLD) + 3
    net = load_model(a.path)
    assert net.get_input_embeddings().weight.shape[0] == len(OLD) + 3
    assert net.config.get_text_config().vocab_size == len(OLD) + 3


@pytest.mark.parametrize("padding", [1, 3, 10])
def test_rows_that_padded_the_matrix_give_way(tok, tmp_path, padding):
    p = write_tok(tmp_path / "padded", OLD)
    MixtralForCausalLM(
        small_config(
            hidden=8, layers=1, intermediate=8, heads=2, kv_heads=1, vocab_size=len(OLD) + padding
        )
    ).save_pretrained(p)
    a = init(p, tok, out=tmp_path / "out")
    n = max(len(OLD) + padding, len(OLD) + 3)
    assert a.stats["n_rows"] == n
    assert AutoModelForCausalLM.from_pretrained(a.path).lm_head.weight.shape[0] == n


def test_methods_and_seed(model, tok, tmp_path):
    a, b, c = (
        init(model, tok, out=tmp_path / f"n{i}", method="normal", seed=s)
        for i, s in enumerate((1, 1, 2))
    )
    assert a.fingerprint == b.fingerprint != c.fingerprint


# a model with the real tokenizer, extended by words and by characters that Mixtral lacks

WORDS = [
    "中国",
    "人工智能",
    "的时候",
    "我觉得",
    "图书馆",
    "词表",
    "语言模型",
    "龘",
    "鑫鑫",
    "因为",
    "天下无难事",
]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    p = tmp_path_factory.mktemp("real")
    new = extend_model(base_tokenizer_model(), [Piece(w, 0.0, "word", 1) for w in WORDS])
    (p / "new.model").write_bytes(new.SerializeToString())
    return write_tokenizer(base_tokenizer_model(), p / "old"), write_tokenizer(
        p / "new.model", p / "new"
    )


def the_seeds_rows(old, new, W):
    """The seed's way (models/init_embeddings.py), token by token

    Decode, encode with all that the old tokenizer adds, sum, divide.
    """
    rows = []
    for n in range(len(old), len(new)):
        ids = old(new.decode([n]))["input_ids"]
        rows.append(sum(W[i] for i in ids) / len(ids))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["seed", "mean"])
def test_rows_equal_a_loop(real, tmp_path, method, dtype):
    model, old, new = tmp_path / "m", *map(load_tokenizer, real)
    shutil.copytree(real[0], model)
    torch.manual_seed(0)
    MixtralForCausalLM(small_config(hidden=64, layers=1, intermediate=16, heads=2, kv_heads=1)).to(
        dtype
    ).save_pretrained(model)
    a = init(model, real[1], out=tmp_path / "out", method=method)
    was, now = all_tensors(model), all_tensors(a.path)
    for n in ("model.embed_tokens.weight", "lm_head.weight"):
        W, rows = was[n], now[n][len(old) :]
        if method == "mean":
            want = torch.stack([W[x].float().mean(0) for x in spell(old, WORDS)]).to(dtype)
        else:
            want = the_seeds_rows(old, new, W.float()).to(dtype)  # summed in float32, rounded once
        assert len(rows) == len(WORDS) and torch.equal(rows, want)
        if method == "seed":  # the seed's own sum of bfloat16 rows rounds after each of them
            off = (
                rows.float() - the_seeds_rows(old, new, W).float()
            ).abs().max() / W.float().abs().max()
            assert off == 0 if dtype == torch.float32 else off < 2**-7


def test_mean_and_seed_spell_differently(real):
    old = load_tokenizer(real[0])
    ours, seeds = spell(old, WORDS), spell(old, WORDS, "seed")
    assert all(
        s[0] == old.bos_token_id and old.convert_ids_to_tokens(s[1]) == "▁" and s[2:] == o
        for o, s in zip(ours, seeds, strict=True)
    )


def test_what_the_old_tokenizer_drops_is_its_unknown_token(tmp_path):
    "As the seed spells, with a tokenizer that puts nothing in front and has no such character"
    t = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[]))
    t.add_special_tokens(["<unk>"])
    silent = load_tokenizer(save_tok(t, tmp_path / "silent", unk_token="<unk>"))
    spellings = spell(silent, ["a", "龙"], "seed")
    assert spellings == [[1], [0]]
    assert new_rows(torch.eye(2), spellings, "seed").tolist() == [[0.0, 1.0], [1.0, 0.0]]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=6))
def test_mean_rows_lie_between_their_parts(spellings):
    W = torch.arange(50.0).view(10, 5)
    R = new_rows(W, spellings)
    for r, s in zip(R, spellings, strict=True):
        assert (r >= W[s].amin(0) - 1e-4).all() and (r <= W[s].amax(0) + 1e-4).all()


# a tokenizer that shares nothing with the model's


USER = "<｜User｜>"  # of DeepSeek: a control token that is not ASCII


def byte_tok(path, texts):
    "A byte-level tokenizer in the manner of GPT-2"
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|end|>", "<|go|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    t.add_special_tokens([USER])
    special = dict(eos_token="<|end|>", bos_token="<|go|>", unk_token="<|end|>")
    return save_tok(t, path, **special)


@pytest.fixture
def byte_level(tmp_path):
    "A byte-level tokenizer, and a tied Llama that has it"
    p = byte_tok(tmp_path / "bytes", ["the cat, a b c 中", "中国 的 a cat", "你 佈 佉 住"] * 9)
    torch.manual_seed(0)
    net = LlamaForCausalLM(
        LlamaConfig(
            **dict(LLAMA, vocab_size=len(load_tokenizer(p)) + 20),
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=0,
        )
    )
    net.generation_config.eos_token_id = 0
    net.save_pretrained(p)
    return p


def test_transplant_from_bytes(byte_level, tok, tmp_path):
    a = init(byte_level, tok, out=tmp_path / "out", transplant=True)
    W, R = (all_tensors(p)["model.embed_tokens.weight"] for p in (byte_level, a.path))
    old, vocab = load_tokenizer(byte_level), OLD + NEW

    def row(token):
        return R[vocab.index(token)]

    def text_rows(text):
        return W[old.encode(text, add_special_tokens=False)]

    assert len(R) == len(vocab) == a.stats["n_rows"] and a.stats["n_old"] == 0
    for t in "abc中":
        assert len(text_rows(t)) == 1 and torch.equal(row(t), text_rows(t)[0])
    for t in ("大", "龙", "中国大"):
        assert len(text_rows(t)) > 1 and torch.equal(row(t), text_rows(t).mean(0))
    assert torch.equal(row("▁"), text_rows(" ")[0])
    assert torch.equal(row("<0x0A>"), text_rows("\n")[0])
    assert torch.equal(row("<0xE4>"), W[old.get_vocab()["ä"]])
    for role, old_id in (("<s>", 1), ("</s>", 0), ("<unk>", 0)):
        assert torch.equal(row(role), W[old_id])
    assert all(
        torch.equal(x, all_tensors(a.path)[n])
        for n, x in all_tensors(byte_level).items()
        if "layers" in n
    )


@pytest.mark.parametrize("method", METHODS)
def test_transplanted_model_loads(byte_level, tok, tmp_path, method):
    a = init(byte_level, tok, out=tmp_path / "out", transplant=True, method=method)
    net, info = AutoModelForCausalLM.from_pretrained(a.path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert net.lm_head.weight is net.model.embed_tokens.weight
    assert net.config.vocab_size == len(net.lm_head.weight) == len(OLD + NEW)
    assert net.lm_head.weight.isfinite().all()
    for c in (net.config, net.generation_config):
        assert (c.bos_token_id, c.eos_token_id) == (1, 2)
    W = all_tensors(byte_level)["model.embed_tokens.weight"]
    assert torch.equal(
        net.lm_head.weight[OLD.index("中")],
        W[load_tokenizer(byte_level).encode("中", add_special_tokens=False)[0]],
    )


def test_transplant_to_bytes(byte_level, model, tmp_path):
    a = init(model, byte_level, out=tmp_path / "out", transplant=True)
    W, R = (all_tensors(p)["lm_head.weight"] for p in (model, a.path))
    new = load_tokenizer(byte_level).get_vocab()
    assert len(R) == len(new)
    for token, parts in (
        ("ä¸Ń", ["中"]),
        ("ä", ["<0xE4>"]),
        ("Ġ", ["▁"]),
        ("Ġcat", ["▁", "c", "a", "<0x74>"]),
        ("ä½", ["<0xE4>", "<0xBD>"]),
        ("<|go|>", ["<s>"]),
    ):
        mean = W[[OLD.index(part) for part in parts]].float().mean(0).bfloat16()
        assert torch.equal(R[new[token]], mean)


def test_rows_of_tokens_that_both_vocabularies_have(byte_level, tok, tmp_path):
    "Control tokens that are not ASCII, and ▁ where it is a letter and no blank"
    t = Tokenizer.from_file(str(tok / "tokenizer.json"))
    t.add_special_tokens([USER])
    t.save(str(tok / "tokenizer.json"))
    bytes_too = byte_tok(tmp_path / "more", ["a ▁ cat", "▁▁", "cat ▁ 中国"] * 9)
    W = all_tensors(byte_level)["model.embed_tokens.weight"]
    has = load_tokenizer(byte_level).get_vocab()
    for number, (new, names) in enumerate([(tok, [USER]), (bytes_too, [USER, "Ġ", "ä¸Ń"])]):
        a = init(byte_level, new, out=tmp_path / f"out{number}", transplant=True)
        R = all_tensors(a.path)["model.embed_tokens.weight"]
        wanted = load_tokenizer(new).get_vocab()
        assert all(torch.equal(R[wanted[name]], W[has[name]]) for name in names)
    assert "âĸģ" in wanted and "âĸģ" not in has
    assert not torch.equal(R[wanted["âĸģ"]], W[has["Ġ"]])
    again = init(a.path, bytes_too, out=tmp_path / "again", transplant=True)
    assert torch.equal(all_tensors(again.path)["model.embed_tokens.weight"], R)


def test_transplant_of_an_extension_is_the_extension(model, tok, tmp_path):
    a, b = (init(model, tok, out=tmp_path / f"t{t}", transplant=t) for t in (False, True))
    assert all(
        torch.equal(x, y)
        for x, y in zip(all_tensors(a.path).values(), all_tensors(b.path).values(), strict=True)
    )
    assert b.stats["n_taken"] == len(OLD)


def test_tokens_are_read_from_either_writing(byte_level, tok):
    a, b = pieces_of(load_tokenizer(byte_level)), pieces_of(load_tokenizer(tok))
    assert b == OLD + NEW and {"中", "▁cat", "▁", "<0xE4>", "<0xE4><0xBD>"} <= set(a)
    assert piece_bytes("<0xE4><0xB8>") == b"\xe4\xb8" and piece_bytes("▁a中") == " a中".encode()
    assert n_chars("<0xE4><0xB8>") == 2 / 3 and n_chars("<0xE4>") == 1 / 3 and n_chars("中国") == 2


def test_probe_of_a_transplant(byte_level, tok, tmp_path):
    c = corpus(
        ["zh=builtin:zh", "en=builtin:en"], out=tmp_path / "c", limit_chars=150_000, valid_share=0.3
    )
    rows = probe_methods(
        byte_level,
        tok,
        c.path,
        ["mean", "average"],
        seeds=1,
        steps=0,
        limit_chars=1000,
        transplant=True,
    )
    assert [r["method"] for r in rows] == ["mean", "average"]
    assert all(1 < r[lang] < 20 for r in rows for lang in ("en", "zh"))


# rows taught by the old spelling


@pytest.fixture
def read(tmp_path):
    "A corpus in which two of the three new tokens occur"
    folder = tmp_path / "read"
    folder.mkdir()
    texts = ["中国大中国a中国b中国大", "中国中国c大中国大中国", "中中国大abc中国"] * 20
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "zh.train.jsonl").write_text("".join(lines))
    return folder


def taught(model, tok, out, read, **kw):
    return init(model, tok, out=out, method="distill", corpus=read, steps=12, **kw)


def test_what_distillation_leaves_alone(model, tok, read, tmp_path):
    a = taught(model, tok, tmp_path / "out", read)
    was, now = all_tensors(model), all_tensors(a.path)
    n, begins = len(OLD), {OLD.index("中"), OLD.index("<0xE9>")}  # of 中国, 中国大; of 龙
    assert torch.equal(now["model.embed_tokens.weight"][:n], was["model.embed_tokens.weight"])
    head, moved = now["lm_head.weight"], set()
    for i, (old, new) in enumerate(zip(was["lm_head.weight"], head[:n], strict=True)):
        moved |= set() if torch.equal(old, new) else {i}
    assert moved == begins and a.stats["distill"]["n_lowered"] == 2
    assert a.stats["distill"]["n_unseen"] == 1 and not a.stats["distill"]["untied"]
    assert all(torch.equal(was[name], now[name]) for name in was if "layers" in name)
    first, last = a.stats["distill"]["error"]
    assert last < first


def test_counted_head_rows_differ_from_the_first_part_in_one_direction(
    model, tok, read, tmp_path, monkeypatch
):
    "And by the logarithm of the share that each has of what begins with 中"
    monkeypatch.setattr(distill, "STEPS", 0)  # counted, nothing learned
    a = taught(model, tok, tmp_path / "out", read)
    W = all_tensors(model)["lm_head.weight"].float()
    head = all_tensors(a.path)["lm_head.weight"].float()
    ids = [OLD.index("中"), len(OLD), len(OLD) + 1]  # 中, 中国, 中国大
    moves = torch.stack([head[i] - W[ids[0]] for i in ids])
    texts = [json.loads(line)["text"] for line in (read / "zh.train.jsonl").open()]
    seen = Counter(i for text in encode_plain(load_tokenizer(tok), texts) for i in text)
    counts = torch.tensor([seen[i] + 0.5 for i in ids])
    want = (counts / counts.sum()).log()
    ratio = moves @ moves[0] / moves[0].square().sum()
    assert min(seen[i] for i in ids) > 10
    assert torch.allclose(ratio, want / want[0], atol=0.02)
    residue = moves - ratio[:, None] * moves[0]
    assert residue.norm() < 0.02 * moves.norm()


def test_distillation_that_reads_in_16_bits(model, tok, read, tmp_path):
    "The embedding is the same, the head nearly"
    both = [taught(model, tok, tmp_path / str(d), read, dtype=d) for d in (None, "bfloat16")]
    in_32, in_16 = (all_tensors(a.path) for a in both)
    name = "model.embed_tokens.weight"
    assert torch.equal(in_32[name], in_16[name])
    before, after = in_32["lm_head.weight"].float(), in_16["lm_head.weight"].float()
    assert 0 < (after - before).norm() < 0.02 * before.norm()


def test_a_token_without_text_gets_the_shared_part_alone(model, tok, read, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "SHARED_LR", {"map": 0.0, "shift": 0.0})
    a = taught(model, tok, tmp_path / "out", read)
    mean = init(model, tok, out=tmp_path / "mean")
    name = "model.embed_tokens.weight"
    same = (all_tensors(a.path)[name] == all_tensors(mean.path)[name]).all(1).tolist()
    assert same == [True] * len(OLD) + [False, False, True]  # 龙 is in no text


def test_distillation_goes_on_where_it_was_interrupted(model, tok, read, tmp_path, monkeypatch):
    whole = taught(model, tok, tmp_path / "whole", read)
    usual = distill._lesson
    calls: list[int] = []

    def lesson(*args):
        calls.append(len(calls))
        if len(calls) == 12:
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr(distill, "_lesson", lesson)
    with pytest.raises(KeyboardInterrupt):
        taught(model, tok, tmp_path / "cut", read)
    assert (tmp_path / "cut.tmp" / distill.STATE).is_file()
    resumed = taught(model, tok, tmp_path / "cut", read)
    assert len(calls) == 12 + 2  # ten steps were kept
    assert not (resumed / distill.STATE).exists()
    one, other = all_tensors(whole.path), all_tensors(resumed.path)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_tied_model_gets_a_head_of_its_own(byte_level, tok, read, tmp_path):
    a = taught(byte_level, tok, tmp_path / "out", read, transplant=True)
    assert (
        a.stats["distill"]["untied"]
        and len(all_tensors(a.path)["lm_head.weight"]) == a.stats["n_rows"]
    )
    net, info = AutoModelForCausalLM.from_pretrained(a.path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert net.lm_head.weight is not net.model.embed_tokens.weight
    again = init(byte_level, tok, out=tmp_path / "mean", transplant=True)
    tied = AutoModelForCausalLM.from_pretrained(again.path)
    taken = [OLD.index(piece) for piece in "abc中"]
    assert torch.equal(net.model.embed_tokens.weight[taken], tied.model.embed_tokens.weight[taken])


def test_a_recipe_gives_its_corpus_to_distillation_alone():
    "Other methods do not read it, so another corpus leaves their models up to date"
    for method, reads in (("distill", True), ("mean", False)):
        recipe = {"corpus": {"sources": ["zh=a"]}, "base": {}, "init": {"method": method}}
        step = next(step for step in recipe_steps(recipe) if step.command == "init")
        assert ("corpus" in arguments(step, recipe, Path("run"))) == reads


def test_distillation_can_be_probed(model, tok, read, tmp_path):
    (read / "zh.valid.jsonl").write_text((read / "zh.train.jsonl").read_text())
    methods = ["mean", "distill"]
    rows = probe_methods(model, tok, read, methods, seeds=1, steps=0, limit_chars=300)
    assert [row["method"] for row in rows] == ["mean", "distill"]
    assert all(1 < row["zh"] < 20 for row in rows) and rows[0]["zh"] != rows[1]["zh"]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=20),
    st.integers(0, 99),
)
def test_shares_of_a_group_are_one(spellings, seed):
    counts = torch.randint(0, 50, (len(spellings),), generator=torch.Generator().manual_seed(seed))
    shares = log_shares(spellings, counts).exp()
    groups = torch.zeros(6).index_add(0, torch.tensor([s[0] for s in spellings]), shares)
    assert all(abs(total - 1) < 1e-4 for total in groups[groups > 0].tolist())


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(2, 9))
def test_stretches_are_the_text(ids, length):
    spellings = [[0], [1], [0, 1], [1, 0, 1, 0]]
    found = [*stretches(ids, spellings, length)]
    assert sum(found, []) == ids and all(found)
    sizes = [1 + sum(len(spellings[i]) for i in part) for part in found]
    assert all(size <= length or len(part) == 1 for size, part in zip(sizes, found, strict=True))


@given(st.integers(0, 30), st.integers(1, 30))
def test_a_sample_holds_each_item_once(n, size):
    few = Sample(size, seed=3)
    for i in range(n):
        few.add([i])
    kept = few.drawn()
    assert len(kept) == min(n, size) and len({i for (i,) in kept}) == len(kept)


# what it refuses; nothing is written


@pytest.fixture
def refuses(tmp_path):
    def check(match, *a, **kw):
        with pytest.raises(StageError, match=match) as e:
            init(*a, **kw, out=tmp_path / "no")
        assert not (tmp_path / "no").exists() and not (tmp_path / "no.tmp").exists()
        assert "Traceback" not in str(e.value)

    return check


def test_refused_inputs(refuses, model, tok, tmp_path):
    refuses(
        "method is 'best', expected mean, seed, first, asymmetric, average, normal or distill",
        model,
        tok,
        method="best",
    )
    refuses(
        "none does not exist; expected a tokenizer; run: cmixtral vocab --out",
        model,
        tmp_path / "none",
    )
    refuses("none does not exist; expected an HF model folder", tmp_path / "none", tok)
    refuses("holds no tokenizer.json", model, (tmp_path / "empty").mkdir() or tmp_path / "empty")
    refuses(
        "has no token that .* lacks, expected an extended tokenizer; run: cmixtral vocab",
        model,
        model,
    )
    refuses(
        "does not extend the tokenizer of .*: the first 266 tokens differ; "
        "run: cmixtral vocab .*; or make all rows anew: cmixtral init --transplant",
        model,
        write_tok(tmp_path / "x", OLD[::-1] + NEW),
    )
    refuses(
        "does not extend the tokenizer of .*: it has 265 tokens, fewer than 266; ",
        model,
        write_tok(tmp_path / "y", OLD[:-1]),
    )


def test_distillation_needs_text(refuses, model, tok, read, tmp_path):
    refuses("distill reads text, found no corpus; give --corpus DIR", model, tok, method="distill")
    (tmp_path / "a.txt").write_text("no corpus")
    kw = dict(method="distill")
    refuses("is no corpus; run: cmixtral corpus", model, tok, corpus=tmp_path / "a.txt", **kw)
    (read / "zh.train.jsonl").write_text(json.dumps({"text": "abc abc"}) + "\n")
    refuses("no text in which a quarter of the tokens is new", model, tok, corpus=read, **kw)


def test_model_without_its_tokenizer(refuses, model, tok):
    (model / "tokenizer.json").unlink()
    refuses("holds no tokenizer.json", model, tok)


def test_fewer_rows_than_tokens(refuses, model, tok, tmp_path):
    write_tok(model, OLD + ["国大"])
    refuses("has 266 rows for 267 tokens", model, write_tok(tmp_path / "y", OLD + ["国大"] + NEW))


def test_a_head_with_a_bias(refuses, tok, tmp_path):
    "Phi-1.5: one number more for each token, which would stay as it is"
    from transformers import PhiConfig, PhiForCausalLM

    p = write_tok(tmp_path / "phi", OLD)
    PhiForCausalLM(PhiConfig(**LLAMA)).save_pretrained(p)
    refuses("has a head with a bias", p, tok)


@pytest.mark.parametrize(
    "family, table",
    [
        ("gemma4_text", "model.embed_tokens_per_layer.weight"),  # one more beside the embedding
        ("rwkv", "head.weight"),  # a head under a name of its own
    ],
)
def test_rows_that_would_not_grow(family, table, refuses, tok, tmp_path):
    "The model would break at the first new token"
    sizes = dict(vocab_size=len(OLD), vocab_size_per_layer_input=len(OLD), hidden_size=32)
    few = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    config = AutoConfig.for_model(family, **sizes, **few, intermediate_size=48)
    p = write_tok(tmp_path / family, OLD)
    AutoModelForCausalLM.from_config(config).save_pretrained(p)
    refuses(f"{table} has a row for each token, and gets no new ones", p, tok)


def test_a_matrix_that_is_as_high_as_the_embedding(tok, tmp_path):
    p = write_tok(tmp_path / "llama", OLD)
    config = LlamaConfig(**LLAMA | dict(intermediate_size=len(OLD)))
    LlamaForCausalLM(config).save_pretrained(p)
    assert init(p, tok, out=tmp_path / "out").stats["n_new"] == len(NEW)


def test_ids_with_a_gap(refuses, model, tok):
    said = read_json(tok / "tokenizer.json")
    said["model"]["vocab"]["龙"] += 1
    write_json(tok / "tokenizer.json", said)
    refuses(r"269 tokens whose highest id is 269; expected ids without a gap", model, tok)


def test_truncated_shard(refuses, model, tok):
    s = sorted(model.glob("*.safetensors"))[0]
    s.write_bytes(s.read_bytes()[:-1])
    refuses("is truncated", model, tok)


def test_full_disk(refuses, model, tok, monkeypatch):
    import errno

    def full(*a):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_tensors", full)
    refuses("no space left on device", model, tok)


# the probe


def test_methods_are_ranked_by_the_mean_of_the_languages():
    rows = [
        dict(method=m, seed=s, en=e, zh=z)
        for m, s, e, z in (
            ("a", 0, 1.0, 4.0),
            ("a", 1, 2.0, 4.0),
            ("b", 0, 1.0, 3.0),
            ("b", 1, 1.0, 3.0),
        )
    ]
    first, second = rank_methods(rows)
    assert first == dict(method="b", mean=2.0, spread=0.0, en=1.0, zh=3.0)
    assert (second["method"], second["mean"], second["en"]) == ("a", 2.75, 1.5)
    assert abs(second["spread"] - 0.5**0.5 / 2) < 1e-12
    assert paired_differences(rows, against="b") == {"a": (0.75, second["spread"])}


def test_seeds_are_paired():
    "What two methods have in common with a seed, here 0 to 2, is no part of their difference"
    rows = [
        dict(method=m, seed=s, en=1.0 + s + off, zh=2.0 + s + off)
        for m, off in (("a", 0.0), ("b", 0.25))
        for s in (2, 0, 1)
    ]
    assert paired_differences(rows, against="a") == {"b": (0.25, 0.0)}
    assert paired_differences(rows[::-1], against="a") == {"b": (0.25, 0.0)}


def test_the_probe_decides(model, tok, tmp_path):
    c = corpus(
        ["zh=builtin:zh", "en=builtin:en"], out=tmp_path / "c", limit_chars=150_000, valid_share=0.3
    )
    a = init(model, tok, out=tmp_path / "probed", probe=c.path, steps=2, seeds=2)
    ranked = a.stats["probe"]
    means = [r["mean"] for r in ranked]
    assert a.stats["method"] == ranked[0]["method"] and means == sorted(means)
    assert {r["method"] for r in ranked} == set(METHODS)
    assert len((a / "probe.tsv").read_text().splitlines()) == 1 + 2 * len(METHODS)
    b = init(model, tok, out=tmp_path / "plain", method=a.stats["method"])
    assert all(
        torch.equal(x, y)
        for x, y in zip(all_tensors(a.path).values(), all_tensors(b.path).values(), strict=True)
    )


def test_a_probe_needs_held_out_text(refuses, model, tok, tmp_path):
    (tmp_path / "a.txt").write_text("no corpus")
    refuses(
        "is no corpus, expected one with held-out text; run: cmixtral corpus",
        model,
        tok,
        probe=tmp_path / "a.txt",
    )


def test_a_probe_of_three_words(refuses, model, tok, read):
    (read / "zh.valid.jsonl").write_text((read / "zh.train.jsonl").read_text())
    (read / "zh.train.jsonl").write_text("")
    refuses("has no text to train on", model, tok, probe=read)
    (read / "zh.train.jsonl").write_text(json.dumps({"text": "abc"}) + "\n")
    refuses("blocks of 128 tokens, the corpus has .* to train on", model, tok, probe=read)


def test_all_faults_at_once(model, tmp_path):
    (tmp_path / "a.txt").write_text("no corpus")
    with pytest.raises(StageError) as e:
        init(
            model,
            tmp_path / "none",
            out=tmp_path / "no",
            method="best",
            seeds=0,
            probe=tmp_path / "a.txt",
        )
    said = str(e.value)
    for fault in ("method is 'best'", "seeds is 0, expected 1 to 100", "is no corpus"):
        assert fault in said
    assert "none does not exist; expected a tokenizer" in said


def test_a_brief_training_lowers_the_loss(model):
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    x = torch.randint(3, len(OLD), (4, 16), generator=torch.Generator().manual_seed(0))
    before = net(input_ids=x, labels=x).loss.item()
    train_briefly(net, x, steps=20, lr=1e-2)
    assert net(input_ids=x, labels=x).loss.item() < before - 0.5
