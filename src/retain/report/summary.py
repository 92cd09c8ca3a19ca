"""What a report says about a lineage: every figure and every change that it shows, computed once.

The page and the terminal only spell this. All statistics come from `retain.evaluation`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from retain.evaluation.changes import Change, changes
from retain.evaluation.forgetting import FIGURES, LOWER_IS_BETTER, measure, oriented, score_matrix
from retain.evaluation.statistics import Interval, is_noise, item_scores, matrix_intervals
from retain.report.definitions import DEFINITIONS, KL, PROBES
from retain.report.wording import NONE, difference, level_range, nats, percent, range_text, unit_of
from retain.types import Answer, Record, Score, StageRecord

__all__ = ["Cell", "Figure", "Shift", "Summary", "paired_differences"]

LINEAR = ("average_accuracy", "backward_transfer", "learning_accuracy")
"""Figures that are sums of scores: the figure of a difference is the difference of the figures."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry of the score matrix.

    Args:
        score: None where the task was not scored at this stage.
        place: `before` the task was learned, at its `own` stage, or `after` it.
        heat: between 0 and 1, how good the score is: the share itself, else within its column.
    """

    score: Score | None
    place: str
    heat: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One key figure of a run.

    Args:
        key: a name in `DEFINITIONS`.
        unit: `%`, `points` or `nats`.
        value: None where it is undefined.
        interval: at 95 %; None where there is none.
        reason: why it is undefined, or what should be known of it.
    """

    key: str
    unit: str
    value: float | None
    interval: Interval | None = None
    reason: str = ""

    @property
    def text(self) -> str:
        """The value with its unit."""
        if self.value is None:
            return NONE
        if DEFINITIONS[self.key].is_change:
            return difference(self.value, self.unit)
        return percent(self.value) if self.unit == "%" else nats(self.value)

    @property
    def range(self) -> str:
        """The ends of the interval; empty without one."""
        if self.interval is None:
            return ""
        if DEFINITIONS[self.key].is_change:
            return range_text(self.interval, self.unit)
        return level_range(self.interval.low, self.interval.high, "share" if self.unit == "%" else KL)

    @property
    def noise(self) -> bool:
        """A difference whose interval does not exclude 0."""
        return DEFINITIONS[self.key].is_change and self.interval is not None and is_noise(self.interval)


@dataclass(frozen=True, slots=True)
class Shift:
    """What became of one suite from one stage to another.

    Args:
        suite: a task, `probe:` and the ability, or `probes`.
        since, until: the stages' names.
        before, after: the suite's scores.
        change: on the examples that both stages answered; None where answers are missing.
    """

    suite: str
    since: str
    until: str
    before: Score
    after: Score
    change: Change | None

    @property
    def label(self) -> str:
        """The suite's name for a person."""
        return self.suite.removeprefix("probe:")

    @property
    def by_margin(self) -> bool:
        """Are margins (nats) compared, as for probes, rather than scores?"""
        return self.suite.startswith("probe") and self.change is not None and self.change.margin is not None

    @property
    def interval(self) -> Interval | None:
        """The change, higher is better."""
        return None if self.change is None else self.change.margin if self.by_margin else self.change.difference

    @property
    def value(self) -> float:
        """The change, higher is better, with or without an interval."""
        if self.interval is not None:
            return self.interval.mean
        return oriented(self.after.value, self.after.metric) - oriented(self.before.value, self.before.metric)

    @property
    def unit(self) -> str:
        """The unit of `value`."""
        return "nats" if self.by_margin else unit_of(self.after.metric)

    @property
    def verdict(self) -> str:
        """`lost`, `gained`, `noise`, or `unknown` without an interval."""
        if self.interval is None:
            return "unknown"
        return "noise" if is_noise(self.interval) else "lost" if self.interval.mean < 0 else "gained"

    @property
    def differs(self) -> bool:
        """Is the mean change over examples another than that of the suite's own figures (BLEU, perplexity)?"""
        if self.change is None or self.by_margin:
            return False
        own = oriented(self.after.value, self.after.metric) - oriented(self.before.value, self.before.metric)
        return abs(own - self.change.difference.mean) > 5e-4


