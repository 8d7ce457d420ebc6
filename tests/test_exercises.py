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
    "01_corpus": set(),
    "02_tokenizer": set(),
    "03_search": set(),
    "04_vocab": set(),
    "04b_bytelevel": set(),
    "05_mixtral": {"random_model", "MIXTRAL", "QWEN3_MOE", "logits", "to_first_two", "to_last_two"},
    "05b_upcycle": set(),
    "07_pack": set(),
    "06_init": set(),
    "08_qlora": {"WithLoRA"},
    "09_pretrain": set(),
    "10_merge": set(),
    "11_sft": set(),
    "12_generate": set(),
    "13_evaluate": set(),
    "13b_gain": set(),
    "14_pipeline": set(),
}

# chapters whose cell says "is not right yet" to a wrong answer, whatever the answer raises
TELL_EVERY_ERROR = [
    "04_vocab",
    "04b_bytelevel",
    "05_mixtral",
    "05b_upcycle",
    "06_init",
    "07_pack",
    "08_qlora",
    "09_pretrain",
    "10_merge",
    "11_sft",
    "12_generate",
    "13_evaluate",
    "13b_gain",
    "14_pipeline",
]


def definitions(source: str, names: set[str]) -> str:
    "The functions, classes and constants of a cell that have these names"
    found = []
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        own = {getattr(t, "name", None) or getattr(t, "id", None) for t in targets}
        if own & names:
            found.append(ast.get_source_segment(source, node) or "")
    return "\n".join(found)


def code_cells(chapter: str) -> tuple[list[str], str]:
    "All code cells of a chapter, and the one that has the exercises"
    code = [c["source"] for c in cells(NBS / f"{chapter}.ipynb") if c["cell_type"] == "code"]
    (own,) = (source for source in code if "\ndef check_" in source)
    return code, own


@cache
def exercises(chapter: str) -> dict[str, Any]:
    "What the cell of exercises of a chapter defines, after imports and the definitions it needs"
    code, own = code_cells(chapter)
    defined: dict[str, Any] = {}
    exec("from fastcore.test import test_close, test_eq", defined)
    for source in [s for s in code if s.startswith(IMPORTS)]:
        exec(source, defined)
    exec("from cmixtral_nb.mixtral import small_config", defined)
    exec("import regex", defined)
    exec("from cmixtral_nb.bytelevel import OwnBytes, own_characters", defined)
    for source in code:
        if source is not own and not source.startswith(("#|", *IMPORTS)):
            exec(definitions(source, NEEDED[chapter]), defined)
    exec(own, defined)
    return defined


# 01_corpus


def repeats(hashes):
    "Goes by what was seen before"
    seen: set[int] = set()
    places = []
    for place, value in enumerate(hashes):
        if value in seen:
            places.append(place)
        seen.add(value)
    return places


def repeats_of_neighbours(hashes):
    return [i for i in range(1, len(hashes)) if hashes[i] == hashes[i - 1]]


def chance(similarity, groups=14, hashes=8):
    "One minus the probability that each group differs somewhere"
    return 1 - (1 - similarity**hashes) ** groups


def chance_of_a_group(similarity, groups=14, hashes=8):
    return groups * similarity**hashes


# 02_tokenizer


def next_pair(words):
    "Counts a pair as often as it occurs in a word"
    pairs: dict[tuple, int] = {}
    for word, count in words.items():
        for pair in itertools.pairwise(word):
            pairs[pair] = pairs.get(pair, 0) + count
    return min(pairs, key=lambda pair: (-pairs[pair], pair))


def once_in_a_word(words):
    "Counts a pair once in each word"
    pairs: dict[tuple, int] = {}
    for word, count in words.items():
        for pair in set(itertools.pairwise(word)):
            pairs[pair] = pairs.get(pair, 0) + count
    return min(pairs, key=lambda pair: (-pairs[pair], pair))


def cut_word(word, merges):
    "Joins the pair of the lowest rank, wherever it is"
    parts = list(word)
    for merge in merges:
        i = 0
        while i < len(parts) - 1:
            if parts[i] + parts[i + 1] == merge:
                parts[i : i + 2] = [merge]
            i += 1
    return parts


def longest_first(word, merges):
    "Takes the longest piece from the left, whatever its rank"
    parts = []
    while word:
        fitting = [piece for piece in merges if word.startswith(piece)]
        parts.append(max([*fitting, word[0]], key=len))
        word = word[len(parts[-1]) :]
    return parts


# 03_search


def saved_by(kind, n_bytes, count):
    "A character saves its bytes but one"
    return count * (n_bytes - 1 if kind == "char" else 1)


def saved_by_bytes(kind, n_bytes, count):
    return count * n_bytes


def without_last(counts, piece, parts):
    "Hands the count of the piece to its parts"
    left = dict(counts)
    n = left.pop(piece, 0)
    for part in parts:
        left[part] = left.get(part, 0) + n
    return left


