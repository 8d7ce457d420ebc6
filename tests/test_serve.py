"Engines and serving, beyond the appendices: refusals, engines that read otherwise, absent things"

import json
import os
import shutil
import socket
import sys
from pathlib import Path
from threading import Thread
from types import SimpleNamespace as Name
from unittest.mock import patch

import pytest

from cmixtral_nb import engines as v
from cmixtral_nb import serve
from cmixtral_nb.adapters import save_adapter
from cmixtral_nb.byte_bases import LETTER_OF, ByteBase, to_letters, write_byte_tokenizer
from cmixtral_nb.bytelevel import Merge, OwnBytes, extended, own_characters, repaired
from cmixtral_nb.chat_tokenizer import chat_template, form_of, write_chat_tokenizer
from cmixtral_nb.experts import METHOD
from cmixtral_nb.generate import encode_prompt
from cmixtral_nb.llama_rules import (
    RULES,
    model_rule,
    rule_prices,
    rule_texts,
    rule_tokenizer,
)
from cmixtral_nb.loading import load_model
from cmixtral_nb.options import faults_of
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.qlora import add_lora
from cmixtral_nb.restack import restack
from cmixtral_nb.stages import StageError, read_json
from cmixtral_nb.tokenizer_files import load_tokenizer, write_tokenizer
from cmixtral_nb.vllm_adapters import vllm_faults


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    import torch
    from transformers import MixtralForCausalLM

    from cmixtral_nb.mixtral import small_config

    torch.manual_seed(0)
    d = write_tokenizer(base_tokenizer_model("mixtral"), tmp_path_factory.mktemp("plain"))
    out = tmp_path_factory.mktemp("chat")
    MixtralForCausalLM(small_config(32, 1, 4, 2, 64, 2, 1, 32003, 256, 0.02)).save_pretrained(out)
    write_chat_tokenizer(d, out)
    return out


@pytest.fixture(scope="module")
def tok(chat):
    return load_tokenizer(chat)


def reads(tok, answers=(), change=lambda ids: ids):
    "An engine that makes our ids, or changed ones"

    def ask(to, model, talks, n=0, *rest):
        ids = [change(encode_prompt(tok, talk)) for talk in talks]
        return dict(version="1", ids=ids, answers=[list(answers)] * len(talks) if n else [])

    return ask


@pytest.fixture(scope="module")
def penalised(chat, tok, tmp_path_factory):
    "The same model, whose generation_config.json has a say in what it writes"
    model = shutil.copytree(chat, tmp_path_factory.mktemp("penalised") / "m")
    (said,) = v.our_answers(chat, tok, v.check_talks(tok)[:1], 4)
    settings = read_json(model / "generation_config.json")
    settings |= dict(repetition_penalty=5.0, suppress_tokens=said)
    (model / "generation_config.json").write_text(json.dumps(settings))
    return model


def test_transformers_alone_makes_our_ids_and_answers(chat, tok, penalised):
    "The one engine that is always here, in a process that has nothing of this package"
    talks = v.check_talks(tok)
    got = v.ask_engine("hf", penalised, talks, 4)
    r = v.compare(tok, talks, got, v.our_answers(chat, tok, talks, 4))
    assert (r["ids_equal"], r["ids_of"], r["obeys"], r["answers_equal"]) == (8, 8, False, 1.0)
    for form in v.ENGINES:
        imports = [
            line
            for line in v.probe_file(form).read_text(encoding="utf-8").splitlines()
            if line.strip().startswith(("import ", "from "))
        ]
        assert imports and not any("cmixtral" in line for line in imports)


def test_settings_of_a_model_do_not_make_it_differ(chat, tok, penalised):
    "What generation_config.json adds is no fault of the files, and vLLM is asked without it"
    talks = v.check_talks(tok)[:1]
    assert v.our_answers(penalised, tok, talks, 6) == v.our_answers(chat, tok, talks, 6)


def test_an_answer_has_to_end(chat, tmp_path):
    model = shutil.copytree(chat, tmp_path / "m")
    config = read_json(model / "tokenizer_config.json")
    config["eos_token"] = None
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "special_tokens_map.json").unlink()
    assert faults_of(v.check_model, model, "hf") == []  # another file names it
    for name in ("generation_config.json", "config.json"):
        named = dict(read_json(model / name), eos_token_id=None)
        (model / name).write_text(json.dumps(named))
    (fault,) = faults_of(v.check_model, model, "hf")
    assert "names no token that ends an answer; give it as eos_token" in fault


