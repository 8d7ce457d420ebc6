"05b_upcycle and a13b_dense: the same logits at birth, flat memory, what a Mixtral cannot hold"

import json
from pathlib import Path

import pytest
import torch
from conftest import cmixtral
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

from cmixtral_nb.checkpoints import load_tensor, tensor_files
from cmixtral_nb.dense import dense_faults, logit_change, mixture_config
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.preflight import plan_inputs
from cmixtral_nb.recipe_check import check_recipe
from cmixtral_nb.recipes import arguments, recipe_steps
from cmixtral_nb.stages import StageError, read_json
from cmixtral_nb.tokenizer_files import write_tokenizer
from cmixtral_nb.upcycle import upcycle

SIZES = dict(
    vocab_size=90,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=20_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
DENSE = dict(
    untied=LlamaConfig(**SIZES),
    tied=LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=12, rms_norm_eps=1e-3),
    all_heads=LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, rope_parameters=LLAMA3),
    yarn=LlamaConfig(**SIZES, rope_parameters=dict(rope_type="yarn", rope_theta=500.0, factor=4.0)),
    mistral=MistralConfig(**SIZES, sliding_window=5),
    everything=MistralConfig(**SIZES, sliding_window=None, head_dim=20),
)
IDS = torch.arange(3 * 40).view(3, 40) * 7919 % 90


def saved(config, folder, **kw):
    "A random model with weights large enough that a mistake would show"
    set_seed(0)
    net = AutoModelForCausalLM.from_config(config)
    for name, p in net.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.2)
    net.save_pretrained(folder, **kw)
    return net.eval()


def logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_logits_are_those_of_the_dense_model(name, top_k, tmp_path):
    dense = saved(DENSE[name], tmp_path / "dense")
    made = upcycle(tmp_path / "dense", tmp_path / "mixture", experts=3, top_k=top_k)
    config = read_json(tmp_path / "mixture" / "config.json")
    assert config["model_type"] == "mixtral"
    assert config["architectures"] == ["MixtralForCausalLM"]
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    assert type(net) is MixtralForCausalLM
    with torch.no_grad():
        expected = dense(input_ids=IDS).logits
    largest = expected.abs().max()
    assert (logits(tmp_path / "mixture") - expected).abs().max() <= 5e-5 and largest > 1
    assert made.stats["logit_change"] <= 1e-5
    assert made.stats["n_params"] == net.num_parameters()


@pytest.mark.parametrize(
    "wrong",
    [dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)), dict(rms_norm_eps=1e-5)],
)
def test_a_value_of_the_wrong_side_would_show(wrong, tmp_path):
    "What `mixture_config` takes from the dense model and not from Mixtral's defaults"
    saved(DENSE["tied"], tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "mixture")
    path = tmp_path / "mixture" / "config.json"
    path.write_text(json.dumps({**read_json(path), **wrong}))
    assert logit_change(tmp_path / "dense", tmp_path / "mixture") > 1e-3


def test_every_tensor_is_a_copy_and_shards_change_nothing(tmp_path):
    saved(DENSE["untied"], tmp_path / "dense", max_shard_size="30KB")
    assert len(set(tensor_files(tmp_path / "dense").values())) > 1
    upcycle(tmp_path / "dense", tmp_path / "one")
    upcycle(tmp_path / "dense", tmp_path / "many", shard_bytes=20_000)
    one, many = tensor_files(tmp_path / "one"), tensor_files(tmp_path / "many")
    assert len(set(many.values())) > 3 and one.keys() == many.keys()
    for name in one:
        assert torch.equal(load_tensor(one, name), load_tensor(many, name))
    dense = tensor_files(tmp_path / "dense")
    for expert in range(4):
        found = load_tensor(one, f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight")
        assert torch.equal(found, load_tensor(dense, "model.layers.1.mlp.down_proj.weight"))
    assert torch.equal(load_tensor(one, "lm_head.weight"), load_tensor(dense, "lm_head.weight"))
    gates = [load_tensor(one, f"model.layers.{i}.block_sparse_moe.gate.weight") for i in (0, 1)]
    assert gates[0].shape == (4, 32) and not torch.equal(*gates)
    assert 0.015 < torch.cat(gates).std() < 0.025
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))


def test_seed_and_noise_are_what_they_say(tmp_path):
    saved(DENSE["untied"], tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "a", noise=0.1, seed=1)
    upcycle(tmp_path / "dense", tmp_path / "b", noise=0.1, seed=1)
    upcycle(tmp_path / "dense", tmp_path / "c", noise=0.1, seed=2)
    a, b, c = (tensor_files(tmp_path / name) for name in "abc")
    dense = load_tensor(tensor_files(tmp_path / "dense"), "model.layers.0.mlp.up_proj.weight")
    names = [f"model.layers.0.block_sparse_moe.experts.{i}.w3.weight" for i in range(4)]
    for name in a:
        assert torch.equal(load_tensor(a, name), load_tensor(b, name))
    for name in names:
        moved = load_tensor(a, name) - dense
        assert moved.std() == pytest.approx(0.1 * dense.std().item(), rel=0.1)
        assert not torch.equal(load_tensor(a, name), load_tensor(c, name))
    assert not torch.equal(load_tensor(a, names[0]), load_tensor(a, names[1]))
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(
            load_tensor(a, name), load_tensor(tensor_files(tmp_path / "dense"), name)
        )
    assert logit_change(tmp_path / "dense", tmp_path / "a") > 1e-3


