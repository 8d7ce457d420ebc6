"10_merge: adapters of every form against peft, what is refused, resuming"

import itertools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_experts import FAMILIES
from test_experts import logits as family_logits
from test_experts import saved as saved_family
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
)

from cmixtral_nb.adapter_forms import single_form, stacked_form, write_form
from cmixtral_nb.adapters import Adapter, plain_name, save_adapter
from cmixtral_nb.checkpoints import INDEX, load_tensor, row_tensors, tensor_files, write_tensors
from cmixtral_nb.experts import lora_matrices, split_experts
from cmixtral_nb.loading import load_model, streamed
from cmixtral_nb.merge import (
    add_adapter,
    lora_beside,
    merge,
    nf4_roundtrip,
    open_sources,
    read_weight,
    without_lora_added,
)
from cmixtral_nb.mixtral import small_config
from cmixtral_nb.qlora import add_lora
from cmixtral_nb.stages import Artifact, StageError, input_fingerprint, read_json, write_json
from cmixtral_nb.stored_experts import mixture_on_disk

module = sys.modules["cmixtral_nb.merge"]
V = 40


def small(**kw):
    torch.manual_seed(0)
    return MixtralForCausalLM(
        small_config(
            **{
                **dict(hidden=64, layers=2, intermediate=96, heads=2, kv_heads=1, vocab_size=V),
                **kw,
            }
        )
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    p = tmp_path_factory.mktemp("m") / "model"
    small().save_pretrained(p)
    return p


@pytest.fixture
def model(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def shake(net):
    "Untrained LoRA changes nothing: give it values"
    torch.manual_seed(1)
    for p in net.parameters():
        if p.requires_grad:
            p.data += torch.randn_like(p) * 0.05
    return net


def make_adapter(model, out, rows="all", grow=0, **kw):
    net = load_model(model, trainable=True, device="cpu")
    if grow:
        net.resize_token_embeddings(V + grow, mean_resizing=False)
    save_adapter(shake(add_lora(net, rank=4, alpha=8, rows=rows, n_old=V - 10, **kw)), out)
    return out


@pytest.fixture
def adapter(model, tmp_path):
    return make_adapter(model, tmp_path / "adapter", rows="none")


def tensors(p):
    return {plain_name(n): load_tensor(f, n) for f in [tensor_files(p)] for n in f}


def logits(net):
    return net.eval()(input_ids=torch.arange(20)[None], use_cache=False).logits.detach()


def edit(adapter, f):
    p = adapter / "adapter_model.safetensors"
    t = load_file(p)
    t = f(t) or t
    save_file({k: v.contiguous() for k, v in t.items()}, p)


def configure(adapter, **kw):
    write_json(
        adapter / "adapter_config.json", dict(read_json(adapter / "adapter_config.json"), **kw)
    )


def run(model, adapter, tmp_path, name="out", **kw):
    return merge(model, adapter, out=tmp_path / name, check=False, device="cpu", **kw)


# parity


@pytest.mark.parametrize("rows,grow", [("none", 0), ("all", 0), ("new", 0), ("all", 3)])
def test_merged_answers_as_model_and_adapter(model, tmp_path, rows, grow):
    a = make_adapter(model, tmp_path / "a", rows, grow)
    m = run(model, a, tmp_path, into="original")
    got = AutoModelForCausalLM.from_pretrained(m.path)
    assert (
        type(got) is MixtralForCausalLM and got.config.vocab_size == V + grow == m.stats["n_rows"]
    )
    want = logits(load_model(model, adapter=a, device="cpu"))
    assert torch.allclose(logits(got), want, atol=1e-5) and not torch.allclose(
        want[..., :V], logits(small()), atol=1e-2
    )


def test_old_names_of_experts(model, adapter, tmp_path):
    want = tensors(run(model, adapter, tmp_path, "a").path)
    edit(adapter, lambda t: {k.replace(".mlp.", ".block_sparse_moe."): v for k, v in t.items()})
    got = tensors(run(model, adapter, tmp_path, "b").path)
    assert all(torch.equal(want[k], got[k]) for k in want)


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    p = tmp_path / "llama"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).save_pretrained(p)
    return p


@pytest.mark.parametrize(
    "kw",
    [
        dict(),
        dict(use_rslora=True),
        dict(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}),
        dict(alpha_pattern={"v_proj": 32}),
        dict(modules_to_save=["lm_head"]),
        dict(trainable_token_indices={"embed_tokens": [3, 7]}),
    ],
    ids=str,
)
def test_same_bits_as_peft(llama, tmp_path, kw):
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], **kw
    )
    net = shake(get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config))
    net.save_pretrained(tmp_path / "a")
    got = tensors(run(llama, tmp_path / "a", tmp_path, into="original").path)
    want = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "a")
        .merge_and_unload()
        .state_dict()
    )
    assert (
        max((got[k] - want[k]).abs().max().item() for k in got) < 1e-7 and got.keys() == want.keys()
    )


def foreign(folder, kind):
    "A small model of a family that calls its tables otherwise, and an adapter for it"
    sizes = dict(vocab_size=V, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    wide = dict(intermediate_size=64) if kind == "gpt_neox" else {}
    torch.manual_seed(0)
    asked = AutoConfig.for_model(kind, **sizes, **wide)
    AutoModelForCausalLM.from_config(asked).save_pretrained(folder)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["query_key_value"])
    net = shake(get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config))
    net.save_pretrained(folder / "adapter")
    return net


@pytest.mark.parametrize("kind, names", [("gpt_neox", 2), ("falcon", 1)])
def test_tables_by_other_names(tmp_path, kind, names):
    "Pythia has embed_in and embed_out, Falcon word_embeddings; neither was ever in 4 bits"
    folder = tmp_path / kind
    net = foreign(folder, kind)
    net.merge_and_unload().save_pretrained(tmp_path / "theirs")
    got = tensors(run(folder, folder / "adapter", tmp_path, into="original").path)
    want = tensors(tmp_path / "theirs")
    assert got.keys() == want.keys() and len(row_tensors(got)) == names
    assert max((got[k] - want[k]).abs().max().item() for k in got) < 1e-7
    rounded = tensors(run(folder, folder / "adapter", tmp_path, "r", into="dequantised").path)
    same = {k for k in got if torch.equal(got[k], rounded[k])}
    assert set(row_tensors(got)) <= same and any("dense" in k for k in got.keys() - same)


