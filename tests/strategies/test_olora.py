"""O-LoRA: the penalty and its gradient are those of autograd, and subspaces come apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain.errors import CompatibilityError
from retain.kernels.low_rank import LowRank
from retain.parameters import trainable
from retain.strategies.olora import OLoRA

ToyTask = Any


class Pairs(nn.Module):
    """Two adapted weights, each with pairs of factors that are all summed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, width).double().requires_grad_(False) for width in (6, 4))
        self.factors = nn.ParameterDict()
        self.add("default")

    def add(self, pair: str) -> None:
        for i, width in enumerate((6, 4)):
            self.factors[f"{i}/A/{pair}"] = nn.Parameter(torch.randn(2, 6, dtype=torch.float64) * 0.3)
            self.factors[f"{i}/B/{pair}"] = nn.Parameter(torch.zeros(width, 2, dtype=torch.float64))

    def names(self) -> list[str]:
        return [name.removeprefix("0/A/") for name in self.factors if name.startswith("0/A/")]

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x) + sum(x @ (self.factors[f"{i}/B/{p}"] @ self.factors[f"{i}/A/{p}"]).T for p in self.names())
        return x


class ToyLoRA:
    """As much of LoRA as the strategy uses."""

    name, can_detach, can_extend = "lora", True, True
    plain = True
    no_products = ""

    def modules(self, model: Any) -> list[str]:
        return model.names()

    def extend(self, model: Any, name: str) -> nn.Module:
        model.requires_grad_(False)
        model.add(name)
        return model

    def activate(self, model: Any, names: Any) -> nn.Module:
        assert list(names) == model.names()
        return model

    def low_rank(self, model: Any) -> list[LowRank]:
        return [
            LowRank(f"layers.{i}.weight", f"factors.{i}/B/{pair}", f"factors.{i}/A/{pair}", 1.0)
            for i in range(2)
            for pair in model.names()
            if self.plain
        ]


def before(strategy: OLoRA, model: nn.Module, toy_task: Callable[..., ToyTask], *names: str) -> None:
    for name in names:
        strategy.before_task(model, toy_task(name, width=6, classes=4, method=ToyLoRA()))


@pytest.mark.parametrize("norm", ["l1", "frobenius"])
def test_the_penalty_is_autograds(toy_task: Callable[..., ToyTask], norm: Any) -> None:
    model, strategy = Pairs(), OLoRA(strength=0.7, norm=norm)
    before(strategy, model, toy_task, "one", "two", "three")
    assert strategy.pairs == {"one": "default", "two": "pair-2", "three": "pair-3"}
    assert all("pair-3" in name for name in trainable(model))
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        for old in ("default", "pair-2"):
            overlap = model.factors[f"{i}/A/{old}"] @ model.factors[f"{i}/A/pair-3"].T
            expected = expected + 0.7 * (overlap.abs().sum() if norm == "l1" else overlap.square().sum())
    expected.backward()
    right = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    for name, gradient in right.items():  # the penalty is added to what is there
        trainable(model)[name].grad = torch.ones_like(gradient)
    value = strategy.add_penalty(model)
    assert value is not None
    torch.testing.assert_close(value, expected.detach())
    for name, parameter in model.named_parameters():
        if name in right:
            torch.testing.assert_close(parameter.grad, right[name] + 1)
        else:
            assert parameter.grad is None, name


def test_the_subspaces_come_apart(toy_task: Callable[..., ToyTask]) -> None:
    angles: list[float] = []
    for strength in (0.0, 0.5):
        model, strategy = Pairs(), OLoRA(strength=strength)
        for number, name in enumerate(["one", "two"]):
            task = toy_task(name, width=6, classes=4, data_seed=number, method=ToyLoRA())
            strategy.before_task(model, task)
            optimizer = torch.optim.Adam(trainable(model).values(), lr=0.03)
            for _ in range(80):
                for batch in task.batches(task.examples):
                    optimizer.zero_grad()
                    (task.loss(task.forward(model, batch), batch) / len(batch.examples)).backward()
                    strategy.add_penalty(model)
                    optimizer.step()
        one, two = (nn.functional.normalize(model.factors[f"0/A/{p}"].detach(), dim=1) for p in ("default", "pair-2"))
        angles.append(float((one @ two.T).abs().max()))
    assert angles[1] < 0.1 < angles[0]


def test_the_first_task_has_no_penalty(toy_task: Callable[..., ToyTask]) -> None:
    model, strategy = Pairs(), OLoRA()
    before(strategy, model, toy_task, "one")
    assert strategy.add_penalty(model) is None
    assert model.names() == ["default"]


def test_a_pair_that_was_trained_without_it_is_kept(toy_task: Callable[..., ToyTask]) -> None:
    model, strategy = Pairs(), OLoRA()
    strategy.bind(ToyLoRA(), learned=["zero"])
    before(strategy, model, toy_task, "one")
    assert model.names() == ["default", "pair-2"]
    assert strategy.add_penalty(model) is not None


def test_memory_comes_back(toy_task: Callable[..., ToyTask]) -> None:
    model, strategy, again = Pairs(), OLoRA(), OLoRA()
    before(strategy, model, toy_task, "one")
    again.restore(model, strategy.state_dict())
    before(again, model, toy_task, "two")
    assert again.pairs == {"one": "default", "two": "pair-2"}


def test_refusals(toy_task: Callable[..., ToyTask]) -> None:
    class Other(ToyLoRA):
        name = "adapter"

    class NoProducts(ToyLoRA):
        plain = False

    class DoRA(ToyLoRA):
        no_products = "its length is learned"

    assert OLoRA().supports(ToyLoRA()) is None
    assert "its length is learned" in (OLoRA().supports(DoRA()) or "")
    assert "LoRA" in (OLoRA().supports(Other()) or "")
    with pytest.raises(CompatibilityError, match="LoRA"):
        OLoRA().before_task(Pairs(), toy_task(method=Other()))
    strategy, model = OLoRA(), Pairs()
    strategy.before_task(model, toy_task("one", method=NoProducts()))
    with pytest.raises(CompatibilityError, match="plain factors"):
        strategy.before_task(model, toy_task("two", method=NoProducts()))
    with pytest.raises(ValueError, match="strength"):
        OLoRA(strength=-1.0)