LLAMA_CPP = """
__version__ = "0.1"


class Llama:
    metadata = {"tokenizer.chat_template": "{{ messages }}"}

    def __init__(self, model, n_ctx, verbose, seed):
        assert (n_ctx, verbose, seed) == (64, False, 0)

    def create_chat_completion(self, talk):  # as its handler does: render, tokenize, complete
        ids = [1, *map(ord, talk[-1]["content"])]
        self.create_completion(prompt=ids, temperature=0.2)
        raise AssertionError("it went on to write")

    def generate(self, ids, temp, repeat_penalty):
        assert (temp, repeat_penalty) == (0, 1)
        yield from range(ids[-1], 0, -1)

    def token_eos(self):
        return 97
"""

VLLM = """
from types import SimpleNamespace as Result

__version__ = "0.2"


def SamplingParams(temperature, max_tokens):
    assert temperature == 0
    return max_tokens


class LLM:
    def __init__(self, model, dtype, max_model_len, enforce_eager, seed):
        assert (max_model_len, enforce_eager, seed) == (64, True, 0)
        self.dtype = dtype

    def chat(self, talks, max_tokens, use_tqdm):
        assert self.dtype == ("auto" if max_tokens == 1 else "float32")
        ids = [[1, *map(ord, talk[-1]["content"])] for talk in talks]
        said = [list(range(i[-1], 0, -1))[:max_tokens] for i in ids]
        return [
            Result(prompt_token_ids=tuple(i), outputs=[Result(token_ids=tuple(a))])
            for i, a in zip(ids, said)
        ]
"""


@pytest.mark.parametrize(
    "form,name,source,version,answers",
    [
        ("gguf", "llama_cpp", LLAMA_CPP, "0.1", [[98, 97], [122, 121, 120]]),
        ("vllm", "vllm", VLLM, "0.2", [[98, 97, 96], [122, 121, 120]]),
    ],
)
def test_what_a_probe_tells(tmp_path, monkeypatch, form, name, source, version, answers):
    "Each probe, run with a module that has the engine's interface: ids, answers, and only if asked"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert v.has_engine(sys.executable, name)
    talks = [[dict(role="user", content=words)] for words in ("ab", "yz")]
    ids = [[1, 97, 98], [1, 121, 122]]
    told = v.ask_engine(form, tmp_path, talks, 0, length=64)
    assert told == dict(version=version, ids=ids, answers=[])
    told = v.ask_engine(form, tmp_path, talks, 3, length=64)
    assert told == dict(version=version, ids=ids, answers=answers)


def test_four_bits_are_made_by_the_other_python(chat, tmp_path):
    "q4_k_m: 16 bits by the converter, then the quantiser of the Python that has llama.cpp"
    converter = tmp_path / v.CONVERTER
    converter.write_text(
        "import sys\ndef main(): open(sys.argv[-1], 'w').write(' '.join(sys.argv[1:4]))"
    )
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        "assert sys.argv[1].endswith('quantise_gguf.py')\nshutil.copy(*sys.argv[2:])\n"
    )
    python.chmod(0o755)
    for outtype, first in (("q4_k_m", "f16"), ("q8_0", "q8_0")):
        out = tmp_path / f"{outtype}.gguf"
        v.to_gguf(chat, out, converter, outtype, str(python))
        assert out.read_text() == f"{chat} --outtype {first}"
    assert len(list(tmp_path.glob("*.gguf"))) == 2


def test_the_attack_holds_every_control_token(tok):
    attack = v.check_talks(tok)[-1][-1]["content"]
    assert (
        all(t.content in attack for t in tok.added_tokens_decoder.values())
        and len(v.check_talks(tok)) == 9
    )