def only_removed(counts, piece, parts):
    return {token: n for token, n in counts.items() if token != piece}


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


# 04b_bytelevel


def only_own(beginning, others):
    return not any(char.encode().startswith(beginning) for char in others)


def by_the_first_byte(beginning, others):
    return not any(char.encode()[0] == beginning[0] for char in others)


def characters_per_pre_token(pattern, texts):
    import regex

    return sum(map(len, texts)) / sum(len(regex.findall(pattern, text)) for text in texts)


def characters_per_word(pattern, texts):
    return sum(map(len, texts)) / sum(len(text.split()) for text in texts)


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


# 06_init


def share_of_front(n_parts):
    return 2 / (n_parts + 2)


def share_without_front(n_parts):
    "Divides by the token's own parts alone"
    return 2 / n_parts


def divided(p_first, counts):
    total = sum(counts.values())
    return {token: p_first * count / total for token, count in counts.items()}


def divided_evenly(p_first, counts):
    return dict.fromkeys(counts, p_first / len(counts))


# 05b_upcycle


def added_parameters(d, f, n_layers, n_experts):
    return n_layers * ((n_experts - 1) * 3 * d * f + n_experts * d)


def without_the_router(d, f, n_layers, n_experts):
    return n_layers * (n_experts - 1) * 3 * d * f


def split_network(gate, up, down, n):
    parts = gate.chunk(n), up.chunk(n), down.chunk(n, dim=1)
    return list(zip(*parts, strict=True))


def with_all_of_down(gate, up, down, n):
    return list(zip(gate.chunk(n), up.chunk(n), [down] * n, strict=True))


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


# 09_pretrain


def to_bits_per_byte(loss, n_tokens, n_bytes):
    return loss * n_tokens / n_bytes / np.log(2)


def nats_per_byte(loss, n_tokens, n_bytes):
    return loss * n_tokens / n_bytes


def loss_of_parts(net, parts):
    sizes = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    losses = [size * net(**part).loss for size, part in zip(sizes, parts, strict=True)]
    return sum(losses) / sum(sizes)


def mean_of_parts(net, parts):
    return sum(net(**part).loss for part in parts) / len(parts)


# 10_merge


def mean_update(pairs):
    return sum(scale * (B @ A) for A, B, scale in pairs) / len(pairs)


def product_of_means(pairs):
    A, B, scale = (sum(parts) / len(pairs) for parts in zip(*pairs, strict=True))
    return scale * (B @ A)


def one_pair(first, second):
    pairs = [first, second]
    return torch.cat([A for A, _, _ in pairs]), torch.cat([s * B for _, B, s in pairs], 1)


def one_pair_without_scales(first, second):
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]], 1)


# 11_sft


def last_answer_only(mask):
    found = [0] * len(mask)
    last = max(i for i, m in enumerate(mask) if m)
    while last >= 0 and mask[last]:
        found[last] = 1
        last -= 1
    return found


def last_token_only(mask):
    last = max(i for i, m in enumerate(mask) if m)
    return [int(i == last) for i in range(len(mask))]


def harmless(text, tokens):
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def marks_removed(text, tokens):
    for token in tokens:
        text = text.replace(token, "")
    return text


# 12_generate


def min_p(probabilities, share):
    kept = probabilities.where(probabilities >= share * probabilities.max(), 0)
    return kept / kept.sum()


def above_a_share(probabilities, share):
    kept = probabilities.where(probabilities >= share, 0)
    return kept / kept.sum()


def until_end(ids, ends):
    for i, token in enumerate(ids):
        if token in ends:
            return ids[:i], True
    return ids, False


def without_ends(ids, ends):
    words = [token for token in ids if token not in ends]
    return words, len(words) < len(ids)


# 13_evaluate


def favourite(chosen, right):
    letter = max(set(chosen), key=chosen.count)
    return right.count(letter) / len(right)


def accuracy(chosen, right):
    return sum(a == b for a, b in zip(chosen, right, strict=True)) / len(right)


def likeliest_for_its_length(logps, answers):
    return int(np.argmax([logp / len(text) for logp, text in zip(logps, answers, strict=True)]))


def likeliest(logps, answers):
    return int(np.argmax(logps))


# 13b_gain


def pair_interval(before, after, rng):
    changes = []
    for _ in range(1000):
        drawn = rng.integers(0, len(before), len(before))
        changes.append(after[drawn].sum() / before[drawn].sum() - 1)
    return np.quantile(changes, [0.025, 0.975])


def strangers_interval(before, after, rng):
    changes = []
    for _ in range(1000):
        one, other = rng.integers(0, len(before), (2, len(before)))
        changes.append(after[one].sum() / before[other].sum() - 1)
    return np.quantile(changes, [0.025, 0.975])


