"""Recurrent layers' outputs and per-example gradients against torch's own, one example after another, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain.kernels.per_example import squared_gradients
from retain.types import Batch, Example

LENGTHS = [4, 6, 1]
WIDTH, INPUTS = 5, 3

LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}


class Reader(nn.Module):
    """A layer over inputs that depend on a parameter, from a first state that is one, and a loss on all it gives."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.inputs = layer, nn.Linear(INPUTS, INPUTS)
        self.starts = nn.Embedding(1, 2 * layer.num_layers * WIDTH)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        hidden = self.inputs(x)
        start = self.starts(torch.zeros(len(x), dtype=torch.long)).unflatten(1, (2, -1, WIDTH))
        state: Any = tuple(part.transpose(0, 1).contiguous() for part in start.unbind(1))
        state = state if isinstance(self.layer, nn.LSTM) else state[0]
        if self.layer.batch_first:
            hidden, end = self.layer(hidden, state)
        else:
            hidden, end = self.layer(hidden.transpose(0, 1), state)
            hidden = hidden.transpose(0, 1)
        ends = end if isinstance(end, tuple) else (end,)
        shared = sum(part.transpose(0, 1).flatten(1).square().sum(dim=1) for part in ends)
        whole = lengths == x.shape[1]  # the last state of the others is that after padding
        return hidden.square().sum(dim=-1) + (shared * whole)[:, None]


def rows() -> Batch:
    torch.manual_seed(1)
    owners = torch.full((len(LENGTHS), max(LENGTHS)), -1)
    for row, length in enumerate(LENGTHS):
        owners[row, :length] = row
    x = torch.randn(*owners.shape, INPUTS, dtype=torch.float64)
    targets = torch.where(owners < 0, -100, 0)
    examples = tuple(Example(id=str(row)) for row in range(len(LENGTHS)))
    return Batch({"x": x, "lengths": torch.tensor(LENGTHS)}, targets, owners, torch.ones(sum(LENGTHS)), examples)


def value_of(model: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda part: model(**part.inputs)[part.counted]


def per_row(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """One backward pass a row, its padding left in: it has no loss."""
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for row in range(len(LENGTHS)):
        model.zero_grad()
        value_of(model)(batch)[batch.target_documents == row].sum().backward()
        for name, parameter in model.named_parameters():
            total[name] += 0 if parameter.grad is None else parameter.grad**2
    model.zero_grad()
    return total


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_single_rows(kind: str, batch_first: bool, bias: bool, layers: int) -> None:
    torch.manual_seed(0)
    model = Reader(LAYERS[kind](INPUTS, WIDTH, layers, bias=bias, batch_first=batch_first)).double().eval()
    batch = rows()
    wanted = per_row(model, batch)
    assert all(float(value.abs().max()) > 0 for value in wanted.values())
    got = squared_gradients(model, batch, value_of(model), engine="hooks").values
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9 * float(value.max()))


@pytest.mark.parametrize("kind", LAYERS)
def test_some_weights_may_be_frozen(kind: str) -> None:
    """Also where nothing before the layer moves, so that its input has no gradient."""
    torch.manual_seed(0)
    model = Reader(LAYERS[kind](INPUTS, WIDTH, 2, batch_first=True)).double().eval()
    wanted = {name: value for name, value in per_row(model, rows()).items() if "hh_l0" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    got = squared_gradients(model, rows(), value_of(model), engine="hooks").values
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("kind", LAYERS)
def test_under_autocast_the_cell_is_read_in_float32(kind: str) -> None:
    torch.manual_seed(0)
    model = Reader(LAYERS[kind](INPUTS, WIDTH, 1, batch_first=True)).eval()
    batch = rows()
    batch.inputs["x"].data = batch.inputs["x"].float()  # type: ignore[index]
    wanted = squared_gradients(model, batch, value_of(model), engine="hooks").values

    def cast(part: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**part.inputs)[part.counted]

    got = squared_gradients(model, batch, cast, engine="hooks").values
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0.1, atol=0.05 * float(value.max()))


@pytest.mark.parametrize(
    "options", [{"bidirectional": True}, {"dropout": 0.5, "num_layers": 2}], ids=["bidirectional", "dropout"]
)
def test_what_the_rule_does_not_know_is_left_alone(options: dict[str, Any]) -> None:
    model = nn.GRU(INPUTS, WIDTH, batch_first=True, **options).double().train()

    def value(part: Batch) -> Tensor:
        torch.manual_seed(0)
        return model(part.inputs["x"])[0].square().sum(dim=-1)[part.counted]

    assert squared_gradients(model, rows(), value).engine == "loop"