PER_EXPERT = ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"]
FUSED_TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WHOLE = ["embed_tokens", "lm_head"]  # matrices with a row for each token


def with_rows(*ids):
    "All matrices, and single rows of embedding and head"
    rows = {name: list(ids) for name in WHOLE}
    return dict(target_modules=PER_EXPERT, trainable_token_indices=rows)


# name: (whether peft sees one nn.Linear for each matrix, rows that the vocabulary grows by,
#        configuration)
LAYOUTS: dict[str, tuple[bool, int, dict]] = {
    "attention": (False, 0, dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])),
    "per expert": (True, 0, dict(target_modules=PER_EXPERT)),
    "per expert, rslora": (True, 0, dict(target_modules=PER_EXPERT, use_rslora=True)),
    "per expert, patterns": (
        True,
        0,
        dict(
            target_modules=PER_EXPERT,
            rank_pattern={"w1|w2": 3},
            alpha_pattern={"layers.1.mlp.experts.0.w3": 5},
        ),
    ),
    "fused": (False, 0, dict(target_modules=["q_proj"], target_parameters=FUSED_TARGETS)),
    "fused, rslora": (
        False,
        0,
        dict(target_modules=["v_proj"], target_parameters=FUSED_TARGETS, use_rslora=True),
    ),
    "fused down only": (
        False,
        0,
        dict(target_modules=["v_proj"], target_parameters=["experts.down_proj"]),
    ),
    "fused gate and up only": (
        False,
        0,
        dict(target_modules=["v_proj"], target_parameters=["gate_up_proj"]),
    ),
    "rewritten by peft": (False, 0, dict(target_modules=["q_proj", "w1", "w2", "w3"])),
    "rewritten by peft, router": (False, 0, dict(target_modules=["gate", "w1", "w2", "w3"])),
    "modules_to_save": (True, 0, dict(target_modules=PER_EXPERT, modules_to_save=WHOLE)),
    "rows": (True, 0, with_rows(3, 39)),
    "grown": (True, 3, dict(target_modules=PER_EXPERT, modules_to_save=WHOLE)),
    "grown, rows": (True, 3, with_rows(3, 42)),
    "grown, nothing else trained": (False, 3, dict(target_modules=["q_proj"])),
    "grown, fused": (
        False,
        3,
        dict(
            target_modules=["q_proj"],
            target_parameters=FUSED_TARGETS,
            modules_to_save=WHOLE,
        ),
    ),
}


def load_for_peft(path, linear, grow, dtype):
    net = (
        load_model(path, device="cpu", dtype=dtype)
        if linear
        else AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    )
    if grow:
        net.resize_token_embeddings(V + grow, mean_resizing=False)
    return net


def peft_adapter(path, out, layout, dtype, seed=1):
    linear, grow, kw = LAYOUTS[layout]
    net = get_peft_model(
        load_for_peft(path, linear, grow, dtype), LoraConfig(r=4, lora_alpha=6, **kw)
    )
    torch.manual_seed(seed)
    for p in net.parameters():
        if p.requires_grad:
            p.data += torch.randn_like(p) * 0.05
    net.save_pretrained(out)
    return out


def unfused(state):
    "Stock Mixtral's parameters under the names of a checkpoint"
    out: dict[str, torch.Tensor] = {}
    for k, t in state.items():
        if k.endswith("experts.gate_up_proj"):
            out |= {
                k.replace("gate_up_proj", f"{e}.{w}.weight"): h
                for e in range(len(t))
                for w, h in zip(("w1", "w3"), t[e].chunk(2), strict=True)
            }
        elif k.endswith("experts.down_proj"):
            out |= {k.replace("down_proj", f"{e}.w2.weight"): t[e] for e in range(len(t))}
        else:
            out[k] = t
    return out


def by_peft(path, adapters, linear, grow, dtype):
    "What peft's merge_and_unload gives for adapters in order"
    net = load_for_peft(path, linear, grow, dtype)
    for a in adapters:
        net = PeftModel.from_pretrained(net, a).merge_and_unload()
    return unfused(net.state_dict())


def same_bits(got, want):
    return got.keys() == want.keys() and all(
        got[k].dtype == want[k].dtype and torch.equal(got[k], want[k]) for k in want
    )


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def typed(request, tmp_path_factory):
    p = tmp_path_factory.mktemp("t") / "model"
    small().to(getattr(torch, request.param)).save_pretrained(p)
    return p, request.param


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_bits_of_peft(typed, tmp_path, layout):
    model, dtype = typed
    a = peft_adapter(model, tmp_path / "a", layout, dtype)
    got, want = (
        tensors(run(model, a, tmp_path, into="original").path),
        by_peft(model, [a], *LAYOUTS[layout][:2], dtype),
    )
    assert same_bits(got, want)
    assert not same_bits(tensors(model), want)


@pytest.mark.parametrize(
    "layouts",
    [
        ("per expert", "per expert, rslora"),
        ("fused", "rewritten by peft"),
        ("attention", "fused"),
        ("per expert", "rows", "grown"),
    ],
    ids=str,
)
def test_several_adapters_have_the_bits_of_peft_one_after_another(typed, tmp_path, layouts):
    model, dtype = typed
    adapters = [
        peft_adapter(model, tmp_path / f"a{i}", layout, dtype, seed=i)
        for i, layout in enumerate(layouts)
    ]
    m = run(model, adapters, tmp_path, into="original")
    got = tensors(m.path)
    if layouts[-1] == "grown":  # the last brings both whole matrices; experts as before
        last = load_file(adapters[-1] / "adapter_model.safetensors")
        assert (
            torch.equal(
                got["lm_head.weight"],
                last["base_model.model.lm_head.weight"].to(got["lm_head.weight"].dtype),
            )
            and m.stats["n_rows"] == V + 3
        )
    one = run(model, adapters[0], tmp_path, "one", into="original")
    for i, a in enumerate(adapters[1:]):
        one = run(one.path, a, tmp_path, f"one{i}", into="original")
    assert same_bits(got, tensors(one.path)) and m.stats["n_adapters"] == len(layouts)
    if layouts[-1] != "grown":
        assert same_bits(got, by_peft(model, adapters, LAYOUTS[layouts[-1]][0], 0, dtype))


