"""A quadratic pull of frozen weights' low-rank changes toward earlier changes, in the space of the change (LoRA).

    D = s (B A - B0 A0)                                        the change of the weight since the anchor, (out, in)
    penalty(A, B) = scale / 2 * sum F * D^2
    gradient of B: scale * s * (F * D) A^T          of A: scale * s * B^T (F * D)

The pull does not change under (A, B) -> (c A, B / c), which is the same model, and a weight is important wherever it
would change the loss, also where B is still 0. No D exists whole, and no autograd graph.

Source: Zheng et al. 2026 (EWC-LoRA), https://arxiv.org/abs/2602.17559.
Differs: F is of single examples' gradients, and the gradient is written out.
"""

from collections import defaultdict
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["LowRank", "add_low_rank_penalty", "only_moving"]

ELEMENTS_AT_ONCE = 2**18
"""Entries of a change that exist at once: few enough to stay in the cache."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """A trained change of a frozen weight: scale * left @ right.

    Args:
        weight: the name of the frozen weight, (out, in).
        left: the name of the parameter B, (out, rank).
        right: the name of the parameter A, (rank, in).
        scale: s.
        transposed: the weight, and so its importance, is stored as (in, out).
    """

    weight: str
    left: str
    right: str
    scale: float
    transposed: bool = False


@contextmanager
def only_moving(model: nn.Module, names: Collection[str]) -> Generator[nn.Module]:
    """The model with `requires_grad` of exactly these parameters while inside."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        yield model
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@torch.no_grad()
def add_low_rank_penalty(
    model: nn.Module,
    changes: Sequence[LowRank],
    importance: Mapping[str, Tensor],
    anchors: Mapping[str, Tensor],
    *,
    scale: float,
) -> Tensor | None:
    """Add the penalty's gradient to `.grad` of the factors; return the penalty's value.

    Args:
        model: weights of which no factor moves are left out.
        changes: several of one weight add up, those that have stopped moving, too.
        importance: F of each weight, by the frozen weight's name.
        anchors: earlier values of all factors, by their names; a change that has none was made since, from 0.
        scale: above 0.

    Returns:
        a scalar without graph; None where nothing that moves has an importance.
    """
    named = dict(model.named_parameters())
    by_weight: dict[str, list[LowRank]] = defaultdict(list)
    for change in changes:
        by_weight[change.weight].append(change)
    values = [
        _add(named, parts, importance[weight], anchors, scale)
        for weight, parts in by_weight.items()
        if weight in importance and any(named[n].requires_grad for part in parts for n in (part.left, part.right))
    ]
    return torch.stack(values).sum() * (scale / 2) if values else None


def _add(
    named: Mapping[str, nn.Parameter],
    parts: Sequence[LowRank],
    importance: Tensor,
    anchors: Mapping[str, Tensor],
    scale: float,
) -> Tensor:
    """Of one weight: add the gradients, and return the sum of F * D^2."""
    if parts[0].transposed:
        importance = importance.T
    lefts = [named[part.left] for part in parts]
    rights = [named[part.right] for part in parts]
    left = torch.cat([part.scale * B for part, B in zip(parts, lefts, strict=True)], dim=1)  # (out, ranks)
    right = torch.cat([*rights])  # (ranks, in)
    old_left = torch.cat(
        [part.scale * anchors.get(part.left, torch.zeros_like(B)) for part, B in zip(parts, lefts, strict=True)], dim=1
    )
    old_right = torch.cat([anchors.get(part.right, A) for part, A in zip(parts, rights, strict=True)])
    # D = (left - old_left) right + old_left (right - old_right): exactly 0 at the anchor.
    tall, wide = torch.cat([left - old_left, old_left], dim=1), torch.cat([right, right - old_right])
    right_gradient = torch.zeros_like(right)
    left_gradients: list[Tensor] = []
    values: list[Tensor] = []
    rows = max(1, ELEMENTS_AT_ONCE // right.shape[1])
    blocks = zip(tall.split(rows), left.split(rows), importance.split(rows), strict=True)
    for tall_rows, left_rows, fisher in blocks:
        difference = tall_rows @ wide  # (rows, in)
        pull = difference * fisher
        values.append(torch.dot(pull.flatten(), difference.flatten()))
        left_gradients.append(pull @ right.T)
        right_gradient.addmm_(left_rows.T, pull)
    ranks = [B.shape[1] for B in lefts]
    left_gradient = torch.cat(left_gradients)  # (out, ranks)
    for part, B, gradient in zip(parts, lefts, left_gradient.split(ranks, dim=1), strict=True):
        _add_gradient(B, gradient, scale * part.scale)
    for A, gradient in zip(rights, right_gradient.split(ranks), strict=True):
        _add_gradient(A, gradient, scale)
    return torch.stack(values).sum()


def _add_gradient(parameter: nn.Parameter, gradient: Tensor, scale: float) -> None:
    """Add to its `.grad`, if it moves."""
    if parameter.requires_grad:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(gradient, alpha=scale)
