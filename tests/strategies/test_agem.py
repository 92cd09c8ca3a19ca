"""The projection against a case by hand and its own promise; the reference gradient against backward."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain import distributed
from retain.strategies.agem import AGEM, gradients_of
from retain.types import Batch, Example

Toy = Callable[..., Any]


class Line:
    """A task whose loss is the sum over rows of row . theta, so that its gradient is the rows' sum."""

    name, seed, method = "line", 0, None

    def __init__(self, rows: dict[str, list[float]]) -> None:
        self.rows = rows
        self.examples = [Example(id=id) for id in rows]

    def batches(self, examples: Any, *, max_tokens: int | None = None) -> Any:
        for row in examples:
            yield Batch({"x": torch.tensor(self.rows[row.id])}, *[torch.zeros(1)] * 3, (row,))

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(batch.inputs["x"])

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        return outputs.sum()


def line(old: list[list[float]], gradient: list[float], **options: Any) -> tuple[Tensor, AGEM]:
    """The gradient after the edit."""
    model = nn.Linear(2, 1, bias=False)
    task: Any = Line({str(i): row for i, row in enumerate(old)})
    strategy = AGEM(**options)
    strategy.after_task(model, task)
    strategy.before_task(model, task)
    model.weight.grad = torch.tensor([gradient])
    strategy.edit_gradients(model)
    return model.weight.grad[0], strategy


def test_by_hand() -> None:
    """g = (1, 1), g_ref = (0, -2): the second component goes."""
    assert line([[0.0, -2.0]], [1.0, 1.0])[0].tolist() == [1.0, 0.0]
    # g = (1, 0), g_ref = (-1, 1) + (-1, 3) = (-2, 4): g + 2 / 20 * (-2, 4) = (0.8, 0.4)
    torch.testing.assert_close(line([[-1.0, 1.0], [-1.0, 3.0]], [1.0, 0.0])[0], torch.tensor([0.8, 0.4]))


@pytest.mark.parametrize("gradient", [[1.0, -1.0], [1.0, 0.0], [0.0, 0.0]])
def test_a_gradient_that_does_not_hurt_stays(gradient: list[float]) -> None:
    assert line([[1.0, 0.0], [0.0, -3.0]], gradient)[0].tolist() == gradient


def test_old_rows_without_gradient_change_nothing() -> None:
    assert line([[0.0, 0.0]], [1.0, 2.0])[0].tolist() == [1.0, 2.0]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 4)).double()


def test_afterwards_the_two_are_at_right_angles(toy_task: Toy) -> None:
    model, old = network(), toy_task("old", num=10)
    strategy = AGEM(rows_per_step=10)
    strategy.after_task(model, old)
    strategy.before_task(model, old)
    reference = gradients_of(model, old, old.examples)
    against = {name: -value + torch.randn_like(value) for name, value in reference.items()}
    for name, parameter in model.named_parameters():
        parameter.grad = against[name].clone()
    strategy.edit_gradients(model)
    dot = sum(float((parameter.grad * reference[name]).sum()) for name, parameter in model.named_parameters())
    assert dot == pytest.approx(0, abs=1e-9)
    # and nothing else has changed: what was taken away is a multiple of g_ref, one for all parameters
    ratios = [(p.grad - against[n]) / reference[n] for n, p in model.named_parameters()]
    assert float(torch.cat([r.flatten() for r in ratios]).std()) < 1e-9


def test_the_reference_is_the_gradient_of_the_loss_and_leaves_no_trace(toy_task: Toy) -> None:
    model, task = network().train(), toy_task(num=10, length=2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = torch.get_rng_state()
    one, other = (gradients_of(model, replace(task, batch_size=size), task.examples) for size in (3, 10))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    model.eval().zero_grad()
    batch = next(task.batches(task.examples))
    task.loss(task.forward(model, batch), batch).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(one[name], parameter.grad)
        torch.testing.assert_close(other[name], parameter.grad)


def test_what_is_frozen_or_unused_is_left_alone(toy_task: Toy) -> None:
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    old = toy_task("old", num=10)
    strategy = AGEM(rows_per_step=10)
    strategy.after_task(model, old)
    strategy.before_task(model, old)
    for name, value in gradients_of(model, old, old.examples).items():
        if name != "unused":
            model.get_parameter(name).grad = -value
    strategy.edit_gradients(model)
    assert model[0].weight.grad is None  # type: ignore[index]
    assert float(model[3].weight.grad.abs().max()) < 1e-12  # type: ignore[index]


def test_processes_sum_their_shares(toy_task: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = network(), toy_task(num=4)
    alone = gradients_of(model, task, task.examples)

    def double(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)

    monkeypatch.setattr(distributed, "sum_tensors", double)
    for name, value in gradients_of(model, task, task.examples).items():
        torch.testing.assert_close(value, 2 * alone[name])


def test_every_step_draws_other_rows_from_the_seed_alone(text_task: Toy) -> None:
    old = text_task("old", [1] * 50)
    strategy = AGEM(rows_per_step=5)
    strategy.after_task(nn.Identity(), old)

    def draws(one: AGEM, num: int) -> list[list[Example]]:
        return [one._draw(old) for _ in range(num)]

    strategy.before_task(nn.Identity(), old)
    first = draws(strategy, 6)
    assert len({tuple(row.id for row in rows) for rows in first}) == 6
    assert all(len({row.id for row in rows}) == 5 for rows in first)
    strategy.before_task(nn.Identity(), old)
    assert draws(strategy, 3) == first[:3]
    other = AGEM(rows_per_step=5)
    other.before_task(nn.Identity(), old)
    other.restore(nn.Identity(), strategy.state_dict())
    assert draws(other, 3) == first[3:]


def test_every_old_row_is_as_likely_to_be_drawn(text_task: Toy) -> None:
    old = text_task("old", [1] * 40)
    strategy = AGEM(rows_per_step=4)
    strategy.after_task(nn.Identity(), old)
    counts = dict.fromkeys((row.id for row in old.examples), 0)
    for _ in range(2000):
        for row in strategy._draw(old):
            counts[row.id] += 1
    chi_square = sum((count - 200) ** 2 for count in counts.values()) / (2000 * 0.1 * 0.9) * 39 / 40
    assert abs(chi_square - 39) < 4 * (2 * 39) ** 0.5


def test_nothing_without_a_memory(toy_task: Toy) -> None:
    model, task = network(), toy_task()
    strategy = AGEM()
    strategy.before_task(model, task)
    strategy.edit_gradients(model)
    assert strategy.num_draws == 0


def test_new_rows_enter_the_memory_only_after_their_task(text_task: Toy) -> None:
    task = text_task("new", [1] * 3)
    strategy = AGEM()
    strategy.before_task(nn.Identity(), task)
    assert strategy.memory.rows == []
    strategy.after_task(nn.Identity(), task)
    assert {row.id for row in strategy.memory.rows} == {row.id for row in task.examples}


@pytest.mark.parametrize("options", [{"rows_per_step": 0}, {"capacity": 0}, {"capacity_bytes": 0}])
def test_refuses_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        AGEM(**options)
