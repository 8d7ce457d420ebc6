"""a12e_small_floats: checkpoints in FP8 and MXFP4, against transformers' own dequantising loader"""

import itertools
import json
import shutil

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_experts import IDS, SIZES, bytes_read, logits, random_model
from test_merge import write_manifest
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cmixtral_nb.adapters import SAME_WEIGHTS, save_adapter
from cmixtral_nb.experts import open_experts, single_experts, split_experts
from cmixtral_nb.loading import load_model, model_config, save_stock
from cmixtral_nb.merge import merge
from cmixtral_nb.placement import without_memory
from cmixtral_nb.qlora import add_lora, expert_bytes, quantised
from cmixtral_nb.small_floats import decode_fp8, decode_mxfp4
from cmixtral_nb.stages import StageError, input_fingerprint, write_json

FP8 = dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[32, 32])
MXFP4 = dict(quant_method="mxfp4", modules_to_not_convert=["lm_head", "model.embed_tokens"])
FP8_FAMILIES = ["deepseek_v3", "qwen3_moe", "qwen3"]


def plain_model(family):
    "Before it is written in fewer bits"
    if family != "qwen3":
        return random_model(family)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, intermediate_size=128))
    for p in model.parameters():
        p.data *= 5
    return model.eval()


def to_fp8(W, block):
    "Bytes and scales of a matrix, as DeepSeek's own converter makes them"
    n_rows, n_columns = block
    rows, columns = -(-W.shape[0] // n_rows), -(-W.shape[1] // n_columns)
    wide = torch.zeros(rows * n_rows, columns * n_columns)
    wide[: W.shape[0], : W.shape[1]] = W
    blocks = wide.view(rows, n_rows, columns, n_columns)
    scales = blocks.abs().amax((1, 3)).clamp_min(1e-12) / 448
    small = (blocks / scales[:, None, :, None]).view_as(wide).to(torch.float8_e4m3fn)
    return small[: W.shape[0], : W.shape[1]].contiguous(), scales


def to_mxfp4(stacked):
    "Blocks and scales of (E, in, out), as gpt-oss has them: along the rows of (E, out, in)"
    groups = stacked.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).log2().ceil()
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = groups / 2 ** exponents[..., None]
    nibbles = (scaled.abs()[..., None] - levels).abs().argmin(-1) + 8 * (scaled < 0)
    blocks = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).to(torch.uint8)
    return blocks.contiguous(), (exponents + 127).to(torch.uint8).contiguous()


def stored(folder, settings, tensors):
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | dict(quantization_config=settings))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def in_fp8(tmp_path_factory):
    place = tmp_path_factory.mktemp("fp8")
    folders = {}
    for family in FP8_FAMILIES:
        folder = place / family
        plain_model(family).save_pretrained(folder)
        tensors = {}
        for name, W in load_file(folder / "model.safetensors").items():
            if "_proj" in name and W.ndim == 2:
                tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(W, (32, 32))
            else:
                tensors[name] = W
        folders[family] = stored(folder, FP8, tensors)
    return folders


@pytest.fixture(scope="module")
def in_mxfp4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mxfp4") / "gpt_oss"
    plain_model("gpt_oss").save_pretrained(folder)
    tensors = {}
    for name, W in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = to_mxfp4(W)
        else:
            tensors[name] = W
    return stored(folder, MXFP4, tensors)


def by_transformers(folder, dtype):
    "Everything at once in 16 bits, as transformers does where there is no GPU for it"
    return split_experts(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


def in_plain(folder, out):
    "The same model with its weights multiplied by their scales, one by one, in float32"
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if f"{name}_scale_inv" in tensors]:
        W, scales = tensors[name].float(), tensors.pop(f"{name}_scale_inv")
        for row, column in itertools.product(*map(range, scales.shape)):
            W[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] *= scales[row, column]
        tensors[name] = W
    return stored(out, None, tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*FP8_FAMILIES, "gpt_oss"])
def test_weights_are_those_that_transformers_reads(family, dtype, in_fp8, in_mxfp4, tmp_path):
    folder = in_mxfp4 if family == "gpt_oss" else in_fp8[family]
    found = load_model(folder, dtype=dtype, device="cpu")
    assert not hasattr(found.config, "quantization_config") and not found.is_quantized
    if family == "deepseek_v3":  # 80 rows in blocks of 32: transformers 5.24 cannot
        folder = in_plain(folder, tmp_path / "plain")
    want = by_transformers(folder, getattr(torch, dtype))
    ours, theirs = found.state_dict(), want.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if dtype == "float32":
        assert torch.equal(logits(found), logits(want))
        original = plain_model(family)
        assert 0.01 < (logits(found) - logits(original)).norm() / logits(original).norm() < 0.9


