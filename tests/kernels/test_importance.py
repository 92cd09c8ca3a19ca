"""Means over a task's examples: the sample, the processes, and what is left as it was. Fishers are in test_ewc.py."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain import distributed
from retain.kernels.importance import diagonal_fisher, mean_over_examples
from retain.types import Batch, Example


@dataclass(frozen=True)
class Outputs:
    at_targets: Tensor

    def logits(self) -> Tensor:
        return self.at_targets


@dataclass(frozen=True)
class Rows:
    """One target a row; its input is the row's number in binary."""

    examples: Sequence[Example]
    name: str = "task"
    seed: int = 0

    def batches(self, examples: Sequence[Example], *, max_tokens: int | None = None) -> Iterator[Batch]:
        for at in range(0, len(examples), 3):
            rows = tuple(examples[at : at + 3])
            bits = [[int(example.id) >> bit & 1 for bit in range(4)] for example in rows]
            x = torch.tensor(bits, dtype=torch.float64)[:, None]
            owners = torch.arange(len(rows))[:, None]
            yield Batch({"x": x}, owners % 2, owners, torch.ones(len(rows), dtype=torch.float64), rows)

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        return Outputs(model(batch.inputs["x"])[batch.counted])


@pytest.fixture
def rows() -> Rows:
    return Rows([Example(id=str(index)) for index in range(10)])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)).double().train()


def test_is_a_mean_over_a_sample_that_the_seed_draws(rows: Rows, model: nn.Module) -> None:
    seen: list[str] = []

    def add(batch: Batch, sums: dict[str, Tensor]) -> None:
        assert not model.training
        seen.extend(example.id for example in batch.examples)
        sums["1.bias"] += len(batch.examples)

    for num_samples, wanted in ((7, 7), (100, 10)):
        seen.clear()
        got = mean_over_examples(model, rows, add, num_samples=num_samples)
        assert len(set(seen)) == len(seen) == wanted
        assert got["1.bias"].tolist() == [1.0, 1.0]
    assert model.training


def test_sums_over_processes(rows: Rows, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "sum_tensors", lambda tensors: [tensor.mul_(2) for tensor in tensors])
    monkeypatch.setattr(distributed, "sum_number", lambda value: 4 * value)

    def add(batch: Batch, sums: dict[str, Tensor]) -> None:
        sums["1.bias"] += len(batch.examples)

    assert mean_over_examples(model, rows, add, num_samples=10)["1.bias"].tolist() == [0.5, 0.5]


def test_the_fisher_is_the_closed_form(rows: Rows, model: nn.Module) -> None:
    x = torch.cat([batch.inputs["x"][:, 0] for batch in rows.batches(rows.examples)])
    p = model.eval()(x).softmax(-1).detach()
    got = diagonal_fisher(model, rows, kind="exact")
    torch.testing.assert_close(got["1.weight"], torch.einsum("nk,ni->ki", p * (1 - p), x**2) / 10)


def test_nothing_is_left_behind(rows: Rows, model: nn.Module) -> None:
    state: Any = torch.get_rng_state()
    first, second = (diagonal_fisher(model, rows) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)  # no dropout
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    F.relu(model(torch.ones(1, 4).double())).sum().backward()  # still trains


class Gated(nn.Module):
    """A parameter that hooks do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(2, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("rti,oi->rto", x, self.gate.tanh())


def test_the_log_tells_where_hooks_were_not_enough(rows: Rows, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="retain")
    diagonal_fisher(nn.Linear(4, 2).double(), rows)
    assert caplog.messages == []
    diagonal_fisher(nn.Sequential(Gated()), rows)
    assert caplog.messages == ["per-example gradients of task: torch.func for Gated"]
