"06_init: checkpoints of other shapes, what is linked, what is refused"
import os, shutil

import pytest, torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from cmixtral_nb.artifact import Artifact, StageError, input_fingerprint, read_json, write_json
from cmixtral_nb.corpus import corpus
from cmixtral_nb.init import *
from cmixtral_nb.mixtral import *

OLD = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), '▁', *'abc中国大']
NEW = ['中国', '中国大', '龙']

def write_tok(path, vocab):
    merges = [(a, b) for t in vocab if len(t) > 1 and t[0] != '<' for a, b in [(t[:-1], t[-1])]]
    t = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(vocab)}, merges=merges, unk_token='<unk>', byte_fallback=True, fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    t.add_special_tokens(['<unk>', '<s>', '</s>'])
    path.mkdir(exist_ok=True); t.save(str(path/'tokenizer.json'))
    write_json(path/'tokenizer_config.json', dict(tokenizer_class='PreTrainedTokenizerFast', bos_token='<s>', eos_token='</s>', unk_token='<unk>'))
    return path

@pytest.fixture
def tok(tmp_path): return write_tok(tmp_path/'tok', OLD + NEW)

@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    p = write_tok(tmp_path/'model', OLD)
    net = MixtralForCausalLM(small_config(hidden=16, layers=2, intermediate=24, heads=2, kv_heads=1, vocab_size=len(OLD))).bfloat16()
    net.save_pretrained(p, max_shard_size='20KB')
    return p

def all_tensors(p): return {n: load_tensor(f, n) for f in [tensor_files(p)] for n in f}

def test_rows_by_hand(model, tok, tmp_path):
    a = init(model, tok, out=tmp_path/'out')
    was, now = all_tensors(model), all_tensors(a.path)
    ids = {p: i for i, p in enumerate(OLD)}
    spelled = [[ids['中'], ids['国']], [ids['中'], ids['国'], ids['大']], [ids[f'<0x{b:02X}>'] for b in '龙'.encode()]]
    for n in ('model.embed_tokens.weight', 'lm_head.weight'):
        want = torch.stack([was[n][s].float().mean(0).bfloat16() for s in spelled])
        assert torch.equal(now[n], torch.cat([was[n], want]))
    assert all(torch.equal(was[n], now[n]) for n in was if 'layers' in n)
    assert (a.stats['n_old'], a.stats['n_new'], a.stats['n_rows']) == (len(OLD), 3, len(OLD) + 3)

def test_transformers_loads_the_result(model, tok, tmp_path):
    a = init(model, tok, out=tmp_path/'out')
    net, info = AutoModelForCausalLM.from_pretrained(a.path, output_loading_info=True)
    assert net.config.vocab_size == net.get_input_embeddings().weight.shape[0] == len(OLD) + 3
    assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']

def test_index_and_fingerprint_of_the_tokenizer(model, tok, tmp_path):
    a = init(model, tok, out=tmp_path/'out')
    index = read_json(a/INDEX)
    assert index['metadata']['total_size'] == sum(t.numel() * t.element_size() for t in all_tensors(a.path).values())
    assert index['metadata']['total_parameters'] == sum(t.numel() for t in all_tensors(a.path).values())
    assert index['weight_map'].keys() == read_json(model/INDEX)['weight_map'].keys()
    from cmixtral_nb.artifact import tokenizer_fingerprint
    assert a.manifest['tokenizer'] == tokenizer_fingerprint(tok) != tokenizer_fingerprint(model)

def test_source_is_untouched_and_most_shards_are_links(model, tok, tmp_path):
    before = input_fingerprint(model)
    a = init(model, tok, out=tmp_path/'out')
    same = [f.name for f in model.glob('*.safetensors') if os.path.samefile(f, a/f.name)]
    holds_rows = {tensor_files(model)[n].name for n in ('model.embed_tokens.weight', 'lm_head.weight')}
    assert set(same) == {f.name for f in model.glob('*.safetensors')} - holds_rows and same
    assert input_fingerprint(model) == before

def test_copies_where_links_are_impossible(model, tok, tmp_path, monkeypatch):
    def no(*a): raise OSError('cross-device link')
    monkeypatch.setattr(os, 'link', no)
    a = init(model, tok, out=tmp_path/'out')
    assert not any(os.path.samefile(f, a/f.name) for f in model.glob('*.safetensors'))
    assert resolve_model(a.path)

def test_tied_model(tok, tmp_path):
    p = write_tok(tmp_path/'tied', OLD)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(OLD), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=2, tie_word_embeddings=True)).save_pretrained(p)
    a = init(p, tok, out=tmp_path/'out')
    net = AutoModelForCausalLM.from_pretrained(a.path)
    assert net.lm_head.weight is net.model.embed_tokens.weight and len(net.lm_head.weight) == len(OLD) + 3

