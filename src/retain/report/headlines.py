"""The first screen: what was learned, what was lost, and whether general abilities suffered, in words."""

from collections.abc import Sequence
from dataclasses import dataclass

from retain.evaluation.statistics import is_noise
from retain.report.definitions import KL, PROBES
from retain.report.summary import Shift, Summary, paired_differences
from retain.report.wording import CONFIDENCE, NONE, difference, joined, level, nats, plural, range_text

__all__ = ["VERDICTS", "Headline", "contrasts", "headlines"]

VERDICTS = {
    "gained": "better",
    "lost": "worse",
    "noise": "within noise",
    "unknown": "no interval",
}
"""What a verdict is called."""


@dataclass(frozen=True, slots=True)
class Headline:
    """One of the three answers that a reader comes for.

    Args:
        topic: its title.
        verdict: a name in `VERDICTS`, of all together.
        lead: the figure, large.
        caption: what the figure is.
        text: one or two sentences.
        details: the changes that matter most, to be named below the sentence.
        rest: how many changes more there are.
    """

    topic: str
    verdict: str
    lead: str
    caption: str
    text: str
    details: tuple[Shift, ...] = ()
    rest: int = 0


def headlines(summary: Summary, *, num_details: int = 3) -> tuple[Headline, ...]:
    """What was learned, what was lost, and general abilities."""
    return _learned(summary, num_details), _lost(summary, num_details), _general(summary, num_details)


CONTRASTS = {
    "backward_transfer": ("Old tasks", "kept more of its old tasks than", "kept less of its old tasks than"),
    "learning_accuracy": ("New skill", "learned the tasks better than", "learned the tasks less well than"),
    PROBES: ("General abilities", "kept more general ability than", "kept less general ability than"),
}


def contrasts(name: str, first_name: str, first: Summary, other: Summary) -> tuple[Headline, ...]:
    """What a run has more or less of than the first one, on the same examples; empty where they share none.

    Args:
        name, first_name: how the other run and the first one are called.
        first, other: the runs.
    """
    found: list[Headline] = []
    against = paired_differences(first, other)
    for key, (topic, more, less) in CONTRASTS.items():
        if key in against:
            interval, unit = against[key], first.figures[key].unit
            unit = "points" if unit == "%" else unit
            noise, more_of = is_noise(interval), interval.mean > 0
            text = f"{name} {more if more_of else less} {first_name}."
            text = f"{name} and {first_name} differ within noise." if noise else text
            verdict = "noise" if noise else "gained" if more_of else "lost"
            caption = f"{CONFIDENCE} {range_text(interval, unit)}"
            found.append(Headline(topic, verdict, difference(interval.mean, unit), caption, text))
    return tuple(found)


def _learned(summary: Summary, num: int) -> Headline:
    shifts = summary.learned
    if not shifts:
        text = "No task was learned yet." if not summary.tasks else "No scores from before the tasks to compare with."
        return Headline("Learned", "unknown", NONE, "no task scored before and after", text)
    gained = [shift for shift in shifts if shift.verdict == "gained"]
    figure = summary.figures["learning_accuracy"]
    if len(shifts) == 1:
        before, after = shifts[0].before, shifts[0].after
        lead = f"{level(before.value, before.metric)} → {level(after.value, after.metric)}"
        caption = "before → when it was learned"
        if shifts[0].interval is not None:
            change = difference(shifts[0].value, shifts[0].unit)
            caption += f": {change}, {CONFIDENCE} {range_text(shifts[0].interval, shifts[0].unit)}"
    elif figure.value is not None and figure.unit == "%" and len(shifts) == len(summary.tasks):
        start = sum(shift.before.value for shift in shifts) / len(shifts)
        lead = f"{level(start, 'share')} → {level(figure.value, 'share')}"
        caption = f"mean of {plural(len(shifts), 'task')}, before → when each was learned"
        caption += f", {CONFIDENCE} {figure.range}" if figure.interval else ""
    else:
        lead, caption = f"{len(gained)} of {len(shifts)}", "tasks better than the base model"
    order = sorted(shifts, key=lambda shift: (shift.verdict == "gained", -shift.value))
    return Headline("Learned", _overall(shifts), lead, caption, _counted(shifts, "task"), *_most(order, num))


