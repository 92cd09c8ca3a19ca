"""The report's pictures, as SVG to be put inline: whiskers in tables, loss curves, and new skill against old skill.

Every colour is a CSS variable of the page (`--ink`, `--good`, ...), so one picture serves light, dark and print.
Pictures with axes are Altair's. Whiskers have positions in percent instead, so that they bend with their table.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert
from markupsafe import Markup

from retain.evaluation.statistics import Interval
from retain.report.wording import clean, clip
from retain.types import StepInfo

__all__ = ["Point", "Scale", "loss_curves", "smoothed", "trade_off", "whisker"]

NUM_DRAWN = 160
"""Steps drawn of a curve; more are averaged in groups."""

MARKS = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")


@dataclass(frozen=True, slots=True)
class Scale:
    """The common scale of a column of whiskers, around 0 or from 0.

    Args:
        low, high: its ends.
        ticks: the round numbers to label.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, intervals: Sequence[Interval]) -> "Scale":
        """The scale that holds 0 and every interval, with round ticks at 0 and near its ends."""
        low = min([0.0, *(interval.low for interval in intervals)])
        high = max([0.0, *(interval.high for interval in intervals)])
        span = (high - low) or 1.0
        step = 10.0 ** _exponent(span)
        step *= next((factor for factor in (0.2, 0.5, 1.0, 2.0) if span / (step * factor) <= 5.0), 5.0)
        first, last = -int(-low / step + 1e-9), int(high / step + 1e-9)
        return cls(low - 0.04 * span, high + 0.04 * span, tuple(round(step * k, 12) for k in range(first, last + 1)))

    def at(self, value: float) -> str:
        """Where the value is, as a percentage of the width."""
        return f"{100 * (value - self.low) / (self.high - self.low):.2f}%"


def _exponent(value: float) -> int:
    """The power of ten at or below a positive value."""
    return int(f"{value:e}".split("e")[1])


@dataclass(frozen=True, slots=True)
class Point:
    """A run in the trade-off picture.

    Args:
        label: short; written beside the mark.
        x, y: old skill kept and new skill, in the axes' units.
    """

    label: str
    x: Interval
    y: Interval


def whisker(interval: Interval, scale: Scale, verdict: str) -> Markup:
    """A dot with its interval on a scale with a line at 0: filled where it is beyond noise, hollow within it.

    The table says the same in numbers, so a screen reader skips it.
    """
    low, mean, high, zero = (scale.at(value) for value in (interval.low, interval.mean, interval.high, 0.0))
    return Markup(
        '<svg class="whisker {}" width="100%" height="20" aria-hidden="true">'
        '<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="20"/>'
        '<line class="range" x1="{low}" x2="{high}" y1="10" y2="10"/>'
        '<line class="range" x1="{low}" x2="{low}" y1="6" y2="14"/>'
        '<line class="range" x1="{high}" x2="{high}" y1="6" y2="14"/>'
        '<circle class="mean" cx="{mean}" cy="10" r="4.5"/></svg>'
    ).format(verdict, zero=zero, low=low, high=high, mean=mean)


def smoothed(values: Sequence[float]) -> list[float]:
    """The exponentially weighted mean of the values so far, over about a twentieth of them; unbiased from the first.

    m_t = sum_k decay^(t - k) v_k / sum_k decay^(t - k)
    """
    decay = 1 - 1 / max(3.0, len(values) / 20)
    total, weight, found = 0.0, 0.0, list[float]()
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        found.append(total / weight)
    return found


def loss_curves(history: Sequence[StepInfo], *, title: str) -> Markup:
    """The training loss of one stage: every step faint, its running mean, validation points, and the penalty if any.

    Args:
        history: the stage's steps.
        title: what a screen reader says.
    """
    history = [info for info in history if math.isfinite(info.loss + info.penalty)]
    steps = [info.step for info in history]
    losses = [info.loss for info in history]
    lines = {"each step": losses, "smoothed": smoothed(losses)}
    if any(info.penalty for info in history):
        lines["penalty"] = smoothed([info.penalty for info in history])
    rows = [
        {"step": step, "value": value, "line": name}
        for name, values in lines.items()
        for step, value in _thinned(steps, values)
    ]
    points = [
        {"step": i.step, "value": i.validation_loss}
        for i in history
        if i.validation_loss is not None and math.isfinite(i.validation_loss)
    ]
    x_axis = alt.Axis(tickCount=4, format="~s", grid=False, labelFlush=False)
    x = alt.X("step:Q", title="step", axis=x_axis, scale=alt.Scale(nice=False))
    y_axis = alt.Axis(tickCount=4, minExtent=30, maxExtent=30)  # of one width, so that the stages' pictures line up
    y = alt.Y("value:Q", title=None, axis=y_axis, scale=alt.Scale(zero=True, nice=True))
    looks: dict[str, dict[str, Any]] = {
        "each step": {"stroke": "var(--faint)", "strokeWidth": 1},
        "smoothed": {"stroke": "var(--new)", "strokeWidth": 2},
        "penalty": {"stroke": "var(--bad)", "strokeWidth": 1.5, "strokeDash": [5, 3]},
    }
    layers: list[alt.Chart] = []
    for name in lines:
        data = alt.Data(values=[row for row in rows if row["line"] == name])
        mark: dict[str, Any] = {"point": {"fill": "var(--new)", "size": 12}} if len(history) == 1 else {}
        layers.append(alt.Chart(data).mark_line(clip=False, **looks[name], **mark).encode(x=x, y=y))
    if points:
        mark = {"shape": "diamond", "fill": "var(--page)", "stroke": "var(--ink)", "strokeWidth": 1.5, "size": 45}
        layers.append(alt.Chart(alt.Data(values=points)).mark_point(opacity=1, **mark).encode(x=x, y=y))
    return _svg(alt.layer(*layers).properties(width=292, height=150), title)


