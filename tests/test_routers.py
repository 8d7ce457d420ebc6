"""a20c_routers: fourteen families of mixtures, their balance, their choices, their precision"""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_experts import FAMILIES, IDS, random_model

from cmixtral_nb.experts import is_router, split_experts
from cmixtral_nb.loading import attention_faults, load_model
from cmixtral_nb.pretrain import weigh_balance
from cmixtral_nb.qlora import add_lora, quantised
from cmixtral_nb.routers import (
    balanced_by,
    counted_choices,
    expert_choices,
    has_router,
    routed_share,
    router_flips,
)
from cmixtral_nb.training import keep_documents_apart, leak_between_documents

BY_CORRECTION = ["deepseek_v3", "glm4_moe", "nemotron_h"]
BY_NOTHING = ["deepseek_v2", "llama4_text"]
BY_LOSS = [family for family in FAMILIES if family not in BY_CORRECTION + BY_NOTHING]
IN_FLOAT32 = ["deepseek_v2", *BY_CORRECTION]


def routers(model):
    "Name -> module of what chooses, without the gates of shared experts"
    found = {name: m for name, m in model.named_modules() if is_router(name)}
    return {name: m for name, m in found.items() if not name.endswith("shared_expert_gate")}


def what_routers_return(model):
    "Name of a router -> what it returned in one forward pass"
    seen = {}
    hooks = [
        module.register_forward_hook(lambda m, given, out, name=name: seen.update({name: out}))
        for name, module in routers(model).items()
    ]
    with torch.no_grad():
        model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture(scope="module")
def nets():
    "Family -> model with single experts, made when it is asked for"
    made: dict[str, torch.nn.Module] = {}

    def of(family):
        if family not in made:
            made[family] = split_experts(random_model(family))
        return made[family]

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_are_those_of_the_router(nets, family):
    net = nets(family)
    correction = [b for name, b in net.named_buffers() if "correction" in name]
    for b in correction:
        b.copy_(torch.linspace(0, 0.3, len(b)))
    assert has_router(net)
    with counted_choices(net) as counts:
        seen = what_routers_return(net)
    assert len(counts) == len(seen) == (1 if family in ("deepseek_v2", "qwen3_moe") else len(seen))
    n_chosen = net.config.num_experts_per_tok
    for found, returned in zip(counts.values(), seen.values(), strict=True):
        if family == "llama4_text":
            expected = (returned[0] > 0).sum(0)
        else:
            expected = returned[-1].flatten().bincount(minlength=4)
        assert found.tolist() == expected.tolist()
        assert found.sum() == IDS.numel() * n_chosen
    by_token = expert_choices(net, IDS.tolist())
    assert set(router_flips(by_token, by_token).values()) == {0.0}
    for name, found in counts.items():
        assert by_token[name].sum(0).tolist() == found.tolist()
        assert set(by_token[name].sum(1).tolist()) == {n_chosen}
    assert routed_share(net) == n_chosen / 4
    again = {name: found.clone() for name, found in counts.items()}
    net(IDS, use_cache=False)  # no longer counted
    assert all(torch.equal(again[name], found) for name, found in counts.items())
    for b in correction:
        b.zero_()


def test_flips_are_tokens_with_another_expert():
    "Whatever the order of the experts, however many of them are others"
    here = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]).bool()
    there = here.clone()
    there[1] = torch.tensor([1, 0, 0, 1])  # both
    there[3] = torch.tensor([0, 1, 0, 1])  # one
    assert router_flips({"a": here, "b": here}, {"a": there, "b": here}) == {"a": 0.5, "b": 0.0}
    assert router_flips({"a": there}, {"a": here}) == {"a": 0.5}


def test_an_adapter_changes_no_name():
    "A model with an adapter is compared with the merged model, and is left in training"
    net = split_experts(random_model("mixtral"))
    before = expert_choices(net, IDS.tolist())
    with_lora = add_lora(net, rank=2, alpha=4, dropout=0.0).train()
    after = expert_choices(with_lora, IDS.tolist())
    assert router_flips(before, after) == dict.fromkeys(before, 0.0)  # B is zero
    assert with_lora.training
    for name, p in with_lora.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=3.0)
    flips = router_flips(before, expert_choices(with_lora, IDS.tolist()))
    assert flips.keys() == before.keys() and max(flips.values()) > 0


def naive_balance(layers, n_chosen):
    "Switch Transformer, equations 4 to 6, over the tokens of all layers"
    logits = torch.cat([layer.float() for layer in layers])
    p = logits.softmax(-1)
    n_experts = p.shape[1]
    chosen = F.one_hot(p.topk(n_chosen).indices, n_experts).sum(1).float()
    return n_experts * (chosen.mean(0) * p.mean(0)).sum()


