"05_mixtral, a11 to a13: broken checkpoints, edges of the measures, what `base` refuses and leaves"

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cmixtral_nb import checkpoints
from cmixtral_nb.base import base
from cmixtral_nb.bits import bits_per_byte, head_loss, windows
from cmixtral_nb.checkpoints import (
    INDEX,
    ahead,
    load_tensor,
    read_header,
    resolve_model,
    tensor_files,
    write_tensors,
)
from cmixtral_nb.mixtral import (
    BLOCK_ON_DISK,
    EXPERT_MATRICES,
    expert_matrix,
    small_config,
    use_by_expert,
)
from cmixtral_nb.stages import StageError, read_json, sha256_file, write_json

CONFIG = dict(hidden=16, layers=2, intermediate=24, heads=2, kv_heads=1, vocab_size=60)


def small(**kw):
    torch.manual_seed(0)
    return MixtralForCausalLM(small_config(**{**CONFIG, **kw})).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    p = tmp_path_factory.mktemp("model")
    small().save_pretrained(p, max_shard_size="20KB")
    return p


@pytest.fixture
def model(saved, tmp_path):
    "A copy in several shards, to break"
    for f in saved.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


@pytest.fixture(scope="module")
def tok():
    "Characters as tokens; anything else is <unk>"
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", *"abcdxyz nmor汉字"])}
    t = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


# checkpoints


def test_a_whole_checkpoint_is_found(model):
    assert resolve_model(model) == resolve_model(str(model)) == model
    assert set(tensor_files(model)) == set(read_json(model / INDEX)["weight_map"])


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(
        StageError,
        match="does not exist; expected an HF model folder or a hub id; run: cmixtral base",
    ):
        resolve_model(tmp_path / "none")
    (tmp_path / "f").write_text("x")
    with pytest.raises(StageError, match="is a file; expected an HF model folder"):
        resolve_model(tmp_path / "f")


def test_all_faults_of_a_folder_at_once(tmp_path):
    with pytest.raises(StageError) as e:
        resolve_model(tmp_path)
    assert "no config.json" in e.value.args[0]
    assert "no *.safetensors" in e.value.args[1]


def test_pickled_weights_are_refused(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "mixtral"})
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(StageError, match=r"holds only pickled weights \(pytorch_model.bin\)"):
        resolve_model(tmp_path)


def test_truncated_shard(model):
    s = sorted(model.glob("*.safetensors"))[1]
    s.write_bytes(s.read_bytes()[:-5])
    with pytest.raises(StageError, match=f"{s.name} is truncated"):
        resolve_model(model)
    s.write_bytes(s.read_bytes()[:20])
    with pytest.raises(StageError, match="end within its header"):
        resolve_model(model)


def test_a_shard_that_is_no_safetensors(model):
    s = sorted(model.glob("*.safetensors"))[0]
    s.write_bytes((8).to_bytes(8, "little") + b"not json")
    with pytest.raises(StageError, match="header is not JSON"):
        resolve_model(model)
    s.write_bytes((2).to_bytes(8, "little") + b"{}" + b"trailing")
    with pytest.raises(StageError, match="its header promises 10"):
        resolve_model(model)


def test_missing_shard_and_tensor_that_the_index_names(model):
    index = read_json(model / INDEX)
    gone, other = sorted(set(index["weight_map"].values()))[:2]
    (model / gone).unlink()
    with pytest.raises(StageError, match=f"{gone} is missing"):
        resolve_model(model)
    write_json(model / INDEX, dict(index, weight_map={k: other for k in index["weight_map"]}))
    with pytest.raises(StageError, match=r"lacks .*, which model.safetensors.index.json promises"):
        resolve_model(model)


def test_config_without_model_type_and_broken_config(model):
    write_json(model / "config.json", {"hidden_size": 8})
    with pytest.raises(StageError, match="names no model_type"):
        resolve_model(model)
    (model / "config.json").write_text("{")
    with pytest.raises(StageError, match="not valid JSON"):
        resolve_model(model)


def test_other_files_are_not_weights(model):
    save_file({"x": torch.zeros(2)}, model / "adapter_model.safetensors")
    assert "x" not in tensor_files(model)


