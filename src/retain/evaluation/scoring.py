"""Metrics, and a task's test rows scored by its metric: everything of a task in one call of the family.

Shares lie between 0 and 1, BLEU and chrF too, so that tasks of different metrics can stand in one score matrix.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from retain.data.rendering import Renderer
from retain.errors import ConfigError, DataError
from retain.evaluation import grading, labelling
from retain.evaluation.forgetting import LOWER_IS_BETTER
from retain.evaluation.statistics import Interval, interval
from retain.models.family import Family
from retain.types import Answer, Example, Message, Score, Task

__all__ = [
    "METRICS",
    "Metric",
    "choice_margin",
    "find_metric",
    "mean_score",
    "score_task",
]


@dataclass(frozen=True, slots=True)
class Metric:
    """How good an answer is.

    Args:
        name: as recipes spell it.
        needs: `choices` and `likelihood` are answered by log-likelihoods, `generation` by what the model writes.
        unit: `share` (0 to 1), or `perplexity` (1 or more; of one example nats a token).
        grade: of a generated answer against the right ones: the best over them.
        corpus: of all answers at once, where the suite's figure is more than a mean: its value and interval.
        flaw: what makes a right answer useless to this metric, or None.
    """

    name: str
    needs: Literal["choices", "generation", "likelihood"]
    unit: Literal["perplexity", "share"] = "share"
    grade: Callable[[str, Sequence[str]], float] | None = None
    corpus: Callable[[Sequence[str], Sequence[Sequence[str]]], Interval] | None = None
    flaw: Callable[[str], str | None] | None = None

    @property
    def higher_is_better(self) -> bool:
        """False for perplexity."""
        return self.name not in LOWER_IS_BETTER


def _empty(text: str) -> str | None:
    return None if text.strip() else "every answer contains an empty text"


METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", "choices"),
    "bleu": Metric("bleu", "generation", grade=grading.bleu, corpus=grading.corpus_bleu),
    "chrf": Metric("chrf", "generation", grade=grading.chrf, corpus=grading.corpus_chrf),
    "contains": Metric("contains", "generation", grade=grading.contains, flaw=_empty),
    "exact_match": Metric("exact_match", "generation", grade=grading.exact_match),
    "json_equality": Metric("json_equality", "generation", grade=grading.json_equality, flaw=grading.json_flaw),
    "label_f1": Metric("label_f1", "generation", grade=labelling.label_f1, flaw=labelling.labels_flaw),
    "macro_f1": Metric("macro_f1", "choices", corpus=labelling.macro_f1),
    "perplexity": Metric("perplexity", "likelihood", unit="perplexity"),
    "rouge_l": Metric("rouge_l", "generation", grade=grading.rouge_l),
    "tag_accuracy": Metric("tag_accuracy", "generation", grade=labelling.tag_accuracy),
    "tag_f1": Metric("tag_f1", "generation", grade=labelling.tag_f1, corpus=labelling.corpus_tag_f1),
    "token_f1": Metric("token_f1", "generation", grade=grading.token_f1),
}


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ConfigError: if there is none, with the nearest one.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        raise ConfigError(
            f"unknown metric `{name}`" + (f". Did you mean `{near[0]}`?" if near else ""),
            hint=f"the metrics are {', '.join(METRICS)}",
        )
    return METRICS[name]


def score_task(
    model: nn.Module, task: Task, *, family: Family, renderer: Renderer, seed: int = 0
) -> tuple[Score, list[Answer]]:
    """The task's test rows, scored by its metric.

    - `accuracy`: the label whose tokens, the stop token included, have the highest summed log-likelihood after the
      prompt. A row's own `choices` come before the task's. Guessing reaches 1 / number of choices.
    - `macro_f1`: of the same answers, the mean over classes of a class's F1.
    - `perplexity`: exp of the nats a token of all answers (of raw text, of all tokens but the first).
    - the rest: what the model writes, greedily, up to `task.max_new_tokens`.

    Args:
        model: in evaluation mode.
        task: at least one test row.
        family: the model's.
        renderer: with the model's tokenizer.
        seed: of the bootstrap.

    Raises:
        ConfigError: the metric is unknown.
        DataError: rows that the metric cannot score, all of them at once.
    """
    metric = find_metric(task.metric)
    _check(task, metric)
    if metric.needs == "choices":
        return _score_choices(model, task, metric, family, renderer)
    if metric.needs == "likelihood":
        return _score_likelihood(model, task, family, renderer, seed)
    return _score_generation(model, task, metric, family, renderer, seed)


def mean_score(answers: Sequence[Answer], metric: str, *, chance: float | None = None, seed: int = 0) -> Score:
    """The mean over answers with its interval, and the mean margin where all have one."""
    found = interval([answer.score for answer in answers], seed=seed)
    margins = [answer.margin for answer in answers if answer.margin is not None]
    margin = math.fsum(margins) / len(margins) if len(margins) == len(answers) else None
    return Score(found.mean, metric, found.num, found.low, found.high, margin, chance)


def choice_margin(likelihoods: Sequence[float], right: Sequence[bool]) -> float:
    """Nats by which the right choices together are likelier than the others together.

        margin = logsumexp(right) - logsumexp(others)

    Args:
        likelihoods: the log-likelihood of every choice, nats.
        right: which choices are right; at least one, and not all.
    """
    mask = np.array(right)
    values = np.array(likelihoods)
    return float(np.logaddexp.reduce(values[mask]) - np.logaddexp.reduce(values[~mask]))


def _score_choices(
    model: nn.Module, task: Task, metric: Metric, family: Family, renderer: Renderer
) -> tuple[Score, list[Answer]]:
    """Accuracy: every label of every row in one call, a row's labels after the same prompt."""
    labels = [_labels(example, task) for example in task.test]
    rows = [
        (example.prompt, renderer.labels.options(task.name, own))
        for example, own in zip(task.test, labels, strict=True)
    ]
    answers: list[Answer] = []
    chances: list[float] = []
    chosen = family.choose(model, renderer, rows)
    for example, own, (_, options), values in zip(task.test, labels, rows, chosen, strict=True):
        said = [*own, *options[len(own) :]]  # a head's options are the row's labels, then all others that it has
        right = [place < len(own) and label in _references(example) for place, label in enumerate(said)]
        best = int(np.argmax(values))
        answers.append(_answer(task, example, said[best], float(right[best]), choice_margin(values, right)))
        chances.append(sum(right) / len(right))
    if metric.corpus is not None:
        found = metric.corpus([given.answer for given in answers], [_references(example) for example in task.test])
        return Score(found.mean, metric.name, found.num, found.low, found.high), answers
    return mean_score(answers, metric.name, chance=math.fsum(chances) / len(chances)), answers


