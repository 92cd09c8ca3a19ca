"""Memory aware synapses against closed forms and a loop over examples, in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain.kernels.importance import output_sensitivity
from retain.strategies.mas import MAS

Task = Callable[..., Any]


def linear(*, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4, bias=bias, dtype=torch.float64)


def whole(task: Any) -> Any:
    return next(replace(task, batch_size=10**6).batches(task.examples))


def test_is_the_closed_form(toy_task: Task) -> None:
    """Of y = W x + b: |d |y|^2 / d W_ki| = 2 |y_k x_i|, and of b 2 |y_k|."""
    model, task = linear(), toy_task(num=30)
    x = whole(task).inputs["x"][:, 0]
    y = model(x).detach()
    got = output_sensitivity(model, task)
    torch.testing.assert_close(got["weight"], 2 * torch.einsum("nk,ni->ki", y.abs(), x.abs()) / 30)
    torch.testing.assert_close(got["bias"], 2 * y.abs().mean(0))
    mean = torch.autograd.grad(model(x).square().sum() / 30, model.weight)[0].abs()  # the mistake: signs cancel
    assert float(mean.sum() / got["weight"].sum()) < 0.7


def test_an_example_is_the_sum_over_its_targets(toy_task: Task) -> None:
    model, task = linear(), toy_task(num=10, length=3)
    wanted = torch.zeros(4, 3).double()
    for example in task.examples:
        wanted += torch.autograd.grad(model(task.inputs[example.id]).square().sum(), model.weight)[0].abs()
    torch.testing.assert_close(output_sensitivity(model, task)["weight"], wanted / 10)


def test_batches_padding_and_labels_change_nothing(toy_task: Task) -> None:
    model, task = linear(), toy_task(num=20, length=3)
    for index, example in enumerate(task.examples):  # rows of 1, 2 and 3 targets share batches
        task.inputs[example.id] = task.inputs[example.id][: index % 3 + 1]
        task.targets[example.id] = task.targets[example.id][: index % 3 + 1]
    wanted = output_sensitivity(model, replace(task, batch_size=1))
    other = replace(task, targets={id: 3 - labels for id, labels in task.targets.items()})
    for got in (output_sensitivity(model, task), output_sensitivity(model, other)):
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value)


def test_importance_is_relative_to_its_mean_and_adds_up(toy_task: Task) -> None:
    model, strategy = linear(), MAS()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for seed in range(2):
        task = toy_task(data_seed=seed)
        raw = output_sensitivity(model, task)
        mean = torch.cat([value.flatten() for value in raw.values()]).mean()
        total = {name: total[name] + value / mean for name, value in raw.items()}
        strategy.after_task(model, task)
        with torch.no_grad():
            model.weight += 0.5
    for name, value in total.items():
        torch.testing.assert_close(strategy.importance[name].double(), value, rtol=2**-7, atol=0)
    torch.testing.assert_close(strategy.anchors["weight"], model.weight.detach() - 0.5)


def test_the_gradient_is_autograds(toy_task: Task) -> None:
    model, strategy = linear(), MAS(strength=3.0)
    strategy.after_task(model, toy_task())
    assert float(strategy.add_penalty(model)) == 0
    model.zero_grad()
    with torch.no_grad():
        model.weight += torch.randn_like(model.weight)
    written = 1.5 * sum(
        (strategy.importance[name].double() * (p - strategy.anchors[name]) ** 2).sum()
        for name, p in model.named_parameters()
    )
    wanted = torch.autograd.grad(written, list(model.parameters()))
    torch.testing.assert_close(strategy.add_penalty(model), written.detach())
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_frozen_parameters_have_none_and_grown_rows_are_free(toy_task: Task) -> None:
    model, strategy = linear(), MAS()
    model.bias.requires_grad_(False)
    strategy.after_task(model, toy_task())
    assert strategy.importance.keys() == strategy.anchors.keys() == {"weight"}
    model.weight = nn.Parameter(torch.cat([model.weight.detach(), torch.randn(2, 3).double()]))
    model.bias = nn.Parameter(torch.cat([model.bias.detach(), torch.randn(2).double()]), requires_grad=False)
    assert float(strategy.add_penalty(model)) == 0
    strategy.after_task(model, toy_task("grown", classes=6))
    assert strategy.importance["weight"].shape == (6, 3)


def test_strength_zero_and_no_task_do_nothing(toy_task: Task) -> None:
    model = linear()
    assert MAS().add_penalty(model) is None
    strategy = MAS(strength=0.0)
    strategy.after_task(model, toy_task())
    assert strategy.add_penalty(model) is None


def test_the_state_comes_back(toy_task: Task) -> None:
    model, strategy = linear(), MAS()
    strategy.after_task(model, toy_task())
    assert strategy.importance["weight"].dtype == torch.bfloat16
    with torch.no_grad():
        model.weight += 0.1
    other = MAS()
    assert other.restore(model, strategy.state_dict()) is model
    assert torch.equal(other.add_penalty(model), strategy.add_penalty(model))


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"strength": float("nan")}, {"num_samples": 0}])
def test_refuses_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: "):
        MAS(**options)


def accuracy(model: nn.Module, batch: Any) -> float:
    return (model(batch.inputs["x"])[batch.counted].argmax(-1) == batch.targets[batch.counted]).double().mean().item()


def train(model: nn.Module, task: Any, strategy: MAS) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    batch = whole(task)
    for _ in range(200):
        optimizer.zero_grad()
        loss: Tensor = task.loss(task.forward(model, batch), batch) / len(batch.weights)
        loss.backward()
        strategy.add_penalty(model)
        optimizer.step()
    strategy.after_task(model, task)
    return batch


def test_forgets_less_than_sequential_training(learnable_task: Task) -> None:
    kept: list[float] = []
    learned: list[float] = []
    for seed in range(5):
        first, second = learnable_task("first", seed), learnable_task("second", seed + 100)
        scores: list[float] = []
        for strength in (0.1, 0.0):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4)).double()
            strategy = MAS(strength=strength)
            batches = [train(model, task, strategy) for task in (first, second)]
            scores.append(accuracy(model, batches[0]))
            if strength:
                learned.append(accuracy(model, batches[1]))
        kept.append(scores[0] - scores[1])
    assert sum(kept) / 5 > 0.1
    assert min(learned) > 0.85
