"Any JSON at all in place of what a model's folder holds; every call that could run its code"

import ast
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmixtral_nb.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, lora_faults, require_adapter
from cmixtral_nb.checkpoints import INDEX, read_header, tensor_files
from cmixtral_nb.stages import StageError

KEYS = ["w", "dtype", "shape", "data_offsets", "__metadata__", "weight_map", "metadata", "r"]
KEYS += ["lora_alpha", "rank_pattern", "target_modules", "peft_type", "trainable_token_indices"]
NAMES = st.sampled_from(KEYS) | st.text(max_size=8)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
LEAVES |= st.sampled_from(["F32", "LORA", "(a+)+", "a.safetensors", 0, 4, 8])
JSON = st.recursive(
    LEAVES, lambda part: st.lists(part, max_size=4) | st.dictionaries(NAMES, part, max_size=4)
)
TENSOR = st.fixed_dictionaries(dict(dtype=LEAVES, shape=JSON, data_offsets=JSON))


def packed(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def one_line(function, *args):
    "It answers, or refuses with lines that can be shown"
    try:
        return function(*args)
    except StageError as e:
        for line in e.args:
            assert len(line) < 1000 and len(line.splitlines()) == 1, line
            line.encode()
        return None


@settings(max_examples=200, deadline=None)
@given(header=JSON | st.dictionaries(NAMES, TENSOR, max_size=3))
def test_any_header(tmp_path_factory, header):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(packed(header))
    for tensor in (one_line(read_header, path) or {}).values():
        assert tensor["data_offsets"][0] <= tensor["data_offsets"][1]


@settings(max_examples=150, deadline=None)
@given(index=JSON | st.fixed_dictionaries(dict(weight_map=st.dictionaries(NAMES, LEAVES))))
def test_any_index(tmp_path_factory, index):
    folder = tmp_path_factory.getbasetemp() / "any_index"
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps(index))
    assert one_line(tensor_files, folder) is None  # there is no shard


@settings(max_examples=200, deadline=None)
@given(config=JSON | st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5))
def test_any_adapter_config(tmp_path_factory, config):
    folder = tmp_path_factory.getbasetemp() / "any_adapter"
    folder.mkdir(exist_ok=True)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    (folder / ADAPTER_WEIGHTS).write_bytes(packed({}))
    if one_line(require_adapter, folder):
        for line in lora_faults(folder):
            assert len(line) < 1000 and len(line.splitlines()) == 1


MODULES = sorted(Path(read_header.__code__.co_filename).parent.glob("*.py"))
LOADERS = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_no_call_may_run_code_of_a_folder(module):
    "Each from_pretrained and from_config of transformers' Auto classes says so itself"
    for call in ast.walk(ast.parse(module.read_text())):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        if call.func.attr not in ("from_pretrained", "from_config"):
            continue
        if not ast.unparse(call.func).startswith(LOADERS):
            continue
        said = {key.arg: ast.unparse(key.value) for key in call.keywords}
        assert said.get("trust_remote_code") == "False", ast.unparse(call)
