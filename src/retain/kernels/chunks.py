"""Sums over targets in chunks, so that the logits of a whole batch never exist at once."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["LOGITS_PER_CHUNK", "rows_at_once", "slices", "summed_in_chunks"]

LOGITS_PER_CHUNK = 2**25
"""Logits that exist at once: 128 MiB in float32, for each of a handful of intermediate values."""

Term = Callable[[Tensor, slice], Tensor]
"""(some rows of the head's input, which of all they are) -> a scalar."""


def rows_at_once(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> int:
    """How many rows the head may be given at once.

    Args:
        hidden: (num_targets, width), one row or more.
        head: (n, width) -> (n, vocabulary).
    """
    with torch.no_grad():
        return max(16, LOGITS_PER_CHUNK // head(hidden[:1]).shape[-1])


def slices(num: int, size: int) -> Iterator[slice]:
    """The places of each chunk."""
    return (slice(start, min(start + size, num)) for start in range(0, num, size))


def summed_in_chunks(term: Term, hidden: Tensor, parameters: Sequence[nn.Parameter], *, chunk: int) -> Tensor:
    """sum(term(hidden[part], part) for part in slices(len(hidden), chunk)), a chunk after another.

    The gradient is made in the forward pass, chunk by chunk, so that nothing of a chunk outlives it and nothing is
    computed twice. What is kept for the backward pass is as large as `hidden` and the parameters that a term reads.

    Args:
        term: differentiable in its rows and in the parameters that it reads.
        hidden: (num_targets, width), the head's input.
        parameters: all that the term may read and that moves.
        chunk: rows at once.
    """
    if not len(hidden):
        return hidden.sum()
    parts = slices(len(hidden), chunk)
    if not torch.is_grad_enabled():
        return torch.stack([term(hidden[part], part) for part in parts]).sum()
    moving = [parameter for parameter in parameters if parameter.requires_grad]
    return cast("Any", _Summed.apply)(term, list(parts), hidden, *moving)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: Term, parts: list[slice], hidden: Tensor, *parameters: Tensor) -> Tensor:
        gradient = torch.zeros_like(hidden)
        totals: list[Tensor | None] = [None] * len(parameters)
        values: list[Tensor] = []
        for part in parts:
            with torch.enable_grad():
                rows = hidden[part].detach().requires_grad_()
                value = term(rows, part)
            values.append(value.detach())
            found = torch.autograd.grad(value, [rows, *parameters], allow_unused=True)
            for place, (total, piece) in enumerate(zip([gradient[part], *totals], found, strict=True)):
                if piece is not None and total is not None:  # pyright: ignore[reportUnnecessaryComparison]
                    total += piece
                elif piece is not None:  # pyright: ignore[reportUnnecessaryComparison]
                    totals[place - 1] = piece
        ctx.used = [total is not None for total in totals]
        ctx.save_for_backward(gradient, *(total for total in totals if total is not None))
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[Any, ...]:
        (factor,) = factors
        gradient, *totals = ctx.saved_tensors
        found = iter(totals)
        of_parameters = [next(found) * factor if used else None for used in ctx.used]
        return None, None, gradient * factor, *of_parameters