def test_hub_only_for_hub_ids(tmp_path, monkeypatch, model):
    asked: list[str] = []

    def download(name):
        asked.append(name)
        return model

    monkeypatch.setattr(checkpoints, "_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for ref in ("runs/base", "./org/name", "/org/name", "name", "a/b/c"):
        with pytest.raises(StageError, match="does not exist"):
            resolve_model(ref)
    assert asked == []
    assert resolve_model("org/Some-Model_v0.1") == resolve_model("hub:runs/base") == model
    assert asked == ["org/Some-Model_v0.1", "runs/base"]


def test_hub_failure_is_one_line(monkeypatch):
    import huggingface_hub

    def fail(name, allow_patterns, ignore_patterns):
        assert not any("bin" in p or p.endswith(".py") for p in allow_patterns)
        raise OSError("cannot reach the hub\nmore\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(StageError) as e:
        resolve_model("org/name")
    assert (
        str(e.value)
        == "org/name: no such folder here, and the hub did not give it (cannot reach the hub)"
    )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
def test_written_tensors_are_what_safetensors_reads(tmp_path, dtype):
    tensors = {
        "a": torch.randint(0, 2, (3, 5)).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "scalar": torch.ones((), dtype=dtype),
    }
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(tensors, theirs)
    specs = [(name, h["dtype"], h["shape"]) for name, h in read_header(theirs).items()]
    written: list[int] = []
    digest = write_tensors(ours, specs, tensors.get, written.append)
    assert digest == sha256_file(ours)
    assert sum(written) == sum(t.numel() * t.element_size() for t in tensors.values())
    got = load_file(ours)
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], t) for name, t in tensors.items())
    assert not list(tmp_path.glob("*.part"))


def test_a_tensor_that_cannot_be_made_leaves_no_file(tmp_path):
    def tensor(name):
        if name == "b":
            raise StageError("b is broken")
        return torch.zeros(4)

    with pytest.raises(StageError, match="b is broken"):
        write_tensors(tmp_path / "w.safetensors", [(n, "F32", [4]) for n in "abcdefgh"], tensor)
    assert not (tmp_path / "w.safetensors").exists()


@given(st.lists(st.integers(), max_size=20), st.integers(1, 4))
def test_ahead_keeps_the_order_and_never_runs_far_ahead(items, workers):
    made: list[int] = []

    def make(i):
        made.append(i)
        return items[i]

    n_taken = 0
    with ThreadPoolExecutor(workers) as pool:
        for item in ahead(pool, make, range(len(items)), workers):
            assert item == items[n_taken]
            assert len(made) <= n_taken + workers + 1
            n_taken += 1
    assert n_taken == len(items) == len(made)


# measures


@given(st.lists(st.integers(3, 9), max_size=40), st.integers(1, 12))
def test_windows_score_each_token_once(ids, length):
    w = windows(ids, length, bos=1)
    assert [t for _, y in w for t in y] == ids
    assert [t for x, _ in w for t in x] == [1, *ids][: len(ids)]
    assert all(len(x) == len(y) <= length for x, y in w)


def test_bits_per_byte_does_not_depend_on_batch_or_order(tok):
    texts = ["abc", "x", "汉字 and more", "z" * 40]
    a = bits_per_byte(small(), tok, texts, length=16, batch=1)
    b = bits_per_byte(small(), tok, texts[::-1] + [""], length=16, batch=3)
    assert a == pytest.approx(b, rel=1e-5)
    assert (a["n_chars"], a["n_bytes"], a["n_tokens"]) == (55, 59, 55)


def test_bits_per_byte_leaves_the_mode_and_refuses_nothing(tok):
    net = small().train()
    bits_per_byte(net, tok, ["abc"])
    assert net.training
    with pytest.raises(StageError, match="no text to measure"):
        bits_per_byte(net, tok, ["", ""])


@pytest.mark.parametrize("experts,top_k", [(4, 1), (4, 4), (7, 2)])
def test_by_expert_equals_the_library(experts, top_k):
    net = small(experts=experts, top_k=top_k)
    x = torch.randint(3, 60, (2, 3))  # few tokens: some experts get none
    net.set_experts_implementation("eager")
    with torch.no_grad():
        want = net(x).logits
        net.set_experts_implementation(use_by_expert())
        assert torch.allclose(net(x).logits, want, atol=1e-6)


def test_by_expert_equals_the_library_for_another_family():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=8,
    )
    net = Qwen3MoeForCausalLM(config).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(3, 60, (2, 3))
    net.set_experts_implementation("eager")
    with torch.no_grad():
        want = net(ids).logits
        net.set_experts_implementation(use_by_expert())
        assert torch.allclose(net(ids).logits, want, atol=1e-6)
        net.model.layers[1].mlp.experts.down_proj[:, 0] += 0.1
        assert not torch.allclose(net(ids).logits, want, atol=1e-3)


