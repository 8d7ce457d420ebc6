"10_merge: adapters of every form against peft, what is refused, resuming"
import errno, json, math, shutil, sys
from collections import namedtuple

import pytest, torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from cmixtral_nb.artifact import StageError, fingerprint, input_fingerprint, read_json, write_json
from cmixtral_nb.merge import *
from cmixtral_nb.mixtral import *
from cmixtral_nb.qlora import add_lora, load_model, save_adapter

module = sys.modules['cmixtral_nb.merge']
V = 40

def small(**kw):
    torch.manual_seed(0)
    return MixtralForCausalLM(small_config(**{**dict(hidden=64, layers=2, intermediate=96, heads=2, kv_heads=1, vocab_size=V), **kw}))

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    p = tmp_path_factory.mktemp('m')/'model'
    small().save_pretrained(p)
    return p

@pytest.fixture
def model(saved, tmp_path): return shutil.copytree(saved, tmp_path/'model')

def shake(net):
    "Untrained LoRA changes nothing: give it values"
    torch.manual_seed(1)
    for p in net.parameters():
        if p.requires_grad: p.data += torch.randn_like(p) * .05
    return net

def make_adapter(model, out, rows='all', grow=0, **kw):
    net = load_model(model, trainable=True, device='cpu')
    if grow: net.resize_token_embeddings(V + grow, mean_resizing=False)
    save_adapter(shake(add_lora(net, rank=4, alpha=8, rows=rows, n_old=V - 10, **kw)), out)
    return out

@pytest.fixture
def adapter(model, tmp_path): return make_adapter(model, tmp_path/'adapter', rows='none')

def tensors(p): return {plain_name(n): load_tensor(f, n) for f in [tensor_files(p)] for n in f}
def logits(net): return net.eval()(input_ids=torch.arange(20)[None], use_cache=False).logits.detach()
def edit(adapter, f):
    p = adapter/'adapter_model.safetensors'
    t = load_file(p); t = f(t) or t; save_file({k: v.contiguous() for k, v in t.items()}, p)
def configure(adapter, **kw): write_json(adapter/'adapter_config.json', dict(read_json(adapter/'adapter_config.json'), **kw))
def run(model, adapter, tmp_path, name='out', **kw): return merge(model, adapter, out=tmp_path/name, check=False, device='cpu', **kw)

# parity

@pytest.mark.parametrize('rows,grow', [('none', 0), ('all', 0), ('new', 0), ('all', 3)])
def test_merged_answers_as_model_and_adapter(model, tmp_path, rows, grow):
    a = make_adapter(model, tmp_path/'a', rows, grow)
    m = run(model, a, tmp_path, into='original')
    got = AutoModelForCausalLM.from_pretrained(m.path)
    assert type(got) is MixtralForCausalLM and got.config.vocab_size == V + grow == m.stats['n_rows']
    want = logits(load_model(model, adapter=a, device='cpu'))
    assert torch.allclose(logits(got), want, atol=1e-5) and not torch.allclose(want[..., :V], logits(small()), atol=1e-2)

def test_old_names_of_experts(model, adapter, tmp_path):
    want = tensors(run(model, adapter, tmp_path, 'a').path)
    edit(adapter, lambda t: {k.replace('.mlp.', '.block_sparse_moe.'): v for k, v in t.items()})
    got = tensors(run(model, adapter, tmp_path, 'b').path)
    assert all(torch.equal(want[k], got[k]) for k in want)

@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    p = tmp_path/'llama'
    LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                 num_attention_heads=2, num_key_value_heads=1)).save_pretrained(p)
    return p

@pytest.mark.parametrize('kw', [dict(), dict(use_rslora=True), dict(rank_pattern={'q_proj': 2, 'layers.1.mlp.up_proj': 7}),
    dict(alpha_pattern={'v_proj': 32}), dict(modules_to_save=['lm_head']), dict(trainable_token_indices={'embed_tokens': [3, 7]})], ids=str)
