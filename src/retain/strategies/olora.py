"""O-LoRA: each task learns in a low-rank subspace of its own, orthogonal to those of the tasks before it.

    W_t = W + s sum_{j <= t} B_j A_j                       a new pair a task; the old ones are frozen and added
    penalty(A_t) = strength * sum_{j < t} sum |A_j A_t^T|  over the adapted weights

The rows of A_j span the inputs that task j reads. The penalty's gradient is strength * sum_j sign(A_j A_t^T)^T A_j;
with squares instead of absolute values (`norm="frobenius"`), 2 * strength * sum_j (A_j A_t^T)^T A_j.

Source: Wang et al. 2023, https://arxiv.org/abs/2310.14152, eq. 8; the authors' code has the absolute values, their
paper the squares. Theirs adds the penalty once a micro-batch; here it is once a step.
"""

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from retain.errors import CompatibilityError
from retain.strategies.strategy import State, Strategy, TaskMethod, TaskView

__all__ = ["OLoRA"]


@dataclass
class OLoRA(Strategy):
    """Give every task a pair of factors, and keep its input directions orthogonal to the earlier ones'.

    Args:
        strength: lambda_1, at least 0, of the penalty beside a loss in nats a target; the authors' value is 0.5.
        norm: `l1`, as in the authors' code, or `frobenius` (squared), as in their paper.

    All pairs answer together, so no task has to be named, and what was learned can still be disturbed by later pairs.
    Memory: a pair a task; nothing else is kept.
    """

    name: ClassVar[str] = "olora"
    reference: ClassVar[str] = "https://arxiv.org/abs/2310.14152"
    grows: ClassVar[bool] = True
    remembers: ClassVar[bool] = False

    strength: float = 0.5
    norm: Literal["l1", "frobenius"] = "l1"

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength: expected a number of at least 0, got {self.strength}")
        self.pairs: dict[str, str] = {}  # the pair of each task
        self.learned = False  # were tasks learned before this strategy came?
        self.factors: list[tuple[str, list[str]]] = []  # the name of each trained A, and of the frozen ones beside it

    def supports(self, method: TaskMethod) -> str | None:
        """LoRA, where it may have several pairs."""
        if method.name == "lora" and method.can_extend:
            return f"its subspaces are those of a product: {method.no_products}" if method.no_products else None
        return f"its subspaces are those of LoRA's factors, and method {method.name!r} keeps no pair of them a task"

    def bind(self, method: TaskMethod, *, learned: Sequence[str] = ()) -> None:
        """Know whether the pair that is there has been trained."""
        self.learned = bool(learned)

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """A new pair, of weights that the run's seed and the task's place decide; the old ones are frozen.

        Raises:
            CompatibilityError: if the method is not LoRA, or its pairs are no plain products (DoRA).
        """
        if reason := self.supports(task.method):
            raise CompatibilityError(reason, hint="use `method: lora`")
        present = task.method.modules(model)
        untouched = not self.pairs and not self.learned
        pair = present[0] if untouched else f"pair-{len(present) + 1}"
        if not untouched:
            task.method.activate(model, present)
            with torch.random.fork_rng():
                torch.manual_seed(zlib.crc32(f"{task.seed}/{pair}".encode()))
                model = task.method.extend(model, pair)
        self.pairs[task.name] = pair
        self._find_factors(model, task.method)
        return model

    @torch.no_grad()
    def add_penalty(self, model: nn.Module) -> Tensor | None:
        """Add the penalty's gradient to that of every trained A."""
        if not self.strength:
            return None
        parameters = dict(model.named_parameters())
        values: list[Tensor] = []
        for name, earlier in self.factors:
            moving = parameters[name]  # (rank, in)
            old = torch.cat([parameters[other] for other in earlier])  # (ranks of all, in)
            overlap = old @ moving.T  # (ranks of all, rank)
            if self.norm == "l1":
                values.append(overlap.abs().sum())
                gradient = overlap.sign().T @ old
            else:
                values.append(overlap.square().sum())
                gradient = 2 * overlap.T @ old
            if moving.grad is None:
                moving.grad = torch.zeros_like(moving)
            moving.grad.add_(gradient.to(moving.dtype), alpha=self.strength)
        return self.strength * torch.stack(values).sum() if values else None

    def state_dict(self) -> State:
        """Which pair is whose; the pairs themselves are the method's to save."""
        return {"pairs": dict(self.pairs)}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take it back; the method has loaded the pairs."""
        self.pairs = dict(state["pairs"])
        return model

    def _find_factors(self, model: nn.Module, method: TaskMethod) -> None:
        """See which A moves beside which frozen ones."""
        beside: dict[str, list[str]] = defaultdict(list)
        for change in method.low_rank(model):
            beside[change.weight].append(change.right)
        moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.factors = [
            (name, [other for other in names if other not in moving])
            for names in beside.values()
            for name in names
            if name in moving and any(other not in moving for other in names)
        ]
        if not self.factors and len(method.modules(model)) > 1:
            raise CompatibilityError(
                "the adapter has no pairs of plain factors whose subspaces could be kept apart",
                hint="set `method.use_dora: false`",
            )
