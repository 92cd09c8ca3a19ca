"""Synaptic intelligence against the path integral, a plain copy of the authors' equations, and the field's mistakes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain.kernels.importance import diagonal_fisher
from retain.strategies.si import SI
from retain.types import Batch

Task = Callable[..., Any]

BATCHES: dict[int, tuple[Batch, Any]] = {}


def linear(*, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 4, dtype=torch.float64)


def whole(task: Any) -> Batch:
    """All of the task's rows as one batch, made once."""
    key = id(task.inputs)
    if key not in BATCHES:
        BATCHES[key] = next(replace(task, batch_size=10**6).batches(task.examples)), task
    return BATCHES[key][0]


def mean_loss(model: nn.Module, task: Any) -> Tensor:
    batch = whole(task)
    return task.loss(task.forward(model, batch), batch) / len(batch.weights)


def take_step(
    model: nn.Module, task: Any, strategy: SI, optimizer: torch.optim.Optimizer, *, clip: float = 1e9
) -> None:
    """The order that `strategies.strategy` promises."""
    optimizer.zero_grad()
    mean_loss(model, task).backward()
    strategy.edit_gradients(model)
    strategy.add_penalty(model)
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    strategy.after_step(model, optimizer.param_groups[0]["lr"])


def learn(
    model: nn.Module, task: Any, strategy: SI, *, steps: int = 50, lr: float = 0.05, kind: Any = torch.optim.SGD,
    clip: float = 1e9, **options: Any,
) -> None:  # fmt: skip
    optimizer = kind(model.parameters(), lr=lr, **options)
    for _ in range(steps):
        take_step(model, task, strategy, optimizer, clip=clip)


def length(strategy: SI) -> float:
    return sum(float(value.sum()) for value in strategy.path.values())


# The path


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_path_is_how_far_the_loss_fell(toy_task: Task, kind: Any) -> None:
    model, task, strategy = linear(), toy_task(num=200), SI()
    before = mean_loss(model, task).item()
    learn(model, task, strategy, steps=300, lr=0.02 if kind is torch.optim.SGD else 1e-3, kind=kind)
    drop = before - mean_loss(model, task).item()
    assert drop > 0.01
    assert length(strategy) == pytest.approx(drop, rel=0.01)


@pytest.mark.parametrize("clip", [1e9, 0.05], ids=["unclipped", "clipped"])
def test_the_path_is_of_the_data_loss_alone(toy_task: Task, clip: float) -> None:
    """With the penalty's gradient in it the path would be another; clipped, the gradient would be shorter."""
    model, first, second = linear(), toy_task("first", num=200), toy_task("second", num=200, data_seed=1)
    strategy = SI(strength=0.3)
    learn(model, first, strategy)
    strategy.after_task(model, first)
    before = mean_loss(model, second).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    pulled = 0.0
    for _ in range(200):
        start = [parameter.detach().clone() for parameter in model.parameters()]
        model.zero_grad()
        strategy.add_penalty(model)
        pulls = [parameter.grad.clone() for parameter in model.parameters()]
        take_step(model, second, strategy, optimizer, clip=clip)
        ends = list(model.parameters())
        pulled -= sum((g * (e - s)).sum().item() for g, s, e in zip(pulls, start, ends, strict=True))
    drop = before - mean_loss(model, second).item()
    assert length(strategy) == pytest.approx(drop, rel=0.01)
    assert abs(pulled) > 0.05 * drop  # the mistake would show


def test_the_displacement_is_the_optimizers_own(toy_task: Task) -> None:
    """Momentum, second moments and weight decay are in it: it is no multiple of the gradient."""
    model, task, strategy = linear(), toy_task(), SI()
    wanted = torch.zeros_like(model.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(3):
        start = model.weight.detach().clone()
        gradient = torch.autograd.grad(mean_loss(model, task), model.weight)[0]
        take_step(model, task, strategy, optimizer)
        wanted -= gradient * (model.weight.detach() - start)
    torch.testing.assert_close(strategy.path["weight"], wanted)


def test_the_order_of_parameter_groups_changes_nothing(toy_task: Task) -> None:
    paths = []
    for turned in (False, True):
        model, strategy = linear(), SI()
        groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.1}]
        optimizer = torch.optim.AdamW(groups[::-1] if turned else groups, lr=0.02)
        for _ in range(5):
            take_step(model, toy_task(), strategy, optimizer)
        paths.append(strategy.path)
    assert all(torch.equal(paths[0][name], paths[1][name]) for name in paths[0])


