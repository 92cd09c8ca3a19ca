"""Averaged gradient episodic memory: a step may not make the loss on old rows worse, to first order.

    g_ref = gradient of the loss on rows drawn from the memory
    g <- g - (g . g_ref) / (g_ref . g_ref) * g_ref      where g . g_ref < 0, so that afterwards g . g_ref = 0

Source: Chaudhry et al. 2019, https://arxiv.org/abs/1812.00420, eq. 11 and algorithm 2.
Differs: the memory is a reservoir, filled after each task; g_ref is taken in evaluation mode, without dropout.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from retain import distributed
from retain.data.memory import Reservoir
from retain.parameters import differentiating, trainable
from retain.strategies.strategy import State, Strategy, TaskView
from retain.types import Example

__all__ = ["AGEM"]


@dataclass
class AGEM(Strategy):
    """Project the data gradient against that of old rows, where the two pull apart.

    Args:
        capacity: rows in the memory, above 0.
        capacity_bytes: bytes of text in the memory; None sets no limit.
        rows_per_step: rows that g_ref is measured on at each step, above 0; other ones at each.

    Costs a forward and a backward pass over `rows_per_step` rows a step. Memory: the rows' text, and during a step one
    more gradient, 4 bytes a trained float32 weight.
    """

    name: ClassVar[str] = "agem"
    reference: ClassVar[str] = "https://arxiv.org/abs/1812.00420"

    capacity: int = 1000
    capacity_bytes: int | None = None
    rows_per_step: int = 16

    def __post_init__(self) -> None:
        if self.rows_per_step < 1:
            raise ValueError(f"rows_per_step: expected a whole number above 0, got {self.rows_per_step}")
        self.memory = Reservoir(self.capacity, self.capacity_bytes)
        self.num_draws = 0  # in this task: the place in an endless sequence that the seed and the task's name decide
        self.task: TaskView | None = None

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Keep the view: it turns old rows into gradients."""
        self.task, self.num_draws = task, 0
        return model

    def edit_gradients(self, model: nn.Module) -> None:
        """Take out of the gradient what would raise the loss on old rows."""
        if self.task is None or not self.memory.rows:
            return
        reference = gradients_of(model, self.task, self._draw(self.task))
        moving = trainable(model)
        pairs = [(gradient_of(moving[name]), value) for name, value in reference.items()]
        dot = sum(float((gradient.double() * value).sum()) for gradient, value in pairs)
        if dot < 0:  # so that g_ref is not 0
            length = sum(float(value.double().square().sum()) for _, value in pairs)
            for gradient, value in pairs:
                gradient.add_(value, alpha=-dot / length)

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Offer the task's rows to the memory."""
        self.memory.offer(task.examples, seed=task.seed)
        self.num_draws = 0

    def state_dict(self) -> State:
        """The memory, and how far the draws have come."""
        return {**self.memory.state_dict(), "num_draws": self.num_draws}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back."""
        self.memory.restore(state)
        self.num_draws = state["num_draws"]
        return model

    def _draw(self, task: TaskView) -> list[Example]:
        """The next rows, the same on every process."""
        generator = random.Random(f"{self.memory.seed}/{task.name}/{self.num_draws}")
        self.num_draws += 1
        return generator.sample(self.memory.rows, min(self.rows_per_step, len(self.memory.rows)))


def gradients_of(model: nn.Module, task: TaskView, examples: Sequence[Example]) -> dict[str, Tensor]:
    """The gradient of the summed loss over the examples of all processes, by parameter name; `.grad` is left alone.

    Args:
        model: what moves of it is differentiated, in evaluation mode.
        task: turns rows into losses.
        examples: the same on every process; each takes its share.
    """
    moving = trainable(model)
    sums = {name: torch.zeros_like(parameter) for name, parameter in moving.items()}
    with differentiating(model):
        for batch in task.batches(examples):
            loss = task.loss(task.forward(model, batch), batch)
            gradients = torch.autograd.grad(loss, list(moving.values()), allow_unused=True, materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += gradient
    distributed.sum_tensors(list(sums.values()))
    return sums


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The parameter's `.grad`, made where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
