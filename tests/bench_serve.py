"""By hand: a chat model that stops, can't be hijacked, and answers the same in every engine.

    python tests/bench_serve.py stop MODEL                    # 100 held-out prompts: how many answers end by themselves
    python tests/bench_serve.py dropout MODEL                 # what BPE-dropout at 0.1 does to the tokens of the shipped conversations
    python tests/bench_serve.py ids MODEL ENGINE FILE PYTHON  # 200 conversations: the same ids, and the same greedy answers in float32
    python tests/bench_serve.py hostile MODEL ENGINE FILE PYTHON [N]  # 10,000 hostile messages: control tokens that the template did not write
    python tests/bench_serve.py server MODEL FILE PYTHON      # `cmixtral serve` and the real openai client, 16 requests at once for a minute
    python tests/bench_serve.py speed BEFORE AFTER GGUF_BEFORE GGUF_AFTER PYTHON  # Chinese characters a second, old and new vocabulary, same sizes

MODEL, BEFORE and AFTER are model folders; ENGINE is hf, vllm or gguf; FILE is what the engine reads (a folder, or a GGUF file in f32);
PYTHON has the engine. DATA=shared/data in the environment adds real conversations to those that ship.
"""

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
from pathlib import Path

from cmixtral_nb.certificate import hostile_texts
from cmixtral_nb.conversations import read_conversations, translations
from cmixtral_nb.engines import ask_engine, our_answers
from cmixtral_nb.generate import encode_prompt, generate_text
from cmixtral_nb.loading import load_model
from cmixtral_nb.sft import _bpe, dropout_encoder, encode_chat
from cmixtral_nb.tokenizer_files import encode_plain, load_tokenizer, processor


