"""The places of the protocol: untouched, they leave plain fine-tuning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from retain.strategies import STRATEGIES, Strategy


def test_the_defaults_change_nothing(toy_task: Callable[..., Any]) -> None:
    model, task, strategy = nn.Linear(3, 4), toy_task(), Strategy()
    (model(torch.randn(2, 3)).sum()).backward()
    before = {name: (parameter.clone(), parameter.grad) for name, parameter in model.named_parameters()}
    assert strategy.before_task(model, task) is model
    assert strategy.mix_examples(task, 0) is task.examples
    assert strategy.loss_term(model, next(task.batches(task.examples)), None) is None
    assert strategy.add_penalty(model) is None
    strategy.edit_gradients(model)
    strategy.after_step(model, 1.0)
    strategy.after_task(model, task)
    assert strategy.select(model, "toy") is model
    assert strategy.restore(model, strategy.state_dict()) is model
    assert strategy.steps_factor == 1.0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.grad is before[name][1]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_registered_under_its_name(name: str) -> None:
    assert STRATEGIES[name].name == name


@pytest.mark.parametrize("strategy", STRATEGIES.values())
def test_no_strategy_adds_a_place(strategy: type[Strategy]) -> None:
    """A misspelled place would silently never be called."""
    places = {name for name, value in vars(strategy).items() if name[0] != "_" and callable(value)}
    assert places <= set(dir(Strategy))
