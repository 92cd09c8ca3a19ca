"""Modules taken apart by torch.func: large ones, odd shapes, and documents that are not the rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain.kernels import module_uses
from retain.kernels.module_uses import owners
from retain.kernels.per_example import squared_gradients
from retain.types import Batch, Example

ROWS = torch.tensor([[0, 0, 0, -1], [1, 1, 1, 1]])
THREE = torch.tensor([[0, 0, 0, -1], [1, 1, 1, 1], [2, -1, -1, -1]])
"""As many rows as the width: an argument of the width looks like one of rows."""
ALONE = torch.tensor([[0, 0, 0]])
PACKED = torch.tensor([[0, 0, 1, 1, 1, 2, 3, 3]])
TURNED = torch.tensor([[1, 1, 1, -1], [0, 0, 0, 0]])


class Odd(nn.Module):
    """A number, a vector, a matrix and a cube, none of them used as hooks know; two inputs, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.vector = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(3))
        self.matrix, self.cube = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(2, 3, 3))

    def forward(self, x: Tensor, scale: Tensor, *, power: int) -> tuple[Tensor, str, Tensor]:
        mixed = torch.einsum("rti,kij->rtj", x, self.cube.tanh()) @ (self.matrix * self.number)
        return mixed * scale, "a word", (mixed - self.vector[None, None].expand(1, 1, 3)).pow(power)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd, self.scale = Odd(), torch.linspace(0.5, 1.5, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        first, _, second = self.odd(x, self.scale, power=2)
        return first.square().sum(dim=-1) + second.sum(dim=-1)


def batch_of(documents: Tensor) -> Batch:
    torch.manual_seed(2)
    x = torch.randn(*documents.shape, 3, dtype=torch.float64)
    targets = torch.where(documents < 0, -100, 0)
    examples = tuple(Example(id=str(i)) for i in range(int(documents.max()) + 1))
    return Batch({"x": x}, targets, documents, torch.ones(int((documents >= 0).sum())), examples)


def value_of(model: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda part: model(part.inputs["x"])[part.counted]


@pytest.mark.parametrize("at_once", [2**26, 1], ids=["at once", "one after another"])
@pytest.mark.parametrize("documents", [ROWS, PACKED, TURNED, ALONE], ids=["rows", "packed", "turned", "one"])
def test_every_shape_of_parameter(documents: Tensor, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_uses, "ELEMENTS_AT_ONCE", at_once)
    torch.manual_seed(0)
    model = Network().double().eval()
    batch = batch_of(documents)
    wanted = squared_gradients(model, batch, value_of(model), engine="loop").values
    assert all(float(value.abs().max()) > 0 for value in wanted.values())
    got = squared_gradients(model, batch, value_of(model))
    assert (got.engine, got.apart) == ("func", ("Odd",))
    for name, value in wanted.items():
        torch.testing.assert_close(got.values[name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_the_batch_is_what_the_documents_must_add_up_to() -> None:
    """A module that gives half of what it says: no shape shows it."""

    class Halved(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor, w: Tensor) -> Tensor:
            return x * w.sum()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            return gradient * w.sum(), (gradient * x).sum().expand_as(w) / len(x)  # of a batch, a mean

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return Halved.apply(x, self.w)

    model = nn.Sequential(Module()).double()
    assert squared_gradients(model, batch_of(ROWS), lambda b: model(b.inputs["x"])[b.counted]).engine == "loop"


def test_an_argument_that_only_looks_like_rows_gives_no_wrong_answer() -> None:
    torch.manual_seed(0)
    model = Network().double().eval()
    wanted = squared_gradients(model, batch_of(THREE), value_of(model), engine="loop").values
    got = squared_gradients(model, batch_of(THREE), value_of(model))
    assert got.engine == "loop"
    for name, value in wanted.items():
        torch.testing.assert_close(got.values[name], value)


def test_a_modules_own_hooks_stay() -> None:
    model = Network().double().eval()
    calls: list[int] = []
    model.odd.register_forward_pre_hook(lambda *_: calls.append(1))
    assert squared_gradients(model, batch_of(ROWS), value_of(model), engine="func").engine == "func"
    assert calls == [1]


def test_owners_are_those_that_have_the_parameter_themselves() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2)))
    assert owners(model, ["0.bias", "1.0.weight"]) == [model[0], model[1][0]]
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tied[1].weight = tied[0].weight
    assert owners(tied, ["0.weight"]) == [tied[0], tied[1]]
