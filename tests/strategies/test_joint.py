"""Joint training starts from the base, with all rows, at sequential training's number of steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retain.strategies.joint import Joint

Task = Callable[..., Any]


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * parameter.requires_grad


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_every_task_starts_from_the_base(text_task: Task) -> None:
    model, strategy = make_model(), Joint()
    base = weights(model)
    for name in ("first", "second", "third"):
        task = text_task(name, [1] * 4)
        assert strategy.before_task(model, task) is model
        assert same(weights(model), base)
        move(model)
        strategy.after_task(model, task)
    assert not same(weights(model), base)


def test_the_base_is_what_stage_0_saw(text_task: Task) -> None:
    model, strategy = make_model(), Joint()
    base = weights(model)
    strategy.after_task(model, text_task("base", [1] * 5))
    move(model)
    strategy.before_task(model, text_task("first", [1]))
    assert same(weights(model), base)
    assert strategy.steps_factor == 1.0
    assert strategy.mix_examples(text_task("first", [1]), 0) == list(text_task("first", [1]).examples)


def test_mixes_all_rows_at_as_many_tasks_worth_of_steps(text_task: Task) -> None:
    model, strategy, seen = make_model(), Joint(), []
    for k, name in enumerate(("first", "second", "third")):
        task = text_task(name, [1] * (k + 2))
        seen += [example.id for example in task.examples]
        mixed = strategy.mix_examples(task, 0)
        assert strategy.steps_factor == k + 1
        assert [example.id for example in mixed] == seen
        assert [example.source for example in mixed] == ["replay"] * (len(seen) - k - 2) + ["task"] * (k + 2)
        strategy.after_task(model, task)


def test_what_does_not_move_is_neither_kept_nor_put_back(text_task: Task) -> None:
    model, strategy = make_model(), Joint()
    model.bias.requires_grad_(False)
    strategy.before_task(model, text_task("first", [1]))
    assert set(strategy.start) == {"weight"}
    with torch.no_grad():
        model.bias += 1
    moved = model.bias.clone()
    strategy.before_task(model, text_task("second", [1]))
    assert torch.equal(model.bias, moved)


def test_rows_that_the_model_grew_keep_their_values(text_task: Task) -> None:
    model, strategy = make_model(), Joint()
    base = weights(model)
    strategy.before_task(model, text_task("first", [1]))
    grown = torch.cat([model.weight.detach() + 1, torch.ones(2, 3)])
    model.weight = nn.Parameter(grown.clone())
    strategy.before_task(model, text_task("second", [1]))
    assert torch.equal(model.weight.detach(), torch.cat([base["weight"], torch.ones(2, 3)]))


def test_the_state_comes_back(text_task: Task) -> None:
    model, strategy = make_model(), Joint()
    base, first, second = weights(model), text_task("first", [1] * 3), text_task("second", [1] * 3)
    strategy.before_task(model, first)
    strategy.after_task(model, first)
    other = Joint()
    move(model)
    assert other.restore(model, strategy.state_dict()) is model
    assert other.mix_examples(second, 0) == strategy.mix_examples(second, 0)
    assert other.steps_factor == 2.0
    other.before_task(model, second)
    assert same(weights(model), base)
