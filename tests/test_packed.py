"""a12c_packed_experts: many experts at once compute, learn and are saved as one by one"""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_experts import FAMILIES, SIZES, random_model
from transformers import AutoConfig, AutoModelForCausalLM

from cmixtral_nb import machine, packed_experts
from cmixtral_nb.adapters import save_adapter
from cmixtral_nb.experts import Layout, Leaves, single_experts, single_experts_class
from cmixtral_nb.loading import load_model, save_4bit
from cmixtral_nb.packed_experts import (
    NF4Stack,
    can_pack,
    groups,
    multiply,
    packed_experts_class,
    pays,
)
from cmixtral_nb.qlora import add_lora, expert_bytes, quantised

MANY: dict[str, dict[str, Any]] = {  # a gate, none, biases and interleaved rows, shared experts
    "qwen3_moe": dict(num_experts=16, mlp_only_layers=[]),
    "gpt_oss": dict(num_local_experts=16),
    "nemotron_h": dict(n_routed_experts=16),
    "deepseek_v3": dict(n_routed_experts=16),
}
IDS = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A checkpoint of each family, with 16 experts"
    place, made = tmp_path_factory.mktemp("many"), {}
    for family, changes in MANY.items():
        model = random_model(family, **changes, num_experts_per_tok=4)
        model.save_pretrained(place / family)
        made[family] = place / family
    return made


def loaded(folder: Path, packed: bool, dtype: str = "float32", **how):
    "In 4 bits; not packed: the modules are those of a12b, of the same bytes"
    model = load_model(folder, load_in_4bit=True, dtype=dtype, device="cpu", **how)
    mixtures = single_experts(model).values()
    assert mixtures and all(type(mixture) is packed_experts_class() for mixture in mixtures)
    if not packed:
        for mixture in mixtures:
            mixture.__class__ = single_experts_class()
    return model


@pytest.fixture
def calls(monkeypatch):
    "How many matrices were called one by one, and how many groups were unpacked"
    n = {"single": 0, "groups": 0}
    forward, unpacked = Linear4bit.forward, NF4Stack.unpacked

    def counted_forward(self, x):
        n["single"] += self.in_features == self.out_features == 64 or self.in_features == 32
        return forward(self, x)

    def counted_unpacked(self, experts):
        n["groups"] += 1
        return unpacked(self, experts)

    monkeypatch.setattr(Linear4bit, "forward", counted_forward)
    monkeypatch.setattr(NF4Stack, "unpacked", counted_unpacked)
    return n


def learner_of(folder, packed, dtype="float32", dropout=0.0):
    learner = add_lora(loaded(folder, packed, dtype, trainable=True), 8, 16, dropout, "none")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, p in learner.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.05, generator=generator)
    return learner.train()