def questions(n, control=False, seed=0):
    "Conversations that end with a question: Chinese, English, mixed, with emoji and odd spaces; without control tokens unless asked for"
    rng, talks = random.Random(seed), []
    data = Path(os.environ.get("DATA", "/nowhere")) / "sft"
    for f in sorted(data.glob("*.xz")):
        with lzma.open(f, "rt", encoding="utf-8") as lines:
            rows = [json.loads(r) for r in itertools.islice(lines, 1500)]
        for r in rng.sample(rows, min(n, len(rows))):
            turns = r.get("conversations") or [dict(value=r["instruction"])]
            talks.append(
                [
                    dict(role=("user", "assistant")[i % 2], content=t["value"])
                    for i, t in enumerate(turns)
                ]
            )
            if "en" in r:
                talks.append([dict(role="user", content=r["en"]["instruction"])])
    talks += [t[:-1] for t in translations(400)] + [
        t[:-1] for t in read_conversations("builtin:handwritten")
    ]
    talks = [t if len(t) % 2 else t[:-1] for t in talks if len(t) > 1 or t[0]["content"].strip()]
    talks = [t for t in talks if sum(len(m["content"]) for m in t) < 600]
    odd = [
        t
        for t in hostile_texts(
            4 * n, ["你好", " the", "请", "。"], seed, [t[0]["content"] for t in talks]
        )
        if t.strip()
        and (control or not any(m in t for m in ("<s>", "</s>", "<unk>", "<pad>", "<|")))
    ]
    talks = rng.sample(talks, n - n // 4) + [[dict(role="user", content=t)] for t in odd[: n // 4]]
    return [
        [dict(role="system", content="请回答。"), *t] if i % 5 == 0 else t
        for i, t in enumerate(talks)
    ]


def stop(model, most=512):
    "Translations beyond those of the training set, with the sampling that `cmixtral chat` has, and without sampling; 25 at a time"
    import torch

    net, tok = load_model(model), load_tokenizer(model)
    asked = [encode_prompt(tok, t[:1]) for t in list(translations(2100))[2000:]]
    for temperature in (0.8, 0):
        lengths = []
        for k in range(0, len(asked), 25):
            some = asked[k : k + 25]
            n = max(map(len, some))
            x = torch.tensor([[tok.pad_token_id] * (n - len(i)) + i for i in some])
            mask = torch.tensor([[0] * (n - len(i)) + [1] * len(i) for i in some])
            torch.manual_seed(k)
            how = (
                dict(do_sample=True, temperature=temperature, top_p=0.9, top_k=0)
                if temperature
                else dict(do_sample=False)
            )
            with torch.no_grad():
                y = net.generate(
                    input_ids=x,
                    attention_mask=mask,
                    max_new_tokens=most,
                    eos_token_id=tok.eos_token_id,
                    pad_token_id=tok.pad_token_id,
                    **how,
                )[:, n:].tolist()
            lengths += [r.index(tok.eos_token_id) if tok.eos_token_id in r else None for r in y]
        ended = sorted(n for n in lengths if n is not None)
        print(
            f"temperature {temperature}: {len(ended)} of {len(lengths)} answers end by themselves within {most} tokens, half of them within {ended[len(ended) // 2]}; {ended.count(0)} are empty",
            flush=True,
        )


def dropout(model):
    tok, bpe = load_tokenizer(model), _bpe(Path(model))
    talks = list(read_conversations("builtin"))
    plain = [len(encode_chat(tok, t)[0]) for t in talks]
    cut = [
        len(encode_chat(tok, t, encode=dropout_encoder(bpe, 0.1, i))[0])
        for i, t in enumerate(talks)
    ]
    print(
        f"{sum(a != b for a, b in zip(plain, cut, strict=True)) / len(cut):.1%} of {len(cut):,} conversations have another number of tokens, {sum(cut) / sum(plain) - 1:+.1%} tokens in all"
    )


def ids(model, engine, file, python):
    "Four ways: our `encode_prompt`, `encode_chat`, sentencepiece with the template's marks put in by id, and the engine"
    tok, sp, talks = (
        load_tokenizer(model),
        processor(Path(model) / "tokenizer.model"),
        questions(200),
    )
    ours = [encode_prompt(tok, t) for t in talks]
    assert ours == [encode_chat(tok, t, generate=True)[0] for t in talks]
    from cmixtral_nb.sft import form_of

    form = form_of(tok)
    begin, end = tok.convert_tokens_to_ids([form.begin, form.end])
    spm = [
        [
            1,
            *(
                i
                for m in t
                for i in [
                    begin,
                    *sp.encode(f"{form.roles[m['role']]}\n{m['content']}"),
                    end,
                    *sp.encode("\n"),
                ]
            ),
            begin,
            *sp.encode(form.roles["assistant"] + "\n"),
        ]
        for t in talks
    ]
    start = time.time()
    got = ask_engine(engine, file, talks, 24, python, 2048)
    n_ids = sum(a == b for a, b in zip(ours, got["ids"], strict=True))
    print(
        f"{engine} {got['version']}: ids equal on {n_ids} of {len(talks)} conversations, sentencepiece on {sum(a == b for a, b in zip(ours, spm, strict=True))}; "
        f"{sum(map(len, ours)):,} tokens; {time.time() - start:.0f} s",
        flush=True,
    )
    pairs = list(zip(our_answers(model, tok, talks, 24), got["answers"], strict=True))
    same, n = (
        sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False)),
        sum(max(len(a), len(b)) for a, b in pairs),
    )
    print(
        f"{engine}: greedy answers agree in {same:,} of {n:,} tokens ({same / n:.2%}), {sum(a == b for a, b in pairs)} of {len(pairs)} answers whole",
        flush=True,
    )


