"Weights, indexes and adapters that anybody may have written, given to all that reads them."

import json
import os
import struct

from hostile import Case, changed_json, cut, linked, sparse, write

GENERATE = "generate --models a=bad --prompts x --max-new-tokens 2 --out o"
MERGE = "merge --model RUN/model --adapter bad --out o"
CHAT = "chat --model RUN/chat --adapter bad"


# ---- headers of safetensors


def packed(header, data=b"", length=None):
    "The bytes of a safetensors file with any header"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


W = dict(dtype="F32", shape=[2], data_offsets=[0, 8])
HEADERS = {  # name -> (bytes of the file, what is said)
    "a list": (packed([]), "the whole is a list, expected an object"),
    "a number": (packed(b"5"), "header is not JSON"),
    "text": (packed(b'"w"'), "header is not JSON"),
    "null": (packed(b"null"), "header is not JSON"),
    "NaN": (packed(b"NaN"), "header is not JSON"),
    "brackets without end": (packed(b"[" * 10**6), "header is not JSON"),
    "objects without end": (packed(b'{"a":' * 10**5), "header is not JSON"),
    "bytes that are no UTF-8": (packed(b'{"\xff": 5}'), "header is not JSON"),
    "UTF-16": (packed('{"w": 5}'.encode("utf-16")), "header is not JSON"),
    "a space before it": (packed(b" {}"), "header is not JSON"),
    "a number of 5,000 digits": (packed(b'{"w":' + b"9" * 5000 + b"}"), "header is not JSON"),
    "a pickle": (packed(b"\x80\x04N."), "header is not JSON"),
    "nothing": (b"", "is truncated"),
    "seven bytes": (b"\0" * 7, "is truncated"),
    "only its length": (packed(b"", length=100), "is truncated"),
    "a length of 2**64 - 1": (packed(b"{}", length=2**64 - 1), "is truncated"),
    "no tensors": (packed({}), "bytes, expected"),
    "metadata that is a list": (packed({"__metadata__": [1]}), "__metadata__ is a list"),
    "metadata that is deep": (packed({"__metadata__": {"a": {}}}), "__metadata__.a is an object"),
    "a tensor that is a number": (packed({"w": 5}), "w is 5, expected an object"),
    "a tensor that is null": (packed({"w": None}), "w is null"),
    "a tensor that is a list": (packed({"w": [W]}), "w is a list"),
    "a tensor of nothing": (packed({"w": {}}), "w has no 'dtype'"),
    "no data_offsets": (packed({"w": dict(dtype="F32", shape=[2])}), "no 'data_offsets'"),
    "no shape": (packed({"w": dict(dtype="F32", data_offsets=[0, 8])}), "w has no 'shape'"),
    "a dtype of nowhere": (packed({"w": dict(W, dtype="F4")}, bytes(8)), "w.dtype is 'F4'"),
    "a dtype that is a number": (packed({"w": dict(W, dtype=32)}, bytes(8)), "w.dtype is 32"),
    "a dtype that is a list": (packed({"w": dict(W, dtype=["F32"])}), "w.dtype is a list"),
    "float8 that is too long": (packed({"w": dict(W, dtype="F8_E4M3")}), "expected [0, 2]"),
    "a negative shape": (packed({"w": dict(W, shape=[-2])}, bytes(8)), "w.shape is a list"),
    "a shape of text": (packed({"w": dict(W, shape="2")}, bytes(8)), "w.shape is '2'"),
    "a shape of fractions": (packed({"w": dict(W, shape=[2.0])}, bytes(8)), "w.shape is a list"),
    "a shape of truth values": (packed({"w": dict(W, shape=[True])}), "w.shape is a list"),
    "a shape of 10**30": (packed({"w": dict(W, shape=[10**30])}), "w.shape is a list"),
    "a million dimensions": (packed({"w": dict(W, shape=[2**39] * 10**6)}), "w.shape is a list"),
    "sixteen large dimensions": (packed({"w": dict(W, shape=[2**40] * 16)}), "has its data at"),
    "a shape of more bytes": (packed({"w": dict(W, shape=[3])}, bytes(8)), "expected [0, 12]"),
    "a shape of fewer bytes": (packed({"w": dict(W, shape=[1])}, bytes(8)), "expected [0, 4]"),
    "offsets of text": (packed({"w": dict(W, data_offsets="08")}), "data_offsets is '08'"),
    "offsets that are negative": (
        packed({"w": dict(W, data_offsets=[-8, 0])}, bytes(8)),
        "data_offsets[0] is -8",
    ),
    "offsets that go back": (
        packed({"w": dict(W, data_offsets=[8, 0])}, bytes(8)),
        "w has its data at [8, 0], expected [0, 8]",
    ),
    "one offset": (packed({"w": dict(W, data_offsets=[8])}, bytes(8)), "has its data at [8]"),
    "three offsets": (packed({"w": dict(W, data_offsets=[0, 4, 8])}, bytes(8)), "data at"),
    "offsets beyond all bounds": (
        packed({"w": dict(W, data_offsets=[0, 10**30])}),
        "data_offsets[1] is a number beyond all bounds",
    ),
    "offsets beyond the file": (packed({"w": W}, bytes(7)), "is truncated"),
    "bytes after the last": (packed({"w": W}, bytes(9)), "its header promises"),
    "tensors that overlap": (
        packed({"w": W, "v": dict(W, data_offsets=[4, 12])}, bytes(12)),
        "v has its data at [4, 12], expected [8, 16]",
    ),
    "tensors in one place": (packed({"w": W, "v": W}, bytes(8)), "expected [8, 16]"),
    "a hole between tensors": (
        packed({"w": W, "v": dict(W, data_offsets=[16, 24])}, bytes(24)),
        "v has its data at [16, 24], expected [8, 16]",
    ),
    "a name of a million letters": (packed({"x" * 10**6: dict(W, shape=[3])}), "…"),
    "a name with line breaks": (packed({"a\nb\x1b[2J": 5}), "a\\nb\\x1b[2J is 5"),
    "a name that is half a character": (packed(b'{"\\ud800": 5}'), "? is 5"),
    "tensors of other names": (packed({"w": W}, bytes(8)), "the weights"),
}