def gradients(learner):
    loss = learner(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss, {name: p.grad for name, p in learner.named_parameters() if p.requires_grad}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


def test_matrices_that_end_within_a_block_are_not_packed(tmp_path):
    sizes = dict(hidden_size=40, moe_intermediate_size=20, num_experts_per_tok=4)
    random_model("qwen3_moe", **MANY["qwen3_moe"], **sizes).save_pretrained(tmp_path)
    model = load_model(tmp_path, load_in_4bit=True, dtype="float32", device="cpu")
    found = logits(model)
    for mixture in single_experts(model).values():
        mixture.__class__ = single_experts_class()
    assert torch.equal(found, logits(model))


@settings(max_examples=15, deadline=None)
@given(
    n_experts=st.integers(2, 6),
    n_in=st.sampled_from([64, 128, 192]),
    n_out=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_a_stack_has_the_weights_of_its_matrices(n_experts, n_in, n_out, dtype, data):
    "Whatever the sizes: constants are nested by 256, and a matrix need not have a multiple of it"
    matrices = [Linear4bit(n_in, n_out, bias=False, quant_type="nf4") for _ in range(n_experts)]
    for number, matrix in enumerate(matrices):
        matrix.weight.data *= 1 + number
        matrix.to(dtype).to("cpu")
    alone = [dequantize_4bit(m.weight.data, m.weight.quant_state).clone() for m in matrices]
    n_bytes = [m.weight.nbytes for m in matrices]
    stack = NF4Stack(matrices)
    first = data.draw(st.integers(0, n_experts - 1))
    last = data.draw(st.integers(first + 1, n_experts))
    assert torch.equal(stack.unpacked(slice(first, last)), torch.stack(alone)[first:last])
    for matrix, wanted in zip(matrices, alone, strict=True):
        assert torch.equal(dequantize_4bit(matrix.weight.data, matrix.weight.quant_state), wanted)
    assert stack.holds(matrices)
    assert stack.packed.nbytes == sum(n_bytes)  # no copy is kept beside it
    matrices[-1].weight.data = matrices[-1].weight.data.clone()
    assert not stack.holds(matrices)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=7),
    at_once=st.integers(1, 8),
    back=st.booleans(),
)
def test_groups_of_any_size_multiply_the_same(counts, at_once, back):
    "Experts without rows, a last group that is smaller, no rows at all"
    matrices = [Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu") for _ in counts]
    stack = NF4Stack(matrices)
    rows = torch.randn(sum(counts), 32 if back else 64)
    ends = torch.tensor(counts).cumsum(0).int()
    W = stack.unpacked(slice(0, len(counts)))
    parts = rows.split(counts)
    wanted = torch.cat([part @ (w if back else w.T) for part, w in zip(parts, W, strict=True)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packed_experts.AT_ONCE, "cpu", at_once * 64 * 32)
        found = multiply(rows, ends, stack, back)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@given(n=st.integers(1, 300), weights=st.integers(1, 1000), at_once=st.integers(1, 5000))
def test_groups_hold_every_expert_once_and_no_more_weights_than_allowed(n, weights, at_once):
    parts = groups(n, weights, at_once)
    assert [e for part in parts for e in range(part.start, part.stop)] == list(range(n))
    sizes = [part.stop - part.start for part in parts]
    assert all(size == 1 or size * weights <= at_once for size in sizes)


@pytest.mark.parametrize("family", MANY)
def test_packed_and_single_experts_give_the_same_bits(family, folders, calls):
    packed, single = (learner_of(folders[family], way) for way in (True, False))
    assert quantised(packed) == quantised(single)
    assert expert_bytes(packed) == expert_bytes(single)
    loss, found = gradients(packed)
    assert calls["groups"] > 0
    n_groups = calls["groups"]
    loss_of_single, wanted = gradients(single)
    assert calls["groups"] == n_groups
    assert torch.equal(loss, loss_of_single)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    of_experts = [name for name in wanted if ".experts." in name]
    n_mixtures = len(single_experts(single))
    assert len(of_experts) == n_mixtures * 16 * (2 if family == "nemotron_h" else 3) * 2
    assert all(found[name].abs().sum() > 0 for name in of_experts)
    assert torch.equal(logits(packed), logits(single))


def test_under_autocast_and_with_checkpointing_they_agree(folders):
    "bfloat16 sums in another order; a step apart from rounding is the same"
    results = []
    for packed in True, False:
        learner = learner_of(folders["qwen3_moe"], packed, "bfloat16")
        learner.gradient_checkpointing_enable(dict(use_reentrant=False))
        with torch.autocast("cpu", torch.bfloat16):
            loss, found = gradients(learner)
        norm = torch.stack([g.float().norm() for g in found.values()])
        results.append((loss.float(), norm))
    (loss, norm), (loss_of_single, norm_of_single) = results
    assert abs(loss - loss_of_single) <= 0.02 * loss_of_single
    assert (norm - norm_of_single).norm() <= 0.05 * norm_of_single.norm()


def test_dropout_falls_on_what_lora_reads_alone(folders):
    "Its mean over many draws is LoRA without dropout, and without LoRA nothing is dropped"
    with_dropout = learner_of(folders["qwen3_moe"], True, dropout=0.5)
    without = learner_of(folders["qwen3_moe"], True)
    mixture = next(iter(single_experts(with_dropout).values()))
    other = next(iter(single_experts(without).values()))
    torch.manual_seed(0)
    x, weight = torch.randn(64, 64), torch.full((64, 4), 0.25)
    chosen = torch.stack([torch.randperm(16)[:4] for _ in range(64)])
    with torch.no_grad():
        draws = torch.stack([mixture(x, chosen, weight) for _ in range(40)])
        assert draws.std(0).max() > 1e-3
        difference = (draws.mean(0) - other(x, chosen, weight)).norm()
        assert difference < 0.5 * (draws[0] - other(x, chosen, weight)).norm()
        with with_dropout.disable_adapter():
            first, second = mixture(x, chosen, weight), mixture(x, chosen, weight)
        assert torch.equal(first, second)


def test_what_is_saved_has_the_same_bytes(folders, tmp_path):
    for packed in True, False:
        out = tmp_path / str(packed)
        save_4bit(loaded(folders["qwen3_moe"], packed), out / "model")
        learner = learner_of(folders["qwen3_moe"], packed)
        optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], 1e-3)
        gradients(learner)
        optimizer.step()
        save_adapter(learner, out / "adapter")
    for name in "model/model.safetensors", "adapter/adapter_model.safetensors":
        found, wanted = (load_file(tmp_path / way / name) for way in ("True", "False"))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    again = loaded(tmp_path / "True" / "model", True)
    assert torch.equal(logits(again), logits(loaded(folders["qwen3_moe"], False)))


