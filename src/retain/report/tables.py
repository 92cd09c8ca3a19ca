"""The report in the terminal: readable in 80 columns, without colour, with many tasks and long names."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from retain.report import wording
from retain.report.definitions import DEFINITIONS, KL, PROBES
from retain.report.distances import distances
from retain.report.headlines import VERDICTS, contrasts, headlines
from retain.report.summary import Cell, Shift, Summary
from retain.types import Record

__all__ = ["abilities_table", "comparison", "distances_table", "losses_table", "matrix_table", "print_summary"]

STYLES = {"gained": "green", "lost": "bold red", "noise": "", "unknown": "dim"}
WIDE, NUM_DENSE = 4, 12
"""Up to so many tasks the matrix has their names as columns; so many fit beside each other when numbered."""
MAX_TITLE, MAX_NOTE = 160, 500
"""Characters shown of a run's name and of a note."""
COMPARED = ("average_accuracy", "learning_accuracy", "backward_transfer", PROBES, KL)


def _text(text: str, style: str = "") -> Text:
    """Text that is no markup, with nothing in it that a terminal would obey."""
    return Text(wording.plain(wording.clean(text)), style=style, overflow="fold")


def _name(text: str) -> Text:
    """A name in one line, cut where there is no room."""
    name = _text(" ".join(text.split()))
    name.overflow, name.no_wrap = "ellipsis", True
    return name


def _table(*, gap: int = 2) -> Table:
    """A table without frame."""
    return Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="")


def matrix_table(record: Record) -> RenderableType:
    """The score matrix R: a row for every stage, a column for every task; a star where a task was just learned.

    Few tasks have their names as columns. Many are numbered as the rows are, in whole percents, so many side by side
    as 80 columns hold.
    """
    summary, wide = Summary(record), len(record.tasks) <= WIDE
    metrics = [summary.metrics.get(task, "") for task in record.tasks]
    parts: list[RenderableType] = []
    for start in range(0, len(record.tasks), NUM_DENSE):
        columns = range(start, min(start + NUM_DENSE, len(record.tasks)))
        table = _table(gap=2 if wide else 1)
        room = 80 - len(columns) * (17 if wide else 5)
        table.add_column("after stage", no_wrap=True, max_width=room, overflow="ellipsis")
        for j in columns:
            heading = _name(record.tasks[j] if wide else str(j + 1))
            if wide and metrics[j]:
                heading.append("\n" + wording.plain(wording.column_title(metrics[j])).replace(", ", "\n"), style="dim")
            table.add_column(heading, justify="right", no_wrap=True, max_width=15, overflow="ellipsis")
        for stage, row in zip(record.stages, summary.cells, strict=True):
            table.add_row(_name(f"{stage.index} {stage.name}"), *(_cell(row[j], wide) for j in columns))
        parts.append(table)
    caption = "*: right after the task was learned; above it, the task was new to the model."
    if not wide:
        lower = [str(j) for j, metric in enumerate(metrics, start=1) if metric and not wording.is_share(metric)]
        caption += f" Percent{f'; perplexity (lower is better) in column {wording.joined(lower)}' if lower else ''}."
    return Group(*parts, _text(caption, "dim"))


def _cell(cell: Cell, wide: bool) -> Text:
    """A score, starred at its own stage, dim before it."""
    if cell.score is None:
        return _text(f"{wording.NONE} ", "dim")
    digits = wording.level(cell.score.value, cell.score.metric, unit=False)
    if not wide and wording.is_share(cell.score.metric):
        digits = f"{100 * cell.score.value:.0f}"
    style = {"own": "bold", "before": "dim", "after": ""}[cell.place]
    return _text(digits + ("*" if cell.place == "own" else " "), style)


def losses_table(record: Record) -> RenderableType:
    """What each earlier task lost, from right after its own stage to now, with its paired interval."""
    shifts = Summary(record).lost
    return _shifts_table(shifts, "task", "learned", "now") if shifts else _text(headlines(Summary(record))[1].text)


def abilities_table(record: Record) -> RenderableType:
    """What became of every general ability since the base model, with its paired interval."""
    summary = Summary(record)
    shifts = ((summary.probes,) if summary.probes else ()) + summary.abilities
    return _shifts_table(shifts, "ability", "base", "now") if shifts else _text(headlines(summary)[2].text)