def weights(content):
    "A base with other weights"

    def make(here, run):
        write(linked(run / "base", here / "bad") / "model.safetensors", content)

    return make


def huge(length, size, head=b""):
    "A file that takes no space, and whose header claims much"

    def make(here, run):
        path = linked(run / "base", here / "bad") / "model.safetensors"
        sparse(path, size, struct.pack("<Q", length) + head)

    return make


WEIGHTS = [
    *(
        Case(f"weights whose header is {name}"[:80], GENERATE, weights(content), says)
        for name, (content, says) in HEADERS.items()
    ),
    Case(
        "weights whose header claims 40 GB",
        GENERATE,
        huge(40 * 10**9, 50 * 10**9),
        "a header of 40,000,000,000 bytes, expected at most 100,000,000",
    ),
    Case("weights with 90 MB of zeros for a header", GENERATE, huge(9 * 10**7, 10**8), "not JSON"),
    Case(
        "weights that end within their header",
        GENERATE,
        lambda here, run: cut(linked(run / "base", here / "bad") / "model.safetensors", 100),
        "is truncated",
    ),
]


# ---- indexes and files


def base_without_weights(here, run):
    folder = linked(run / "base", here / "bad")
    (folder / "model.safetensors").unlink()
    return folder


def index(value):
    "A base in shards, one of which is there, with any index"

    def make(here, run):
        write(here / "outside.safetensors", packed({"w": W}, bytes(8)))
        folder = base_without_weights(here, run)
        os.link(run / "base/model.safetensors", folder / "a.safetensors")
        content = value if isinstance(value, str | bytes) else json.dumps(value)
        write(folder / "model.safetensors.index.json", content)

    return make


def mapped(shard):
    return {"weight_map": {"w": shard}}


