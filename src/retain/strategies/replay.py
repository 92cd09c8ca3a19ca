"""Experience replay: a memory of old rows, some of them mixed into every epoch of a new task.

The memory is a reservoir: each row ever offered is in it with the same probability, capacity / offered. Every row has a
random number, a hash of the seed and the row's id, and the rows with the smallest numbers stay:

    memory = sorted(offered, key=lambda row: hash(seed, row.id))[:capacity]

Source: Chaudhry et al. 2019, https://arxiv.org/abs/1902.10486, section 3; old tokens instead of new ones as in Ibrahim
et al. 2024, https://arxiv.org/abs/2403.08763.
Differs: Algorithm R draws a random slot for each row (Vitter 1985). The smallest numbers have the same distribution,
and count a row once however often it is offered, in whatever order, on however many processes. Old rows are mixed into
the epoch, not into each batch.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import ClassVar, Literal

from torch import nn

from retain.strategies.strategy import State, Strategy, TaskView
from retain.types import Example

__all__ = ["Replay"]

RANGE = 2**64


@dataclass
class Replay(Strategy):
    """Mix rows of old tasks into the new one.

    Args:
        capacity: rows in the memory, above 0.
        capacity_bytes: bytes of text in the memory; None sets no limit.
        ratio: the share of an epoch's tokens that are old, in [0, 1).
        balance: `task` draws as many tokens from every old task (the base model's own text counts as one), as far as
            its rows last; `none` draws rows as they lie in the memory, where larger tasks have more.
        budget: `add` puts old rows on top of the new ones; `replace` leaves out as many new tokens as old ones come in,
            so that an epoch costs the same. The rows that are left out change from epoch to epoch.
    """

    name: ClassVar[str] = "replay"
    needs_gradients: ClassVar[bool] = False
    reference: ClassVar[str] = "https://arxiv.org/abs/1902.10486"

    capacity: int = 1000
    capacity_bytes: int | None = None
    ratio: float = 0.1
    balance: Literal["task", "none"] = "task"
    budget: Literal["add", "replace"] = "add"

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity: expected a whole number above 0, got {self.capacity}")
        if self.capacity_bytes is not None and self.capacity_bytes < 1:
            raise ValueError(f"capacity_bytes: expected a whole number above 0 or null, got {self.capacity_bytes}")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio: expected a share in [0, 1), got {self.ratio}")
        self.memory: list[Example] = []  # by rising number
        self.limit = RANGE  # the smallest number that ever had to leave: none from here on comes in
        self.seed: int | None = None  # the first task's

    def mix_examples(self, task: TaskView, epoch: int) -> Sequence[Example]:
        """The new rows and the old ones of an epoch, old ones last; the same call gives the same rows.

        No old row comes twice in an epoch before all have come once. The share is met to within half a row.
        """
        if not self.memory or not self.ratio:
            return task.examples
        sizes = [task.num_tokens(example) for example in task.examples]
        if self.budget == "add":
            kept = list(task.examples)
            wanted = sum(sizes) * self.ratio / (1 - self.ratio)
        else:
            out = left_out(sizes, share=self.ratio, epoch=epoch, generator=self._generator(task))
            kept = [example for example, leaves in zip(task.examples, out, strict=True) if not leaves]
            wanted = float(sum(size for size, leaves in zip(sizes, out, strict=True) if leaves))
        return [*kept, *(replace(example, source="replay") for example in self._draw(task, wanted, epoch))]

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Offer the task's rows to the memory. Every process offers all of them, and so keeps the same memory."""
        if self.seed is None:
            self.seed = task.seed
        offered = {example.id: example for example in (*task.examples, *self.memory)}  # a known row stays as it was
        ranked = sorted((number_of(self.seed, id), example) for id, example in offered.items())
        self.memory, used = [], 0
        for number, example in ranked:
            used += text_bytes(example)
            full = len(self.memory) == self.capacity or (self.capacity_bytes is not None and used > self.capacity_bytes)
            if number >= self.limit or full:
                self.limit = min(self.limit, number)
                break
            self.memory.append(example)

    def state_dict(self) -> State:
        """The memory; draws depend on nothing else."""
        return {"memory": list(self.memory), "limit": self.limit, "seed": self.seed}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take the memory back."""
        self.memory, self.limit, self.seed = list(state["memory"]), state["limit"], state["seed"]
        return model

    def _generator(self, task: TaskView, *more: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, task.name, *more))))

    def _draw(self, task: TaskView, wanted: float, epoch: int) -> list[Example]:
        """Rows of about `wanted` tokens together."""
        generator = self._generator(task, epoch)
        drawn: list[Example] = []
        tokens = 0
        while True:  # once over the memory, and again only if it has fewer tokens than are wanted
            for example, size in self._order(task, generator):
                if tokens + size / 2 > wanted:
                    return drawn
                drawn.append(example)
                tokens += size

    def _order(self, task: TaskView, generator: random.Random) -> Iterator[tuple[Example, int]]:
        """Every row of the memory once, with its tokens: next comes the task that gave the fewest tokens so far."""
        queues: dict[str, list[Example]] = defaultdict(list)
        for example in generator.sample(self.memory, len(self.memory)):
            queues[example.task if self.balance == "task" else ""].append(example)
        given = dict.fromkeys(queues, 0)
        while queues:
            source = min(queues, key=lambda name: given[name])
            example = queues[source].pop()
            size = max(task.num_tokens(example), 1)
            yield example, size
            given[source] += size
            if not queues[source]:
                del queues[source]


def number_of(seed: int, id: str) -> int:
    """A row's random number, uniform in [0, 2^64)."""
    return int.from_bytes(blake2b(f"{seed}/{id}".encode(), digest_size=8).digest())


def text_bytes(example: Example) -> int:
    """Bytes of the example's text in UTF-8."""
    parts = (example.text, *(message.content for message in example.messages), *example.choices, *example.references)
    return sum(len(part.encode()) for part in parts)


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