def loss_of(net, aux, accumulation):
    "Loss of a batch that is one of several of a step, as the Trainer asks for it"
    weigh_balance(net, aux, accumulation)
    net.train()
    for module in net.modules():  # Phi's routers choose at random
        if hasattr(module, "router_jitter_noise"):
            module.router_jitter_noise = module.input_jitter_noise = 0.0
    loss = net(input_ids=IDS, labels=IDS, use_cache=False, num_items_in_batch=1000).loss
    net.eval()
    return loss


@pytest.mark.parametrize("family", BY_LOSS)
def test_the_balance_is_added_once_a_step(nets, family):
    net = nets(family)
    assert balanced_by(net) == "loss"
    without, with_balance = loss_of(net, 0.0, 4), loss_of(net, 2.0, 4)
    net.train()
    seen = what_routers_return(net)
    net.eval()
    balance = naive_balance([out[0] for out in seen.values()], net.config.num_experts_per_tok)
    assert balance > 1.5  # the choices of two of four experts; 2 where they are used alike
    added = with_balance - without
    assert added.item() == pytest.approx(2.0 / 4 * balance.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(added, net.get_input_embeddings().weight)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("family", BY_CORRECTION + BY_NOTHING)
def test_what_is_balanced_otherwise_is_left_alone(nets, family, capsys):
    net = nets(family)
    assert balanced_by(net) == ("correction" if family in BY_CORRECTION else "")
    tensors = {name: t.clone() for name, t in net.state_dict().items()}
    without = loss_of(net, 0.0, 1)
    assert capsys.readouterr().out == ""
    assert torch.equal(loss_of(net, 2.0, 1), without)
    said = {
        True: "is balanced by a correction of its scores, which stays as it is",
        False: "has no balancing loss",
    }[family in BY_CORRECTION]
    line = f"training: the router of {family} {said}; --aux is not used\n"
    assert capsys.readouterr().out == line
    without.backward()
    assert all(torch.equal(tensors[name], t) for name, t in net.state_dict().items())
    net.zero_grad()


def test_a_dense_model_has_no_router():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    net = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes))
    weigh_balance(net, 0.02, 1)
    assert not has_router(net) and not balanced_by(net)
    assert routed_share(net) == 1
    with counted_choices(net) as counts:
        net(IDS)
    assert counts == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_compute_in_their_own_precision(family, tmp_path):
    "Under autocast, beside experts in 4 bits, as the same family does when it is used in bfloat16"
    stock = random_model(family)
    for name, b in stock.named_buffers():
        if "correction" in name:
            b.copy_(torch.linspace(0, 0.1, len(b)))  # more digits than bfloat16 has
    stock.save_pretrained(tmp_path)
    net = load_model(tmp_path, load_in_4bit=True, dtype="bfloat16", trainable=True, device="cpu")
    assert not [name for name in quantised(net) if is_router(name)]
    tensors = load_file(tmp_path / "model.safetensors")
    corrections = {name: t for name, t in tensors.items() if "correction" in name}
    assert bool(corrections) == (family in BY_CORRECTION)
    found = [b for name, b in net.named_buffers() if "correction" in name]
    assert all(torch.equal(a, b) for a, b in zip(found, corrections.values(), strict=True))
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for (_, ours), (_, theirs) in zip(routers(net).items(), routers(stock).items(), strict=True):
        weight = theirs.weight.detach()
        bias = getattr(theirs, "bias", None)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            scores = next(out for out in ours(x) if out.is_floating_point() and out.ndim == 2)
        if family in IN_FLOAT32:
            assert torch.equal(ours.weight, weight)
            assert scores.dtype == torch.float32
            assert torch.equal(scores, F.linear(x.float(), weight))
        elif family != "llama4_text":  # which returns what it has made of the scores
            rounded = F.linear(x, weight.bfloat16(), None if bias is None else bias.bfloat16())
            assert torch.equal(scores.float(), rounded.float())


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_apart_or_it_is_said(family, capsys):
    net = split_experts(random_model(family))
    carries = family in ("qwen3_next", "qwen3_5_moe_text", "nemotron_h")  # layers with a state
    assert (leak_between_documents(net) > 0.1) == (carries or family == "gpt_oss")
    assert keep_documents_apart(net) != carries
    line = "training: documents of one example are not kept apart: " if carries else ""
    assert capsys.readouterr().out.startswith(line)
    positions = torch.cat([torch.arange(12), torch.arange(20)]).expand(4, -1)
    with torch.no_grad():
        packed = net(input_ids=IDS, position_ids=positions, use_cache=False).logits[:, 12:]
        alone = net(input_ids=IDS[:, 12:], use_cache=False).logits
    assert ((packed - alone).abs().max() < 1e-4) != carries


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_only_where_the_family_has_it(family, tmp_path):
    random_model(family).config.save_pretrained(tmp_path)
    faults = attention_faults(tmp_path, "flash_attention_2")
    if family in ("gpt_oss", "llama4_text"):
        line = f'attn = "flash_attention_2": {family} cannot be computed so; use attn = "sdpa"'
        assert faults == [line]
    else:
        assert not faults
    assert not attention_faults(tmp_path, "sdpa") + attention_faults(tmp_path, "eager")