class Partly(nn.Module):
    """A frozen parameter, one that no pass uses, and one that every other step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.spare, self.head = (nn.Linear(3, size, dtype=torch.float64) for size in (3, 3, 4))
        self.inner.bias.requires_grad_(False)
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        return self.head(self.inner(x) if self.turn % 2 else x)


def test_frozen_and_unused_parameters_have_no_path(toy_task: Task) -> None:
    torch.manual_seed(0)
    model, strategy = Partly(), SI()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0)
    take_step(model, toy_task(), strategy, optimizer)
    path = strategy.path["inner.weight"].clone()
    take_step(model, toy_task(), strategy, optimizer)  # without `inner`: an old gradient must not count again
    assert torch.equal(strategy.path["inner.weight"], path)
    assert strategy.path.keys() == {"inner.weight", "head.weight", "head.bias"}
    strategy.after_task(model, toy_task())
    assert strategy.importance.keys() == {"inner.weight", "head.weight", "head.bias"}
    assert "inner.bias" not in strategy.anchors
    take_step(model, toy_task(), strategy, optimizer)


def test_buffers_are_reused(toy_task: Task) -> None:
    model, strategy = linear(), SI()
    learn(model, toy_task(), strategy, steps=1)
    places = [buffers["weight"].data_ptr() for buffers in (strategy.path, strategy.before, strategy.gradients)]
    learn(model, toy_task(), strategy, steps=2)
    assert places == [buffers["weight"].data_ptr() for buffers in (strategy.path, strategy.before, strategy.gradients)]
    strategy.after_task(model, toy_task())
    assert (strategy.path, strategy.start, strategy.before, strategy.gradients) == ({}, {}, {}, {})


# Importance


def reference(model: nn.Module, tasks: list[Any], *, c: float, xi: float, steps: int) -> dict[str, Tensor]:
    """The paper's equations, plainly, in its own units: the importances after all tasks."""
    named = dict(model.named_parameters())
    Omega = {name: torch.zeros_like(p) for name, p in named.items()}
    anchor = {name: p.detach().clone() for name, p in named.items()}
    for task in tasks:
        omega = {name: torch.zeros_like(p) for name, p in named.items()}
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(steps):
            before = {name: p.detach().clone() for name, p in named.items()}
            loss = mean_loss(model, task)
            g = dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True))
            optimizer.zero_grad()
            (loss + c * sum((Omega[name] * (p - anchor[name]) ** 2).sum() for name, p in named.items())).backward()
            optimizer.step()
            for name, p in named.items():
                omega[name] -= g[name] * (p.detach() - before[name])
        for name, p in named.items():
            Omega[name] += omega[name].clamp(min=0) / ((p.detach() - anchor[name]) ** 2 + xi)
            anchor[name] = p.detach().clone()
    return Omega


def test_in_the_authors_units_it_is_the_paper(toy_task: Task) -> None:
    tasks = [toy_task(f"task {seed}", data_seed=seed) for seed in range(3)]
    wanted = reference(linear(), tasks, c=0.7, xi=0.1, steps=20)
    model, strategy = linear(), SI(strength=0.7, damping=0.1, normalise=False)
    for task in tasks:
        learn(model, task, strategy, steps=20, lr=0.02, kind=torch.optim.Adam)
        strategy.after_task(model, task)
    for name, value in wanted.items():
        assert float(value.max()) > 0
        torch.testing.assert_close(strategy.importance[name].double(), value, rtol=0.02, atol=1e-6)


def test_the_first_tasks_change_is_counted_from_its_start(toy_task: Task) -> None:
    """With the latest weights as the start the change would be zero, and Omega = omega / xi."""
    model, strategy = linear(), SI(normalise=False, damping=1e-3)
    start = model.weight.detach().clone()
    learn(model, toy_task(), strategy)
    path, change = strategy.path["weight"].clone(), model.weight.detach() - start
    assert float(change.abs().max()) > 0.1
    strategy.after_task(model, toy_task())
    torch.testing.assert_close(
        strategy.importance["weight"].double(), path.clamp(min=0) / (change**2 + 1e-3), rtol=2**-8, atol=0
    )


