"""How the functions of a network use their parameters: for each, its output with the uses recorded.

A rule is called in the function's place. It returns None where it does not know: another shape, another option.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retain.kernels.parameter_uses import ParameterUses, Rule, Source, is_vector
from retain.kernels.recurrent_uses import RECURRENT_RULES

__all__ = ["RULES"]


def value_of(value: Tensor | None, source: Source | None) -> Tensor | None:
    """The argument for the real call: a source's without its graph."""
    return value if value is None or source is None else value.detach()


def _linear(uses: ParameterUses, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    w, b = uses.find(weight), uses.find(bias)
    if (w is None and b is None) or (layout := uses.layout(input.shape[:-1])) is None:
        return None
    output = F.linear(input, weight.detach() if w else weight, value_of(bias, b))
    return uses.tap(output, layout, input, (w, lambda g: (g, input.detach().to(g.dtype))), (b, lambda g: (None, g)))


def _addmm(uses: ParameterUses, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: float) -> Tensor | None:
    b, w = uses.find(input), uses.find(mat2)
    if (w is None and b is None) or scales or input.dim() != 1 or (layout := uses.layout(mat1.shape[:-1])) is None:
        return None
    output = torch.addmm(input.detach() if b else input, mat1, mat2.detach() if w else mat2)
    return uses.tap(output, layout, mat1, (w, lambda g: (mat1.detach().to(g.dtype), g)), (b, lambda g: (None, g)))


def _embedding(
    uses: ParameterUses,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    source, rows = uses.find(weight), len(uses.batch.documents)
    if source is None or max_norm is not None or scale_grad_by_freq:
        return None
    if len(input) == 1 < rows and uses.one_a_row:
        input = input.expand(rows, *input.shape[1:])  # positions that all rows share
    if not uses.are_rows(input):
        return None
    if (layout := uses.layout(input.shape)) is None:
        return None

    def contribution(gradient: Tensor) -> tuple[Tensor, Tensor]:
        if padding_idx is not None:  # torch gives its row no gradient
            gradient = gradient.masked_fill((input == padding_idx % len(weight))[..., None], 0)
        return input[..., None], gradient

    return uses.tap(F.embedding(input, weight.detach()), layout, input, (source, contribution))


def _layer_norm(
    uses: ParameterUses,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    w, b = uses.find(weight), uses.find(bias)
    if (w is None and b is None) or len(normalized_shape) != 1 or (layout := uses.layout(input.shape[:-1])) is None:
        return None

    def normalized(gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient * F.layer_norm(input.detach(), list(normalized_shape), eps=eps)

    output = F.layer_norm(input, list(normalized_shape), value_of(weight, w), value_of(bias, b), eps)
    return uses.tap(output, layout, input, (w, normalized), (b, lambda g: (None, g)))


def _rms_norm(
    uses: ParameterUses,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor | None:
    source = uses.find(weight)
    if source is None or len(normalized_shape) != 1 or (layout := uses.layout(input.shape[:-1])) is None:
        return None

    def normalized(gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient * F.rms_norm(input.detach(), list(normalized_shape), eps=eps)

    output = F.rms_norm(input, list(normalized_shape), value_of(weight, source), eps)
    return uses.tap(output, layout, input, (source, normalized))


def _multiply(uses: ParameterUses, input: Any, other: Any) -> Tensor | None:
    vector, values = (other, input) if uses.find(input) is None else (input, other)
    source = uses.find(vector)
    if source is None or not is_vector(vector) or not isinstance(values, Tensor) or uses.find(values) is not None:
        return None
    shape = torch.broadcast_shapes(values.shape, vector.shape)
    if shape[-1] != vector.numel() or (layout := uses.layout(shape[:-1])) is None:
        return None
    return uses.tap(values * vector.detach(), layout, values, (source, lambda g: (None, g * values.detach())))


RULES: Mapping[Callable[..., Any], Rule] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.addmm: _addmm,
    torch.mul: _multiply,
    Tensor.mul: _multiply,
    **RECURRENT_RULES,
}
"""By function."""
