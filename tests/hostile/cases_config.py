"config.json of a model: sizes that are none, that do not fit the weights, code of its own"

from typing import Any

from hostile import Case, changed_json, code, linked, write


def changed(**values):
    "A copy of the base, as from elsewhere, whose configuration has other values"

    def make(here, run):
        model = linked(run / "base", here / "bad")
        (model / "manifest.json").unlink()
        changed_json(model / "config.json", **values)

    return make


def written(content):
    "A copy of the base with this for a configuration"

    def make(here, run):
        write(linked(run / "base", here / "bad") / "config.json", content)

    return make


def with_code(**values):
    "A model that brings Python files, and asks to run them"

    def make(here, run):
        changed(**values)(here, run)
        for name in ("evil.py", "modeling_evil.py", "configuration_evil.py"):
            write(here / "bad" / name, code(here) + "class EvilConfig: pass\n")

    return make


EVIL = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
GENERATE = "generate --models a=bad --prompts x --max-new-tokens 2 --out o"
COMMANDS = {
    "generate": GENERATE,
    "evaluate": "evaluate --model bad --n-chars 50 --out o",
    "chat": "chat --model bad",
    "efficiency": "efficiency --models a=bad --n-chars 50 --seconds 0 --out o",
}
WRONG: dict[str, dict[str, Any]] = {  # what is said, and the values
    "num_hidden_layers is 10000000": dict(num_hidden_layers=10**7),
    "num_hidden_layers is 9,999": dict(num_hidden_layers=9_999),
    "num_hidden_layers is 0": dict(num_hidden_layers=0),
    "num_hidden_layers is '2'": dict(num_hidden_layers="2"),
    "num_hidden_layers": dict(num_hidden_layers=1),
    "hidden_size is -4": dict(hidden_size=-4),
    "hidden_size is 'wide'": dict(hidden_size="wide"),
    "hidden_size": dict(hidden_size=1),
    "hidden_size is a list": dict(hidden_size=[32]),
    "hidden_size is 1.5": dict(hidden_size=1.5),
    "vocab_size is 0": dict(vocab_size=0),
    "embed_tokens.weight": dict(vocab_size=5),
    "vocab_size is a number beyond all bounds": dict(vocab_size=10**400),
    "intermediate_size is a number": dict(intermediate_size=10**30),
    "w1.weight": dict(intermediate_size=10**6),
    "num_attention_heads is 0": dict(num_attention_heads=0),
    "a multiple of 7 heads": dict(num_attention_heads=7),
    "num_key_value_heads is -1": dict(num_key_value_heads=-1),
    "num_key_value_heads": dict(num_key_value_heads=10**6),
    "head_dim is 'x'": dict(head_dim="x"),
    "q_proj.weight": dict(head_dim=1000),
    "num_local_experts is -3": dict(num_local_experts=-3),
    "num_local_experts": dict(num_local_experts=10**5),
    "the weights lack": dict(num_local_experts=99),
    "num_experts_per_tok is 99": dict(num_experts_per_tok=99),
    "num_experts_per_tok is 0": dict(num_experts_per_tok=0),
    "hidden_act is 'exec'": dict(hidden_act="exec"),
    "hidden_act is 7": dict(hidden_act=7),
    "rms_norm_eps is nan": dict(rms_norm_eps=float("nan")),
    "rms_norm_eps is 'small'": dict(rms_norm_eps="small"),
    "rope_parameters": dict(rope_parameters=5),
    "dtype is 'int8'": dict(dtype="int8"),
    "dtype is 5": dict(dtype=5),
    "tie_word_embeddings is 3": dict(tie_word_embeddings=3),
    "max_position_embeddings is 0": dict(max_position_embeddings=0),
    "model_type is 5": dict(model_type=5),
    "model_type is 'nothing'": dict(model_type="nothing"),
    "names no model_type": dict(model_type=...),
    "quantised by 'gptq'": dict(quantization_config=dict(quant_method="gptq")),
    "quantization_config is 3": dict(quantization_config=3),
    "sliding_window": dict(sliding_window="wide"),
    "the weights lack model.layers.0.mlp.gate_proj": dict(model_type="llama"),
}
BROKEN = {
    "a number": ("5", "the whole is 5"),
    "a list": ("[]", "the whole is a list"),
    "null": ("null", "the whole is null"),
    "no JSON": ("{", "not valid JSON"),
    "nothing": ("", "not valid JSON"),
    "too deep": ("[" * 100_000, "not valid JSON"),
    "not UTF-8": (b"\xff\xfe{}", "not UTF-8"),
    "empty": ("{}", "names no model_type"),
}

CASES = [
    *[
        Case(
            f"a model that asks to run its code, {name}, {' and '.join(values)}",
            command,
            with_code(**values),
            "auto_map",
        )
        for name, command in COMMANDS.items()
        for values in (dict(auto_map=EVIL), dict(auto_map=EVIL, model_type="evil"))
    ],
    *[
        Case(
            f"a model that asks to run its code, {name}, and somebody who says yes",
            command,
            with_code(auto_map=EVIL, model_type="evil"),
            "auto_map",
            stdin="y\nyes\n" * 50,
        )
        for name, command in COMMANDS.items()
    ],
    *[
        Case(f"config.json: {values}"[:90], GENERATE, changed(**values), says)
        for says, values in WRONG.items()
    ],
    *[
        Case(f"config.json is {name}", GENERATE, written(content), says)
        for name, (content, says) in BROKEN.items()
    ],
]
