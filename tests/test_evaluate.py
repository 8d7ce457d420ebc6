"What the chapter on evaluation does not show: broken files, other forms, and lm-eval's own result"
import gzip, io, json, lzma, os, zipfile
from pathlib import Path

import pytest

from cmixtral_nb import evaluate as ev
from cmixtral_nb.artifact import StageError

pytest.importorskip('lm_eval')
GEO = 'ceval-valid_high_school_geography'
HEAD = 'id,question,A,B,C,D,answer'
VAL = ['0,"中国的首都是____，\n请选择。",上海,北京,广州,成都,B', '1,最高的山峰是____。,泰山,黄山,珠穆朗玛峰,华山,C', '2,长江流入____。,东海,"黄海,或渤海",南海,渤海,A']
DEV = ['0,最长的河流是____。,长江,黄河,珠江,淮河,A,解释', '1,地球绕____转。,月亮,太阳,火星,木星,B,解释']


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
    d = tmp_path_factory.mktemp('bench')
    with zipfile.ZipFile(d/'ceval.zip', 'w') as z:
        z.writestr('val/high_school_geography_val.csv', '\ufeff' + '\n'.join([HEAD, *VAL]))
        z.writestr('dev/high_school_geography_dev.csv', '\n'.join([HEAD + ',explanation', *DEV]))
    with zipfile.ZipFile(d/'mmlu.zip', 'w') as z:
        for s in ('test', 'dev'): z.writestr(f'{s}/anatomy_{s}.csv', '"One, two?",1,2,3,4,C\nThree?,a,b,"c, d",e,A\n')
    rows = [dict(ctx='Shoes: A man sits. he', label=1, endings=['runs.', 'ties a shoe.', 'sings.', 'eats.']),
            dict(ctx='Food: How to cook rice. Wash it. you', label=0, endings=['Boil it.', 'Sell it.', 'Paint it.', 'Sing it.'])]
    (d/'hellaswag_val.jsonl.xz').write_bytes(lzma.compress('\n'.join(map(json.dumps, rows)).encode()))
    return d


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    import torch
    from transformers import MixtralForCausalLM
    from cmixtral_nb.mixtral import small_config
    from cmixtral_nb.vocab import base_tokenizer_model, write_tokenizer
    torch.manual_seed(0)
    d = write_tokenizer(base_tokenizer_model('mixtral'), tmp_path_factory.mktemp('model'))
    MixtralForCausalLM(small_config(64, 1, 4, 2, 128, 4, 2, 32000, 1024, 0.)).save_pretrained(d)
    return d


def faults(*a, **kw):
    with pytest.raises(StageError) as e: ev.evaluate(*a, **kw)
    return str(e.value)


def test_rows_keep_quotes_and_lines(bench):
    r = ev.read_rows(bench, GEO)
    assert r['val'][0]['question'] == '中国的首都是____，\n请选择。' and r['val'][2]['B'] == '黄海,或渤海'
    assert r['dev'][0].keys() == r['val'][0].keys()  # datasets wants the same columns
    assert ev.read_rows(bench, 'mmlu_anatomy')['test'] == [dict(question='One, two?', choices=list('1234'), answer=2),
                                                            dict(question='Three?', choices=['a', 'b', 'c, d', 'e'], answer=0)]


def test_an_unpacked_folder_is_as_good(bench, tmp_path):
    zipfile.ZipFile(bench/'ceval.zip').extractall(tmp_path/'ceval')
    assert ev.read_rows(tmp_path, GEO) == ev.read_rows(bench, GEO)


def test_hellaswag_forms(bench, tmp_path):
    a, b = ev.read_rows(bench, 'hellaswag')['validation']
    assert (a['ctx_a'], a['ctx_b']) == ('A man sits.', 'he') and b['ctx_b'] == ''
    (tmp_path/'hellaswag_val.jsonl.gz').write_bytes(gzip.compress(json.dumps(a).encode()))
    (tmp_path/'hellaswag_train.jsonl').write_text(json.dumps(b))
    assert ev.read_rows(tmp_path, 'hellaswag') == dict(validation=[a], train=[b])


def test_every_fault_at_once(bench, tmp_path, model):
    text = faults(tmp_path/'none', tasks='helaswag,cmmlu', data=bench, shots=-1, batch=0, out=tmp_path/'out')
    assert len(text.splitlines()) == 5
    for part in ('shots is -1', 'batch is 0', "unknown task 'helaswag', did you mean 'hellaswag'?", 'cmmlu.zip: no such file', 'none'): assert part in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name,content,want', [
    ('ceval.zip', b'not a zip', 'cannot be read (BadZipFile'),
    ('hellaswag_val.jsonl', b'{"ctx": "a", ', 'cannot be read (JSONDecodeError'),
    ('hellaswag_val.jsonl', b'{"ctx": "a"}', "cannot be read (KeyError: 'endings'"),
    ('hellaswag_val.jsonl', b'', 'has no validation questions'),
    ('hellaswag_val.jsonl.xz', lzma.compress(b'{}')[:-9], 'cannot be read')])