def test_differences_are_found(tok):
    talks = v.check_talks(tok)
    ours = [[5, 6, 7, 8]] * 9
    same = reads(tok, [5, 6, 9, 8])(None, None, talks, 4)
    assert v.compare(tok, talks, same, ours)["answers_equal"] == 0.75
    shorter = reads(tok, [5, 6])(None, None, talks, 4)
    assert v.compare(tok, talks, shorter, ours)["answers_equal"] == 0.5
    begun_twice = reads(tok, change=lambda i: [1, *i])(None, None, talks)
    assert v.compare(tok, talks, begun_twice, None)["ids_equal"] == 0
    pasted = tok.apply_chat_template(
        talks[-1],
        chat_template=chat_template(form_of(tok), []),
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    assert v.compare(tok, talks, dict(same, ids=[*same["ids"][:-1], pasted]))["obeys"]


def test_an_export_that_is_read_otherwise_does_not_exist(chat, tok, tmp_path):
    with (
        patch.object(v, "has_engine", lambda *a: True),
        patch.object(v, "ask_engine", reads(tok, change=lambda i: i[1:])),
        pytest.raises(
            StageError,
            match="vllm makes other ids of 8 of 8 conversations; its tokenizer files disagree",
        ),
    ):
        v.export(chat, out=tmp_path / "o", to="vllm")
    with (
        patch.object(v, "has_engine", lambda *a: True),
        patch.object(v, "ask_engine", reads(tok, [7])),
        pytest.raises(
            StageError,
            match=r"answers of vllm agree in \d+% of the tokens, expected 98%; "
            r"they end with <\|endofutterance\|>: "
            "see that generation_config.json names its id, 32000",
        ),
    ):
        v.export(chat, out=tmp_path / "o", to="vllm")
    assert not list(tmp_path.iterdir())


def test_a_template_that_obeys_is_reported(chat, tok, tmp_path, capsys):
    def obeys(*args):
        got = reads(tok)(*args)
        return dict(got, ids=[*got["ids"][:-1], [1, 2]])

    with patch.object(v, "ask_engine", obeys):
        a = v.export(chat, out=tmp_path / "o", check="ids")
    assert a.stats["obeys"]
    said = capsys.readouterr().out
    assert "warning: words of users become control tokens in transformers" in said


def test_weights_are_linked_and_manifests_stay(chat, tmp_path):
    (tmp_path / "m").mkdir()
    for f in chat.iterdir():
        (tmp_path / "m" / f.name).write_bytes(f.read_bytes())
    (tmp_path / "m" / "manifest.json").write_text("{}")
    (one := tmp_path / "a").mkdir()
    (two := tmp_path / "b").mkdir()
    v.link_model(tmp_path / "m", one)
    with patch.object(os, "link", side_effect=OSError):
        v.link_model(tmp_path / "m", two)

    def names(folder):
        return sorted(file.name for file in folder.iterdir())

    def is_linked(folder, name):
        return os.path.samefile(folder / name, tmp_path / "m" / name)

    assert names(one) == names(two) == names(chat)
    assert is_linked(one, "model.safetensors") and not is_linked(two, "model.safetensors")
    assert not is_linked(one, "config.json")


def test_weights_of_a_hub_folder_are_linked_not_its_links(chat, tmp_path):
    "The hub's cache keeps a model as relative links to files elsewhere"
    for folder in ("blobs", "snapshot", "out"):
        (tmp_path / folder).mkdir()
    for file in chat.iterdir():
        (tmp_path / "blobs" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    v.link_model(tmp_path / "snapshot", tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    weights = "model.safetensors"
    assert os.path.samefile(tmp_path / "out" / weights, tmp_path / "blobs" / weights)


def test_every_fault_at_once(cli, chat, tmp_path):
    status, err = cli(
        "export",
        "--model",
        tmp_path / "none",
        "--to",
        "x",
        "--outtype",
        "q3",
        "--check",
        "all",
        "--n-tokens",
        0,
        "--out",
        tmp_path / "o",
    )
    assert status == 2 and len(err) == 5
    for part in (
        "to is 'x', expected hf, vllm or gguf",
        "outtype is 'q3'",
        "check is 'all'",
        "n_tokens is 0",
        "none",
    ):
        assert any(part in e for e in err), part
    status, err = cli(
        "export",
        "--model",
        chat,
        "--to",
        "gguf",
        "--llama-cpp",
        tmp_path,
        "--python",
        tmp_path / "python",
        "--out",
        tmp_path / "o",
    )
    assert (
        status == 2
        and len(err) == 2
        and "has no llama_cpp; run: pip install" in err[0]
        and "holds no convert_hf_to_gguf.py; run: pip download" in err[1]
    )
    assert not list(tmp_path.iterdir())


def copy(chat, to, **files):
    to.mkdir()
    for f in chat.iterdir():
        (to / f.name).symlink_to(f)
    for name, text in files.items():
        (to / name.replace("__", ".")).unlink(missing_ok=True)
        if text is not None:
            (to / name.replace("__", ".")).write_text(text)
    return to


@pytest.mark.parametrize(
    "files,says",
    [
        (dict(chat_template__jinja=None), "has no chat template; run: cmixtral sft"),
        (
            dict(chat_template__jinja="{{ messages["),
            "the chat template does not render this conversation",
        ),
        (
            dict(chat_template__jinja="{{ raise_exception('never') }}"),
            "does not render this conversation (never)",
        ),
        (dict(adapter_config__json="{}"), "is an adapter, expected a model; run: cmixtral merge"),
    ],
)
def test_models_that_cannot_be_served(cli, chat, tmp_path, files, says):
    m = copy(chat, tmp_path / "m", **files)
    status, err = cli("export", "--model", m, "--out", tmp_path / "o")
    assert status == 2 and len(err) == 1 and says in err[0], err
    if "adapter" not in says:
        with patch.object(v, "has_engine", lambda *a: True), pytest.raises(StageError) as e:
            serve.serve(m, port=port())
        assert len(e.value.args) == 1 and says in str(e.value)


def test_four_bits_are_for_transformers(chat, tmp_path):
    config = json.loads((chat / "config.json").read_text()) | dict(
        quantization_config=dict(quant_method="bitsandbytes")
    )
    model = copy(chat, tmp_path / "m", config__json=json.dumps(config))
    assert faults_of(v.check_model, model, "hf") == []
    assert (
        "is stored in 4 bits, expected the merged model"
        in faults_of(v.check_model, model, "vllm")[0]
    )


def test_experts_in_four_bits_are_for_this_package(chat, tmp_path):
    "transformers alone would not know what `nf4_experts` is"
    config = read_json(chat / "config.json") | dict(quantization_config=dict(quant_method=METHOD))
    model = copy(chat, tmp_path / "m", config__json=json.dumps(config))
    for to in ("hf", "vllm", "gguf"):
        (fault,) = faults_of(v.check_model, model, to)
        assert "which this package alone reads, expected the merged model" in fault
    stored = read_json(chat / "config.json") | dict(quantization_config=dict(quant_method="mxfp4"))
    model = copy(chat, tmp_path / "gpt", config__json=json.dumps(stored))
    assert faults_of(v.check_model, model, "vllm") == []  # which has kernels for it


def test_an_adapter_is_served_beside_its_model(cli, chat, tmp_path):
    "vLLM is told of it only in the form in which it would find the experts"
    net = load_model(chat, dtype="float32", trainable=True, device="cpu")
    save_adapter(add_lora(net, rank=20, rows="none"), tmp_path / "ours")
    (fault,) = vllm_faults(tmp_path / "ours", chat)
    left_out = "mlp.experts.0.w1.lora_A.weight and 23 more"
    assert left_out in fault and fault.endswith("--form files")
    restack(tmp_path / "ours", chat, out=tmp_path / "files", form="files")
    restack(tmp_path / "ours", chat, out=tmp_path / "stacked", form="stacked")
    for form, rank in (("files", "32"), ("stacked", "64")):  # gate and up are one matrix of 40
        assert vllm_faults(tmp_path / form, chat) == []
        words = serve.serve_command(chat, name="zh", python="py", adapter=tmp_path / form)
        assert words[words.index("--served-model-name") + 1] == "zh-base"
        assert words[words.index("--max-lora-rank") + 1] == rank
        module = json.loads(words[words.index("--lora-modules") + 1])
        is_stacked = form == "stacked"
        assert module.pop("is_3d_lora_weight", False) == is_stacked
        assert ("--enable-mixed-moe-lora-format" in words) == is_stacked
        assert module == dict(name="zh", path=str(tmp_path / form))
    net = load_model(chat, dtype="float32", trainable=True, device="cpu")
    save_adapter(add_lora(net, rank=4, rows="new", n_old=32000), tmp_path / "rows")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for model, adapter, says in (
        (chat, "rows", "vLLM takes LoRA alone; run: cmixtral merge"),
        (chat, "ours", left_out),
        (chat, "none", "none does not exist"),
        (tmp_path / "a.gguf", "ours", "an adapter is served by vLLM; run: cmixtral merge"),
    ):
        asked = ["--model", model, "--adapter", tmp_path / adapter]
        status, err = cli("serve", *asked, "--port", port(), "--python", tmp_path)
        assert status == 2 and any(says in line for line in err), err


def test_a_converter_that_fails(chat, tmp_path):
    c = tmp_path / "convert_hf_to_gguf.py"
    c.write_text(
        "import sys\n"
        "print('loading', file=sys.stderr)\n"
        "sys.exit('NotImplementedError: no such model')\n"
    )
    assert v.find_converter(tmp_path) == v.find_converter(c) == c
    with pytest.raises(
        StageError, match=r"cannot be converted \(NotImplementedError: no such model\)"
    ):
        v.to_gguf(chat, tmp_path / "a.gguf", c, "f32", sys.executable)
    with (
        patch.object(v, "has_engine", lambda *a: True),
        pytest.raises(StageError, match="cannot be converted"),
    ):
        v.export(chat, out=tmp_path / "o", to="gguf", llama_cpp=tmp_path)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.tmp").exists()


def test_an_engine_that_cannot_load(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text("raise SystemExit('ValueError: what is this?')")
    with (
        patch.object(v, "probe_file", lambda form: probe),
        pytest.raises(
            StageError, match=r"transformers cannot load it \(ValueError: what is this\?\)"
        ),
    ):
        v.ask_engine("hf", tmp_path, [])
    assert not v.has_engine(str(tmp_path / "python"), "json")
    assert v.has_engine(sys.executable, "json")
    assert not v.has_engine(sys.executable, "no_such_package")


def test_a_folder_is_no_engine(tmp_path, monkeypatch):
    "`--python vllm/bin/python` is typed where the folder `vllm` is"
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not v.has_engine(sys.executable, "no_such_package")


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_what_keeps_a_server_from_starting(cli, chat, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        status, err = cli(
            "serve",
            "--model",
            tmp_path / "none.gguf",
            "--port",
            s.getsockname()[1],
            "--python",
            tmp_path / "python",
            "--context",
            -1,
        )
    assert status == 2 and len(err) == 4, err
    for part in (
        "of 127.0.0.1 is in use; take another with --port",
        "none.gguf: no such file; run: cmixtral export --to gguf",
        "has no llama_cpp",
        "context is -1",
    ):
        assert any(part in e for e in err), part
    status, err = cli("serve", "--model", tmp_path, "--port", 70000)
    assert (
        status == 2
        and any("port is 70000" in e for e in err)
        and any("neither config.json nor a GGUF file; run: cmixtral export" in e for e in err)
    )
    (tmp_path / "a.gguf").write_bytes(b"PK")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        StageError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\), expected one; name the file"
    ):
        serve.served_model(tmp_path)
    with pytest.raises(StageError, match="a.gguf is no GGUF file"):
        serve.served_model(tmp_path / "a.gguf")
    probe = tmp_path / "probe.py"
    probe.write_text("assert 0, 'no chat template in the file'")
    with (
        patch.object(v, "has_engine", lambda *a: True),
        patch.object(v, "probe_file", lambda form: probe),
        pytest.raises(
            StageError,
            match=r"llama_cpp cannot load it "
            r"\(AssertionError: no chat template in the file\); run: cmixtral export",
        ),
    ):
        serve.serve(tmp_path / "b.gguf", port=port())


def test_the_engines_command_runs_and_its_end_is_told(chat, tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport sys\nsys.exit(3 if '--max-model-len' in sys.argv else 0)\n"
    )
    python.chmod(0o755)
    with patch.object(v, "has_engine", lambda *a: True):
        serve.serve(chat, port=(p := port()), name="x", python=str(python))
        assert capsys.readouterr().out.splitlines() == [
            f"serve: {python} -m vllm.entrypoints.openai.api_server --model {chat} "
            f"--served-model-name x --host 127.0.0.1 --port {p}",
            f"serve: OpenAI-compatible at http://127.0.0.1:{p}/v1, model x",
        ]
        with pytest.raises(StageError, match="vllm ended with exit status 3"):
            serve.serve(chat, port=port(), context=64, python=str(python))
    words = serve.serve_command(Path("a.gguf"), python="py")
    assert words[:3] == ["py", "-m", "llama_cpp.server"]
    assert words[-2:] == ["--interrupt_requests", "False"]
    assert words[words.index("--n_ctx") + 1] == "0"


needs_llama_cpp = pytest.mark.skipif(
    not os.environ.get("LLAMA_CPP_PYTHON"),
    reason="LLAMA_CPP_PYTHON names no Python with llama_cpp, LLAMA_CPP no source of llama.cpp",
)


def exported_to_llama_cpp(model, out):
    "A GGUF of a model, checked by llama.cpp itself"
    return v.export(
        model,
        out=out,
        to="gguf",
        outtype="f32",
        llama_cpp=os.environ["LLAMA_CPP"],
        python=os.environ["LLAMA_CPP_PYTHON"],
        n_tokens=4,
    )


@needs_llama_cpp
def test_llama_cpp_reads_what_we_write(chat, tmp_path):
    a = exported_to_llama_cpp(chat, tmp_path / "o")
    assert a.stats["ids_equal"] == 8 and not a.stats["obeys"] and a.stats["answers_equal"] >= 0.98


# ---- byte-level tokenizers


LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|mid|>{{ m.content | trim }}"
    "<|end|>{% endfor %}<|start|>assistant<|mid|>"
)
TOKENS = ["<bos>", "<|start|>", "<|mid|>", "<|end|>"]
KA = "ក".encode()
THAI = "วั".encode()[2:4]  # the end of a letter and the beginning of what follows it


def byte_config():
    "Bytes, two digits, parts of two Thai characters; cut as Qwen's"
    letters = {letter: i for i, letter in enumerate(LETTER_OF.values())}
    cut = dict(
        type="Split",
        pattern={"Regex": RULES["qwen2"].cuts[0]},
        behavior="Isolated",
        invert=False,
    )
    to_bytes = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return dict(
        version="1.0",
        added_tokens=[dict(id=258 + i, content=name, **flags) for i, name in enumerate(TOKENS)],
        normalizer=dict(type="NFC"),
        pre_tokenizer=dict(type="Sequence", pretokenizers=[cut, to_bytes]),
        decoder=to_bytes,
        model=dict(
            type="BPE",
            vocab=letters | {"12": 256, to_letters(THAI): 257},
            merges=[["1", "2"], [to_letters(THAI[:1]), to_letters(THAI[1:])]],
        ),
    )


@pytest.fixture(scope="module")
def byte_chat(tmp_path_factory):
    "A chat model of Llama's kind whose byte-level tokenizer was extended"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("byte_chat")
    merges = [Merge(KA[:1], KA[1:2], 9), Merge(KA[:2], KA[2:], 9)]
    made = extended(ByteBase(byte_config()), merges)
    write_byte_tokenizer(made, out)
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            dict(
                tokenizer_class="PreTrainedTokenizerFast",
                bos_token="<bos>",
                eos_token="<|end|>",
                chat_template=LLAMA_3,
            )
        )
    )
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=258,
        eos_token_id=261,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    return out


