"""Where a run's figures come from: facts and settings of its stages as rows of text, and how fast it went.

Of a stage's provenance these entries have a meaning here: `seconds`, of the whole stage; `settings`, by dotted key
`{"value": ..., "source": ...}`, or `sources`, by dotted key the source alone (flag, recipe or default). What the page
says elsewhere is left out; everything else is shown as it is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retain.types import StageRecord

__all__ = ["Fact", "Setting", "Speed", "facts", "settings", "speed"]

COUNTED = ("seconds", "steps", "targets", "tokens", "tokens_per_second", "training_seconds")
ELSEWHERE = frozenset({"method", "notes", "settings", "sources", "strategy", "task_distances", *COUNTED})


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that was recorded.

    Args:
        name: dotted, as it is nested.
        value: as text.
        stages: the stages that it holds for; empty where it holds for all.
    """

    name: str
    value: str
    stages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of a setting, empty where it was not recorded, and where it was set."""

    name: str
    value: str
    source: str
    stages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Speed:
    """How long a stage took.

    Args:
        stage: its name.
        num_steps: optimizer steps.
        num_tokens: tokens trained on.
        seconds: of training.
        total: seconds of the whole stage, with consolidation and scoring; None where it was not recorded.
    """

    stage: str
    num_steps: int
    num_tokens: int
    seconds: float
    total: float | None

    @property
    def rate(self) -> float | None:
        """Tokens a second of training."""
        return self.num_tokens / self.seconds if self.seconds > 0 else None


def speed(stages: Sequence[StageRecord]) -> list[Speed]:
    """One row for every stage that trained or whose time is known."""
    found: list[Speed] = []
    for stage in stages:
        total = stage.provenance.get("seconds")
        if stage.history or total is not None:
            tokens = sum(info.num_tokens for info in stage.history)
            seconds = sum(info.seconds for info in stage.history)
            whole = None if total is None else float(total)
            found.append(Speed(stage.name, len(stage.history), tokens, seconds, whole))
    return found


def facts(stages: Sequence[StageRecord]) -> list[Fact]:
    """What was recorded of the stages, each value once: first what holds for all of them."""
    found: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        for name, value in _flat({k: v for k, v in stage.provenance.items() if k not in ELSEWHERE}):
            found.setdefault((name, value), []).append(stage.name)
    rows = [Fact(name, value, _some(names, stages)) for (name, value), names in found.items()]
    return sorted(rows, key=lambda row: bool(row.stages))


def settings(stages: Sequence[StageRecord]) -> list[Setting]:
    """The settings of the stages, those that a person chose before the defaults."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for stage in stages:
        sources: Mapping[str, str] = stage.provenance.get("sources", {})
        values: Mapping[str, Mapping[str, Any]] = stage.provenance.get("settings", {})
        keys = [(name, "", source) for name, source in sources.items() if name not in values]
        keys += [(name, _text(entry["value"]), str(entry["source"])) for name, entry in values.items()]
        for key in keys:
            found.setdefault(key, []).append(stage.name)
    rows = [Setting(name, value, source, _some(names, stages)) for (name, value, source), names in found.items()]
    return sorted(rows, key=lambda row: (row.source == "default", row.name))


def _some(names: Sequence[str], stages: Sequence[StageRecord]) -> tuple[str, ...]:
    """The names, unless they are all of the stages, or all but the base."""
    trained = [stage.name for stage in stages[1:]]
    return () if list(names) in ([stage.name for stage in stages], trained) else tuple(names)


def _flat(entries: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted names, each with its value as text."""
    rows: list[tuple[str, str]] = []
    for key, value in entries.items():
        name = f"{prefix}{key}"
        if value in ("", None):
            continue
        rows += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, _text(value))]
    return rows


def _text(value: object) -> str:
    """A value as a person writes it; lists and mappings as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
