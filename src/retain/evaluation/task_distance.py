"""How far apart two tasks are, before anything is trained: what each one's rows cost a model of the other's.

    d(A, B) = [H_A(B) - H_B(B) + H_B(A) - H_A(A)] / 2

with H_X(Y) the nats a character that rows of Y cost an n-gram model of other rows of X. Two samples of the same
rows are at 0, whatever their entropy; the difference of two cross-entropies on the same text is what a wrong model
costs. The models are small (5-grams of UTF-8 bytes, of equally much text on both sides), so ten thousand rows take
seconds, and need neither the model that is tuned nor its tokenizer.

Source: cross-entropy differences between language models as a measure of the distance of domains, as in Moore and Lewis
2010, https://aclanthology.org/P10-2041, made symmetric and freed of each side's own entropy.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from retain.data.memory import number_of
from retain.evaluation.statistics import Interval, interval
from retain.models.backoff import BackoffModel, windows
from retain.models.kneser_ney import estimate, tally
from retain.types import Example

__all__ = ["Distance", "task_distances"]

ORDER = 5
"""Bytes of the longest n-gram: about a word."""

END = 256
"""Ends a text; the symbols before it are the bytes."""

MAX_BYTES = 16_000
"""Bytes of a task that are counted, and as many that are held out, twice."""


@dataclass(frozen=True, slots=True)
class Distance:
    """The distance of two tasks.

    Args:
        first, second: their names.
        nats: nats a character, with their interval at 95 % over held-out rows.
    """

    first: str
    second: str
    nats: Interval

    def as_dict(self) -> dict[str, Any]:
        """As a stage's provenance holds it."""
        found = self.nats
        return {
            "tasks": [self.first, self.second], "nats": found.mean, "low": found.low, "high": found.high,
            "rows": found.num,
        }  # fmt: skip

    def __str__(self) -> str:
        found = self.nats
        return (
            f"{self.first} and {self.second} are {found.mean:.2f} nats a character apart "
            f"({found.low:.2f} to {found.high:.2f})"
        )


class Sample:
    """Rows of one task in two halves, each held out from the other; texts and seed alone decide the split."""

    def __init__(self, name: str, examples: Sequence[Example], *, seed: int) -> None:
        texts = sorted(set(map(_text, examples)), key=lambda text: (number_of(seed, text), text))
        self.name = name
        self.halves = [texts[::2], texts[1::2]]
        self.ids = [[_ids(text) for text in half] for half in self.halves]
        self._models: dict[tuple[int, int], BackoffModel] = {}

    @property
    def size(self) -> int:
        """Bytes that either half can give a model."""
        return min(MAX_BYTES, *(sum(map(len, half)) for half in self.ids))

    def model(self, half: int, size: int) -> BackoffModel:
        """The model of a half's first texts, `size` bytes of them or one text less."""
        kept = _within(self.ids[half], size)
        if (half, kept) not in self._models:
            grams = windows(self.ids[half][:kept], ORDER, begin=END + 1)
            self._models[half, kept] = estimate(tally(grams), vocab_size=END + 1)
        return self._models[half, kept]

    def excess(self, reader: "Sample", size: int, seed: int) -> Interval:
        """H_reader(own) - H_own(own), nats a character; each half read by models of the other one."""
        lengths: list[int] = []
        nats: list[float] = []
        for half in (0, 1):
            kept = _within(self.ids[half], MAX_BYTES)
            rows = self.ids[half][:kept]
            grams = windows(rows, ORDER, begin=END + 1)
            owners = np.repeat(np.arange(kept), [len(row) for row in rows])
            differences = self.model(1 - half, size).score(grams) - reader.model(1 - half, size).score(grams)
            nats += np.bincount(owners, differences, minlength=kept).tolist()
            lengths += [len(text) + 1 for text in self.halves[half][:kept]]
        return interval(np.array(nats) / lengths, weights=lengths, bounded=False, seed=seed)


def task_distances(
    tasks: Mapping[str, Sequence[Example]], *, known: Collection[frozenset[str]] = (), seed: int = 0
) -> list[Distance]:
    """The distance of every two tasks, in their order; tasks with fewer than four different rows are left out.

    Args:
        tasks: rows by name.
        known: pairs of names that are not measured.
        seed: of the split of each task's rows, and of the bootstrap.
    """
    wanted = [pair for pair in combinations(tasks, 2) if frozenset(pair) not in known]
    samples = {name: Sample(name, tasks[name], seed=seed) for name in dict.fromkeys(n for pair in wanted for n in pair)}
    found: list[Distance] = []
    for one, other in ((samples[first], samples[second]) for first, second in wanted):
        if all(len(half) > 1 for half in (*one.halves, *other.halves)):
            found.append(Distance(one.name, other.name, _distance(one, other, seed)))
    return found


def _distance(one: Sample, other: Sample, seed: int) -> Interval:
    size = min(one.size, other.size)
    excess = [one.excess(other, size, seed), other.excess(one, size, seed)]
    mean = sum(part.mean for part in excess) / 2
    below = math.hypot(*(part.mean - part.low for part in excess)) / 2
    above = math.hypot(*(part.high - part.mean for part in excess)) / 2
    return Interval(mean, mean - below, mean + above, sum(part.num for part in excess))


def _text(example: Example) -> str:
    """All that a row says."""
    return example.text or "\n".join(message.content for message in example.messages)


def _ids(text: str) -> list[int]:
    return [*text.encode(), END]


def _within(rows: Sequence[Sequence[int]], size: int) -> int:
    """How many first rows have at most `size` symbols together; at least one."""
    return max(1, int(np.searchsorted(np.cumsum([len(row) for row in rows]), size, side="right")))
