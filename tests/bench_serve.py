"""By hand: a chat model that stops, can't be hijacked, and answers the same in every engine.

    python tests/bench_serve.py stop MODEL
        100 held-out prompts: how many answers end by themselves
    python tests/bench_serve.py dropout MODEL
        what BPE-dropout at 0.1 does to the tokens of the shipped conversations
    python tests/bench_serve.py ids MODEL ENGINE FILE PYTHON
        200 conversations: the same ids, and the same greedy answers in float32
    python tests/bench_serve.py hostile MODEL ENGINE FILE PYTHON [N]
        10,000 hostile messages: control tokens that the template did not write
    python tests/bench_serve.py rule MODEL RULE FILE PYTHON [N]
        a byte-level model: 10,000 strings, llama.cpp's ids against those of its rule, and ours
    python tests/bench_serve.py server MODEL FILE PYTHON
        `cmixtral serve` and the real openai client, 16 requests at once for a minute
    python tests/bench_serve.py speed BEFORE AFTER GGUF_BEFORE GGUF_AFTER PYTHON [CORPUS]
        Chinese characters a second, old and new vocabulary, same sizes; held-out text of CORPUS

MODEL, BEFORE and AFTER are model folders; ENGINE is hf, vllm or gguf; FILE is what the engine
reads (a folder, or a GGUF file in f32); PYTHON has the engine. DATA=shared/data in the environment
adds real conversations to those that ship.
"""

import contextlib
import itertools
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmixtral_nb.certificate import hostile_texts
from cmixtral_nb.chat_tokenizer import form_of
from cmixtral_nb.conversations import read_conversations, translations
from cmixtral_nb.corpora import corpus_texts
from cmixtral_nb.efficiency import writing_seconds
from cmixtral_nb.engines import ask_engine, ask_ids, our_answers
from cmixtral_nb.generate import encode_prompt, generate_text
from cmixtral_nb.llama_rules import (
    RULES,
    byte_level_config,
    last_pieces,
    rule_texts,
    rule_tokenizer,
)
from cmixtral_nb.loading import load_model
from cmixtral_nb.sft import dropout_encoder, encode_chat, load_bpe
from cmixtral_nb.tokenizer_files import encode_plain, load_tokenizer, processor

MARKS = ("<s>", "</s>", "<unk>", "<pad>", "<|")
N_ANSWER = 24  # tokens of an answer that is compared


def real_talks(n, rng):
    "Up to n conversations of each file in DATA; of translated ones the English question too"
    talks = []
    data = Path(os.environ.get("DATA", "/nowhere")) / "sft"
    for file in sorted(data.glob("*.xz")):
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in itertools.islice(lines, 1500)]
        for row in rng.sample(rows, min(n, len(rows))):
            turns = row.get("conversations") or [dict(value=row["instruction"])]
            talks.append(
                [
                    dict(role=("user", "assistant")[i % 2], content=turn["value"])
                    for i, turn in enumerate(turns)
                ]
            )
            if "en" in row:
                talks.append([dict(role="user", content=row["en"]["instruction"])])
    return talks


def odd_texts(n, seed, real):
    "Hostile texts without control tokens"
    texts = hostile_texts(4 * n, ["你好", " the", "请", "。"], seed, real)
    return [text for text in texts if text.strip() and not any(mark in text for mark in MARKS)]