@pytest.mark.parametrize("name", EXPERT_MATRICES)
def test_matrices_of_experts_are_where_mixtral_says(saved, name):
    experts = small().model.layers[1].mlp.experts
    files = tensor_files(saved)
    for i in range(experts.num_experts):
        on_disk = load_tensor(files, f"model.layers.1{BLOCK_ON_DISK}experts.{i}.{name}.weight")
        assert torch.equal(on_disk, expert_matrix(experts, i, name))


@pytest.mark.parametrize("block", [1, 5, 12, 100])
def test_head_loss_gradients(block):
    h = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    W = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 30, (12,))
    y[3] = -100
    assert torch.autograd.gradcheck(lambda h, W: head_loss(h, W, y, block), (h, W))


def test_head_loss_of_nothing_is_zero():
    h, W = torch.randn(4, 6, requires_grad=True), torch.randn(30, 6, requires_grad=True)
    loss = head_loss(h, W, torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not h.grad.any()
    assert not W.grad.any()


# base


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    p = tmp_path_factory.mktemp("text") / "en.txt"
    sentence = "the model reads text and learns which word comes next in a line of words"
    words, rng = sentence.split(), random.Random(0)
    p.write_text("\n\n".join(" ".join(rng.choices(words, k=60)) for _ in range(20)))
    return p


TINY = dict(
    hidden=16,
    layers=1,
    intermediate=16,
    heads=2,
    kv_heads=1,
    steps=6,
    batch=2,
    length=32,
    device="cpu",
)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    return base(text, out=tmp_path_factory.mktemp("base") / "b", **TINY)


def test_base_is_a_stock_model(trained):
    net = AutoModelForCausalLM.from_pretrained(trained)
    assert type(net) is MixtralForCausalLM
    assert net.dtype == torch.float32
    assert net.config.vocab_size == 32000
    assert trained.stats["n_params"] == net.num_parameters()
    assert any("block_sparse_moe.experts.0.w1" in n for n in tensor_files(trained.path))
    assert trained.stats["loss_last"] < trained.stats["loss_first"]


def test_base_leaves_no_pickle_and_names_its_tokenizer(trained):
    names = {f.name for f in trained.path.rglob("*")}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "log.jsonl",
        "manifest.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    assert trained.manifest["tokenizer"]


def test_same_seed_same_losses(trained, text, tmp_path):
    again = base(text, out=tmp_path / "again", **TINY, seed=0)
    other = base(text, out=tmp_path / "other", **TINY, seed=1)
    log = (trained / "log.jsonl").read_text()
    assert (again / "log.jsonl").read_text() == log
    assert (other / "log.jsonl").read_text() != log
    assert again.fingerprint == trained.fingerprint


def test_base_lists_all_faults(tmp_path):
    with pytest.raises(StageError) as e:
        base(
            tmp_path / "none.jsonl",
            out=tmp_path / "b",
            **{**TINY, "hidden": 15, "kv_heads": 3, "steps": 0, "length": 1},
            top_k=9,
            tokenizer=tmp_path / "t.model",
        )
    for part in (
        "even number of dimensions",
        "expected a multiple",
        "top_k is 9",
        "steps is 0",
        "length is 1",
        "t.model",
        "none.jsonl",
    ):
        assert part in str(e.value), part
    assert not list(tmp_path.iterdir())


def test_base_names_sizes_that_are_no_sizes(text, tmp_path):
    sizes = dict(heads=0, kv_heads=-1, experts=0, top_k=0, batch=0, lr=0.0)
    with pytest.raises(StageError) as e:
        base(text, out=tmp_path / "b", **{**TINY, **sizes})
    for name in sizes:
        assert any(fault.startswith(f"{name} is ") for fault in e.value.args), name


def test_base_refuses_too_little_text(tmp_path):
    (tmp_path / "t.txt").write_text("one line")
    with pytest.raises(
        StageError, match='gives 0 blocks of 32 tokens in "en", expected at least batch=2; add text'
    ):
        base(tmp_path / "t.txt", out=tmp_path / "b", **TINY)
    assert not (tmp_path / "b").exists()


def test_base_stops_when_the_loss_is_no_number(text, tmp_path):
    with pytest.raises(StageError, match=r"the loss is nan at step \d; lower --lr \(now 1e\+18\)"):
        base(text, out=tmp_path / "b", **{**TINY, "lr": 1e18})
    assert not (tmp_path / "b").exists()