@dataclass(frozen=True)
class Summary:
    """A lineage's figures, each computed when it is first asked for."""

    record: Record

    @property
    def base(self) -> StageRecord:
        """Stage 0."""
        return self.record.stages[0]

    @property
    def last(self) -> StageRecord:
        """The newest stage."""
        return self.record.stages[-1]

    @cached_property
    def own(self) -> Mapping[str, StageRecord]:
        """The stage at which each task was learned; the last stage, where all were learned in one."""
        found = {stage.name: stage for stage in self.record.stages[1:] if stage.name in self.record.tasks}
        together = not found and len(self.record.stages) > 1
        return dict.fromkeys(self.record.tasks, self.last) if together else found

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks learned so far, in order."""
        return tuple(sorted(self.own, key=lambda task: self.own[task].index))

    @cached_property
    def metrics(self) -> Mapping[str, str]:
        """The metric of every suite."""
        return {suite: score.metric for stage in self.record.stages for suite, score in stage.scores.items()}

    @cached_property
    def cells(self) -> tuple[tuple[Cell, ...], ...]:
        """The score matrix: a row for every stage, a column for every task."""
        oriented_scores = score_matrix([stage.scores for stage in self.record.stages], self.record.tasks)
        rows: list[tuple[Cell, ...]] = []
        for i, stage in enumerate(self.record.stages):
            row: list[Cell] = []
            for j, task in enumerate(self.record.tasks):
                own = self.own[task].index if task in self.own else math.inf
                place = "before" if stage.index < own else "own" if stage.index == own else "after"
                score = stage.scores.get(task)
                row.append(Cell(score, place, _heat(score, oriented_scores[:, j], i)))
            rows.append(tuple(row))
        return tuple(rows)

    @cached_property
    def arranged(self) -> tuple[StageRecord | None, ...]:
        """R's rows: the base, then the stage of each learned task; None but the last where one stage taught all."""
        if len({stage.index for stage in self.own.values()}) == len(self.tasks):
            return (self.base, *(self.own[task] for task in self.tasks))
        return (self.base, *[None] * (len(self.tasks) - 1), self.last)

    @cached_property
    def items(self) -> list[NDArray[np.float64]]:
        """Every learned task's scores by example, (stages, examples), as `matrix_intervals` reads them."""
        answers = [() if stage is None else stage.answers for stage in self.arranged]
        return item_scores(answers, self.tasks, metrics=self.metrics)

    @cached_property
    def figures(self) -> Mapping[str, Figure]:
        """Every figure of `DEFINITIONS`."""
        found = {key: self._matrix_figure(key) for key in FIGURES}
        return {**found, PROBES: self._probes_figure(), KL: self._kl_figure()}

    def _matrix_figure(self, key: str) -> Figure:
        units = {unit_of(self.metrics[task]) for task in self.tasks if task in self.metrics}
        unit = units.pop() if len(units) == 1 else ""
        unit = "%" if unit == "points" and not DEFINITIONS[key].is_change else unit
        if not self.tasks:
            return Figure(key, unit, None, reason="no task was learned yet")
        if units:
            return Figure(key, "", None, reason="the tasks are scored in different units")
        scores = [{} if stage is None else stage.scores for stage in self.arranged]
        found, interval = measure(key, score_matrix(scores, self.tasks)), self._matrix_intervals.get(key)
        if found.value is None or interval is None:
            return Figure(key, unit, found.value, None, found.reason)
        differs = abs(interval.mean - found.value) > 5e-4
        reason = "a mean over examples: some metric here is another over the whole set" if differs else found.reason
        return Figure(key, unit, interval.mean, interval, reason)

    @cached_property
    def _matrix_intervals(self) -> Mapping[str, Interval]:
        return matrix_intervals(self.items) if any(task.shape[1] for task in self.items) else {}

    def _probes_figure(self) -> Figure:
        if PROBES not in self.last.scores:
            return Figure(PROBES, "nats", None, reason="the run scored no probes")
        if self.probes is None:
            alone = self.last is self.base
            reason = "no stage comes after the base model" if alone else "the base model’s were not scored"
            return Figure(PROBES, "nats", None, reason=reason)
        reason = "" if self.probes.by_margin else "by accuracy: there are no margins"
        return Figure(PROBES, self.probes.unit, self.probes.value, self.probes.interval, reason)

    def _kl_figure(self) -> Figure:
        score = self.last.scores.get(KL)
        if score is None:
            return Figure(KL, "nats", None, reason="the run measured no KL divergence")
        return Figure(KL, "nats", score.value, Interval(score.value, score.low, score.high, score.num))

    @cached_property
    def learned(self) -> tuple[Shift, ...]:
        """Every learned task, from the base to its own stage."""
        return self._shifts((task, self.base, self.own[task]) for task in self.tasks)

    @cached_property
    def lost(self) -> tuple[Shift, ...]:
        """Every earlier task, from its own stage to the last."""
        return self._shifts((task, self.own[task], self.last) for task in self.tasks if self.own[task] is not self.last)

    @cached_property
    def abilities(self) -> tuple[Shift, ...]:
        """Every probed ability, from the base to the last stage, in the base's order."""
        return self._shifts((suite, self.base, self.last) for suite in self.base.scores if suite.startswith("probe:"))

    @cached_property
    def probes(self) -> Shift | None:
        """All abilities together, from the base to the last stage."""
        found = self._shifts([(PROBES, self.base, self.last)])
        return found[0] if found else None

    @cached_property
    def _general(self) -> Mapping[str, Change]:
        old, new = (_answers(stage, "probe:") for stage in (self.base, self.last))
        return changes(old, new, metrics=self.metrics)

    def _shifts(self, wanted: Iterable[tuple[str, StageRecord, StageRecord]]) -> tuple[Shift, ...]:
        """Those of the wanted (suite, since, until) that both stages scored."""
        found: list[Shift] = []
        for suite, since, until in wanted:
            if since is until or suite not in since.scores or suite not in until.scores:
                continue
            if suite == PROBES or suite.startswith("probe:"):
                change = self._general.get(suite)
            else:
                change = changes(_answers(since, suite), _answers(until, suite), metrics=self.metrics).get(suite)
            found.append(Shift(suite, since.name, until.name, since.scores[suite], until.scores[suite], change))
        return tuple(found)