def test_bfloat16_stays_bfloat16(tmp_path):
    set_seed(0)
    AutoModelForCausalLM.from_config(DENSE["tied"]).bfloat16().save_pretrained(tmp_path / "dense")
    made = upcycle(tmp_path / "dense", tmp_path / "mixture")
    files = tensor_files(tmp_path / "mixture")
    assert {load_tensor(files, name).dtype for name in files} == {torch.bfloat16}
    assert read_json(tmp_path / "mixture" / "config.json")["dtype"] == "bfloat16"
    assert "lm_head.weight" not in files and made.stats["logit_change"] <= 1e-5


def test_the_routers_learn_once_the_experts_differ(tmp_path):
    saved(DENSE["untied"], tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "mixture")
    net = MixtralForCausalLM.from_pretrained(tmp_path / "mixture").train()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)

    def router_gradient():
        optimiser.zero_grad()
        net(input_ids=IDS, labels=IDS).loss.backward()
        experts = [layer.mlp.experts.down_proj.grad for layer in net.model.layers]
        assert all((expert.abs().amax((1, 2)) > 0).all() for expert in experts)
        return sum(layer.mlp.gate.weight.grad.norm().item() for layer in net.model.layers)

    at_birth = router_gradient()
    optimiser.step()
    assert router_gradient() > 1000 * at_birth


# what a Mixtral cannot hold


@pytest.mark.parametrize(
    "config,expected",
    [
        (LlamaConfig(**SIZES, attention_bias=True), "self_attn.q_proj.bias"),
        (LlamaConfig(**SIZES, mlp_bias=True), "mlp.gate_proj.bias"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "no place for hidden_act 'gelu'"),
        (Qwen2Config(**SIZES), "self_attn.q_proj.bias"),
        (Qwen3Config(**SIZES), "self_attn.q_norm.weight"),
        (Gemma2Config(**SIZES, head_dim=8), "no place for hidden_act 'gelu_pytorch_tanh'"),
        (Olmo2Config(**SIZES), "self_attn.q_norm.weight"),
        (GraniteConfig(**SIZES), "computes something else"),
        (MixtralConfig(**SIZES), "a mixture of 8 experts already"),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else "",
)
def test_what_a_mixtral_cannot_hold_is_named_on_one_line(config, expected, tmp_path):
    saved(config, tmp_path / "dense")
    with pytest.raises(StageError) as e:
        upcycle(tmp_path / "dense", tmp_path / "out")
    assert len(e.value.args) == 1 and expected in e.value.args[0], e.value.args
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def test_a_qwen2_without_biases_is_held(tmp_path):
    net = saved(Qwen2Config(**SIZES), tmp_path / "with")
    state = {k: v for k, v in net.state_dict().items() if not k.endswith(".bias")}
    net.save_pretrained(tmp_path / "dense", state_dict=state)
    config = read_json(tmp_path / "dense" / "config.json")
    assert dense_faults(config, state) == []
    upcycle(tmp_path / "dense", tmp_path / "mixture")
    made = mixture_config(tmp_path / "dense", 4, 2)
    assert made["sliding_window"] is None and made["rms_norm_eps"] == 1e-6


def test_windows_in_some_layers_are_refused():
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert "layers with and without a sliding window" in dense_faults(config.to_dict(), [])[0]


def test_the_command_says_all_faults_at_once(tmp_path, capsys):
    code = "upcycle --model gone --experts 1 --top-k 4 --noise -1 --out x"
    done = cmixtral(*code.split(), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    found = [line.removeprefix("StageError: ").split(",")[0] for line in lines]
    assert found[:3] == ["experts is 1", "top_k is 4", "noise is -1.0"]
    assert "gone does not exist" in lines[3]


# in a recipe


def test_a_recipe_may_begin_with_a_dense_model(tmp_path):
    saved(DENSE["tied"], tmp_path / "dense")
    write_tokenizer(base_tokenizer_model(), tmp_path / "dense")
    recipe = {
        "name": "up",
        "corpus": {"sources": ["zh=builtin:zh", "en=builtin:en"]},
        "tokenizer": {},
        "search": {},
        "vocab": {},
        "upcycle": {"model": str(tmp_path / "dense"), "experts": 3},
        "init": {},
        "pack": {},
        "pretrain": {},
    }
    assert check_recipe(recipe) == []
    steps = {step.stage: step for step in recipe_steps(recipe)}
    assert list(steps)[4:6] == ["upcycle", "init"]
    assert arguments(steps["init"], recipe, Path("run"))["model"] == Path("run/base")
    upcycle(**arguments(steps["upcycle"], recipe, tmp_path), out=tmp_path / "base")
    planned = plan_inputs(recipe)["config"]  # before the mixture is there
    assert planned == read_json(tmp_path / "base" / "config.json")
    assert planned["num_local_experts"] == 3
    both = check_recipe({**recipe, "base": {}})
    assert "[base] and [upcycle] both make the base of the run; leave out one of them" in both
    named = check_recipe({**recipe, "init": {"model": str(tmp_path / "dense")}})
    assert any("[upcycle] has no effect" in fault for fault in named), named
