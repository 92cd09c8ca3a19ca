"""The diagonal of the Fisher information of a batch, from the squares of single examples' gradients.

    F_i = sum over examples of E_y [ (d log p(y | x) / d theta_i)^2 ]

The expectation over a sequence's targets y, each given the true text before it, is taken in one of three ways (van de
Ven 2025, https://arxiv.org/abs/2502.11756): `exact` over every label, `sampled` by one draw from the model's own
distribution, or `empirical`, at the true targets, which is another quantity wherever the model is wrong.
"""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain.errors import CompatibilityError
from retain.kernels.per_example import Sums, squared_gradients
from retain.types import Batch

__all__ = ["Kind", "add_fisher", "at_least_float"]

Kind = Literal["sampled", "exact", "empirical"]

MAX_EXACT_PASSES = 4096
"""Passes that `exact` may take for a batch: the vocabulary times the most targets of an example."""


def add_fisher(
    model: nn.Module,
    batch: Batch,
    logits_of: Callable[[Batch], Tensor],
    *,
    kind: Kind,
    seed: int,
    into: dict[str, Tensor],
) -> Sums | None:
    """Add the Fisher of a batch, summed over its examples.

    The square is of the sum over an example's tokens: the Fisher of a sequence. A target of weight w counts w times, as
    in the loss.

    Args:
        model: in evaluation mode.
        batch: padded or packed.
        logits_of: from a batch to (num_targets, vocabulary), by one forward pass of `model`.
        kind: how the expectation over targets is taken.
        seed: of the sampled targets. An example's draws depend on it and on the example's id alone.
        into: by parameter name, as `per_example.zero_sums` makes them.

    Returns:
        the sums, and which engine gave the gradients; None where the batch has no target.

    Raises:
        CompatibilityError: if `exact` would take more passes than is sensible, or if the model is sharded.
    """
    sums: Sums | None = None
    for nll in scores(batch, logits_of, kind, seed):
        sums = squared_gradients(model, batch, nll, into=into)
    return sums


def scores(
    batch: Batch, logits_of: Callable[[Batch], Tensor], kind: Kind, seed: int
) -> Iterator[Callable[[Batch], Tensor]]:
    """Functions from the batch, or one example of it, to nats: the squares of their gradients add up to the Fisher."""

    def nats(logits: Tensor, labels: Tensor, part: Batch) -> Tensor:
        # The square root, because the square of the gradient is to have the weight.
        return part.weights.to(logits.dtype).sqrt() * F.cross_entropy(logits, labels, reduction="none")

    def empirical(part: Batch) -> Tensor:
        return nats(at_least_float(logits_of(part)), part.targets[part.counted], part)

    def sampled(part: Batch) -> Tensor:
        logits = at_least_float(logits_of(part))
        return nats(logits, draw(logits.detach(), part, seed), part)

    def exact(part: Batch, turn: int, label: int) -> Tensor:
        logits = at_least_float(logits_of(part))
        share = logits.detach().softmax(-1)[:, label].sqrt() * (turns(part) == turn)
        return share * nats(logits, torch.full_like(part.target_documents, label), part)

    if kind == "empirical":
        yield empirical
    elif kind == "sampled":
        yield sampled
    elif len(batch.weights):
        with torch.no_grad():
            vocabulary = logits_of(batch).shape[-1]
        num_turns = int(turns(batch).max()) + 1
        if vocabulary * num_turns > MAX_EXACT_PASSES:
            raise CompatibilityError(
                f"the exact Fisher would take {vocabulary * num_turns} passes for a batch",
                problems=[f"{num_turns} targets of {vocabulary} labels each; at most {MAX_EXACT_PASSES} passes"],
                hint="use `fisher: sampled`, which has the same mean",
            )
        # Scores of different targets are independent draws of mean 0, so their squares add up without cross terms.
        for turn in range(num_turns):
            for label in range(vocabulary):
                yield lambda part, turn=turn, label=label: exact(part, turn, label)


def at_least_float(logits: Tensor) -> Tensor:
    """In float32 or float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def turns(batch: Batch) -> Tensor:
    """(num_targets,), the place of each target among those of its example, from 0."""
    owners = batch.target_documents
    result = torch.zeros_like(owners)
    for owner in owners.unique():
        mine = owners == owner
        result[mine] = torch.arange(int(mine.sum()), device=owners.device)
    return result


def draw(logits: Tensor, batch: Batch, seed: int) -> Tensor:
    """(num_targets,), a label from each target's distribution, where its cumulative passes a uniform number."""
    cumulative = logits.softmax(-1).cumsum(-1)  # (num_targets, vocabulary)
    uniform = cumulative.new_zeros(len(cumulative), 1)
    for index, example in enumerate(batch.examples):
        mine = batch.target_documents == index
        digest = blake2b(f"{seed}/{example.id}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        uniform[mine] = torch.rand(int(mine.sum()), 1, generator=generator, dtype=torch.float64).to(uniform)
    labels = torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).flatten()
    return labels.clamp_max(logits.shape[-1] - 1)
