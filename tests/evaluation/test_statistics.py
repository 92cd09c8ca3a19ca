"""Intervals against closed forms, against exact sums over all outcomes, and against the truth in simulation."""

import itertools
import math

import numpy as np
import pytest

from retain.evaluation.forgetting import FIGURES, measures
from retain.evaluation.statistics import (
    Interval,
    interval,
    is_noise,
    item_scores,
    matrix_intervals,
    mcnemar,
    paired_interval,
)
from retain.types import Answer


def by_id(values) -> dict[str, float]:
    return {str(i): float(value) for i, value in enumerate(values)}


def binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


# One mean


def test_wilson_against_the_textbook():
    found = interval([1] * 8 + [0] * 2)  # 8 of 10: Newcombe 1998's formula, worked by hand
    assert (found.mean, found.num) == (0.8, 10)
    assert found.low == pytest.approx(0.4901625, abs=1e-6)
    assert found.high == pytest.approx(0.9433178, abs=1e-6)


@pytest.mark.parametrize("n", [5, 100, 1000])
def test_zero_failures_leave_about_three_in_n(n: int):
    right, wrong = interval(np.ones(n)), interval(np.zeros(n))
    assert (right.mean, right.high, wrong.mean, wrong.low) == (1, 1, 0, 0)
    assert 1 - right.low == pytest.approx(wrong.high)
    assert min(3 / (n + 3), 3 / n) <= wrong.high <= 3.85 / n


def test_wilson_covers_the_truth():
    """Exactly, by summing over every outcome; the mean over shares is the level, and no share falls far below it."""
    n = 40
    intervals = [interval([1] * k + [0] * (n - k)) for k in range(n + 1)]
    shares = np.linspace(0.02, 0.98, 49)
    coverage = [
        sum(binomial(n, k, p) for k, found in enumerate(intervals) if found.low <= p <= found.high) for p in shares
    ]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)
    assert min(coverage) > 0.89


@pytest.mark.parametrize("n", [8, 30, 200])
@pytest.mark.parametrize("draw", ["normal", "uniform", "skewed"])
def test_the_bootstrap_covers_the_truth(n: int, draw: str):
    generator = np.random.default_rng(n)
    samples, truth = {
        "normal": lambda: (generator.normal(2.0, 3.0, (500, n)), 2.0),
        "uniform": lambda: (generator.random((500, n)), 0.5),
        "skewed": lambda: (generator.exponential(1.0, (500, n)), 1.0),
    }[draw]()
    found = [interval(sample, num_resamples=400, seed=i) for i, sample in enumerate(samples)]
    coverage = np.mean([one.low <= truth <= one.high for one in found])
    assert (0.87 if draw == "skewed" and n < 30 else 0.92) <= coverage <= 0.98


def test_the_bootstrap_is_as_wide_as_a_t_interval():
    values = np.random.default_rng(0).normal(size=10)
    found = interval(values, num_resamples=20_000)
    half = 2.2621571628 * values.std(ddof=1) / math.sqrt(10)  # Student, 9 degrees of freedom
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)
    assert found.mean == pytest.approx(values.mean())


def test_confidence_is_used():
    values = np.random.default_rng(0).random(50)
    narrow, wide = interval(values, confidence=0.8), interval(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).random(50)
    assert interval(values, seed=3) == interval(values, seed=3) != interval(values, seed=4)


def test_resampling_in_chunks_changes_the_draws_only():
    values = np.random.default_rng(0).normal(size=30_000)  # more than one chunk
    found = interval(values, num_resamples=300)
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(30_000), rel=0.2)


def test_weights_make_a_mean_over_tokens():
    nats, tokens = np.array([1.0, 4.0]), np.array([30, 10])
    assert interval(nats, weights=tokens).mean == pytest.approx((30 + 40) / 40)
    assert interval(nats, weights=[1, 1]).mean == pytest.approx(2.5)


def test_weighted_means_cover_the_truth():
    """The truth is the ratio of expectations: 2 * 1/2 + 1 * 1/2 nats over 1.5 tokens, where rare rows are long."""
    generator = np.random.default_rng(5)
    inside = 0
    for i in range(300):
        tokens = generator.integers(1, 3, 60)
        nats = np.where(tokens == 2, 1.0, 3.0) + generator.normal(0, 0.5, 60)
        found = interval(nats, weights=tokens, num_resamples=400, seed=i)
        inside += found.low <= (2 * 1.0 + 1 * 3.0) / 3 <= found.high
    assert 0.91 <= inside / 300 <= 0.98


def test_equal_values():
    shares = interval([0.25] * 20)
    assert shares.mean == 0.25
    assert 0 < shares.low < 0.25 < shares.high < 1
    nats = interval([0.25] * 20, bounded=False)
    assert (nats.low, nats.mean, nats.high) == (0.25, 0.25, 0.25)
    assert interval([0.0] * 5, bounded=False) == Interval(0.0, 0.0, 0.0, 5)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_what_has_no_mean_is_refused(values: list[float]):
    with pytest.raises(ValueError, match="at least one value"):
        interval(values)


