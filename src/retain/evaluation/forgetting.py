"""What was kept and what was lost, read off a score matrix.

    R[i, j]   the score on task j after stage i; row 0 is the base model, row i comes after task i was learned
              (stages, tasks) = (T + 1, T), the columns in learning order, NaN where a task was not scored

Higher must be better: pass a lower-is-better metric through `oriented` first (`score_matrix` does), or every sign here
is reversed. Below, tasks count from 1 as in the papers, so that `R[j, j]` is task j right after it was learned.

Each figure is a `Measure`: the mean, the values that it averages, and the reason where it is undefined. A task that was
never scored (a whole column of NaN) is left out of every mean and named; any other missing score that a figure needs
makes the figure undefined, because a mean over fewer tasks is a different figure.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retain.types import Score

__all__ = [
    "FIGURES",
    "LOWER_IS_BETTER",
    "Figure",
    "Measure",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "intransigence",
    "learning_accuracy",
    "measure",
    "measures",
    "oriented",
    "score_matrix",
]

FloatArray = NDArray[np.float64]

LOWER_IS_BETTER = frozenset({"kl", "perplexity"})
"""The metrics of which less is better."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of a score matrix.

    Args:
        value: the mean of `parts`; None where it is undefined.
        parts: what is averaged, in learning order: one value a task (a stage, for the average incremental accuracy),
            None where a score is missing.
        reason: why `value` is undefined, or which tasks it leaves out.
    """

    value: float | None
    parts: tuple[float | None, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """How a figure is read off R.

    Args:
        parts: from (..., T + 1, T) to what is averaged, (..., num_parts); leading axes are resamples.
        tasks: the columns that the parts belong to.
        is_change: is it a difference of scores?
    """

    parts: Callable[[FloatArray], FloatArray]
    tasks: slice
    is_change: bool


def oriented(value: float, metric: str) -> float:
    """A suite's figure, turned so that higher is better.

    Perplexity becomes the mean log-likelihood of a token (nats), -log(perplexity), so that differences of it are
    differences in nats; KL changes its sign.
    """
    if metric == "perplexity":
        return -math.log(value)
    return -value if metric in LOWER_IS_BETTER else value


def score_matrix(stages: Sequence[Mapping[str, Score]], tasks: Sequence[str]) -> FloatArray:
    """R, (stages, tasks), from the scores of every stage, oriented so that higher is better.

    Args:
        stages: the scores by suite, of the base model first.
        tasks: the tasks' names in learning order.
    """
    matrix = np.full((len(stages), len(tasks)), np.nan)
    for i, scores in enumerate(stages):
        for j, task in enumerate(tasks):
            if task in scores:
                matrix[i, j] = oriented(scores[task].value, scores[task].metric)
    return matrix


def _just_learned(matrix: FloatArray) -> FloatArray:
    """R[j, j] of every task, (..., T)."""
    return np.diagonal(matrix[..., 1:, :], axis1=-2, axis2=-1)


def _never_scored(matrix: FloatArray) -> NDArray[np.bool_]:
    """(..., T), the tasks whose whole column is NaN."""
    return np.asarray(np.isnan(matrix).all(axis=-2))


def _incremental_parts(matrix: FloatArray) -> FloatArray:
    """The mean of R[i, j] over j <= i, for every stage after the base, (..., T); over tasks that were ever scored."""
    num_tasks = matrix.shape[-1]
    seen = np.tril(np.ones((num_tasks, num_tasks), dtype=bool)) & ~_never_scored(matrix)[..., None, :]
    counts = seen.sum(axis=-1)
    sums = np.where(seen, matrix[..., 1:, :], 0.0).sum(axis=-1)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _backward_parts(matrix: FloatArray) -> FloatArray:
    """R[T, j] - R[j, j] of every task but the last, (..., T - 1)."""
    return (matrix[..., -1, :] - _just_learned(matrix))[..., :-1]


def _forward_parts(matrix: FloatArray) -> FloatArray:
    """R[j - 1, j] - R[0, j] of every task but the first, (..., T - 1)."""
    before = np.diagonal(matrix[..., :-1, :], axis1=-2, axis2=-1)
    return (before - matrix[..., 0, :])[..., 1:]


def _forgetting_parts(matrix: FloatArray) -> FloatArray:
    """max of R[l, j] over l in {j, ..., T - 1}, minus R[T, j], of every task but the last, (..., T - 1)."""
    num_tasks = matrix.shape[-1]
    learned = np.tril(np.ones((num_tasks, num_tasks), dtype=bool))[:-1]
    stages: FloatArray = np.where(learned, matrix[..., 1:-1, :], -np.inf)
    return stages.max(axis=-2, initial=-np.inf)[..., :-1] - matrix[..., -1, :-1]


FIGURES = {
    "average_accuracy": Figure(lambda matrix: matrix[..., -1, :], slice(None), is_change=False),
    "average_incremental_accuracy": Figure(_incremental_parts, slice(None), is_change=False),
    "backward_transfer": Figure(_backward_parts, slice(None, -1), is_change=True),
    "forward_transfer": Figure(_forward_parts, slice(1, None), is_change=True),
    "forgetting": Figure(_forgetting_parts, slice(None, -1), is_change=True),
    "learning_accuracy": Figure(_just_learned, slice(None), is_change=False),
}
"""Every figure that a matrix alone determines."""


def _checked(matrix: ArrayLike) -> FloatArray:
    """R as an array.

    Raises:
        ValueError: unless it has one row for the base model and one for each of its tasks.
    """
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1] + 1:
        raise ValueError(
            f"a score matrix has a row for the base model and one after each task, (T + 1, T); got {array.shape}. "
            "In the middle of a sequence take the tasks learned so far: `R[: t + 1, :t]`"
        )
    return array


def _averaged(matrix: FloatArray, parts: FloatArray, columns: slice) -> Measure:
    """The mean of the parts, each of which belongs to a task (its column)."""
    tasks = range(matrix.shape[1])[columns]
    values = tuple(None if math.isnan(part) else float(part) for part in parts)
    if not values:
        return Measure(None, reason="one task alone has no other before or after it" if matrix.size else "no tasks")
    never = _never_scored(matrix)
    missing = [str(task + 1) for task, part in zip(tasks, values, strict=True) if part is None and not never[task]]
    if missing:
        return Measure(None, values, f"a score that it needs is missing for task {', '.join(missing)}")
    kept = [part for part in values if part is not None]
    if not kept:
        return Measure(None, values, "no task was scored")
    left_out = ", ".join(str(task + 1) for task in tasks if never[task])
    return Measure(sum(kept) / len(kept), values, f"leaves out task {left_out}: never scored" if left_out else "")


def measure(name: str, matrix: ArrayLike) -> Measure:
    """The figure of that name in `FIGURES`."""
    array = _checked(matrix)
    return _averaged(array, FIGURES[name].parts(array), FIGURES[name].tasks)


def measures(matrix: ArrayLike) -> dict[str, Measure]:
    """Every figure that the matrix alone determines, by name."""
    return {name: measure(name, matrix) for name in FIGURES}


def average_accuracy(matrix: ArrayLike) -> Measure:
    """ACC = 1/T sum_j R[T, j].

    Source: Lopez-Paz and Ranzato 2017, eq. 2.
    """
    return measure("average_accuracy", matrix)


def average_incremental_accuracy(matrix: ArrayLike) -> Measure:
    """1/T sum_i 1/i sum_{j <= i} R[i, j]; its parts are one a stage.

    Source: Rebuffi et al. 2017 (iCaRL), section 4.
    """
    return measure("average_incremental_accuracy", matrix)


def backward_transfer(matrix: ArrayLike) -> Measure:
    """BWT = 1/(T - 1) sum_{j < T} (R[T, j] - R[j, j]); below 0 where later tasks took something away.

    Source: Lopez-Paz and Ranzato 2017, eq. 3. Other variants divide by T, or average over all i > j; these do not.
    """
    return measure("backward_transfer", matrix)


def forward_transfer(matrix: ArrayLike) -> Measure:
    """FWT = 1/(T - 1) sum_{j >= 2} (R[j - 1, j] - R[0, j]): what earlier tasks taught about one not yet learned.

    Undefined where unseen tasks cannot be answered (outputs that are masked until learned): leave NaN there.

    Source: Lopez-Paz and Ranzato 2017, eq. 4.
    Differs: their b_j is a randomly initialised model; ours is the pretrained base model, row 0.
    """
    return measure("forward_transfer", matrix)


def forgetting(matrix: ArrayLike) -> Measure:
    """F = 1/(T - 1) sum_{j < T} (max_{l in {j, ..., T - 1}} R[l, j] - R[T, j]).

    The best that the task ever was, before the last stage, minus what it is. Below 0 where the last stage made it
    better than ever. Equals -BWT where every task was best right after it was learned.

    Source: Chaudhry et al. 2018 (Riemannian walk), the forgetting measure.
    Differs: l starts at the task's own stage, theirs at the first, when the task was not learned yet.
    """
    return measure("forgetting", matrix)


def learning_accuracy(matrix: ArrayLike) -> Measure:
    """LA = 1/T sum_j R[j, j]: how well each task was learned at its own stage (plasticity).

    Source: Riemer et al. 2019 (MER).
    """
    return measure("learning_accuracy", matrix)


def intransigence(matrix: ArrayLike, reference: ArrayLike) -> Measure:
    """I = 1/T sum_k (a*_k - R[k, k]): what protecting the old cost the new.

    Args:
        matrix: R.
        reference: (T,), a*: each task's score in a model that was free to learn it, joint or alone.

    Source: Chaudhry et al. 2018, the intransigence measure, of one k; this is its mean.
    """
    array = _checked(matrix)
    best = np.asarray(reference, dtype=np.float64)
    if best.shape != array.shape[1:]:
        raise ValueError(f"one reference score a task: expected {array.shape[1]}, got an array of shape {best.shape}")
    return _averaged(array, best - _just_learned(array), slice(None))
