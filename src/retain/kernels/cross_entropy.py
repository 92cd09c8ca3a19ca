"""Cross-entropy at counted targets only, in chunks, so that the logits of a whole batch never exist at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from retain.kernels.chunks import LOGITS_PER_CHUNK, rows_at_once

__all__ = ["chunked_cross_entropy", "target_nats"]


def target_nats(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], *, chunk: int | None = None
) -> Tensor:
    """Nats of each target: `F.cross_entropy(head(hidden).float(), targets, reduction="none")`, in chunks.

    A chunk's logits are made again in the backward pass; with a single chunk nothing is made twice.

    Args:
        hidden: (num_targets, width), the head's input.
        targets: (num_targets,), token ids.
        head: (n, width) -> (n, vocabulary), differentiable.
        chunk: rows at once; found from the vocabulary where None.

    Returns:
        (num_targets,), at least float32.
    """
    if not len(targets):
        return hidden.sum(dim=-1).float()
    if chunk is None:
        chunk = rows_at_once(hidden, head)

    def nats(rows: Tensor, wanted: Tensor) -> Tensor:
        logits = head(rows)  # (chunk, vocabulary)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), wanted, reduction="none")

    if len(targets) <= chunk:
        return nats(hidden, targets)
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([nats(rows, wanted) for rows, wanted in pieces])
    return torch.cat([checkpoint(nats, rows, wanted, use_reentrant=False) for rows, wanted in pieces])


def chunked_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    weights: Tensor | None = None,
    weight: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The weighted sum of `target_nats`, in nats.

    Where the head is a matrix product and every target weighs the same, PyTorch's fused kernel computes it: its
    gradient is made in the forward pass, so that no chunk is computed twice.

    Args:
        hidden: (num_targets, width), the head's input.
        targets: (num_targets,), token ids.
        head: (n, width) -> (n, vocabulary), differentiable.
        weights: (num_targets,), the weight of each target; None or all ones: a plain sum.
        weight: (vocabulary, width), the head's weight where the head is `hidden @ weight.T` and nothing else.
        chunk: rows at once; found from the vocabulary where None.
    """
    plain = weights is None or bool((weights == 1).all())
    if plain and weight is not None and torch.is_grad_enabled() and not torch.is_autocast_enabled(hidden.device.type):
        rows = chunk or max(16, LOGITS_PER_CHUNK // len(weight))
        if len(targets) > rows:
            options = LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows)
            return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)
    nats = target_nats(hidden, targets, head, chunk=chunk)
    return nats.sum() if plain or weights is None else (nats * weights).sum()