NO_NAME = "expected the name of a .safetensors file of this folder"
INDEXES = {
    "a list": ([], "the whole is a list"),
    "a number": (5, "the whole is 5"),
    "null": (None, "the whole is null"),
    "no JSON": ("{", "not valid JSON"),
    "nothing": ("", "not valid JSON"),
    "brackets without end": ("[" * 10**6, "not valid JSON"),
    "bytes that are no UTF-8": (b'{"\xff": 1}', "not UTF-8"),
    "an empty object": ({}, "has no 'weight_map'"),
    "a weight_map that is null": ({"weight_map": None}, "weight_map is null"),
    "a weight_map that is a list": ({"weight_map": ["a"]}, "weight_map is a list"),
    "a weight_map that is text": ({"weight_map": "a.safetensors"}, "expected an object"),
    "a weight_map of nothing": ({"weight_map": {}}, "weight_map is empty"),
    "metadata that is a list": (mapped("a.safetensors") | {"metadata": [1]}, "metadata is a list"),
    "a shard that is a number": (mapped(5), "weight_map.w is 5"),
    "a shard that is null": (mapped(None), "weight_map.w is null"),
    "a shard that is a list": (mapped(["a.safetensors"]), "weight_map.w is a list"),
    "a shard of no name": (mapped(""), NO_NAME),
    "a shard above": (mapped("../outside.safetensors"), NO_NAME),
    "a shard in a folder": (mapped("x/../../outside.safetensors"), NO_NAME),
    "a shard by its absolute path": (mapped("/etc/passwd"), NO_NAME),
    "a shard beyond the root": (mapped("/tmp/a.safetensors"), NO_NAME),
    "a shard as Windows names it": (mapped("..\\outside.safetensors"), NO_NAME),
    "the folder itself": (mapped("."), NO_NAME),
    "a pickle": (mapped("pytorch_model.bin"), NO_NAME),
    "a name with NUL": (mapped("a\0.safetensors"), NO_NAME),
    "a name of 300 letters": (mapped("x" * 300 + ".safetensors"), NO_NAME),
    "a name that is half a character": (mapped("\ud800.safetensors"), "is missing"),
    "a shard that is missing": (mapped("gone.safetensors"), "gone.safetensors is missing"),
    "a tensor that is not in the shard": (mapped("a.safetensors"), "lacks w"),
    "a tensor of a million letters": (
        {"weight_map": {"x" * 10**6: "a.safetensors"}},
        "…, which",
    ),
}


def links(**targets):
    "A base whose files are links, or folders where the target is empty"

    def make(here, run):
        folder = base_without_weights(here, run)
        for name, target in targets.items():
            path = folder / f"{name}.safetensors"
            path.symlink_to(target) if target else path.mkdir()

    return make


def pickled(*names):
    def make(here, run):
        folder = base_without_weights(here, run)
        for name in names:
            write(folder / name, b"\x80\x04N.")

    return make


FILES = [
    *(
        Case(f"an index: {name}", GENERATE, index(value), says)
        for name, (value, says) in INDEXES.items()
    ),
    Case("weights: a link to itself", GENERATE, links(model="model.safetensors"), "no file"),
    Case(
        "weights: two links in a circle",
        GENERATE,
        links(model="x.safetensors", x="model.safetensors"),
        "is a link that leads to no file",
    ),
    Case("weights: a link to nowhere", GENERATE, links(model="../gone"), "leads to no file"),
    Case("weights: a link to a device", GENERATE, links(model="/dev/zero"), "leads to no file"),
    Case("weights: a link to its folder", GENERATE, links(model="."), "leads to no file"),
    Case("weights: a link to text", GENERATE, links(model="/etc/hostname"), "model.safetensors"),
    Case("weights: a folder", GENERATE, links(model=""), "is a folder or device"),
    *(
        Case(
            f"weights: only {' and '.join(names)}",
            GENERATE,
            pickled(*names),
            f"holds only pickled weights ({names[0]}), which can run any code",
        )
        for names in (
            ("pytorch_model.bin",),
            ("model.pt",),
            ("model.ckpt", "model.pth"),
            ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
        )
    ),
    Case("weights: none", GENERATE, pickled(), "has no *.safetensors"),
]


# ---- adapters


def adapter(**values):
    "The run's adapter with other values in its configuration"

    def make(here, run):
        changed_json(linked(run / "adapter", here / "bad") / "adapter_config.json", **values)

    return make


def adapter_file(name, content):
    def make(here, run):
        write(linked(run / "adapter", here / "bad") / name, content)

    return make


