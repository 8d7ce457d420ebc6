"""A CPU that answers as a GPU does, so that a stage takes the way through the libraries that it
takes there: bfloat16 under autocast, checkpointed layers, Flash Attention, several devices.

    with as_gpu(n_gpus=2) as gpu:
        pretrain(..., attn="flash_attention_2", device="cuda:1")
    gpu.devices, gpu.flash  # where tensors were sent, which flash functions were called

transformers, peft, accelerate and bitsandbytes are not changed: only what they ask of torch.cuda
is answered, tensors that are sent to a GPU stay on the CPU, and the package flash_attn is one of
plain torch. No kernel of a GPU runs; tests/bench_gpu.py is for the day when there is one.
"""

import importlib.machinery
import importlib.util
import re
import sys
import types
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import bitsandbytes  # noqa: F401  # before torch.cuda answers: it would look for its CUDA library
import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash_utils
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import PreTrainedModel


class Gpu:
    "What was asked of the GPUs"

    def __init__(self):
        self.devices = []  # to which tensors were sent, each once: "cuda:1"
        self.flash = []  # the flash functions in the order of their calls: "dense", "varlen"
        self.deterministic = set()  # what their option of that name was

    def on_cpu(self, device):
        "The CPU in place of a GPU, and a note of it"
        if not isinstance(device, str | torch.device):
            return device
        name = str(device)
        if not re.fullmatch(r"cuda(:\d+)?", name):
            return device
        if name == "cuda":
            name = f"cuda:{torch.cuda.current_device()}"
        if name not in self.devices:
            self.devices.append(name)
        return torch.device("cpu")


class TensorsOnCpu(TorchFunctionMode):
    "Whoever sends a tensor to a GPU, or makes one there, gets one on the CPU"

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.device:  # a name alone sends nothing
            return func(*args, **(kwargs or {}))
        args = [self.gpu.on_cpu(arg) for arg in args]
        kwargs = {name: self.gpu.on_cpu(value) for name, value in (kwargs or {}).items()}
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


class AutocastOnCpu(torch.autocast):
    def __init__(self, device_type, *args, **kw):
        super().__init__("cpu", *args, **kw)


def loader_on_cpu(gpu, load):
    "`from_pretrained` with a device_map of GPUs"

    def from_pretrained(cls, *args, device_map=None, **kw):
        if isinstance(device_map, dict):
            device_map = {name: gpu.on_cpu(device) for name, device in device_map.items()}
        return load.__func__(cls, *args, device_map=device_map, **kw)

    return classmethod(from_pretrained)


class Shaken(torch.autograd.Function):
    "Identity; its gradient differs from call to call in the last bits, as that of FlashAttention"

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        noise = torch.rand(gradient.shape, generator=SHAKING)
        return gradient * (1 + 2**-6 * (noise - 0.5)).to(gradient.dtype)


SHAKING = torch.Generator()
SHAKING.seed()


def flash_package(gpu):
    "The package flash_attn: its two functions in plain torch, (batch, length, heads, d)"

    def attend(q, k, v, scale, causal, deterministic):
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        gpu.deterministic.add(deterministic)
        repeats = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)
        return y if deterministic else Shaken.apply(y)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **options):
        gpu.flash.append("dense")
        return attend(q, k, v, softmax_scale, causal, options["deterministic"])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        deterministic=False,
    ):  # fmt: skip
        gpu.flash.append("varlen")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32  # the kernel's demands
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q[-1] == len(q)
        lengths = cu_seqlens_q.diff().tolist()
        assert int(max_seqlen_q) == int(max_seqlen_k) == max(lengths)
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        how = softmax_scale, causal, deterministic
        return torch.cat([attend(q[None], k[None], v[None], *how)[0] for q, k, v in parts])

    def with_options(call):  # what transformers looks for in the signature
        def flash_attn_func(
            q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
            softcap=0.0, deterministic=False,
        ):  # fmt: skip
            return call(q, k, v, dropout_p, softmax_scale, causal, deterministic=deterministic)

        return flash_attn_func

    package: Any = types.ModuleType("flash_attn")
    package.flash_attn_func = with_options(flash_attn_func)
    package.flash_attn_varlen_func = flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    padding: Any = types.ModuleType("flash_attn.bert_padding")
    padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input
    return {"flash_attn": package, "flash_attn.bert_padding": padding}


@contextmanager
def installed(packages):
    "Modules that can be imported within it; those that are imported meanwhile stay"
    for name, module in packages.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules.update(packages)
    try:
        yield
    finally:
        for name in packages:
            del sys.modules[name]


