"""Experience replay: a memory of old rows, some of them mixed into every epoch of a new task.

Source: Chaudhry et al. 2019, https://arxiv.org/abs/1902.10486, section 3. Which rows are kept is `data.memory`'s to
say, and how they are mixed `data.mixing`'s.
Differs: old rows are mixed into the epoch, not into each batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from retain.data.memory import Reservoir, Selection
from retain.data.mixing import Mixture
from retain.strategies.strategy import State, Strategy, TaskView
from retain.types import Example

__all__ = ["Replay"]


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
        selection: which rows are kept: `reservoir` all alike, `balanced` all tasks alike, `class` all answers of a task
            alike, `herding` and `kmeans` those that stand for their task in the model's own embedding.

    Memory: the rows' text, as many rows or bytes as the limits say.
    """

    name: ClassVar[str] = "replay"
    reference: ClassVar[str] = "https://arxiv.org/abs/1902.10486"

    capacity: int = 1000
    capacity_bytes: int | None = None
    ratio: float = 0.1
    balance: Literal["task", "none"] = "task"
    budget: Literal["add", "replace"] = "add"
    selection: Selection = "reservoir"

    @property
    def needs_gradients(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Not for rows themselves; an embedding is a network's."""
        return self.selection in ("herding", "kmeans")

    def __post_init__(self) -> None:
        self.memory = Reservoir(self.capacity, self.capacity_bytes, self.selection)
        self.mixture = Mixture(self.ratio, self.balance, self.budget)

    def mix_examples(self, task: TaskView, epoch: int) -> Sequence[Example]:
        """The new rows and the old ones of an epoch, old ones last; the same call gives the same rows."""
        return self.mixture.mix(
            task.examples, self.memory.rows,
            num_tokens=task.num_tokens, key=f"{self.memory.seed}/{task.name}", epoch=epoch,
        )  # fmt: skip

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Offer the task's rows to the memory. Every process offers all of them, and so keeps the same memory."""
        self.memory.offer(task.examples, seed=task.seed, embed=lambda rows: task.embed(model, rows))

    def state_dict(self) -> State:
        """The memory; draws depend on nothing else."""
        return self.memory.state_dict()

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take the memory back."""
        self.memory.restore(state)
        return model
