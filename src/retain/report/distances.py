"""How far apart the tasks are, as the stages recorded it before they were trained.

Of a stage's provenance `task_distances` is a list of `{"tasks": [one, other], "nats": d, "low": ..., "high": ...,
"rows": n}`, in nats a character.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from retain.evaluation.statistics import Interval
from retain.types import StageRecord

__all__ = ["Distances", "distances"]


@dataclass(frozen=True, slots=True)
class Distances:
    """The distance of every two tasks that were compared.

    Args:
        tasks: those that were compared with any, in order.
        pairs: by the two names, in the order of `tasks`; nats a character.
    """

    tasks: tuple[str, ...]
    pairs: Mapping[tuple[str, str], Interval]

    def between(self, one: str, other: str) -> Interval | None:
        """The distance of two tasks, in whatever order; None of a task and itself, or where it was not measured."""
        return self.pairs.get((one, other)) or self.pairs.get((other, one))

    @property
    def farthest_first(self) -> list[tuple[tuple[str, str], Interval]]:
        """All pairs, those far apart before those near."""
        return sorted(self.pairs.items(), key=lambda pair: -pair[1].mean)


def distances(stages: Sequence[StageRecord]) -> Distances:
    """What the stages recorded; the latest of each pair counts."""
    pairs: dict[tuple[str, str], Interval] = {}
    for stage in stages:
        for entry in stage.provenance.get("task_distances", ()):
            one, other = entry["tasks"]
            pairs[one, other] = Interval(entry["nats"], entry["low"], entry["high"], entry["rows"])
    return Distances(tuple(dict.fromkeys(task for pair in pairs for task in pair)), pairs)
