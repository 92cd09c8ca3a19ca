"""A quadratic pull of every weight toward an earlier value, in proportion to its importance: EWC, SI, MAS, L2-SP.

    penalty(theta) = scale / 2 * sum_k sum_i importance_ki * (theta_i - anchor_ki)^2

Elementwise, so that each process does its own shard of a sharded model, and in blocks that stay in the cache.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from retain import distributed
from retain.parameters import local, trainable

__all__ = [
    "Pull",
    "add_displacements",
    "add_penalty",
    "add_quadratic",
    "blocks",
    "copy_all",
    "merged",
    "normalised",
    "placed",
    "step_toward",
    "weights_of",
]

ELEMENTS_AT_ONCE = 2**18
"""Weights that are worked on at once: few enough for their differences to stay in the cache."""

Pull = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Importances and anchors by parameter name. Rows that a parameter has more than its anchor have no importance."""


@torch.no_grad()
def add_penalty(model: nn.Module, pulls: Iterable[Pull], *, scale: float, gradient: bool = True) -> Tensor | None:
    """Add the penalty's gradient, scale * importance * (theta - anchor), to `.grad`; return the penalty's value.

    Args:
        model: only what moves of it is pulled.
        pulls: one for each k.
        scale: above 0.
        gradient: False to leave the gradients alone: the weights are moved by `step_toward`.

    Returns:
        a scalar without graph; None where nothing that moves has an anchor.
    """
    parameters = trainable(model)
    pieces: list[tuple[Tensor, ...]] = []
    for importances, anchors in pulls:
        for name, importance in importances.items():
            if name in parameters:
                parameter = parameters[name]
                if parameter.grad is None and gradient:
                    parameter.grad = torch.zeros_like(parameter)
                total = parameter.grad if gradient and parameter.grad is not None else parameter
                pieces.append(tuple(local(t) for t in (parameter, total, importance, anchors[name])))
    if not pieces:
        return None
    value = add_quadratic(pieces, scale=scale, gradient=gradient)
    if any(local(parameter) is not parameter for parameter in parameters.values()):
        distributed.sum_tensors([value])
    return value


def add_quadratic(pieces: Iterable[tuple[Tensor, ...]], *, scale: float, gradient: bool = True) -> Tensor:
    """Add scale * F * (theta - anchor) to gradients, in place; return the sum of scale / 2 * F * (theta - anchor)^2.

    Args:
        pieces: (theta, gradient, F, anchor) of each parameter. Rows that theta has more than the anchor, because the
            parameter has grown since, have no importance.
        scale: above 0.
        gradient: False to leave the gradients alone.
    """
    values: list[Tensor] = []
    for weights, totals, fishers, anchors in groups(blocks(pieces)):
        differences = torch._foreach_sub(weights, anchors)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        pulls = torch._foreach_mul(differences, fishers)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        if gradient:
            torch._foreach_add_(totals, pulls, alpha=scale)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        torch._foreach_mul_(pulls, differences)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        values += [pull.sum() for pull in pulls]
    return torch.stack(values).sum() * (scale / 2)


def add_displacements(pieces: Iterable[tuple[Tensor, ...]]) -> None:
    """Add gradient * (before - now) to paths, in place; `before` is overwritten.

    Args:
        pieces: (path, gradient, before, now) of each parameter.
    """
    for paths, gradients, before, now in groups(blocks(pieces)):
        torch._foreach_sub_(before, now)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        torch._foreach_addcmul_(paths, gradients, before)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def copy_all(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into the tensor at its place."""
    if into:
        torch._foreach_copy_([local(t) for t in into], [local(t) for t in values])  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def groups(pieces: Iterable[tuple[Tensor, ...]]) -> Iterator[list[list[Tensor]]]:
    """Pieces of about `ELEMENTS_AT_ONCE` entries together, as columns: small weights cost less than calls do."""
    group: list[tuple[Tensor, ...]] = []
    size = 0
    for piece in pieces:
        if group and size + piece[-1].numel() > ELEMENTS_AT_ONCE:
            yield [list(column) for column in zip(*group, strict=True)]
            group, size = [], 0
        group.append(piece)
        size += piece[-1].numel()
    if group:
        yield [list(column) for column in zip(*group, strict=True)]


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


@torch.no_grad()
def step_toward(model: nn.Module, pulls: Sequence[Pull], *, scale: float) -> None:
    """Move the weights by the penalty's proximal step, which is stable at any scale.

        theta <- (theta + scale * sum_k importance_k * anchor_k) / (1 + scale * sum_k importance_k)

    It is the minimum of penalty + |theta' - theta|^2 / 2, with the penalty of this module.

    Args:
        model: only what moves of it is pulled.
        pulls: one for each k.
        scale: the learning rate times the penalty's scale, at least 0.
    """
    for name, parameter in trainable(model).items():
        terms = [(local(i[name]), local(a[name])) for i, a in pulls if name in i]
        if terms:
            _step_toward(local(parameter), terms, scale)


def _step_toward(weights: Tensor, terms: Sequence[tuple[Tensor, Tensor]], scale: float) -> None:
    whole = torch.atleast_1d(weights)
    rows = max(1, ELEMENTS_AT_ONCE * len(whole) // max(whole.numel(), 1))
    for start in range(0, len(whole), rows):
        block = whole[start : start + rows]
        pull, stiffness = torch.zeros_like(block), torch.ones_like(block)
        for importance, anchor in terms:
            target = torch.atleast_1d(anchor)[start : start + rows]
            weight = torch.atleast_1d(importance)[start : start + rows]
            pull[: len(target)].addcmul_(block[: len(target)] - target, weight.to(block.dtype), value=scale)
            stiffness[: len(target)].add_(weight, alpha=scale)
        block.sub_(pull.div_(stiffness))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what moves, by name, at its own precision: an anchor must not share memory with its weight."""
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def normalised(importance: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each entry divided by the mean of all that are above zero, in place."""
    total = sum(float(value.sum(dtype=torch.float64)) for value in importance.values())
    count = sum(int((value > 0).sum()) for value in importance.values())
    for value in importance.values():
        value.mul_(count / total if count else 1.0)
    return importance


def merged(new: dict[str, Tensor], old: Mapping[str, Tensor], *, decay: float = 1.0) -> dict[str, Tensor]:
    """new + decay * old, added into `new`. A new one may have more rows; what no longer moves keeps its old importance.

    Args:
        new: importances of the latest task, in float32 at least.
        old: of all tasks before.
        decay: what the old ones are multiplied by, where there are new ones.
    """
    for name, value in old.items():
        if name in new:
            (new[name][: len(value)] if value.dim() else new[name]).add_(value, alpha=decay)
        else:
            new[name] = value
    return new


def placed(model: nn.Module, state: Mapping[str, object], prefix: str) -> dict[str, Tensor]:
    """The tensors of a saved state under a prefix, by parameter name, each on its parameter's device."""
    devices = {name: parameter.device for name, parameter in model.named_parameters()}
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {
        name: value.to(devices.get(name, value.device)) for name, value in found.items() if isinstance(value, Tensor)
    }
