"""A bounded memory of old rows, and which of all that were offered stay.

Every row has a random number, a hash of the seed and the row's id. In a reservoir the smallest numbers stay, so that
each row ever offered is there with the same probability, capacity / offered:

    memory = sorted(offered, key=lambda row: hash(seed, row.id))[:capacity]

The other selections order each task's rows in their own way and take turns among the tasks: every task's first row,
then every task's second, until the memory is full. So no task has more than one row more than another that has any
left, and as tasks are added the first rows of each stay. A row counts once, however often it is offered, and a process
that is offered the same rows keeps the same memory.

Source: Vitter 1985 for the reservoir's law; Chaudhry et al. 2019, https://arxiv.org/abs/1902.10486, for balance;
Rebuffi et al. 2017, https://arxiv.org/abs/1611.07725, algorithms 4 and 5, for herding; Huang et al. 2024 (SSR),
https://arxiv.org/abs/2403.01244, for clusters.
Differs: Algorithm R draws a random slot for each row. The smallest numbers have the same distribution, in whatever
order rows come. iCaRL balances classes; here tasks are balanced, and under `class` the answers within each.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal, TypeVar

from torch import Tensor

from retain.data.coresets import central, herding
from retain.types import Example

__all__ = ["Reservoir", "Selection", "number_of", "text_bytes"]

Selection = Literal["reservoir", "balanced", "class", "herding", "kmeans"]
"""How rows are chosen; see `Reservoir`."""

Embed = Callable[[Sequence[Example]], Tensor]
"""(examples, width): where a network puts each example."""

RANGE = 2**64

T = TypeVar("T")


class Reservoir:
    """Rows that were chosen from all that were offered, within limits.

    Args:
        capacity: rows, above 0.
        capacity_bytes: bytes of text; None sets no limit. The first row in the selection's order that is too much ends
            the memory, so that short rows are not likelier to stay than long ones.
        selection: `reservoir`, every row alike; `balanced`, every task alike, its rows at random; `class`, every task
            alike, and within it every answer; `herding`, every task alike, its rows so that their mean embedding is
            near the task's; `kmeans`, every task alike, the rows nearest to the means of as many clusters.

    `reservoir`, `balanced` and `class` do not depend on the order in which rows come (the last two: without a limit in
    bytes). The other two embed a task's rows, by the model as it is when they come: one pass over them.

    Raises:
        ValueError: if a limit is below 1.
    """

    def __init__(self, capacity: int, capacity_bytes: int | None = None, selection: Selection = "reservoir") -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected a whole number above 0, got {capacity}")
        if capacity_bytes is not None and capacity_bytes < 1:
            raise ValueError(f"capacity_bytes: expected a whole number above 0 or null, got {capacity_bytes}")
        self.capacity = capacity
        self.capacity_bytes = capacity_bytes
        self.selection: Selection = selection
        self.rows: list[Example] = []  # in the selection's order
        self.limit = RANGE  # of a reservoir: the smallest number that ever had to leave; none from here on comes in
        self.seed: int | None = None  # the first offer's

    def offer(self, rows: Sequence[Example], *, seed: int, embed: Embed | None = None) -> None:
        """Let rows in, others out.

        Args:
            rows: a task's; one that is there already stays as it came.
            seed: counts at the first offer.
            embed: needed by `herding` and `kmeans`.
        """
        if self.seed is None:
            self.seed = seed
        offered = {row.id: row for row in (*rows, *self.rows)}  # a known row stays as it was
        numbers = {id: number_of(self.seed, id) for id in offered}
        ranked = sorted(offered.values(), key=lambda row: (numbers[row.id], row.id))
        if self.selection == "reservoir":
            allowed = [row for row in ranked if numbers[row.id] < self.limit]
            self.rows = self._first(allowed)
            self.limit = min([self.limit, *(numbers[row.id] for row in allowed[len(self.rows) :][:1])])
        else:
            tasks = _grouped(ranked, by=lambda row: row.task)
            self.rows = self._first(self._in_turn(self._ordered(tasks, rows, embed)))

    def state_dict(self) -> dict[str, Any]:
        """The rows, and what decides about others."""
        return {"memory": list(self.rows), "limit": self.limit, "seed": self.seed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.rows, self.limit, self.seed = list(state["memory"]), state["limit"], state["seed"]

    def _ordered(
        self, tasks: Mapping[str, list[Example]], new: Sequence[Example], embed: Embed | None
    ) -> dict[str, list[Example]]:
        """Each task's rows in the order in which they are wanted, given by rising number."""
        if self.selection == "balanced":
            return dict(tasks)
        if self.selection == "class":
            return {name: self._in_turn(_grouped(rows, by=lambda row: row.answer)) for name, rows in tasks.items()}
        assert embed is not None, f"{self.selection} needs embeddings"
        arrived = {row.task for row in new}
        kept = _grouped(self.rows, by=lambda row: row.task)
        shares = _grouped(self._in_turn({name: [name] * len(rows) for name, rows in tasks.items()})[: self.capacity])
        return {
            name: self._chosen(rows, embed(rows), len(shares.get(name, ()))) if name in arrived else kept[name]
            for name, rows in tasks.items()
        }

    def _chosen(self, rows: Sequence[Example], features: Tensor, num: int) -> list[Example]:
        if self.selection == "herding":
            return [rows[index] for index in herding(features, num)]
        return [rows[index] for index in central(features, num, seed=self.seed or 0)]

    def _in_turn(self, groups: Mapping[str, Sequence[T]]) -> list[T]:
        """Every group's first, every group's second, and so on; the groups in an order that only the seed knows."""
        order = sorted(groups, key=lambda name: number_of(self.seed or 0, name))
        longest = max(map(len, groups.values()), default=0)
        return [groups[name][rank] for rank in range(longest) for name in order if rank < len(groups[name])]

    def _first(self, rows: Sequence[Example]) -> list[Example]:
        """The first rows, as far as the limits allow."""
        used = 0
        for count, row in enumerate(rows[: self.capacity]):
            used += text_bytes(row)
            if self.capacity_bytes is not None and used > self.capacity_bytes:
                return list(rows[:count])
        return list(rows[: self.capacity])


def number_of(seed: int, id: str) -> int:
    """A row's random number, uniform in [0, 2^64)."""
    return int.from_bytes(blake2b(f"{seed}/{id}".encode(), digest_size=8).digest())


def text_bytes(example: Example) -> int:
    """Bytes of the example's text in UTF-8."""
    parts = (example.text, *(message.content for message in example.messages), *example.choices, *example.references)
    return sum(len(part.encode()) for part in parts)


def _grouped(items: Sequence[T], *, by: Callable[[T], str] = str) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = defaultdict(list)
    for item in items:
        groups[by(item)].append(item)
    return dict(groups)
