"""Each rule against autograd, one row after another; a rule that does not know an option leaves the function alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain.errors import CompatibilityError
from retain.kernels.per_example import squared_gradients
from retain.kernels.use_rules import RULES
from retain.types import Batch, Example

ROWS, LENGTH, WIDTH = 3, 4, 5


class Holder(nn.Module):
    """A matrix, a vector and another one, used as a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.u = (nn.Parameter(torch.randn(*shape)) for shape in ((WIDTH, WIDTH), (WIDTH,), (WIDTH,)))


def make_batch() -> Batch:
    torch.manual_seed(1)
    owners = torch.arange(ROWS)[:, None].expand(ROWS, LENGTH)
    x, ids = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64), torch.randint(0, WIDTH, (ROWS, LENGTH))
    examples = tuple(Example(id=str(row)) for row in range(ROWS))
    return Batch({"x": x, "ids": ids}, owners, owners, torch.ones(ROWS * LENGTH), examples)


Function = Callable[[Holder, Tensor, Tensor], Tensor]

KNOWN: dict[str, Function] = {
    "linear": lambda m, x, ids: F.linear(x, m.w, m.v) * m.u,
    "addmm": lambda m, x, ids: torch.addmm(m.v, x.flatten(0, 1), m.w).view_as(x),
    "embedding": lambda m, x, ids: F.embedding(ids, m.w),
    "embedding with padding": lambda m, x, ids: F.embedding(ids, m.w, padding_idx=2) * x,
    "shared positions": lambda m, x, ids: x * F.embedding(torch.arange(LENGTH)[None], m.w),
    "layer_norm": lambda m, x, ids: F.layer_norm(x, [WIDTH], m.v, m.u),
    "layer_norm, its bias alone": lambda m, x, ids: F.layer_norm(x, [WIDTH], None, m.u),
    "rms_norm": lambda m, x, ids: F.rms_norm(x, [WIDTH], m.v, 1e-5),
    "multiplied": lambda m, x, ids: (1 + m.v) * x * m.u.exp(),
}
UNKNOWN: dict[str, Function] = {
    "rows of an embedding that are rescaled": lambda m, x, ids: F.embedding(ids, m.w, max_norm=1.0),
    "an embedding scaled by its counts": lambda m, x, ids: F.embedding(ids, m.w, scale_grad_by_freq=True),
    "addmm with a factor": lambda m, x, ids: torch.addmm(m.v, x.flatten(0, 1), m.w, beta=2).view_as(x),
    "norms of two dimensions": lambda m, x, ids: F.layer_norm(x, [LENGTH, WIDTH], m.w[:LENGTH]),
}


def squares(name: str, functions: dict[str, Function], engine: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Holder().double()

    def value(part: Batch) -> Tensor:
        return functions[name](model, part.inputs["x"], part.inputs["ids"]).square().sum(dim=-1)[part.counted]

    sums = squared_gradients(model, make_batch(), value, engine=engine)  # type: ignore[arg-type]
    assert engine == "auto" or sums.engine == engine
    return sums.values


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_function(name: str) -> None:
    wanted = squares(name, KNOWN, "loop")
    assert sum(float(value.sum()) for value in wanted.values()) > 0
    for key, value in squares(name, KNOWN, "hooks").items():
        torch.testing.assert_close(value, wanted[key])


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_option_is_left_to_other_engines(name: str) -> None:
    with pytest.raises(CompatibilityError, match="hooks do not see"):
        squares(name, UNKNOWN, "hooks")


def test_recurrent_layers_are_among_the_rules() -> None:
    assert {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu} <= set(RULES)