def _thinned(steps: Sequence[int], values: Sequence[float]) -> list[tuple[float, float]]:
    """At most `NUM_DRAWN` points: means over groups of neighbours."""
    size = -(-len(steps) // NUM_DRAWN)
    starts = range(0, len(steps), size or 1)
    groups = [(steps[i : i + size], values[i : i + size]) for i in starts]
    return [(sum(s) / len(s), round(sum(v) / len(v), 5)) for s, v in groups]


def trade_off(
    points: Sequence[Point], *, x_title: str, y_title: str, least: tuple[float, float], is_share: bool, title: str
) -> Markup:
    """New skill (up) against old skill kept (right), every run a mark with both intervals and its label.

    Args:
        points: the runs.
        x_title, y_title: of the axes.
        least: how much of x and y is shown at least, so that a small difference looks small.
        is_share: does y lie between 0 and 100?
        title: what a screen reader says.
    """
    rows = [
        {
            "label": clip(clean(point.label), 18),
            "mark": str(i),
            "x": point.x.mean, "left": point.x.low, "right": point.x.high,
            "y": point.y.mean, "bottom": point.y.low, "top": point.y.high,
        }
        for i, point in enumerate(points)
    ]  # fmt: skip
    ends = [value for point in points for value in (point.x.low, point.x.high)]
    x_scale = alt.Scale(domain=_padded([*ends, 0.0], least[0]), nice=True, zero=False)
    tops = [value for point in points for value in (point.y.low, point.y.high)]
    bottom, top = _padded(tops, least[1])
    y_domain = [max(0.0, bottom), min(100.0, top)] if is_share else [bottom, top]
    y_scale = alt.Scale(domain=y_domain, nice=True, zero=False)
    data = alt.Data(values=rows)
    x = alt.X("x:Q", title=x_title, scale=x_scale, axis=alt.Axis(tickCount=5))
    y = alt.Y("y:Q", title=y_title, scale=y_scale, axis=alt.Axis(tickCount=5))
    names, shapes = [row["mark"] for row in rows], [MARKS[i % len(MARKS)] for i in range(len(rows))]
    shape = alt.Shape("mark:N", scale=alt.Scale(domain=names, range=shapes), legend=None)
    zero = alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(stroke="var(--muted)", strokeDash=[3, 3]).encode(x="x:Q")
    runs = alt.Chart(data)
    line: dict[str, Any] = {"stroke": "var(--ink)"}
    mark: dict[str, Any] = {"fill": "var(--new)", "stroke": "var(--page)", "size": 110, "opacity": 1}
    label: dict[str, Any] = {
        "align": "left",
        "dx": 9,
        "dy": -9,
        "fill": "var(--ink)",
        "fontSize": 13,
        "fontWeight": 600,
    }
    chart = alt.layer(
        zero,
        runs.mark_rule(**line).encode(x=x, x2="right:Q", y=y).transform_calculate(x="datum.left"),
        runs.mark_rule(**line).encode(x=x, y=y, y2="top:Q").transform_calculate(y="datum.bottom"),
        runs.mark_point(**mark).encode(x=x, y=y, shape=shape),
        runs.mark_text(**label).encode(x=x, y=y, text="label:N"),
    )
    return _svg(chart.properties(width=360, height=260), title)


def _padded(values: Sequence[float], least: float) -> list[float]:
    """The values' range with room at both ends, `least` wide or wider."""
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), (least - (high - low)) / 2)
    return [low - room, high + room]


STYLE: Mapping[str, Any] = {
    "background": "transparent",
    "font": "Helvetica, Arial, sans-serif",
    "padding": {"left": 2, "right": 14, "top": 8, "bottom": 2},
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)", "titleColor": "var(--muted)",
        "gridColor": "var(--rule)", "domainColor": "var(--rule)", "tickColor": "var(--rule)",
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8,
    },
}  # fmt: skip


def _svg(chart: alt.LayerChart | alt.FacetChart, title: str) -> Markup:
    """The chart as an SVG element that may stand in a page beside others: ids of its own, a title, no addresses."""
    specification = chart.to_dict()
    specification["config"] = {**specification.get("config", {}), **STYLE}
    text = vl_convert.vegalite_to_svg(specification)
    prefix = f"figure-{zlib.crc32(text.encode()):08x}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    text = re.sub(r' (?:xmlns(?::xlink)?|version|aria-[a-z]+|role)="[^"]*"', "", text)
    width = re.search(r'width="([\d.]+)"', text)
    head = f'<svg role="img" style="max-width:{width[1] if width else 360}px" '
    label = Markup("<title>{}</title>").format(clean(title))
    opened = re.sub(r' (?:width|height)="[\d.]+"', "", text[: text.index(">")], count=2)
    return Markup(head + opened.removeprefix("<svg ") + ">" + str(label) + text[text.index(">") + 1 :])
