"""L2 to the start: pull every weight toward its value before the task, all of them alike.

    penalty(theta) = strength / 2 * sum_i (theta_i - anchor_i)^2

Source: Li et al. 2018, *Explicit inductive bias for transfer learning with convolutional networks*, the L2-SP penalty
of section 3, https://arxiv.org/abs/1802.01483.
Differs: the paper decays a new head's weights toward zero; here rows that the model has grown since are left to
`train.weight_decay`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from retain.kernels.quadratic import add_penalty, placed, weights_of
from retain.parameters import local
from retain.strategies.strategy import State, Strategy, TaskView

__all__ = ["L2"]


@dataclass
class L2(Strategy):
    """Keep every weight near an earlier value, whatever it is used for.

    Args:
        strength: the curvature that every weight gets, in nats a target, at least 0. The unit is that of
            `EWC.strength`, where a weight of average importance gets it.
        anchor: `previous`, the weights after the latest task; `base`, those that a weight had when it was first seen,
            which are the base model's where `protect_base` is on.

    Memory: 4 bytes a trained float32 weight. Under LoRA the weights are A and B.
    """

    name: ClassVar[str] = "l2"
    reference: ClassVar[str] = "https://arxiv.org/abs/1802.01483"

    strength: float = 0.1
    anchor: Literal["previous", "base"] = "previous"

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength: expected a number of at least 0, got {self.strength}")
        self.anchors: dict[str, Tensor] = {}

    def add_penalty(self, model: nn.Module) -> Tensor | None:
        """Add strength * (theta - anchor) to the gradients."""
        if not self.strength:
            return None
        alike = {name: local(anchor).new_ones(()).expand_as(local(anchor)) for name, anchor in self.anchors.items()}
        return add_penalty(model, [(alike, self.anchors)], scale=self.strength)

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Anchor the weights as they are."""
        latest = weights_of(model)
        self.anchors = self.anchors | latest if self.anchor == "previous" else latest | self.anchors

    def state_dict(self) -> State:
        """The anchors."""
        return {f"anchor/{name}": value for name, value in self.anchors.items()}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back."""
        self.anchors = placed(model, state, "anchor/")
        return model