def test_rounded_once_at_the_end(typed, tmp_path):
    model, dtype = typed
    adapters = [
        peft_adapter(model, tmp_path / f"a{i}", layout, dtype, seed=i)
        for i, layout in enumerate(("fused", "attention"))
    ]
    got, W = (
        tensors(run(model, adapters, tmp_path, into="original", rounding="once").path),
        tensors(model),
    )
    src = open_sources(model, [Adapter(a) for a in adapters], into="original")
    for n in "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.3.w3.weight":
        want = W[n].double()
        for a, b, scale in lora_beside(src, n):
            want += scale * b.double() @ a.double()
        ulp = torch.finfo(got[n].dtype).eps
        assert ((got[n].double() - want).abs() <= want.abs() * ulp / 2 + 1e-7).all()
    again = tensors(run(model, adapters, tmp_path, "peft", into="original").path)
    assert same_bits(got, again) == (dtype == "float32")


def fuse(model):
    "Store the experts as transformers holds them in memory"
    t, out = tensors(model), {}
    for k, x in t.items():
        if ".experts." not in k:
            out[k] = x
            continue
        base = k.split(".experts.")[0] + ".experts"
        n = sum(1 for j in t if j.startswith(base) and j.endswith("w2.weight"))
        out[base + ".gate_up_proj"] = torch.stack(
            [torch.cat([t[f"{base}.{e}.w1.weight"], t[f"{base}.{e}.w3.weight"]]) for e in range(n)]
        )
        out[base + ".down_proj"] = torch.stack([t[f"{base}.{e}.w2.weight"] for e in range(n)])
    save_file(out, model / "model.safetensors", metadata={"format": "pt"})


def test_fused_experts_were_never_in_4_bits(typed, tmp_path):
    model, dtype = typed
    a = peft_adapter(model, tmp_path / "a", "fused", dtype)
    m = run(model, a, tmp_path, "q", into="dequantised")
    o = run(model, a, tmp_path, "o", into="original")
    x, y = tensors(m.path), tensors(o.path)
    assert m.stats["n_dequantised"] == 2 * 4 and all(
        torch.equal(x[k], y[k]) == ("self_attn" not in k) for k in x
    )


def test_command_takes_one_adapter_or_several(cli, model, adapter, tmp_path):
    second = shutil.copytree(adapter, tmp_path / "second")
    for name, adapters in (("one", [adapter]), ("two", [adapter, second])):
        assert (
            cli(
                "merge",
                "--model",
                model,
                "--adapter",
                *adapters,
                "--out",
                tmp_path / name,
                "--into",
                "original",
                "--rounding",
                "once",
                "--no-check",
                "--device",
                "cpu",
            )[0]
            == 0
        )
    assert same_bits(
        tensors(tmp_path / "two"),
        tensors(run(model, [adapter, second], tmp_path, into="original").path),
    )
    assert len(read_json(tmp_path / "two" / "manifest.json")["inputs"]["adapter"]["path"]) == 2


@pytest.mark.parametrize("layout", ["fused", "per expert"])
def test_into_a_checkpoint_with_fused_experts(typed, tmp_path, layout):
    model, dtype = typed
    a = peft_adapter(model, tmp_path / "a", layout, dtype)
    want = tensors(run(model, a, tmp_path, "w", into="original").path)
    fused = shutil.copytree(model, tmp_path / "fused")
    fuse(fused)
    m = merge(fused, a, out=tmp_path / "f", into="original", device="cpu")
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors(m.path) and same_bits(
        unfused(tensors(m.path)), want
    )
    assert m.stats["logit_difference"] < (1e-5 if dtype == "float32" else 0.05)


