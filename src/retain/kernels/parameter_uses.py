"""What a forward pass used its trained parameters for: the input of every use, and the gradient of its output.

Every torch function that takes a trained parameter (`F.linear`, `F.embedding`, a norm, ...) is called with the
parameter's detached value instead. Two things follow. Backward computes no gradient of a weight, only those of
activations. And what was missed shows: after the forward pass the loss must not depend on any trained parameter.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from retain.types import Batch

__all__ = ["Layout", "ParameterUses", "Rule", "Source", "Use", "is_vector"]


@dataclass(frozen=True)
class Layout:
    """Which document each position of an activation belongs to.

    Args:
        order: positions sorted by document, padding left out; None where they lie so already.
        counts: positions of each document.
        by_row: is each row one document, in order? Then `counts` are its first positions, those behind are padding.
    """

    order: Tensor | None
    counts: list[int]
    by_row: bool = False

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """(..., n) as one (positions, n) a document; views where they can be."""
        if self.by_row:
            rows = values.flatten(1, -2) if values.dim() > 2 else values[:, None]
            return [row[:count] for row, count in zip(rows, self.counts, strict=True)]
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


Rule = Callable[..., Any]
"""Called with `ParameterUses` and a function's arguments: the function's output, or None where it does not know."""


@dataclass
class Use:
    """One call of a function with a source among its arguments.

    Args:
        source: the source.
        left, right: one (positions, n) a document, once the gradient of the output is here.
        whole: instead of them, what gives some documents' gradients, (documents, *shape).
    """

    source: Source
    left: Sequence[Tensor] = ()
    right: Sequence[Tensor] = ()
    whole: Callable[[range], Tensor] | None = None

    @property
    def is_known(self) -> bool:
        """Is the gradient here?"""
        return bool(self.right) or self.whole is not None

    @property
    def is_lookup(self) -> bool:
        """Is `left` row numbers and not values?"""
        return bool(self.left) and not self.left[0].is_floating_point()


class ParameterUses(TorchFunctionMode):
    """While active, records how functions use trained parameters.

    Args:
        parameters: the trained parameters by name.
        batch: tells the documents. Activations are (rows, length, ...), (rows, heads, length, ...),
            (rows * length, ...) or (num_targets, ...).
        complete: called during backward with all uses of a parameter, when the last one has its gradient.
        rules: how each function uses parameters.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch: Batch,
        complete: Callable[[Sequence[Use]], None],
        rules: Mapping[Callable[..., Any], Rule],
    ) -> None:
        super().__init__()
        self.batch, self.complete, self.rules = batch, complete, rules
        self.sources = {id(p): Source(name, p, p, p) for name, p in parameters.items()}
        self.uses: dict[str, list[Use]] = {}
        self.inputs: list[tuple[str, Tensor, int]] = []  # what met each, and how often it had been changed in place
        self.running: list[nn.Module] = []
        self.strangers: dict[str, set[nn.Module]] = defaultdict(set)  # where each met a function that no rule knows
        self.layouts: dict[tuple[int, ...], Layout | None] = {}
        documents = batch.documents
        longest = documents.amax(dim=1, keepdim=True)
        self.one_a_row = bool(((documents == longest) | (documents < 0)).all())
        self.two_halves = "decoder_input_ids" in batch.inputs  # the documents' places are then the decoder's alone

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            rule = self.rules.get(func)
            if rule is not None and (output := rule(self, *args, **kwargs)) is not None:
                return output
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            sources = [source for value in tensors if (source := self.find(value)) is not None]
            if len(sources) == 1 and not any(t.requires_grad for t in tensors if t is not sources[0].value):
                return self.derive(sources[0], func, args, kwargs)
            for source in sources:
                self.strangers[source.name].update(self.running[-1:])
        return func(*args, **kwargs)

    def __enter__(self) -> Self:
        self.handles = (
            register_module_forward_pre_hook(lambda module, _: self.running.append(module)),
            register_module_forward_hook(lambda *_: self.left(), always_call=True),
        )
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)

    def left(self) -> None:
        """A module is done."""
        self.running.pop()

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
            self.strangers[source.name].update(self.running[-1:])
            return made
        value = made.detach().requires_grad_()
        self.sources[id(value)] = Source(source.name, source.parameter, value, made)
        return value

    def layout(self, leading: tuple[int, ...]) -> Layout | None:
        """The documents of an activation's positions, from its shape without the last dimension; None if unknown."""
        if leading not in self.layouts:
            owners = self.owners(leading)
            layout = None if owners is None else layout_of(owners, len(self.batch.examples))
            self.layouts[leading] = self.by_row(leading) or layout
        return self.layouts[leading]

    def by_row(self, leading: tuple[int, ...]) -> Layout | None:
        """The layout of activations whose rows are the documents, in order; None if they are not."""
        documents = self.batch.documents
        rows, length = documents.shape
        own = torch.arange(rows, device=documents.device)
        if not self.one_a_row or leading[:1] != (rows,) or not bool((documents.amax(dim=1) == own).all()):
            return None
        places = torch.arange(1, length + 1, device=documents.device)
        lengths = ((documents >= 0) * places).amax(dim=1).tolist()
        whole = leading != (rows, length) or self.two_halves
        return Layout(None, [math.prod(leading[1:])] * rows if whole else lengths, by_row=True)

    def owners(self, leading: tuple[int, ...]) -> Tensor | None:
        """(positions,), the document of each position; -1 for padding."""
        documents, targets = self.batch.documents, self.batch.target_documents
        rows, length = documents.shape
        if leading[:1] == (rows,) and self.one_a_row:
            known = documents.amax(dim=1)  # (rows,), whatever the other dimensions are
        elif leading == targets.shape:
            known = targets  # (num_targets,), the output head's
        elif self.two_halves:
            return None
        elif leading == (rows * length,):
            known = documents.flatten()
        elif leading[:2] == (rows, length) and leading[2:] != (length,):
            known = documents
        elif len(leading) == 3 and (leading[0], leading[2]) == (rows, length) and leading[1] != length:
            return documents[:, None].expand(leading).flatten()  # (rows, heads, length)
        else:
            return None
        return known.reshape(*known.shape, *(1 for _ in leading[known.dim() :])).expand(leading).flatten()

    def are_rows(self, ids: Tensor) -> bool:
        """Are these numbers, (rows, length), the rows' own or alike in all of them? T5's distances are neither."""
        if not self.two_halves:
            return True
        inputs = [value[:, 1:] for value in self.batch.inputs.values() if value.shape == ids.shape]
        return torch.equal(ids, ids[:1].expand_as(ids)) or any(torch.equal(value, ids[:, 1:]) for value in inputs)

    def tap(self, output: Tensor, layout: Layout, input: Tensor, *wanted: tuple[Source | None, Contribution]) -> Tensor:
        """Record the uses that gave an output, and wait for its gradient."""
        if not output.requires_grad:
            output = output.requires_grad_().clone()  # a clone: a leaf must not be changed in place
        output.register_hook(self.record(layout, input, *wanted))
        return output

    def record(
        self, layout: Layout, input: Tensor, *wanted: tuple[Source | None, Contribution]
    ) -> Callable[[Tensor], None]:
        """Record uses; what is returned takes the gradient of their output."""
        uses = [(Use(source), contribution) for source, contribution in wanted if source]
        for use, _ in uses:
            self.uses.setdefault(use.source.name, []).append(use)
            self.inputs.append((use.source.name, input, input._version))  # pyright: ignore[reportPrivateUsage]

        def receive(gradient: Tensor) -> None:
            for use, contribution in uses:
                left, right = contribution(gradient)
                use.left = () if left is None else layout.split(left)
                use.right = layout.split(right)
                if all(other.is_known for other in self.uses[use.source.name]):
                    self.complete(self.uses.pop(use.source.name))

        return receive

    def missed(self, total: Tensor) -> set[str]:
        """The parameters that the loss still depends on, or that met an input which was overwritten since."""
        names = {name for name, input, version in self.inputs if input._version != version}  # pyright: ignore[reportPrivateUsage]
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
            if reached := [use for use in uses if use.is_known]:
                self.complete(reached)
        self.uses.clear()

    def forget(self) -> None:
        """Let go of what was recorded.

        Hooks of the graph hold this object, which holds inputs, which hold the graph: a circle that no collector sees.
        """
        self.uses.clear()
        self.inputs.clear()
        self.sources.clear()


def is_vector(value: Tensor) -> bool:
    """Has it one entry for every entry of its last dimension?"""
    return value.numel() == value.shape[-1] if value.dim() else False


def layout_of(owners: Tensor, num_documents: int) -> Layout:
    """The layout of positions whose documents are given, -1 for padding."""
    padding, *counts = torch.bincount(owners + 1, minlength=num_documents + 1).tolist()
    if padding == 0 and bool((owners.diff() >= 0).all()):
        return Layout(None, counts)
    return Layout(torch.argsort(owners, stable=True)[padding:], counts)
