"""How sure a figure is: confidence intervals over examples, paired wherever two models answered the same ones.

Scores that are 0 or 1 have closed forms, which hold their level where the bootstrap does not: few examples, or all of
them right. Everything else is bootstrapped over examples, from a seed. No interval of a bounded score has width 0:
that nothing changed on n examples leaves room for a change on about 3/n of all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retain.evaluation.forgetting import FIGURES, LOWER_IS_BETTER, measure
from retain.types import Answer

__all__ = [
    "Interval",
    "interval",
    "is_noise",
    "item_scores",
    "matrix_intervals",
    "mcnemar",
    "paired_interval",
]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over examples and its confidence interval.

    Args:
        mean: the mean as it was observed.
        low, high: the interval's ends, low <= mean <= high.
        num: how many examples.
    """

    mean: float
    low: float
    high: float
    num: int


def interval(
    values: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    confidence: float = 0.95,
    bounded: bool | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of the values with its confidence interval over examples.

        mean = sum(values * weights) / sum(weights)

    Values of 0 and 1: Wilson's score interval (Wilson 1927). Others: the percentile bootstrap, its quantiles moved
    outwards for small n (Hesterberg 2015, the expanded percentile interval: as wide as a t interval).

    Args:
        values: (n,), one an example.
        weights: (n,), above 0, how much each example counts; its tokens, for a mean over tokens.
        confidence: between 0 and 1.
        bounded: do the values lie between 0 and 1 by definition, as shares do and nats do not? None: where they do.
            Of unbounded values that are all equal nothing can be said beyond their mean.
        num_resamples: bootstrap samples.
        seed: of the bootstrap.

    Raises:
        ValueError: without values, or with one that is not a number.
    """
    array = _numbers(values)
    if weights is None and bounded is not False and np.isin(array, (0.0, 1.0)).all():
        return _wilson(array, confidence)
    bounded = bool((array >= 0).all() and (array <= 1).all()) if bounded is None else bounded
    return _bootstrap(array, weights, confidence, (0.0, 1.0) if bounded else None, num_resamples, seed)


def paired_interval(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    confidence: float = 0.95,
    bounded: bool | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of after - before over the examples that both scored, with its confidence interval.

    Much narrower than the difference of two separate intervals, because what is hard in an example cancels. Scores of
    0 and 1: the adjusted Wald interval, the normal one with an example won and an example lost added (Bonett and Price
    2012). Others: the bootstrap of `interval` over the differences.

    Args:
        before, after: score by example id.
        confidence, bounded, num_resamples, seed: as for `interval`; a bounded score changes by at most 1 either way.

    Raises:
        ValueError: if no example was scored by both.
    """
    ids = sorted(before.keys() & after.keys())
    old, new = _numbers([before[i] for i in ids]), _numbers([after[i] for i in ids])
    both = np.concatenate([old, new])
    if bounded is not False and np.isin(both, (0.0, 1.0)).all():
        return _adjusted_wald(new - old, confidence)
    bounded = bool((both >= 0).all() and (both <= 1).all()) if bounded is None else bounded
    return _bootstrap(new - old, None, confidence, (-1.0, 1.0) if bounded else None, num_resamples, seed)


def is_noise(interval: Interval) -> bool:
    """Does the interval of a difference leave it open whether there is one?"""
    return interval.low <= 0.0 <= interval.high


def mcnemar(num_lost: int, num_gained: int) -> float:
    """The exact two-sided p-value of McNemar's test: is a change as likely to be a loss as a gain?

        p = min(1, 2 * P(K <= min(lost, gained))),  K ~ Binomial(lost + gained, 1/2)

    Args:
        num_lost: examples that were right and are wrong now.
        num_gained: examples that were wrong and are right now.
    """
    total = num_lost + num_gained
    outcomes = tail = 1  # total choose k, and their sum
    for k in range(min(num_lost, num_gained)):
        outcomes = outcomes * (total - k) // (k + 1)
        tail += outcomes
    return min(1.0, 2 * tail / 2**total)


def item_scores(
    stages: Sequence[Sequence[Answer]], tasks: Sequence[str], *, metrics: Mapping[str, str] | None = None
) -> list[FloatArray]:
    """For every task the scores of its examples, (stages, examples), higher is better; NaN where it was not scored.

    Args:
        stages: the answers of every stage, of the base model first.
        tasks: the tasks' names in learning order.
        metrics: the metric's name by task, for those of which less is better.
    """
    found: list[FloatArray] = []
    for task in tasks:
        sign = -1.0 if (metrics or {}).get(task) in LOWER_IS_BETTER else 1.0
        rows = [{answer.id: sign * answer.score for answer in answers if answer.suite == task} for answers in stages]
        scored = [row.keys() for row in rows if row]
        ids = sorted(set(scored[0]).intersection(*scored[1:])) if scored else []
        found.append(np.array([[row.get(i, math.nan) for i in ids] for row in rows]).reshape(len(stages), len(ids)))
    return found


def matrix_intervals(
    items: Sequence[ArrayLike],
    *,
    differences: bool = False,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Confidence intervals of ACC, BWT, FWT, forgetting and learning accuracy over examples.

    Resamples examples within each task, the same ones for every stage, and recomputes the whole R each time. A task
    whose part of a figure did not vary in any resample adds the width that its n equal examples leave open.

    Args:
        items: for every task in learning order (T + 1, examples), the score of each example after each stage, row 0
            the base model, higher is better; NaN where it was not scored (`item_scores` makes them).
        differences: are the items differences of two runs' scores, rather than scores?
        confidence, num_resamples, seed: as for `interval`.

    Returns:
        An interval by name of `FIGURES`, with as many examples as its tasks have; undefined figures are absent, and
        so is the average incremental accuracy, whose parts share examples. R here holds means over examples: where a
        suite's own figure is another (BLEU, chrF, perplexity), so is the interval. Where every score lies between 0
        and 1, an interval stays within what the figure can be.
    """
    arrays = [np.asarray(task, dtype=np.float64) for task in items]
    arrays = [task[:, :0] if np.isnan(task).all() else task for task in arrays]
    means = np.full((len(arrays) + 1, len(arrays)), np.nan)
    resampled = np.full((num_resamples, *means.shape), np.nan)
    for j, task in enumerate(arrays):
        if task.shape[1]:
            means[:, j] = task.mean(axis=1)
            resampled[:, :, j] = _resampled_means(task, num_resamples, seed + j)
    nums = np.array([task.shape[1] for task in arrays])
    lowest = -1 if differences else 0
    bounds = [bool(np.nanmin(task) >= lowest and np.nanmax(task) <= 1) if task.size else False for task in arrays]
    unseen = np.where(bounds, [_unseen(num, confidence) if num else 0.0 for num in nums], 0.0)

    found: dict[str, Interval] = {}
    for name, figure in FIGURES.items():
        value = measure(name, means).value
        if value is None or name == "average_incremental_accuracy":
            continue
        kept = nums[figure.tasks] > 0
        parts = figure.parts(resampled)[:, kept]
        num = nums[figure.tasks][kept]
        low, high = _quantiles(parts.mean(axis=1), int(num.min()), confidence)
        still = np.where(np.ptp(parts, axis=0) < 1e-12, unseen[figure.tasks][kept], 0.0)
        extra = float(np.sqrt((still**2).sum())) / len(num)
        below, above = math.hypot(max(value - low, 0.0), extra), math.hypot(max(high - value, 0.0), extra)
        ends = value - below, value + above
        if all(bounded for bounded, n in zip(bounds[figure.tasks], nums[figure.tasks], strict=True) if n):
            ends = max(lowest - figure.is_change, ends[0]), min(1 + (differences and figure.is_change), ends[1])
        found[name] = Interval(value, *ends, int(num.sum()))
    return found


def _numbers(values: ArrayLike) -> FloatArray:
    """The values as an array of at least one finite number."""
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if not array.size or not np.isfinite(array).all():
        finite = int(np.isfinite(array).sum())
        raise ValueError(f"a mean needs at least one value, all of them finite; got {array.size}, {finite} finite")
    return array


def _z(confidence: float) -> float:
    """The normal quantile of a two-sided interval: 1.96 at 0.95."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _unseen(num: int, confidence: float) -> float:
    """The largest share of examples that may behave otherwise although none of `num` did: Wilson's z^2 / (n + z^2).

    3.84 / n at 95 %, two-sided; the one-sided rule of three is 3 / n.
    """
    z = _z(confidence)
    return z * z / (num + z * z)


def _wilson(values: FloatArray, confidence: float) -> Interval:
    """Wilson's score interval for a share."""
    n, z = len(values), _z(confidence)
    share = float(values.mean())
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, 0.0 if share == 0 else centre - half, 1.0 if share == 1 else centre + half, n)


def _adjusted_wald(differences: FloatArray, confidence: float) -> Interval:
    """Bonett and Price's interval for a mean of differences in {-1, 0, 1}."""
    n, mean = len(differences), float(differences.mean())
    centre = float(differences.sum()) / (n + 2)
    variance = (float((differences**2).sum()) + 2) / (n + 2) - centre**2
    half = _z(confidence) * math.sqrt(variance / (n + 2))
    return Interval(mean, max(-1.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)), n)