def _answers(stage: StageRecord, suite: str) -> list[Answer]:
    """The stage's answers of one task, or of all suites that begin with `probe:`."""
    return [answer for answer in stage.answers if answer.suite == suite or suite == "probe:" == answer.suite[:6]]


def _heat(score: Score | None, column: NDArray[np.float64], row: int) -> float:
    """How good a score is, between 0 and 1."""
    if score is None:
        return 0.0
    if score.metric not in LOWER_IS_BETTER:
        return min(max(score.value, 0.0), 1.0)
    low, high = float(np.nanmin(column)), float(np.nanmax(column))
    return (float(column[row]) - low) / (high - low) if high > low else 0.5


def paired_differences(first: Summary, other: Summary) -> dict[str, Interval]:
    """By figure, how much more the other run has than the first, on the same examples; undefined ones are absent.

    Works on the differences of scores example by example, which cancels what is hard in an example.
    """
    found: dict[str, Interval] = {}
    same_tasks = first.tasks == other.tasks and [t.shape for t in first.items] == [t.shape for t in other.items]
    if same_tasks and _answered(first) == _answered(other) and any(task.shape[1] for task in first.items):
        items = [new - old for old, new in zip(first.items, other.items, strict=True)]
        differences = matrix_intervals(items, differences=True)
        for key in LINEAR:
            old, new = first.figures[key], other.figures[key]
            if key in differences and None not in (old.value, new.value) and old.unit == new.unit:
                found[key] = differences[key]
    old_answers, new_answers = (_answers(run.last, "probe:") for run in (first, other))
    general = changes(old_answers, new_answers, metrics=first.metrics).get(PROBES)
    if general is not None and general.margin is not None:
        found[PROBES] = general.margin
    return found


def _answered(summary: Summary) -> Sequence[set[str]]:
    """The examples of every learned task."""
    return [{answer.id for answer in summary.last.answers if answer.suite == task} for task in summary.tasks]
