"""a12b_experts: fourteen families of mixtures, from the stock model to 4 bits, LoRA and back

CMIXTRAL_ALL_EXPERTS=1 adds every class of experts that the installed transformers has, alone.
"""

import importlib
import inspect
import os
import re
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from cmixtral_nb.adapters import plain_name, save_adapter
from cmixtral_nb.checkpoints import INDEX, tensor_shapes
from cmixtral_nb.experts import (
    METHOD,
    _join,
    _split,
    expert_sources,
    experts_quantiser,
    join_experts,
    layout_of,
    layouts_of,
    load_experts_4bit,
    mixture_faults,
    not_in_4bit,
    open_experts,
    single_experts,
    split_experts,
    stacked_experts,
)
from cmixtral_nb.loading import load_model, save_4bit, save_stock, streamed
from cmixtral_nb.merge import merge, nf4_roundtrip
from cmixtral_nb.parameters import anatomy
from cmixtral_nb.placement import without_memory
from cmixtral_nb.probe import load_float32
from cmixtral_nb.qlora import add_lora, expert_bytes, parameter_table, quantised
from cmixtral_nb.stages import StageError, read_json, write_json

SIZES: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SHARED = dict(num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64)
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention"],
)
ROUTED = dict(
    intermediate_size=128,
    moe_intermediate_size=64,
    n_routed_experts=4,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
LATENT = dict(
    num_key_value_heads=4,
    kv_lora_rank=64,
    q_lora_rank=64,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
)
NEMOTRON: dict[str, Any] = dict(
    intermediate_size=128,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=64,
    n_routed_experts=4,
    n_groups=2,
    n_group=1,
    topk_group=1,
    ssm_state_size=16,
    mamba_num_heads=4,
    mamba_head_dim=32,
    layers_block_type=["mamba", "moe", "attention", "moe"],
)
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": dict(intermediate_size=128, num_local_experts=4),
    "phimoe": dict(intermediate_size=128, num_local_experts=4),
    "qwen2_moe": dict(intermediate_size=128, **SHARED),
    "qwen3_moe": dict(intermediate_size=128, **SHARED, mlp_only_layers=[0]),
    "qwen3_next": dict(intermediate_size=128, **SHARED, **LINEAR),
    "qwen3_5_moe_text": dict(**SHARED, **LINEAR),
    "olmoe": dict(intermediate_size=64, num_experts=4),
    "deepseek_v2": ROUTED | LATENT,
    "deepseek_v3": ROUTED | LATENT,
    "glm4_moe": ROUTED,
    "granitemoe": dict(intermediate_size=64, num_local_experts=4),
    "gpt_oss": dict(intermediate_size=64, num_local_experts=4),
    "nemotron_h": NEMOTRON,
    "llama4_text": dict(
        intermediate_size=64,
        intermediate_size_mlp=128,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    ),
}
IDS = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(0))


