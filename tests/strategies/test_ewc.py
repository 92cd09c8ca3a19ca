"""EWC against closed forms, autograd and the mistakes that the field makes, in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain import distributed
from retain.errors import CompatibilityError
from retain.kernels import quadratic
from retain.kernels.importance import diagonal_fisher
from retain.kernels.low_rank import LowRank
from retain.kernels.quadratic import normalised
from retain.strategies.ewc import EWC

Task = Callable[..., Any]


def linear(*, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 4, bias=bias, dtype=torch.float64)


def consolidated(fisher: dict[str, Tensor], anchors: dict[str, Tensor], **options: Any) -> EWC:
    strategy = EWC(**options)
    strategy.importance, strategy.anchors, strategy.tasks = [fisher], [anchors], ["old"]
    return strategy


def penalty_of(strategy: EWC, model: nn.Module) -> tuple[Tensor | None, dict[str, Tensor | None]]:
    model.zero_grad()
    value = strategy.add_penalty(model)
    return value, {name: parameter.grad for name, parameter in model.named_parameters()}


# The Fisher of a task


def test_is_the_closed_form(toy_task: Task) -> None:
    model, task = linear(), toy_task(num=30)
    x = torch.cat([task.inputs[example.id] for example in task.examples])
    p = model(x).softmax(-1).detach()
    got = diagonal_fisher(model, task, kind="exact")
    torch.testing.assert_close(got["weight"], torch.einsum("nk,ni->ki", p * (1 - p), x**2) / 30)
    torch.testing.assert_close(got["bias"], (p * (1 - p)).mean(0))


def test_is_a_mean_over_examples(toy_task: Task) -> None:
    model, task = linear(), toy_task(num=10, length=3)
    got = diagonal_fisher(model, task, kind="empirical")["weight"]
    wanted = torch.zeros_like(got)
    for example in task.examples:
        loss = F.cross_entropy(model(task.inputs[example.id]), task.targets[example.id], reduction="sum")
        wanted += torch.autograd.grad(loss, model.weight)[0] ** 2
    torch.testing.assert_close(got, wanted / 10)


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
def test_does_not_depend_on_the_batch_size(toy_task: Task, kind: Any) -> None:
    model, task = linear(), toy_task(num=64, length=2)
    one, many = (diagonal_fisher(model, replace(task, batch_size=size), kind=kind) for size in (1, 32))
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-9, atol=1e-12)


def test_padding_changes_nothing(toy_task: Task) -> None:
    model, task = linear(), toy_task(num=20, length=3)
    for index, example in enumerate(task.examples):  # rows of 1, 2 and 3 targets share batches
        task.inputs[example.id] = task.inputs[example.id][: index % 3 + 1]
        task.targets[example.id] = task.targets[example.id][: index % 3 + 1]
    for name, value in diagonal_fisher(model, replace(task, batch_size=1)).items():
        torch.testing.assert_close(diagonal_fisher(model, task)[name], value, rtol=1e-9, atol=1e-12)


def test_a_sample_of_the_rows_is_drawn_from_the_seed(toy_task: Task) -> None:
    class Watched(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(len(input))
            return super().forward(input)

    model, task = Watched(3, 4, dtype=torch.float64), toy_task(num=50)
    results = []
    for seed in (0, 0, 1):
        seen: list[int] = []
        results.append(diagonal_fisher(model, replace(task, seed=seed), num_samples=7, kind="empirical")["weight"])
        assert sum(seen) == 7
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


class Noisy(nn.Module):
    """Dropout and batch statistics: what training mode would spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 8, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(8, dtype=torch.float64)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.inner(x).transpose(1, 2)).transpose(1, 2)))


