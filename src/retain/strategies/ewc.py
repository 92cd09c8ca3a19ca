"""Elastic weight consolidation: pull each weight toward its old value, in proportion to its importance.

    penalty(theta) = strength / 2 * sum_k sum_i F_ki / mean(F_k) * (theta_i - anchor_ki)^2

    F_ki = mean over examples of E_y [ (d log p(y | x) / d theta_i)^2 ]        the diagonal of the Fisher information

One k for each old task (`mode="separate"`, Kirkpatrick et al. 2017, eq. 3), or a single one that has the latest weights
as its anchor (`mode="online"`, Schwarz et al. 2018, section 3): F <- decay * F + F_new, and decay * F in the penalty.

Source: https://arxiv.org/abs/1612.00796 and https://arxiv.org/abs/1805.06370.
Differs: F is divided by its mean; see `EWC.strength`.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from retain import distributed
from retain.kernels.fisher import Kind, add_fisher
from retain.kernels.per_example import zero_sums
from retain.parameters import evaluating, local, trainable
from retain.strategies.strategy import State, Strategy, TaskView

__all__ = ["EWC", "diagonal_fisher"]

TOKENS_PER_PASS = 1024
"""Tokens of a Fisher pass: its logits exist whole, so it must be smaller than a training pass."""

ELEMENTS_AT_ONCE = 2**18
"""Weights that the penalty works on at once: few enough for their differences to stay in the cache."""


@dataclass
class EWC(Strategy):
    """Protect the weights that old tasks (and the base model) depend on.

    Args:
        strength: lambda, at least 0: the curvature that a weight of average importance gets, in nats a target. The mean
            is over the weights that have any importance, for each old task. So a value does not depend on how the loss
            is scaled, how long or how certain the old task's rows are, or on rows of an embedding that no text uses.
        fisher: `sampled` draws the targets from the model's own distribution; `exact` takes all of them (small heads
            only); `empirical` takes the true ones.
        num_samples: examples of a task that F is estimated from, above 0.
        decay: gamma of online EWC, in (0, 1]: what an older task's importance is multiplied by at each new one.
        mode: `online` keeps one F and one anchor however many tasks come; `separate` keeps both for each.

    The Fisher is that of a sequence: the square of the sum over its tokens. It is accumulated in float32 and kept in
    bfloat16; anchors keep the weights' own precision. Memory: 6 bytes a trained float32 weight, for each k. Under LoRA
    the weights are A and B, not their product: of the base model, where B is 0, only B has importance.
    """

    name: ClassVar[str] = "ewc"
    reference: ClassVar[str] = "https://arxiv.org/abs/1612.00796"

    strength: float = 1.0
    fisher: Kind = "sampled"
    num_samples: int = 200
    decay: float = 1.0
    mode: Literal["online", "separate"] = "online"

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength: expected a number of at least 0, got {self.strength}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples: expected a whole number above 0, got {self.num_samples}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: expected a number in (0, 1], got {self.decay}")
        if self.mode == "separate" and self.decay != 1:
            raise ValueError('decay: has no effect with mode "separate"; leave it out, or use mode "online"')
        self.tasks: list[str] = []
        self.importance: list[dict[str, Tensor]] = []  # F, for each k by name
        self.anchors: list[dict[str, Tensor]] = []  # the weights that F was measured at

    @torch.no_grad()
    def add_penalty(self, model: nn.Module) -> Tensor | None:
        """Add strength * F * (theta - anchor) to the gradients; elementwise, so each process does its own shard."""
        if not self.strength or not self.importance:
            return None
        parameters = trainable(model)
        pieces: list[tuple[Tensor, ...]] = []
        for fishers, anchors in zip(self.importance, self.anchors, strict=True):
            for name, fisher in fishers.items():
                if name in parameters:
                    parameter = parameters[name]
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    pieces.append(tuple(local(t) for t in (parameter, parameter.grad, fisher, anchors[name])))
        if not pieces:
            return None
        value = add_quadratic(pieces, scale=self.strength * self.decay)
        if any(local(parameter) is not parameter for parameter in parameters.values()):
            distributed.sum_tensors([value])
        return value

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Estimate the Fisher at the weights as they are, and anchor them."""
        fisher = normalised(diagonal_fisher(model, task, kind=self.fisher, num_samples=self.num_samples))
        anchors = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
        if self.mode == "online" and self.importance:
            anchors = self.anchors[0] | anchors
            for name, old in self.importance[0].items():
                if name in fisher:  # it may have more rows by now
                    (fisher[name][: len(old)] if old.dim() else fisher[name]).add_(old, alpha=self.decay)
                else:  # it no longer moves
                    fisher[name] = old
        kept = {name: value.to(torch.bfloat16) for name, value in fisher.items()}
        self.tasks.append(task.name)
        if self.mode == "online":
            self.importance, self.anchors = [kept], [anchors]
        else:
            self.importance.append(kept)
            self.anchors.append(anchors)

    def state_dict(self) -> State:
        """Fisher and anchors."""
        state: State = {"tasks": list(self.tasks), "num": len(self.importance)}
        for k, (fishers, anchors) in enumerate(zip(self.importance, self.anchors, strict=True)):
            state |= {f"fisher/{k}/{name}": value for name, value in fishers.items()}
            state |= {f"anchor/{k}/{name}": value for name, value in anchors.items()}
        return state

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back, each to its parameter's device."""
        devices = {name: parameter.device for name, parameter in model.named_parameters()}

        def taken(prefix: str) -> dict[str, Tensor]:
            found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            return {name: value.to(devices.get(name, value.device)) for name, value in found.items()}

        self.tasks = list(state["tasks"])
        self.importance = [taken(f"fisher/{k}/") for k in range(state["num"])]
        self.anchors = [taken(f"anchor/{k}/") for k in range(state["num"])]
        return model