def hostile(model, engine, file, python, n=10_000):
    tok = load_tokenizer(model)
    marks = [t.content for t in tok.added_tokens_decoder.values()]
    texts = hostile_texts(
        int(n),
        [*marks, "".join(marks), f"{marks[-1]}系统\n", "[INST]", "<|im_end|>", "你好", "<", "|>"],
        1,
    )
    texts = [t if t.strip() else t + "x" for t in texts]
    control = {i for i, t in tok.added_tokens_decoder.items() if t.special}
    talks = [
        [dict(role="user", content=t)]
        if i % 2
        else [dict(role="system", content=t), dict(role="user", content=t)]
        for i, t in enumerate(texts)
    ]
    start, want = time.time(), [[i for i in encode_prompt(tok, t) if i in control] for t in talks]
    assert {len(w) for w in want} == {4, 6}
    got = ask_engine(engine, file, talks, 0, python, 4096)["ids"]
    bad = [
        t for t, g, w in zip(texts, got, want, strict=True) if [i for i in g if i in control] != w
    ]
    print(
        f"{engine}: {len(bad)} of {len(texts):,} hostile messages gave a control token, {sum(any(m in t for m in marks) for t in texts):,} hold one as text; {time.time() - start:.0f} s",
        *bad[:3],
    )


def server(model, file, python, port=8123, seconds=60):
    from openai import APIStatusError, OpenAI

    tok, net = load_tokenizer(model), load_model(model, device="cpu")
    log = open("serve.log", "w")
    job = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from cmixtral_nb.commands import main; raise SystemExit(main())",
            "serve",
            "--model",
            file,
            "--port",
            str(port),
            "--python",
            python,
        ],
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    client = OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300, max_retries=0
    )
    plain = dict(
        model="chat",
        temperature=0,
        max_tokens=24,
        extra_body={}
        if Path(file, "config.json").is_file()
        else dict(repeat_penalty=1, top_k=0, min_p=0),
    )
    try:
        for _ in range(180):
            try:
                client.models.list()
                break
            except Exception:
                time.sleep(1)
        found = {}  # sixteen questions whose answers differ, those that end first
        for t in [*[t[:1] for t in list(translations(2040))[2000:]], *questions(60)]:
            if len(encode_prompt(tok, t)) < 200:
                found.setdefault(
                    (got := generate_text(net, tok, t, 24, temperature=0))["text"].strip(),
                    (got["stop"] != "end", t),
                )
            if sum(not late for late, _ in found.values()) >= 16:
                break
        want, asked = zip(
            *[(w, t) for w, (_, t) in sorted(found.items(), key=lambda x: x[1][0])][:16],
            strict=True,
        )
        one = client.chat.completions.create(messages=asked[0], **plain)
        parts = [
            p.choices[0]
            for p in client.chat.completions.create(messages=asked[0], stream=True, **plain)
        ]
        text = "".join(p.delta.content or "" for p in parts)
        print(
            f"whole {one.choices[0].message.content!r} ({one.choices[0].finish_reason}), streamed in {len(parts)} parts {text!r} ({parts[-1].finish_reason}), ours {want[0]!r}",
            flush=True,
        )
        for messages in (
            [dict(role="user", content="很长的话。" * 6000)],
            [dict(role="tool", content="x")],
            [dict(role="user", content="a"), dict(role="user", content="b")],
        ):
            try:
                client.chat.completions.create(messages=messages, **plain)
                print("NOT REFUSED", messages[0]["content"][:10])
            except APIStatusError as e:
                print(f"refused with {e.status_code}: {str(e)[:230]}", flush=True)
        print(
            "after that:",
            client.chat.completions.create(messages=asked[0], **plain)
            .choices[0]
            .message.content.strip()
            == want[0],
        )
        counts, lock, until = (
            dict(sent=0, right=0, wrong=0, lost=0),
            threading.Lock(),
            time.time() + seconds,
        )

        def ask(k):
            while time.time() < until:
                i = (k + counts["sent"]) % len(asked)
                try:
                    if k % 2:
                        got = (
                            client.chat.completions.create(messages=asked[i], **plain)
                            .choices[0]
                            .message.content
                        )
                    else:
                        got = "".join(
                            p.choices[0].delta.content or ""
                            for p in client.chat.completions.create(
                                messages=asked[i], stream=True, **plain
                            )
                            if p.choices
                        )
                    what = "right" if got.strip() == want[i] else "wrong"
                except Exception as e:
                    what, got = "lost", repr(e)[:100]
                with lock:
                    counts["sent"] += 1
                    counts[what] += 1
                    if what != "right" and counts[what] < 4:
                        print(what, repr(got), repr(want[i]), flush=True)

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(16)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        print(
            f"16 at once for {seconds} s, half of them streaming: {counts}; {len(set(want))} different answers among {len(want)} questions",
            flush=True,
        )
    finally:
        os.killpg(job.pid, signal.SIGINT)
        try:
            job.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)


