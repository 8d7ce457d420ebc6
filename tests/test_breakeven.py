"Where two learning curves cross: the interval covers, and the command speaks of adapters."

import json

import numpy as np
import pytest

from cmixtral_nb.breakeven import Curves, crossings, fit_curves, in_words, judge, read_arm
from cmixtral_nb.stages import StageError

READ = np.linspace(0, 1e6, 11)


def power_law(rng, low, high):
    "A curve of the family that is fitted"
    start, floor = rng.uniform(low, high), rng.uniform(0.6, 1.4)
    bend = 1e6 * np.exp(rng.uniform(np.log(0.02), np.log(2)))
    numbers = floor, start - floor, bend, rng.uniform(0.1, 1.5)
    return lambda n: Curves(*(np.array([x]) for x in numbers)).at(n)[0]


def two_speeds(rng, low, high):
    "A curve of another family: a quick and a slow exponential decay"
    start, floor, share = rng.uniform(low, high), rng.uniform(0.6, 1.4), rng.uniform(0.3, 0.8)
    quick, slow = 1e6 * rng.uniform(0.05, 0.2), 1e6 * rng.uniform(0.5, 3)

    def at(n):
        fall = share * np.exp(-n / quick) + (1 - share) * np.exp(-n / slow)
        return floor + (start - floor) * fall

    return at


def true_crossing(extended, control):
    "From where on the first is lower, within ten times the text"
    places = np.concatenate([[0], np.geomspace(5e3, 1e7, 20_000)])
    above = np.flatnonzero(extended(places) >= control(places))
    if not len(above):
        return 0.0
    return places[above[-1] + 1] if above[-1] + 1 < len(places) else np.inf


def one_pair(seed, family):
    "Verdict on a random pair of curves with noise, and the truth"
    rng = np.random.default_rng(seed)
    arms = family(rng, 2.3, 3.2), family(rng, 1.6, 2.2)
    sigma = rng.choice([0.003, 0.01, 0.03])
    points = [arm(READ) + sigma * rng.standard_normal(11) for arm in arms]
    fits = [fit_curves(READ, bits, 1000, seed=number) for number, bits in enumerate(points)]
    return judge(crossings(fits[0], fits[1], budget=1e6)), true_crossing(*arms)


def test_the_interval_covers():
    "It says 90%; the bar is 85%. Half of the pairs do not cross as far as one looks: both answers"
    pairs = [one_pair(seed, power_law) for seed in range(1000, 1200)]
    # a grid place is 2% from the next
    covered = [v.low * 0.98 <= truth <= v.high * 1.02 for v, truth in pairs]
    finite = [bool(np.isfinite(truth)) for _, truth in pairs]
    assert 0.3 < np.mean(finite) < 0.7
    assert np.mean(covered) >= 0.85
    assert np.mean([c for c, f in zip(covered, finite, strict=True) if f]) >= 0.85


def test_it_is_seldom_sure_and_wrong_about_curves_of_another_family():
    pairs = [one_pair(seed, two_speeds) for seed in range(60)]
    sure = [(v, truth) for v, truth in pairs if v.verdict != "undecided"]
    wrong = [1 for v, truth in sure if (v.verdict == "pays") != bool(np.isfinite(truth))]
    assert len(sure) >= 20 and len(wrong) <= 0.25 * len(sure)  # five of six are right


def test_a_trial_on_real_weights():
    "SmolLM2-135M and 6,000 Chinese pieces: after 0.6 MB of text there is no crossing in sight"
    megabytes = np.array([0, 0.25, 0.5, 0.61])
    extended = fit_curves(megabytes * 1e6, np.array([2.673, 2.095, 1.944, 1.891]))
    control = fit_curves(np.array([0, 0.25e6, 0.37e6]), np.array([1.760, 1.515, 1.500]), seed=1)
    v = judge(crossings(extended, control, budget=0.61e6))
    assert v.verdict != "pays" and v.share < 0.5 and v.low > 0.61e6


def test_a_control_that_overtakes_is_not_said_to_stay_apart():
    "The extended model is ahead at first: the curves do cross, and it is behind at the end"
    extended, control = (
        Curves(*(np.array([x]) for x in numbers))
        for numbers in ((1.2, 0.6, 0.1e6, 0.5), (0.9, 1.8, 0.05e6, 0.6))
    )
    told = in_words(judge(crossings(extended, control, budget=1e6)), 1e6)
    assert "the extended model is not better at 10 MB" in told and "cross" not in told


def test_the_same_draws_for_the_same_seed():
    bits = power_law(np.random.default_rng(0), 2, 3)(READ)
    once, again, other = (fit_curves(READ, bits + 0.01, 100, seed) for seed in (0, 0, 1))
    assert np.array_equal(once.floor, again.floor) and not np.array_equal(once.floor, other.floor)


@pytest.mark.parametrize("found", [[0.0], [np.inf], [1e5, 2e5], [1e5, np.inf]])
def test_every_verdict_is_one_line(found):
    line = in_words(judge(np.array(found)), 1e6)
    assert "\n" not in line and "nan" not in line and "inf" not in line


def test_of_a_real_adapter(micro):
    "What a step reads is what the tokens hold; three evaluations are too few"
    run = micro[0]
    adapter = json.loads((run / "adapter/manifest.json").read_text())
    tokens = json.loads((run / "tokens/manifest.json").read_text())["stats"]
    read = adapter["stats"]["bytes_per_step"]
    n_rows = sum(source["n_rows"] for source in tokens["sources"].values())
    for lang, source in tokens["sources"].items():
        # all examples of a language hold its whole text: its share of a step's examples
        per_row = source["n_bytes"] / source["n_rows"]
        share = 2 * source["n_rows"] / n_rows
        assert read[lang] == pytest.approx(per_row * share, rel=0.1)  # the last example is cut
    with pytest.raises(StageError, match="was evaluated 3 times, expected at least 5"):
        read_arm(run / "adapter", "zh")