def _bootstrap(
    values: FloatArray,
    weights: ArrayLike | None,
    confidence: float,
    limits: tuple[float, float] | None,
    num_resamples: int,
    seed: int,
) -> Interval:
    """The percentile bootstrap of a weighted mean; where all values are equal, what their number leaves open."""
    n = len(values)
    importance = np.ones(n) if weights is None else _numbers(weights)
    mean = float((values * importance).sum() / importance.sum())
    if np.ptp(values) < 1e-12:
        low, high = limits or (mean, mean)
        unseen = _unseen(n, confidence)
        return Interval(mean, mean - (mean - low) * unseen, mean + (high - mean) * unseen, n)
    sums = _resampled_means(np.stack([values * importance, importance]), num_resamples, seed)  # (num_resamples, 2)
    low, high = _quantiles(sums[:, 0] / sums[:, 1], n, confidence)
    return Interval(mean, min(low, mean), max(high, mean), n)


def _resampled_means(rows: FloatArray, num_resamples: int, seed: int) -> FloatArray:
    """(num_resamples, rows): the mean of every row over n columns drawn with replacement, the same for all rows."""
    generator = np.random.default_rng(seed)
    n = rows.shape[1]
    chunk = max(1, 4_000_000 // n)  # draws held at once
    means: list[FloatArray] = []
    for start in range(0, num_resamples, chunk):
        drawn = generator.integers(0, n, size=(min(chunk, num_resamples - start), n))
        means.append(np.stack([row[drawn].mean(axis=1) for row in rows], axis=1))
    return np.concatenate(means)


def _quantiles(means: FloatArray, num: int, confidence: float) -> tuple[float, float]:
    """The ends of the interval among resampled means, moved outwards for few examples.

    A sample's spread is too small by sqrt((n - 1) / n), and a normal quantile too small for a t quantile.
    """
    z, freedom = _z(confidence), max(num - 1, 1)
    # Cornish and Fisher's expansion of Student's quantile (Abramowitz and Stegun 26.7.5)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    outside = NormalDist().cdf(-t * math.sqrt(num / freedom))
    low, high = np.quantile(means, [outside, 1 - outside])
    return float(low), float(high)
