"""By hand: memory and time of a merge as the checkpoint grows, beside peft's and beside a plain
copy; and what a kill -9 leaves.

python tests/bench_merge.py grow DIR        # Mixtrals of 1, 2, 4, 8 GB in DIR: peak memory
                                            # and time of each merge
python tests/bench_merge.py stacked DIR     # the same for Granite, whose files stack the experts
                                            # of a layer, and gpt-oss: stacked, transposed, in turns
python tests/bench_merge.py many DIR        # 48 layers of 128 small experts: seconds of each part
python tests/bench_merge.py peft DIR        # 2 GB: beside peft's merge_and_unload on the per-expert
                                            # model
python tests/bench_merge.py kill DIR        # 20 kills at random moments of a small merge
"""

import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

RANK = int(os.environ.get("RANK", 16))
NUMBERS = dict(
    hidden_size=1024,
    intermediate_size=3584,
    num_attention_heads=16,
    num_key_value_heads=4,
    num_local_experts=8,
    num_experts_per_tok=2,
    vocab_size=32000,
)
LAYERS = {1: 5, 2: 11, 4: 22, 8: 45}


def only_import():
    "What every job pays: the import of PyTorch and of the package"
    for name in ("torch", "safetensors", "tqdm", "cmixtral_nb.merge"):
        importlib.import_module(name)


def merge_with_peft(model, adapter, out):
    from peft import PeftModel

    from cmixtral_nb.loading import load_model, save_stock

    net = load_model(model, dtype="bfloat16", device="cpu")
    save_stock(PeftModel.from_pretrained(net, adapter).merge_and_unload(), out)


def merge_here(model, adapter, out, check=""):
    from cmixtral_nb.merge import merge

    how = dict(into="original", device="cpu", shard_bytes=1_000_000_000)
    merge(model, adapter, out=out, check=check == "check", **how)


JOBS = {job.__name__: job for job in (only_import, merge_with_peft, merge_here)}


def specs_of(layers, numbers):
    d, m, kv = (
        numbers["hidden_size"],
        numbers["intermediate_size"],
        numbers["hidden_size"] * numbers["num_key_value_heads"] // numbers["num_attention_heads"],
    )
    V, E = numbers["vocab_size"], numbers["num_local_experts"]
    out = {"model.embed_tokens.weight": [V, d], "lm_head.weight": [V, d], "model.norm.weight": [d]}
    for i in range(layers):
        p = f"model.layers.{i}."
        out |= {
            p + f"self_attn.{n}_proj.weight": s
            for n, s in dict(q=[d, d], k=[kv, d], v=[kv, d], o=[d, d]).items()
        }
        out |= {
            p + "input_layernorm.weight": [d],
            p + "post_attention_layernorm.weight": [d],
            p + "block_sparse_moe.gate.weight": [E, d],
        }
        out |= {
            p + f"block_sparse_moe.experts.{e}.{w}.weight": [d, m] if w == "w2" else [m, d]
            for e in range(E)
            for w in ("w1", "w2", "w3")
        }
    return out


def family_of(family, layers, numbers):
    "Configuration of a family, shapes of its files' tensors, and shapes of LoRA on all matrices"
    import torch
    from transformers import AutoConfig

    from cmixtral_nb.experts import lora_matrices, split_experts
    from cmixtral_nb.placement import without_memory

    config = AutoConfig.for_model(
        family, num_hidden_layers=layers, tie_word_embeddings=False, **numbers
    )
    net = without_memory(config, torch.bfloat16)
    names = {  # Granite has other names on disk
        "experts.gate_up_proj": "input_linear.weight",
        "experts.down_proj": "output_linear.weight",
    }
    shapes = {}
    for name, p in net.state_dict().items():
        for in_memory, on_disk in names.items() if family == "granitemoe" else ():
            name = name.replace(in_memory, on_disk)
        shapes[name] = list(p.shape)
    config.architectures = [type(net).__name__]
    matrices = {}
    single = split_experts(net)
    for name in lora_matrices(single):
        module = single.get_submodule(name)
        matrices[f"{name}.weight"] = [module.out_features, module.in_features]
    return config.to_dict() | dict(dtype="bfloat16"), shapes, matrices