# Two models on the same examples


def test_paired_by_id():
    before = {"a": 0.5, "b": 0.25, "only before": 0.0}
    after = {"b": 0.75, "only after": 1.0, "a": 0.25}
    found = paired_interval(before, after)
    assert (found.mean, found.num) == (0.125, 2)
    with pytest.raises(ValueError, match="at least one value"):
        paired_interval({"a": 1.0}, {"b": 1.0})


def test_adjusted_wald_by_hand():
    before, after = [1] * 6 + [0] * 4, [0, 0, 1, 1, 1, 1, 1, 0, 0, 0]  # 2 lost, 1 gained of 10
    found = paired_interval(by_id(before), by_id(after))
    centre, variance = -1 / 12, (3 + 2) / 12 - 1 / 144
    half = 1.959964 * math.sqrt(variance / 12)
    assert found.mean == pytest.approx(-0.1)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-6)


@pytest.mark.parametrize(("lost", "gained"), [(0.02, 0.02), (0.2, 0.05), (0.1, 0.0), (0.4, 0.3)])
def test_paired_shares_cover_the_truth(lost: float, gained: float):
    """Exactly: the sum over every number of lost and gained examples of n."""
    n, coverage = 30, 0.0
    for k, m in itertools.product(range(n + 1), repeat=2):
        if k + m <= n:
            p = math.comb(n, k) * math.comb(n - k, m) * lost**k * gained**m * (1 - lost - gained) ** (n - k - m)
            if p > 1e-9:
                old, new = [1] * k + [0] * (n - k), [0] * k + [1] * m + [0] * (n - k - m)
                found = paired_interval(by_id(old), by_id(new))
                coverage += p * (found.low <= gained - lost <= found.high)
    assert 0.93 <= coverage <= 1.0


def test_graded_pairs_cover_the_truth():
    generator = np.random.default_rng(1)
    inside = 0
    for i in range(400):
        old = generator.random(40)
        new = np.where(generator.random(40) < 0.3, old * generator.random(40), old)  # E = -0.3 * 0.5 * 0.5
        found = paired_interval(by_id(old), by_id(new), num_resamples=400, seed=i)
        inside += found.low <= -0.075 <= found.high
    assert 0.91 <= inside / 400 <= 0.98


def test_pairing_is_narrower_than_two_intervals():
    generator = np.random.default_rng(2)
    old = generator.normal(0, 5, 100)
    new = old - 0.5 + generator.normal(0, 0.1, 100)
    paired = paired_interval(by_id(old), by_id(new))
    assert not is_noise(paired)
    assert paired.high - paired.low < 0.1 * (interval(new).high - interval(new).low)


def test_nothing_changed_is_not_certainty():
    for old in (np.ones(20), np.full(20, 0.4)):
        found = paired_interval(by_id(old), by_id(old))
        assert found.mean == 0
        assert -0.2 < found.low < -0.1
        assert 0.1 < found.high < 0.2
        assert is_noise(found)
    same = paired_interval(by_id([3.5, -2.0]), by_id([3.5, -2.0]))  # nats have no bound to be near
    assert same == Interval(0.0, 0.0, 0.0, 2)
    assert paired_interval(by_id([0, 0]), by_id([0, 0]), bounded=False) == Interval(0.0, 0.0, 0.0, 2)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_a_total_loss_lies_within_its_interval(n: int):
    found = paired_interval(by_id(np.ones(n)), by_id(np.zeros(n)))
    assert -1 == found.low == found.mean < found.high


def test_is_noise():
    assert is_noise(Interval(0.1, -0.1, 0.3, 9))
    assert is_noise(Interval(0.0, 0.0, 0.0, 9))
    assert not is_noise(Interval(0.1, 0.05, 0.3, 9))
    assert not is_noise(Interval(-0.1, -0.2, -0.01, 9))


@pytest.mark.parametrize(
    ("lost", "gained", "expected"), [(0, 0, 1.0), (0, 5, 0.0625), (5, 0, 0.0625), (1, 7, 0.0703125), (4, 4, 1.0)]
)
def test_mcnemar_by_hand(lost: int, gained: int, expected: float):
    assert mcnemar(lost, gained) == pytest.approx(expected)


def test_mcnemar_of_many():
    assert mcnemar(0, 2000) < 1e-300
    assert mcnemar(5000, 5000) == 1.0


# The whole matrix


def answer(suite: str, i: str, score: float) -> Answer:
    return Answer(suite, i, "", "", "", score)