def _score_likelihood(
    model: nn.Module, task: Task, family: Family, renderer: Renderer, seed: int
) -> tuple[Score, list[Answer]]:
    """Perplexity: the answers' tokens after their prompts."""
    pairs: list[tuple[list[int], list[int]]] = []
    for example in task.test:
        if example.messages:
            prompt = renderer.prompt_ids(example.prompt)
            pairs.append((prompt, renderer.answer_ids(example.prompt, example.answer)))
        else:
            ids = renderer.text_ids(example.text)  # where a model has no BOS, the first token has no context
            pairs.append((ids[:1], ids[1:]))
    short = [f"row {e.id}: one token" for e, pair in zip(task.test, pairs, strict=True) if not pair[1]]
    if short:
        raise _unusable(task, short, "perplexity needs a token and one before it: remove these rows")
    likelihoods = family.loglikelihood(model, renderer.tokenizer, pairs)
    tokens = [len(rest) for _, rest in pairs]
    nats = [-value / num for value, num in zip(likelihoods, tokens, strict=True)]
    found = interval(nats, weights=tokens, bounded=False, seed=seed)
    value, low, high = (math.exp(min(bound, 700.0)) for bound in (found.mean, found.low, found.high))
    answers = [_answer(task, example, "", score) for example, score in zip(task.test, nats, strict=True)]
    return Score(value, "perplexity", found.num, low, high), answers


def _score_generation(
    model: nn.Module, task: Task, metric: Metric, family: Family, renderer: Renderer, seed: int
) -> tuple[Score, list[Answer]]:
    """Every other metric: one call writes all answers."""
    assert metric.grade is not None
    prompts = [example.prompt for example in task.test]
    texts = family.answer(model, renderer, prompts, max_new_tokens=task.max_new_tokens)
    answers = [
        _answer(task, example, text, metric.grade(text, _references(example)))
        for example, text in zip(task.test, texts, strict=True)
    ]
    if metric.corpus is None:
        return mean_score(answers, metric.name, seed=seed), answers
    found = metric.corpus(texts, [_references(example) for example in task.test])
    return Score(found.mean, metric.name, found.num, found.low, found.high), answers


def _check(task: Task, metric: Metric) -> None:
    """Refuse rows that the metric cannot score, before the model is asked."""
    problems: list[str] = []
    for example in task.test:
        if metric.needs != "likelihood" and not example.messages:
            problems.append(f"row {example.id}: raw text has no question to answer")
            continue
        if metric.flaw is not None:
            flaws = [(text, metric.flaw(text)) for text in _references(example)]
            problems += [f"row {example.id}: `{text}`: {flaw}" for text, flaw in flaws if flaw]
        if metric.needs == "choices":
            labels, right = _labels(example, task), _references(example)
            if len(labels) < 2:
                problems.append(f"row {example.id}: {len(labels)} choices, expected at least 2")
            elif unknown := [label for label in right if label not in labels]:
                near = difflib.get_close_matches(unknown[0], labels, n=1)
                guess = f". Did you mean `{near[0]}`?" if near else ""
                problems.append(f"row {example.id}: `{unknown[0]}` is not one of its {len(labels)} choices{guess}")
            elif set(labels) <= set(right):
                problems.append(f"row {example.id}: every choice is right")
    if problems:
        raise _unusable(task, problems, "correct the rows, or choose another metric for the task")


def _unusable(task: Task, problems: Sequence[str], hint: str) -> DataError:
    """The error of a task with rows that its metric cannot score; the first ten are shown."""
    shown = [*problems[:10], *([f"and {len(problems) - 10} more"] if len(problems) > 10 else [])]
    return DataError(f"task `{task.name}` cannot be scored by `{task.metric}`", problems=shown, hint=hint)


def _labels(example: Example, task: Task) -> tuple[str, ...]:
    """What the answer is chosen from, each label once."""
    return tuple(dict.fromkeys(example.choices or task.choices))


def _references(example: Example) -> tuple[str, ...]:
    """All right answers."""
    return (example.answer, *example.references)


def _answer(task: Task, example: Example, text: str, score: float, margin: float | None = None) -> Answer:
    return Answer(task.name, example.id, _readable(example.prompt), example.answer, text, score, margin)


def _readable(messages: Sequence[Message]) -> str:
    """A prompt as a person reads it."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in messages)
