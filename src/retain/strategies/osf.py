"""Orthogonal subspace fine-tuning: train only where a weight's large singular values do not reach.

    W_0 = U_h S_h V_h^T + U_l S_l V_l^T                  at the start of a task; h: the largest singular values
    P(X) = (I - U_h U_h^T) X (I - V_h V_h^T)
    gradient <- P(gradient);   after each step  W <- W_0 + P(W - W_0)

So U_h^T W = U_h^T W_0 and W V_h = W_0 V_h: what the weight does along its main directions stays as it is. Adam divides
each entry by its own scale and weight decay shrinks all of them, so a projected gradient alone leaks into those
directions; therefore the step is projected, too.

Source: Nayak et al. 2025, https://arxiv.org/abs/2504.07097, section 3.
Differs: one share of protected directions for all matrices, not one that grows with a layer's importance; the weight is
trained as it is, not by its factors, so that a task starts from exactly what the one before it ended with.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from retain.errors import CompatibilityError
from retain.parameters import local, trainable
from retain.strategies.strategy import State, Strategy, TaskMethod, TaskView

__all__ = ["OSF", "Protected", "matrices"]


@dataclass(frozen=True)
class Protected:
    """What of a weight is kept.

    Args:
        start: W_0, (m, n).
        left: U_h, (m, k).
        right: V_h, (n, k).
    """

    start: Tensor
    left: Tensor
    right: Tensor

    def project(self, change: Tensor) -> Tensor:
        """P(change), (m, n)."""
        change = change - self.left @ (self.left.T @ change)
        return change - (change @ self.right) @ self.right.T


@dataclass
class OSF(Strategy):
    """Keep the main directions of every weight matrix as the tasks so far (and the base model) left them.

    Args:
        rank_ratio: the share of a matrix's singular directions that is kept, in [0, 1).
        embeddings: treat the embeddings and the output head alike; else they are trained freely, as are vectors.

    Memory while a task is trained: W_0 once more, and k (m + n) numbers a matrix, in float32. On disk nothing but a
    list: the directions are those of the weights that a task starts from.
    """

    name: ClassVar[str] = "osf"
    reference: ClassVar[str] = "https://arxiv.org/abs/2504.07097"
    moves_weights: ClassVar[bool] = True

    rank_ratio: float = 0.5
    embeddings: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank_ratio < 1:
            raise ValueError(f"rank_ratio: expected a share in [0, 1), got {self.rank_ratio}")
        self.tasks: list[str] = []  # what is protected
        self.protected: dict[str, Protected] = {}

    def supports(self, method: TaskMethod) -> str | None:
        """Methods that train the model's own matrices."""
        if method.can_detach:
            return f"method {method.name!r} trains new weights, which have no old directions to protect"
        return None

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Find the main directions of the weights as they are.

        Raises:
            CompatibilityError: if the method trains new weights, or the model is sharded.
        """
        if reason := self.supports(task.method):
            raise CompatibilityError(reason, hint="use `method: full`")
        self.protected = {}
        if self.tasks and self.rank_ratio:
            for name, parameter in matrices(model, embeddings=self.embeddings).items():
                if local(parameter) is not parameter:
                    raise CompatibilityError(
                        "a sharded matrix cannot be decomposed", hint="train on one device, or without sharding"
                    )
                if rank := round(self.rank_ratio * min(parameter.shape)):
                    self.protected[name] = decompose(parameter, rank)
        return model

    @torch.no_grad()
    def edit_gradients(self, model: nn.Module) -> None:
        """Take what lies in the kept directions out of the gradients."""
        parameters = trainable(model)
        for name, kept in self.protected.items():
            if name in parameters and (gradient := parameters[name].grad) is not None:
                gradient.copy_(kept.project(gradient.to(kept.start.dtype)))

    @torch.no_grad()
    def after_step(self, model: nn.Module, learning_rate: float) -> None:
        """Take it out of the step, too: of all that the task has changed so far, so that nothing adds up."""
        parameters = trainable(model)
        for name, kept in self.protected.items():
            if name in parameters:
                change = parameters[name].to(kept.start.dtype) - kept.start
                parameters[name].copy_(kept.start + kept.project(change))

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """From now on there is something to keep."""
        self.tasks.append(task.name)
        self.protected = {}

    def state_dict(self) -> State:
        """The names of what is protected; the directions come back from the weights in `before_task`."""
        return {"tasks": list(self.tasks)}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back."""
        self.tasks = list(state["tasks"])
        return model


@torch.no_grad()
def decompose(weight: Tensor, rank: int) -> Protected:
    """The directions of a matrix's largest singular values, of a copy in float32 at least."""
    start = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    left, _, right = torch.linalg.svd(start, full_matrices=False)
    return Protected(start, left[:, :rank].contiguous(), right[:rank].T.contiguous())


def matrices(model: nn.Module, *, embeddings: bool = False) -> dict[str, nn.Parameter]:
    """The trained matrices by name, also such as are stored transposed (GPT-2).

    Args:
        embeddings: those of `nn.Embedding`, and heads with as many outputs as one has entries, are among them.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    skipped = {table.weight for table in tables}
    sizes = {table.num_embeddings for table in tables}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features in sizes:
            skipped.add(module.weight)
    return {
        name: parameter
        for name, parameter in trainable(model).items()
        if parameter.dim() == 2 and (embeddings or parameter not in skipped)
    }
