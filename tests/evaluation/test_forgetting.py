"""The figures of a score matrix against hand-computed ones and a loop that follows the papers' sums literally."""

import math

import numpy as np
import pytest

from retain.evaluation import forgetting as f
from retain.evaluation.forgetting import Measure
from retain.types import Score

BASE = [0.1, 0.1, 0.1]
R = np.array([BASE, [0.9, 0.1, 0.2], [0.6, 0.8, 0.3], [0.5, 0.7, 0.9]])


def with_score(value: float, i: int, j: int) -> np.ndarray:
    changed = R.copy()
    changed[i, j] = value
    return changed


def literal(matrix: np.ndarray) -> dict[str, float]:
    """The papers' sums with their own indices, from 1."""
    size = matrix.shape[1]
    get = lambda i, j: float(matrix[i, j - 1])  # noqa: E731
    return {
        "average_accuracy": sum(get(size, j) for j in range(1, size + 1)) / size,
        "average_incremental_accuracy": sum(
            sum(get(i, j) for j in range(1, i + 1)) / i for i in range(1, size + 1)
        ) / size,
        "backward_transfer": sum(get(size, j) - get(j, j) for j in range(1, size)) / (size - 1),
        "forward_transfer": sum(get(j - 1, j) - get(0, j) for j in range(2, size + 1)) / (size - 1),
        "forgetting": sum(
            max(get(stage, j) for stage in range(j, size)) - get(size, j) for j in range(1, size)
        ) / (size - 1),
        "learning_accuracy": sum(get(j, j) for j in range(1, size + 1)) / size,
    }  # fmt: skip


def value(measure: Measure) -> float:
    assert measure.value is not None
    return measure.value


def test_hand_computed():
    assert value(f.average_accuracy(R)) == pytest.approx(0.7)
    assert value(f.average_incremental_accuracy(R)) == pytest.approx((0.9 + 0.7 + 0.7) / 3)
    assert value(f.backward_transfer(R)) == pytest.approx(-0.25)
    assert value(f.forward_transfer(R)) == pytest.approx(0.1)
    assert value(f.forgetting(R)) == pytest.approx(0.25)
    assert value(f.learning_accuracy(R)) == pytest.approx((0.9 + 0.8 + 0.9) / 3)


def test_parts_are_one_a_task():
    assert f.backward_transfer(R).parts == pytest.approx((-0.4, -0.1))
    assert f.forward_transfer(R).parts == pytest.approx((0.0, 0.2))
    assert f.forgetting(R).parts == pytest.approx((0.4, 0.1))
    assert f.average_accuracy(R).parts == pytest.approx((0.5, 0.7, 0.9))
    assert f.learning_accuracy(R).parts == pytest.approx((0.9, 0.8, 0.9))


def test_a_better_middle_stage_separates_forgetting_from_backward_transfer():
    changed = with_score(0.95, 2, 0)
    assert value(f.forgetting(changed)) == pytest.approx(0.275)
    assert value(f.backward_transfer(changed)) == pytest.approx(-0.25)


def test_the_last_stage_is_not_in_the_maximum():
    changed = with_score(1.0, 3, 0)  # better than ever: forgetting is below 0, not clamped to it
    assert f.forgetting(changed).parts[0] == pytest.approx(-0.1)


def test_the_base_model_and_stages_before_the_task_are_not_in_the_maximum():
    changed = with_score(0.99, 1, 1)  # task 2 before it was learned
    changed[0] = 0.99
    assert value(f.forgetting(changed)) == pytest.approx(0.25)


def test_forgetting_is_minus_backward_transfer_where_each_task_was_best_when_learned():
    assert value(f.forgetting(R)) == pytest.approx(-value(f.backward_transfer(R)))