def test_a_byte_level_model_is_exported(byte_chat, tmp_path, capsys):
    "By transformers alone: the same ids, blanks trimmed as the template does"
    a = v.export(byte_chat, out=tmp_path / "o", check="ids")
    assert (a.stats["ids_equal"], a.stats["ids_of"], a.stats["obeys"]) == (8, 8, True)
    assert faults_of(v.check_model, byte_chat, "vllm") == []
    assert serve.served_model(byte_chat) == byte_chat
    assert not (tmp_path / "o" / "tokenizer.model").exists()


def stand_in(config, rule):
    "llama.cpp as it would read a file with this rule: no normalisation, and its own cut"

    def ask(probe, asked, python):
        tok = rule_tokenizer({**config, "normalizer": None}, RULES[rule])
        return dict(ids=[e.ids for e in tok.encode_batch(asked["texts"])])

    return ask


def test_the_rule_is_written_and_what_was_written_is_read_back(byte_chat, tmp_path, capsys):
    "The converter is told the rule's name; ids that llama.cpp makes otherwise are refused"
    converter = tmp_path / v.CONVERTER
    converter.write_text(
        "import sys\n"
        "class TextModel:\n"
        "    def get_vocab_base_pre(self, tokenizer): raise NotImplementedError\n"
        "def main():\n"
        "    rule = TextModel().get_vocab_base_pre(None)\n"
        "    open(sys.argv[-1], 'w').write(rule)\n"
    )
    config = read_json(byte_chat / "tokenizer.json")
    tok = load_tokenizer(byte_chat)
    how = dict(to="gguf", outtype="f32", llama_cpp=tmp_path, check="ids")
    with (
        patch.object(v, "has_engine", lambda *a: True),
        patch.object(v, "ask_engine", reads(tok)),
    ):
        with patch.object(v, "_ask", stand_in(config, "qwen2")):
            a = v.export(byte_chat, out=tmp_path / "o", **how)
        with (
            patch.object(v, "_ask", stand_in(config, "gpt-2")),
            pytest.raises(StageError, match=r"makes other ids of \d+ of \d+ texts than its rule"),
        ):
            v.export(byte_chat, out=tmp_path / "p", **how)
    assert (a.path / "chat-f32.gguf").read_text() == "qwen2" == a.stats["pre"]
    assert a.stats["pre_changes"] == 0 and a.stats["ids_read_back"] > 400
    assert "does not normalise text" in capsys.readouterr().out
    assert not (tmp_path / "p").exists()
    converter.write_text("def main(): pass")
    with pytest.raises(StageError, match="has no get_vocab_base_pre, so that its rule"):
        v.to_gguf(byte_chat, tmp_path / "a.gguf", converter, "f32", sys.executable, "qwen2")