def test_same_bits_as_peft(llama, tmp_path, kw):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=['q_proj', 'v_proj', 'up_proj', 'down_proj'], **kw)
    net = shake(get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config))
    net.save_pretrained(tmp_path/'a')
    got = tensors(run(llama, tmp_path/'a', tmp_path, into='original').path)
    want = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path/'a').merge_and_unload().state_dict()
    assert max((got[k] - want[k]).abs().max().item() for k in got) < 1e-7 and got.keys() == want.keys()

def test_bfloat16_is_rounded_once(llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(llama).bfloat16().save_pretrained(llama)
    net = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    shake(get_peft_model(net, LoraConfig(r=4, lora_alpha=6, target_modules=['q_proj']))).save_pretrained(tmp_path/'a')
    W, t = tensors(llama), load_file(tmp_path/'a'/'adapter_model.safetensors')
    got = tensors(run(llama, tmp_path/'a', tmp_path, into='original').path)
    name = 'model.layers.0.self_attn.q_proj'
    A, B = (t[f'base_model.model.{name}.lora_{x}.weight'].double() for x in 'AB')
    assert torch.equal(got[name + '.weight'], (W[name + '.weight'].double() + 1.5 * B @ A).float().bfloat16())
    assert all(torch.equal(got[k], W[k]) for k in W if 'q_proj' not in k)

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_nf4_is_bitwise_what_training_used(saved, dtype):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    import bitsandbytes as bnb
    W = tensors(saved)['model.layers.1.mlp.experts.2.w2.weight']
    layer = Linear4bit(*W.shape[::-1], bias=False, compress_statistics=True, quant_type='nf4')
    layer.weight = bnb.nn.Params4bit(W.to(getattr(torch, dtype)), requires_grad=False, compress_statistics=True, quant_type='nf4')
    layer.to('cpu')
    if layer.weight.quant_state is None: layer.weight._quantize('cpu')
    want = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    got = nf4_roundtrip(W, dtype)
    assert got.dtype == want.dtype == getattr(torch, dtype) and torch.equal(got, want) and not torch.equal(got.float(), W)

def test_manifest_says_what_was_in_4_bits(model, adapter, tmp_path):
    name = 'model.layers.0.mlp.experts.1.w1'
    write_json(adapter/'manifest.json', dict(kind='adapter', files={}, fingerprint='x', inputs={}, stats=dict(quantised=[name], quantised_dtype='float32')))
    m = run(model, adapter, tmp_path)
    plain = run(model, adapter, tmp_path, 'o', into='original')
    assert m.stats['n_dequantised'] == 1
    a, b = tensors(m.path), tensors(plain.path)
    assert [k for k in a if not torch.equal(a[k], b[k])] == [name + '.weight']
    write_json(adapter/'manifest.json', dict(kind='adapter', files={}, fingerprint='y', inputs={}, stats=dict(quantised=[])))
    assert run(model, adapter, tmp_path, 'p').stats['n_dequantised'] == 0

def test_adapter_without_manifest_was_in_4_bits_everywhere(model, adapter, tmp_path):
    m = run(model, adapter, tmp_path)
    assert m.stats['n_dequantised'] == 2 * (4 + 4 * 3) == m.stats['n_lora']
    a, b = tensors(m.path), tensors(model)
    assert all(torch.equal(a[k], b[k]) for k in ('lm_head.weight', 'model.embed_tokens.weight', 'model.layers.0.mlp.gate.weight', 'model.norm.weight'))

def test_tied_model_with_a_head_of_its_own(llama, tmp_path):
    config = read_json(llama/'config.json'); write_json(llama/'config.json', dict(config, tie_word_embeddings=True))
    t = load_file(llama/'model.safetensors'); del t['lm_head.weight']; save_file(t, llama/'model.safetensors', metadata={'format': 'pt'})
    (tmp_path/'a').mkdir(); head = torch.randn(V, 16)
    save_file({'base_model.model.lm_head.weight': head}, tmp_path/'a'/'adapter_model.safetensors')
    write_json(tmp_path/'a'/'adapter_config.json', dict(peft_type='LORA', r=4, lora_alpha=8))
    m = run(llama, tmp_path/'a', tmp_path, into='original')
    net = AutoModelForCausalLM.from_pretrained(m.path)
    assert torch.equal(net.lm_head.weight, head) and torch.equal(net.model.embed_tokens.weight, t['model.embed_tokens.weight'])

def test_tokenizer_of_the_adapter_wins(model, tmp_path):
    a = make_adapter(model, tmp_path/'a', 'all', 3)
    (model/'tokenizer.json').write_text('{"old": 1}')
    assert (run(model, a, tmp_path, 'x')/'tokenizer.json').read_text() == '{"old": 1}'
    (a/'tokenizer.json').write_text('{"new": 1}'); (a/'chat_template.jinja').write_text('hi')
    m = run(model, a, tmp_path, 'y')
    assert (m/'tokenizer.json').read_text() == '{"new": 1}' and (m/'chat_template.jinja').read_text() == 'hi'

# shards and resuming

def test_shards_do_not_change_the_result(model, adapter, tmp_path):
    one, many = run(model, adapter, tmp_path, 'one'), run(model, adapter, tmp_path, 'many', shard_bytes=50_000)
    assert many.stats['shards'] > 3 and one.stats['shards'] == 1
    a, b = tensors(one.path), tensors(many.path)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    index = read_json(many/INDEX)
    assert index['metadata']['total_size'] == sum(t.numel() * t.element_size() for t in a.values())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(one.path)), logits(AutoModelForCausalLM.from_pretrained(many.path)))

