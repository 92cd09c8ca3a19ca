"""Weight interpolation: after each task, go back part of the way to where the weights were.

    theta = (1 - alpha) * theta_before + alpha * theta_after        over what moves

Source: Wortsman et al. 2022 (WiSE-FT), https://arxiv.org/abs/2109.01903, section 3; its theta_before is the base model.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from retain.parameters import copied, known_rows
from retain.strategies.strategy import State, Strategy, TaskView

__all__ = ["WiSEFT"]


@dataclass
class WiSEFT(Strategy):
    """Average the weights before and after a task.

    Args:
        alpha: how much of the way stays, in [0, 1]: 1 is sequential training, 0 puts the old weights back, exactly.
        start: `previous` averages with the weights as the task found them; `base` with the base model's, as the first
            task found them.

    Under LoRA what moves is A and B, so their product is not interpolated in a straight line: from the base, where B is
    0, the change of a weight is alpha * B ((1 - alpha) A_0 + alpha A). Rows that a weight has grown since stay as they
    are. The average happens once a task, so training itself costs nothing more. Memory: a copy of what moves.
    """

    name: ClassVar[str] = "wise_ft"
    reference: ClassVar[str] = "https://arxiv.org/abs/2109.01903"
    merges: ClassVar[bool] = True
    remembers: ClassVar[bool] = False  # nothing of the base model but its weights, which the first task finds

    alpha: float = 0.5
    start: Literal["previous", "base"] = "previous"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a share in [0, 1], got {self.alpha}")
        self.before: dict[str, Tensor] = {}

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Keep the weights that the task will be averaged with."""
        if self.start == "previous" or not self.before:
            self.before = copied(model)
        return model

    @torch.no_grad()
    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Average what moves."""
        for name, before in self.before.items():
            after = known_rows(model.get_parameter(name), before)
            after.copy_(before.to(after.device).lerp(after, self.alpha))  # exact at both ends
        if self.start == "previous":
            self.before = {}

    def state_dict(self) -> State:
        """The weights to average with."""
        return {f"before/{name}": value for name, value in self.before.items()}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back."""
        self.before = {key.removeprefix("before/"): value for key, value in state.items()}
        return model
