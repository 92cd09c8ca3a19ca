"""The page: one HTML file with everything in it, that loads nothing and runs nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from retain.errors import UserError
from retain.evaluation.statistics import Interval
from retain.report import wording
from retain.report.definitions import DEFINITIONS, KL, PROBES
from retain.report.distances import distances
from retain.report.figures import Point, Scale, loss_curves, smoothed, trade_off, whisker
from retain.report.headlines import VERDICTS, Headline, contrasts, headlines
from retain.report.provenance import facts, settings, speed
from retain.report.summary import Figure, Shift, Summary
from retain.types import Answer, Record, Score, StageRecord

__all__ = ["render_html", "write_report"]

KEY_FIGURES = ("average_accuracy", "backward_transfer", "forgetting", PROBES, KL)
COMPARED = ("average_accuracy", "learning_accuracy", "backward_transfer", "forgetting", PROBES, KL)
MAX_EXAMPLES = {"lost": 5, "gained": 3}
"""Examples shown of every suite, by direction; the rest is in answers.jsonl."""
SHOWN = {"%": 20.0, "points": 20.0, "nats": 0.5}
"""How much of an axis the trade-off pictures show at least, by unit."""
MAX_TEXT, MAX_NAME = 900, 80
"""Characters shown of a prompt or an answer, and of a name."""


@dataclass(frozen=True, slots=True)
class Run:
    """One record, ready for the template.

    Args:
        summary: its figures.
        key: a prefix for the ids of its sections.
        label: its letter, where there are several.
        contrasts: what it has more or less of than the first run.
    """

    summary: Summary
    key: str
    label: str
    contrasts: tuple[Headline, ...]

    @property
    def record(self) -> Record:
        """The record itself."""
        return self.summary.record


@dataclass(frozen=True, slots=True)
class Flips:
    """The examples of one suite that changed sides.

    Args:
        shift: from which stage to which.
        shown: (before, after), the largest changes first.
        rest: how many more there are.
        told: between which stages, in words.
    """

    shift: Shift
    shown: tuple[tuple[Answer, Answer], ...]
    rest: int
    told: str


def write_report(records: Sequence[Record], path: Path) -> Path:
    """Write the report of one record, or the comparison of several, as one HTML file.

    Args:
        records: the runs, at least one; in a comparison the first is what the others are compared with.
        path: the file, or a folder to put `report.html` in; missing folders are made.

    Returns:
        The file.

    Raises:
        UserError: without records, or with one that has no stages.
    """
    page = render_html(records)
    path = path / "report.html" if path.is_dir() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def render_html(records: Sequence[Record]) -> str:
    """The report as HTML text.

    Every text of a model, a person or a data set is escaped; control and direction characters are made visible.

    Raises:
        UserError: without records, or with one that has no stages.
    """
    if not records or not all(record.stages for record in records):
        hint = "a run's first stage is the base model's scores: see whether the run got that far"
        raise UserError("nothing to report: there is no finished stage", hint=hint)
    single = len(records) == 1
    summaries = [Summary(record) for record in records]
    runs = [
        Run(
            summary,
            f"run{i}-",
            "" if single else wording.letter(i),
            contrasts(wording.letter(i), wording.letter(0), summaries[0], summary) if i else (),
        )
        for i, summary in enumerate(summaries)
    ]
    title = records[0].title if single else f"{len(records)} runs compared"
    trade_offs = [] if single else _trade_offs(runs)
    template = _environment().get_template("template.html.j2", globals=_names())
    return template.render(runs=runs, title=title, trade_offs=trade_offs).strip() + "\n"


def _environment() -> Environment:
    """Jinja with escaping on, every text cleaned, and the report's spelling as filters."""

    def finalize(value: object) -> object:
        return wording.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "column_title": wording.column_title,
        "count": wording.count,
        "difference": wording.difference,
        "duration": wording.duration,
        "is_share": wording.is_share,
        "level": wording.level,
        "level_range": wording.level_range,
        "metric_title": wording.metric_title,
        "name": lambda text, limit=MAX_NAME: wording.short(text, limit),
        "plural": wording.plural,
        "range_text": wording.range_text,
        "text": lambda text: wording.clip(text, MAX_TEXT),
        "tick": wording.tick,
    }
    environment.filters.update(filters)
    return environment