def test_a_half_written_shard_is_written_again(model, adapter, tmp_path, monkeypatch):
    write, n = write_tensors, []
    def dying(path, *a):
        n.append(path.name)
        if len(n) == 3: raise KeyboardInterrupt
        write(path, *a)
    monkeypatch.setattr(module, 'write_tensors', dying)
    with pytest.raises(KeyboardInterrupt): run(model, adapter, tmp_path, shard_bytes=50_000)
    half = tmp_path/'out.tmp'/n[0]; half.write_bytes(half.read_bytes()[:-9])  # as a lost page leaves it
    done, n[:] = n[1], [0] * 9
    monkeypatch.setattr(module, 'write_tensors', lambda path, *a: (n.append(path.name), write(path, *a)))
    m = run(model, adapter, tmp_path, shard_bytes=50_000)
    assert half.name in n and done not in n
    monkeypatch.undo()
    want = run(model, adapter, tmp_path, 'whole', shard_bytes=50_000)
    assert m.fingerprint == want.fingerprint

# what it refuses, before anything is written

@pytest.fixture
def refuses(tmp_path):
    def check(match, model, adapter, **kw):
        with pytest.raises(StageError, match=match) as e: merge(model, adapter, out=tmp_path/'no', device='cpu', **{'check': False, **kw})
        assert not (tmp_path/'no').exists() and not (tmp_path/'no.tmp').exists()
        return e.value.args
    return check

def test_refused_paths(refuses, model, adapter, tmp_path):
    refuses("into is 'both', expected dequantised or original", model, adapter, into='both')
    refuses('shard_bytes is 0', model, adapter, shard_bytes=0)
    faults = refuses('none1 does not exist; expected a PEFT adapter; run: cmixtral pretrain', tmp_path/'none2', tmp_path/'none1')
    assert len(faults) == 2 and 'none2 does not exist' in faults[1]
    refuses('is not an adapter: it has no adapter_config.json', model, model)

def test_pickled_truncated_and_missing_weights(refuses, model, adapter):
    f = adapter/'adapter_model.safetensors'; whole = f.read_bytes()
    f.write_bytes(whole[:-1]); refuses('is truncated', model, adapter)
    f.unlink(); refuses('adapter_model.safetensors is missing', model, adapter)
    (adapter/'adapter_model.bin').write_bytes(b'\x80\x04'); refuses('adapter_model.bin is a pickle, which can run any code', model, adapter)

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_nan_in_the_adapter(refuses, model, adapter, bad):
    edit(adapter, lambda t: next(iter(t.values())).view(-1).__setitem__(3, bad))
    refuses('holds NaN or infinity; train it again', model, adapter)

