"""The average of two models against its formula, exact at both ends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain.strategies.interpolation import WiSEFT

Task = Callable[..., Any]


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4)


def learn(model: nn.Module, strategy: WiSEFT, task: Any, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The weight before the task and after training, before the average."""
    strategy.before_task(model, task)
    before = model.weight.detach().clone()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
    after = model.weight.detach().clone()
    strategy.after_task(model, task)
    return before, after


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9])
def test_the_average(text_task: Task, alpha: float) -> None:
    model = network()
    before, after = learn(model, WiSEFT(alpha=alpha), text_task("a", [1]))
    torch.testing.assert_close(model.weight.detach(), (1 - alpha) * before + alpha * after)


def test_the_ends_are_exact(text_task: Task) -> None:
    for alpha, place in ((0.0, 0), (1.0, 1)):
        model = network()
        pair = learn(model, WiSEFT(alpha=alpha), text_task("a", [1]))
        assert torch.equal(model.weight, pair[place])


def test_previous_starts_where_the_task_did_and_base_where_the_first_did(text_task: Task) -> None:
    for start in ("previous", "base"):
        model, strategy = network(), WiSEFT(start=start)
        base, _ = learn(model, strategy, text_task("a", [1]))
        before, after = learn(model, strategy, text_task("b", [1]), seed=2)
        assert not torch.equal(before, base)
        torch.testing.assert_close(model.weight.detach(), (after + (base if start == "base" else before)) / 2)


def test_stage_0_changes_nothing(text_task: Task) -> None:
    model = network()
    weight = model.weight.detach().clone()
    WiSEFT().after_task(model, text_task("base", [1]))
    assert torch.equal(model.weight, weight)


def test_what_is_frozen_stays_and_grown_rows_keep_what_they_learned(text_task: Task) -> None:
    model, strategy = network(), WiSEFT()
    model.bias.requires_grad_(False)
    strategy.before_task(model, text_task("a", [1]))
    bias = model.bias.detach().clone()
    model.weight.data = torch.cat([model.weight.data + 1, torch.ones(1, 3)])
    grown = model.weight.detach().clone()
    strategy.after_task(model, text_task("a", [1]))
    torch.testing.assert_close(model.weight[:4].detach(), grown[:4] - 0.5)
    assert torch.equal(model.weight[4:], grown[4:])
    assert torch.equal(model.bias, bias)


def test_only_the_base_is_kept_between_tasks(text_task: Task) -> None:
    for start, kept in (("previous", set()), ("base", {"before/weight", "before/bias"})):
        strategy = WiSEFT(start=start)
        learn(network(), strategy, text_task("a", [1]))
        assert set(strategy.state_dict()) == kept


def test_the_state_gives_the_same_average(text_task: Task) -> None:
    results: list[Tensor] = []
    for through_state in (False, True):
        model, strategy = network(), WiSEFT(alpha=0.3)
        strategy.before_task(model, text_task("a", [1]))
        with torch.no_grad():
            model.weight += 1
        if through_state:
            state, strategy = strategy.state_dict(), WiSEFT(alpha=0.3)
            strategy.restore(model, state)
        strategy.after_task(model, text_task("a", [1]))
        results.append(model.weight.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_refuses_a_share_that_is_none(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"^alpha: expected"):
        WiSEFT(alpha=alpha)
