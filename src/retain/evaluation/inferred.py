"""A task scored without its name: every row is answered by the model of the task that its prompt seems to be of."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from retain.data.rendering import Renderer
from retain.evaluation.scoring import METRICS, mean_score, score_task
from retain.models.family import Family
from retain.parameters import evaluating
from retain.types import Answer, Example, Score, Task

__all__ = ["INFERRED", "can_infer", "inferred_notes", "score_inferred"]

INFERRED = "inferred:"
"""Before a task's name: its suite where the name was inferred."""


def can_infer(task: Task) -> bool:
    """Has every test row a prompt that is answered? A likelihood of given text has none."""
    return METRICS[task.metric].needs != "likelihood" and all(example.messages for example in task.test)


def score_inferred(
    task: Task,
    infer: Callable[[Sequence[Example]], list[str]],
    select: Callable[[str], nn.Module],
    *,
    family: Family,
    renderer: Renderer,
    seed: int = 0,
) -> tuple[Score, list[Answer]]:
    """The task's test rows, each answered by `select(name)` of the name that `infer` gives it.

    Args:
        task: at least one test row, and a metric for which `can_infer`.
        infer: a name for each row, by its prompt alone.
        select: the model that answers for a name.
        family, renderer, seed: as for `score_task`.

    Returns:
        the score and the answers, in the order of the rows, of the suite `inferred:<task>`.
    """
    names = infer(task.test)
    found: dict[int, Answer] = {}
    chances: list[float] = []
    for name in dict.fromkeys(names):
        places = [i for i, own in enumerate(names) if own == name]
        part = replace(task, test=tuple(task.test[i] for i in places))
        with evaluating(select(name)) as model:
            score, answers = score_task(model, part, family=family, renderer=renderer, seed=seed)
        found |= dict(zip(places, answers, strict=True))
        if score.chance is not None:
            chances += [score.chance] * len(places)
    answers = [replace(found[i], suite=f"{INFERRED}{task.name}") for i in range(len(names))]
    corpus = METRICS[task.metric].corpus
    if corpus is None:
        chance = math.fsum(chances) / len(chances) if chances else None
        return mean_score(answers, task.metric, chance=chance, seed=seed), answers
    whole = corpus([answer.answer for answer in answers], [(row.answer, *row.references) for row in task.test])
    return Score(whole.mean, task.metric, whole.num, whole.low, whole.high), answers


def inferred_notes(stage: str, scores: Mapping[str, Score]) -> list[str]:
    """One sentence on how a stage scores where nobody names the tasks; none where that was not measured."""
    pairs = [(suite.removeprefix(INFERRED), score) for suite, score in scores.items() if suite.startswith(INFERRED)]
    parts = [f"{task} {score.value:.3f} ({scores[task].value:.3f} when named)" for task, score in pairs]
    return [f"after {stage}, with the task of each prompt inferred: {', '.join(parts)}"] if parts else []
