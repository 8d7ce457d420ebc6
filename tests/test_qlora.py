"Not shown in 08_qlora: adapters that do not belong, other architectures, growing rows"

import gc
import json
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmixtral_nb.adapters import require_adapter, save_adapter
from cmixtral_nb.experts import METHOD, experts_quantiser
from cmixtral_nb.loading import load_model, save_4bit
from cmixtral_nb.merge import merge
from cmixtral_nb.mixtral import small_config
from cmixtral_nb.qlora import add_lora, expert_bytes, parameter_table, quantised, without_lora
from cmixtral_nb.stages import StageError, write_json

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
IDS = torch.arange(30)[None] % 99


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    from transformers import MixtralForCausalLM

    d = tmp_path_factory.mktemp("qlora")
    torch.manual_seed(0)
    MixtralForCausalLM(
        small_config(hidden=64, layers=1, intermediate=64, heads=2, vocab_size=100)
    ).save_pretrained(d / "model")
    m = add_lora(load_model(d / "model", load_in_4bit=True, trainable=True), 4, 8, 0.0)
    for p in m.parameters():
        if p.requires_grad:
            p.data += 0.02
    save_adapter(m, d / "adapter", "model")
    with torch.no_grad():
        torch.save(m.eval()(IDS).logits, d / "want.pt")
    return d


def copy(src, dst, **change):
    import shutil

    shutil.copytree(src, dst)
    t = load_file(dst / "adapter_model.safetensors")
    t.update({k: v for k, v in change.items() if v is not None})
    save_file(
        {k: v for k, v in t.items() if change.get(k, 0) is not None},
        dst / "adapter_model.safetensors",
    )
    return dst


def test_every_expert_has_lora_and_gradient(here):
    m = load_model(here / "model", load_in_4bit=True, trainable=True)
    assert (
        expert_bytes(m)["bytes_per_param"] <= 0.55
        and len(quantised(m)) == 4 + 4 * 3
        and "lm_head" not in quantised(m)
    )
    m = add_lora(m, 4, 8, 0.0).train()
    m(IDS, labels=IDS).loss.backward()
    grads = {n: p.grad.abs().sum().item() for n, p in m.named_parameters() if "lora_B" in n}
    assert (
        sum(".experts." in n for n in grads) == 12
        and min(grads.values()) > 0
        and not without_lora(m)
    )
    assert not any(
        p.requires_grad
        for n, p in m.named_parameters()
        if "lora_" not in n and "modules_to_save" not in n
    )
    assert sum(r["trainable"] for r in parameter_table(m)) == sum(
        p.numel() for p in m.parameters() if p.requires_grad
    )


def test_4_bits_read_one_by_one_are_those_of_the_stock_loader(here, tmp_path):
    import shutil

    from transformers import AutoModelForCausalLM

    nf4 = experts_quantiser()(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = shutil.copytree(here / "model", tmp_path / "model")
    write_json(model / "generation_config.json", dict(eos_token_id=[2, 7], top_p=0.5))
    got = load_model(model, load_in_4bit=True, dtype="bfloat16")
    want = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, quantization_config=nf4
    )
    a, b = got.state_dict(), want.state_dict()
    assert a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )
    assert (
        got.generation_config.to_dict() == want.generation_config.to_dict()
        and got.generation_config.eos_token_id == [2, 7]
    )


def test_adapter_goes_round(here):
    with torch.no_grad():
        got = load_model(here / "model", adapter=here / "adapter", load_in_4bit=True)(IDS).logits
    assert torch.equal(got, torch.load(here / "want.pt", weights_only=True))
    again = load_model(here / "model", adapter=here / "adapter", load_in_4bit=True, trainable=True)
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}


def test_adapter_config_has_one_form(here):
    config = json.loads((here / "adapter/adapter_config.json").read_text())
    assert (
        config["target_modules"] == sorted(config["target_modules"])
        and config["base_model_name_or_path"] == "model"
    )


def test_old_names(here, tmp_path):
    a = copy(here / "adapter", tmp_path / "a")
    t = load_file(a / "adapter_model.safetensors")
    save_file(
        {k.replace(".mlp.", ".block_sparse_moe."): v for k, v in t.items()},
        a / "adapter_model.safetensors",
    )
    with torch.no_grad():
        got = load_model(here / "model", adapter=a, load_in_4bit=True)(IDS).logits
    assert torch.equal(got, torch.load(here / "want.pt", weights_only=True))


