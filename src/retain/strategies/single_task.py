"""Each task alone: learning without any forgetting, and without any help from one task to another.

Every task starts from the base model's weights, and is answered by its own. It is the reference for how well a task can
be learned (intransigence, Chaudhry et al. 2018, https://arxiv.org/abs/1801.10112), not one model for all tasks.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from retain.parameters import copied, put_back
from retain.strategies.strategy import State, Strategy, TaskView

__all__ = ["SingleTask"]


@dataclass
class SingleTask(Strategy):
    """Start each task from the base model, and keep its weights for it.

    The task must be named to be answered: what belongs to no task that was learned is answered by the base model.
    Memory: a copy of what moves, and one more for each task.
    """

    name: ClassVar[str] = "single_task"
    reference: ClassVar[str] = "https://arxiv.org/abs/1801.10112"
    needs_task_name: ClassVar[bool] = True
    remembers: ClassVar[bool] = False  # nothing of the base model but its weights, which the first task finds
    needs_gradients: ClassVar[bool] = False  # `copied` and `put_back` know counts, too
    stands_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.start: dict[str, Tensor] = {}  # the base model's weights
        self.learned: dict[str, dict[str, Tensor]] = {}  # each task's

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Put the base model's weights back; rows that the model has grown since keep their values."""
        if not self.start:
            self.start = copied(model)
        put_back(model, self.start)
        return model

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Keep the task's weights."""
        if self.start:  # else it is the base model itself
            self.learned[task.name] = copied(model)

    def select(self, model: nn.Module, task_name: str) -> nn.Module:
        """A model with the task's weights, which shares with the given one what does not move."""
        if not self.start:
            return model
        frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        chosen = deepcopy(model, dict(frozen))
        put_back(chosen, self.learned.get(task_name, self.start))
        return chosen

    def state_dict(self) -> State:
        """The base model's weights and each task's."""
        state: State = {"tasks": list(self.learned)}
        state |= {f"start/{name}": value for name, value in self.start.items()}
        for t, weights in enumerate(self.learned.values()):
            state |= {f"learned/{t}/{name}": value for name, value in weights.items()}
        return state

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back."""

        def taken(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

        self.start = taken("start/")
        self.learned = {task: taken(f"learned/{t}/") for t, task in enumerate(state["tasks"])}
        return model
