"Exercises of the chapters: each check passes on a solution, and fails on the stub and on a mistake"

import ast
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from cmixtral_nb.notebooks import cells

NBS = Path(__file__).parents[1] / "nbs"
IMPORTS = ("import ", "from ")  # imports have cells of their own
NEEDED: dict[str, set[str]] = {  # notebook -> what its checks use of other cells
    "04_vocab": set(),
    "05_mixtral": {"random_model", "MIXTRAL", "QWEN3_MOE", "logits", "to_first_two", "to_last_two"},
    "08_qlora": {"WithLoRA"},
}


def definitions(source: str, names: set[str]) -> str:
    "The functions, classes and constants of a cell that have these names"
    found = []
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        own = {getattr(t, "name", None) or getattr(t, "id", None) for t in targets}
        if own & names:
            found.append(ast.get_source_segment(source, node) or "")
    return "\n".join(found)


@cache
def exercises(chapter: str) -> dict[str, Any]:
    "What the cell of exercises of a chapter defines, after imports and the definitions it needs"
    code = [c["source"] for c in cells(NBS / f"{chapter}.ipynb") if c["cell_type"] == "code"]
    (own,) = (source for source in code if "\ndef check_" in source)
    defined: dict[str, Any] = {}
    exec("from fastcore.test import test_close, test_eq", defined)
    for source in [s for s in code if s.startswith(IMPORTS)]:
        exec(source, defined)
    exec("from cmixtral_nb.mixtral import small_config", defined)
    for source in code:
        if source is not own and not source.startswith(("#|", *IMPORTS)):
            exec(definitions(source, NEEDED[chapter]), defined)
    exec(own, defined)
    return defined


# 04_vocab


def dead(pieces, score):
    "Joins each piece from its characters, as the chapter does"
    found = []
    for piece in pieces:
        parts = list(piece)
        while joined := [left + right for left, right in itertools.pairwise(parts)]:
            ranked = [(-score[part], i) for i, part in enumerate(joined) if part in score]
            if not ranked:
                break
            _, i = min(ranked)
            parts[i : i + 2] = [joined[i]]
        if parts != [piece]:
            found.append(piece)
    return found


def without_two_parts(pieces, score):
    "Does not see that another piece may come first"

    def has_parts(piece):
        return any(piece[:i] in score and piece[i:] in score for i in range(1, len(piece)))

    return [piece for piece in pieces if not has_parts(piece)]


def falling_scores(lowest, n):
    step = float(np.spacing(np.float32(2 * lowest))) if abs(lowest) > 2**23 else 1.0
    return [lowest - abs(step) * i for i in range(1, n + 1)]


def scores_in_ones(lowest, n):
    return [lowest - i for i in range(1, n + 1)]


# 05_mixtral


def exchange(moe, one, other):
    both, swapped = [one, other], [other, one]
    for p in (moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj):
        p[both] = p[swapped].clone()


def exchange_without_the_router(moe, one, other):
    for p in (moe.experts.gate_up_proj, moe.experts.down_proj):
        p[[one, other]] = p[[other, one]].clone()


def plain_weights(logits, k):
    return logits.softmax(-1).topk(k).values


def weights_that_sum_to_one(logits, k):
    return logits.topk(k).values.softmax(-1)


def balance_of_layers(all_logits, k):
    losses = []
    for logits in all_logits:
        n_experts = logits.shape[1]
        chosen = logits.topk(k).indices
        load = torch.bincount(chosen.flatten(), minlength=n_experts) / len(logits)
        losses.append(n_experts * (load * logits.softmax(-1).mean(0)).sum())
    return sum(losses) / len(losses)


def balance_of_all_layers_together(all_logits, k):
    return balance_of_layers((torch.cat(all_logits),), k)


# 08_qlora


def weight_of(number, constant):
    return bnb.get_4bit_type("nf4", device="cpu")[number] * constant


def evenly_spaced(number, constant):
    return (number / 7.5 - 1) * constant


def lora_size(n_out, n_in, rank):
    return rank * (n_out + n_in)


def size_of_the_product(n_out, n_in, rank):
    return n_out * n_in


def merged(W, A, B, alpha):
    return W + alpha / len(A) * (B @ A)


def merged_without_the_rank(W, A, B, alpha):
    return W + alpha * (B @ A)


@pytest.mark.parametrize(
    "chapter,solution,mistake",
    [
        ("04_vocab", dead, without_two_parts),
        ("04_vocab", falling_scores, scores_in_ones),
        ("05_mixtral", exchange, exchange_without_the_router),
        ("05_mixtral", plain_weights, weights_that_sum_to_one),
        ("05_mixtral", balance_of_layers, balance_of_all_layers_together),
        ("08_qlora", weight_of, evenly_spaced),
        ("08_qlora", lora_size, size_of_the_product),
        ("08_qlora", merged, merged_without_the_rank),
    ],
)
def test_a_solution_passes_stub_and_mistake_fail(chapter, solution, mistake):
    defined = exercises(chapter)
    check = defined[f"check_{solution.__name__}"]
    check(solution)
    for attempt in (defined[solution.__name__], mistake):
        with pytest.raises((AssertionError, TypeError, AttributeError)):
            check(attempt)