def test_item_scores_are_lined_up_by_id():
    stages = [
        [answer("a", "gone", 0.7), answer("a", "x", 0.0), answer("a", "y", 0.1), answer("b", "z", 3.0)],
        [answer("a", "y", 0.3), answer("a", "x", 0.2), answer("a", "new", 0.9)],
        [answer("a", "x", 0.4), answer("a", "y", 0.5), answer("b", "z", 4.0)],
    ]
    a, b, c = item_scores(stages, ["a", "b", "c"], metrics={"b": "perplexity"})
    assert a.tolist() == [[0.0, 0.1], [0.2, 0.3], [0.4, 0.5]]
    assert b[[0, 2]].tolist() == [[-3.0], [-4.0]]
    assert np.isnan(b[1]).all()
    assert c.shape == (3, 0)


def test_matrix_intervals_surround_the_figures_of_the_mean_matrix():
    generator = np.random.default_rng(0)
    items = [(generator.random((4, 50)) < 0.6).astype(float) for _ in range(3)]
    matrix = np.stack([task.mean(axis=1) for task in items], axis=1)
    found = matrix_intervals(items)
    assert found.keys() == FIGURES.keys() - {"average_incremental_accuracy"}
    for name, one in found.items():
        assert one.mean == pytest.approx(measures(matrix)[name].value)
        assert one.low <= one.mean <= one.high
        assert one.num == (150 if name in ("average_accuracy", "learning_accuracy") else 100)


def test_one_old_task_of_graded_scores_is_a_paired_bootstrap():
    generator = np.random.default_rng(0)
    items = [generator.random((3, 40)), generator.random((3, 40))]
    found = matrix_intervals(items, num_resamples=5000)["backward_transfer"]
    paired = paired_interval(by_id(items[0][1]), by_id(items[0][2]), num_resamples=5000)
    assert (found.mean, found.low, found.high) == pytest.approx((paired.mean, paired.low, paired.high), abs=0.01)


def test_matrix_intervals_cover_the_truth():
    """Two tasks whose examples share a difficulty over stages, so that unpaired intervals would be far too wide."""
    generator = np.random.default_rng(0)
    truth = np.array([[0.2, 0.3], [0.9, 0.3], [0.6, 0.8]])
    true = measures(truth)
    inside = dict.fromkeys(["average_accuracy", "backward_transfer", "forgetting", "forward_transfer"], 0)
    widths = []
    for i in range(300):
        items = []
        for j in range(2):
            difficulty = generator.random(80)
            items.append((difficulty[None] < truth[:, j, None]).astype(float))
        found = matrix_intervals(items, num_resamples=300, seed=i)
        widths.append(found["backward_transfer"].high - found["backward_transfer"].low)
        for name in inside:
            inside[name] += found[name].low - 1e-9 <= true[name].value <= found[name].high + 1e-9
    for name, count in inside.items():
        assert count / 300 >= 0.91, name
        if name != "forward_transfer":  # of which nothing ever varies
            assert count / 300 <= 0.985, name
    assert np.mean(widths) < 0.25


def test_items_that_all_stayed_leave_room_for_change():
    kept = np.tile([[0.0], [1.0], [1.0]], (1, 20))
    found = matrix_intervals([kept, kept])["forgetting"]
    assert found.mean == 0
    assert found.high == pytest.approx(1.96**2 / (20 + 1.96**2), abs=1e-3)
    nats = matrix_intervals([kept * 3, kept * 3])["forgetting"]
    assert nats.high == 0


def test_intervals_stay_within_what_a_figure_can_be():
    """Nearly all right and one wrong: what the examples leave open would reach beyond 100 %."""
    items = [np.ones((3, 12)), np.ones((3, 12))]
    items[0][0] = items[1][0] = 0
    items[1][1:, 0] = 0
    found = matrix_intervals(items)
    assert found["average_accuracy"].high == 1
    assert found["forward_transfer"].high <= 1
    assert matrix_intervals([3 * task for task in items])["average_accuracy"].high > 2.875  # no share: no limit known


def test_a_difference_that_is_never_below_zero_may_still_be_noise():
    better = np.zeros((3, 12))
    found = matrix_intervals([better, better], differences=True)["average_accuracy"]
    assert found.low < 0 < found.high


def test_undefined_figures_are_absent():
    assert matrix_intervals([np.array([[0.0, 1.0], [1.0, 1.0]])]).keys() == {"average_accuracy", "learning_accuracy"}
    missing = np.ones((3, 5))
    missing[0] = math.nan
    assert "forward_transfer" not in matrix_intervals([np.ones((3, 5)), missing])
    left_out = matrix_intervals([np.ones((3, 5)), np.full((3, 4), math.nan)])
    assert left_out["average_accuracy"].num == 5
    assert 0 < left_out["average_accuracy"].low < 1


def test_tasks_are_resampled_apart():
    """Two tasks of the same scores: their mean is surer than one of them by the square root of 2."""
    scores = np.random.default_rng(0).random((3, 100))
    one = interval(scores[2], num_resamples=5000)
    both = matrix_intervals([scores, scores], num_resamples=5000)["average_accuracy"]
    assert (one.high - one.low) / (both.high - both.low) == pytest.approx(math.sqrt(2), rel=0.05)