@pytest.mark.parametrize("family", [*FP8_FAMILIES, "gpt_oss"])
def test_each_matrix_is_nf4_of_what_its_bytes_stand_for(family, in_fp8, in_mxfp4):
    folder = in_mxfp4 if family == "gpt_oss" else in_fp8[family]
    whole = load_model(folder, dtype="bfloat16", device="cpu")
    four = load_model(folder, dtype="bfloat16", device="cpu", load_in_4bit=True)
    names = quantised(four)
    assert len(names) > 12
    for name in names:
        packed, state = bnb.functional.quantize_4bit(
            whole.get_submodule(name).weight.data,
            blocksize=64,
            compress_statistics=True,
            quant_type="nf4",
        )
        module = four.get_submodule(name)
        assert torch.equal(module.weight.data, packed), name
        assert torch.equal(module.weight.quant_state.absmax, state.absmax), name
    if single_experts(four):
        assert expert_bytes(four)["bytes_per_param"] <= 0.517


def test_experts_are_trained_from_fp8(in_fp8):
    net = load_model(in_fp8["deepseek_v3"], load_in_4bit=True, dtype="float32", trainable=True)
    net = add_lora(net, rank=2, rows="none")
    net.train()(input_ids=IDS, labels=IDS).loss.backward()
    found = {n: p.grad for n, p in net.named_parameters() if ".lora_B." in n}
    assert sum(".experts." in name for name in found) >= 12
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found.values())


def test_only_the_bytes_of_an_expert_are_read(in_mxfp4):
    net = without_memory(model_config(in_mxfp4), torch.bfloat16)
    with open_experts(in_mxfp4, net) as checkpoint:
        for name, part in checkpoint.items():
            if part.source.code:
                before = bytes_read()
                n_weights = part[...].numel()  # 17 bytes for 32, gate and up together
                both = 2 if "down_proj" not in name else 1
                assert bytes_read() - before <= both * n_weights * 17 / 32 + 250, name


SCALES = "model.layers.1.mlp.down_proj.weight_scale_inv"


@pytest.mark.parametrize(
    "scales, message",
    [
        (torch.ones(1, 4), r"down_proj.weight_scale_inv is \(1, 4\), expected \(2, 4\): a scale"),
        (None, "down_proj.weight is stored in F8_E4M3 and has no scales"),
    ],
)
def test_scales_that_do_not_fit(scales, message, in_fp8, tmp_path):
    folder = shutil.copytree(in_fp8["qwen3"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[SCALES]
    tensors |= {} if scales is None else {SCALES: scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for four in (False, True):
        with pytest.raises(StageError, match=message) as refused:
            load_model(folder, load_in_4bit=four, device="cpu")
        assert str(refused.value).startswith(str(folder))
        assert len(str(refused.value).splitlines()) == 1


def test_other_forms_are_refused(in_fp8, tmp_path):
    folder = shutil.copytree(in_fp8["qwen3"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    write_json(folder / "config.json", config)
    with pytest.raises(StageError, match="quantised by 'gptq', expected"):
        load_model(folder, device="cpu")
    config["quantization_config"] |= dict(quant_method="fp8", weight_block_size=[0])
    write_json(folder / "config.json", config)
    with pytest.raises(StageError, match="weight_block_size is .0., expected two numbers"):
        load_model(folder, device="cpu")


def test_small_numbers_by_an_independent_table():
    "Every byte of both forms"
    every = torch.arange(256, dtype=torch.uint8)
    scales = torch.full((16,), 126, dtype=torch.uint8)
    found = decode_mxfp4(every.view(16, 16), scales, torch.float32).view(-1, 2)
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table += [-x for x in table]
    for byte in range(256):
        assert found[byte].tolist() == [table[byte & 15] / 2, table[byte >> 4] / 2]
    eights = every.view(torch.float8_e4m3fn).view(16, 16)
    found = decode_fp8(eights, torch.tensor([[0.5]]), (16, 16), torch.float32).flatten()
    for byte in range(256):
        sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
        if exponent == 15 and mantissa == 7:
            assert found[byte].isnan()
            continue
        size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        assert found[byte] == (-1) ** sign * size / 2


def test_an_adapter_goes_into_a_copy_in_16_bits(in_mxfp4, tmp_path):
    "It was trained on the model in MXFP4, which cannot be merged into"
    net = load_model(in_mxfp4, trainable=True, dtype="bfloat16", device="cpu")
    save_adapter(add_lora(net, rank=2, alpha=2, rows="none"), tmp_path / "a")
    trained_on = dict(model=dict(fingerprint=input_fingerprint(in_mxfp4)))
    write_manifest(tmp_path / "a", trained_on, stats={})
    how = dict(out=tmp_path / "m", check=False, device="cpu")
    with pytest.raises(StageError, match="is stored in mxfp4; .* NEW, MODEL. of cmixtral_nb"):
        merge(in_mxfp4, tmp_path / "a", **how)
    plain = load_model(in_mxfp4, dtype="bfloat16", device="cpu")
    save_stock(plain, tmp_path / "other")
    with pytest.raises(StageError, match="was trained on model"):
        merge(tmp_path / "other", tmp_path / "a", **how)
    save_stock(plain, tmp_path / "copy", in_mxfp4)
    assert merge(tmp_path / "copy", tmp_path / "a", **how).stats["n_lora"] > 0
    assert not (tmp_path / "m" / SAME_WEIGHTS).exists()  # its weights are others
