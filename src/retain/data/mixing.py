"""New rows and old ones in one epoch, in a given share of the tokens."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from retain.types import Example

__all__ = ["Mixture", "left_out"]


@dataclass(frozen=True)
class Mixture:
    """How an epoch is mixed; the same call gives the same rows.

    Args:
        ratio: the share of an epoch's tokens that are old, in [0, 1).
        balance: `task` draws as many tokens from every old task (the base model's own text counts as one), as far as
            its rows last; `none` draws rows as they lie in the memory, where larger tasks have more.
        budget: `add` puts old rows on top of the new ones; `replace` leaves out as many new tokens as old ones come in,
            so that an epoch costs the same. The rows that are left out change from epoch to epoch.

    Source: Ibrahim et al. 2024, https://arxiv.org/abs/2403.08763, for old tokens instead of new ones.

    Raises:
        ValueError: if the ratio is out of range.
    """

    ratio: float = 0.1
    balance: Literal["task", "none"] = "task"
    budget: Literal["add", "replace"] = "add"

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio: expected a share in [0, 1), got {self.ratio}")

    def mix(
        self,
        new: Sequence[Example],
        memory: Sequence[Example],
        *,
        num_tokens: Callable[[Example], int],
        key: str,
        epoch: int,
    ) -> Sequence[Example]:
        """The new rows and the old ones of an epoch, old ones last and marked `replay`.

        No old row comes twice in an epoch before all have come once. The share is met to within half a row.

        Args:
            new: the task's own rows.
            memory: old rows.
            num_tokens: of a row.
            key: all that the draws depend on, with the epoch.
            epoch: from 0.
        """
        if not memory or not self.ratio:
            return new
        sizes = [num_tokens(example) for example in new]
        if self.budget == "add":
            kept = list(new)
            wanted = sum(sizes) * self.ratio / (1 - self.ratio)
        else:
            out = left_out(sizes, share=self.ratio, epoch=epoch, generator=random.Random(key))
            kept = [example for example, leaves in zip(new, out, strict=True) if not leaves]
            wanted = float(sum(size for size, leaves in zip(sizes, out, strict=True) if leaves))
        drawn = self._draw(memory, num_tokens, wanted, random.Random(f"{key}/{epoch}"))
        return [*kept, *(replace(example, source="replay") for example in drawn)]

    def _draw(
        self,
        memory: Sequence[Example],
        num_tokens: Callable[[Example], int],
        wanted: float,
        generator: random.Random,
    ) -> list[Example]:
        """Rows of about `wanted` tokens together."""
        drawn: list[Example] = []
        tokens = 0
        while True:  # once over the memory, and again only if it has fewer tokens than are wanted
            for example, size in self._order(memory, num_tokens, generator):
                if tokens + size / 2 > wanted:
                    return drawn
                drawn.append(example)
                tokens += size

    def _order(
        self, memory: Sequence[Example], num_tokens: Callable[[Example], int], generator: random.Random
    ) -> Iterator[tuple[Example, int]]:
        """Every row of the memory once, with its tokens: next comes the task that gave the fewest tokens so far."""
        queues: dict[str, list[Example]] = defaultdict(list)
        for example in generator.sample(memory, len(memory)):
            queues[example.task if self.balance == "task" else ""].append(example)
        given = dict.fromkeys(queues, 0)
        while queues:
            source = min(queues, key=lambda name: given[name])
            example = queues[source].pop()
            size = max(num_tokens(example), 1)
            yield example, size
            given[source] += size
            if not queues[source]:
                del queues[source]


def left_out(sizes: Sequence[int], *, share: float, epoch: int, generator: random.Random) -> list[bool]:
    """Which rows an epoch leaves out: about `share` of the tokens, other ones in each epoch.

    The rows lie on a circle in random order, each as long as its tokens. Epoch e leaves out those whose middle falls on
    the arc from e * share to (e + 1) * share of the circle; over 1 / share epochs every row is left out once.
    """
    total = sum(sizes)
    result = [False] * len(sizes)
    start = 0
    for index in generator.sample(range(len(sizes)), len(sizes)):
        result[index] = (start + sizes[index] / 2 - epoch * share * total) % total < share * total
        start += sizes[index]
    return result