def _lost(summary: Summary, num: int) -> Headline:
    shifts = summary.lost
    if not shifts:
        if len(summary.tasks) > 1 and len(set(map(id, summary.own.values()))) == 1:
            text = "All tasks were learned together, so none came later that could take from another."
        elif not summary.tasks:
            text = "No task was learned yet."
        elif len(summary.tasks) > 1:
            text = "The earlier tasks were not scored again after the last stage."
        else:
            text = (
                "There is only one task, so no earlier one to lose. For what the base model knew see general abilities."
            )
        return Headline("Lost", "unknown", NONE, "no earlier task", text)
    figure = summary.figures["backward_transfer"]
    if figure.value is None:
        num_lost = sum(shift.verdict == "lost" for shift in shifts)
        lead, caption = f"{num_lost} of {len(shifts)}", "earlier tasks lost"
    else:
        lead, caption = difference(figure.value, figure.unit), "mean change of the earlier tasks"
        if figure.interval is not None:
            caption += f", {CONFIDENCE} {figure.range}" + (": within noise" if figure.noise else "")
    order = sorted(shifts, key=lambda shift: shift.value)
    return Headline("Lost", _overall(shifts), lead, caption, _counted(shifts, "earlier task"), *_most(order, num))


def _general(summary: Summary, num: int) -> Headline:
    figure, shift = summary.figures[PROBES], summary.probes
    if figure.value is None or shift is None:
        return Headline("General abilities", "unknown", NONE, "not measured", f"Not measured: {figure.reason}.")
    lead = difference(figure.value, figure.unit)
    caption = f"mean change of the probes’ {'margin' if shift.by_margin else 'accuracy'}"
    if figure.interval is not None:
        caption += f", {CONFIDENCE} {figure.range}"
    said = {
        "lost": "General abilities suffered: accuracy went",
        "gained": "General abilities are better than the base model’s: accuracy went",
        "noise": "General abilities changed within noise: accuracy went",
        "unknown": "Accuracy went",
    }[shift.verdict]
    before, after = (level(score.value, score.metric) for score in (shift.before, shift.after))
    fell = [ability for ability in summary.abilities if ability.verdict == "lost"]
    text = f"{said} from {before} to {after}"
    if summary.abilities and shift.verdict != "unknown":
        num_all = len(summary.abilities)
        text += f", and {_share(len(fell), num_all)} abilities fell beyond noise"
    kl = summary.figures[KL]
    text += f". KL to the base: {nats(kl.value)} a token." if kl.value is not None else "."
    order = sorted(fell, key=lambda shift: shift.value)
    return Headline("General abilities", shift.verdict, lead, caption, text, *_most(order, num))


def _share(part: int, whole: int) -> str:
    """`none of the 8`, `3 of 8`, `all 8`."""
    return f"none of the {whole}" if not part else f"all {whole}" if part == whole else f"{part} of {whole}"


def _most(shifts: Sequence[Shift], num: int) -> tuple[tuple[Shift, ...], int]:
    """The first `num`, and how many more there are; one more is shown rather than counted."""
    num = num + 1 if len(shifts) == num + 1 else num
    return tuple(shifts[:num]), max(0, len(shifts) - num)


def _overall(shifts: Sequence[Shift]) -> str:
    """`lost` if any is lost, else `gained` if any is gained, else `noise`; `unknown` without intervals."""
    found = {shift.verdict for shift in shifts}
    return next((verdict for verdict in ("lost", "gained", "noise") if verdict in found), "unknown")


def _counted(shifts: Sequence[Shift], noun: str) -> str:
    """How many of the suites rose and fell beyond noise."""
    by = {verdict: sum(shift.verdict == verdict for shift in shifts) for verdict in VERDICTS}
    if by["unknown"] == len(shifts):
        return "Without the answers of single examples there is no interval, so what is noise is not known."
    said = {"gained": "rose beyond noise", "lost": "fell beyond noise", "noise": "changed within noise"}
    said["unknown"] = "without an interval"
    for verdict, words in said.items():
        if by[verdict] == len(shifts):
            return f"{ {1: f'The {noun}', 2: f'Both {noun}s'}.get(len(shifts), f'All {len(shifts)} {noun}s') } {words}."
    parts = [f"{by[verdict]} {words}" for verdict, words in said.items() if by[verdict]]
    return f"Of {len(shifts)} {noun}s, {joined(parts)}."