def distances_table(record: Record) -> RenderableType | None:
    """How far apart every two tasks are, the farthest first; None where it was not measured."""
    pairs = distances(record.stages).farthest_first
    if not pairs:
        return None
    table = _table()
    for title in ("task", "and"):
        table.add_column(title, no_wrap=True, max_width=22, overflow="ellipsis")
    for title in ("nats a character", wording.plain(wording.CONFIDENCE)):
        table.add_column(title, justify="right", no_wrap=True)
    for (one, other), found in pairs[:NUM_DENSE]:
        ends = wording.level_range(found.low, found.high, KL)
        table.add_row(_name(one), _name(other), _text(wording.level(found.mean, KL, unit=False)), _text(ends))
    more = len(pairs) - NUM_DENSE
    return Group(table, _text(f"{wording.plural(more, 'pair')} more in the report.", "dim")) if more > 0 else table


def _shifts_table(shifts: Sequence[Shift], what: str, before: str, after: str) -> Table:
    """A row for every suite: levels, change, interval, verdict."""
    table = _table()
    table.add_column(what, no_wrap=True, max_width=18, overflow="ellipsis")
    for title in (before, after, "change", wording.plain(wording.CONFIDENCE)):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for shift in shifts:
        interval = shift.interval
        table.add_row(
            _name("all abilities" if shift.suite == PROBES else shift.label),
            *(_text(wording.level(score.value, score.metric)) for score in (shift.before, shift.after)),
            _text(wording.difference(shift.value, shift.unit)),
            _text(wording.range_text(interval, shift.unit) if interval else wording.NONE),
            _text(VERDICTS[shift.verdict], STYLES[shift.verdict]),
        )
    return table


def comparison(records: Sequence[Record]) -> RenderableType:
    """Several runs: their key figures, a row a run, what sets them apart from the first, and their matrices."""
    summaries = [Summary(record) for record in records]
    table = _table()
    table.add_column("run")
    for key in COMPARED:
        table.add_column(DEFINITIONS[key].short, justify="right", no_wrap=True)
    lines: list[RenderableType] = []
    for i, summary in enumerate(summaries):
        record = summary.record
        lines.append(_text(f"{wording.letter(i)}  {' | '.join(_identity(record))}"))
        figures = [summary.figures[key] for key in COMPARED]
        table.add_row(wording.letter(i), *(_text(f"{figure.text}\n{figure.range}") for figure in figures))
    lines += ["", table, _text(f"Below each figure: {wording.CONFIDENCE}.", "dim")]
    for i, summary in enumerate(summaries[1:], start=1):
        lines.append("")
        for card in contrasts(wording.letter(i), wording.letter(0), summaries[0], summary):
            lines.append(_text(f"{card.topic}: {card.lead} ({card.caption}). {card.text}", STYLES[card.verdict]))
    for i, record in enumerate(records):
        lines += [
            "",
            _text(f"{wording.letter(i)}  {wording.clip(record.title, MAX_TITLE)}", "bold"),
            matrix_table(record),
        ]
    return Group(*lines)


def _identity(record: Record) -> list[str]:
    """What a run is: title, model, method, strategy."""
    return [wording.clip(text, MAX_TITLE) for text in (record.title, record.model, record.method, record.strategy)]


def print_summary(console: Console, records: Sequence[Record]) -> None:
    """Print the story of one run, or the comparison of several.

    Args:
        console: where to.
        records: the runs, at least one.
    """
    if len(records) > 1:
        console.print(comparison(records))
        return
    record = records[0]
    summary = Summary(record)
    title, *choices = _identity(record)
    console.print(_text(title, "bold"))
    console.print(_text(" | ".join(choices), "dim"))
    for card in headlines(summary):
        console.print()
        line = _text(f"{card.topic}: ", "bold")
        line.append_text(_text(card.lead, STYLES[card.verdict])).append_text(_text(f" ({card.caption})"))
        console.print(line)
        console.print(_text(card.text))
    for title, body in (
        ("Score matrix", matrix_table(record)),
        ("How far apart the tasks are", distances_table(record)),
        ("What each old task lost", losses_table(record)),
        ("General abilities: change of the margin", abilities_table(record)),
    ):
        if body is not None:
            console.print()
            console.print(_text(title, "bold"))
            console.print(body)
    for note in record.notes:
        console.print(_text(f"note: {wording.clip(note, MAX_NOTE)}", "dim"))
