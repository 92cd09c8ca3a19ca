"""Every task starts at the base and is answered by its own weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from retain.methods.lora import LoRA
from retain.strategies.single_task import SingleTask

Task = Callable[..., Any]


def learn(model: nn.Module, strategy: SingleTask, task: Any) -> None:
    strategy.before_task(model, task)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    strategy.after_task(model, task)


def outputs(model: nn.Module) -> Any:
    return model(torch.ones(3)).detach()


def test_every_task_starts_at_the_base(text_task: Task) -> None:
    model, strategy = nn.Linear(3, 2), SingleTask()
    base = outputs(model)
    for name in "abc":
        strategy.before_task(model, text_task(name, [1]))
        assert torch.equal(outputs(model), base)
        learn(model, strategy, text_task(name, [1]))
        assert not torch.equal(outputs(model), base)


def test_every_task_is_answered_as_when_it_was_learned(text_task: Task) -> None:
    model, strategy = nn.Linear(3, 2), SingleTask()
    base, learned = outputs(model), {}
    for name in "abc":
        learn(model, strategy, text_task(name, [1]))
        learned[name] = outputs(model)
        for earlier, answer in learned.items():
            assert torch.equal(outputs(strategy.select(model, earlier)), answer)
        assert torch.equal(outputs(strategy.select(model, "later")), base)


def test_choosing_leaves_the_model_as_it_is(text_task: Task) -> None:
    model, strategy = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), SingleTask()
    model[0].requires_grad_(False)
    for name in "ab":
        learn(model, strategy, text_task(name, [1]))
    latest = outputs(model)
    chosen: Any = strategy.select(model, "a")
    assert torch.equal(outputs(model), latest)
    assert not torch.equal(outputs(chosen), latest)
    assert chosen[0].weight is model[0].weight  # what does not move is not copied
    assert chosen[1].weight is not model[1].weight


def test_under_lora_the_base_is_shared(build_llama: Callable[..., nn.Module], text_task: Task) -> None:
    model, strategy = LoRA(r=2).apply(build_llama()), SingleTask()
    ids = torch.arange(6)[None]

    def logits(network: Any) -> Any:
        return network(input_ids=ids).logits.detach()

    learn(model, strategy, text_task("a", [1]))
    first = logits(model)
    learn(model, strategy, text_task("b", [1]))
    chosen = strategy.select(model, "a")
    assert torch.equal(logits(chosen), first)
    pairs = zip(model.parameters(), chosen.parameters(), strict=True)
    assert all((one is other) != one.requires_grad for one, other in pairs)


def test_without_a_task_the_base_answers(text_task: Task) -> None:
    model, strategy = nn.Linear(3, 2), SingleTask()
    strategy.after_task(model, text_task("base", [1]))
    assert strategy.select(model, "a") is model
    assert strategy.state_dict() == {"tasks": []}


def test_the_state_gives_the_same_answers(text_task: Task) -> None:
    model, strategy, other = nn.Linear(3, 2), SingleTask(), SingleTask()
    for name in "ab":
        learn(model, strategy, text_task(name, [1]))
    other.restore(model, strategy.state_dict())
    for name in ("a", "b", "later"):
        assert torch.equal(outputs(other.select(model, name)), outputs(strategy.select(model, name)))
    assert list(other.state_dict()) == list(strategy.state_dict())