@pytest.mark.parametrize("normalise", [True, False])
def test_importance_is_never_negative(toy_task: Task, normalise: bool) -> None:
    model, strategy = linear(), SI(strength=0.0, normalise=normalise)
    for seed in range(2):
        learn(  # the decay is stronger than the gradient, so that some weights raise the loss
            model, toy_task(data_seed=seed), strategy, steps=5, kind=torch.optim.AdamW, weight_decay=9.0
        )
        assert min(float(value.min()) for value in strategy.path.values()) < 0
        strategy.after_task(model, toy_task(data_seed=seed))
        assert min(float(value.min()) for value in strategy.importance.values()) >= 0


def test_importance_is_relative_to_its_mean(toy_task: Task) -> None:
    model, strategy = linear(), SI()
    learn(model, toy_task(), strategy)
    path = {name: value.clone() for name, value in strategy.path.items()}
    changes = {name: value - strategy.start[name] for name, value in dict(model.named_parameters()).items()}
    strategy.after_task(model, toy_task())
    xi = 0.1 * torch.cat([change.flatten() for change in changes.values()]).square().mean()
    raw = {name: path[name].clamp(min=0) / (changes[name] ** 2 + xi) for name in path}
    mean = torch.cat([value[value > 0] for value in raw.values()]).mean()
    for name, value in raw.items():
        torch.testing.assert_close(strategy.importance[name].double(), (value / mean).detach(), rtol=2**-8, atol=0)


def test_a_strength_means_the_same_whatever_the_loss_was_multiplied_by(toy_task: Task) -> None:
    importances = []
    for factor in (1.0, 30.0):
        model, strategy = linear(), SI()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05 / factor)
        for _ in range(20):
            optimizer.zero_grad()
            (factor * mean_loss(model, toy_task())).backward()
            strategy.edit_gradients(model)
            optimizer.step()
            strategy.after_step(model, 0.05 / factor)
        strategy.after_task(model, toy_task())
        importances.append(strategy.importance)
    for name, value in importances[0].items():
        torch.testing.assert_close(importances[1][name].float(), value.float(), rtol=2**-7, atol=1e-6)


def test_the_base_model_has_the_root_of_its_fisher(toy_task: Task) -> None:
    model, strategy = linear(), SI()
    strategy.after_task(model, toy_task("base"))
    root = {name: value.sqrt() for name, value in diagonal_fisher(model, toy_task("base")).items()}
    mean = torch.cat([value.flatten() for value in root.values()]).mean()
    for name, value in root.items():
        torch.testing.assert_close(strategy.importance[name].double(), value / mean, rtol=2**-8, atol=0)


def test_in_the_authors_units_the_base_model_has_an_anchor_alone(toy_task: Task) -> None:
    model, strategy = linear(), SI(normalise=False)
    start = model.weight.detach().clone()
    strategy.after_task(model, toy_task("base"))
    assert strategy.importance == {}
    assert torch.equal(strategy.anchors["weight"], start)
    assert strategy.add_penalty(model) is None
    learn(model, toy_task(), strategy)
    assert strategy.start == {}  # the anchor is where the path began
    path = strategy.path["weight"].clone()
    strategy.after_task(model, toy_task())
    change = model.weight.detach() - start
    torch.testing.assert_close(
        strategy.importance["weight"].double(), path.clamp(min=0) / (change**2 + 0.1), rtol=2**-8, atol=0
    )


def test_a_task_that_moved_nothing_is_not_divided_by_zero(toy_task: Task) -> None:
    model, strategy = linear(), SI()
    learn(model, toy_task(), strategy, lr=0.0)
    strategy.after_task(model, toy_task())
    assert [float(value.abs().sum()) for value in strategy.importance.values()] == [0.0, 0.0]


# The penalty