def test_more_rows_than_the_base(here, tmp_path):
    keys = [f"base_model.model.{k}.weight" for k in ("model.embed_tokens", "lm_head")]
    old = load_file(here / "adapter/adapter_model.safetensors")
    a = copy(
        here / "adapter",
        tmp_path / "a",
        **{k: torch.cat([old[k], torch.ones(3, 64)]) for k in keys},
    )
    with torch.no_grad():
        got = load_model(here / "model", adapter=a, load_in_4bit=True)(IDS).logits
    assert got.shape[-1] == 103
    torch.testing.assert_close(got[..., :100], torch.load(here / "want.pt", weights_only=True))


def test_refused(here, tmp_path):
    m, key = here / "model", "base_model.model.model.layers.0.mlp.experts.2.w1.lora_A.weight"

    def fails(a, words):
        with pytest.raises(StageError, match=words):
            load_model(m, adapter=a)

    fails(tmp_path, "no adapter_config.json")
    fails(
        copy(here / "adapter", tmp_path / "shape", **{key: torch.zeros(4, 32)}),
        r"does not fit .*is 4, 32, expected 4, 64",
    )
    fails(
        copy(here / "adapter", tmp_path / "lack", **{key: None}),
        r"1 matrices without a partner, such as .*experts\.2\.w1",
    )
    fails(
        copy(
            here / "adapter",
            tmp_path / "more",
            **{key.replace("layers.0", "layers.7"): torch.zeros(4, 64)},
        ),
        "without a partner",
    )
    cut = copy(here / "adapter", tmp_path / "cut")
    f = cut / "adapter_model.safetensors"
    f.write_bytes(f.read_bytes()[:-9])
    fails(cut, "truncated")
    f.rename(cut / "adapter_model.bin")
    fails(cut, "is a pickle")
    (cut / "adapter_model.bin").unlink()
    fails(cut, "adapter_model.safetensors is missing")
    other = copy(here / "adapter", tmp_path / "other")
    write_json(
        other / "manifest.json",
        dict(
            kind="adapter",
            files={},
            fingerprint="a",
            inputs=dict(model=dict(fingerprint="0123456789abcdef")),
        ),
    )
    fails(other, "was trained on model 0123456789abcdef")
    with pytest.raises(StageError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(StageError, match="n_old"):
        add_lora(load_model(m), rows="new", n_old=100)


def test_one_question_for_an_adapter(here, tmp_path):
    "Loading and merging refuse the same folder in the same words"
    cut = copy(here / "adapter", tmp_path / "cut")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nothing", cut):
        with pytest.raises(StageError) as said:
            require_adapter(folder)
        for use in (
            lambda a: load_model(here / "model", adapter=a),
            lambda a: merge(here / "model", a, out=tmp_path / "merged"),
        ):
            with pytest.raises(StageError) as also:
                use(folder)
            assert also.value.args == said.value.args
    weights.write_bytes(b"\x10" + bytes(7) + b'{"a":{"x":1}}   ')
    with pytest.raises(StageError):
        require_adapter(cut)


def test_other_architecture(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).save_pretrained(tmp_path)
    m = load_model(tmp_path, load_in_4bit=True, trainable=True)
    assert expert_bytes(m)["n_params"] == 0 and len(quantised(m)) == 7
    m = add_lora(m, 4, 8, 0.0)
    assert {n.split(".")[-1] for n in m.peft_config["default"].target_modules} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_a_vision_tower_is_left_alone(tmp_path):
    "Gemma 3 brings one; LoRA is for the language"
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    text = dict(sizes, vocab_size=100, num_key_value_heads=2, head_dim=16)
    seen = dict(sizes, image_size=28, patch_size=14)
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=seen)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    m = add_lora(load_model(tmp_path, load_in_4bit=True, trainable=True), 4, 8, 0.0, "none")
    assert not without_lora(m)
    lora = [name for name, _ in m.named_parameters() if "lora_A" in name]
    assert len(lora) == 2 * 7 and all(".language_model.layers." in name for name in lora)
    table = {row["part"]: row for row in parameter_table(m)}
    assert table["vision"]["n_params"] and not table["vision"]["trainable"]
    m.train()(input_ids=IDS, labels=IDS, token_type_ids=torch.zeros_like(IDS)).loss.backward()
    assert all(p.grad is not None for p in m.parameters() if p.requires_grad)


