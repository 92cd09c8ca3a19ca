"""How numbers, units and foreign text are spelled, the same in the page and in the terminal.

    97.5 %            a level of a score between 0 and 1
    −45.0 points      a difference of two such levels: percentage points
    0.213 nats        a log-probability, a divergence, a loss
    12.4              a perplexity, or any score that is no share

The text here is typographic (minus signs, narrow spaces); `plain` turns it into what every terminal can show.
"""

import math
import re
from collections.abc import Iterable

from retain.evaluation.forgetting import LOWER_IS_BETTER
from retain.evaluation.statistics import Interval

__all__ = [
    "CONFIDENCE",
    "NONE",
    "clean",
    "clip",
    "column_title",
    "count",
    "difference",
    "duration",
    "is_share",
    "joined",
    "letter",
    "level",
    "level_range",
    "metric_title",
    "nats",
    "percent",
    "plain",
    "plural",
    "range_text",
    "short",
    "tick",
    "unit_of",
]

DIGITS = {"points": 1, "nats": 2}
"""Decimals of a difference, by unit."""
CONFIDENCE = "95\u202f%\u00a0confidence"
NONE = "–"
"""Where there is no figure."""

MINUS, NARROW = "−", "\u202f"
TITLES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "f1": "F1",
    "json_equal": "JSON equality",
    "json_equality": "JSON equality",
    "kl": "KL divergence",
    "rouge_l": "ROUGE-L",
    "token_f1": "token F1",
}
# Control characters, direction overrides, surrogates, and what is no character.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """The text with what no page or terminal may be given made visible: control and direction characters, surrogates.

    A control character ends the SVG renderer's process, an escape sequence can rewrite a terminal, a direction override
    can make an answer read as another. New lines and tabs stay.
    """

    def visible(found: re.Match[str]) -> str:
        code = ord(found[0])
        return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "\ufffd"

    return INVISIBLE.sub(visible, text.replace("\r\n", "\n"))


def clip(text: str, limit: int) -> str:
    """The text, cut after `limit` characters; how many are missing is said."""
    rest = len(text) - limit
    return text if rest <= 0 else f"{text[:limit].rstrip()} … ({count(rest)} more characters)"


def short(text: str, limit: int) -> str:
    """The name, cut to `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…"


def plain(text: str) -> str:
    """Typographic text in characters that every terminal has."""
    for fine, simple in {MINUS: "-", NARROW: " ", "\u00a0": " ", "–": "-", "→": "->", "·": "|"}.items():
        text = text.replace(fine, simple)
    return text


def plural(number: int, noun: str, nouns: str = "") -> str:
    """`1 task`, `3 tasks`."""
    return f"{count(number)} {noun if number == 1 else nouns or noun + 's'}"


def joined(items: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def letter(index: int) -> str:
    """A run's label: A to Z, then A2, ..."""
    round_, place = divmod(index, 26)
    return f"{chr(ord('A') + place)}{round_ + 1 if round_ else ''}"


def is_share(metric: str) -> bool:
    """Does the metric lie between 0 and 1?"""
    return metric not in LOWER_IS_BETTER


def unit_of(metric: str) -> str:
    """The unit of the metric's differences: `points` of a hundred, or `nats`."""
    return "points" if is_share(metric) else "nats"


def metric_title(metric: str) -> str:
    """The metric's name as a person writes it."""
    return TITLES.get(metric, metric.replace("_", " "))


def column_title(metric: str) -> str:
    """The metric's name with what its numbers mean: percent, or that lower is better."""
    return f"{metric_title(metric)}, {'%' if is_share(metric) else 'lower is better'}"


def _number(value: float, digits: int, *, signed: bool = False) -> str:
    """A number with a true minus sign; a signed one keeps its sign where it rounds to 0, and only 0 has none."""
    if not math.isfinite(value):
        return "∞" if value > 0 else f"{MINUS}∞" if value < 0 else "not a number"
    text = f"{abs(value):,.{digits}f}".replace(",", NARROW)
    is_zero = value == 0 if signed else not any(digit in text for digit in "123456789")
    return text if is_zero else f"{MINUS}{text}" if value < 0 else f"+{text}" if signed else text


def count(value: float) -> str:
    """A whole number, its thousands apart."""
    return _number(value, 0)


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{_number(100 * value, digits)}{NARROW}%"


def nats(value: float) -> str:
    """A loss or a divergence, with its unit."""
    return f"{_number(value, 3)} nats"


def level(value: float, metric: str, *, unit: bool = True) -> str:
    """A score as it is: a percentage for shares, the plain number for perplexity."""
    if is_share(metric):
        return percent(value) if unit else _number(100 * value, 1)
    if metric == "kl":
        return nats(value) if unit else _number(value, 3)
    return _number(value, 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0)


def level_range(low: float, high: float, metric: str) -> str:
    """The ends of a score's interval, without unit: `94.3–99.0`."""
    return f"{level(low, metric, unit=False)}–{level(high, metric, unit=False)}"


def difference(value: float, unit: str) -> str:
    """A difference with its sign and unit: `−45.0 points`, `+0.21 nats`."""
    return f"{_number(100 * value if unit == 'points' else value, DIGITS[unit], signed=True)} {unit}"


def range_text(interval: Interval, unit: str) -> str:
    """The ends of a difference's interval, without unit: `−51.2 to −38.6`."""
    ends = (difference(end, unit).removesuffix(f" {unit}") for end in (interval.low, interval.high))
    return " to ".join(ends)


def tick(value: float, unit: str) -> str:
    """A label of a scale: as short as it can be."""
    scaled = round(100 * value if unit == "points" else value, 9)
    return f"{MINUS if scaled < 0 else ''}{abs(scaled):g}"


def duration(seconds: float) -> str:
    """`0.8 s`, `42 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
