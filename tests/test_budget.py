import math

import pytest

from retain.budget import enforce_budget, over_budget
from retain.errors import BudgetExceeded
from retain.evaluation.changes import changes
from retain.types import Answer, Score, StageRecord


def answers(suite: str, scores: list[float]) -> list[Answer]:
    return [Answer(suite, f"{suite}{i}", "", "", "", score) for i, score in enumerate(scores)]


def stage(index: int, name: str, *given: list[Answer]) -> StageRecord:
    every = [answer for part in given for answer in part]
    suites = {answer.suite for answer in every}
    scores = {suite: Score(0.0, "accuracy", 1, 0.0, 1.0) for suite in suites | {"probes"}}
    return StageRecord(index, name, scores, tuple(every))


METRICS = {"a": "accuracy", "probe:x": "accuracy", "probe:y": "accuracy", "probes": "accuracy", "kl": "kl"}


def test_nothing_lost_is_within() -> None:
    same = answers("a", [1.0] * 400)
    assert over_budget(same, same, METRICS, 0.05) == []


def test_a_loss_over_the_budget_is_named() -> None:
    before, after = answers("a", [1.0] * 100), answers("a", [0.0] * 30 + [1.0] * 70)
    [problem] = over_budget(before, after, METRICS, 0.05)
    assert problem.startswith("a: lost 0.300 (at most ")
    assert problem.endswith("allowed 0.05")


def test_a_gain_is_no_loss() -> None:
    before, after = answers("a", [0.0] * 100), answers("a", [0.0] * 30 + [1.0] * 70)
    assert over_budget(before, after, METRICS, 0.0) == []


def test_too_few_rows_are_undecided_and_the_number_needed_is_said() -> None:
    before, after = answers("a", [1.0] * 40), answers("a", [0.0] + [1.0] * 39)
    change = changes(before, after, metrics=METRICS)["a"].difference
    budget = 0.05
    lost, limit = -change.mean, -change.low
    assert lost < budget < limit, "the case is undecided"
    [problem] = over_budget(before, after, METRICS, budget)
    needed = math.ceil(40 * ((limit - lost) / (budget - lost)) ** 2)
    assert f"about {needed} rows would decide it" in problem
    assert f"40 rows only show that it is at most {limit:.3f}" in problem


def test_so_many_rows_do_decide_it() -> None:
    """The number that is said is about right: so many are within, a quarter of them are not."""
    before, after = answers("a", [1.0] * 40), answers("a", [0.0] + [1.0] * 39)
    [problem] = over_budget(before, after, METRICS, 0.05)
    needed = int(problem.split("about ")[1].split()[0])
    for factor, within in ((1.0, True), (0.25, False)):
        num = int(needed * factor)
        gone = round(num / 40)
        found = over_budget(answers("a", [1.0] * num), answers("a", [0.0] * gone + [1.0] * (num - gone)), METRICS, 0.05)
        assert (found == []) == within


def test_a_mean_on_the_budget_is_never_decided() -> None:
    before, after = answers("a", [1.0] * 40), answers("a", [0.0, 0.0] + [1.0] * 38)
    [problem] = over_budget(before, after, METRICS, 0.05)
    assert "no number of rows would decide it" in problem


def test_abilities_are_judged_together() -> None:
    before = answers("probe:x", [1.0] * 20) + answers("probe:y", [0.0] * 20)
    after = answers("probe:x", [0.0] * 20) + answers("probe:y", [1.0] * 20)
    assert over_budget(before, after, METRICS, 0.5) == [], "what one lost the other gained"
    [problem] = over_budget(before, answers("probe:x", [0.0] * 20) + answers("probe:y", [0.0] * 20), METRICS, 0.1)
    assert problem.startswith("probes: lost 0.500")


def test_a_task_is_held_against_its_own_stage_and_probes_against_the_base() -> None:
    good, bad = [1.0] * 200, [0.0] * 200
    base = stage(0, "base", answers("a", bad), answers("probe:x", good))
    learned = stage(1, "a", answers("a", good), answers("probe:x", bad))
    new = stage(2, "b", answers("a", bad), answers("b", good), answers("probe:x", bad))
    with pytest.raises(BudgetExceeded, match=r"stage 2 \(b\) is over the forgetting budget") as caught:
        enforce_budget([base, learned], new, 0.05)
    assert sorted(problem.split(":")[0] for problem in caught.value.problems) == ["a", "probes"]
    assert "--accept" in caught.value.hint
    kept = stage(2, "b", answers("a", good), answers("b", bad), answers("probe:x", good))
    enforce_budget([base, learned], kept, 0.05)  # b itself was never learned before


def test_without_a_budget_anything_goes() -> None:
    base, after = stage(0, "base", answers("probe:x", [1.0] * 50)), stage(1, "a", answers("probe:x", [0.0] * 50))
    enforce_budget([base], after, None)
    with pytest.raises(BudgetExceeded):
        enforce_budget([base], after, 0.9)
