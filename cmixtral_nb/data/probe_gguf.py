"""Asks llama.cpp what it makes of conversations; knows nothing of cmixtral_nb.

Standard input: JSON with model (GGUF file), talks (lists of messages), n_tokens (longest answer),
length (tokens of context), out (file to write). Written: version, ids of each prompt, ids of each
answer (none with n_tokens 0).
"""

import contextlib
import json
import sys

import llama_cpp


class HandedOnError(Exception):
    "Leaves the chat handler where it would begin to write"


def prompt_ids(model, talk):
    "The ids that the chat handler hands on to be completed"
    ids = []

    def hand_on(prompt, **options):
        ids.extend(prompt)
        raise HandedOnError

    model.create_completion = hand_on
    with contextlib.suppress(HandedOnError):
        model.create_chat_completion(talk)
    return ids


def answer(model, ids, n_tokens):
    "Ids that follow, the likeliest token each time"
    said = []
    for i in model.generate(ids, temp=0, repeat_penalty=1):
        said.append(i)
        if i == model.token_eos() or len(said) == n_tokens:
            break
    return said


def main():
    asked = json.load(sys.stdin)
    model = llama_cpp.Llama(asked["model"], n_ctx=asked["length"], verbose=False, seed=0)
    assert "tokenizer.chat_template" in model.metadata, "no chat template in the file"
    prompts = [prompt_ids(model, talk) for talk in asked["talks"]]
    answers = []
    if asked["n_tokens"]:
        answers = [answer(model, ids, asked["n_tokens"]) for ids in prompts]
    with open(asked["out"], "w", encoding="utf-8") as file:
        json.dump(dict(version=llama_cpp.__version__, ids=prompts, answers=answers), file)


if __name__ == "__main__":
    main()
