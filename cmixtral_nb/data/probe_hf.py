"""Asks transformers what it makes of conversations; knows nothing of cmixtral_nb.

Standard input: JSON with model (folder), talks (lists of messages), n_tokens (longest answer),
out (file to write). Written: version, ids of each prompt, ids of each answer; with n_tokens 0
no answers, and the weights are not loaded.
"""

import json
import sys

import transformers


def answer(model, ids, n_tokens):
    "Ids that follow, the likeliest token each time"
    import torch

    whole = model.generate(torch.tensor([ids]), max_new_tokens=n_tokens, do_sample=False)
    return whole[0, len(ids) :].tolist()


def without_settings(model):
    "The model with nothing left of its generation settings but which token ends a text"
    ends = model.generation_config.eos_token_id
    pad = model.generation_config.pad_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    return model


def main():
    asked = json.load(sys.stdin)
    tok = transformers.AutoTokenizer.from_pretrained(asked["model"])
    prompts = [
        tok.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
        for talk in asked["talks"]
    ]
    answers = []
    if asked["n_tokens"]:
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = without_settings(load(asked["model"], dtype="float32").eval())
        answers = [answer(model, ids, asked["n_tokens"]) for ids in prompts]
    with open(asked["out"], "w", encoding="utf-8") as file:
        json.dump(dict(version=transformers.__version__, ids=prompts, answers=answers), file)


if __name__ == "__main__":
    main()