def mixtral_of(layers, numbers):
    "The same for Mixtral, without transformers"
    config = dict(
        numbers,
        num_hidden_layers=layers,
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        max_position_embeddings=4096,
        hidden_act="silu",
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
    )
    shapes = specs_of(layers, numbers)
    return config, shapes, {n: s for n, s in shapes.items() if "_proj" in n or ".experts." in n}


def make(folder, layers, numbers=NUMBERS, shard_bytes=1_000_000_000, rank=RANK, family="mixtral"):
    "A mixture of random bfloat16 weights and an adapter on attention and all experts"
    import torch

    from cmixtral_nb.adapters import plain_name
    from cmixtral_nb.checkpoints import plan_shards, tensor_files, write_index, write_tensors
    from cmixtral_nb.stages import write_json

    model, adapter = folder / "model", folder / "adapter"
    model.mkdir(parents=True)
    adapter.mkdir()
    if family == "mixtral":
        config, shapes, matrices = mixtral_of(layers, numbers)
    else:
        config, shapes, matrices = family_of(family, layers, numbers)
    g = torch.Generator().manual_seed(0)

    def tensor(name):
        if "norm" in name:
            return torch.ones(shapes[name]).bfloat16()
        return torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=g)

    for f, specs in plan_shards([(n, "BF16", s) for n, s in shapes.items()], shard_bytes).items():
        write_tensors(model / f, specs, tensor)
    files = tensor_files(model, check_index=False)
    if len(set(files.values())) > 1:
        write_index(model, files)
    write_json(model / "config.json", config)
    lora: dict[str, list[int]] = {}
    for n, s in matrices.items():
        base = "base_model.model." + plain_name(n).removesuffix("weight")
        lora |= {base + "lora_A.weight": [rank, s[1]], base + "lora_B.weight": [s[0], rank]}
    write_tensors(
        adapter / "adapter_model.safetensors",
        [(n, "F32", s) for n, s in lora.items()],
        lambda n: torch.randn(lora[n], generator=g) * 0.01,
    )
    targets = sorted({name.rsplit(".", 2)[1] for name in matrices})
    write_json(
        adapter / "adapter_config.json",
        dict(
            peft_type="LORA",
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=2 * rank,
            target_modules=targets,
        ),
    )
    return model, adapter


