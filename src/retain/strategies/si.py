"""Synaptic intelligence: pull each weight toward its old value, in proportion to how much its path lowered the loss.

    every step    omega_i += -g_i * (theta_i after - theta_i before)       g: the gradient of the data loss alone
    task's end    Omega_i += max(0, omega_i) / ((theta_i - start_i)^2 + xi);   omega <- 0;   anchor <- theta
    penalty(theta) = strength / 2 * sum_i Omega_i * (theta_i - anchor_i)^2

The sum of omega over all weights is how far the loss fell, where the gradient is that of all rows and steps are small.

Source: Zenke et al. 2017, https://arxiv.org/abs/1703.04200, eq. 3 to 5. Of stage 0 there is no path; there Omega is the
root of the Fisher's diagonal, which SI's importance is proportional to: Benzing 2022,
https://arxiv.org/abs/2006.06357.
Differs: each task's Omega is divided by its mean, and xi is relative; with `normalise=False` both are as in the paper,
and the penalty has no 1/2. The authors' code lets a negative omega lower what earlier tasks gave; here it counts as 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from retain.kernels.importance import diagonal_fisher
from retain.kernels.quadratic import add_displacements, add_penalty, copy_all, merged, normalised, placed, weights_of
from retain.parameters import local, trainable
from retain.strategies.strategy import State, Strategy, TaskView

__all__ = ["SI"]


@dataclass
class SI(Strategy):
    """Protect the weights whose changes lowered the losses of old tasks.

    Args:
        strength: c, at least 0. Normalised, it is the curvature that a weight of average importance gets, in nats a
            target, as in `EWC.strength`, so that a value carries from one model to another.
        damping: xi, above 0. Normalised, it is a multiple of the mean squared change of the weights that changed.
        normalise: False for the authors' own units (their MNIST settings: strength 0.1 with damping 0.1, or 1 with
            1e-3). The base model then has an anchor, but no importance: it has no path.
        num_samples: rows of the base model's text that stands in for its path, above 0.

    Under LoRA the weights are A and B. Memory of a trained float32 weight: 6 bytes (Omega in bfloat16, and the anchor),
    and 12 more while a task is learned: omega, and a copy of the weight and of its gradient during a step.
    """

    name: ClassVar[str] = "si"
    reference: ClassVar[str] = "https://arxiv.org/abs/1703.04200"
    watches_gradients: ClassVar[bool] = True

    strength: float = 0.1
    damping: float = 0.1
    normalise: bool = True
    num_samples: int = 200

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength: expected a number of at least 0, got {self.strength}")
        if not self.damping > 0:
            raise ValueError(f"damping: expected a number above 0, got {self.damping}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples: expected a whole number above 0, got {self.num_samples}")
        self.importance: dict[str, Tensor] = {}  # Omega
        self.anchors: dict[str, Tensor] = {}
        self.path: dict[str, Tensor] = {}  # omega of the task that is being learned
        self.start: dict[str, Tensor] = {}  # where it began, for weights that have no anchor yet
        self.before: dict[str, Tensor] = {}  # the weights and gradients of the step that is being taken
        self.gradients: dict[str, Tensor] = {}
        self.watched: dict[str, nn.Parameter] = {}  # what has a gradient in it

    @torch.no_grad()
    def edit_gradients(self, model: nn.Module) -> None:
        """Note the weights and the data loss's gradients: unclipped, and without the penalty's."""
        self.watched = {name: value for name, value in trainable(model).items() if value.grad is not None}
        for name, parameter in self.watched.items():
            if name not in self.path:
                anchor = self.anchors.get(name)
                if anchor is None or anchor.shape != parameter.shape:
                    self.start[name] = parameter.detach().clone()
                kind = torch.promote_types(parameter.dtype, torch.float32)
                self.path[name] = torch.zeros_like(parameter, dtype=kind)
            if name not in self.before:
                self.before[name] = torch.empty_like(parameter)
                self.gradients[name] = torch.empty_like(parameter)
        copy_all([self.before[name] for name in self.watched], list(self.watched.values()))
        gradients = [parameter.grad for parameter in self.watched.values() if parameter.grad is not None]
        copy_all([self.gradients[name] for name in self.watched], gradients)

    @torch.no_grad()
    def after_step(self, model: nn.Module, learning_rate: float) -> None:
        """Add -g * displacement to the path: what the optimizer did, whatever it is."""
        add_displacements(
            tuple(local(t) for t in (self.path[name], self.gradients[name], self.before[name], parameter))
            for name, parameter in self.watched.items()
        )
        self.watched = {}

    def add_penalty(self, model: nn.Module) -> Tensor | None:
        """Add strength * Omega * (theta - anchor) to the gradients; twice that in the authors' units."""
        if not self.strength:
            return None
        scale = self.strength if self.normalise else 2 * self.strength
        return add_penalty(model, [(self.importance, self.anchors)], scale=scale)

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Turn the path into importance, and anchor the weights; without a path, take the Fisher's word."""
        if self.path:
            new = self._from_path(model)
        elif self.normalise:
            fisher = diagonal_fisher(model, task, num_samples=self.num_samples)
            new = {name: value.sqrt_() for name, value in fisher.items()}
        else:
            new = {}
        if self.normalise:
            new = normalised(new)
        self.importance = {n: value.to(torch.bfloat16) for n, value in merged(new, self.importance).items()}
        self.anchors = self.anchors | weights_of(model)
        self._forget_task()

    @torch.no_grad()
    def _from_path(self, model: nn.Module) -> dict[str, Tensor]:
        """max(0, omega) / (change^2 + xi)."""
        parameters = {name: value for name, value in trainable(model).items() if name in self.path}
        squares = {
            name: (parameter - (self.start if name in self.start else self.anchors)[name]).square_()
            for name, parameter in parameters.items()
        }
        damping = self.damping
        if self.normalise:
            moved = sum(int(value.count_nonzero()) for value in squares.values())
            total = sum(float(value.sum(dtype=torch.float64)) for value in squares.values())
            damping = damping * total / moved if moved else 1.0
        return {name: self.path[name].clamp(min=0).div_(squares[name].add_(damping)) for name in parameters}

    def _forget_task(self) -> None:
        self.path, self.start, self.before, self.gradients, self.watched = {}, {}, {}, {}, {}

    def state_dict(self) -> State:
        """Importance and anchors, and of a task that is being learned its path so far."""
        parts = {"importance": self.importance, "anchor": self.anchors, "path": self.path, "start": self.start}
        return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back."""
        self._forget_task()
        self.importance, self.anchors = placed(model, state, "importance/"), placed(model, state, "anchor/")
        self.start = placed(model, state, "start/")
        self.path = {name: value.clone() for name, value in placed(model, state, "path/").items()}  # it will change
        return model
