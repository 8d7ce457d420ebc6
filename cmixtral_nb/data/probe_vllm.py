"""Asks vLLM what it makes of conversations; knows nothing of cmixtral_nb.

Standard input: JSON with model (folder), talks (lists of messages), n_tokens (longest answer),
length (tokens of context), out (file to write). Written: version, ids of each prompt, ids of each
answer (none with n_tokens 0). vLLM starts this file again in its workers, hence the main guard.
"""

import json
import sys

import vllm


def main():
    asked = json.load(sys.stdin)
    n_tokens = asked["n_tokens"]
    model = vllm.LLM(
        asked["model"],
        dtype="float32" if n_tokens else "auto",
        max_model_len=asked["length"],
        enforce_eager=True,
        seed=0,
    )
    likeliest = vllm.SamplingParams(temperature=0, max_tokens=n_tokens or 1)
    results = model.chat(asked["talks"], likeliest, use_tqdm=False)
    prompts = [list(result.prompt_token_ids) for result in results]
    answers = [list(result.outputs[0].token_ids) for result in results] if n_tokens else []
    with open(asked["out"], "w", encoding="utf-8") as file:
        json.dump(dict(version=vllm.__version__, ids=prompts, answers=answers), file)


if __name__ == "__main__":
    main()