def measure(job, *args):
    "Seconds and peak resident bytes of a fresh process that does one of JOBS"
    start = time.time()
    p = subprocess.Popen(
        [sys.executable, __file__, "job", job.__name__, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error"),
    )
    out, err = p.communicate()
    assert p.returncode == 0, err.decode()[-2000:]
    return time.time() - start, int(out.split()[-1])


def own_peak():
    "Bytes; what wait4 tells begins with the size of the process that started this one"
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


def copy(src, out):
    "Seconds of `cp` and of `cp` until the bytes are on the disk, as a merge leaves them"
    start = time.time()
    subprocess.run(["cp", "-r", str(src), str(out)], check=True)
    plain = time.time() - start
    for f in Path(out).iterdir():
        with open(f, "rb+") as g:
            os.fsync(g.fileno())
    shutil.rmtree(out)
    return plain, time.time() - start


def grow(folder, sizes, family="mixtral"):
    folder, empty = Path(folder), measure(only_import)
    print(f"an empty process that imports torch: {empty[0]:.1f} s, {empty[1] / 1e6:,.0f} MB")
    for size in sizes:
        here = folder / f"{family}_{size}gb"
        model, adapter = make(here, LAYERS[size], family=family)
        n = sum(f.stat().st_size for f in model.glob("*.safetensors"))
        os.sync()
        plain, durable = copy(model, here / "copy")
        seconds, peak = measure(merge_here, model, adapter, here / "out")
        print(
            f"{family} {n / 1e9:.2f} GB, rank {RANK}: merge {seconds:.1f} s, "
            f"peak {peak / 1e6:,.0f} MB; "
            f"cp {plain:.1f} s, with fsync {durable:.1f} s; merge/cp {seconds / plain:.1f}, "
            f"merge/(cp with fsync) {seconds / durable:.2f}",
            flush=True,
        )
        shutil.rmtree(here / "out")
        seconds, peak = measure(merge_here, model, adapter, here / "out", "check")
        print(f"    with the check: {seconds:.1f} s, peak {peak / 1e6:,.0f} MB", flush=True)
        shutil.rmtree(here)


def many(folder):
    "As many small experts as Qwen3-30B has; a matrix is 64 x 64, so that the rest is measured"
    from cmixtral_nb.adapters import Adapter
    from cmixtral_nb.stored_experts import mixture_on_disk

    here = Path(folder) / "many"
    numbers = dict(hidden_size=64, moe_intermediate_size=64, intermediate_size=64, num_experts=128)
    numbers |= dict(num_experts_per_tok=8, num_attention_heads=4, num_key_value_heads=2)
    numbers |= dict(head_dim=16, vocab_size=1000)
    model, adapter = make(here, 48, numbers, rank=4, family="qwen3_moe")
    for what, job in (("mixture_on_disk", mixture_on_disk), ("Adapter", Adapter)):
        start = time.process_time()
        job(model if job is mixture_on_disk else adapter)
        print(f"{what}: {time.process_time() - start:.1f} s of processor")
    for check in ("", "check"):
        seconds, peak = measure(merge_here, model, adapter, here / f"out{check}", check)
        print(f"merge {check}: {seconds:.1f} s, peak {peak / 1e6:,.0f} MB", flush=True)
    shutil.rmtree(here)


def beside_peft(folder):
    import torch

    from cmixtral_nb.adapters import plain_name
    from cmixtral_nb.checkpoints import load_tensor, tensor_files

    here = Path(folder) / "peft"
    model, adapter = make(here, LAYERS[2])
    os.sync()
    ours, theirs = [], []
    for i in range(2):  # in turn, so that a busy moment hits both
        theirs.append(measure(merge_with_peft, model, adapter, here / f"theirs{i}"))
        ours.append(measure(merge_here, model, adapter, here / f"ours{i}"))
    a, b = (
        {plain_name(n): (f, n) for n in f}
        for f in (tensor_files(here / "ours0"), tensor_files(here / "theirs0"))
    )
    same = sum(torch.equal(load_tensor(*a[n]), load_tensor(*b[n])) for n in a)
    (t, m), (tp, mp) = (tuple(min(x[i] for x in runs) for i in (0, 1)) for runs in (ours, theirs))
    print(
        f"rank {RANK}: ours {t:.1f} s, {m / 1e6:,.0f} MB; peft {tp:.1f} s, {mp / 1e6:,.0f} MB; "
        f"time {t / tp:.2f} of peft's, peak {m / mp:.0%}"
    )
    print(f"{same} of {len(a)} tensors bitwise equal, peft has {len(b)}")
    shutil.rmtree(here)


def kill(folder, n=20, seed=0):
    "Kill a merge at random moments, run it again, compare with one that was left alone"
    from cmixtral_nb.merge import merge
    from cmixtral_nb.stages import Artifact

    here, rng = Path(folder) / "kill", random.Random(seed)
    model, adapter = make(
        here, 2, dict(NUMBERS, hidden_size=256, intermediate_size=512, vocab_size=2000), 1_000_000
    )
    how = dict(into="original", check=False, device="cpu", shard_bytes=1_000_000)

    def job(out):
        return merge(model, adapter, out=here / out, **how)

    want = job("whole").fingerprint
    start = time.time()
    job("warm")
    seconds = time.time() - start
    killed = whole = kept = 0
    for i in range(n):
        pid = os.fork()
        if not pid:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            job(f"out{i}")
            os._exit(0)
        time.sleep(seconds * rng.uniform(0, 1.1))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        out, tmp = here / f"out{i}", here / f"out{i}.tmp"
        kept += len(list(tmp.glob("*.safetensors")))
        if out.exists():
            Artifact.load(out, verify=True)
            whole += 1
        assert job(f"out{i}").fingerprint == want and not tmp.exists()
    print(
        f"{killed} of {n} runs killed ({whole} of all were already whole); "
        f"{kept} shards of the dead were used again; all {n} results bitwise equal"
    )
    shutil.rmtree(here)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["grow", where, *sizes]:
            grow(where, [int(size) for size in sizes] or list(LAYERS))
        case ["stacked", where, *sizes]:
            for kind in ("granitemoe", "gpt_oss"):
                grow(where, [int(size) for size in sizes] or [1, 2, 4], kind)
        case ["many", where]:
            many(where)
        case ["peft", where]:
            beside_peft(where)
        case ["kill", where]:
            kill(where)
        case ["job", name, *args]:
            JOBS[name](*args)
            print(own_peak())
        case _:
            sys.exit(__doc__)