def questions_needed(p, points):
    return 2 * p * (1 - p) * (1.96 / (points / 100)) ** 2


def questions_for_one_model(p, points):
    return p * (1 - p) * (1.96 / (points / 100)) ** 2


# 14_pipeline


def folders_read(step):
    return {
        folder
        for given in step.inputs.values()
        for folder in (given if isinstance(given, list) else [given])
    }


def made_again(steps, folder):
    changed = [folder]
    for step in steps:
        if step.folder not in changed and folders_read(step) & set(changed):
            changed.append(step.folder)
    return changed[1:]


def made_again_at_once(steps, folder):
    "Does not see that what is made again changes others"
    return [step.folder for step in steps if folder in folders_read(step)]


def change_of(before, after, shares):
    was, now = (sum(shares[name] * bits[name] for name in shares) for bits in (before, after))
    return now / was - 1


def mean_of_changes(before, after, shares):
    return sum(shares[name] * (after[name] / before[name] - 1) for name in shares)


# 07_pack


def position_ids(ids, bos):
    "Counts from the last BOS"
    found: list[int] = []
    for i in ids:
        found.append(0 if i == bos or not found else found[-1] + 1)
    return found


def position_ids_of_one_document(ids, bos):
    return list(range(len(ids)))


def share_of_padding(sizes, length):
    "What is not text, longer documents cut"
    return 1 - sum(min(n, length) for n in sizes) / (length * len(sizes))


def share_without_cutting(sizes, length):
    return 1 - sum(sizes) / (length * len(sizes))


@pytest.mark.parametrize(
    "chapter,solution,mistake",
    [
        ("01_corpus", repeats, repeats_of_neighbours),
        ("01_corpus", chance, chance_of_a_group),
        ("02_tokenizer", next_pair, once_in_a_word),
        ("02_tokenizer", cut_word, longest_first),
        ("03_search", saved_by, saved_by_bytes),
        ("03_search", without_last, only_removed),
        ("04_vocab", dead, without_two_parts),
        ("04_vocab", falling_scores, scores_in_ones),
        ("04b_bytelevel", only_own, by_the_first_byte),
        ("04b_bytelevel", characters_per_pre_token, characters_per_word),
        ("05_mixtral", exchange, exchange_without_the_router),
        ("05_mixtral", plain_weights, weights_that_sum_to_one),
        ("05_mixtral", balance_of_layers, balance_of_all_layers_together),
        ("07_pack", position_ids, position_ids_of_one_document),
        ("07_pack", share_of_padding, share_without_cutting),
        ("06_init", share_of_front, share_without_front),
        ("06_init", divided, divided_evenly),
        ("05b_upcycle", added_parameters, without_the_router),
        ("05b_upcycle", split_network, with_all_of_down),
        ("08_qlora", weight_of, evenly_spaced),
        ("08_qlora", lora_size, size_of_the_product),
        ("08_qlora", merged, merged_without_the_rank),
        ("09_pretrain", to_bits_per_byte, nats_per_byte),
        ("09_pretrain", loss_of_parts, mean_of_parts),
        ("10_merge", mean_update, product_of_means),
        ("10_merge", one_pair, one_pair_without_scales),
        ("11_sft", last_answer_only, last_token_only),
        ("11_sft", harmless, marks_removed),
        ("12_generate", min_p, above_a_share),
        ("12_generate", until_end, without_ends),
        ("13_evaluate", favourite, accuracy),
        ("13_evaluate", likeliest_for_its_length, likeliest),
        ("13b_gain", pair_interval, strangers_interval),
        ("13b_gain", questions_needed, questions_for_one_model),
        ("14_pipeline", made_again, made_again_at_once),
        ("14_pipeline", change_of, mean_of_changes),
    ],
)
def test_a_solution_passes_stub_and_mistake_fail(chapter, solution, mistake):
    defined = exercises(chapter)
    check = defined[f"check_{solution.__name__}"]
    check(solution)
    for attempt in (defined[solution.__name__], mistake):
        with pytest.raises((AssertionError, TypeError, AttributeError)):
            check(attempt)


@pytest.mark.parametrize("error", [RuntimeError, IndexError])
@pytest.mark.parametrize("chapter", TELL_EVERY_ERROR)
def test_an_answer_that_raises_is_not_right_yet(chapter, error, capsys):
    "The loop at the end of the cell goes on, whatever a wrong answer raises"

    def raising(*args, **kw):
        raise error

    defined = dict(exercises(chapter))
    names = [name.removeprefix("check_") for name in defined if name.startswith("check_")]
    defined |= dict.fromkeys(names, raising)
    loop = ast.parse(code_cells(chapter)[1]).body[-1]
    assert isinstance(loop, ast.For)
    capsys.readouterr()
    exec(ast.unparse(loop), defined)
    assert capsys.readouterr().out == "raising is not right yet\n" * len(names)
