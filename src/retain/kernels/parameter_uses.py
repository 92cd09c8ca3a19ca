"""What a forward pass used its trained parameters for: the input of every use, and the gradient of its output.

Every torch function that takes a trained parameter (`F.linear`, `F.embedding`, a norm, ...) is called with the
parameter's detached value instead. Two things follow. Backward computes no gradient of a weight, only those of
activations. And what was missed shows: after the forward pass the loss must not depend on any trained parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from retain.types import Batch

__all__ = ["RULES", "Layout", "ParameterUses", "Source", "Use"]


@dataclass(frozen=True)
class Layout:
    """Which document each position of an activation belongs to.

    Args:
        order: positions sorted by document, padding left out; None where they lie so already.
        counts: positions of each document.
    """

    order: Tensor | None
    counts: list[int]

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """(..., n) as one (positions, n) a document."""
        flat = values.reshape(-1, values.shape[-1])
        return (flat if self.order is None else flat[self.order]).split(self.counts)


@dataclass(frozen=True)
class Source:
    """A value whose gradient is wanted: a parameter, or a vector made from a parameter alone (Gemma's 1 + weight).

    Args:
        name: the parameter's.
        parameter: the parameter.
        value: what the model sees.
        made: the same value with its graph back to the parameter.
    """

    name: str
    parameter: nn.Parameter
    value: Tensor
    made: Tensor

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient of the parameter, flat, from the gradient of the value."""
        if self.made is self.parameter:
            return gradient.flatten()
        shaped = gradient.reshape(self.made.shape).to(self.made.dtype)
        return torch.autograd.grad(self.made, self.parameter, shaped, retain_graph=True)[0].flatten()


Contribution = Callable[[Tensor], tuple[Tensor | None, Tensor]]
"""From an output's gradient to (left, right), each (..., n): a document's gradient is the sum over its positions of
left[position] outer right[position]. For an embedding left is row numbers, (..., 1); for a vector it is None."""


@dataclass
class Use:
    """One call of a function with a source among its arguments.

    Args:
        source: the source.
        layout: of the positions of input and output.
        input: the other argument.
        version: of the input, as autograd counts its changes in place.
        contribution: turns the output's gradient into `left` and `right`.
        left, right: one (positions, n) a document, once the gradient is here.
    """

    source: Source
    layout: Layout
    input: Tensor
    version: int
    contribution: Contribution
    left: Sequence[Tensor] = ()
    right: Sequence[Tensor] = ()

    @property
    def is_lookup(self) -> bool:
        """Is `left` row numbers and not values?"""
        return bool(self.left) and not self.left[0].is_floating_point()

    def receive(self, gradient: Tensor) -> None:
        """Take the gradient of the output."""
        left, right = self.contribution(gradient)
        self.left = () if left is None else self.layout.split(left)
        self.right = self.layout.split(right)


class ParameterUses(TorchFunctionMode):
    """While active, records how functions use trained parameters.

    Args:
        parameters: the trained parameters by name.
        batch: tells the documents. Activations are (rows, length, ...), (rows, heads, length, ...),
            (rows * length, ...) or (num_targets, ...).
        complete: called during backward with all uses of a parameter, when the last one has its gradient.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], batch: Batch, complete: Callable[[Sequence[Use]], None]
    ) -> None:
        super().__init__()
        self.batch, self.complete = batch, complete
        self.sources = {id(p): Source(name, p, p, p) for name, p in parameters.items()}
        self.uses: dict[str, list[Use]] = {}
        self.layouts: dict[tuple[int, ...], Layout | None] = {}
        documents = batch.documents
        longest = documents.amax(dim=1, keepdim=True)
        self.one_a_row = bool(((documents == longest) | (documents < 0)).all())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            rule = RULES.get(func)
            if rule is not None and (output := rule(self, *args, **kwargs)) is not None:
                return output
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            sources = [source for value in tensors if (source := self.find(value)) is not None]
            if len(sources) == 1 and not any(t.requires_grad for t in tensors if t is not sources[0].value):
                return self.derive(sources[0], func, args, kwargs)
        return func(*args, **kwargs)

    def find(self, value: object) -> Source | None:
        """The source that this very tensor is."""
        return self.sources.get(id(value))

    def derive(self, source: Source, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of one source and constants: a vector that it returns is a source, too."""
        made = func(
            *(source.made if value is source.value else value for value in args),
            **{key: source.made if value is source.value else value for key, value in kwargs.items()},
        )
        if made is source.made:
            return source.value
        if not isinstance(made, Tensor) or not made.requires_grad or not is_vector(made):
            return made
        value = made.detach().requires_grad_()
        self.sources[id(value)] = Source(source.name, source.parameter, value, made)
        return value

    def layout(self, leading: tuple[int, ...]) -> Layout | None:
        """The documents of an activation's positions, from its shape without the last dimension; None if unknown."""
        if leading not in self.layouts:
            owners = self.owners(leading)
            self.layouts[leading] = None if owners is None else layout_of(owners, len(self.batch.examples))
        return self.layouts[leading]

    def owners(self, leading: tuple[int, ...]) -> Tensor | None:
        """(positions,), the document of each position; -1 for padding."""
        documents, targets = self.batch.documents, self.batch.target_documents
        rows, length = documents.shape
        if leading[:1] == (rows,) and self.one_a_row:
            known = documents.amax(dim=1)  # (rows,), whatever the other dimensions are
        elif leading == targets.shape:
            known = targets  # (num_targets,), the output head's
        elif leading == (rows * length,):
            known = documents.flatten()
        elif leading[:2] == (rows, length) and leading[2:] != (length,):
            known = documents
        elif len(leading) == 3 and (leading[0], leading[2]) == (rows, length) and leading[1] != length:
            return documents[:, None].expand(leading).flatten()  # (rows, heads, length)
        else:
            return None
        return known.reshape(*known.shape, *(1 for _ in leading[known.dim() :])).expand(leading).flatten()

    def tap(self, output: Tensor, layout: Layout, input: Tensor, *wanted: tuple[Source | None, Contribution]) -> Tensor:
        """Record the uses that gave an output, and wait for its gradient."""
        version = input._version  # pyright: ignore[reportPrivateUsage]
        uses = [Use(source, layout, input, version, contribution) for source, contribution in wanted if source]
        for use in uses:
            self.uses.setdefault(use.source.name, []).append(use)
        if not output.requires_grad:
            output = output.requires_grad_().clone()  # a clone: a leaf must not be changed in place

        def receive(gradient: Tensor) -> None:
            for use in uses:
                use.receive(gradient)
                if all(other.right for other in self.uses[use.source.name]):
                    self.complete(self.uses.pop(use.source.name))

        output.register_hook(receive)
        return output

    def missed(self, total: Tensor) -> set[str]:
        """The parameters that the loss still depends on, or that met an input which was overwritten since."""
        uses = [use for recorded in self.uses.values() for use in recorded]
        changed = [use for use in uses if use.input._version != use.version]  # pyright: ignore[reportPrivateUsage]
        names = {use.source.name for use in changed}
        seen: set[Any] = set()
        nodes: list[Any] = [total.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            if node.name() == "torch::autograd::AccumulateGrad" and (source := self.find(node.variable)) is not None:
                names.add(source.name)
        return names

    def finish(self) -> None:
        """Complete what got only some of its gradients: the other uses did not reach the loss."""
        for uses in self.uses.values():
            if reached := [use for use in uses if use.right]:
                self.complete(reached)
        self.uses.clear()


def is_vector(value: Tensor) -> bool:
    """Has it one entry for every entry of its last dimension?"""
    return value.numel() == value.shape[-1] if value.dim() else False


def layout_of(owners: Tensor, num_documents: int) -> Layout:
    """The layout of positions whose documents are given, -1 for padding."""
    padding, *counts = torch.bincount(owners + 1, minlength=num_documents + 1).tolist()
    if padding == 0 and bool((owners.diff() >= 0).all()):
        return Layout(None, counts)
    return Layout(torch.argsort(owners, stable=True)[padding:], counts)


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


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.addmm: _addmm,
    torch.mul: _multiply,
    Tensor.mul: _multiply,
}
"""How each function uses its parameters: the output with its uses recorded, or None where the rule does not know."""