def test_broken_benchmarks(name, content, want, tmp_path, model):
    (tmp_path/name).write_bytes(content)
    text = faults(model, tasks=GEO if 'ceval' in name else 'hellaswag', data=tmp_path, out=tmp_path/'out')
    assert want in text and len(text.splitlines()) == 1


def test_other_requests_that_cannot_be(bench, tmp_path, model, monkeypatch):
    assert 'give their folder with --data' in faults(model, tasks=GEO, out=tmp_path/'o')
    assert 'no such folder' in faults(model, tasks=GEO, data=tmp_path/'no', out=tmp_path/'o')
    assert 'has no adapter_config.json' in faults(model, adapter=bench, out=tmp_path/'o')
    assert '1 other' not in faults(model, tasks='mmlu_virology', data=bench, out=tmp_path/'o')
    assert 'is not a corpus' in faults(model, corpus=bench, out=tmp_path/'o')
    monkeypatch.setattr(ev, 'task_files', dict)
    assert "pip install 'cmixtral_nb[eval]'" in faults(model, tasks='mmlu', data=bench, out=tmp_path/'o')


def test_the_four_benchmarks_have_all_their_tasks():
    files = ev.task_files()
    assert [len(set(ev.leaves(n, files))) for n in ('ceval-valid', 'cmmlu', 'mmlu', 'hellaswag')] == [52, 67, 57, 1]
    assert ev._top(['mmlu', 'mmlu_anatomy', 'mmlu_stem', 'hellaswag']) == ['mmlu', 'hellaswag']


def test_equals_lm_eval_on_a_task_written_by_hand(bench, tmp_path, model):
    "Another YAML, another file format, another model class, loaded by lm-eval itself"
    import yaml
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    rows = ev.read_rows(bench, GEO)
    for s in rows: (tmp_path/f'{s}.jsonl').write_text('\n'.join(json.dumps(r) for r in rows[s]))
    (tmp_path/'t.yaml').write_text(yaml.safe_dump(dict(include=str(ev.task_files()[GEO]), task='theirs', dataset_path='json', dataset_name=None,
        dataset_kwargs=dict(data_files={s: str(tmp_path/f'{s}.jsonl') for s in rows}, cache_dir=str(tmp_path/'cache')))))
    theirs = simple_evaluate(model='hf', model_args=dict(pretrained=str(model), dtype='float32'), device='cpu', tasks=['theirs'], num_fewshot=2,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), log_samples=True, bootstrap_iters=0)
    ours = ev.run_lm_eval(ev.load_model(model, device='cpu'), ev.load_tokenizer(model), [GEO], bench, shots=2, samples=True)
    get = lambda r, t: [x[0][0] for s in r['samples'][t] for x in s['resps']]
    assert get(ours, GEO) == pytest.approx(get(theirs, 'theirs'), abs=1e-4)
    assert ours['results'][GEO]['acc,none'] == theirs['results']['theirs']['acc,none']
    assert [s['arguments'] for s in ours['samples'][GEO]] == [s['arguments'] for s in theirs['samples']['theirs']]


def test_hellaswag_prompt_is_the_published_one(bench, model):
    r = ev.run_lm_eval(ev.load_model(model, device='cpu'), ev.load_tokenizer(model), ['hellaswag'], bench, samples=True)
    first = [s['arguments'] for s in r['samples']['hellaswag']][0]
    assert 'Shoes: A man sits. He' in str(first) and 'ties a shoe.' in str(first)


def test_compare_takes_folders_files_and_dicts(tmp_path):
    a = dict(results=dict(mmlu={'acc,none': .5, 'acc_stderr,none': .1, 'alias': 'mmlu'}, bpb=dict(bits_per_byte_zh=2.)))
    b = dict(mmlu={'acc,none': .25}, hellaswag={'acc,none': 1.})
    (tmp_path/'results.json').write_text(json.dumps(a))
    want = [dict(task='mmlu', metric='acc', base=.5, new=.25, change_new=-.25)]
    assert ev.compare(dict(base=tmp_path, new=b)) == ev.compare(dict(base=a, new=b)) == want


@pytest.mark.skipif('CMIXTRAL_DATA' not in os.environ, reason='CMIXTRAL_DATA is not set')
def test_the_real_files():
    data, files = Path(os.environ.get('CMIXTRAL_DATA', '.'))/'eval', ev.task_files()
    n = lambda name, split: sum(len(ev.read_rows(data, t)[split]) for t in ev.leaves(name, files))
    assert (n('ceval-valid', 'val'), n('cmmlu', 'test'), n('mmlu', 'test'), n('mmlu', 'dev')) == (1346, 11582, 14042, 285)
    rows = ev.read_rows(data, 'hellaswag')['validation']
    assert len(rows) == 10042 and sum(r['ctx_b'] != '' for r in rows) == 3235
    assert not ev._task_faults(['ceval-valid', 'cmmlu', 'mmlu', 'hellaswag'], data)