CONFIGS: dict[str, dict] = {
    "r is 'x'": dict(r="x"),
    "r is 0": dict(r=0),
    "r is -4": dict(r=-4),
    "r is 4.5": dict(r=4.5),
    "r is True": dict(r=True),
    "r is a list": dict(r=[4]),
    "r is 1000000000": dict(r=10**9),
    "r is a number beyond all bounds": dict(r=10**400),
    "r is 5": dict(r=5),
    "r is 65,536": dict(r=2**16),
    "lora_alpha is nan": dict(lora_alpha=float("nan")),
    "lora_alpha is inf": dict(lora_alpha=float("inf")),
    "lora_alpha is 'x'": dict(lora_alpha="x"),
    "lora_alpha is a list": dict(lora_alpha=[8]),
    "lora_alpha is 1000000000": dict(lora_alpha=10**9),
    "rank_pattern is a list": dict(rank_pattern=[4]),
    "rank_pattern.q_proj is 'x'": dict(rank_pattern={"q_proj": "x"}),
    "rank_pattern.q_proj is 1000000000": dict(rank_pattern={"q_proj": 10**9}),
    "has rank 4": dict(rank_pattern={"q_proj": 7}),
    "rank_pattern repeats a group": dict(rank_pattern={"(a+)+$": 4}),
    "rank_pattern has 3 repeats": dict(rank_pattern={".*.*.*x": 4}),
    "rank_pattern is no regular expression": dict(rank_pattern={"(": 4}),
    "alpha_pattern.q_proj is nan": dict(alpha_pattern={"q_proj": float("nan")}),
    "alpha_pattern repeats a group": dict(alpha_pattern={"(a|a)*b": 4}),
    "alpha_pattern is 5": dict(alpha_pattern=5),
    "target_modules repeats a group": dict(target_modules="(.*.*)*x"),
    "target_modules has 30 repeats": dict(target_modules=".*" * 30 + "x"),
    "target_modules has 60,000 characters": dict(target_modules="q_proj" * 10**4),
    "target_modules is no regular": dict(target_modules="["),
    "target_modules is 5": dict(target_modules=5),
    "target_modules is a list": dict(target_modules=["q_proj", 5]),
    "target_modules is a list,": dict(target_modules=[""]),
    "target_modules is an object": dict(target_modules={"q_proj": 1}),
    "exclude_modules repeats a group": dict(exclude_modules="(a+)+$"),
    "exclude_modules is 5": dict(exclude_modules=5),
    "layers_pattern is '(a+)+$'": dict(layers_pattern="(a+)+$", layers_to_transform=[0]),
    "layers_pattern is a list": dict(layers_pattern=["(a|a)*"], layers_to_transform=[0]),
    "layers_to_transform is 'x'": dict(layers_to_transform="x"),
    "target_parameters is 'x'": dict(target_parameters="x"),
    "target_parameters is a list": dict(target_parameters=["(a+)+"]),
    "modules_to_save is 5": dict(modules_to_save=5),
    "modules_to_save is a list": dict(modules_to_save=["lm_head", ""]),
    "modules_to_save is a list, ": dict(modules_to_save=[["lm_head"]]),
    "modules_to_save is 'lm_head'": dict(modules_to_save="lm_head"),
    "trainable_token_indices is 5": dict(trainable_token_indices=5),
    "trainable_token_indices is a list": dict(trainable_token_indices=[-1]),
    "trainable_token_indices is an object": dict(trainable_token_indices={"(a+)+": [1]}),
    "trainable_token_indices is an object,": dict(trainable_token_indices={"lm_head": 5}),
    "base_model_name_or_path is 5": dict(base_model_name_or_path=5),
    "base_model_name_or_path is a list": dict(base_model_name_or_path=["x"]),
    "peft_type is 5": dict(peft_type=5),
    "is a EVIL adapter, expected LORA": dict(peft_type="EVIL"),
    "is a IA3 adapter, expected LORA": dict(peft_type="IA3"),
    "is a lora adapter": dict(peft_type="lora"),
    "use_rslora is 'yes'": dict(use_rslora="yes"),
    "lora_dropout is 2": dict(lora_dropout=2),
    "bias is 'x'": dict(bias="x"),
    "task_type is 5": dict(task_type=5),
    "megatron_config is set": dict(megatron_config={"a": 1}, megatron_core="evil"),
    "layer_replication is set": dict(layer_replication=[[0, 2]] * 10**5),
    "eva_config is set": dict(eva_config={"rho": 2}),
    "arrow_config is set": dict(arrow_config={"x": 1}),
    "kasa_config is set": dict(kasa_config={"beta": 1}),
    "init_lora_weights is OLoRA, which changes the base": dict(init_lora_weights="OLoRA"),
}
BROKEN = {
    "a list": ("[]", "the whole is a list"),
    "a number": ("5", "the whole is 5"),
    "null": ("null", "the whole is null"),
    "no JSON": ("{", "not valid JSON"),
    "nothing": ("", "not valid JSON"),
    "brackets without end": ("[" * 10**6, "not valid JSON"),
    "bytes that are no UTF-8": (b'{"r": "\xff"}', "not UTF-8"),
}
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def tensors(**entries):
    "The run's adapter with other matrices: name -> shape, all zeros"

    def make(here, run):
        folder = linked(run / "adapter", here / "bad")
        changed_json(folder / "adapter_config.json", modules_to_save=None)
        (folder / "manifest.json").unlink()  # it names the model, which is another one for chat
        write_matrices(folder, {LORA: [4, 64], **entries})

    return make