def cuda_answers(n_gpus, native_bf16, memory):
    "Function of torch.cuda -> what answers in its place"
    current = [0]

    def set_device(device):
        current[0] = torch.device(device).index or 0

    name = "NVIDIA H100 80GB HBM3" if native_bf16 else "Tesla T4"
    major, minor = (9, 0) if native_bf16 else (7, 5)
    properties = types.SimpleNamespace(
        total_memory=memory, name=name, major=major, minor=minor, multi_processor_count=132
    )
    return {
        "is_available": lambda: True,
        "device_count": lambda: n_gpus,
        "current_device": lambda: current[0],
        "set_device": set_device,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: (major, minor),
        # PyTorch counts emulated bfloat16 as supported
        "is_bf16_supported": lambda including_emulation=True: native_bf16 or including_emulation,
        "synchronize": lambda device=None: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (memory, memory),
        "random.get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "random.get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)] * n_gpus,
        "random.set_rng_state": lambda state, device="cuda": None,
        "random.set_rng_state_all": lambda states: None,
    }


@contextmanager
def as_gpu(n_gpus=1, native_bf16=True, memory=80 * 10**9):
    "Within it this process sees `n_gpus` GPUs; native_bf16=False: cards as old as a T4"
    gpu = Gpu()
    enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype
    scaler = torch.amp.GradScaler
    with ExitStack() as stack:
        for name, answer in cuda_answers(n_gpus, native_bf16, memory).items():
            stack.enter_context(patch(f"torch.cuda.{name}", answer))
        for name, answer in {
            "torch.autocast": AutocastOnCpu,
            "torch.amp.autocast": AutocastOnCpu,
            "torch.is_autocast_enabled": lambda kind="cuda": enabled("cpu"),
            "torch.get_autocast_dtype": lambda kind="cuda": dtype_of("cpu"),
            "torch.amp.GradScaler": lambda device="cuda", **kw: scaler("cpu", **kw),
        }.items():
            stack.enter_context(patch(name, answer))
        load = PreTrainedModel.__dict__["from_pretrained"]
        stack.enter_context(
            patch.object(PreTrainedModel, "from_pretrained", loader_on_cpu(gpu, load))
        )
        stack.enter_context(installed(flash_package(gpu)))
        if importlib.util.find_spec("cmixtral_nb.packages"):
            versions = dict(flash_attn="2.8.3", deepspeed="0.19.6")
            stack.enter_context(patch("cmixtral_nb.packages.installed_version", versions.get))
        found = dict(general_availability_check=lambda *args, **kw: True)
        matrix = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX
        stack.enter_context(patch.dict(matrix[2], found))
        stack.enter_context(patch.object(flash_utils, "is_flash_attn_2_available", lambda: True))
        stack.enter_context(patch.object(flash_utils, "_loaded_implementation", None))
        stack.enter_context(TensorsOnCpu(gpu))
        yield gpu


class Master:
    "The float32 copy of a trained parameter, which DeepSpeed's optimiser steps"

    def __init__(self, p):
        self.p = p
        self.copy = torch.nn.Parameter(p.detach().float().clone())


@contextmanager
def as_deepspeed():
    "Weights as the engine of DeepSpeed casts them: all bfloat16, without autocast around them"
    masters = {}

    def prepare_model(self, model, device_placement=None, evaluation_mode=False):
        for p in model.parameters():
            if p.requires_grad:
                p._hp_mapping = masters[p] = Master(p)
            if p.is_floating_point():
                p.data = p.data.bfloat16()
        return model

    def prepare_optimizer(self, optimizer, device_placement=None):
        step = optimizer.step

        def step_copies(*args, **kw):
            for p, master in masters.items():
                master.copy.grad = None if p.grad is None else p.grad.float()
            step(*args, **kw)
            for p, master in masters.items():
                p.data.copy_(master.copy)

        for group in optimizer.param_groups:
            group["params"] = [masters[p].copy for p in group["params"]]
        optimizer.step = step_copies
        return AcceleratedOptimizer(optimizer, device_placement=False)

    utils: Any = types.ModuleType("deepspeed.utils")
    utils.safe_get_full_fp32_param = lambda p: p._hp_mapping.copy.data
    package: Any = types.ModuleType("deepspeed")
    package.utils = utils
    with (
        installed({"deepspeed": package, "deepspeed.utils": utils}),
        patch.object(Accelerator, "prepare_model", prepare_model),
        patch.object(Accelerator, "prepare_optimizer", prepare_optimizer),
    ):
        yield