def test_modes_random_state_and_buffers_are_as_before(toy_task: Task) -> None:
    torch.manual_seed(0)
    model, task = Noisy().train(), toy_task()
    model.norm.eval()  # a frozen norm in a model that trains
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    first, second = diagonal_fisher(model, task), diagonal_fisher(model, task)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_is_summed_over_processes(toy_task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that have the same share: twice the sums, twice the targets."""
    alone = diagonal_fisher(linear(), toy_task())
    summed: list[Tensor] = []

    def sum_tensors(tensors: list[Tensor]) -> None:
        summed.extend(tensors)
        for tensor in tensors:
            tensor *= 2

    monkeypatch.setattr(distributed, "sum_tensors", sum_tensors)
    monkeypatch.setattr(distributed, "sum_number", lambda value: 2 * value)
    together = diagonal_fisher(linear(), toy_task())
    assert len(summed) == 2
    assert all(torch.equal(together[name], alone[name]) for name in alone)


def test_frozen_parameters_have_none(toy_task: Task) -> None:
    model, strategy = linear(), EWC()
    model.bias.requires_grad_(False)
    strategy.after_task(model, toy_task())
    assert strategy.importance[0].keys() == strategy.anchors[0].keys() == {"weight"}


# The penalty


def test_is_zero_at_the_anchor_and_grows_from_it(toy_task: Task) -> None:
    """An anchor that shares memory with the weight would keep the penalty at zero for ever."""
    model, strategy = linear(), EWC()
    strategy.after_task(model, toy_task())
    value, gradients = penalty_of(strategy, model)
    assert float(value) == 0
    assert all(float(gradient.abs().sum()) == 0 for gradient in gradients.values())
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    value, gradients = penalty_of(strategy, model)
    assert float(value) > 0
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients.values())


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_the_gradient_is_autograds(toy_task: Task, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quadratic, "ELEMENTS_AT_ONCE", 5)  # several blocks, the last one shorter
    model = nn.Sequential(linear(), nn.Linear(4, 4, dtype=torch.float64))
    strategy = EWC(strength=3.0, mode=mode, decay=0.5 if mode == "online" else 1.0)
    for seed in (0, 1):
        strategy.after_task(model, toy_task(f"task {seed}", data_seed=seed))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
    factor = 3.0 * (0.5 if mode == "online" else 1.0)
    written = sum(
        factor / 2 * (strategy.importance[k][name].double() * (parameter - strategy.anchors[k][name]) ** 2).sum()
        for k in range(len(strategy.importance))
        for name, parameter in model.named_parameters()
    )
    wanted = torch.autograd.grad(written, list(model.parameters()))
    value, gradients = penalty_of(strategy, model)
    torch.testing.assert_close(value, written.detach())
    assert not value.requires_grad
    for got, gradient in zip(gradients.values(), wanted, strict=True):
        torch.testing.assert_close(got, gradient)


def test_adds_to_the_data_gradient(toy_task: Task) -> None:
    model, strategy = linear(), EWC(strength=2.0)
    strategy.after_task(model, toy_task())
    with torch.no_grad():
        model.weight += 1.0
    _, penalty = penalty_of(strategy, model)
    model.zero_grad()
    model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
    data = model.weight.grad.clone()
    strategy.add_penalty(model)
    torch.testing.assert_close(model.weight.grad, data + penalty["weight"])


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4)])
def test_any_shape_has_a_penalty(shape: tuple[int, ...]) -> None:
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.full(shape, 3.0)))
    strategy = consolidated({"weight": torch.full(shape, 0.5)}, {"weight": torch.full(shape, 1.0)})
    value, gradients = penalty_of(strategy, model)
    assert float(value) == pytest.approx(model.weight.numel())
    assert torch.equal(gradients["weight"], torch.full(shape, 1.0))


def test_the_minimum_of_two_quadratic_tasks_is_that_of_joint_training() -> None:
    """L_A = sum h (t - a)^2 / 2 with F = h, L_B = sum k (t - b)^2 / 2: the minimum is (k b + s h a) / (k + s h)."""
    torch.manual_seed(0)
    model = nn.Module()
    a, b, k = torch.randn(3, 6).double()
    h = torch.tensor([0.5, 1.0, 2.0, 0.25, 4.0, 0.0]).double()
    model.register_parameter("weight", nn.Parameter(a.clone()))
    for strength in (0.3, 1.0, 7.0):
        strategy = consolidated({"weight": h}, {"weight": a}, strength=strength)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
        for _ in range(4000):
            optimizer.zero_grad()
            (0.5 * k.abs() * (model.weight - b) ** 2).sum().backward()
            strategy.add_penalty(model)
            optimizer.step()
        wanted = (k.abs() * b + strength * h * a) / (k.abs() + strength * h)
        torch.testing.assert_close(model.weight.detach(), wanted, rtol=1e-6, atol=1e-6)


def test_a_strong_penalty_holds_what_matters_and_nothing_else() -> None:
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.zeros(2)))
    strategy = consolidated({"weight": torch.tensor([1.0, 0.0])}, {"weight": torch.zeros(2)}, strength=1e5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    for _ in range(200):
        optimizer.zero_grad()
        (-1e3 * model.weight).sum().backward()
        strategy.add_penalty(model)
        optimizer.step()
    assert abs(model.weight[0].item()) < 0.02
    assert model.weight[1].item() == pytest.approx(2.0)


def test_importance_is_relative_to_its_mean(toy_task: Task) -> None:
    model, strategy = linear(), EWC()
    strategy.after_task(model, toy_task())
    fisher = diagonal_fisher(model, toy_task())
    mean = torch.cat([value.flatten() for value in fisher.values()]).mean()
    for name, value in fisher.items():
        torch.testing.assert_close(strategy.importance[0][name].double(), value / mean, rtol=2**-8, atol=0)
    assert mean != pytest.approx(1.0, rel=0.5)


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
def test_a_strength_means_the_same_whatever_the_old_loss_was_multiplied_by(toy_task: Task, kind: Any) -> None:
    plain, strategy, other = toy_task(), EWC(fisher=kind), EWC(fisher=kind)
    strategy.after_task(linear(), plain)
    heavy = replace(plain, examples=[replace(example, weight=30.0) for example in plain.examples])
    assert not torch.allclose(diagonal_fisher(linear(), heavy)["weight"], diagonal_fisher(linear(), plain)["weight"])
    other.after_task(linear(), heavy)
    for name, value in strategy.importance[0].items():
        torch.testing.assert_close(other.importance[0][name].float(), value.float(), rtol=2**-7, atol=0)


def test_a_strength_means_the_same_beside_weights_that_are_never_used(toy_task: Task) -> None:
    """Most rows of an embedding belong to tokens that no text of a task has."""
    model, strategy, other = linear(), EWC(), EWC()
    strategy.after_task(model, toy_task())
    model.register_parameter("unused", nn.Parameter(torch.zeros(1000, 3)))
    other.after_task(model, toy_task())
    assert torch.equal(other.importance[0]["weight"], strategy.importance[0]["weight"])
    assert float(other.importance[0]["unused"].abs().sum()) == 0


def test_strength_zero_does_nothing(toy_task: Task) -> None:
    model, strategy = linear(), EWC(strength=0.0)
    strategy.after_task(model, toy_task())
    assert penalty_of(strategy, model) == (None, {"weight": None, "bias": None})


def test_before_the_first_task_there_is_no_penalty() -> None:
    assert EWC().add_penalty(linear()) is None


def test_a_penalty_needs_something_that_moves(toy_task: Task) -> None:
    model, strategy = linear(), EWC()
    strategy.after_task(model, toy_task())
    assert strategy.add_penalty(model.requires_grad_(False)) is None


# The proximal form


def descend(strategy: EWC, k: Tensor, b: Tensor, *, lr: float, steps: int) -> Tensor:
    """Gradient descent on sum k (t - b)^2 / 2 under the strategy, from the anchor."""
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(strategy.anchors[0]["weight"].clone()))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * k * (model.weight - b) ** 2).sum().backward()
        strategy.add_penalty(model)
        optimizer.step()
        strategy.after_step(model, lr)
    return model.weight.detach()


def test_the_proximal_form_has_the_same_minimum_and_holds_where_the_gradient_form_diverges() -> None:
    a, b, k = torch.tensor([0.0, 1.0]).double(), torch.tensor([2.0, -1.0]).double(), torch.tensor([1.0, 3.0]).double()
    f = torch.tensor([0.5, 1.0]).double()
    for strength, stiff in ((0.5, False), (100.0, True)):
        wanted = (k * b + strength * f * a) / (k + strength * f)
        for update in ("gradient", "proximal"):
            strategy = consolidated({"weight": f}, {"weight": a}, strength=strength, update=update)
            got = descend(strategy, k, b, lr=0.1, steps=400)  # 0.1 * 100 * 0.5 > 2
            if update == "gradient" and stiff:
                assert not float(got.abs().max()) < 1e6
            else:
                torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_the_proximal_form_is_its_formula(toy_task: Task, mode: Any) -> None:
    model, strategy = linear(), EWC(strength=50.0, mode=mode, update="proximal")
    for seed in (0, 1):
        strategy.after_task(model, toy_task(f"task {seed}", data_seed=seed))
        with torch.no_grad():
            model.weight += 0.3
    start = model.weight.detach().clone()
    value, gradients = penalty_of(strategy, model)
    assert float(value) > 0
    assert gradients == {"weight": None, "bias": None}
    strategy.after_step(model, 0.1)
    top = start + 5 * sum(f["weight"].double() * a["weight"] for f, a in strategy._pulls())
    torch.testing.assert_close(
        model.weight.detach(), top / (1 + 5 * sum(f["weight"].double() for f in strategy.importance))
    )


def test_only_the_proximal_form_moves_weights(toy_task: Task) -> None:
    assert [EWC(update=update).moves_weights for update in ("gradient", "proximal")] == [False, True]
    for options in ({"update": "gradient"}, {"update": "proximal", "strength": 0.0}):
        model, strategy = linear(), EWC(**options)
        strategy.after_task(model, toy_task())
        with torch.no_grad():
            model.weight += 1.0
        weight = model.weight.detach().clone()
        strategy.after_step(model, 0.1)
        assert torch.equal(model.weight, weight)


# The space of weights


class Adapted(nn.Module):
    """A frozen linear layer with a trained low-rank change."""

    def __init__(self) -> None:
        super().__init__()
        self.base = linear().requires_grad_(False)
        self.A = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
        self.B = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * x @ self.A.T @ self.B.T + self.bias

    def merged(self) -> nn.Linear:
        whole = linear()
        with torch.no_grad():
            whole.weight += 0.5 * self.B @ self.A
            whole.bias += self.bias
        return whole


class ToyLoRA:
    def low_rank(self, model: nn.Module) -> list[LowRank]:
        return [LowRank("base.weight", "B", "A", scale=0.5)]


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_in_the_space_of_weights_it_is_ewc_on_the_whole_weight(toy_task: Task, mode: Any) -> None:
    """The same network with a full weight has the same Fisher, the same penalty and the same pull."""
    torch.manual_seed(0)
    model = Adapted()
    strategy, plain = (EWC(strength=3.0, mode=mode, space=space) for space in ("weights", "parameters"))
    for seed in (0, 1):
        task = toy_task(f"task {seed}", data_seed=seed, method=ToyLoRA())
        strategy.after_task(model, task)
        plain.after_task(model.merged(), task)
        with torch.no_grad():
            for parameter in (model.A, model.B, model.bias):
                parameter += torch.randn_like(parameter)
    for got, wanted in zip(strategy.importance, plain.importance, strict=True):
        assert got.keys() == {"base.weight", "bias"}
        assert torch.equal(got["base.weight"], wanted["weight"])
        assert torch.equal(got["bias"], wanted["bias"])
    assert not model.base.weight.requires_grad
    whole = model.merged()
    torch.testing.assert_close(strategy.add_penalty(model), plain.add_penalty(whole))
    torch.testing.assert_close(model.B.grad, 0.5 * whole.weight.grad @ model.A.detach().T)
    torch.testing.assert_close(model.A.grad, 0.5 * model.B.detach().T @ whole.weight.grad)
    torch.testing.assert_close(model.bias.grad, whole.bias.grad)
    assert model.base.weight.grad is None


def test_in_the_space_of_parameters_a_base_model_leaves_a_free(toy_task: Task) -> None:
    """B is 0, so A has no gradient; in the space of weights both are pulled as soon as they move."""
    pulled: dict[str, bool] = {}
    for space in ("parameters", "weights"):
        torch.manual_seed(0)
        model, strategy = Adapted(), EWC(space=space)
        strategy.after_task(model, toy_task(method=ToyLoRA()))
        with torch.no_grad():
            model.A += 1.0
            model.B += 1.0
        strategy.add_penalty(model)
        pulled[space] = float(model.A.grad.abs().max()) > 0
        assert float(model.B.grad.abs().max()) > 0
    assert pulled == {"parameters": False, "weights": True}


def test_the_changes_come_back_with_the_state(toy_task: Task) -> None:
    torch.manual_seed(0)
    model, strategy = Adapted(), EWC(space="weights")
    strategy.after_task(model, toy_task(method=ToyLoRA()))
    with torch.no_grad():
        model.B += 1.0
    other = EWC(space="weights")
    other.restore(model, strategy.state_dict())
    assert torch.equal(other.add_penalty(model), strategy.add_penalty(model))
    again = EWC(space="weights")
    again.restore(model, {**strategy.state_dict(), "changes": []})
    assert again.add_penalty(model) is None or float(again.add_penalty(model)) < float(other.add_penalty(model))
    again.before_task(model, toy_task(method=ToyLoRA()))  # as when a method has added a pair since
    assert torch.equal(again.add_penalty(model), strategy.add_penalty(model))


@pytest.mark.parametrize("spaces", [("weights", "parameters"), ("parameters", "weights")])
def test_the_space_may_change_between_tasks(toy_task: Task, spaces: Any) -> None:
    """What was measured in the other space goes on to pull."""
    torch.manual_seed(0)
    model = Adapted()
    nn.init.normal_(model.B)
    state: dict[str, Any] = {}
    for space in spaces:
        strategy = EWC(space=space)
        if state:
            strategy.restore(model, state)
        strategy.after_task(model, toy_task(space, method=ToyLoRA()))
        state = strategy.state_dict()
    assert strategy.importance[0].keys() == {"base.weight", "A", "B", "bias"}
    with torch.no_grad():
        model.A += 1.0
    strategy.add_penalty(model)
    pull, model.A.grad = model.A.grad, None
    strategy.changes = []
    strategy.add_penalty(model)
    assert not torch.equal(model.A.grad, pull)
    assert float(model.A.grad.abs().max()) > 0


# Several tasks


def test_online_is_separate_with_one_old_task(toy_task: Task) -> None:
    results = []
    for mode in ("online", "separate"):
        model, strategy = linear(), EWC(mode=mode)
        strategy.after_task(model, toy_task())
        with torch.no_grad():
            model.weight += 0.5
        results.append(penalty_of(strategy, model))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1]["weight"], results[1][1]["weight"])


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_online_adds_decayed_importance_and_moves_the_anchor(toy_task: Task, decay: float) -> None:
    model, strategy = linear(), EWC(decay=decay)
    first, second = toy_task("first"), toy_task("second", data_seed=1)
    strategy.after_task(model, first)
    old = strategy.importance[0]["weight"].float()
    with torch.no_grad():
        model.weight += 0.5
    strategy.after_task(model, second)
    new = normalised(diagonal_fisher(model, second))["weight"].float()
    assert strategy.tasks == ["first", "second"]
    assert torch.equal(strategy.anchors[0]["weight"], model.weight.detach())
    torch.testing.assert_close(strategy.importance[0]["weight"].float(), decay * old + new, rtol=0.01, atol=0)
    with torch.no_grad():
        model.weight += 0.1
    value, _ = penalty_of(strategy, model)
    assert float(value) == pytest.approx(float(decay * 0.5 * 0.01 * (decay * old + new).sum()), rel=0.01)


def test_separate_keeps_every_anchor(toy_task: Task) -> None:
    model, strategy = linear(), EWC(mode="separate")
    start = model.weight.detach().clone()
    strategy.after_task(model, toy_task("first"))
    with torch.no_grad():
        model.weight += 0.5
    strategy.after_task(model, toy_task("second"))
    assert torch.equal(strategy.anchors[0]["weight"], start)
    assert torch.equal(strategy.anchors[1]["weight"], start + 0.5)
    assert float(strategy.add_penalty(model)) > 0


def test_memory_of_online_does_not_grow(toy_task: Task) -> None:
    model = linear()
    for mode, growth in (("online", 1), ("separate", 3)):
        strategy, sizes = EWC(mode=mode), []
        for k in range(3):
            strategy.after_task(model, toy_task(f"task {k}"))
            sizes.append(sum(isinstance(value, Tensor) for value in strategy.state_dict().values()))
        assert sizes[-1] == growth * sizes[0]


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_rows_that_the_model_grew_are_free(toy_task: Task, mode: Any) -> None:
    model, strategy = linear(), EWC(mode=mode)
    strategy.after_task(model, toy_task(classes=4))
    model.weight = nn.Parameter(torch.cat([model.weight.detach() + 1.0, torch.randn(2, 3).double()]))
    model.bias = nn.Parameter(torch.cat([model.bias.detach(), torch.randn(2).double()]))
    value, gradients = penalty_of(strategy, model)
    old = strategy.importance[0]["weight"]
    assert float(value) == pytest.approx(float(old.double().sum()) / 2)
    assert float(gradients["weight"][4:].abs().sum()) == 0
    torch.testing.assert_close(gradients["weight"][:4], old.double())
    strategy.after_task(model, toy_task("grown", classes=6))
    value, gradients = penalty_of(strategy, model)
    if mode == "online":
        assert float(value) == 0
        assert strategy.importance[0]["weight"].shape == (6, 3)
        assert bool((strategy.importance[0]["weight"][:4] >= old * 0.99).all())


def test_what_stopped_moving_keeps_its_importance(toy_task: Task) -> None:
    model, strategy = linear(), EWC()
    strategy.after_task(model, toy_task())
    kept = strategy.importance[0]["bias"], strategy.anchors[0]["bias"]
    model.bias.requires_grad_(False)
    strategy.after_task(model, toy_task("second"))
    assert (strategy.importance[0]["bias"] is kept[0], strategy.anchors[0]["bias"] is kept[1]) == (True, True)


# State


def test_importance_is_bf16_and_anchors_are_masters(toy_task: Task) -> None:
    model, strategy = linear(), EWC()
    strategy.after_task(model, toy_task())
    assert strategy.importance[0]["weight"].dtype == torch.bfloat16
    assert strategy.anchors[0]["weight"].dtype == torch.float64
    exact = normalised(diagonal_fisher(model, toy_task()))["weight"]
    torch.testing.assert_close(strategy.importance[0]["weight"].double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_the_state_comes_back(toy_task: Task, mode: Any) -> None:
    model, strategy = linear(), EWC(mode=mode)
    for name in ("first", "second"):
        strategy.after_task(model, toy_task(name))
        with torch.no_grad():
            model.weight += 0.1
    state = strategy.state_dict()
    assert {"fisher/0/weight", "anchor/0/bias"} <= state.keys()
    other = EWC(mode=mode)
    assert other.restore(model, state) is model
    assert other.tasks == ["first", "second"]
    assert torch.equal(other.add_penalty(model), strategy.add_penalty(model))
    assert other.state_dict().keys() == state.keys()
    assert list(EWC().restore(model, EWC().state_dict()).parameters())


@pytest.mark.parametrize(
    "options", [{"strength": -1.0}, {"strength": float("nan")}, {"num_samples": 0}, {"decay": 0.0}, {"decay": 1.1},
                {"mode": "separate", "decay": 0.9}, {"space": "weights", "update": "proximal"}]
)  # fmt: skip
def test_refuses_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{list(options)[-1]}: "):
        EWC(**options)


def test_exact_is_refused_for_large_heads(toy_task: Task) -> None:
    model = nn.Linear(3, 5000, dtype=torch.float64)
    with pytest.raises(CompatibilityError, match="sampled"):
        EWC(fisher="exact").after_task(model, toy_task(classes=5000))


# Behaviour


def train(model: nn.Module, task: Any, strategy: EWC | None, *, steps: int = 200) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    batch = next(replace(task, batch_size=10**6).batches(task.examples))
    for _ in range(steps):
        optimizer.zero_grad()
        (task.loss(task.forward(model, batch), batch) / len(batch.weights)).backward()
        if strategy is not None:
            strategy.add_penalty(model)
        optimizer.step()
    if strategy is not None:
        strategy.after_task(model, task)


def accuracy(model: nn.Module, task: Any) -> float:
    batch = next(replace(task, batch_size=10**6).batches(task.examples))
    return float((task.forward(model, batch).logits().argmax(-1) == batch.targets[batch.counted]).double().mean())


def test_forgets_less_than_sequential_training(learnable_task: Task) -> None:
    kept: dict[bool, list[float]] = {True: [], False: []}
    learned: list[float] = []
    for seed in range(5):
        first, second = learnable_task("first", seed), learnable_task("second", seed + 100)
        for protected in (True, False):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4)).double()
            strategy = EWC() if protected else None
            train(model, first, strategy)
            train(model, second, strategy)
            kept[protected].append(accuracy(model, first))
            if protected:
                learned.append(accuracy(model, second))
    assert sum(kept[True]) / 5 > sum(kept[False]) / 5 + 0.1
    assert min(learned) > 0.85