def dequantised(m, path):
    "The same model in float32, its weights those that 4 bits stand for"
    from bitsandbytes.functional import dequantize_4bit

    full, weights = load_model(path, trainable=True), {n: p for n, p in m.named_parameters()}
    for n, p in full.named_parameters():
        if (state := getattr(weights[n], "quant_state", None)) is not None:
            p.data = dequantize_4bit(weights[n].data, state)
    return full


@pytest.mark.parametrize("evaluated", [False, True])
def test_logits_and_gradients_are_those_of_the_dequantised_model(here, evaluated):
    four = load_model(here / "model", load_in_4bit=True, trainable=True)
    nets = [
        add_lora(m, 4, 8, 0.0, "new", n_old=90) for m in (four, dequantised(four, here / "model"))
    ]
    for m in nets:
        for i, (n, p) in enumerate(m.named_parameters()):
            if "lora_B" in n:
                p.data.normal_(std=0.05, generator=torch.Generator().manual_seed(i))
        if evaluated:  # on some CPUs this would repack 4-bit weights, and the gradient be lost
            with torch.no_grad():
                m.eval()(IDS)
        m.train()(IDS, labels=IDS, output_router_logits=True).loss.backward()
    a, b = ({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in nets)
    assert a.keys() == b.keys() and len(a) == 2 * (4 + 12) + 2
    for n in a:
        torch.testing.assert_close(a[n], b[n], rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(
            nets[0].eval()(IDS).logits, nets[1].eval()(IDS).logits, rtol=1e-5, atol=1e-6
        )


def test_a_4bit_checkpoint_reloads_with_the_same_bits(here, tmp_path):
    m = load_model(here / "model", load_in_4bit=True)
    save_4bit(m, tmp_path / "four")
    again = load_model(tmp_path / "four")
    assert quantised(again) == quantised(m) and expert_bytes(again) == expert_bytes(m)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, m(IDS).logits)
    again = load_model(tmp_path / "four", adapter=here / "adapter")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, torch.load(here / "want.pt", weights_only=True))


def test_a_4bit_checkpoint_loads_in_a_new_process(here, tmp_path):
    "There nobody has yet told transformers of the model type that the folder names"
    m = load_model(here / "model", load_in_4bit=True)
    save_4bit(m, tmp_path / "four")
    code = """
import sys
from cmixtral_nb.loading import load_model
from cmixtral_nb.qlora import expert_bytes
print(expert_bytes(load_model(sys.argv[1], device="cpu"))["bytes"])
"""
    run = [sys.executable, "-c", code, tmp_path / "four"]
    out = subprocess.run(run, capture_output=True, text=True, check=True)
    assert int(out.stdout) == expert_bytes(m)["bytes"]


BY_BITSANDBYTES = dict(load_in_4bit=True, _load_in_4bit=True, quant_method="bitsandbytes")


@pytest.mark.parametrize(
    "changes",
    [
        dict(model_type="mixtral_linear", architectures=["MixtralLinearForCausalLM"]),
        dict(architectures=["MixtralForCausalLM"]),
    ],
    ids=["by an earlier version of this package", "by transformers 4"],
)
def test_4bit_checkpoints_of_others_are_read(here, tmp_path, changes):
    "Their experts are single, too; only the configuration says it in other words"
    m = load_model(here / "model", load_in_4bit=True)
    save_4bit(m, tmp_path / "four")
    config = json.loads((tmp_path / "four/config.json").read_text())
    assert config["model_type"] == "mixtral"
    assert config["quantization_config"]["quant_method"] == METHOD
    config["quantization_config"] |= BY_BITSANDBYTES
    write_json(tmp_path / "four/config.json", config | changes)
    again = load_model(tmp_path / "four")
    assert quantised(again) == quantised(m) and expert_bytes(again) == expert_bytes(m)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, m(IDS).logits)