def random_model(family, **changes):
    "Weights that make logits of a few units, whatever the family starts with"
    sizes = SIZES | FAMILIES[family] | changes
    if family == "nemotron_h":  # counts its layers itself
        del sizes["num_hidden_layers"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not re.search(r"norm|A_log|dt_bias|\.D$", name):
                p.normal_(std=0.2)
    return model.eval()


@cache
def saved(family, place):
    "A folder with the stock model, and what it answers"
    folder = place / family
    model = random_model(family)
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def without_repacking(model):
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def in_4bit(folder):
    config = AutoConfig.from_pretrained(folder)
    return without_repacking(
        load_experts_4bit(folder, config, torch.float32, device_map={"": "cpu"})
    )


def n_matrices(model):
    return sum(m.layout.n_experts * len(m.layout.shapes) for m in single_experts(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_single_experts_compute_as_stacked_ones(family, place):
    folder, stock = saved(family, place)
    model = split_experts(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert not stacked_experts(model)
    assert (logits(model) - stock).abs().max() <= 1e-5
    matrices = [
        p for name, p in model.named_parameters() if re.search(r"experts\.0\.\w+\.we", name)
    ]
    for matrix in matrices[-3:]:  # of the last layer: gate, up, down
        matrix.data *= 1.01
        assert (logits(model) - stock).abs().max() >= 5e-3
        matrix.data /= 1.01


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_again_and_saved_a_model_has_the_same_bytes(family, place, tmp_path):
    folder, stock = saved(family, place)
    model = split_experts(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    join_experts(model).save_pretrained(tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_matrix_is_nf4_of_its_tensor(family, place, tmp_path):
    folder, _ = saved(family, place)
    model = in_4bit(folder)
    stock = split_experts(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    of_file = dict(stock.named_parameters())
    n_bytes = n_weights = n_found = 0
    for name, module in model.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        packed, state = bnb.functional.quantize_4bit(
            of_file[f"{name}.weight"].data, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        found = module.weight.quant_state
        assert torch.equal(module.weight.data, packed)
        assert torch.equal(found.absmax, state.absmax)
        assert torch.equal(found.state2.absmax, state.state2.absmax)
        if ".experts." in name:
            n_found += 1
            n_weights += found.shape.numel()
            n_bytes += sum(t.nbytes for t in (module.weight, found.absmax, found.state2.absmax))
    assert n_found == n_matrices(model) > 0
    assert n_bytes / n_weights <= 0.517
    routers = [name for name in not_in_4bit(model) if not name.endswith("lm_head")]
    assert not any(isinstance(model.get_submodule(n), bnb.nn.Linear4bit) for n in routers)
    # Saved in 4 bits, it is read by transformers alone
    answers = logits(model)
    model.save_pretrained(tmp_path)
    again = without_repacking(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert again.config.quantization_config.quant_method == METHOD
    assert torch.equal(logits(again), answers)


def lora_on(model, family):
    "peft as it is, on every linear layer but head and routers"
    left = {*not_in_4bit(model)}
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in left
    ]
    if family == "nemotron_h":  # whose fused kernels go past the module
        targets = [name for name in targets if not name.endswith("out_proj")]
    return get_peft_model(model.requires_grad_(False), LoraConfig(r=4, target_modules=targets))


def gradients(model, side):
    return {
        name: float(p.grad.abs().sum())
        for name, p in model.named_parameters()
        if f".lora_{side}." in name
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_learns(family, place, tmp_path):
    folder, _ = saved(family, place)
    model = in_4bit(folder)
    frozen, n = logits(model), n_matrices(model)
    learner = lora_on(model, family)
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=0.5)
    learner.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    found = gradients(learner, "B")
    assert len([name for name in found if ".experts." in name]) == n
    assert all(found.values()), [name for name, size in found.items() if not size]
    optimizer.step()
    optimizer.zero_grad()
    learner(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    found = gradients(learner, "A")
    assert all(found.values()), [name for name, size in found.items() if not size]
    # The adapter on a model that is loaded again
    answers = logits(learner)
    assert (answers - frozen).abs().max() >= 1
    learner.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(in_4bit(folder), tmp_path)), answers)


def taught(model):
    "Two steps of training, which move logits by several units"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits(model)


# A tensor per matrix under other names, stacked, transposed, in turns, without a gate
IN_EACH_FORM = [
    "phimoe",
    "qwen3_5_moe_text",
    "granitemoe",
    "gpt_oss",
    "nemotron_h",
    "llama4_text",
]


@pytest.mark.parametrize(
    "family", FAMILIES if os.environ.get("CMIXTRAL_ALL_EXPERTS") else IN_EACH_FORM
)
def test_from_loading_to_merge(family, place, tmp_path):
    "By our own commands: load, teach, save, put on again, merge; the bits of peft's merge"
    folder, stock = saved(family, place)
    plain = load_model(folder, dtype="float32")
    assert torch.equal(logits(plain), stock)
    save_stock(plain, tmp_path / "stock")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")), stock)
    model = load_model(folder, dtype="float32", load_in_4bit=True, trainable=True)
    assert expert_bytes(model)["bytes_per_param"] <= 0.517
    frozen, held = logits(model), quantised(model)
    save_4bit(model, tmp_path / "four")
    assert torch.equal(logits(load_model(tmp_path / "four", dtype="float32")), frozen)
    learner = add_lora(model, rank=4, alpha=8, dropout=0, rows="none")
    answers = taught(learner)
    assert (answers - frozen).abs().max() >= 1
    save_adapter(learner, tmp_path / "adapter")
    again = load_model(folder, tmp_path / "adapter", load_in_4bit=True, dtype="float32")
    assert torch.equal(logits(again), answers)
    merge(folder, [tmp_path / "adapter"], tmp_path / "merged", into="dequantised")
    merged = load_model(tmp_path / "merged", dtype="float32")
    assert (logits(merged) - answers).abs().max() <= 1e-3
    for name in held:  # of the model as it was loaded at first
        W = plain.get_submodule(name).weight
        W.data = nf4_roundtrip(W.data)
    by_peft = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    found = merged.state_dict()
    assert found.keys() == by_peft.state_dict().keys()
    different = [n for n, W in by_peft.state_dict().items() if not torch.equal(found[n], W)]
    assert not different


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_model_are_those_of_its_plan(family, place):
    "Counted on the loaded model by names, in the plan on a stock one by modules"
    folder, _ = saved(family, place)
    planned = anatomy(read_json(folder / "config.json")).counts
    table = parameter_table(load_model(folder, dtype="float32"))
    found = {row["part"]: row["n_params"] for row in table}
    if "feed-forward" in found:
        found["mlp"] = found.pop("feed-forward")
    assert found == {part: n for part, n in planned.items() if n}
    assert expert_bytes(load_model(folder, dtype="float32"))["n_params"] == sum(
        n for part, n in found.items() if part == "experts"
    ) - n_biases(family)


def n_biases(family):
    "Of the experts, which are counted with them and never in 4 bits"
    return 2 * 4 * (2 * 64 + 64) if family == "gpt_oss" else 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_answers_and_follows_routes(family, place):
    folder, stock = saved(family, place)
    weights = {
        plain_name(n): W for n, W in load_model(folder, dtype="float32").state_dict().items()
    }
    routes: dict[str, torch.Tensor] = {}
    net = streamed(folder, weights.__getitem__, routes=routes)
    assert torch.equal(logits(net), stock)
    own = {plain_name(name) for name in single_experts(net)}
    assert routes.keys() == (set() if family == "phimoe" else own)  # which takes no topk
    assert torch.equal(logits(streamed(folder, weights.__getitem__, routes=routes)), stock)
    routes = {name: (chosen + 1) % 4 for name, chosen in routes.items()}
    net = streamed(folder, weights.__getitem__, routes=routes)
    seen = {}
    for name, mixture in single_experts(net).items():
        see = partial(lambda name, module, inputs: seen.update({name: inputs}), plain_name(name))
        mixture.register_forward_pre_hook(see)
    changed = logits(net)
    for name, chosen in routes.items():
        assert (changed - stock).abs().max() > 1
        if len(seen[name]) > 1:  # not Llama 4, which scales tokens
            assert torch.equal(seen[name][1].sort(-1).values, chosen.sort(-1).values)


def test_two_models_of_one_configuration():
    "The first is marked for peft, in the configuration that both have"
    config = random_model("mixtral").config
    names = [
        [
            name
            for name, _ in split_experts(AutoModelForCausalLM.from_config(config)).named_modules()
        ]
        for _ in range(2)
    ]
    assert names[0] == names[1] and "model.layers.1.mlp.experts.3.w2" in names[0]


def test_lora_that_leaves_an_expert_out_is_refused(place, monkeypatch):
    "A list of names that serves attention alone, as peft's own rules make it"
    folder, _ = saved("qwen2_moe", place)
    model = load_model(folder, dtype="float32")
    monkeypatch.setattr("cmixtral_nb.qlora._lora_targets", lambda model: ["q_proj", "gate_proj"])
    with pytest.raises(StageError, match="LoRA is missing on 26 matrices, such as"):
        add_lora(model, rank=2, rows="none")


def test_peft_alone_leaves_experts_out(place):
    "What the appendix is for: stock Qwen2-MoE in 4 bits, and the usual names of targets"
    folder, _ = saved("qwen2_moe", place)
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4)
    mixtures = stacked_experts(stock).values()
    assert mixtures and all(m.down_proj.dtype.is_floating_point for m in mixtures)


DISK_FORMS = {  # of gate_up_proj and down_proj, (E, 2f, d) and (E, d, f)
    "transposed": (
        transformers.core_model_loading.Transpose(1, 2, check_dims=True),
        lambda t: t.transpose(1, 2).contiguous(),
    ),
    "in turns": (
        transformers.core_model_loading.Interleave(dim=1),
        lambda t: t.view(4, 2, -1, 64).transpose(1, 2).reshape(t.shape).contiguous(),
    ),
}


@pytest.mark.parametrize("form", DISK_FORMS)
def test_stacked_files_of_any_form(form, monkeypatch, tmp_path):
    "Granite has stacked tensors; here they are stored as Qwen3-VL and Inkling store theirs"
    from transformers import conversion_mapping

    step, stored = DISK_FORMS[form]
    model = random_model("granitemoe", intermediate_size=64 if form == "in turns" else 128)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    changed = ["input_linear", "output_linear"] if form == "transposed" else ["input_linear"]
    for name in tensors:
        if any(part in name for part in changed):
            tensors[name] = stored(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    rules = conversion_mapping.get_checkpoint_conversion_mapping("granitemoe")
    for parameter in ("gate_up_proj", "down_proj")[: len(changed)]:
        target = f"block_sparse_moe.experts.{parameter}"
        rules.append(transformers.core_model_loading.WeightConverter(target, target, [step]))
    monkeypatch.setitem(
        conversion_mapping._checkpoint_conversion_mapping_cache, "granitemoe", rules
    )
    config = AutoConfig.from_pretrained(tmp_path)
    single = dict(split_experts(model).named_parameters())
    with open_experts(tmp_path, without_memory(config, torch.float32)) as checkpoint:
        names = [name for name in checkpoint if ".experts." in name]
        assert len(names) == n_matrices(model)
        assert all(torch.equal(checkpoint[name][...], single[name]) for name in names)


def bytes_read():
    with open("/proc/self/io") as f:
        return int(f.readline().split()[1])


@pytest.mark.parametrize("family", ["granitemoe", "llama4_text", "gpt_oss"])
def test_only_the_bytes_of_an_expert_are_read(family, place):
    folder, _ = saved(family, place)
    net = without_memory(AutoConfig.from_pretrained(folder), torch.float32)
    with open_experts(folder, net) as checkpoint:
        for name, part in checkpoint.items():
            if part.source.place is None:
                continue
            before = bytes_read()
            n_bytes, n_read = part[...].nbytes, bytes_read() - before
            across = len(part.source.place.at) == 3 and part.source.place.at[2] != slice(None)
            in_turns = part.source.place.at[1].step
            assert n_read <= n_bytes * (2 if across or in_turns else 1) + 200, name


def test_gate_and_up_in_a_tensor_each(monkeypatch):
    "Stacked, but not yet one tensor, as Step-3 stores them"
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, WeightConverter

    net = without_memory(random_model("granitemoe").config, torch.float32)
    rules = conversion_mapping.get_checkpoint_conversion_mapping("granitemoe")
    halves = ["block_sparse_moe.gate.weight", "block_sparse_moe.up.weight"]
    target = "block_sparse_moe.experts.gate_up_proj"
    rules.append(WeightConverter(halves, target, [Concatenate(dim=1)]))
    monkeypatch.setitem(
        conversion_mapping._checkpoint_conversion_mapping_cache, "granitemoe", rules
    )
    shapes: dict[str, tuple] = {}
    for layer in ("model.layers.0.block_sparse_moe", "model.layers.1.block_sparse_moe"):
        shapes |= {f"{layer}.{half}.weight": (4, 64, 64) for half in ("gate", "up")}
        shapes[f"{layer}.output_linear.weight"] = (4, 64, 64)
    sources = expert_sources(net, shapes)
    assert len(sources) == 24
    found = sources["model.layers.1.block_sparse_moe.experts.3.up_proj.weight"]
    assert found.tensor == "model.layers.1.block_sparse_moe.up.weight"
    assert found.place is not None
    assert found.place.at == (3, slice(None)) and not found.place.transposed


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("olmoe", dict(intermediate_size=128), "is 64 x 64, the configuration says 64 x 128"),
        ("olmoe", dict(num_experts=8), r"the weights lack 24 matrices of experts, such as .*\.4\."),
        ("granitemoe", dict(num_local_experts=8), "is 4 x 64 x 64, the configuration says 8 x"),
        ("gpt_oss", dict(intermediate_size=128), "gate_up_proj is 4 x 64 x 128, the config"),
        ("qwen3_moe", dict(moe_intermediate_size=600), "rows of 600 weights, expected a multiple"),
        ("nemotron_h", dict(hidden_size=1000), "rows of 1,000 weights, expected a multiple of"),
    ],
)
def test_a_checkpoint_that_contradicts_its_configuration(family, changes, message, place):
    folder, _ = saved(family, place)
    config = AutoConfig.from_pretrained(folder, **changes)
    with pytest.raises(StageError, match=message) as refused:
        load_experts_4bit(folder, config, torch.float32, device_map={"": "cpu"})
    assert str(refused.value).startswith(str(folder))
    assert len(str(refused.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "family, sizes, message",
    [
        (
            "longcat_flash",
            dict(num_layers=1, expert_ffn_hidden_size=64, n_routed_experts=4),
            "LongcatFlashExperts computes its experts in a way of its own",
        ),
        (
            "jetmoe",
            dict(intermediate_size=64, num_local_experts=4, kv_channels=16),
            "JetMoeParallelExperts keeps weight, 4 x 64 x 32, outside nn.Linear",
        ),
        (
            "dbrx",
            dict(n_layers=1, attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=None)),
            "DbrxExpertGLU keeps w1, .* outside nn.Linear",
        ),
    ],
)
def test_classes_that_cannot_be_read_are_named(family, sizes, message):
    net = without_memory(AutoConfig.for_model(family, **SIZES | sizes), torch.float32)
    (fault,) = mixture_faults(net)
    assert re.match(message, fault)
    with pytest.raises(StageError, match=message):
        split_experts(net)


UNKNOWN = dict(
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    kv_channels=16,
    intermediate_size=64,
    num_local_experts=4,
    vocab_size=96,
)


def test_no_command_takes_experts_that_it_cannot_reach(tmp_path):
    "In 16 bits they answer; what would leave them in 16 bits, or without LoRA, stops"
    config = AutoConfig.for_model("jetmoe", **UNKNOWN)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    message = "JetMoeParallelExperts keeps weight, .* where neither 4 bits nor LoRA reach"
    with pytest.raises(StageError, match=f"^{tmp_path}: {message}$"):
        load_model(tmp_path, load_in_4bit=True)
    model = load_model(tmp_path, dtype="float32")
    assert logits(model).isfinite().all()
    with pytest.raises(StageError, match=f"^{message}$"):
        add_lora(model, rank=2, rows="none")


@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize("family", ["olmoe", "granitemoe"])
def test_a_layout_that_contradicts_its_configuration_is_not_loaded(family, four, place, tmp_path):
    folder, _ = saved(family, place)
    shutil.copytree(folder, tmp_path / family)
    path = tmp_path / family / "config.json"
    write_json(path, read_json(path) | dict(intermediate_size=128))
    with pytest.raises(
        StageError, match=f"^{tmp_path}/{family}: .*, the configuration says "
    ) as no:
        load_model(tmp_path / family, load_in_4bit=four)
    assert len(str(no.value).splitlines()) <= 3  # of many the first


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "olmoe"])
def test_a_probe_reads_experts_of_any_form(family, place):
    "Transposed and with a bias, without a gate, and as a Mixtral's"
    folder, wanted = saved(family, place)
    torch.testing.assert_close(logits(load_float32(folder)), wanted, atol=1e-4, rtol=1e-4)


LACKING = {  # family -> a tensor that transformers would draw at random
    "gpt_oss": "model.layers.1.self_attn.sinks",
    "qwen3_moe": "model.layers.1.mlp.gate.weight",
    "qwen2": "model.layers.1.self_attn.q_proj.bias",  # no mixture
}


@pytest.mark.parametrize("family", LACKING)
def test_a_model_that_lacks_a_tensor_is_not_loaded(family, tmp_path):
    kind = AutoConfig.for_model(family, **SIZES | FAMILIES.get(family, dict(intermediate_size=64)))
    AutoModelForCausalLM.from_config(kind).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[LACKING[family]]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    in_4bit = partial(load_model, load_in_4bit=True, device="cpu")
    for load in (load_float32, partial(load_model, device="cpu"), in_4bit):
        with pytest.raises(StageError, match=f"the weights lack {LACKING[family]}"):
            load(tmp_path)


def test_shards_without_their_index(tmp_path):
    kind = AutoConfig.for_model("phi3", **SIZES, intermediate_size=64)
    net = AutoModelForCausalLM.from_config(kind)
    net.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / INDEX).unlink()
    with pytest.raises(StageError, match=f"no model.safetensors and no {INDEX}; expected"):
        load_model(tmp_path, device="cpu")


def test_a_class_that_nobody_knows():
    class OddExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 100, 64))
            self.down_proj = nn.Parameter(torch.zeros(4, 64, 48))

        def _apply_gate(self, gate_up):
            return gate_up

    box = nn.ModuleDict({"experts": OddExperts()})
    assert mixture_faults(box) == ["OddExperts.gate_up_proj is 4 x 100 x 64, expected 4 x 96 x 64"]


