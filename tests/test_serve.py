"What the chapter on serving does not show: refusals, engines that read otherwise, things that are not there"

import json
import os
import socket
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from cmixtral_nb import engines as v
from cmixtral_nb import serve
from cmixtral_nb.generate import encode_prompt
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.sft import chat_template, form_of, write_chat_tokenizer
from cmixtral_nb.stages import StageError
from cmixtral_nb.tokenizer_files import load_tokenizer, write_tokenizer


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
    return lambda to, model, talks, n=0, *a: dict(
        version="1",
        ids=[change(encode_prompt(tok, t)) for t in talks],
        answers=[list(answers)] * len(talks) if n else [],
    )


def test_transformers_alone_makes_our_ids_and_answers(chat, tok):
    "The one engine that is always here, in a process that has nothing of this package"
    talks = v.check_talks(tok)
    got = v.ask_engine("hf", chat, talks, 4)
    r = v.compare(tok, talks, got, v.our_answers(chat, tok, talks, 4))
    assert (r["ids_equal"], r["ids_of"], r["obeys"], r["answers_equal"]) == (8, 8, False, 1.0)
    assert "cmixtral" not in v.PROBES["hf"] + v.PROBES["vllm"] + v.PROBES["gguf"]


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
    assert (
        v.compare(tok, talks, reads(tok, [5, 6])(None, None, talks, 4), ours)["answers_equal"]
        == 0.5
    )
    assert (
        v.compare(tok, talks, reads(tok, change=lambda i: [1, *i])(None, None, talks), None)[
            "ids_equal"
        ]
        == 0
    )
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
    ):
        with pytest.raises(
            StageError,
            match=r"answers of vllm agree in \d+% of the tokens, expected 98%; they end with <\|endofutterance\|>: see that generation_config.json names its id, 32000",
        ):
            v.export(chat, out=tmp_path / "o", to="vllm")
    assert not list(tmp_path.iterdir())


def test_a_template_that_obeys_is_reported(chat, tok, tmp_path, capsys):
    with patch.object(
        v,
        "ask_engine",
        lambda *a: (got := reads(tok)(*a)) and dict(got, ids=[*got["ids"][:-1], [1, 2]]),
    ):
        a = v.export(chat, out=tmp_path / "o", check="ids")
    assert (
        a.stats["obeys"]
        and "warning: words of users become control tokens in transformers"
        in capsys.readouterr().out
    )


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
    names = lambda d: sorted(p.name for p in d.iterdir())
    assert names(one) == names(two) == names(chat)
    inode = lambda d, n: (d / n).stat().st_ino
    assert inode(one, "model.safetensors") == inode(tmp_path / "m", "model.safetensors") != inode(
        two, "model.safetensors"
    ) and inode(one, "config.json") != inode(tmp_path / "m", "config.json")


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
        "to is 'x', expected hf, vllm, gguf",
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
    assert (
        v._model_faults(m := copy(chat, tmp_path / "m", config__json=json.dumps(config)), "hf")
        == []
    )
    assert "is stored in 4 bits, expected the merged model" in v._model_faults(m, "vllm")[0]


def test_a_converter_that_fails(chat, tmp_path):
    c = tmp_path / "convert_hf_to_gguf.py"
    c.write_text(
        "import sys; print('loading', file=sys.stderr); sys.exit('NotImplementedError: no such model')"
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
    with (
        patch.dict(v.PROBES, hf="raise SystemExit('ValueError: what is this?')"),
        pytest.raises(
            StageError, match=r"transformers cannot load it \(ValueError: what is this\?\)"
        ),
    ):
        v.ask_engine("hf", tmp_path, [])
    assert (
        not v.has_engine(str(tmp_path / "python"), "json")
        and v.has_engine(sys.executable, "json")
        and not v.has_engine(sys.executable, "no_such_package")
    )


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
        serve._served(tmp_path)
    with pytest.raises(StageError, match="a.gguf is no GGUF file"):
        serve._served(tmp_path / "a.gguf")
    with (
        patch.object(v, "has_engine", lambda *a: True),
        patch.dict(v.PROBES, gguf="assert 0, 'no chat template in the file'"),
    ):
        with pytest.raises(
            StageError,
            match=r"llama_cpp cannot load it \(AssertionError: no chat template in the file\); run: cmixtral export",
        ):
            serve.serve(tmp_path / "b.gguf", port=port())


def test_the_engines_command_runs_and_its_end_is_told(chat, tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport sys; sys.exit(3 if '--max-model-len' in sys.argv else 0)"
    )
    python.chmod(0o755)
    with patch.object(v, "has_engine", lambda *a: True):
        serve.serve(chat, port=(p := port()), name="x", python=str(python))
        assert capsys.readouterr().out.splitlines() == [
            f"serve: {python} -m vllm.entrypoints.openai.api_server --model {chat} --served-model-name x --host 127.0.0.1 --port {p}",
            f"serve: OpenAI-compatible at http://127.0.0.1:{p}/v1, model x",
        ]
        with pytest.raises(StageError, match="vllm ended with exit status 3"):
            serve.serve(chat, port=port(), context=64, python=str(python))
    words = serve.serve_command(Path("a.gguf"), python="py")
    assert (
        words[:3] == ["py", "-m", "llama_cpp.server"]
        and words[-2:] == ["--interrupt_requests", "False"]
        and words[words.index("--n_ctx") + 1] == "0"
    )


@pytest.mark.skipif(
    not os.environ.get("LLAMA_CPP_PYTHON"),
    reason="LLAMA_CPP_PYTHON names no Python with llama_cpp, LLAMA_CPP no source with the converter",
)
def test_llama_cpp_reads_what_we_write(chat, tmp_path):
    a = v.export(
        chat,
        out=tmp_path / "o",
        to="gguf",
        outtype="f32",
        llama_cpp=os.environ["LLAMA_CPP"],
        python=os.environ["LLAMA_CPP_PYTHON"],
        n_tokens=4,
    )
    assert a.stats["ids_equal"] == 8 and not a.stats["obeys"] and a.stats["answers_equal"] >= 0.98


def test_what_keeps_the_page_from_opening(cli):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with patch.object(v, "has_engine", lambda *a: False):
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