@pytest.mark.parametrize("naming", [".block_sparse_moe.", ".mlp."])
def test_both_names_of_the_experts_in_many_shards(here, tmp_path, naming):
    t = {
        k.replace(".block_sparse_moe.", naming): v
        for k, v in load_file(here / "model/model.safetensors").items()
    }
    assert any(f"{naming}experts.0.w1" in k for k in t)
    names = sorted(t)
    parts = [names[i::3] for i in range(3)]
    write_json(tmp_path / "config.json", json.loads((here / "model/config.json").read_text()))
    for i, part in enumerate(parts, 1):
        save_file(
            {k: t[k] for k in part},
            tmp_path / f"model-{i:05d}-of-00003.safetensors",
            metadata=dict(format="pt"),
        )
    write_json(
        tmp_path / "model.safetensors.index.json",
        dict(
            metadata={},
            weight_map={
                k: f"model-{i:05d}-of-00003.safetensors"
                for i, part in enumerate(parts, 1)
                for k in part
            },
        ),
    )
    for bits in (False, True):
        with torch.no_grad():
            assert torch.equal(
                load_model(tmp_path, load_in_4bit=bits)(IDS).logits,
                load_model(here / "model", load_in_4bit=bits)(IDS).logits,
            )


@pytest.mark.parametrize("rows", ["all", "new"])
def test_rows_alone(here, tmp_path, rows):
    m = add_lora(
        load_model(here / "model", load_in_4bit=True, trainable=True), rank=0, rows=rows, n_old=90
    )
    names = {n for n, p in m.named_parameters() if p.requires_grad}
    assert len(names) == 2 and not any("lora_" in n for n in names)
    m.train()(IDS + 65, labels=IDS + 65).loss.backward()
    for p in m.parameters():
        if p.requires_grad:
            assert p.grad.abs().sum() > 0
            p.data += 0.1
    save_adapter(m, tmp_path / "rows")
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(here / "model", adapter=tmp_path / "rows", load_in_4bit=True)(IDS).logits,
            m.eval()(IDS).logits,
        )
    merged = load_model(
        merge(
            here / "model",
            tmp_path / "rows",
            out=tmp_path / "merged",
            into="dequantised",
            device="cpu",
        )
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, m(IDS).logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(StageError, match="nothing would be trained"):
        add_lora(load_model(here / "model"), rank=0, rows="none")


_OTHER_NAMES = {
    "gpt_neox": dict(intermediate_size=64),  # embed_in, and on disk embed_out
    "mpt": dict(max_seq_len=64),  # wte, tied
    "bloom": {},  # word_embeddings, tied
}


@pytest.mark.parametrize("rows", ["all", "new"])
@pytest.mark.parametrize("family", _OTHER_NAMES)
def test_an_embedding_of_another_name_is_trained_and_merged(tmp_path, family, rows):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model(family, **sizes, **_OTHER_NAMES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    frozen = load_model(tmp_path / "model", trainable=True)
    if rows == "all":
        frozen.resize_token_embeddings(104, mean_resizing=False)  # as for marks of a chat
    m = add_lora(frozen, 4, rows=rows, n_old=90)
    tables = {m.get_input_embeddings(), m.get_output_embeddings()}
    copies = {p for table in tables for p in table.parameters() if p.requires_grad}
    assert len(copies) == (1 if config.tie_word_embeddings else 2)
    for p in copies:
        p.data += torch.randn_like(p)
    save_adapter(m, tmp_path / "adapter")
    made = merge(tmp_path / "model", tmp_path / "adapter", out=tmp_path / "merged", device="cpu")
    ids = torch.arange(70, 100)[None]
    read = load_model(tmp_path / "model", adapter=tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, m.eval()(ids).logits)
        torch.testing.assert_close(load_model(made)(ids).logits, m(ids).logits)


def test_a_model_without_linear_layers_gets_no_lora():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", vocab_size=100, n_embd=32, n_layer=1, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(StageError, match="gpt2 has no linear layer for LoRA; give rank 0"):
        add_lora(model)
    assert add_lora(model, rank=0)


def trained(m):
    "Loss and gradients of a step under autocast"
    with torch.autocast("cpu", torch.bfloat16):
        loss = m.train()(IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in m.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bits", [16, 4])
def test_under_autocast_lora_casts_nothing_is_added_at_once_and_computes_the_same(here, bits):
    def net():
        return load_model(
            here / "model",
            adapter=here / "adapter",
            load_in_4bit=bits == 4,
            dtype="bfloat16",
            trainable=True,
        )

    m, plain = net(), net()
    plain.get_base_model()._forward_pre_hooks.clear()  # as peft does it
    (loss, grads), (want, expected) = trained(m), trained(plain)
    lora, theirs = (x.base_model.model.model.layers[0].self_attn.q_proj for x in (m, plain))
    assert not lora.cast_input_dtype_enabled and lora.lora_variant and not theirs.lora_variant
    assert loss == pytest.approx(want, rel=1e-3) and len(grads) > 30

    def far(a, b):
        difference = torch.cat([(a[n] - b[n]).flatten() for n in b]).norm()
        return (difference / torch.cat([g.flatten() for g in b.values()]).norm()).item()

    if bits == 16:  # no further from the truth, which is float32
        exact = net().float().train()
        exact(IDS, labels=IDS).loss.backward()
        truth = {n: p.grad for n, p in exact.named_parameters() if p.requires_grad}
        assert far(grads, truth) < 1.1 * far(expected, truth) < 0.01
    assert far(grads, expected) < 0.01
    if bits == 4:  # without autocast, in 16 bits, norms in float32 and matrices do not go together
        with torch.no_grad():
            a, b = m.eval()(IDS).logits, plain.eval()(IDS).logits
        assert lora.cast_input_dtype_enabled and not lora.lora_variant and torch.equal(a, b)
    seen = weakref.ref(lora)
    del lora
    m = m.unload()
    gc.collect()
    assert seen() is None  # nothing holds what was taken off


@pytest.mark.parametrize("safe", [False, True])
def test_peft_merges_what_was_trained_under_autocast(here, safe):
    m, plain = (
        load_model(here / "model", adapter=here / "adapter", dtype="float32", trainable=True)
        for _ in range(2)
    )
    trained(m)
    lora, theirs = (x.base_model.model.model.layers[0].mlp.experts[1].w2 for x in (m, plain))
    assert lora.lora_variant and not theirs.lora_variant
    before = lora.base_layer.weight.clone()
    for x in lora, theirs:
        x.merge(safe_merge=safe)
    assert torch.equal(lora.base_layer.weight, theirs.base_layer.weight) and not torch.equal(
        lora.base_layer.weight, before
    )
    for x in lora, theirs:
        x.unmerge()
    assert torch.equal(lora.base_layer.weight, theirs.base_layer.weight)


@pytest.mark.parametrize("four", [False, True])
def test_auto_gives_layers_to_devices_and_moves_what_goes_between(tmp_path, monkeypatch, four):
    "Two GPUs, as far as a CPU can: the second half of the model is on another device, the disk"
    from transformers import MixtralForCausalLM

    from cmixtral_nb import placement

    torch.manual_seed(0)
    config = small_config(hidden=64, layers=4, intermediate=64, heads=2, vocab_size=100)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    plain = load_model(tmp_path, load_in_4bit=four, device="cpu", dtype="float32")
    found: dict[str, int] = {}

    def spread(config, have, load_in_4bit, dtype):
        places = placement_spread(config, have, load_in_4bit, dtype)
        found.update(places)
        other = "cpu" if four else "disk"  # bitsandbytes keeps no 4 bits on a disk
        return {name: ("cpu", other)[number] for name, number in places.items()}

    placement_spread = placement.spread
    monkeypatch.setattr(placement, "spread", spread)
    monkeypatch.setattr(placement, "gpu_bytes", lambda: [1_000_000] * 2)
    net = load_model(tmp_path, load_in_4bit=four, device="auto", dtype="float32")
    assert set(found.values()) == {0, 1}
    assert [found[f"model.layers.{i}"] for i in range(4)] in ([0, 0, 1, 1], [0, 0, 0, 1])
    if not four:
        assert net.hf_device_map.keys() == found.keys()
        assert {p.device.type for p in net.parameters()} == {"cpu", "meta"}
    with torch.no_grad():
        assert torch.equal(net(IDS).logits, plain(IDS).logits)


def test_two_processes_share_4_bits_by_fsdp2(here):
    script = Path(__file__).parent / "fsdp_qlora.py"
    how = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = [sys.executable, "-m", *how, script, here / "model"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    out = subprocess.run(run, capture_output=True, text=True, env=env)
    assert out.stdout.splitlines()[-1:] == ["equal, 32 gradients"], out.stderr[-3000:]