def test_each_rule_is_found_by_trying():
    texts = rule_texts(byte_config())
    texts = texts[:80] + texts[80::12]
    for name, rule in RULES.items():
        first, second, *_ = rule_prices(telling_config(name), texts)
        assert (first.rule, first.n_changed, first.n_cut) == (name, 0, 0)
        assert second.n_cut or RULES[second.rule].cuts == rule.cuts


def telling_config(name):
    "The tokenizer of `byte_config` with the cut of a rule"
    config = byte_config()
    splits = [
        dict(type="Split", pattern={"Regex": cut}, behavior="Isolated", invert=False)
        for cut in RULES[name].cuts
    ]
    letters = config["pre_tokenizer"]["pretokenizers"][-1]
    config["pre_tokenizer"] = dict(type="Sequence", pretokenizers=[*splits, letters])
    config["model"]["ignore_merges"] = RULES[name].ignore_merges
    return config


def test_a_repaired_rule_has_a_price(cli, byte_chat, tmp_path):
    "Own marks join their letters: no rule of llama.cpp does that, and the nearest is named"
    base = ByteBase(byte_config())
    own = OwnBytes(own_characters("Khmer"))
    # a letter with its mark, in one pre-token only where marks are repaired
    word = "កា".encode()
    merges = [Merge(word[:i], word[i : i + 1], 9) for i in range(1, len(word))]
    mended = repaired(base, own)
    assert mended is not None
    theirs = extended(mended, merges)
    shutil.copytree(byte_chat, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(theirs.config))
    (tmp_path / v.CONVERTER).write_text("")
    args = ["--to", "gguf", "--llama-cpp", tmp_path, "--check", "none", "--out", tmp_path / "o"]
    status, err = cli("export", "--model", tmp_path / "m", *args)
    assert status == 2 and len(err) == 1, err
    assert "cuts words by a rule that llama.cpp does not have, the nearest is " in err[0]
    assert "characters per token, own rule" in err[0] and "accept that with --pre" in err[0]
    status, err = cli("export", "--model", tmp_path / "m", *args, "--pre", "qwen")
    assert status == 2 and "--pre is 'qwen', did you mean 'qwen2'?" in err[0]
    near, far = (model_rule(tmp_path / "m", rule) for rule in ("qwen35", "qwen2"))
    assert near is not None and far is not None
    assert near.rule == "qwen35"
    assert far.n_changed > near.n_changed > 0  # qwen2 loses all marks