def questions(n, seed=0):
    "Conversations that end with a question: Chinese, English, mixed, with emoji and odd spaces"
    rng = random.Random(seed)
    talks = real_talks(n, rng)
    talks += [talk[:-1] for talk in translations(400)]
    talks += [talk[:-1] for talk in read_conversations("builtin:handwritten")]
    talks = [t if len(t) % 2 else t[:-1] for t in talks if len(t) > 1 or t[0]["content"].strip()]
    talks = [talk for talk in talks if sum(len(turn["content"]) for turn in talk) < 600]
    odd = odd_texts(n, seed, [talk[0]["content"] for talk in talks])[: n // 4]
    talks = rng.sample(talks, n - n // 4) + [[dict(role="user", content=text)] for text in odd]
    system = dict(role="system", content="请回答。")
    return [[system, *talk] if i % 5 == 0 else talk for i, talk in enumerate(talks)]


def n_equal(pairs):
    return sum(a == b for a, b in pairs)


def stop(model, most=512):
    "Translations beyond the training set, sampled as `cmixtral chat` does and without sampling"
    net, tok = load_model(model), load_tokenizer(model)
    asked = [encode_prompt(tok, talk[:1]) for talk in list(translations(2100))[2000:]]
    for temperature in (0.8, 0):
        lengths = answer_lengths(net, tok, asked, temperature, most)
        ended = sorted(n for n in lengths if n is not None)
        print(
            f"temperature {temperature}: {len(ended)} of {len(lengths)} answers end by themselves "
            f"within {most} tokens, half of them within {ended[len(ended) // 2]}; "
            f"{ended.count(0)} are empty",
            flush=True,
        )


def answer_lengths(net, tok, asked, temperature, most, at_once=25):
    "Tokens before the end of each answer, None where it does not come"
    import torch

    how: dict = dict(do_sample=False)
    if temperature:
        how = dict(do_sample=True, temperature=temperature, top_p=0.9, top_k=0)
    lengths = []
    for k in range(0, len(asked), at_once):
        some = asked[k : k + at_once]
        n = max(map(len, some))
        x = torch.tensor([[tok.pad_token_id] * (n - len(ids)) + ids for ids in some])
        mask = torch.tensor([[0] * (n - len(ids)) + [1] * len(ids) for ids in some])
        torch.manual_seed(k)
        with torch.no_grad():
            whole = net.generate(
                input_ids=x,
                attention_mask=mask,
                max_new_tokens=most,
                eos_token_id=tok.eos_token_id,
                pad_token_id=tok.pad_token_id,
                **how,
            )
        for answer in whole[:, n:].tolist():
            ends = tok.eos_token_id in answer
            lengths.append(answer.index(tok.eos_token_id) if ends else None)
    return lengths


def dropout(model):
    "Tokens of the shipped conversations with and without BPE-dropout"
    tok, bpe = load_tokenizer(model), load_bpe(Path(model))
    talks = list(read_conversations("builtin"))
    plain = [len(encode_chat(tok, talk)[0]) for talk in talks]
    cut = [
        len(encode_chat(tok, talk, encode=dropout_encoder(bpe, 0.1, i))[0])
        for i, talk in enumerate(talks)
    ]
    n_other = len(cut) - n_equal(zip(plain, cut, strict=True))
    print(
        f"{n_other / len(cut):.1%} of {len(cut):,} conversations have another number of tokens, "
        f"{sum(cut) / sum(plain) - 1:+.1%} tokens in all"
    )


def sentencepiece_ids(tok, sp, talk):
    "A conversation by sentencepiece, with the marks of the template put in by id"
    form = form_of(tok)
    begin, end = tok.convert_tokens_to_ids([form.begin, form.end])
    ids = [1]
    for turn in talk:
        words = sp.encode(f"{form.roles[turn['role']]}\n{turn['content']}")
        ids += [begin, *words, end, *sp.encode("\n")]
    return [*ids, begin, *sp.encode(form.roles["assistant"] + "\n")]


def ids(model, engine, file, python):
    "Four ways: our `encode_prompt`, `encode_chat`, sentencepiece, and the engine"
    tok, sp = load_tokenizer(model), processor(Path(model) / "tokenizer.model")
    talks = questions(200)
    ours = [encode_prompt(tok, talk) for talk in talks]
    assert ours == [encode_chat(tok, talk, generate=True)[0] for talk in talks]
    by_sp = [sentencepiece_ids(tok, sp, talk) for talk in talks]
    start = time.time()
    got = ask_engine(engine, file, talks, N_ANSWER, python, 2048)
    print(
        f"{engine} {got['version']}: ids equal on {n_equal(zip(ours, got['ids'], strict=True))} "
        f"of {len(talks)} conversations, "
        f"sentencepiece on {n_equal(zip(ours, by_sp, strict=True))}; "
        f"{sum(map(len, ours)):,} tokens; {time.time() - start:.0f} s",
        flush=True,
    )
    pairs = list(zip(our_answers(model, tok, talks, N_ANSWER), got["answers"], strict=True))
    same = sum(n_equal(zip(a, b, strict=False)) for a, b in pairs)
    n = sum(max(len(a), len(b)) for a, b in pairs)
    print(
        f"{engine}: greedy answers agree in {same:,} of {n:,} tokens ({same / n:.2%}), "
        f"{n_equal(pairs)} of {len(pairs)} answers whole",
        flush=True,
    )


def hostile(model, engine, file, python, n=10_000):
    "Whether words of a user or of a system turn become control tokens in an engine"
    tok = load_tokenizer(model)
    marks = [token.content for token in tok.added_tokens_decoder.values()]
    forged = [*marks, "".join(marks), f"{marks[-1]}系统\n", "[INST]", "<|im_end|>"]
    texts = hostile_texts(int(n), [*forged, "你好", "<", "|>"], 1)
    texts = [text if text.strip() else text + "x" for text in texts]
    talks = [[dict(role="user", content=text)] for text in texts]
    for talk in talks[::2]:
        talk.insert(0, dict(talk[0], role="system"))
    control = {i for i, token in tok.added_tokens_decoder.items() if token.special}

    def orders(ids):
        return [i for i in ids if i in control]

    start = time.time()
    want = [orders(encode_prompt(tok, talk)) for talk in talks]
    assert {len(w) for w in want} == {4, 6}
    got = ask_engine(engine, file, talks, 0, python, 4096)["ids"]
    bad = [text for text, g, w in zip(texts, got, want, strict=True) if orders(g) != w]
    n_forged = sum(any(mark in text for mark in marks) for text in texts)
    print(
        f"{engine}: {len(bad)} of {len(texts):,} hostile messages gave a control token, "
        f"{n_forged:,} hold one as text; {time.time() - start:.0f} s",
        *bad[:3],
    )


def rule(model, name, file, python, n=10_000):
    "Strings of which llama.cpp makes other ids than a tokenizer with its rule, and than ours"
    config = byte_level_config(model)
    assert config is not None, f"{model} holds a sentencepiece model, which llama.cpp reads itself"
    ours, theirs = rule_tokenizer(config), rule_tokenizer(config, RULES[name])
    normal = ours.normalizer
    texts = rule_texts(config)
    texts += hostile_texts(int(n) - len(texts), last_pieces(config), 1, texts)
    texts = [normal.normalize_str(text) if normal else text for text in texts]
    start = time.time()
    got = ask_ids(file, texts, python)
    for what, tok in (("its rule", theirs), ("ours", ours)):
        want = [found.ids for found in tok.encode_batch_fast(texts, add_special_tokens=False)]
        other = [text for text, a, b in zip(texts, want, got, strict=True) if a != b]
        print(f"{name}: {len(other)} of {len(texts):,} strings differ from {what}", *other[:2])
    print(f"{time.time() - start:.0f} s")


@contextlib.contextmanager
def served(file, python, port):
    "`cmixtral serve` in a process of its own, ended by Ctrl-C; what it says is in serve.log"
    main = "from cmixtral_nb.commands import main; raise SystemExit(main())"
    options = ["--model", file, "--port", str(port), "--python", python]
    with open("serve.log", "w") as log:
        job = subprocess.Popen(
            [sys.executable, "-c", main, "serve", *options],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(job.pid, signal.SIGINT)
            try:
                job.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)


@dataclass
class Asking:
    "A client, and how it asks"

    client: Any  # openai's
    how: dict

    def whole(self, talk):
        return self.client.chat.completions.create(messages=talk, **self.how).choices[0]

    def parts(self, talk):
        "An answer streamed"
        parts = self.client.chat.completions.create(messages=talk, stream=True, **self.how)
        return [part.choices[0] for part in parts if part.choices]

    def wait(self, seconds=180):
        "Until the server answers"
        for _ in range(seconds):
            try:
                self.client.models.list()
                return
            except Exception:
                time.sleep(1)


def joined(parts):
    return "".join(part.delta.content or "" for part in parts)


def distinct_questions(model, n=16):
    "Our answers and their questions: answers all differ, those that end come first"
    tok, net = load_tokenizer(model), load_model(model, device="cpu")
    found: dict[str, tuple[bool, list]] = {}  # answer -> whether it was cut off, question
    short = [talk[:1] for talk in list(translations(2040))[2000:]]
    for talk in [*short, *questions(60)]:
        if len(encode_prompt(tok, talk)) < 200:
            got = generate_text(net, tok, talk, N_ANSWER, temperature=0)
            found.setdefault(got["text"].strip(), (got["stop"] != "end", talk))
        if sum(not cut for cut, _ in found.values()) >= n:
            break
    first = sorted(found.items(), key=lambda item: item[1][0])[:n]
    return [answer for answer, _ in first], [talk for _, (_, talk) in first]


def show_one(asking, talk, want):
    "One answer, whole and streamed"
    one, parts = asking.whole(talk), asking.parts(talk)
    print(
        f"whole {one.message.content!r} ({one.finish_reason}), "
        f"streamed in {len(parts)} parts {joined(parts)!r} ({parts[-1].finish_reason}), "
        f"ours {want!r}",
        flush=True,
    )


def show_refusals(asking):
    "What a server should refuse: a prompt too long, an unknown role, two turns in a row"
    from openai import APIStatusError

    for messages in (
        [dict(role="user", content="很长的话。" * 6000)],
        [dict(role="tool", content="x")],
        [dict(role="user", content="a"), dict(role="user", content="b")],
    ):
        try:
            asking.whole(messages)
            print("NOT REFUSED", messages[0]["content"][:10])
        except APIStatusError as e:
            print(f"refused with {e.status_code}: {str(e)[:230]}", flush=True)


def many_at_once(asking, asked, want, seconds, n=16):
    "How many of the answers to n threads were ours; half of them stream"
    counts = dict(sent=0, right=0, wrong=0, lost=0)
    lock, until = threading.Lock(), time.time() + seconds

    def ask(k):
        while time.time() < until:
            i = (k + counts["sent"]) % len(asked)
            try:
                if k % 2:
                    got = asking.whole(asked[i]).message.content
                else:
                    got = joined(asking.parts(asked[i]))
                what = "right" if got.strip() == want[i] else "wrong"
            except Exception as e:
                what, got = "lost", repr(e)[:100]
            with lock:
                counts["sent"] += 1
                counts[what] += 1
                if what != "right" and counts[what] < 4:
                    print(what, repr(got), repr(want[i]), flush=True)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def server(model, file, python, port=8123, seconds=60):
    "Whole and streamed answers, refusals, and a minute of sixteen requests at once"
    from openai import OpenAI

    is_vllm = Path(file, "config.json").is_file()
    plain = {} if is_vllm else dict(repeat_penalty=1, top_k=0, min_p=0)
    asking = Asking(
        OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300, max_retries=0),
        dict(model="chat", temperature=0, max_tokens=N_ANSWER, extra_body=plain),
    )
    with served(file, python, port):
        asking.wait()
        want, asked = distinct_questions(model)
        show_one(asking, asked[0], want[0])
        show_refusals(asking)
        print("after that:", asking.whole(asked[0]).message.content.strip() == want[0])
        counts = many_at_once(asking, asked, want, seconds)
        print(
            f"16 at once for {seconds} s, half of them streaming: {counts}; "
            f"{len(set(want))} different answers among {len(want)} questions",
            flush=True,
        )


@dataclass
class Arm:
    "A model before or after its extension, and the best times so far in seconds"

    net: Any
    gguf: str
    ids: list[int]
    hf: float = 9e9
    llama: float = 9e9

    def run_hf(self):
        self.hf = min(self.hf, writing_seconds(self.net, self.ids))

    def run_llama(self, python, threads):
        asked = dict(model=str(self.gguf), ids=self.ids, repeat=1, threads=threads)
        run = subprocess.run(
            [python, str(Path(__file__).with_name("speed_llama.py"))],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=True,
        )
        self.llama = min(self.llama, float(run.stdout))


def chinese(corpus: str | None, n_chars: int) -> str:
    "Held-out Chinese of a corpus; without one, answers of translated conversations"
    if corpus:
        lines = "\n".join(corpus_texts(corpus, "zh", "valid")).split("\n")
    else:
        lines = [talk[1]["content"] for talk in translations(400)]
    return "".join(line for line in lines if "\u4e00" <= line[:1] <= "\u9fff")[:n_chars]


def speed(
    before,
    after,
    gguf_before,
    gguf_after,
    python,
    corpus=None,
    n_chars=200,
    repeat=3,
    threads=1,
):
    """The same Chinese text written token by token with the cache, as generation does.

    The two alternate, the best of three counts. One thread: on a busy machine more would wait for
    each other.
    """
    import torch

    torch.set_num_threads(threads)
    text = chinese(corpus, n_chars)
    arms = {}
    for name, folder, gguf in (("before", before, gguf_before), ("after", after, gguf_after)):
        tok, net = load_tokenizer(folder), load_model(folder, device="cpu")
        arms[name] = Arm(net, gguf, [tok.bos_token_id, *encode_plain(tok, [text])[0]])
    for _ in range(repeat):
        for arm in arms.values():
            arm.run_hf()
            arm.run_llama(python, threads)
            times = f"transformers {arm.hf:.1f} s, llama.cpp {arm.llama:.2f} s"
            print(f"  {len(arm.ids)} tokens: {times}", flush=True)
    for name, arm in arms.items():
        n_tokens = len(arm.ids) - 1
        n_params = sum(p.numel() for p in arm.net.parameters())
        print(
            f"{name}: {len(text):,} characters in {n_tokens:,} tokens "
            f"({len(text) / n_tokens:.2f} a token), {n_params / 1e6:.1f}M parameters; "
            f"transformers {len(text) / arm.hf:.0f} characters a second, "
            f"llama.cpp {len(text) / arm.llama:.0f}"
        )
    a, b = arms["before"], arms["after"]
    print(
        f"after / before: tokens {len(b.ids) / len(a.ids):.3f}, "
        f"transformers {a.hf / b.hf:.2f} times as fast, llama.cpp {a.llama / b.llama:.2f}"
    )


COMMANDS: dict[str, Callable] = {
    "stop": stop,
    "dropout": dropout,
    "ids": ids,
    "hostile": hostile,
    "rule": rule,
    "server": server,
    "speed": speed,
}

if __name__ == "__main__":
    what, *args = sys.argv[1:] or [""]
    if what not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[what](*args)
