"""What whole modules did with their parameters, for those that no rule knows: per-example gradients by torch.func.

    vmap(grad(lambda theta, x_n: (module(theta, x_n) * g_n).sum()), in_dims=(None, 0, 0))(theta, x, g)

with g the gradient of the module's output, which one backward pass of the whole network gives. Where the documents are
not the rows, g_n is g at the document's positions and zero elsewhere, and x is read whole. That pass gives the gradient
of the batch, too: the documents' must add up to it, or the module is not one that can be taken apart.
"""

import warnings
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.hooks import RemovableHandle

from retain.kernels.parameter_uses import Layout, ParameterUses, Source, Use

__all__ = ["ModuleUses", "UnknownModuleError", "owners"]

ELEMENTS_AT_ONCE = 2**26
"""Entries of documents' gradients of one module that are kept while its parameters are served: 256 MB."""


class UnknownModuleError(Exception):
    """torch.func cannot tell the documents' gradients of a module; never seen by a user."""


def owners(model: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """The modules that own these parameters directly."""
    parameters = {id(model.get_parameter(name)) for name in names}
    return [m for m in model.modules() if any(id(p) in parameters for p in m.parameters(recurse=False))]


class Shell(nn.Module):
    """A module without its hooks: calls its `forward` alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.own = module, module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward gives."""
        return self.own(*args, **kwargs)


@dataclass
class Call:
    """One call of a module.

    Args:
        shell: the module.
        values: copies of its trained parameters, by their names in the shell; their `.grad` is the batch's.
        args, kwargs: as it was given them, without graph.
        layouts: of its outputs' positions.
        rows: how many documents there are where they are the rows, in order; else 0.
        num: how many documents there are.
        cast: the autocast type that it ran under, if any.
        uses: one of each parameter.
        gradients: of the outputs, once they are here.
    """

    shell: Shell
    values: dict[str, Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layouts: list[Layout | None]
    rows: int
    num: int
    cast: torch.dtype | None
    uses: dict[str, Use] = field(default_factory=dict[str, Use])
    gradients: list[Tensor] = field(default_factory=list[Tensor])
    added: dict[str, tuple[Any, Any]] = field(default_factory=dict[str, "tuple[Any, Any]"])
    made: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def of(self, name: str, documents: range) -> Tensor:
        """(documents, *shape), their gradients of a parameter; asked for in order.

        Raises:
            UnknownModuleError: where they cannot be told.
        """
        if self.num * sum(value.numel() for value in self.values.values()) > ELEMENTS_AT_ONCE:
            found = self.computed([name], documents)[name]
        else:
            self.made = self.made or self.computed(list(self.values), range(self.num))
            found = self.made[name][documents.start : documents.stop]
        self.check(name, found, last=documents.stop == self.num)
        return found

    def check(self, name: str, gradients: Tensor, *, last: bool) -> None:
        """The documents' gradients must add up to the batch's."""
        total, size = self.added.get(name, (0.0, 0.0))
        self.added[name] = total + gradients.sum(dim=0), size + gradients.abs().sum(dim=0)
        if last:
            total, size = self.added.pop(name)
            batch = self.values[name].grad
            difference = total if batch is None else total - batch
            dtype = torch.float32 if gradients.dtype == torch.float64 else gradients.dtype  # many norms compute in it
            tolerance = torch.finfo(self.cast or dtype).eps ** 0.5
            if not float(difference.abs().amax()) <= tolerance * float(size.amax()):
                raise UnknownModuleError(f"{type(self.shell.module).__name__}: its rows cannot be taken apart")

    def computed(self, names: Sequence[str], documents: range) -> dict[str, Tensor]:
        """The same of several parameters."""
        wanted = {name: self.values[name].detach() for name in names}
        if not self.gradients:
            return {name: value.new_zeros(len(documents), *value.shape) for name, value in wanted.items()}
        device = self.gradients[0].device.type
        try:
            with warnings.catch_warnings(), torch.autocast(device, self.cast) if self.cast else nullcontext():
                warnings.filterwarnings("ignore", "There is a performance drop")  # a function without a batched form
                return self.by_row(wanted, documents) if self.rows else self.by_mask(wanted, documents)
        except (RuntimeError, TypeError, ValueError) as error:
            raise UnknownModuleError(f"{type(self.shell.module).__name__}: {error}") from error

    def run(self, wanted: Mapping[str, Tensor], args: Any, kwargs: Any, gradients: Sequence[Tensor]) -> Any:
        """What is differentiated."""
        others = {name: value.detach() for name, value in self.values.items() if name not in wanted}
        outputs = tensors_of(functional_call(self.shell, {**others, **wanted}, args, kwargs))
        return sum((o * g.to(o.dtype)).sum() for o, g in zip(outputs, gradients, strict=True))

    def by_row(self, wanted: dict[str, Tensor], documents: range) -> dict[str, Tensor]:
        """Each row by itself."""
        span = slice(documents.start, documents.stop)
        mapped = {key: value[span] for key, value in enumerate_all(self.args, self.kwargs) if self.is_rows(value)}

        def one(theta: dict[str, Tensor], inputs: dict[Any, Tensor], gradients: list[Tensor]) -> Any:
            args = tuple(inputs[i][None] if i in inputs else value for i, value in enumerate(self.args))
            kwargs = {k: inputs[k][None] if k in inputs else value for k, value in self.kwargs.items()}
            return self.run(theta, args, kwargs, [gradient[None] for gradient in gradients])

        return vmap(grad(one), in_dims=(None, 0, 0))(wanted, mapped, [gradient[span] for gradient in self.gradients])

    def by_mask(self, wanted: dict[str, Tensor], documents: range) -> dict[str, Tensor]:
        """The whole call for each document, with the gradients of the others left out."""
        parts: list[Tensor] = []
        for layout, gradient in zip(self.layouts, self.gradients, strict=True):
            if layout is None:
                raise ValueError("an output's shape does not tell its documents")
            owned = torch.arange(gradient[..., 0].numel(), device=gradient.device)[:, None]
            places = layout.split(owned.reshape(*gradient.shape[:-1], 1))
            masks = gradient.new_zeros(len(documents), len(owned))
            for mask, document in zip(masks, documents, strict=True):
                mask[places[document].flatten()] = 1
            parts.append(masks.reshape(len(documents), *gradient.shape[:-1], 1) * gradient)

        def one(theta: dict[str, Tensor], gradients: list[Tensor]) -> Tensor:
            return self.run(theta, self.args, self.kwargs, gradients)

        return vmap(grad(one), in_dims=(None, 0))(wanted, parts)

    def is_rows(self, value: Any) -> bool:
        """Has the argument one entry for every row?"""
        return isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.rows


class ModuleUses:
    """While active, runs some modules apart: their parameters are seen as whole uses of `ParameterUses`.

    Args:
        uses: where they are recorded.
        modules: what runs apart, with all that is in it.
    """

    def __init__(self, uses: ParameterUses, modules: Collection[nn.Module]) -> None:
        self.uses, self.modules = uses, modules
        self.calls: list[Call] = []
        self.handles: list[RemovableHandle] = []

    @contextmanager
    def active(self) -> Generator[None]:
        """Replace the modules' `forward` while inside."""
        own = {module: module.__dict__.get("forward") for module in self.modules}
        for module in self.modules:
            module.forward = partial(self.run, module, Shell(module))
        try:
            yield
        finally:
            for module, forward in own.items():
                del module.__dict__["forward"]
                if forward is not None:
                    module.forward = forward

    def run(self, module: nn.Module, shell: Shell, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        found: dict[str, Source] = {}
        for name, parameter in module.named_parameters():
            if (source := self.uses.find(parameter)) is not None:
                found[f"module.{name}"] = source
        if not found or not torch.is_grad_enabled():
            return shell(*args, **kwargs)
        values = {name: source.parameter.detach().requires_grad_() for name, source in found.items()}
        output = functional_call(shell, values, args, kwargs)
        outputs = tensors_of(output)
        if not any(value.numel() for value in outputs):  # a head that is given no position
            return output
        device, rows = outputs[0].device.type, len(self.uses.batch.documents)
        own = all(self.uses.are_rows(v) for v in args if isinstance(v, Tensor) and not v.is_floating_point())
        call = Call(
            shell, values, tuple(map(fixed, args)), {key: fixed(value) for key, value in kwargs.items()},
            [self.uses.layout(value.shape[:-1]) if own else None for value in outputs],
            rows if own and all(len(v) == rows and self.uses.by_row(v.shape[:-1]) for v in outputs) else 0,
            len(self.uses.batch.examples),
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        )  # fmt: skip
        for name, source in found.items():
            call.uses[name] = Use(source)
            self.uses.uses.setdefault(source.name, []).append(call.uses[name])
        self.calls.append(call)

        plain = [value.detach() for value in outputs]

        def receive(gradients: Sequence[Tensor | None]) -> None:
            pairs = zip(gradients, plain, strict=True)
            call.gradients = [torch.zeros_like(o) if g is None else g.detach() for g, o in pairs]

        if any(value.requires_grad for value in outputs):
            self.handles.append(torch.autograd.graph.register_multi_grad_hook(outputs, receive))
        return output

    def finish(self) -> None:
        """After backward: let every parameter know its documents' gradients."""
        for call in self.calls:
            for name, use in call.uses.items():
                use.whole = partial(call.of, name)

    def forget(self) -> None:
        """Let go of the graph, whose hooks hold its nodes."""
        for handle in self.handles:
            handle.remove()


def fixed(value: Any) -> Any:
    """An argument without its graph."""
    return value.detach() if isinstance(value, Tensor) else value


def tensors_of(output: Any) -> list[Tensor]:
    """The outputs that can have a gradient."""
    values = cast("tuple[Any, ...]", output) if isinstance(output, tuple) else (output,)
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def enumerate_all(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Every argument with its place or name."""
    return [*enumerate(args), *kwargs.items()]
