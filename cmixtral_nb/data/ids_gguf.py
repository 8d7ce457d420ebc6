"""Asks llama.cpp for the ids of texts, as text; knows nothing of cmixtral_nb.

Standard input: JSON with model (GGUF file), texts, out (file to write). Written: version, ids of
each text, without BOS. The weights are not loaded.
"""

import json
import sys

import llama_cpp


def main():
    asked = json.load(sys.stdin)
    model = llama_cpp.Llama(asked["model"], vocab_only=True, verbose=False)
    ids = [
        model.tokenize(text.encode(), add_bos=False, special=False) if text else []
        for text in asked["texts"]
    ]
    with open(asked["out"], "w", encoding="utf-8") as file:
        json.dump(dict(version=llama_cpp.__version__, ids=ids), file)


if __name__ == "__main__":
    main()
