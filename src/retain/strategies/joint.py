"""Joint training: the upper bound that a strategy is measured against.

At every stage the weights go back to the base model's and are trained on the shuffled union of all tasks so far. By
stage t sequential training has taken t tasks' worth of steps; so does joint training at stage t (`steps_factor`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from retain.parameters import copied, put_back
from retain.strategies.strategy import State, Strategy, TaskView
from retain.types import Example

__all__ = ["Joint"]


@dataclass
class Joint(Strategy):
    """Start again from the base model, with the rows of every task.

    All rows are kept, and a copy of what moves. Rows that stand for the base model are not joined, so that the number
    of steps stays that of sequential training.
    """

    name: ClassVar[str] = "joint"
    needs_gradients: ClassVar[bool] = False  # `copied` and `put_back` know counts, too
    stands_alone: ClassVar[bool] = True
    remembers: ClassVar[bool] = False  # nothing of the base model but its weights

    def __post_init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.rows: list[Example] = []
        self.tasks: list[str] = []

    @property
    def steps_factor(self) -> float:
        """The tasks of the next union."""
        return 1.0 + len(self.tasks)

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Put the base model's weights back; rows that the model has grown since keep their values."""
        if not self.start:
            self.start = copied(model)
        put_back(model, self.start)
        return model

    def mix_examples(self, task: TaskView, epoch: int) -> Sequence[Example]:
        """The union; its order is the sampler's to choose."""
        return [*self.rows, *task.examples]

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Keep the task's rows; of the base model, its weights."""
        if task.name == "base":
            self.start = copied(model)
            return
        self.tasks.append(task.name)
        self.rows += [replace(example, source="replay") for example in task.examples]

    def state_dict(self) -> State:
        """Rows and starting weights."""
        weights = {f"start/{name}": tensor for name, tensor in self.start.items()}
        return {"tasks": list(self.tasks), "rows": list(self.rows), **weights}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back."""
        self.tasks, self.rows = list(state["tasks"]), list(state["rows"])
        self.start = {key.removeprefix("start/"): value for key, value in state.items() if key.startswith("start/")}
        return model