def _names() -> dict[str, Any]:
    """What the template calls by name."""
    return {
        "compared": COMPARED,
        "confidence": wording.CONFIDENCE,
        "curve": lambda stage: loss_curves(stage.history, title=_loss_words(stage)),
        "definitions": DEFINITIONS,
        "distances": distances,
        "facts": facts,
        "flips": _flips,
        "has_penalty": lambda stages: any(info.penalty for stage in stages for info in stage.history),
        "headlines": headlines,
        "interval_of": _interval,
        "key_figures": KEY_FIGURES,
        "loss_words": _loss_words,
        "nothing": wording.NONE,
        "score_scales": lambda scored: _scales((_interval(score), "nats") for _, score in scored),
        "score_words": _score_words,
        "scored": _scored,
        "settings": settings,
        "shift_scales": lambda shifts: _scales((shift.interval, shift.unit) for shift in shifts),
        "speed": speed,
        "verdicts": VERDICTS,
        "whisker": whisker,
    }


def _scales(rows: Iterable[tuple[Interval | None, str]]) -> dict[str, Scale]:
    """By unit the scale of the intervals in that unit: points and nats never share one."""
    by_unit: dict[str, list[Interval]] = {}
    for interval, unit in rows:
        if interval is not None:
            by_unit.setdefault(unit, []).append(interval)
    return {unit: Scale.of(intervals) for unit, intervals in by_unit.items()}


def _interval(score: Score) -> Interval:
    """A score with its own interval."""
    return Interval(score.value, score.low, score.high, score.num)


def _score_words(answer: Answer) -> str:
    """The score of an answer that is more than right or wrong."""
    return "" if answer.score in (0.0, 1.0) else f", {wording.percent(answer.score)}"


def _scored(stages: Sequence[StageRecord], suite: str) -> list[tuple[StageRecord, Score]]:
    """The stages that scored the suite, each with its score."""
    return [(stage, stage.scores[suite]) for stage in stages if suite in stage.scores]


def _flips(summary: Summary, direction: str) -> list[Flips]:
    """The examples that were right and became wrong (`lost`), or the reverse (`gained`), by suite."""
    told = [
        (summary.lost, "when it was learned", "now"),
        (summary.abilities, "in the base model", "now"),
        (summary.learned, "in the base model", "when it was learned"),
    ]
    found: list[Flips] = []
    for shifts, since, until in told:
        for shift in shifts:
            pairs = () if shift.change is None else shift.change.lost if direction == "lost" else shift.change.gained
            shown = pairs[: MAX_EXAMPLES[direction]]
            sides = ("right", "wrong") if direction == "lost" else ("wrong", "right")
            words = f"{sides[0]} {since}, {sides[1]} {until}"
            if pairs:
                found.append(Flips(shift, shown, len(pairs) - len(shown), words))
    return found


def _loss_words(stage: StageRecord) -> str:
    """What the loss curve of a stage shows."""
    values = smoothed([info.loss for info in stage.history])
    return f"from {wording.nats(values[0])} to {wording.nats(values[-1])} in {wording.plural(len(values), 'step')}"


def _trade_offs(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """A caption and a picture each: new skill against what is kept of old tasks, and of general abilities."""
    kinds = (
        ("backward_transfer", "Old tasks kept", "backward transfer, points; 0 is nothing lost"),
        (PROBES, "General abilities kept", "change of the probes’ margin, nats; 0 is nothing lost"),
    )
    found: list[tuple[str, Markup]] = []
    for key, caption, x_title in kinds:
        new = {run.label: run.summary.figures["learning_accuracy"] for run in runs}
        old = {run.label: run.summary.figures[key] for run in runs}
        points = [
            Point(run.label, x, y)
            for run in runs
            if (x := _drawn(old[run.label])) is not None and (y := _drawn(new[run.label])) is not None
        ]
        if len(points) < 2 or len({(old[p.label].unit, new[p.label].unit) for p in points}) > 1:
            continue
        unit = new[points[0].label].unit
        told = [f"{p.label}: {new[p.label].text}, {old[p.label].text}" for p in points]
        title = f"{caption}: new skill up, old skill right. {'; '.join(told)}"
        least = (SHOWN[old[points[0].label].unit], SHOWN[unit])
        y_title = f"learning accuracy, {unit}"
        picture = trade_off(points, x_title=x_title, y_title=y_title, least=least, is_share=unit == "%", title=title)
        found.append((caption, picture))
    return found


def _drawn(figure: Figure) -> Interval | None:
    """A figure's interval in the units of an axis: hundredths for shares."""
    interval, scale = figure.interval, 1 if figure.unit == "nats" else 100
    return interval and Interval(scale * interval.mean, scale * interval.low, scale * interval.high, interval.num)