def test_nan_in_the_model(refuses, model, adapter):
    t = load_file(model/'model.safetensors'); t['model.norm.weight'][0] = math.nan; save_file(t, model/'model.safetensors', metadata={'format': 'pt'})
    refuses('model.norm.weight holds NaN or infinity', model, adapter)

def test_adapter_of_another_model(refuses, model, adapter, tmp_path):
    small(intermediate=80).save_pretrained(tmp_path/'narrow')
    faults = refuses(r'LoRA of model.layers.0.mlp.experts.0.w1.weight makes \[96, 64\], the model has \[80, 64\]', tmp_path/'narrow', adapter)
    assert len(faults) == 5 and 'more faults' in faults[-1]
    small(layers=1).save_pretrained(tmp_path/'short')
    refuses('the model has no model.layers.1', tmp_path/'short', adapter)
    small(hidden=64, aux_loss=.5).save_pretrained(tmp_path/'same')
    write_json(adapter/'manifest.json', dict(kind='adapter', files={}, fingerprint='x', stats={}, inputs={'model': {'fingerprint': 'abc'}}))
    refuses(f'was trained on model abc, found {input_fingerprint(tmp_path/"same")}', tmp_path/'same', adapter)

def test_adapters_that_are_no_plain_lora(refuses, model, adapter):
    configure(adapter, use_dora=True, peft_type='VERA', lora_bias=True)
    faults = refuses('is a VERA adapter, expected LORA', model, adapter)
    assert 'DoRA' in faults[1] and 'biases' in faults[2]
    configure(adapter, use_dora=False, peft_type='LORA', lora_bias=False)
    edit(adapter, lambda t: t | {'base_model.model.model.embed_tokens.lora_embedding_A': torch.zeros(4, V)})
    refuses('1 tensors that are no LoRA of a linear layer, such as .*lora_embedding_A', model, adapter)

def test_half_a_pair_and_wrong_ranks(refuses, model, adapter):
    key = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
    edit(adapter, lambda t: t.update({key: t[key][:2]}))
    refuses('LoRA of model.layers.0.self_attn.q_proj.weight makes', model, adapter)
    edit(adapter, lambda t: t.pop(key) is None or t)
    refuses('q_proj.weight has only lora_B', model, adapter)

def test_rows_that_do_not_agree(refuses, model, tmp_path):
    a = make_adapter(model, tmp_path/'a', 'all', 3); head = 'base_model.model.lm_head.weight'
    edit(a, lambda t: t.update({head: t[head][:V]}))
    refuses('embedding and head have different numbers of rows', model, a)
    edit(a, lambda t: {k: v for k, v in t.items() if k != head})
    refuses('embedding and head have different numbers of rows', model, a)
    edit(a, lambda t: t | {head: torch.zeros(V - 1, 64)})
    refuses(r'lm_head.weight is \[39, 64\], the model has \[40, 64\]', model, a)

def test_model_stored_in_4_bits(refuses, model, adapter):
    t = load_file(model/'model.safetensors'); t['model.layers.0.self_attn.q_proj.weight.absmax'] = torch.zeros(3)
    save_file(t, model/'model.safetensors', metadata={'format': 'pt'})
    refuses('is stored in 4 bits .*; give the model it was made from', model, adapter)

def test_full_disk_is_seen_first(refuses, model, adapter, monkeypatch):
    usage = namedtuple('usage', 'total used free')(100, 99, 1000)
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda p: usage)
    refuses('the merged model needs .* MB, 0 MB are free; free some, or choose another --out', model, adapter)

def test_check_notices_a_wrong_merge(refuses, model, tmp_path, monkeypatch):
    from test_init import OLD, write_tok
    small(vocab_size=len(OLD)).save_pretrained(model); write_tok(model, OLD)
    a = make_adapter(model, tmp_path/'a', 'none')
    m = merge(model, a, out=tmp_path/'ok', into='original', device='cpu')
    assert m.stats['logit_difference'] < 1e-5
    monkeypatch.setattr(module, 'merge_weight', lambda W, A, B, scale, dtype='': W + B @ A * scale * 1.1)
    refuses('logits of the merged model differ by .*%', model, a, into='original', check=True)
