"""Seconds of llama.cpp to read tokens one by one; for bench_serve.py, run by another Python.

Standard input: JSON with model (GGUF file), ids, repeat, threads. Printed: the best time.
"""

import json
import sys
import time

import llama_cpp


def main():
    asked = json.load(sys.stdin)
    model = llama_cpp.Llama(asked["model"], n_ctx=2048, verbose=False, n_threads=asked["threads"])
    first, *others = asked["ids"]
    times = []
    for _ in range(asked["repeat"]):
        model.reset()
        model.eval([first])
        start = time.time()
        for i in others:
            model.eval([i])
        times.append(time.time() - start)
    print(min(times))


if __name__ == "__main__":
    main()
