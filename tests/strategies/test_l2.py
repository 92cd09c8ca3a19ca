"""L2 to the start against closed forms, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from retain.strategies.l2 import L2

Task = Callable[..., Any]


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4, dtype=torch.float64)


def moved(model: nn.Linear, by: float) -> nn.Linear:
    with torch.no_grad():
        model.weight += by
    return model


def test_pulls_every_weight_alike(toy_task: Task) -> None:
    model, strategy = linear(), L2(strength=3.0)
    strategy.after_task(model, toy_task())
    assert float(strategy.add_penalty(model)) == 0
    moved(model, 0.5).zero_grad()
    assert float(strategy.add_penalty(model)) == pytest.approx(3.0 / 2 * 12 * 0.25)
    torch.testing.assert_close(model.weight.grad, torch.full((4, 3), 1.5).double())
    assert float(model.bias.grad.abs().sum()) == 0


@pytest.mark.parametrize(("anchor", "distance"), [("previous", 0.25), ("base", 0.75)])
def test_the_anchor_is_the_latest_task_or_the_base(toy_task: Task, anchor: Any, distance: float) -> None:
    model, strategy = linear(), L2(strength=1.0, anchor=anchor)
    strategy.after_task(model, toy_task("base"))
    strategy.after_task(moved(model, 0.5), toy_task("first"))
    moved(model, 0.25)
    assert float(strategy.add_penalty(model)) == pytest.approx(6 * distance**2)


@pytest.mark.parametrize("anchor", ["previous", "base"])
def test_rows_that_the_model_grew_are_free(toy_task: Task, anchor: Any) -> None:
    model, strategy = linear(), L2(strength=1.0, anchor=anchor)
    strategy.after_task(model, toy_task())
    model.weight = nn.Parameter(torch.cat([model.weight.detach() + 1.0, torch.randn(2, 3).double()]))
    assert float(strategy.add_penalty(model)) == pytest.approx(6.0)
    torch.testing.assert_close(model.weight.grad[:4], torch.ones(4, 3).double())
    assert float(model.weight.grad[4:].abs().sum()) == 0
    strategy.after_task(model, toy_task("grown"))
    assert len(strategy.anchors["weight"]) == {"previous": 6, "base": 4}[anchor]


def test_the_minimum_is_between_the_task_and_the_anchor() -> None:
    """sum k (t - b)^2 / 2 with the pull to a is least at (k b + s a) / (k + s)."""
    torch.manual_seed(0)
    model = nn.Module()
    a, b, k = torch.randn(3, 6).double()
    model.register_parameter("weight", nn.Parameter(a.clone()))
    strategy = L2(strength=0.7)
    strategy.after_task(model, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2000):
        optimizer.zero_grad()
        (0.5 * k.abs() * (model.weight - b) ** 2).sum().backward()
        strategy.add_penalty(model)
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), (k.abs() * b + 0.7 * a) / (k.abs() + 0.7))


def test_what_stopped_moving_is_not_pulled(toy_task: Task) -> None:
    model, strategy = linear(), L2()
    strategy.after_task(model, toy_task())
    model.bias.requires_grad_(False)
    strategy.after_task(moved(model, 1.0), toy_task("second"))
    moved(model, 1.0)
    strategy.add_penalty(model)
    assert model.bias.grad is None
    assert strategy.anchors.keys() == {"weight", "bias"}
    assert strategy.add_penalty(model.requires_grad_(False)) is None


def test_strength_zero_and_no_task_do_nothing(toy_task: Task) -> None:
    model = linear()
    assert L2().add_penalty(model) is None
    strategy = L2(strength=0.0)
    strategy.after_task(model, toy_task())
    assert strategy.add_penalty(moved(model, 1.0)) is None
    assert model.weight.grad is None


def test_the_state_comes_back(toy_task: Task) -> None:
    model, strategy = linear(), L2()
    strategy.after_task(model, toy_task())
    other = L2()
    assert other.restore(model, strategy.state_dict()) is model
    assert torch.equal(other.add_penalty(moved(model, 1.0)), strategy.add_penalty(model))


@pytest.mark.parametrize("strength", [-1.0, float("nan")])
def test_refuses_a_strength_that_means_nothing(strength: float) -> None:
    with pytest.raises(ValueError, match=r"^strength: "):
        L2(strength=strength)
