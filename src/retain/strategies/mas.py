"""Memory aware synapses: pull each weight toward its old value, in proportion to how much it changes the outputs.

    Omega_i = mean over examples of | d |f(x)|^2 / d theta_i |        f(x): the logits at the targets
    penalty(theta) = strength / 2 * sum_i Omega_i / mean(Omega) * (theta_i - anchor_i)^2

No label is read: any text that the model should go on treating alike will do. Omegas of old tasks add up; the anchor is
the latest weights.

Source: Aljundi et al. 2018, https://arxiv.org/abs/1711.09601, eq. 2, 4 and 5.
Differs: each task's Omega is divided by its mean, and the penalty has a 1/2, so that a strength means the same as in
EWC. The gradients' absolute values are of single examples; much code takes them of a batch's mean.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from retain.kernels.importance import output_sensitivity
from retain.kernels.quadratic import add_penalty, merged, normalised, placed, weights_of
from retain.strategies.strategy import State, Strategy, TaskView

__all__ = ["MAS"]


@dataclass
class MAS(Strategy):
    """Protect the weights that what the model says of old rows depends on.

    Args:
        strength: lambda, at least 0: the curvature that a weight of average importance gets, in nats a target, as in
            `EWC.strength`, so that a value carries from one model to another.
        num_samples: examples of a task that Omega is estimated from, above 0.

    Omega is accumulated in float32 and kept in bfloat16. Memory: 6 bytes a trained float32 weight, however many tasks
    come. Under LoRA the weights are A and B.
    """

    name: ClassVar[str] = "mas"
    reference: ClassVar[str] = "https://arxiv.org/abs/1711.09601"

    strength: float = 0.1
    num_samples: int = 200

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength: expected a number of at least 0, got {self.strength}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples: expected a whole number above 0, got {self.num_samples}")
        self.importance: dict[str, Tensor] = {}
        self.anchors: dict[str, Tensor] = {}

    def add_penalty(self, model: nn.Module) -> Tensor | None:
        """Add strength * Omega * (theta - anchor) to the gradients."""
        if not self.strength:
            return None
        return add_penalty(model, [(self.importance, self.anchors)], scale=self.strength)

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Measure what the outputs depend on, and anchor the weights as they are."""
        new = normalised(output_sensitivity(model, task, num_samples=self.num_samples))
        self.importance = {n: value.to(torch.bfloat16) for n, value in merged(new, self.importance).items()}
        self.anchors = self.anchors | weights_of(model)

    def state_dict(self) -> State:
        """Importance and anchors."""
        parts = {"importance": self.importance, "anchor": self.anchors}
        return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back."""
        self.importance, self.anchors = placed(model, state, "importance/"), placed(model, state, "anchor/")
        return model