def test_a_trained_adapter_goes_on_either_way(folders, tmp_path):
    save_adapter(learner_of(folders["qwen3_moe"], True), tmp_path)
    model = load_model(
        folders["qwen3_moe"], tmp_path, load_in_4bit=True, dtype="float32", device="cpu"
    )
    found = logits(model)
    for mixture in single_experts(model).values():
        mixture.__class__ = single_experts_class()
    assert torch.equal(found, logits(model))


def test_few_rows_call_the_chosen_experts_alone(folders, calls):
    model = loaded(folders["qwen3_moe"], True)
    logits(model, IDS[:1, :1])  # 4 rows for 16 experts
    assert calls["groups"] == 0
    logits(model, IDS[:1, :4])
    assert calls["groups"] == 2 * 3  # layers, matrices


def test_what_peft_does_besides_is_left_to_peft(folders, calls):
    "Merged, switched off, two adapters, DoRA, some experts alone, hooks: as with single experts"

    def results(packed):
        model = learner_of(folders["qwen3_moe"], packed)
        config = model.peft_config["default"]
        yield "one", logits(model)
        with model.disable_adapter():
            yield "none", logits(model)
        layer = model.get_submodule("base_model.model.model.layers.0.mlp.experts.0.gate_proj")
        handle = layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        yield "hook", logits(model)
        handle.remove()
        torch.manual_seed(3)
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
        yield "two", logits(model)
        model.base_model.set_adapter("default")
        model.merge_adapter()
        yield "merged", logits(model)
        model.unmerge_adapter()
        yield "unmerged", logits(model)
        torch.manual_seed(3)
        dora = LoraConfig(
            r=8,
            use_dora=True,
            init_lora_weights=False,
            target_modules=r".*experts\.\d+\.\w+",
        )
        yield "dora", logits(get_peft_model(loaded(folders["qwen3_moe"], packed), dora))
        some = LoraConfig(
            r=8,
            rank_pattern={r".*experts\.3\.\w+": 16},
            init_lora_weights=False,
            target_modules=r".*experts\.\d\.\w+",  # not the six last
        )
        torch.manual_seed(3)
        yield "some", logits(get_peft_model(loaded(folders["qwen3_moe"], packed), some))

    wanted = dict(results(False))
    assert calls["groups"] == 0
    at_once = set()
    found = {}
    before = 0
    for name, value in results(True):
        found[name] = value
        if calls["groups"] > before:
            at_once.add(name)
        before = calls["groups"]
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    assert {"one", "none"} <= at_once
    assert not {"merged", "unmerged", "dora", "some"} & at_once


def test_sizes_decide():
    def layout(n_experts, width, inner):
        return Layout(object, Leaves(), n_experts, width, inner, True, False, False, False)

    assert not can_pack(layout(128, 2048, 768), "cpu")  # Qwen3-30B: two experts make a group
    assert can_pack(layout(128, 2048, 768), "cuda")
    assert can_pack(layout(64, 1536, 512), "cpu")
    assert not can_pack(layout(8, 4096, 14336), "cpu")  # Mixtral
    assert not can_pack(layout(8, 64, 64), "cpu")  # few
    assert can_pack(layout(16, 64, 64), "cpu")
    assert not pays(layout(128, 64, 64), 127)
    assert pays(layout(128, 64, 64), 128)


def test_a_model_of_few_experts_stays_as_it_was(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **SIZES | FAMILIES["qwen3_moe"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, load_in_4bit=True, dtype="float32", device="cpu")
    assert {type(m) for m in single_experts(model).values()} == {single_experts_class()}


def test_memory_is_given_back_by_bytes_not_by_matrices(folders, monkeypatch):
    "A walk over the heap for each of 18,432 matrices took longer than all the rest"
    walks = []
    monkeypatch.setattr(machine, "trim_memory", lambda: walks.append(1))
    loaded(folders["qwen3_moe"], True)  # 96 matrices of experts, 1.6 MB
    assert not walks
    trimmer = machine.Trimmer()
    for _ in range(100):
        trimmer.trim()
        trimmer.count(3 * 2**20)  # such as those of Qwen3-30B
    wanted = 100 * 3 * 2**20 / trimmer.every
    assert wanted / 2 <= len(walks) <= wanted