def add_quadratic(pieces: Iterable[tuple[Tensor, ...]], *, scale: float) -> Tensor:
    """Add scale * F * (theta - anchor) to gradients, in place; return the sum of scale / 2 * F * (theta - anchor)^2.

    Args:
        pieces: (theta, gradient, F, anchor) of each parameter. Rows that theta has more than the anchor, because the
            parameter has grown since, have no importance.
        scale: above 0.
    """
    values: list[Tensor] = []
    for weights, gradients, fishers, anchors in blocks(pieces):
        differences = weights - anchors
        pulls = differences * fishers
        gradients.add_(pulls, alpha=scale)
        values.append(torch.dot(pulls.flatten(), differences.flatten()))
    return torch.stack(values).sum() * (scale / 2)


def blocks(pieces: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The pieces, their rows cut to those of the anchor, and cut by rows into blocks of about `ELEMENTS_AT_ONCE`."""
    for piece in pieces:
        last = piece[-1]
        if last.dim() and len(piece[0]) > len(last):
            piece = tuple(tensor[: len(last)] for tensor in piece)
        if last.numel() <= ELEMENTS_AT_ONCE:
            yield piece
        else:
            rows = max(1, ELEMENTS_AT_ONCE * len(last) // last.numel())
            yield from zip(*(tensor.split(rows) for tensor in piece), strict=True)


def normalised(fisher: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each entry divided by the mean of all that are above zero, in place."""
    total = sum(float(value.sum(dtype=torch.float64)) for value in fisher.values())
    count = sum(int((value > 0).sum()) for value in fisher.values())
    for value in fisher.values():
        value.mul_(count / total if count else 1.0)
    return fisher


def diagonal_fisher(
    model: nn.Module, task: TaskView, *, kind: Kind = "sampled", num_samples: int = 200
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of a task, a mean over its examples, in evaluation mode.

    Args:
        model: at the weights that the task ended with.
        task: gives rows, passes and the seed; every process takes its share of the rows.
        kind: how the expectation over targets is taken; see `kernels.fisher`.
        num_samples: rows, drawn without replacement from the seed; all of them if there are fewer.

    Returns:
        by parameter name, in float32 at least.
    """
    generator = random.Random(f"{task.seed}/{task.name}")
    examples = generator.sample(task.examples, min(num_samples, len(task.examples)))
    sums = zero_sums(model)
    num = 0
    with evaluating(model):
        for batch in task.batches(examples, max_tokens=TOKENS_PER_PASS):
            add_fisher(
                model, batch, lambda part: task.forward(model, part).logits(), kind=kind, seed=task.seed, into=sums
            )
            num += len(batch.examples)
    distributed.sum_tensors(list(sums.values()))
    count = max(distributed.sum_number(num), 1.0)
    return {name: value.div_(count) for name, value in sums.items()}