def test_bfloat16_is_rounded_once(llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(llama).bfloat16().save_pretrained(llama)
    net = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    shake(
        get_peft_model(net, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
    ).save_pretrained(tmp_path / "a")
    W, t = tensors(llama), load_file(tmp_path / "a" / "adapter_model.safetensors")
    got = tensors(run(llama, tmp_path / "a", tmp_path, into="original").path)
    name = "model.layers.0.self_attn.q_proj"
    A, B = (t[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    assert torch.equal(
        got[name + ".weight"], (W[name + ".weight"].double() + 1.5 * B @ A).float().bfloat16()
    )
    assert all(torch.equal(got[k], W[k]) for k in W if "q_proj" not in k)


def test_first_use_of_4_bits_while_another_thread_imports_it():
    code = """
import sys, threading, time, torch
from cmixtral_nb.merge import nf4_roundtrip
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("bitsandbytes.backends"): time.sleep(0.2)
sys.meta_path.insert(0, Slow())
other = threading.Thread(target=nf4_roundtrip, args=[torch.ones(64, 64)]); other.start()
while "bitsandbytes.functional" not in sys.modules: time.sleep(0.001)
assert nf4_roundtrip(torch.ones(64, 64)).sum() == 64 * 64
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_is_bitwise_what_training_used(saved, dtype):
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    W = tensors(saved)["model.layers.1.mlp.experts.2.w2.weight"]
    layer = Linear4bit(*W.shape[::-1], bias=False, compress_statistics=True, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        W.to(getattr(torch, dtype)), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    layer.to("cpu")
    if layer.weight.quant_state is None:
        layer.weight._quantize("cpu")
    want = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    got = nf4_roundtrip(W, dtype)
    assert (
        got.dtype == want.dtype == getattr(torch, dtype)
        and torch.equal(got, want)
        and not torch.equal(got.float(), W)
    )


def write_manifest(adapter, inputs, stats):
    "What our own training leaves beside an adapter"
    found = dict(inputs=inputs, stats=stats)
    write_json(adapter / "manifest.json", dict(found, kind="adapter", files={}, fingerprint="x"))


def test_manifest_says_what_was_in_4_bits(model, adapter, tmp_path):
    name = "model.layers.0.mlp.experts.1.w1"
    write_manifest(
        adapter,
        inputs={},
        stats=dict(quantised=[name], quantised_dtype="float32"),
    )
    m = run(model, adapter, tmp_path)
    plain = run(model, adapter, tmp_path, "o", into="original")
    assert m.stats["n_dequantised"] == 1
    a, b = tensors(m.path), tensors(plain.path)
    assert [k for k in a if not torch.equal(a[k], b[k])] == [name + ".weight"]
    write_json(
        adapter / "manifest.json",
        dict(kind="adapter", files={}, fingerprint="y", inputs={}, stats=dict(quantised=[])),
    )
    assert run(model, adapter, tmp_path, "p").stats["n_dequantised"] == 0


@pytest.mark.parametrize(
    "stats, match",
    [
        (dict(quantised=True), "manifest.json: stats.quantised is True, expected a list"),
        (dict(quantised=[], quantised_dtype="os"), "stats.quantised_dtype is 'os', expected"),
    ],
)
def test_a_manifest_that_says_nonsense(refuses, model, adapter, stats, match):
    write_manifest(adapter, inputs={}, stats=stats)
    refuses(match, model, adapter)


def test_a_table_of_no_known_name(refuses, tmp_path):
    folder = tmp_path / "falcon"
    foreign(folder, "falcon")
    found = load_file(folder / "model.safetensors")
    found["transformer.tokens.weight"] = found.pop("transformer.word_embeddings.weight")
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    refuses("has no embedding by a name that is known", folder, folder / "adapter")


def test_adapter_of_another_tool_changes_its_own_matrices_alone(model, tmp_path, capsys):
    "Nothing says that it was trained on 4-bit weights, so the others keep every bit"
    net = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    lora = get_peft_model(net, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    shake(lora).save_pretrained(tmp_path / "theirs")
    m = run(model, tmp_path / "theirs", tmp_path)
    assert (m.stats["into"], m.stats["n_dequantised"]) == ("original", 0)
    assert m.manifest["params"]["into"] == "original"
    assert "does not say how it was trained: --into dequantised" in capsys.readouterr().out
    a, b = tensors(m.path), tensors(model)
    changed = {name for name in b if not torch.equal(a[name], b[name])}
    assert changed == {name for name in b if "q_proj" in name or "v_proj" in name}


def test_adapter_trained_in_4_bits_goes_into_dequantised_weights(micro):
    "Ours says so in its manifest; what is recorded is what was done"
    merged = Artifact.load(micro[0] / "merged")
    assert merged.manifest["params"]["into"] == merged.stats["into"] == "dequantised"
    assert merged.stats["n_dequantised"] == merged.stats["n_lora"] > 0


def test_adapter_said_to_be_trained_in_4_bits_was_so_everywhere(model, adapter, tmp_path):
    m = run(model, adapter, tmp_path, into="dequantised")
    assert m.stats["n_dequantised"] == 2 * (4 + 4 * 3) == m.stats["n_lora"]
    a, b = tensors(m.path), tensors(model)
    assert all(
        torch.equal(a[k], b[k])
        for k in (
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.layers.0.mlp.gate.weight",
            "model.norm.weight",
        )
    )


def test_tied_model_with_a_head_of_its_own(llama, tmp_path):
    config = read_json(llama / "config.json")
    write_json(llama / "config.json", dict(config, tie_word_embeddings=True))
    t = load_file(llama / "model.safetensors")
    del t["lm_head.weight"]
    save_file(t, llama / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "a").mkdir()
    head = torch.randn(V, 16)
    save_file(
        {"base_model.model.lm_head.weight": head}, tmp_path / "a" / "adapter_model.safetensors"
    )
    write_json(tmp_path / "a" / "adapter_config.json", dict(peft_type="LORA", r=4, lora_alpha=8))
    m = run(llama, tmp_path / "a", tmp_path, into="original")
    net = AutoModelForCausalLM.from_pretrained(m.path)
    assert torch.equal(net.lm_head.weight, head) and torch.equal(
        net.model.embed_tokens.weight, t["model.embed_tokens.weight"]
    )


@pytest.fixture
def tied(llama):
    "A tied model whose files hold the one matrix twice"
    config = read_json(llama / "config.json")
    write_json(llama / "config.json", dict(config, tie_word_embeddings=True))
    t = load_file(llama / "model.safetensors")
    t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()
    save_file(t, llama / "model.safetensors", metadata={"format": "pt"})
    return llama


def with_rows_of(net, out, **kw):
    "An adapter of peft that trains rows of the embedding, and the logits it gives"
    net = shake(get_peft_model(net, LoraConfig(r=4, target_modules=["q_proj"], **kw)))
    net.save_pretrained(out)
    return logits(net)


def test_tied_model_that_is_stored_twice(tied, tmp_path):
    net = AutoModelForCausalLM.from_pretrained(tied)
    assert net.lm_head.weight is net.model.embed_tokens.weight
    want = with_rows_of(net, tmp_path / "a", trainable_token_indices={"embed_tokens": [3, 7]})
    m = merge(tied, tmp_path / "a", out=tmp_path / "m", device="cpu")
    got = AutoModelForCausalLM.from_pretrained(m.path)
    assert got.lm_head.weight is got.model.embed_tokens.weight
    assert torch.allclose(logits(got), want, atol=1e-5)


def test_a_head_that_is_not_the_embedding_is_not_said_to_be(tied, tmp_path):
    t = load_file(tied / "model.safetensors")
    t["lm_head.weight"][5] += 1
    save_file(t, tied / "model.safetensors", metadata={"format": "pt"})
    net = AutoModelForCausalLM.from_pretrained(tied)
    want = with_rows_of(net, tmp_path / "a")
    m = merge(tied, tmp_path / "a", out=tmp_path / "m", device="cpu")
    assert read_json(m.path / "config.json")["tie_word_embeddings"] is False
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(m.path)), want, atol=1e-5)


def test_a_copy_of_a_tied_embedding(refuses, tied, tmp_path):
    "peft trains a copy where it is not told of the head, which stays as it was"
    net = AutoModelForCausalLM.from_pretrained(tied)
    with_rows_of(net, tmp_path / "a", modules_to_save=["embed_tokens"])
    refuses("was trained on a copy of the embedding", tied, tmp_path / "a")


@pytest.fixture
def seeing(tmp_path):
    "A model that sees pictures too: its files call their tensors otherwise than the model does"
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    text = dict(sizes, vocab_size=V, num_key_value_heads=1, head_dim=8, pad_token_id=0)
    torch.manual_seed(0)
    picture = dict(sizes, image_size=28, patch_size=14)
    net = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=picture))
    net.save_pretrained(tmp_path / "seeing")
    return tmp_path / "seeing"


@pytest.mark.parametrize(
    "kw", [dict(trainable_token_indices={"embed_tokens": [3, 7]}), dict(modules_to_save=WHOLE)]
)
def test_a_model_that_sees_pictures(seeing, tmp_path, kw):
    net = AutoModelForCausalLM.from_pretrained(seeing)
    want = with_rows_of(net, tmp_path / "a", **kw)
    m = merge(seeing, tmp_path / "a", out=tmp_path / "m", device="cpu")
    assert m.stats["n_lora"] == 2  # one of them in the part that sees
    got, info = AutoModelForCausalLM.from_pretrained(m.path, output_loading_info=True)
    assert torch.allclose(logits(got), want, atol=1e-5)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_weight_that_is_not_there(llama):
    with pytest.raises(StageError, match="the weights lack model.layers.9.mlp.up_proj.weight"):
        read_weight(open_sources(llama, [], into="original"), "model.layers.9.mlp.up_proj.weight")


def test_tokenizer_of_the_adapter_wins(model, tmp_path):
    a = make_adapter(model, tmp_path / "a", "all", 3)
    (model / "tokenizer.json").write_text('{"old": 1}')
    assert (run(model, a, tmp_path, "x") / "tokenizer.json").read_text() == '{"old": 1}'
    (a / "tokenizer.json").write_text('{"new": 1}')
    (a / "chat_template.jinja").write_text("hi")
    m = run(model, a, tmp_path, "y")
    assert (m / "tokenizer.json").read_text() == '{"new": 1}' and (
        m / "chat_template.jinja"
    ).read_text() == "hi"


# every family of mixtures, every form of an adapter, every layout of a checkpoint


def learner(family, place):
    "A family's model with single experts and LoRA on every matrix, and what it answers"
    folder, stock = saved_family(family, place)
    net = split_experts(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=lora_matrices(net))
    net = get_peft_model(net, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1)
    return folder, stock, net


def by_place(folder, state):
    "Matrices of experts in a state of the stock model, by their plain names; others as they are"
    disk = mixture_on_disk(folder)
    assert disk is not None
    parameters = {at.parameter for at in disk.stacked.values()}
    own = {name: t for name, t in state.items() if name not in parameters}
    own |= {n: at.place.of(state[at.parameter]) for n, at in disk.stacked.items()}
    return {plain_name(name): t for name, t in own.items()}


def all_weights(folder):
    "Every matrix of a model folder, whatever its layout"
    src = open_sources(folder, [], into="original")
    held = {name for names in src.held.values() for e in names.values() for name in e}
    names = {n for n, tensor in src.names.items() if tensor not in src.held} | held
    return {name: read_weight(src, name) for name in names}


def different(found, want):
    common = found.keys() & want.keys()
    assert len(common) > len(found) * 0.9  # but for what only one of them stores, as biases in part
    return [name for name in common if not torch.equal(found[name], want[name])]


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_in_any_form(family, families, tmp_path):
    "Ours, stacked on stock peft, and back; each merged with the bits of peft's own merge"
    folder, stock, net = learner(family, families)
    save_adapter(net, tmp_path / "ours")
    want = family_logits(net)
    assert (want - stock).abs().max() >= 1
    disk = mixture_on_disk(folder)
    assert disk is not None
    for form in ("stacked", "single"):
        (tmp_path / form).mkdir()
    write_form(stacked_form(Adapter(tmp_path / "ours"), disk), tmp_path / "stacked")
    on_stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as said:
        on_stock = PeftModel.from_pretrained(on_stock, tmp_path / "stacked").eval()
    assert not [w for w in said if "missing" in str(w.message)]
    assert (family_logits(on_stock) - want).abs().max() <= 2e-5
    write_form(single_form(Adapter(tmp_path / "stacked"), disk), tmp_path / "single")
    again = load_model(folder, tmp_path / "single", dtype="float32", device="cpu")
    assert (family_logits(again) - want).abs().max() <= 2e-5
    merged = {"ours": net, "stacked": on_stock}
    for form, trained in merged.items():
        how = dict(into="original", device="cpu", check=form == "stacked")
        m = merge(folder, tmp_path / form, out=tmp_path / f"merged_{form}", **how)
        state = trained.merge_and_unload().state_dict()
        own = by_place(folder, state) if form == "stacked" else state
        by_peft = {plain_name(name): t for name, t in own.items()}
        assert not different(all_weights(m.path), by_peft), form
    found = AutoModelForCausalLM.from_pretrained(m.path, dtype=torch.float32)
    assert (family_logits(found) - want).abs().max() <= 1e-3
    assert found.config.model_type == family


# averages


def mean_by_hand(sources, name):
    "The mean of the models that adapters make, one weight in float64"
    each = []
    for src in sources:
        W = without_lora_added(src, name).double()
        for A, B, scale in lora_beside(src, name):
            W += scale * B.double() @ A.double()
        each.append(W)
    return torch.stack(each).mean(0)


def sources_of(model, adapters):
    return [open_sources(model, [Adapter(a)], into="original") for a in adapters]


@pytest.mark.parametrize("layout", ["per expert, rslora", "fused", "modules_to_save", "rows"])
def test_the_mean_is_that_of_the_merged_models(typed, tmp_path, layout):
    model, dtype = typed
    adapters = [peft_adapter(model, tmp_path / f"a{i}", layout, dtype, seed=i) for i in range(3)]
    m = merge(model, adapters, out=tmp_path / "m", average=True, into="original", device="cpu")
    assert (m.stats["n_adapters"], m.stats["average"]) == (3, True)
    assert m.stats["logit_difference"] < (1e-5 if dtype == "float32" else 0.03)
    half_ulp = torch.finfo(getattr(torch, dtype)).eps / 2
    before, n_changed = tensors(model), 0
    sources = sources_of(model, adapters)
    for name, W in tensors(m.path).items():
        want = mean_by_hand(sources, name)
        most = want.abs() * half_ulp + 3e-7
        if layout == "rows":  # which by hand are rounded one by one
            most = want.abs().max() * 2 * half_ulp + 3e-7
        assert ((W.double() - want).abs() <= most).all(), name
        n_changed += not torch.equal(W, before[name])
    assert n_changed > 1
    last = tensors(run(model, adapters[-1], tmp_path, "last", into="original").path)
    assert not same_bits(tensors(m.path), last)


def test_the_mean_of_products_is_no_product_of_means(typed, tmp_path):
    model, dtype = typed
    adapters = [peft_adapter(model, tmp_path / f"a{i}", "attention", dtype, i) for i in range(2)]
    name = "model.layers.0.self_attn.q_proj.weight"
    sources = sources_of(model, adapters)
    first, second = (lora_beside(src, name)[0] for src in sources)
    A, B = (first[0] + second[0]).double() / 2, (first[1] + second[1]).double() / 2
    W = read_weight(sources[0], name).double()
    got = tensors(run(model, adapters, tmp_path, average=True, into="original").path)[name]
    want = mean_by_hand(sources, name)
    of_means = W + first[2] * B @ A
    assert (want - of_means).norm() > 0.3 * (want - W).norm() > 10 * (want - got).norm()


def test_no_mean(refuses, model, adapter, tmp_path):
    refuses("keeps no other adapters to average with; give several", model, adapter, average=True)
    rows = make_adapter(model, tmp_path / "rows", "all")
    odd = "rows brings other matrices or rows than .*adapter"
    refuses(odd, model, [adapter, rows], average=True)
    kept = shutil.copytree(adapter, adapter / "last" / "00000002")
    edit(kept, lambda t: next(iter(t.values())).view(-1).__setitem__(3, math.nan))
    refuses("00000002: .* holds NaN", model, adapter, average=True)
    faults = refuses("none does not exist", model, [adapter, tmp_path / "none"], average=True)
    assert len(faults) == 1


# shards and resuming


def test_shards_do_not_change_the_result(model, adapter, tmp_path):
    one, many = (
        run(model, adapter, tmp_path, "one"),
        run(model, adapter, tmp_path, "many", shard_bytes=50_000),
    )
    assert many.stats["shards"] > 3 and one.stats["shards"] == 1
    a, b = tensors(one.path), tensors(many.path)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    index = read_json(many / INDEX)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in a.values())
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(one.path)),
        logits(AutoModelForCausalLM.from_pretrained(many.path)),
    )


def test_a_half_written_shard_is_written_again(model, adapter, tmp_path, monkeypatch):
    write, n = write_tensors, []

    def dying(path, *a):
        n.append(path.name)
        if len(n) == 3:
            raise KeyboardInterrupt
        return write(path, *a)

    monkeypatch.setattr(module, "write_tensors", dying)
    with pytest.raises(KeyboardInterrupt):
        run(model, adapter, tmp_path, shard_bytes=50_000)
    half = tmp_path / "out.tmp" / n[0]
    half.write_bytes(half.read_bytes()[:-9])  # as a lost page leaves it
    done, n[:] = n[1], [0] * 9

    def counting(path, *args):
        n.append(path.name)
        return write(path, *args)

    monkeypatch.setattr(module, "write_tensors", counting)
    m = run(model, adapter, tmp_path, shard_bytes=50_000)
    assert half.name in n and done not in n
    monkeypatch.undo()
    want = run(model, adapter, tmp_path, "whole", shard_bytes=50_000)
    assert m.fingerprint == want.fingerprint


DISK_EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "mmap.__new__",
}


def in_a_fork(work, at=None):
    """Run `work` in a child that kills itself at its event number `at` -> (was it killed, events)

    Events are those that Python audits and that touch a disk; a clock would kill elsewhere on
    every machine.
    """
    answer, ask = os.pipe()
    if not (pid := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        events = itertools.count(1)

        def watch(event, _):
            if event in DISK_EVENTS and next(events) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        work()
        os.write(ask, str(next(events)).encode())
        os._exit(0)
    os.close(ask)
    was_killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    with os.fdopen(answer) as pipe:
        return was_killed, int(pipe.read() or 0)


def test_killed_at_random_moments(tmp_path):
    "kill -9: never a whole-looking broken folder; the same command ends with the same bits"
    small(layers=3, experts=8).bfloat16().save_pretrained(tmp_path / "model")
    a = make_adapter(tmp_path / "model", tmp_path / "a", rows="none")

    def job(name):
        return run(tmp_path / "model", a, tmp_path, name, into="original", shard_bytes=60_000)

    want = job("whole").fingerprint
    was_killed, n_events = in_a_fork(lambda: job("counted"))
    assert not was_killed
    rng, kept = random.Random(0), 0
    for i in range(20):
        out = tmp_path / f"out{i}"
        was_killed, _ = in_a_fork(partial(job, out.name), at=rng.randrange(1, n_events))
        assert was_killed
        if out.exists():
            Artifact.load(out, "model", verify=True)
        kept += len(list(out.with_name(out.name + ".tmp").glob("*.safetensors")))
        m = job(out.name)
        assert (
            m.fingerprint == want
            and not m.damage(verify=True)
            and not out.with_name(out.name + ".tmp").exists()
        )
    assert kept > 10


def test_half_of_a_small_file_is_not_in_the_manifest(model, adapter, tmp_path, monkeypatch):
    want = run(model, adapter, tmp_path, "whole")

    def dying(*a, **changes):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "copy_config", dying)
    with pytest.raises(KeyboardInterrupt):
        run(model, adapter, tmp_path)
    (tmp_path / "out.tmp" / "manifest.json.part").write_text("{")
    monkeypatch.undo()
    assert run(model, adapter, tmp_path).fingerprint == want.fingerprint


# the check


@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_streamed_model_answers_as_the_loaded_one(typed, llama, kind):
    path = typed[0] if kind == "mixtral" else llama
    got = streamed(path, partial(read_weight, open_sources(path, [], into="original")))
    want = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert torch.allclose(logits(got), logits(want), atol=1e-5)
    assert all(p.is_meta for n, p in got.named_parameters() if n.endswith("_proj.weight"))


@pytest.mark.parametrize(
    "layout",
    ["per expert, rslora", "fused", "rewritten by peft, router", "rows", "grown", "grown, rows"],
)
def test_streamed_model_with_adapter_answers_as_peft(typed, tmp_path, layout):
    model, dtype = typed
    linear, grow, _ = LAYOUTS[layout]
    a = peft_adapter(model, tmp_path / "a", layout, "float32")
    src = open_sources(model, [Adapter(a)], into="original")
    net = streamed(model, partial(without_lora_added, src), partial(lora_beside, src))
    want = PeftModel.from_pretrained(load_for_peft(model, linear, grow, "float32"), a)
    assert torch.allclose(
        logits(net),
        logits(want),
        atol=1e-2 if dtype == "bfloat16" else 1e-4,
    )  # whole matrices are rounded to the type of the model
    m = merge(model, a, out=tmp_path / "m", into="original", device="cpu")
    assert m.stats["logit_difference"] < (1e-5 if dtype == "float32" else 0.03)


def test_check_of_several_adapters_notices_that_one_is_missing(typed, tmp_path, monkeypatch):
    model, dtype = typed
    adapters = [
        peft_adapter(model, tmp_path / f"a{i}", layout, dtype, seed=i)
        for i, layout in enumerate(("per expert", "per expert, rslora"))
    ]
    merge(model, adapters, out=tmp_path / "ok", into="original", device="cpu")

    def without_the_last(src, a, name, W, dtype):
        return W if a is src.adapters[-1] else add_adapter(src, a, name, W, dtype)

    monkeypatch.setattr(module, "add_adapter", without_the_last)
    with pytest.raises(StageError, match="logits of the merged model differ by"):
        merge(model, adapters, out=tmp_path / "no", into="original", device="cpu")
    assert not (tmp_path / "no").exists()


# what it refuses, before anything is written


@pytest.fixture
def refuses(tmp_path):
    def check(match, model, adapter, **kw):
        with pytest.raises(StageError, match=match) as e:
            merge(model, adapter, out=tmp_path / "no", device="cpu", **{"check": False, **kw})
        assert not (tmp_path / "no").exists() and not (tmp_path / "no.tmp").exists()
        return e.value.args

    return check


def test_refused_paths(refuses, model, adapter, tmp_path):
    refuses("into is 'both', expected dequantised or original", model, adapter, into="both")
    refuses("shard_bytes is 0", model, adapter, shard_bytes=0)
    faults = refuses(
        "none1 does not exist; expected a PEFT adapter; run: cmixtral pretrain",
        tmp_path / "none2",
        tmp_path / "none1",
    )
    assert len(faults) == 2 and "none2 does not exist" in faults[1]
    refuses("is not an adapter: it has no adapter_config.json", model, model)


def test_pickled_truncated_and_missing_weights(refuses, model, adapter):
    f = adapter / "adapter_model.safetensors"
    whole = f.read_bytes()
    f.write_bytes(whole[:-1])
    refuses("is truncated", model, adapter)
    f.unlink()
    refuses("adapter_model.safetensors is missing", model, adapter)
    (adapter / "adapter_model.gguf").write_bytes(b"GGUF")  # no pickle
    refuses("adapter_model.safetensors is missing", model, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04")
    refuses("adapter_model.bin is a pickle, which can run any code", model, adapter)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_the_adapter(refuses, model, adapter, bad):
    edit(adapter, lambda t: next(iter(t.values())).view(-1).__setitem__(3, bad))
    refuses("holds NaN or infinity; train it again", model, adapter)


def test_nan_in_the_model(refuses, model, adapter):
    t = load_file(model / "model.safetensors")
    t["model.norm.weight"][0] = math.nan
    save_file(t, model / "model.safetensors", metadata={"format": "pt"})
    refuses("model.norm.weight holds NaN or infinity", model, adapter)


def test_adapter_of_another_model(refuses, model, adapter, tmp_path):
    small(intermediate=80).save_pretrained(tmp_path / "narrow")
    faults = refuses(
        r"LoRA of model.layers.0.mlp.experts.0.w1.weight makes \[96, 64\], "
        r"the model has \[80, 64\]",
        tmp_path / "narrow",
        adapter,
    )
    assert len(faults) == 5 and "more faults" in faults[-1]
    small(layers=1).save_pretrained(tmp_path / "short")
    refuses("the model has no model.layers.1", tmp_path / "short", adapter)
    small(hidden=64, aux_loss=0.5).save_pretrained(tmp_path / "same")
    write_manifest(
        adapter,
        stats={},
        inputs={"model": {"fingerprint": "abc"}},
    )
    refuses(
        f"was trained on model abc, found {input_fingerprint(tmp_path / 'same')}",
        tmp_path / "same",
        adapter,
    )


def test_adapters_that_are_no_plain_lora(refuses, model, adapter):
    configure(adapter, use_dora=True, peft_type="VERA", lora_bias=True)
    faults = refuses("is a VERA adapter, expected LORA", model, adapter)
    assert "DoRA" in faults[1] and "biases" in faults[2]
    configure(adapter, use_dora=False, peft_type="LORA", lora_bias=False)
    edit(
        adapter,
        lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, V)},
    )
    refuses(
        "1 tensors that are no LoRA of a linear layer, such as .*lora_embedding_A", model, adapter
    )


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base(refuses, llama, tmp_path, start):
    "peft takes the first product out of the base again where it loads such an adapter"
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
    net = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    net.save_pretrained(tmp_path / "a")
    refuses(f"init_lora_weights is {start}, which changes the base", llama, tmp_path / "a")
    configure(tmp_path / "a", init_lora_weights="gaussian")
    run(llama, tmp_path / "a", tmp_path)


def test_half_a_pair_and_wrong_ranks(refuses, model, adapter):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit(adapter, lambda t: t.update({key: t[key][:2]}))
    refuses("LoRA of model.layers.0.self_attn.q_proj.weight makes", model, adapter)
    edit(adapter, lambda t: t.pop(key) is None or t)
    refuses("q_proj.weight has only lora_B", model, adapter)


def test_rows_that_do_not_agree(refuses, model, tmp_path):
    a = make_adapter(model, tmp_path / "a", "all", 3)
    head = "base_model.model.lm_head.weight"
    edit(a, lambda t: t.update({head: t[head][:V]}))
    refuses("embedding and head have different numbers of rows", model, a)
    edit(a, lambda t: {k: v for k, v in t.items() if k != head})
    refuses("embedding and head have different numbers of rows", model, a)
    edit(a, lambda t: t | {head: torch.zeros(V - 1, 64)})
    refuses(r"lm_head.weight is \[39, 64\], the model has \[40, 64\]", model, a)


def test_model_stored_in_4_bits(refuses, model, adapter):
    t = load_file(model / "model.safetensors")
    t["model.layers.0.self_attn.q_proj.weight.absmax"] = torch.zeros(3)
    save_file(t, model / "model.safetensors", metadata={"format": "pt"})
    refuses("is stored in 4 bits .*; give the model it was made from", model, adapter)


def test_full_disk_is_seen_first(refuses, model, adapter, monkeypatch):
    usage = SimpleNamespace(total=100, used=99, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage)
    refuses(
        "the merged model needs .* MB, 0 MB are free; free some, or choose another --out",
        model,
        adapter,
    )


def test_check_notices_a_wrong_merge(refuses, model, tmp_path, monkeypatch):
    from test_init import OLD, write_tok

    small(vocab_size=len(OLD)).save_pretrained(model)
    write_tok(model, OLD)
    a = make_adapter(model, tmp_path / "a", "none")
    m = merge(model, a, out=tmp_path / "ok", into="original", device="cpu")
    assert m.stats["logit_difference"] < 1e-5
    monkeypatch.setattr(module, "merge_weight", lambda W, A, B, scale, *a: W + B @ A * scale * 1.1)
    refuses(
        "logits of the merged model differ by .*%.*, expected at most 0.1%; "
        "merge again, with --rounding once if the weights are 16-bit",
        model,
        a,
        into="original",
        check=True,
    )


def test_faults_of_all_adapters_and_of_the_model_at_once(refuses, model, adapter, tmp_path):
    pickled, nan = (
        shutil.copytree(adapter, tmp_path / "pickled"),
        shutil.copytree(adapter, tmp_path / "nan"),
    )
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    edit(nan, lambda t: next(iter(t.values())).view(-1).__setitem__(3, math.nan))
    faults = refuses("is a pickle", model, [adapter, pickled, nan, tmp_path / "none"])
    assert (
        len(faults) == 3
        and "none does not exist" in faults[1]
        and "nan: " in faults[2]
        and "holds NaN" in faults[2]
    )
    faults = refuses("is a pickle", tmp_path / "nowhere", [pickled, nan])
    assert len(faults) == 3 and "nowhere does not exist" in faults[1] and "holds NaN" in faults[2]
    refuses("no adapter is given", model, [])
    refuses("rounding is 'down', expected peft or once", model, adapter, rounding="down")


def test_a_later_adapter_of_another_model(refuses, model, adapter, tmp_path):
    later = shutil.copytree(adapter, tmp_path / "later")
    write_manifest(
        later,
        stats={},
        inputs={"model": {"fingerprint": "abc"}},
    )
    faults = refuses("later was trained on model abc, found", model, [adapter, later])
    assert len(faults) == 1
    grown = make_adapter(model, tmp_path / "grown", "all", 3)
    faults = refuses(
        r"embed_tokens.weight is \[40, 64\], the model has \[43, 64\]",
        model,
        [grown, make_adapter(model, tmp_path / "small", "all")],
    )


@pytest.fixture
def sharded(tmp_path):
    p = tmp_path / "sharded"
    small().save_pretrained(p, max_shard_size="200KB")
    assert len(list(p.glob("*.safetensors"))) > 3
    return p


def test_shards_missing_cut_and_never_there(refuses, sharded, adapter):
    a, b, c = sorted(sharded.glob("*.safetensors"))[:3]
    a.unlink()
    b.write_bytes(b.read_bytes()[:-1])
    index = read_json(sharded / INDEX)
    index["weight_map"]["model.extra.weight"] = "absent.safetensors"
    write_json(sharded / INDEX, index)
    edit(adapter, lambda t: next(iter(t.values())).view(-1).__setitem__(0, math.nan))
    faults = refuses(f"{a.name} is missing; {INDEX} names it", sharded, adapter)
    assert (
        any("absent.safetensors is missing" in f for f in faults)
        and any(f"{b.name} is truncated" in f for f in faults)
        and any("holds NaN" in f for f in faults)
    )
    assert len(faults) == 4


def test_index_that_promises_a_tensor_its_shard_lacks(refuses, sharded, adapter):
    index = read_json(sharded / INDEX)
    index["weight_map"]["model.extra.weight"] = next(iter(index["weight_map"].values()))
    write_json(sharded / INDEX, index)
    refuses(f"lacks model.extra.weight, which {INDEX} promises", sharded, adapter)


def test_fused_adapter_of_another_model(refuses, typed, tmp_path):
    model, dtype = typed
    a = peft_adapter(model, tmp_path / "a", "fused", dtype)
    for kw, match in (
        (
            dict(experts=8),
            "LoRA of model.layers.0.mlp.experts.gate_up_proj has 16 ranks, expected 32: "
            "rank 4 for each of 8 experts",
        ),
        (dict(intermediate=80), r"gate_up_proj makes \[192, 64\], the model has \[160, 64\]"),
        (dict(layers=1), "the model has no model.layers.1"),
    ):
        small(**kw).save_pretrained(tmp_path / "other")
        refuses(match, tmp_path / "other", a)
        shutil.rmtree(tmp_path / "other")
    configure(a, target_parameters=["mlp.experts.gate_up_proj"])
    refuses("tensors that are no LoRA of a linear layer, such as .*experts", model, a)


def test_rows_beyond_the_model_and_no_rank(refuses, typed, tmp_path):
    model, dtype = typed
    a = peft_adapter(model, tmp_path / "a", "rows", dtype)
    configure(a, trainable_token_indices={"embed_tokens": [3, 40], "lm_head": [3, 39]})
    faults = refuses(
        r"\[2, 64\] rows of model.embed_tokens.weight for 2 ids up to 40, the model has \[40, 64\]",
        model,
        a,
    )
    assert len(faults) == 1
    c = read_json(a / "adapter_config.json")
    del c["r"], c["lora_alpha"]
    write_json(a / "adapter_config.json", c)
    refuses("adapter_config.json has no r and no lora_alpha; expected a LoRA", model, a)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_stacked_adapter_of_peft_is_loaded(family, families, tmp_path):
    "peft trains on the stock model; ours, which holds single matrices, answers as it does"
    folder, _ = saved_family(family, families)
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=targets)
    net = shake(get_peft_model(net, config)).eval()
    net.save_pretrained(tmp_path)
    ours = load_model(folder, tmp_path, dtype="float32", device="cpu")
    assert (family_logits(ours) - family_logits(net)).abs().max() <= 2e-5
    assert (family_logits(net) - saved_family(family, families)[1]).abs().max() > 0.1
