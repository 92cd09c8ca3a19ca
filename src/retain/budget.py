"""The forgetting budget: a stage is committed only if it is sure enough that little was lost."""

import math
from collections.abc import Mapping, Sequence

from retain.errors import BudgetExceeded
from retain.evaluation.changes import changes
from retain.types import Answer, StageRecord

__all__ = ["enforce_budget", "over_budget"]


def over_budget(
    before: Sequence[Answer], after: Sequence[Answer], metrics: Mapping[str, str], budget: float
) -> list[str]:
    """What is lost, or may be lost, beyond the budget; one line each, empty where all is within.

    A suite is within the budget if the upper 95 % confidence limit of its forgetting (its mean score before minus
    after, paired over the same examples) is at most `budget`. Where the mean is within and the limit is not, too few
    rows decide it: a limit shrinks with the root of their number, so `num * (half width / slack) ** 2` rows would.

    Args:
        before, after: answers to the same examples.
        metrics: the metric of each suite.
        budget: the largest forgetting allowed, in score points (0.05 is five points of accuracy).
    """
    problems: list[str] = []
    for suite, change in changes(before, after, metrics=metrics).items():
        if suite.startswith("probe:") or suite == "kl":
            continue  # the abilities are judged together, as `probes`
        lost, limit = -change.difference.mean, -change.difference.low
        if lost > budget:
            problems.append(f"{suite}: lost {lost:.3f} (at most {limit:.3f} with 95 % confidence), allowed {budget:g}")
        elif limit > budget:
            slack, half = budget - lost, limit - lost
            needed = math.ceil(change.difference.num * (half / slack) ** 2) if slack > 0 else None
            decide = f"about {needed} rows would decide it" if needed else "no number of rows would decide it"
            problems.append(
                f"{suite}: lost {lost:.3f}, but {change.difference.num} rows only show that it is at most {limit:.3f}, "
                f"allowed {budget:g}; {decide}"
            )
    return problems


def enforce_budget(earlier: Sequence[StageRecord], stage: StageRecord, budget: float | None) -> None:
    """Hold a stage against the budget: each old task against its own stage, the probes against the base.

    Args:
        earlier: the stages on the line, the base first.
        stage: the one that wants to be committed.
        budget: the largest forgetting allowed; None allows any.

    Raises:
        BudgetExceeded: naming every suite that is over, or undecided.
    """
    if budget is None:
        return
    metrics = {suite: score.metric for suite, score in stage.scores.items()}
    before = [answer for answer in earlier[0].answers if answer.suite.startswith("probe:")]
    for old in earlier[1:]:
        before += [answer for answer in old.answers if answer.suite == old.name]
    problems = over_budget(before, stage.answers, metrics, budget)
    if problems:
        raise BudgetExceeded(
            f"stage {stage.index} ({stage.name}) is over the forgetting budget; it was not committed",
            problems=problems,
            hint="protect more (a higher replay ratio or strength), score more rows, or commit it with --accept",
        )