@pytest.mark.parametrize("normalise", [True, False])
def test_the_penalty_is_zero_at_the_anchor_and_has_autograds_gradient(toy_task: Task, normalise: bool) -> None:
    model, strategy = linear(), SI(strength=3.0, normalise=normalise)
    learn(model, toy_task(), strategy)
    strategy.after_task(model, toy_task())
    assert float(strategy.add_penalty(model)) == 0
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    with torch.no_grad():
        model.weight += torch.randn_like(model.weight)
    written = (1.5 if normalise else 3.0) * sum(
        (strategy.importance[name].double() * (p - strategy.anchors[name]) ** 2).sum()
        for name, p in model.named_parameters()
    )
    wanted = torch.autograd.grad(written, list(model.parameters()))
    torch.testing.assert_close(strategy.add_penalty(model), written.detach())
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_rows_that_the_model_grew_are_free(toy_task: Task) -> None:
    model, strategy = linear(), SI()
    learn(model, toy_task(), strategy)
    strategy.after_task(model, toy_task())
    model.weight = nn.Parameter(torch.cat([model.weight.detach(), torch.randn(2, 3).double()]))
    model.bias = nn.Parameter(torch.cat([model.bias.detach(), torch.randn(2).double()]))
    grown, old = toy_task("grown", classes=6), strategy.importance["weight"]
    with torch.no_grad():
        model.weight[4:] += 1.0
    assert float(strategy.add_penalty(model)) == 0
    learn(model, grown, strategy)
    strategy.after_task(model, grown)
    assert strategy.importance["weight"].shape == (6, 3)
    assert bool((strategy.importance["weight"][:4] >= old * 0.99).all())
    assert float(strategy.importance["weight"][4:].sum()) > 0


def test_strength_zero_and_no_task_do_nothing(toy_task: Task) -> None:
    model = linear()
    assert SI().add_penalty(model) is None
    strategy = SI(strength=0.0)
    learn(model, toy_task(), strategy)
    strategy.after_task(model, toy_task())
    assert strategy.add_penalty(model) is None


# State


def test_goes_on_from_the_middle_of_a_task(toy_task: Task) -> None:
    model, strategy = linear(), SI()
    learn(model, toy_task(), strategy, steps=4)
    state = {name: value.clone() for name, value in strategy.state_dict().items()}
    assert {"path/weight", "start/bias"} <= state.keys()
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def finish(strategy: SI, model: nn.Module) -> dict[str, Tensor]:
        learn(model, toy_task(), strategy, steps=4)
        strategy.after_task(model, toy_task())
        return strategy.state_dict()

    wanted = finish(strategy, model)
    for _ in range(2):  # the state that it was given is not written into
        other, again = SI(), linear(seed=1)
        again.load_state_dict(weights)
        assert other.restore(again, state) is again
        got = finish(other, again)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_importance_is_bf16_and_the_rest_are_masters(toy_task: Task) -> None:
    model, strategy = linear().to(torch.bfloat16), SI()
    model.weight.grad = torch.ones_like(model.weight)
    strategy.edit_gradients(model)
    strategy.after_step(model, 0.1)
    assert strategy.path["weight"].dtype == torch.float32
    strategy.after_task(model, toy_task())
    assert strategy.importance["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options", [{"strength": -1.0}, {"strength": float("nan")}, {"damping": 0.0}, {"num_samples": 0}]
)
def test_refuses_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: "):
        SI(**options)


# Behaviour


def accuracy(model: nn.Module, task: Any) -> float:
    batch = whole(task)
    return float((task.forward(model, batch).logits().argmax(-1) == batch.targets[batch.counted]).double().mean())


def test_forgets_less_than_sequential_training(learnable_task: Task) -> None:
    strengths = (0.1, 0.0)
    kept: dict[float, list[float]] = {strength: [] for strength in strengths}
    learned: list[float] = []
    for seed in range(5):
        first, second = learnable_task("first", seed), learnable_task("second", seed + 100)
        for strength in strengths:
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4)).double()
            strategy = SI(strength=strength)
            for task in (first, second):
                learn(model, task, strategy, steps=200, lr=0.02, kind=torch.optim.Adam)
                strategy.after_task(model, task)
            kept[strength].append(accuracy(model, first))
            if strength:
                learned.append(accuracy(model, second))
    assert sum(kept[0.1]) / 5 > sum(kept[0.0]) / 5 + 0.1
    assert min(learned) > 0.9