def test_quantised_files_are_refused_with_the_remedy():
    net = without_memory(random_model("gpt_oss").config, torch.float32)
    layer = "model.layers.0.mlp.experts"
    shapes = {f"{layer}.gate_up_proj_blocks": (4, 128, 2, 16)}
    with pytest.raises(StageError, match="experts are quantised .* save it in 16 bits"):
        expert_sources(net, shapes)


def test_the_quantiser_is_registered_once():
    assert experts_quantiser() is experts_quantiser()
    config = experts_quantiser()(bnb_4bit_quant_type="nf4").to_dict()
    again = transformers.quantizers.auto.AutoQuantizationConfig.from_dict(dict(config))
    assert again.to_dict() == config and again.load_in_4bit


class AnyConfig:
    "Answers whatever a class of experts asks its configuration"

    _experts_implementation = "eager"
    hidden_act = hidden_activation = mlp_hidden_act = "silu"
    swiglu_alpha = 1.7
    moe_latent_size = None

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if "limit" in name:
            return 1.5
        if "eps" in name:
            return 1e-6
        if re.search("expert.*num|num.*expert|n_routed|num_local", name):
            return 5
        return 48 if re.search("inter|ffn|expert_dim", name) else 32


def classes_of_experts():
    "Every class of transformers with stacked parameters for experts, from its source"
    own = re.compile(r"self\.down_proj = nn\.Parameter\(")
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if not own.search(path.read_text()):
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__ and own.search(inspect.getsource(kind)):
                yield kind


