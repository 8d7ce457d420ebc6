"A training step's memory: the loss without logits, 16 bits where 16 are enough, the plan"

import os
import subprocess
import sys
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from cmixtral_nb import bits, plan
from cmixtral_nb.bits import head_loss, without_logits
from cmixtral_nb.loading import load_model
from cmixtral_nb.mixtral import small_config
from cmixtral_nb.qlora import add_lora

V = 300
IDS = torch.randint(0, V, (2, 40), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(40) % 7 == 3, -100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import MixtralForCausalLM

    path = tmp_path_factory.mktemp("memory")
    torch.manual_seed(0)
    config = small_config(hidden=64, layers=2, intermediate=64, heads=2, vocab_size=V)
    MixtralForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def always(monkeypatch):
    "However few logits there are, they are not held"
    monkeypatch.setattr(bits, "FEW_LOGITS", 0)


# the loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_loss_in_16_bits(dtype):
    torch.manual_seed(1)
    h = torch.randn(50, 32, dtype=torch.float64, requires_grad=True)
    W = torch.randn(V, 32, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, V, (50,))
    y[5] = -100
    truth = torch.nn.functional.cross_entropy(h @ W.T, y)
    short = [t.detach().to(dtype).requires_grad_() for t in (h, W)]
    loss = head_loss(short[0], short[1], y, block=16)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(truth.item(), rel=0.01)
    for ours, exact in zip(
        torch.autograd.grad(loss, short), torch.autograd.grad(truth, (h, W)), strict=True
    ):
        assert (ours - exact).norm() / exact.norm() < 0.01


def test_a_scaled_loss_does_not_vanish_in_float16():
    "float16 holds nothing below 6e-8; the gradients of a mean over many tokens are smaller"
    torch.manual_seed(1)
    h, W = torch.randn(4096, 8), torch.randn(V, 8) / 50
    y = torch.randint(0, V, (4096,))
    full = [t.clone().requires_grad_() for t in (h, W)]
    short = [t.half().requires_grad_() for t in (h, W)]
    (2**16 * head_loss(full[0], full[1], y, n_items=10**6)).backward()
    (2**16 * head_loss(short[0], short[1], y, n_items=10**6)).backward()
    for a, b in zip(full, short, strict=True):
        assert (a.grad - b.grad).norm() / a.grad.norm() < 0.01


def step(net, autocast=False, **more):
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = net.train()(input_ids=IDS, labels=LABELS, use_cache=False, **more)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rows", ["all", "new", "none"])
@pytest.mark.parametrize("items", [None, 50, torch.tensor(61)])
def test_loss_and_gradients_are_those_with_logits(folder, rows, items, monkeypatch):
    net = add_lora(load_model(folder, device="cpu", trainable=True), 4, 8, 0.0, rows, n_old=250)
    net.config.output_router_logits = True  # the router's balance is in the loss as ever
    more = {} if items is None else dict(num_items_in_batch=items)
    theirs, expected = step(net, **more)
    assert theirs.logits.shape == (2, 40, V)
    monkeypatch.setattr(bits, "FEW_LOGITS", 0)
    ours, found = step(net, **more)
    assert ours.logits is None and ours.aux_loss == theirs.aux_loss
    assert abs(ours.loss.item() - theirs.loss.item()) < 1e-6 * abs(theirs.loss.item())
    assert found.keys() == expected.keys() and len(found) >= 24
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    with torch.no_grad():  # an evaluation has its logits, and nothing is left behind
        assert net.eval()(IDS, labels=LABELS).logits.shape == (2, 40, V)
    head = net.get_base_model().get_output_embeddings()
    assert "forward" not in vars(head) and "_loss_function" not in vars(net.get_base_model())


@pytest.mark.parametrize("rows", ["all", "new", "none"])
def test_under_autocast_it_is_as_close_to_the_truth(folder, rows, monkeypatch):
    def net():
        return add_lora(load_model(folder, device="cpu", trainable=True), 4, 8, 0.0, rows, 250)

    def far(found):
        a, b = (torch.cat([g[n].flatten() for n in truth]) for g in (found, truth))
        return ((a - b).norm() / b.norm()).item()

    with_logits, truth = step(net())
    _, usual = step(net(), autocast=True)
    monkeypatch.setattr(bits, "FEW_LOGITS", 0)
    ours, found = step(net(), autocast=True)
    assert ours.loss.item() == pytest.approx(with_logits.loss.item(), rel=1e-3)
    assert far(found) < 1.1 * far(usual) < 0.05


def test_an_error_in_the_model_leaves_the_head_as_it_was(folder, always):
    net = load_model(folder, device="cpu")
    without_logits(net)
    with pytest.raises(IndexError):
        net.train()(input_ids=IDS + V, labels=IDS)
    assert "forward" not in vars(net.lm_head) and "_loss_function" not in vars(net)
    assert net(input_ids=IDS, labels=IDS).logits is None


def test_heads_that_are_more_than_a_matrix_keep_their_logits(always):
    sizes = dict(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=16))
    biased = LlamaForCausalLM(LlamaConfig(**sizes))
    biased.lm_head = torch.nn.Linear(32, V)
    plain = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    for net, has_logits in ((capped, True), (biased, True), (plain, False)):
        expected, grads = step(net)
        without_logits(net)
        found, ours = step(net)
        assert (found.logits is not None) == has_logits
        torch.testing.assert_close(found.loss, expected.loss)
        for name, grad in grads.items():
            torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


