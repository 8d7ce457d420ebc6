"a19_plan: counts against real models, bytes against what is measured, remedies, every message"

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import test_experts
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralForCausalLM,
)

from cmixtral_nb import plan as planning
from cmixtral_nb.loading import cache_name, load_model, save_4bit
from cmixtral_nb.machine import available_bytes
from cmixtral_nb.mixtral import small_config
from cmixtral_nb.placement import spread
from cmixtral_nb.plan import (
    cards_text,
    count_parameters,
    disk_plan,
    frozen_bytes,
    gpu_table,
    inference_faults,
    lora_parameters,
    memory_plan,
    nf4_bytes,
    peak_flops,
    plan_faults,
    settings_plan,
    smallest_change,
    stage_bytes,
    step_flops,
    time_plan,
    time_text,
)
from cmixtral_nb.preflight import plan, plan_inputs, plan_of, preflight, tokens_of
from cmixtral_nb.qlora import add_lora, parameter_table
from cmixtral_nb.recipes import read_recipe, recipe_steps
from cmixtral_nb.stages import StageError, read_json, write_json

CONFIG = dict(hidden=16, layers=2, intermediate=24, heads=2, kv_heads=1, vocab_size=60)
DENSE = dict(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
SEED = dict(
    rank=64,
    alpha=128.0,
    rows="all",
    n_old=32_000,
    load_in_4bit=True,
    optim="paged_adamw_8bit",
    batch=16,
    accumulation=1,
    dropout=0.05,
    zero=0,
    checkpointing=None,
)
GB = 10**9


def faults(have, n_gpus=1, device="cuda", **kw):
    return plan_faults(
        "mixtral", {**SEED, **kw}, 2048, 57_000, device, n_gpus, have=round(have * GB)
    )


# counts


@pytest.mark.parametrize(
    "cls,config",
    [
        (MixtralForCausalLM, small_config(**CONFIG)),
        (MixtralForCausalLM, small_config(hidden=32, layers=1, experts=8, heads=4, kv_heads=4)),
        (LlamaForCausalLM, LlamaConfig(**DENSE)),
        (
            LlamaForCausalLM,
            LlamaConfig(**DENSE, num_key_value_heads=1, head_dim=12, tie_word_embeddings=True),
        ),
        (LlamaForCausalLM, LlamaConfig(**DENSE, attention_bias=True, mlp_bias=True)),
        (MistralForCausalLM, MistralConfig(**DENSE, num_key_value_heads=1, head_dim=20)),
        (MistralForCausalLM, MistralConfig(**DENSE, num_key_value_heads=2, head_dim=None)),
    ],
)
def test_parameters_are_those_of_the_real_model(cls, config, tmp_path):
    net = cls(config)
    counts = count_parameters(config)
    assert (
        counts["total"]
        == net.num_parameters()
        == sum(v for k, v in counts.items() if k not in ("total", "active"))
    )
    net.save_pretrained(tmp_path)
    assert (
        count_parameters(tmp_path)
        == count_parameters(read_json(tmp_path / "config.json"))
        == counts
    )
    rows = 1 if config.tie_word_embeddings else 2
    assert (
        count_parameters(tmp_path, config.vocab_size + 1)["total"]
        == counts["total"] + rows * config.hidden_size
    )
    assert frozen_bytes(config, 0, False, "float32") == 4 * counts["total"]


# Every family that transformers builds, with sizes of which no two are equal by chance
_SMALL = dict(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=20,
)
_MOE = dict(_SMALL, moe_intermediate_size=40, num_experts=6, num_experts_per_tok=2)
_LOCAL = dict(_SMALL, num_local_experts=6, num_experts_per_tok=2)
_SHARED = dict(_MOE, shared_expert_intermediate_size=72)
_ROUTED = dict(_SMALL, moe_intermediate_size=40, n_routed_experts=6, num_experts_per_tok=2)
_ROUTED |= dict(n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1)
_MLA = dict(q_lora_rank=24, kv_lora_rank=28, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
_MIXED = dict(layer_types=["linear_attention"] * 3 + ["full_attention"])
FAMILIES = {
    "mixtral": _LOCAL,
    "phimoe": _LOCAL,
    "qwen2_moe": _SHARED,
    "qwen3_moe": _MOE,
    "qwen3_next": dict(_SHARED, **_MIXED),
    "qwen3_5_moe": dict(text_config=dict(_SHARED, **_MIXED)),
    "olmoe": _MOE,
    "deepseek_v2": dict(_ROUTED, **_MLA),
    "deepseek_v3": dict(_ROUTED, **_MLA),
    "glm4_moe": _ROUTED,
    "granitemoe": _LOCAL,
    "gpt_oss": _LOCAL,
    "nemotron_h": dict(
        _ROUTED,
        layers_block_type=["mamba", "moe", "attention", "mlp"],
        moe_shared_expert_intermediate_size=72,
        mamba_num_heads=4,
        mamba_head_dim=32,
        n_groups=2,
        ssm_state_size=16,
    ),
    "llama4": dict(
        text_config=dict(_LOCAL, intermediate_size_mlp=128, interleave_moe_layer_step=2)
    ),
    "llama": _SMALL,
    "mistral": _SMALL,
    "qwen2": _SMALL,
    "qwen3": _SMALL,
    "gemma3_text": _SMALL,
    "gemma3": dict(text_config=_SMALL),
    "gemma4_text": dict(
        _SMALL,
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=2,
        moe_intermediate_size=40,
        hidden_size_per_layer_input=0,
        global_head_dim=20,
    ),
}


_WIDE_EXPERTS = ("mixtral", "phimoe", "olmoe", "granitemoe", "gpt_oss", "llama4")  # 96, not 40


def on_meta(name):
    "The model that transformers builds"
    config = json.loads(json.dumps(FAMILIES[name]))
    with torch.device("meta"):
        asked = AutoConfig.for_model(name, **config)
        return dict(config, model_type=name), AutoModelForCausalLM.from_config(asked)


def kind_of(name):
    "Which kind a parameter is, by its name alone: an independent truth"
    if "norm" in name:
        return "norms"
    if "embed" in name and "vision" not in name:
        return "embedding"
    if name.startswith("lm_head"):
        return "head"
    if "shared_expert_gate" in name or re.search(r"\.(gate|router)\.", name):
        return "router"
    if "shared_expert" in name:
        return "shared"
    if ".experts." in name:
        return "experts"
    if re.search(r"\.(mlp|feed_forward|mixer)\.(gate_proj|up_proj|down_proj)\.", name):
        return "mlp"
    return "attention" if re.search("attn|mixer", name) else "other"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_counted_by_kind(name):
    config, net = on_meta(name)
    counts = count_parameters(config)
    expected = dict.fromkeys(counts, 0)
    for path, p in net.named_parameters():
        expected["other" if "vision" in path else kind_of(path)] += p.numel()
    sums = {kind: n for kind, n in counts.items() if kind not in ("total", "active")}
    assert sums == {kind: expected[kind] for kind in sums}
    assert counts["total"] == net.num_parameters() == sum(p.numel() for p in net.parameters())
    idle = counts["experts"] * 4 // 6 if counts["experts"] and name != "llama4" else 0
    if name == "llama4":
        assert counts["active"] < counts["total"]
    else:
        assert counts["active"] == counts["total"] - idle
    rows = net.get_input_embeddings().weight.shape[0]
    grown = count_parameters(config, rows + 3)["total"] - counts["total"]
    assert grown == 3 * 64 * (2 if counts["head"] else 1)
    assert counts["head"] or net.config.get_text_config().tie_word_embeddings


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_planned(name):
    "Each matrix of each layer has its LoRA; in 16 bits a plan is the checkpoint"
    config, net = on_meta(name)
    thin = 0
    for path, module in net.named_modules():
        kind = kind_of(f"{path}.weight")
        linear = isinstance(module, torch.nn.Linear) and "vision" not in path
        read_past = path.endswith("mixer.out_proj")  # by a fused kernel, after Mamba's scan
        if linear and kind not in ("head", "router") and not read_past:
            thin += module.in_features + module.out_features
        for leaf, p in module.named_parameters(recurse=False):
            if p.ndim == 3 and kind_of(f"{path}.{leaf}.") == "experts":
                n_experts, a, b = p.shape
                f = 96 if name in _WIDE_EXPERTS else 40
                thin += n_experts * (a * b // (64 * f)) * (64 + f)
    assert lora_parameters(config, 5) == 5 * thin
    total = count_parameters(config)["total"]
    assert frozen_bytes(config, 0, False, "float32") == 4 * total
    assert frozen_bytes(config) < 2 * total
    plan = memory_plan(config, rank=8, dtype="float32", n_old=400, rows="new")["bytes"]
    assert plan["static"] < plan["total"] and plan["activations"] > 0
    assert step_flops(config, rank=0, rows="none", length=16) > 0
    assert planning.inference_bytes(config)["cache"] > 0


_UNGATED = ["bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mamba", "opt"]


@pytest.mark.parametrize("name", _UNGATED)
def test_a_model_without_gated_networks_is_planned(name):
    "Its matrices are not those of a Llama; of GPT-2, LoRA reaches none"
    sizes = dict(vocab_size=500, hidden_size=64, num_attention_heads=4)
    config = AutoConfig.for_model(name, **sizes).to_dict()
    plan = memory_plan(config, rank=8, n_old=400, rows="new")
    assert bool(plan["trainable"]["lora"]) == (name != "gpt2")
    assert plan["bytes"]["static"] < plan["bytes"]["total"]
    assert planning.inference_bytes(config)["total"] > plan["bytes"]["frozen"]


@pytest.mark.parametrize("family", test_experts.FAMILIES)
def test_a_mixture_holds_what_was_planned(family, tmp_path):
    "Frozen weights in 4 bits, LoRA on each matrix, and the cache of what was read"
    stock = test_experts.random_model(family)
    stock.save_pretrained(tmp_path)
    assert count_parameters(tmp_path) == count_parameters(stock.config)
    frozen = load_model(tmp_path, load_in_4bit=True, device="cpu", trainable=True)
    held = sum(row["bytes"] for row in parameter_table(frozen))
    assert frozen_bytes(tmp_path, 0, True, "float32") == held
    net = add_lora(frozen, rank=4, rows="none")
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert lora_parameters(tmp_path, 4) == trained
    ids = test_experts.IDS[:1]
    with torch.no_grad():
        out = stock(ids, use_cache=True)
    cache = out[cache_name(stock)]
    keeping = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    n_kept = sum(layer.keys.numel() + layer.values.numel() for layer in keeping)
    planned = planning.inference_bytes(tmp_path, 0, False, "float32", ids.shape[1])
    assert planned["cache"] == 4 * n_kept


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_every_family_go_to_gpus_whole(name):
    "In their order; what does not fit is refused"
    asked = AutoConfig.for_model(name, **json.loads(json.dumps(FAMILIES[name])))
    for load_in_4bit in (True, False):
        planned = frozen_bytes(asked, 0, load_in_4bit)
        places = spread(asked, [planned] * 3, load_in_4bit, torch.bfloat16)
        layers = [gpu for place, gpu in places.items() if re.search(r"layers\.\d+$", place)]
        assert layers == sorted(layers)
        assert not any(re.search(r"layers\.\d+\.", place) for place in places)
        with pytest.raises(StageError, match="layers are not cut, 2 GPUs have"):
            spread(asked, [planned // 4] * 2, load_in_4bit, torch.bfloat16)


@pytest.mark.parametrize("name", ["phimoe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss"])
def test_gpus_are_filled_by_what_is_planned(name):
    "With the sizes that transformers names a family's own"
    config = AutoConfig.for_model(name)
    planned = frozen_bytes(config)
    with pytest.raises(StageError) as e:
        spread(config, [planned // 3] * 2, True, torch.bfloat16)
    told = re.findall(r"weights take ([\d.]+) GB", str(e.value))
    assert float(told[0]) == pytest.approx(planned / GB, rel=0.01)
    assert set(spread(config, [int(0.7 * planned)] * 2, True, torch.bfloat16).values()) == {0, 1}


def test_many_small_experts_are_unpacked_together():
    "All 128 of a layer of Qwen3-30B, in 16 bits on a GPU; of Mixtral one matrix at a time"
    qwen = dict(model_type="qwen3_moe", num_experts_per_tok=8, num_hidden_layers=2, head_dim=128)
    layers = [
        memory_plan(dict(qwen, num_experts=n), rank=0, batch=1, length=1)["bytes"]["layer"]
        for n in (15, 128)
    ]
    matrix = 2048 * 768
    assert layers[1] - layers[0] == pytest.approx(2 * 128 * matrix - 2 * 2048 * 4096, rel=0.02)
    assert planning._unpacked(planning._shape("mixtral"), 2) == 4096 * 14336


def test_a_mixture_that_is_stored_in_4_bits_stays_so(tmp_path):
    stock = test_experts.random_model("qwen3_moe")
    stock.save_pretrained(tmp_path / "stock")
    net = load_model(tmp_path / "stock", load_in_4bit=True, device="cpu")
    save_4bit(net, tmp_path / "four")
    settings = dict(load_in_4bit=False)
    plans = [settings_plan(tmp_path / name, settings, 64) for name in ("four", "stock")]
    held = [plan["bytes"]["frozen"] for plan in plans]
    assert held[0] == frozen_bytes(tmp_path / "stock", 0, True) < held[1] / 2
    for bits, name in ((4, "four"), (16, "stock")):
        assert f"{bits} bits" in cards_text(tmp_path / name, dict(generate=settings))
        need = stage_bytes(tmp_path / name, settings)
        assert need == stage_bytes(tmp_path / "stock", dict(load_in_4bit=bits == 4))


@pytest.mark.parametrize(
    "sizes,total,active",
    [  # billions, as the models' own cards say
        (dict(model_type="deepseek_v3"), 671, 37),
        (dict(model_type="gpt_oss"), 117, 5.1),
        (
            dict(
                model_type="qwen3_moe",
                vocab_size=151_936,
                hidden_size=2048,
                num_hidden_layers=48,
                num_attention_heads=32,
                num_key_value_heads=4,
                head_dim=128,
                moe_intermediate_size=768,
                num_experts=128,
                num_experts_per_tok=8,
            ),
            30.5,
            3.3,
        ),
        (dict(model_type="phimoe"), 42, 6.6),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_real_models_have_the_published_sizes(sizes, total, active):
    counts = count_parameters(sizes)
    assert counts["total"] / GB == pytest.approx(total, rel=0.005)
    published = counts["active"] - counts["embedding"] * (sizes["model_type"] == "gpt_oss")
    assert published / GB == pytest.approx(active, rel=0.03)


def by_size(matrices):
    "(part, sizes) -> how many"
    counted: Counter = Counter()
    for part, n_out, n_in, times in matrices:
        counted[part, min(n_out, n_in), max(n_out, n_in)] += times
    return counted


@pytest.mark.parametrize("name", ["mixtral", "mistral", "llama"])
def test_formulas_and_built_models_agree(name):
    "What is planned by formula, for speed, is what would be built"
    from cmixtral_nb.parameters import anatomy

    config = dict(_LOCAL if name == "mixtral" else _SMALL, model_type=name)
    shape, built = planning._shape(config), planning._built_shape(anatomy(config))
    for field in set(shape._fields) - {"biased", "built"}:
        assert getattr(shape, field) == getattr(built, field), field
    assert by_size(planning._matrices(shape)) == by_size(planning._matrices(built))
    held = [Counter(dict(planning._in_4bit(built))), Counter()]
    for n, times in planning._in_4bit(shape):
        held[1][n] += times
    assert held[0] == held[1]
    by_formula, counts = planning._counts(shape, 0), planning._built_counts(built, 0)
    assert by_formula == {kind: counts[kind] for kind in by_formula}
    assert sum(by_formula.values()) == sum(counts.values())


def test_active_parameters():
    assert (
        count_parameters(small_config(**CONFIG, experts=2, top_k=2))["active"]
        == count_parameters(small_config(**CONFIG, experts=2))["total"]
    )
    dense = count_parameters(LlamaConfig(**DENSE))
    assert dense["active"] == dense["total"] and dense["experts"] == dense["router"] == 0


def test_mixtral_8x7b_has_the_numbers_that_were_counted():
    p = memory_plan(vocab_size=57_000)
    assert [
        round(p["parameters"]["total"] / GB, 2),
        round(p["bytes"]["bf16"] / GB, 1),
        round(p["bytes"]["frozen"] / GB, 1),
    ] == [46.91, 93.8, 24.9]
    assert [round(p["trainable"][k] / GB, 3) for k in ("lora", "rows")] == [0.960, 0.467]
    assert round(memory_plan(vocab_size=57_000, rows="new")["trainable"]["rows"] / GB, 3) == 0.205
    static = [
        memory_plan(vocab_size=57_000, rank=r, rows=rows)["bytes"]["static"] / GB
        for r, rows in ((64, "all"), (64, "new"), (0, "new"))
    ]
    assert static == pytest.approx([40.6, 36.6, 26.9], abs=0.06)
    assert p["bytes"]["logits"] / GB == pytest.approx(0.93, abs=0.005)


# what is measured


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Small, but large enough that NF4's blocks are whole"
    tmp = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    wide = dict(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    nets = dict(
        mixtral=MixtralForCausalLM(
            small_config(hidden=64, layers=2, intermediate=160, heads=4, kv_heads=2, vocab_size=400)
        ),
        llama=LlamaForCausalLM(LlamaConfig(**wide, head_dim=24)),
        tied=LlamaForCausalLM(LlamaConfig(**wide, tie_word_embeddings=True)),
    )
    for name, net in nets.items():
        net.save_pretrained(tmp / name)
    return tmp


def trained(folder, rank, rows, load_in_4bit):
    "A model after one step, and its optimiser"
    from cmixtral_nb.loading import load_model
    from cmixtral_nb.qlora import add_lora

    net = add_lora(
        load_model(folder, load_in_4bit=load_in_4bit, device="cpu", trainable=True),
        rank,
        2 * rank,
        0.05,
        rows,
        300,
    ).train()
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    x = torch.randint(0, 400, (2, 16))
    net(input_ids=x, labels=x).loss.backward()
    opt.step()
    return net, opt


def bytes_of(net, opt):
    "Parameters with NF4's constants, gradients, moments; and the buffers beside"
    from cmixtral_nb.qlora import parameter_table

    size = sum(r["bytes"] for r in parameter_table(net)) + sum(
        p.grad.nbytes for p in net.parameters() if p.grad is not None
    )
    return size + sum(t.nbytes for s in opt.state.values() for t in s.values()), sum(
        b.nbytes for b in net.buffers() if b.numel() > 400
    )


@pytest.mark.parametrize(
    "name,rows,load_in_4bit",
    itertools.product(("mixtral", "llama", "tied"), ("all", "new", "none"), (True, False)),
)
def test_static_bytes_are_what_is_measured(models, name, rows, load_in_4bit):
    net, opt = trained(models / name, 4, rows, load_in_4bit)
    b = memory_plan(models / name, 0, 4, rows, 300, load_in_4bit, "adamw_torch", "float32")["bytes"]
    static, buffers = bytes_of(net, opt)
    assert b["static"] == pytest.approx(static, rel=0.03)
    assert b["copies"] == buffers


def test_static_bytes_of_the_tiny_recipe_are_what_is_measured(tmp_path):
    recipe = read_recipe("tiny")
    c = plan_inputs(recipe)["config"]
    MixtralForCausalLM(small_config(vocab_size=c["vocab_size"])).save_pretrained(tmp_path)
    recipe = {k: v for k, v in recipe.items() if k not in ("vocab", "search")}
    net, opt = trained(tmp_path, recipe["pretrain"]["rank"], "all", True)
    assert plan_of(recipe, device="cpu")["bytes"]["static"] == pytest.approx(
        bytes_of(net, opt)[0], rel=0.03
    )


def test_lora_parameters_are_those_of_the_real_modules():
    from cmixtral_nb.experts import split_experts
    from cmixtral_nb.qlora import add_lora

    net = split_experts(MixtralForCausalLM(small_config(**CONFIG)))
    net = add_lora(net, rank=3, rows="none")
    assert lora_parameters(small_config(**CONFIG), 3) == sum(
        p.numel() for n, p in net.named_parameters() if "lora_" in n
    )


@pytest.mark.parametrize(
    "name,rows,checkpointing",
    itertools.product(("mixtral", "llama"), ("all", "none"), (False, True)),
)
def test_operations_are_those_that_pytorch_counts(models, name, rows, checkpointing):
    from torch.utils.flop_counter import FlopCounterMode

    from cmixtral_nb.loading import load_model
    from cmixtral_nb.qlora import add_lora

    net = add_lora(
        load_model(models / name, device="cpu", trainable=True, attn="eager"), 4, rows=rows
    ).train()
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    net.enable_input_require_grads()
    x = torch.randint(0, 400, (2, 32))
    with FlopCounterMode(display=False) as counter:
        net(input_ids=x, labels=x).loss.backward()
    # With the embedding frozen, nothing asks for the gradient of the first LoRA's input; done
    # again, a layer stops before its last product.
    assert step_flops(models / name, 0, 4, rows, 32, checkpointing) == pytest.approx(
        counter.get_total_flops() / x.numel(),
        rel=0.03 if rows == "none" else 0.002 if checkpointing else 1e-6,
    )


# plans


def test_plan_without_4bit_is_the_checkpoint():
    p = memory_plan(load_in_4bit=False, rank=0, rows="none")
    assert p["bytes"]["static"] == pytest.approx(p["bytes"]["bf16"], rel=1e-4) and p[
        "trainable"
    ] == dict(lora=0, rows=0)  # router and norms in float32
    assert time_plan(n_tokens=1000, n_gpus=2)["days"] * 2 * 24 == pytest.approx(
        time_plan(n_tokens=1000)["gpu_hours"]
    )


def test_nf4_counts_blocks_that_are_not_full():
    assert [nf4_bytes(n) for n in (1, 64, 65, 64 * 256, 64 * 256 + 1)] == [
        1 + 1 + 4,
        32 + 1 + 4,
        33 + 2 + 4,
        8192 + 256 + 4,
        8193 + 257 + 8,
    ]


def test_each_saving_saves():
    start = dict(vocab_size=57_000, batch=16, optim="adamw_torch", n_gpus=8)

    def total(**kw):
        return memory_plan(**{**start, **kw})["bytes"]["total"]

    for kw in (
        dict(batch=8),
        dict(optim="paged_adamw_8bit"),
        dict(zero=2),
        dict(rows="new"),
        dict(rank=8),
        dict(rank=0),
        dict(dropout=0.0),
        dict(n_gpus=1),
    ):
        assert total(**kw) <= total(), kw
    for more in dict(checkpointing=False), dict(load_in_4bit=False), dict(length=4096):
        assert total(**more) > total(), more


def test_zero_2_divides_gradients_and_moments_but_not_weights():
    b = {n: memory_plan(vocab_size=57_000, zero=2, n_gpus=n)["bytes"] for n in (1, 8)}
    assert b[1]["gradients"] == pytest.approx(8 * b[8]["gradients"], abs=8) and b[1][
        "optimiser"
    ] == pytest.approx(8 * b[8]["optimiser"], abs=8)
    assert b[1]["weights"] == b[8]["weights"] and b[1]["frozen"] == b[8]["frozen"]
    parallel = memory_plan(vocab_size=57_000, n_gpus=2)["bytes"]
    assert parallel["copies"] == parallel["gradients"]


def test_a_checkpoint_that_is_stored_in_4_bits_stays_so():
    c = dict(planning.MIXTRAL_8X7B, quantization_config=dict(load_in_4bit=True))
    assert (
        settings_plan(c, dict(SEED, load_in_4bit=False), 2048)["bytes"]["frozen"]
        == settings_plan(c, SEED, 2048)["bytes"]["frozen"]
    )


def test_32_bits_on_a_gpu_are_planned_as_such():
    "Weights twice as large, and CUDA beside them"
    settings = dict(SEED, load_in_4bit=False)
    short, full = (
        settings_plan("mixtral", dict(settings, dtype=dtype), 2048)["bytes"]
        for dtype in (None, "float32")
    )
    assert full["frozen"] == pytest.approx(2 * short["frozen"], rel=0.01)
    assert full["cuda"] > short["cuda"]


def test_conversations_of_a_batch_share_one_mask():
    "Each token of the row has its pair with each"
    settings = dict(SEED, batch=4, attn="sdpa")
    apart, one_row = (
        settings_plan("mixtral", dict(settings, **more), 512)["bytes"]["activations"]
        for more in ({}, dict(loss_on="answers"))
    )
    assert one_row - apart == (4 * 512) ** 2 - 4 * 512**2


def test_gpu_table_says_what_fits():
    lines = gpu_table(
        lambda zero, n: (30 if zero else 45) * GB, cards=(24, 40, 48), most=2
    ).splitlines()
    assert [line.split() for line in lines[3:]] == [
        ["fits", "24", "GB", "-", "-"],
        ["fits", "40", "GB", "ZeRO-2", "ZeRO-2"],
        ["fits", "48", "GB", "yes", "both"],
    ]


def test_disk_of_a_local_model_reads_its_shards(tmp_path):
    net = MixtralForCausalLM(small_config(**CONFIG))
    net.save_pretrained(tmp_path, max_shard_size="9KB")
    files = {f: f.stat().st_size for f in tmp_path.glob("*.safetensors")}
    d = disk_plan(tmp_path, 61, 100, 800, 1000, 4, tmp_path)
    assert (
        len(files) > 3
        and d["base checkpoint"]
        == sum(files.values())
        > d["init: shards with rows"]
        > 2 * 4 * 61 * 16
    )
    assert (
        d["pack: tokens"] == 2000
        and d["pretrain: checkpoints while it runs"] == 3 * 100 * 12
        and d["merge: model"] == 4 * (net.num_parameters() + 32)
    )
    assert disk_plan("mixtral", 70_000, 0, 0, 1000)[
        "pack: tokens"
    ] == 4000 and "pack: tokens" not in disk_plan("mixtral", 57_000, 0, 0)


def test_time_where_the_tokens_are_not_known():
    assert (
        "each billion tokens (how many there are is not known before they are packed)"
        in time_text("mixtral", 0)
    )
    assert "42,000,000,000 tokens: " in time_text(
        "mixtral", 42 * GB
    ) and "at 50% of the peak" in time_text("mixtral", 1, 0.5)


@pytest.mark.parametrize(
    "device,teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA H800", 0),  # not known: nothing is claimed of it
        ("NVIDIA H20", 0),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 0),
        ("Tesla V100-SXM2-16GB", 0),  # no bfloat16
        ("cpu", 0),
    ],
)
def test_a_card_is_found_by_its_whole_name(device, teraflops):
    assert peak_flops(device) == teraflops * 1e12


# what would make it fit


def test_what_fits_has_no_fault():
    assert faults(80) == []
    assert plan_faults("mixtral", SEED, 2048, 57_000, "cpu", have=10**15) == []


def test_a_smaller_batch_comes_first_and_the_step_keeps_its_size():
    assert faults(60) == [
        "[pretrain] needs 72.4 GB on each GPU, found 60.0 GB; "
        "set batch = 8, accumulation = 2; run: cmixtral plan RECIPE"
    ]
    assert faults(60, accumulation=3)[0].count("batch = 8, accumulation = 6") == 1


@pytest.mark.parametrize(
    "have,n_gpus,kw,says",
    [
        (60, 1, dict(batch=1, checkpointing=False), "set checkpointing = true"),
        (50, 1, dict(batch=1, optim="adamw_torch"), 'set optim = "paged_adamw_8bit"'),
        (49, 8, dict(batch=1), "set zero = 2"),
        (48, 1, dict(batch=1), 'set rows = "new"'),
        (38.5, 1, dict(batch=1, rows="none"), "set rank = 32, alpha = 64"),
        (49, 1, dict(batch=1, load_in_4bit=False), "set load_in_4bit = true"),
        (
            35.37,
            1,
            dict(rank=32, alpha=32.0),
            'set batch = 1, rows = "new", rank = 8, accumulation = 16, alpha = 8',
        ),
    ],
)
def test_the_mildest_change_that_fits(have, n_gpus, kw, says):
    assert f"; {says}; run" in faults(have, n_gpus, **kw)[0]


@pytest.mark.parametrize("have", range(36, 74, 4))
def test_the_change_that_is_named_fits_and_milder_ones_do_not(have):
    def need(settings):
        return settings_plan("mixtral", settings, 2048, 57_000)["bytes"]["total"]

    def harm(settings):
        return [choices[name].index(settings[name]) for name in reversed(choices)]

    choices: dict[str, list] = {
        "batch": [16, 8, 4, 2, 1],
        "optim": ["adamw_torch", "paged_adamw_8bit"],
        "rows": ["all", "new"],
        "rank": [64, 32, 16, 8],
    }
    start = dict(SEED, optim="adamw_torch")
    change = smallest_change(need, start, choices, have * GB)
    assert change is not None
    assert need({**start, **change}) <= have * GB
    every = [dict(zip(choices, v, strict=True)) for v in itertools.product(*choices.values())]
    assert harm({**start, **change}) == min(
        harm(s) for s in every if need({**start, **s}) <= have * GB
    )


# without training


def test_inference_of_the_paper_recipe_is_planned(monkeypatch):
    "Weeks of training in 4 bits on a card that cannot load the result in 16"
    recipe = read_recipe("paper")
    for table in ("generate", "evaluate", "efficiency"):
        recipe[table] = {**recipe[table], "load_in_4bit": False, "device": None}
    steps = recipe_steps(recipe)
    for name in ("hub_ids", "package_faults", "task_faults"):
        monkeypatch.setattr(f"cmixtral_nb.preflight.{name}", lambda *args: [])
    for module in ("plan", "preflight"):
        monkeypatch.setattr(f"cmixtral_nb.{module}.gpu_bytes", lambda: [80 * GB] * 2)
    found = preflight(recipe, steps)
    assert [line.split(" needs")[0] for line in found if "found 80.0 GB" in line] == [
        "[efficiency]",
        "[evaluate]",
        "[generate]",
    ]
    assert all("set load_in_4bit = true; run: cmixtral plan paper" in line for line in found)
    for change in (dict(load_in_4bit=True), dict(device="auto")):
        for table in ("generate", "evaluate", "efficiency"):
            recipe[table] = {**recipe[table], "load_in_4bit": False, "device": None, **change}
        assert preflight(recipe, steps) == []


def test_more_than_all_gpus_is_told_too():
    "What needs 4 bits and several GPUs is told the second once it has the first"
    four = dict(load_in_4bit=True)
    assert "set load_in_4bit = true" in inference_faults("mixtral", {}, 0, "cuda", 40 * GB)[0]
    assert 'set device = "auto"' in inference_faults("mixtral", four, 0, "cuda", 24 * GB)[0]
    assert inference_faults("mixtral", four, 0, "auto", 42 * GB) == []
    assert "on all GPUs together" in inference_faults("mixtral", four, 0, "auto", 20 * GB)[0]
    assert "4 bits" in inference_faults("mixtral", four, 0, "cpu", 20 * GB)[0]


def test_nothing_fits():
    assert faults(16, batch=2) == [
        "[pretrain] needs 49.4 GB on each GPU, found 16.0 GB; no setting makes it fit: "
        '35.4 GB even with batch = 1, rows = "new", rank = 8, '
        "accumulation = 2, alpha = 16; run: cmixtral plan RECIPE"
    ]


def test_only_settings_that_a_stage_has_are_named():
    line = plan_faults(
        "mixtral",
        dict(rank=64, rows="all", load_in_4bit=True, batch=16),
        2048,
        57_000,
        "cuda",
        8,
        have=50 * GB,
        stage="sft",
        recipe="mine.toml",
    )[0]
    assert (
        line.startswith("[sft] needs ")
        and "; set batch = " in line
        and line.endswith("run: cmixtral plan mine.toml")
    )
    assert not any(x in line for x in ("zero", "accumulation", "alpha", "checkpointing", "rows"))


def test_on_a_cpu_the_ram_counts(monkeypatch):
    monkeypatch.setattr(planning, "available_bytes", lambda: 60 * GB)
    line = plan_faults("mixtral", dict(SEED, batch=1), 2048, 57_000)[0]
    assert " GB of RAM, found 60.0 GB and no GPU; set checkpointing = true; " in line
    assert "found 30.0 GB" in plan_faults("mixtral", dict(SEED, batch=1), 2048, 57_000, n_gpus=2)[0]
    monkeypatch.setattr(planning, "available_bytes", lambda: 0)  # nobody says
    assert plan_faults("mixtral", SEED, 2048, 57_000) == []


def test_the_gpu_of_the_process_counts(monkeypatch):
    monkeypatch.setattr(planning, "gpu_bytes", lambda: [24 * GB, 80 * GB])
    assert "found 24.0 GB" in plan_faults("mixtral", SEED, 2048, 57_000, "cuda")[0]
    assert plan_faults("mixtral", SEED, 2048, 57_000, "cuda:1") == []


def test_ram_is_asked_with_and_without_psutil(monkeypatch):
    assert available_bytes() > 2**27
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert available_bytes() > 2**27 or not Path("/proc/meminfo").exists()


# what it refuses


def test_plan_refuses():
    with pytest.raises(StageError, match="rows is 'some', expected all, new or none"):
        memory_plan(rows="some")
    with pytest.raises(
        StageError,
        match="model_type is 'mystery', expected a causal language model of transformers",
    ):
        count_parameters(dict(DENSE, model_type="mystery"))
    with pytest.raises(
        StageError,
        match="has no vocab_size, intermediate_size; expected a config.json of model_type llama",
    ):
        count_parameters(
            {k: v for k, v in DENSE.items() if k not in ("vocab_size", "intermediate_size")}
        )
    with pytest.raises(
        StageError, match="has no num_experts_per_tok; expected a config.json of model_type mixtral"
    ):
        count_parameters(dict(DENSE, num_local_experts=8))


def test_a_model_that_cannot_be_planned_is_not_refused(tmp_path):
    assert (
        plan_faults(dict(model_type="mystery"), SEED, 2048, have=1)
        == plan_faults(tmp_path, SEED, 2048, have=1)
        == plan_faults("org/name", SEED, 2048, have=1)
        == []
    )


# recipes


def test_the_paper_recipe_has_the_seeds_numbers():
    p = plan_inputs(read_recipe("paper"))
    assert (p["length"], p["vocab_size"], p["settings"]["n_old"]) == (2048, 57_000, 32_000)
    assert plan_of(read_recipe("paper"))["bytes"]["static"] / GB == pytest.approx(40.6, abs=0.05)
    assert tokens_of(read_recipe("paper")) == 42 * GB


def test_tokens_by_steps_as_packed_as_told_or_not_known(tmp_path):
    recipe = read_recipe("tiny")
    assert tokens_of(recipe) == 64 * 8 * 256
    more = {**recipe, "pretrain": dict(epochs=2)}
    assert tokens_of(more) == 0
    (tmp_path / "tokens").mkdir()
    manifest = dict(kind="tokens", files={}, stats=dict(n_tokens=1234))
    write_json(tmp_path / "tokens" / "manifest.json", manifest)
    assert tokens_of(more, tmp_path) == 2468
    assert tokens_of({**more, "tokens": 5e8}) == GB
    assert tokens_of({**more, "about": "0.5B tokens of novels for Mixtral-8x7B"}) == 0


def test_the_vocabulary_of_a_recipe(tmp_path):
    recipe = dict(
        name="x",
        vocab=dict(n_pieces=100, tokens=["<a>"], multiple=64),
        init=dict(model=str(tmp_path)),
        pretrain={},
        pack={},
    )
    small_config(**CONFIG).save_pretrained(tmp_path)
    assert plan_inputs(recipe)["vocab_size"] == 192  # 60 + 101, filled up
    assert plan_inputs({k: v for k, v in recipe.items() if k != "vocab"})["vocab_size"] == 60
    (tmp_path / "model").mkdir()
    small_config(**{**CONFIG, "vocab_size": 99}).save_pretrained(tmp_path / "model")
    assert plan_inputs(recipe, out=tmp_path)["vocab_size"] == 99


def test_a_model_of_unknown_size(monkeypatch):
    recipe = dict(read_recipe("paper"), init=dict(model="org/name"))
    with pytest.raises(
        StageError, match="its size is not known before it is here; download it and give its folder"
    ):
        plan_of(recipe)
    for finds in ("hub_ids", "package_faults"):
        monkeypatch.setattr(f"cmixtral_nb.preflight.{finds}", lambda table: [])
    assert preflight(recipe, recipe_steps(recipe)) == []


@pytest.fixture
def no_gpu(monkeypatch):
    for module in ("plan", "preflight"):
        monkeypatch.setattr(f"cmixtral_nb.{module}.gpu_bytes", list)


def test_plan_of_both_recipes_prints_every_part(capsys, no_gpu):
    plan("paper")
    paper = capsys.readouterr().out
    for part in (
        "on one GPU in bfloat16",
        "static: these four",
        "40.61 GB",
        "data parallel, GB",
        "ZeRO-2, GB",
        "fits 80 GB",
        "24 GB × 8 no setting makes it fit",
        '48 GB × 1 set batch = 4, rows = "new", accumulation = 4',
        "42,000,000,000 tokens: 3.5e+21 operations; at 30% of the peak",
        "on disk together",
        "chat: model",
    ):
        assert part in paper, part
    plan("tiny")
    tiny = capsys.readouterr().out
    for part in (
        "on the CPU in float32",
        "fits every card",
        "131,072 tokens: ",
        "on disk together",
    ):
        assert part in tiny, part


def test_a_config_json_is_enough(tmp_path, capsys, no_gpu):
    small_config(**CONFIG).save_pretrained(tmp_path / "model")
    (tmp_path / "t").mkdir()
    model, tokens = (json.dumps(str(tmp_path / name)) for name in ("model", "t"))
    (tmp_path / "r.toml").write_text(f"[pretrain]\nmodel = {model}\ntokens = {tokens}\n")
    plan(str(tmp_path / "r.toml"), out=tmp_path / "o")
    assert "each billion tokens (how many there are is not known" in capsys.readouterr().out
    LlamaForCausalLM(LlamaConfig(**DENSE)).save_pretrained(tmp_path / "model")
    plan(str(tmp_path / "r.toml"), out=tmp_path / "o")
    out = capsys.readouterr().out
    assert "mlp " in out and "experts " not in out


def test_a_recipe_that_cannot_fit_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "config.json", planning.MIXTRAL_8X7B)
    (tmp_path / "t").mkdir()
    model, tokens = (json.dumps(str(tmp_path / name)) for name in ("model", "t"))
    (tmp_path / "big.toml").write_text(
        f"[pretrain]\nmodel = {model}\ntokens = {tokens}\nbatch = 4096\n"
    )
    code = (
        "import atexit, sys\n"
        "from cmixtral_nb import plan, preflight\n"
        "plan.available_bytes = lambda: 60 * 10**9\n"
        "plan.gpu_bytes = preflight.gpu_bytes = list\n"
        'atexit.register(lambda: print("torch" in sys.modules))\n'
        "from cmixtral_nb.commands import main\n"
        "sys.exit(main())"
    )
    asked = ["run", str(tmp_path / "big.toml"), "--out", str(tmp_path / "o")]
    out = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True)
    line = next(line for line in out.stderr.splitlines() if "[pretrain] needs" in line)
    assert (
        out.returncode == 2
        and "GB of RAM, found 60.0 GB and no GPU; set batch = " in line
        and line.endswith("run: cmixtral plan big")
    )
    assert out.stdout.strip().endswith("False")  # from the configuration alone, without PyTorch


def test_nothing_heavy_is_imported_to_plan():
    code = (
        "import sys\n"
        "from cmixtral_nb.plan import plan_faults\n"
        'print(plan_faults("mixtral", dict(batch=16), 2048, 57000, "cuda", have=10**9))\n'
        'print([m for m in ("torch", "transformers", "numpy") if m in sys.modules])'
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert out.stdout.splitlines()[-1] == "[]" and "no setting" in out.stdout, out.stderr