LLAMA_SPEED = """
import json, sys, time, llama_cpp
q = json.load(sys.stdin); m = llama_cpp.Llama(q['model'], n_ctx=2048, verbose=False, n_threads=q['threads']); best = 9e9
for _ in range(q['repeat']):
    m.reset(); m.eval(q['ids'][:1]); start = time.time()
    for i in q['ids'][1:]: m.eval([i])
    best = min(best, time.time() - start)
print(best)
"""


def speed(before, after, gguf_before, gguf_after, python, n_chars=200, repeat=3, threads=1):
    "The same Chinese text written token by token with the cache, as generation does; alternating, the best of three; one thread: on a busy machine more would wait for each other"
    import torch

    torch.set_num_threads(threads)
    text = "".join(
        p["content"]
        for t in translations(400)
        for m in [t[1]]
        for p in [m]
        if "\u4e00" <= p["content"][0] <= "\u9fff"
    )[:n_chars]
    rows = {}
    for name, folder, gguf in (("before", before, gguf_before), ("after", after, gguf_after)):
        tok, net = load_tokenizer(folder), load_model(folder, device="cpu")
        rows[name] = dict(
            net=net,
            gguf=gguf,
            ids=[tok.bos_token_id, *encode_plain(tok, [text])[0]],
            hf=9e9,
            llama=9e9,
            params=sum(p.numel() for p in net.parameters()),
        )
    for _ in range(repeat):
        for r in rows.values():
            with torch.no_grad():
                cache = r["net"](
                    input_ids=torch.tensor([r["ids"][:1]]), use_cache=True
                ).past_key_values
                start = time.time()
                for i in r["ids"][1:]:
                    cache = r["net"](
                        input_ids=torch.tensor([[i]]), past_key_values=cache, use_cache=True
                    ).past_key_values
            r["hf"] = min(r["hf"], time.time() - start)
            run = subprocess.run(
                [python, "-c", LLAMA_SPEED],
                input=json.dumps(
                    dict(model=str(r["gguf"]), ids=r["ids"], repeat=1, threads=threads)
                ),
                capture_output=True,
                text=True,
                check=True,
            )
            r["llama"] = min(r["llama"], float(run.stdout))
            print(
                f"  {len(r['ids'])} tokens: transformers {r['hf']:.1f} s, llama.cpp {r['llama']:.2f} s",
                flush=True,
            )
    for name, r in rows.items():
        print(
            f"{name}: {len(text):,} characters in {len(r['ids']) - 1:,} tokens ({len(text) / (len(r['ids']) - 1):.2f} a token), {r['params'] / 1e6:.1f}M parameters; "
            f"transformers {len(text) / r['hf']:.0f} characters a second, llama.cpp {len(text) / r['llama']:.0f}"
        )
    a, b = rows["before"], rows["after"]
    print(
        f"after / before: tokens {len(b['ids']) / len(a['ids']):.3f}, transformers {a['hf'] / b['hf']:.2f} times as fast, llama.cpp {a['llama'] / b['llama']:.2f}"
    )


if __name__ == "__main__":
    what, *args = sys.argv[1:] or [""]
    if what not in ("stop", "dropout", "ids", "hostile", "server", "speed"):
        sys.exit(__doc__)
    globals()[what](*args)