def test_gguf_of_other_kinds_of_tokenizer(chat, byte_chat, tmp_path):
    "sentencepiece needs no name; what is neither is one line"
    assert model_rule(chat) is None
    with pytest.raises(StageError, match="has a tokenizer.model; leave --pre out"):
        model_rule(chat, "qwen2")
    spaced = byte_config()
    spaced["pre_tokenizer"] = dict(type="Metaspace")
    (tmp_path / "tokenizer.json").write_text(json.dumps(spaced))
    with pytest.raises(StageError, match="neither byte-level BPE nor beside a tokenizer.model"):
        model_rule(tmp_path)


@needs_llama_cpp
def test_llama_cpp_reads_a_byte_level_model(byte_chat, tmp_path):
    a = exported_to_llama_cpp(byte_chat, tmp_path / "o")
    assert a.stats["ids_equal"] == 8 and a.stats["pre"] == "qwen2"
    assert a.stats["ids_read_back"] > 400 and a.stats["answers_equal"] >= 0.98


def test_what_keeps_the_page_from_opening(cli):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with patch.object(serve, "has_engine", lambda *a: False):
            status, err = cli(
                "page", "--url", f"http://127.0.0.1:{port()}/v1", "--port", s.getsockname()[1]
            )
    assert status == 2 and len(err) == 4, err
    for part in (
        'has no gradio; run: pip install "cmixtral_nb[serve]"',
        "has no openai",
        "is in use; take another with --port",
        "no server answers at",
    ):
        assert any(part in e for e in err), part
    assert err[-1].endswith("run: cmixtral serve")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:80a/v1", "http://127.0.0.1:{port}/v1", "nothing", "http://[::1/v1"]
)
def test_what_speaks_no_http_is_no_server(url):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()

        def greet():
            caller, _ = s.accept()
            with caller:
                caller.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                caller.recv(1000)

        Thread(target=greet, daemon=True).start()
        faults = serve._page_faults(
            url.format(port=s.getsockname()[1]), "127.0.0.1", port(), temperature=1, top_p=1
        )
    assert "no server answers at" in faults[-1] and faults[-1].endswith("run: cmixtral serve")