def filled(kind):
    module = kind(AnyConfig()).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.2)
    return module


@pytest.mark.skipif(not os.environ.get("CMIXTRAL_ALL_EXPERTS"), reason="a minute of imports")
def test_every_class_of_experts():
    refused, done = [], []
    for kind in classes_of_experts():
        module = filled(kind)
        if mixture_faults(nn.ModuleDict({"experts": module})):
            refused.append(kind.__name__)
            continue
        layout = layout_of(module)
        x = torch.randn(11, 32)
        inputs: tuple = (
            x,
            torch.stack([torch.randperm(5)[:2] for _ in range(11)]),
            torch.rand(11, 2),
        )
        if len(inspect.signature(kind.forward).parameters) == 2:  # already scaled
            inputs = (x.repeat(5, 1) * (torch.rand(55, 1) > 0.5),)
        with torch.no_grad():
            stock = module(*inputs)
            before = {name: p.clone() for name, p in module.named_parameters()}
            _split(module, layout)
            single = module(*inputs)
            _join(module)
        assert (single - stock).abs().max() <= 5e-6, kind
        assert stock.abs().max() > 0.1, kind
        after = dict(module.named_parameters())
        assert all(torch.equal(after[name], p) for name, p in before.items()), kind
        done.append(kind.__name__)
    print(len(done), "classes:", *done)
    assert refused == ["InklingSharedExperts", "LongcatFlashExperts"]
    assert len(done) >= 70


def test_layouts_of_a_model_have_the_names_of_its_files(place):
    "Each name of a single matrix is in the family's checkpoint, where that has one per matrix"
    for family in ("mixtral", "phimoe", "qwen3_moe", "nemotron_h", "deepseek_v3"):
        folder, _ = saved(family, place)
        net = without_memory(AutoConfig.from_pretrained(folder), torch.float32)
        on_disk = " ".join(tensor_shapes(folder))
        for layout in layouts_of(net).values():
            for leaf in layout.shapes:
                assert f".experts.3.{leaf}.weight" in on_disk