@pytest.mark.parametrize('padding', [1, 3, 10])
def test_rows_that_padded_the_matrix_give_way(tok, tmp_path, padding):
    p = write_tok(tmp_path/'padded', OLD)
    MixtralForCausalLM(small_config(hidden=8, layers=1, intermediate=8, heads=2, kv_heads=1, vocab_size=len(OLD) + padding)).save_pretrained(p)
    a = init(p, tok, out=tmp_path/'out')
    n = max(len(OLD) + padding, len(OLD) + 3)
    assert a.stats['n_rows'] == n == AutoModelForCausalLM.from_pretrained(a.path).lm_head.weight.shape[0]

def test_methods_and_seed(model, tok, tmp_path):
    a, b, c = (init(model, tok, out=tmp_path/f'n{i}', method='normal', seed=s) for i, s in enumerate((1, 1, 2)))
    assert a.fingerprint == b.fingerprint != c.fingerprint

@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=6))
def test_mean_rows_lie_between_their_parts(spellings):
    W = torch.arange(50.).view(10, 5)
    R = new_rows(W, spellings)
    for r, s in zip(R, spellings, strict=True): assert (r >= W[s].amin(0) - 1e-4).all() and (r <= W[s].amax(0) + 1e-4).all()

# what it refuses; nothing is written

@pytest.fixture
def refuses(tmp_path):
    def check(match, *a, **kw):
        with pytest.raises(StageError, match=match) as e: init(*a, **kw, out=tmp_path/'no')
        assert not (tmp_path/'no').exists() and not (tmp_path/'no.tmp').exists() and 'Traceback' not in str(e.value)
    return check

def test_refused_inputs(refuses, model, tok, tmp_path):
    refuses("method 'best' is unknown, expected one of mean, seed, first, asymmetric, average, normal", model, tok, method='best')
    refuses('none does not exist; expected a tokenizer; run: cmixtral vocab --out', model, tmp_path/'none')
    refuses('none does not exist; expected an HF model folder', tmp_path/'none', tok)
    refuses('holds no tokenizer.json', model, (tmp_path/'empty').mkdir() or tmp_path/'empty')
    refuses('has no token that .* lacks, expected an extended tokenizer; run: cmixtral vocab', model, model)
    refuses('does not extend the tokenizer of .*: the first 266 tokens differ; run: cmixtral vocab', model, write_tok(tmp_path/'x', OLD[::-1] + NEW))

def test_model_without_its_tokenizer(refuses, model, tok):
    (model/'tokenizer.json').unlink()
    refuses('holds no tokenizer.json', model, tok)

def test_fewer_rows_than_tokens(refuses, model, tok, tmp_path):
    write_tok(model, OLD + ['国大'])
    refuses('has 266 rows for 267 tokens', model, write_tok(tmp_path/'y', OLD + ['国大'] + NEW))

def test_truncated_shard(refuses, model, tok):
    s = sorted(model.glob('*.safetensors'))[0]
    s.write_bytes(s.read_bytes()[:-1])
    refuses('is truncated', model, tok)

def test_full_disk(refuses, model, tok, monkeypatch):
    import errno
    import sys
    def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(sys.modules['cmixtral_nb.init'], 'write_tensors', full)
    refuses('no space left on device', model, tok)

# the probe

def test_methods_are_ranked_by_the_mean_of_the_languages():
    rows = [dict(method=m, seed=s, en=e, zh=z) for m, s, e, z in (('a', 0, 1., 4.), ('a', 1, 2., 4.), ('b', 0, 1., 3.), ('b', 1, 1., 3.))]
    first, second = rank_methods(rows)
    assert first == dict(method='b', mean=2., spread=0., en=1., zh=3.)
    assert (second['method'], second['mean'], second['en']) == ('a', 2.75, 1.5) and abs(second['spread'] - .5**.5 / 2) < 1e-12

def test_the_probe_decides(model, tok, tmp_path):
    c = corpus(['zh=builtin:zh', 'en=builtin:en'], out=tmp_path/'c', limit_chars=150_000, valid_share=.3)
    a = init(model, tok, out=tmp_path/'probed', probe=c.path, steps=2, seeds=2)
    ranked = a.stats['probe']
    assert a.stats['method'] == ranked[0]['method'] and [r['mean'] for r in ranked] == sorted(r['mean'] for r in ranked)
    assert {r['method'] for r in ranked} == set(METHODS) and len((a/'probe.tsv').read_text().splitlines()) == 1 + 2 * len(METHODS)
    b = init(model, tok, out=tmp_path/'plain', method=a.stats['method'])
    assert all(torch.equal(x, y) for x, y in zip(all_tensors(a.path).values(), all_tensors(b.path).values(), strict=True))

def test_a_probe_needs_held_out_text(refuses, model, tok, tmp_path):
    (tmp_path/'a.txt').write_text('no corpus')
    refuses('is no corpus, expected one with held-out text; run: cmixtral corpus', model, tok, probe=tmp_path/'a.txt')

def test_a_brief_training_lowers_the_loss(model):
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    x = torch.randint(3, len(OLD), (4, 16), generator=torch.Generator().manual_seed(0))
    before = net(input_ids=x, labels=x).loss.item()
    train_briefly(net, x, steps=20, lr=1e-2)
    assert net(input_ids=x, labels=x).loss.item() < before - .5
