"Chat templates of others: within bounds, and without changing what was said"

import threading
import time

import jinja2
import pytest

from cmixtral_nb import templates
from cmixtral_nb.chat_tokenizer import FORMS, chat_tokenizer
from cmixtral_nb.generate import encode_prompt
from cmixtral_nb.pieces import base_tokenizer_model
from cmixtral_nb.stages import StageError
from cmixtral_nb.tokenizer_files import load_tokenizer, write_tokenizer

KNOWN = {  # how the templates of other models begin an utterance, and what they do to its words
    "llama 3": "{{ '<s>' if loop.first }}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}</s>",
    "mistral": "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}",
    "thinking": "[{{ m.role }}]{{ m.content.split('</think>')[-1].lstrip('\\n') }}</s>",
    "zephyr": "<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n",
    "no system": "{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}{% endif %}\n",
}
WORDS = "Grüß <b>Gott</b> & 你好 %s\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(base_tokenizer_model("mixtral"), tmp_path_factory.mktemp("tok"))


@pytest.fixture
def tok(folder):
    return load_tokenizer(folder)


def looped(utterance):
    return "{% for m in messages %}" + utterance + "{% endfor %}"


@pytest.mark.parametrize("name", KNOWN)
def test_templates_that_people_use(tok, name):
    "Rendered as transformers does, with the words of each message in their place"
    tok.chat_template = looped(KNOWN[name])
    talk = [dict(role=role, content="hello") for role in ("system", "user", "assistant", "user")]
    theirs = tok.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert templates.render(tok, talk) == theirs
    talk = [dict(message, content=f"{k} {WORDS}") for k, message in enumerate(talk)]
    theirs = tok.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    text = tok.decode(encode_prompt(tok, talk))
    for words in (f"{k} {WORDS}" for k in (1, 2, 3)):  # with blanks at the end, or as it trims
        assert words.strip() in theirs and (words in text) == (words in theirs)
        assert words.strip() in text
    templates.check_template(tok)


@pytest.mark.parametrize("name", sorted(jinja2.defaults.DEFAULT_FILTERS))
def test_every_filter_keeps_the_words_or_is_refused(tok, name):
    tok.chat_template = looped("[{{ m.content | " + name + " }}]")
    talk = [dict(role="user", content="How MANY  days?")]
    try:
        ids = encode_prompt(tok, talk)
    except StageError as e:
        assert str(e).count("\n") == 0
        assert "chat template does not render this conversation" in str(e)
    else:
        assert "How MANY  days?" in tok.decode(ids)


def test_ours_are_known_to_the_letter(tok):
    for form in FORMS:
        chat_tokenizer(tok, form)
        assert templates.is_ours(tok)
        tok.chat_template += " "
        assert not templates.is_ours(tok)


def test_it_goes_on_after_a_template_that_was_ended():
    renderer = templates.Renderer(seconds=1)
    talk = [dict(role="user", content="hi")]
    fine = looped("{{ m.content }}")
    assert renderer.render(talk, chat_template=fine) == "hi"
    assert renderer.process is not None
    first = renderer.process.pid
    endless = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(StageError, match="takes more than 1 s"):
        renderer.render(talk, chat_template=endless)
    assert renderer.render(talk, chat_template=fine) == "hi"
    assert renderer.process.pid != first
    renderer.process.kill()  # somebody else may end it, too
    renderer.process.wait()
    assert renderer.render(talk, chat_template=fine) == "hi"
    renderer.end()
    assert threading.active_count() < 20


def test_it_ends_with_the_program_that_started_it():
    renderer = templates.Renderer()
    renderer.render([dict(role="user", content="hi")], chat_template="x")
    process = renderer.process
    assert process is not None and process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def test_memory_is_limited_before_a_template_runs():
    renderer = templates.Renderer()
    with pytest.raises(StageError, match="MemoryError|too much memory"):
        renderer.render([], chat_template="{{ ('x' * 3 * 10 ** 9) | length }}")
    start = time.monotonic()
    assert renderer.render([], chat_template="{{ ('x' * 10 ** 8) | length }}") == "100000000"
    assert time.monotonic() - start < 5
    renderer.end()


@pytest.mark.parametrize("message", [{}, dict(role="user"), dict(role=1, content="x"), None, "x"])
def test_messages_that_are_none(tok, message):
    tok.chat_template = looped(KNOWN["mistral"])
    with pytest.raises(StageError, match="expected text as role and as content"):
        encode_prompt(tok, [message])


@pytest.mark.parametrize("content", [None, 5, ["x"], [dict(type="text", text="x")], {}])
def test_content_that_is_no_string(tok, content):
    tok.chat_template = looped(KNOWN["mistral"])
    with pytest.raises(StageError, match="expected text as role and as content"):
        encode_prompt(tok, [dict(role="user", content=content)])