def test_forward_transfer_is_measured_from_the_base_model():
    changed = R.copy()
    changed[0] = [0.5, 0.3, 0.2]
    assert value(f.forward_transfer(changed)) == pytest.approx(((0.1 - 0.3) + (0.3 - 0.2)) / 2)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_random_matrices_against_the_literal_sums(size: int):
    matrix = np.random.default_rng(size).random((size + 1, size))
    expected = literal(matrix)
    found = f.measures(matrix)
    assert found.keys() == expected.keys() == f.FIGURES.keys()
    for name, measure in found.items():
        assert measure.value == pytest.approx(expected[name]), name
        assert measure.reason == ""


def test_intransigence():
    measure = f.intransigence(R, [0.95, 0.8, 1.0])
    assert measure.parts == pytest.approx((0.05, 0.0, 0.1))
    assert measure.value == pytest.approx(0.05)
    with pytest.raises(ValueError, match="expected 3"):
        f.intransigence(R, [0.9])


def test_one_task_has_no_transfer():
    one = [[0.2], [0.8]]
    for figure in (f.backward_transfer, f.forward_transfer, f.forgetting):
        measure = figure(one)
        assert measure.value is None
        assert "one task" in measure.reason
    assert f.average_accuracy(one).value == f.average_incremental_accuracy(one).value == 0.8


def test_a_missing_score_makes_only_the_figures_undefined_that_need_it():
    missing_middle = with_score(math.nan, 2, 0)
    assert f.backward_transfer(missing_middle).value == pytest.approx(-0.25)
    measure = f.forgetting(missing_middle)
    assert measure.value is None
    assert "task 1" in measure.reason
    assert measure.parts[0] is None
    assert measure.parts[1] == pytest.approx(0.1)

    unknown_base = with_score(math.nan, 0, 2)  # a task that was added later: the base was never asked
    assert "task 3" in f.forward_transfer(unknown_base).reason
    assert f.forward_transfer(unknown_base).parts == pytest.approx((0.0, None))
    assert f.average_accuracy(unknown_base).value == pytest.approx(0.7)


def test_a_task_that_was_never_scored_is_left_out_and_named():
    matrix = R.copy()
    matrix[:, 1] = math.nan
    assert f.average_accuracy(matrix).value == pytest.approx(0.7)
    assert "task 2" in f.average_accuracy(matrix).reason
    assert f.forgetting(matrix).value == pytest.approx(0.4)
    assert f.average_incremental_accuracy(matrix).value == pytest.approx((0.9 + 0.6 + 0.7) / 3)
    nothing = f.average_accuracy(np.full((3, 2), math.nan))
    assert nothing.value is None
    assert nothing.reason == "no task was scored"


@pytest.mark.parametrize("shape", [(3, 3), (2, 3), (3,), (5, 3)])
def test_the_base_row_is_not_forgotten(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="row for the base model"):
        f.average_accuracy(np.zeros(shape))


def test_lower_is_better_is_turned_around():
    assert f.oriented(math.e, "perplexity") == pytest.approx(-1.0)
    assert f.oriented(0.3, "kl") == -0.3
    assert f.oriented(0.3, "accuracy") == 0.3

    def scores(**values: float) -> dict[str, Score]:
        return {name: Score(v, "perplexity", 10, v, v) for name, v in values.items()}

    matrix = f.score_matrix([scores(a=9.0, b=9.0), scores(a=3.0, b=9.0), scores(a=6.0, b=2.0)], ["a", "b"])
    assert f.forgetting(matrix).value == pytest.approx(math.log(2))  # a's perplexity doubled: log 2 nats are lost
    assert f.backward_transfer(matrix).value == pytest.approx(-math.log(2))


def test_score_matrix_has_nan_where_a_task_was_not_scored():
    matrix = f.score_matrix([{"a": Score(0.5, "accuracy", 4, 0.4, 0.6)}, {}, {}], ["a", "b"])
    assert matrix.shape == (3, 2)
    assert matrix[0, 0] == 0.5
    assert np.isnan(matrix).sum() == 5