def write_matrices(folder, shapes):
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = dict(dtype="F32", shape=shape, data_offsets=[end, end + size])
        end += size
    write(folder / "adapter_model.safetensors", packed(header, bytes(end)))


OTHER = LORA.replace("lora_A", "lora_B")
TENSORS: dict[str, tuple[dict, str]] = {
    "half a pair": ({}, "q_proj"),
    "a matrix of no module": (
        {OTHER: [64, 4], LORA.replace("layers.0", "layers.99"): [4, 64]},
        "bad",
    ),
    "a matrix that is a vector": ({LORA: [4], OTHER: [64, 4]}, "expected"),
    "a matrix that is a number": ({LORA: [], OTHER: [64, 4]}, "expected"),
    "a matrix of three dimensions": ({LORA: [4, 64, 1], OTHER: [64, 4]}, "expected"),
    "a matrix of no rows": ({LORA: [0, 64], OTHER: [64, 0]}, "q_proj"),
    "a matrix of another width": ({LORA: [4, 9], OTHER: [64, 4]}, "q_proj"),
    "a bias": ({OTHER: [64, 4], LORA.replace("lora_A.weight", "bias"): [4]}, "bad"),
    "an embedding that is a number": (
        {OTHER: [64, 4], "base_model.model.model.embed_tokens.weight": []},
        "embed",
    ),
    "a tensor of a million letters": ({OTHER: [64, 4], "x" * 10**6: [1]}, ""),
    "a tensor with line breaks": ({OTHER: [64, 4], "a\nb.weight": [1]}, ""),
}

ADAPTERS = [
    *(
        Case(
            f"an adapter: {values}"[:90] + f", {verb}", command, adapter(**values), says.strip(" ,")
        )
        for says, values in CONFIGS.items()
        for verb, command in (("merge", MERGE), ("chat", CHAT))
    ),
    *(
        Case(
            f"an adapter whose configuration is {name}",
            MERGE,
            adapter_file("adapter_config.json", content),
            says,
        )
        for name, (content, says) in BROKEN.items()
    ),
    *(
        Case(
            f"an adapter whose header is {name}"[:80],
            MERGE,
            adapter_file("adapter_model.safetensors", content),
            says if name not in ("no tensors", "tensors of other names") else "",
            may_succeed=name == "no tensors",
        )
        for name, (content, says) in HEADERS.items()
    ),
    *(
        Case(f"an adapter with {name}, {verb}", command, tensors(**shapes), says)
        for name, (shapes, says) in TENSORS.items()
        for verb, command in (("merge", MERGE), ("chat", CHAT))
    ),
]


# ---- the same in all commands that take a model


def both(here, run):
    "A base with code of its own and a header that is none"
    weights(packed([]))(here, run)
    changed_json(here / "bad/config.json", auto_map={"AutoConfig": "evil.EvilConfig"})
    write(here / "bad/evil.py", "import pathlib\npathlib.Path('../code was run').touch()\n")


def only_code(here, run):
    "A whole chat model that asks to run its code"
    changed_json(
        linked(run / "chat", here / "bad") / "config.json",
        auto_map={"AutoConfig": "evil.EvilConfig"},
    )
    write(here / "bad/evil.py", "import pathlib\npathlib.Path('../code was run').touch()\n")


COMMANDS = {
    "export": "export --model bad --to hf --check none --out o",
    "export to vllm": "export --model bad --to vllm --check none --out o",
    "serve": "serve --model bad --port 0",
    "evaluate": "evaluate --model bad --n-chars 50 --out o",
    "efficiency": "efficiency --models a=bad --n-chars 50 --seconds 0 --out o",
    "merge": "merge --model bad --adapter RUN/adapter --out o",
    "pretrain": "pretrain --model bad --tokens RUN/tokens --out o",
    "init": "init --model bad --tokenizer RUN/tokenizer --out o",
    "sft": "sft --model bad --out o",
}

EVERYWHERE = [
    *(
        Case(f"a model whose header is a list, {name}", command, both, "the whole is a list")
        for name, command in COMMANDS.items()
    ),
    *(
        Case(f"a model with code of its own, {name}", command, only_code, "auto_map")
        for name, command in COMMANDS.items()
    ),
]

CASES = [*WEIGHTS, *FILES, *ADAPTERS, *EVERYWHERE]
