"""Elastic weight consolidation: pull each weight toward its old value, in proportion to its importance.

    penalty(theta) = strength / 2 * sum_k sum_i F_ki / mean(F_k) * (theta_i - anchor_ki)^2

    F_ki = mean over examples of E_y [ (d log p(y | x) / d theta_i)^2 ]        the diagonal of the Fisher information

One k for each old task (`mode="separate"`, Kirkpatrick et al. 2017, eq. 3), or a single one that has the latest weights
as its anchor (`mode="online"`, Schwarz et al. 2018, section 3): F <- decay * F + F_new, and decay * F in the penalty.

Source: https://arxiv.org/abs/1612.00796 and https://arxiv.org/abs/1805.06370.
Differs: F is divided by its mean; see `EWC.strength`.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from retain.kernels.fisher import Kind
from retain.kernels.importance import diagonal_fisher
from retain.kernels.low_rank import LowRank, add_low_rank_penalty, only_moving
from retain.kernels.quadratic import Pull, add_penalty, merged, normalised, placed, step_toward, weights_of
from retain.parameters import trainable
from retain.strategies.strategy import State, Strategy, TaskMethod, TaskView

__all__ = ["EWC"]


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
        update: `gradient` adds the penalty's gradient to the data's before the optimizer's step. Plain gradient descent
            then diverges where learning_rate * strength * F > 2, and Adam divides the pull by the same root of second
            moments as the data's gradient. `proximal` pulls after the step, straight toward the anchor, which is stable
            at any strength: theta <- (theta + s F anchor) / (1 + s F) with s = learning_rate * strength. No moments
            rescale it, so strengths are larger: 1 / learning_rate moves an average weight half of the way in a step.
        space: whose importance is measured where a method trains a low-rank change B A of a frozen weight (LoRA).
            `parameters`: that of A and B, each on its own. `weights`: that of the weight, so that
            sum F (s B A - anchor)^2 is penalised, whatever A and B it is a product of (Zheng et al. 2026,
            https://arxiv.org/abs/2602.17559).

    The Fisher is that of a sequence: the square of the sum over its tokens. It is accumulated in float32 and kept in
    bfloat16; anchors keep the weights' own precision. Memory: 6 bytes a trained float32 weight, for each k. In the
    space of weights: 4 bytes a trained weight and 2 an adapted frozen one, and of these 4 more while F is measured. In
    the space of parameters, of a base model whose B is 0 only B has importance.
    """

    name: ClassVar[str] = "ewc"
    reference: ClassVar[str] = "https://arxiv.org/abs/1612.00796"

    strength: float = 1.0
    fisher: Kind = "sampled"
    num_samples: int = 200
    decay: float = 1.0
    mode: Literal["online", "separate"] = "online"
    update: Literal["gradient", "proximal"] = "gradient"
    space: Literal["parameters", "weights"] = "parameters"

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength: expected a number of at least 0, got {self.strength}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples: expected a whole number above 0, got {self.num_samples}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: expected a number in (0, 1], got {self.decay}")
        if self.mode == "separate" and self.decay != 1:
            raise ValueError('decay: has no effect with mode "separate"; leave it out, or use mode "online"')
        if self.space == "weights" and self.update == "proximal":
            raise ValueError('update: "proximal" has no closed form with space "weights"; use "gradient"')
        self.changes: Sequence[LowRank] = ()  # the low-rank changes, in the space of weights
        self.tasks: list[str] = []
        self.importance: list[dict[str, Tensor]] = []  # F, for each k by name
        self.anchors: list[dict[str, Tensor]] = []  # the weights that F was measured at

    @property
    def moves_weights(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """In the proximal form."""
        return self.update == "proximal"

    def supports(self, method: TaskMethod) -> str | None:
        """All methods; in the space of weights none whose changes are more than products of two factors."""
        if self.space == "weights" and method.no_products:
            return f"with `space: weights` a change must be a product of two factors: {method.no_products}"
        return None

    def add_penalty(self, model: nn.Module) -> Tensor | None:
        """Add strength * F * (theta - anchor) to the gradients; in the proximal form only tell the penalty."""
        if not self.strength:
            return None
        scale = self.strength * self.decay
        value = add_penalty(model, self._pulls(), scale=scale, gradient=self.update == "gradient")
        for importance, anchors in self._pulls() if self.changes else ():
            more = add_low_rank_penalty(model, self.changes, importance, anchors, scale=scale)
            value = more if value is None else value if more is None else value + more
        return value

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Look for the factors that will move."""
        self._find_changes(model, task)
        return model

    def after_step(self, model: nn.Module, learning_rate: float) -> None:
        """Take the proximal step."""
        if self.update == "proximal":
            step_toward(model, self._pulls(), scale=learning_rate * self.strength * self.decay)

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Estimate the Fisher at the weights as they are, and anchor them."""
        self._find_changes(model, task)
        changes = self.changes if self.space == "weights" else ()  # an earlier stage may have had the other space
        factors = {factor for change in changes for factor in (change.left, change.right)}
        with only_moving(model, (trainable(model).keys() - factors) | {change.weight for change in changes}):
            fisher = normalised(diagonal_fisher(model, task, kind=self.fisher, num_samples=self.num_samples))
        named = dict(model.named_parameters())
        anchors = weights_of(model) | {name: named[name].detach().clone() for name in factors}
        if self.mode == "online" and self.importance:
            anchors = self.anchors[0] | anchors
            fisher = merged(fisher, self.importance[0], decay=self.decay)
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
        state["changes"] = [list(astuple(change)) for change in self.changes]
        for k, (fishers, anchors) in enumerate(zip(self.importance, self.anchors, strict=True)):
            state |= {f"fisher/{k}/{name}": value for name, value in fishers.items()}
            state |= {f"anchor/{k}/{name}": value for name, value in anchors.items()}
        return state

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back, each to its parameter's device."""
        self.tasks = list(state["tasks"])
        self.changes = [LowRank(*change) for change in state["changes"]]
        self.importance = [placed(model, state, f"fisher/{k}/") for k in range(state["num"])]
        self.anchors = [placed(model, state, f"anchor/{k}/") for k in range(state["num"])]
        return model

    def _find_changes(self, model: nn.Module, task: TaskView) -> None:
        if self.space == "weights":
            self.changes = task.method.low_rank(model)

    def _pulls(self) -> list[Pull]:
        return list(zip(self.importance, self.anchors, strict=True))
