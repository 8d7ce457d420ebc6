"What the chapter 07_pack does not show: faults in the request, large ids, workers, exact shares"
import json
from fractions import Fraction
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from cmixtral_nb.artifact import Artifact, StageError
from cmixtral_nb.pack import RowWriter, collate, encoded, finish_rows, load_rows, pack, parse_mix, positions, rows, share, valid_texts
from cmixtral_nb.vocab import base_tokenizer_model, write_tokenizer


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    d = tmp_path_factory.mktemp('pack')
    (d/'tok').mkdir(); write_tokenizer(base_tokenizer_model('mixtral'), d/'tok')
    lines = [json.dumps({'text': f'{i} 号文章，<s>讲词表</s>。' * (1 + i % 5)}, ensure_ascii=False) for i in range(300)]
    (d/'zh.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    return d


def naive(docs, length, bos, eos):
    flat = sum([[bos, *d, eos] for d in docs], [])
    return [flat[i:i+length] for i in range(0, len(flat) - length + 1, length)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(3, 60_000), max_size=40), max_size=30), st.integers(2, 50), st.integers(1, 5))
def test_rows_equal_naive(docs, length, block):
    got = [r.tolist() for b in rows(docs, length, 1, 2, block=block) for r in b]
    assert got == naive(docs, length, 1, 2)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 200), st.integers(1, 400), st.integers(0, 7))
def test_share_is_exact(n, hundredths, seed):
    got = list(share(lambda: range(n), hundredths / 100, seed))
    assert abs(len(got) - Fraction(hundredths, 100) * n) < 1
    most = max((got.count(i) for i in range(n)), default=0)
    assert most <= -(-hundredths // 100) and set(got) <= set(range(n))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from([1, 2, 7, 9]), min_size=6, max_size=6), min_size=1, max_size=4))
def test_positions_by_hand(ids):
    for row, got in zip(ids, positions(np.array(ids), 1)):
        p = -1; want = []
        for t in row: p = 0 if t == 1 else p + 1; want.append(p)
        assert got.tolist() == want


def test_collate_masks_only_starts():
    b = collate([{'input_ids': [1, 5, 2, 1, 6, 2]}], bos=1)
    assert b['labels'].tolist() == [[-100, 5, 2, -100, 6, 2]] and b['position_ids'].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert 'attention_mask' not in b


def test_large_ids_and_shards(tmp_path):
    w = RowWriter(tmp_path/'train', 4, 'uint32', shard_rows=3)
    for k in range(4): w.write(np.full((2, 4), 70_000 + k, 'uint32'), k)
    finish_rows(w, 'key')
    from datasets import load_from_disk
    ds = load_from_disk(str(tmp_path/'train'))
    assert len(w.files) == 3 and ds['input_ids'][:] == [[70_000 + k] * 4 for k in range(4) for _ in range(2)]
    assert ds['source'][:] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_text_never_becomes_control(here, tmp_path):
    a = pack(here/'zh.jsonl', here/'tok', tmp_path/'t', mix=['zh'], length=32, valid_share=.1)
    ids = np.stack(load_rows(a).with_format('numpy')[:]['input_ids'])
    n_docs = a.stats['sources']['zh']['n_docs']
    assert n_docs - 1 <= (ids == 1).sum() <= n_docs and n_docs - 1 <= (ids == 2).sum() <= n_docs
    assert a.stats['dtype'] == 'uint16' and a.manifest['tokenizer'] and len(valid_texts(a, 'zh')) == a.stats['sources']['zh']['n_valid']
    assert len(valid_texts(a, 'zh', limit_chars=1)) == 1


def test_workers_change_nothing(here):
    texts = [json.loads(l)['text'] * 400 for l in (here/'zh.jsonl').read_text(encoding='utf-8').splitlines()[:12]]
    from cmixtral_nb import pack as module
    assert len(list(module.text_batches(texts, 20_000))) > 2
    old = module.text_batches.__defaults__
    try:
        module.text_batches.__defaults__ = (20_000,)
        assert list(encoded(texts, here/'tok', workers=2)) == list(encoded(texts, here/'tok'))
    finally: module.text_batches.__defaults__ = old


@pytest.mark.parametrize('mix, words', [([], 'mix is empty'), (['0:zh'], 'above 0'), (['x:zh'], 'RATIO:LANG'), (['1:'], 'RATIO:LANG'),
                                        (['nan:zh'], 'above 0'), (['1:zh', '.5:zh'], 'mix names zh twice; give one ratio, such as 1.5:zh')])
def test_bad_mix(mix, words):
    with pytest.raises(StageError, match=words): parse_mix(mix)


def test_faults_come_together_and_leave_nothing(here, tmp_path):
    with pytest.raises(StageError) as e: pack(tmp_path/'none.jsonl', here, tmp_path/'t', mix=['zh'], length=3)
    assert [w for w in ('neither a corpus nor a text file', 'length is 3', 'holds no tokenizer.json') if w not in str(e.value)] == []
    assert len(e.value.args) == 3 and not list(tmp_path.iterdir())


def test_not_tokens(here):
    with pytest.raises(StageError, match='no manifest.json'): load_rows(here)
    with pytest.raises(StageError, match='expected a tokens'): Artifact.load(here/'nothing', 'tokens')