def compare_with_liger():
    torch.manual_seed(0)
    h = torch.randn(40, 16, requires_grad=True)
    W = torch.randn(V, 16, requires_grad=True)
    rows, delta = torch.arange(200, V), torch.randn(100, 16, requires_grad=True)
    y = torch.randint(0, V, (40,))
    y[3] = -100
    some = bits._Head(W.detach().index_copy(0, rows, delta.detach()), delta, rows)
    for head, n in ((bits._Head(W.detach(), W, None), None), (some, 17.0)):
        ours = bits._head_loss_function().apply(h, *head, y, n, 16)
        theirs = bits._liger_loss(head, h, y, n)
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(loss, (h, head.trained)) for loss in (ours, theirs)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_ligers_kernel_computes_the_same():
    "On Triton's interpreter, which needs no GPU, and which a process chooses at its start"
    pytest.importorskip("liger_kernel")
    env = dict(os.environ, TRITON_INTERPRET="1")
    subprocess.run([sys.executable, __file__, "liger"], check=True, env=env)


# what a step holds


@pytest.mark.parametrize("rows", ["all", "new", "none"])
@pytest.mark.parametrize("four", [True, False])
def test_layers_keep_their_inputs_in_16_bits(folder, rows, four, monkeypatch):
    "Norms and trained embeddings are float32; what is kept for the backward pass is not"
    how = dict(load_in_4bit=four, dtype="bfloat16", device="cpu", trainable=True)
    net = add_lora(load_model(folder, **how), 4, 8, 0.05, rows, 250)
    base = net.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    net.enable_input_require_grads()
    kept = []

    def note(function, hidden, *args, **kw):
        kept.append(hidden.dtype)
        return checkpoint(function, hidden, *args, use_reentrant=False, **kw)

    for layer in base.model.layers:
        layer._gradient_checkpointing_func = note
    out, grads = step(net, autocast=True)
    assert kept == [torch.bfloat16] * 2
    assert {p.dtype for n, p in base.named_parameters() if "norm" in n} == {torch.float32}
    assert {g.dtype for g in grads.values()} == {torch.float32}


# the plan

BASE = dict(hidden=64, layers=2, intermediate=128, experts=4, heads=4, kv_heads=4)


def peak_of_a_step(folder, n_tokens, rows, checkpointing, vocab_size):
    "Bytes that a step adds at most, as PyTorch's allocator counts them"
    how: dict[str, Any] = dict(load_in_4bit=True, dtype="bfloat16", device="cpu", trainable=True)
    net = add_lora(load_model(folder, **how), 8, 16, 0.0, rows, n_old=vocab_size // 2).train()
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
        net.enable_input_require_grads()
    ids = torch.randint(0, vocab_size, (2, n_tokens // 2))
    places = torch.arange(n_tokens // 4).repeat(2).expand(2, -1)  # two documents in each example

    def batch(ids, places):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(input_ids=ids, labels=ids, position_ids=places, use_cache=False).loss
        loss.backward()

    batch(ids[:1, :32], places[:1, :32])  # from now on the weights have gradients
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        batch(ids, places)
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize(
    "rows,n_tokens,checkpointing,vocab_size",
    [
        ("all", 2400, True, 57_000),  # the loss is the peak
        ("new", 2400, True, 57_000),
        ("none", 2400, True, 57_000),
        ("none", 2400, False, 57_000),  # all layers are kept until then
        ("none", 4096, True, 400),  # a layer is the peak
    ],
)
def test_a_step_in_16_bits_takes_what_is_planned(
    tmp_path, monkeypatch, rows, n_tokens, checkpointing, vocab_size
):
    from transformers import MixtralForCausalLM

    if vocab_size == 400:
        monkeypatch.setattr(bits, "FEW_LOGITS", 0)
        monkeypatch.setattr(plan, "FEW_LOGITS", 0)
    monkeypatch.setitem(bits.BLOCKS, "cpu", 256)
    monkeypatch.setitem(bits.BLOCKS, "cuda", 256)  # a plan in 16 bits is one for a GPU
    torch.manual_seed(0)
    config = small_config(**BASE, vocab_size=vocab_size)
    MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    measured = peak_of_a_step(tmp_path, n_tokens, rows, checkpointing, vocab_size)
    planned = plan.memory_plan(
        tmp_path,
        rank=8,
        rows=rows,
        n_old=vocab_size // 2,
        batch=2,
        length=n_tokens // 2,
        dropout=0.0,
        checkpointing=checkpointing,
        attn="sdpa",
    )["bytes"]["peak"]
    assert planned == pytest.approx(measured, rel=0.03), planned / measured


if __name__ == "__main__" and sys.argv[1:] == ["liger"]:
    compare_with_liger()