def test_the_page_sends_what_every_server_takes():
    talk = serve.page_talk(
        [
            dict(role="user", content="q"),
            dict(
                role="assistant", content=[dict(type="text", text="a"), dict(type="text", text="b")]
            ),
            dict(role="user", content="lost"),
        ],
        "m",
        "s",
    )
    assert talk == [
        dict(role="system", content="s"),
        dict(role="user", content="q"),
        dict(role="assistant", content="a\nb"),
        dict(role="user", content="m"),
    ]


@pytest.fixture
def gradio(monkeypatch):
    "Stand-ins for gradio and openai; holds what the page did with them"
    seen: dict = {}

    class Error(Exception):
        pass

    class OpenAIError(Exception):
        pass

    class ChatInterface:
        def __init__(self, answer, title):
            seen.update(answer=answer, title=title)

        def launch(self, **options):
            seen["launch"] = options

    def create(messages, **options):
        seen["asked"] = dict(options, messages=messages)
        if messages[-1]["content"] == "fail":
            raise OpenAIError("too long")
        for text in ("你", None, "好"):
            yield Name(choices=[Name(delta=Name(content=text))])
        yield Name(choices=[])  # some servers close with the usage

    def client(**options):
        seen["client"] = options
        return Name(chat=Name(completions=Name(create=create)))

    monkeypatch.setitem(sys.modules, "gradio", Name(ChatInterface=ChatInterface, Error=Error))
    monkeypatch.setitem(sys.modules, "openai", Name(OpenAI=client, OpenAIError=OpenAIError))
    monkeypatch.setattr(serve, "_page_faults", lambda *args, **options: [])
    return Name(seen=seen, Error=Error)


def test_the_page_writes_as_the_server_does(gradio):
    serve.page("http://there/v1", "x", system="s", temperature=0, top_p=0.5, port=7000)
    seen = gradio.seen
    assert seen["client"]["base_url"] == "http://there/v1" and seen["title"] == "x"
    assert (seen["launch"]["server_name"], seen["launch"]["server_port"]) == ("127.0.0.1", 7000)
    assert list(seen["answer"]("q", [])) == ["你", "你", "你好"]
    asked = seen["asked"]
    assert asked["messages"] == serve.page_talk([], "q", "s")
    del asked["messages"]
    assert asked == dict(model="x", stream=True, temperature=0, top_p=0.5)
    with pytest.raises(gradio.Error, match="too long"):
        list(seen["answer"]("fail", []))
