"""TIES merging against a case by hand and the paper's own properties."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain.parameters import num_bytes
from retain.strategies.ties import TIES, merged, trimmed

Task = Callable[..., Any]


def learn(model: nn.Module, strategy: TIES, task: Any, change: Tensor) -> None:
    """A task whose training ends `change` from where it began."""
    strategy.before_task(model, task)
    with torch.no_grad():
        model.weight += change
    strategy.after_task(model, task)


def line(width: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, 1, bias=False)


def test_by_hand(text_task: Task) -> None:
    """Two tasks, five weights, the three largest entries of each kept."""
    model = line(5)
    base = model.weight.detach().clone()
    strategy = TIES(density=0.6)
    learn(model, strategy, text_task("a", [1]), torch.tensor([[4.0, -2.0, 1.0, 0.5, 0.1]]))
    torch.testing.assert_close(model.weight.detach() - base, torch.tensor([[4.0, -2.0, 1.0, 0.0, 0.0]]))
    learn(model, strategy, text_task("b", [1]), torch.tensor([[2.0, 3.0, 0.2, 0.1, -1.0]]))
    # kept: (4, -2, 1, 0, 0) and (2, 3, 0, 0, -1); signs: +, +, +, 0, -; means of those that agree:
    torch.testing.assert_close(model.weight.detach() - base, torch.tensor([[3.0, 3.0, 1.0, 0.0, -1.0]]))


def test_the_largest_entries_over_all_weights_together_stay() -> None:
    change = {"a": torch.tensor([[1.0, -9.0], [2.0, 0.5]]), "b": torch.tensor([3.0, -0.1])}
    kept = trimmed(change, density=0.5)
    assert kept["a"].tolist() == [[0.0, -9.0], [2.0, 0.0]]
    assert kept["b"].tolist() == [3.0, 0.0]
    assert trimmed(change, density=1.0)["a"].tolist() == change["a"].tolist()
    assert sum(int((value != 0).sum()) for value in trimmed(change, density=0.01).values()) == 1


def test_the_mean_is_over_those_that_agree() -> None:
    changes = torch.tensor([[1.0, -1.0, 0.0, 2.0], [3.0, -2.0, 0.0, -2.0], [-1.0, 0.0, 5.0, 0.0]])
    assert merged(changes).tolist() == [2.0, -1.5, 5.0, 0.0]


def test_the_sign_has_the_larger_sum_not_the_larger_number_of_votes() -> None:
    assert merged(torch.tensor([[1.0], [1.0], [-3.0]])).tolist() == [-3.0]


def test_the_same_change_twice_merges_to_itself(text_task: Task) -> None:
    model, change = line(50), torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    base, strategy = model.weight.detach().clone(), TIES(density=1.0)
    for name in "ab":
        learn(model, strategy, text_task(name, [1]), change)
    torch.testing.assert_close(model.weight.detach() - base, change)


def test_every_task_begins_at_the_base_and_ends_at_the_merge(text_task: Task) -> None:
    model, strategy = line(4), TIES(scale=0.5, density=1.0)
    base = model.weight.detach().clone()
    learn(model, strategy, text_task("a", [1]), torch.ones(1, 4))
    torch.testing.assert_close(model.weight.detach(), base + 0.5)
    strategy.before_task(model, text_task("b", [1]))
    assert torch.equal(model.weight, base)


def test_the_order_of_tasks_means_nothing(text_task: Task) -> None:
    changes = torch.randn(3, 1, 40, generator=torch.Generator().manual_seed(0))
    results: list[Tensor] = []
    for order in ([0, 1, 2], [2, 0, 1]):
        model, strategy = line(40), TIES(density=0.5)
        for i in order:
            learn(model, strategy, text_task(str(i), [1]), changes[i])
        results.append(model.weight.detach())
    torch.testing.assert_close(*results)


def test_stage_0_changes_nothing(text_task: Task) -> None:
    model, strategy = line(4), TIES()
    weight = model.weight.detach().clone()
    strategy.after_task(model, text_task("base", [1]))
    assert torch.equal(model.weight, weight)
    assert strategy.changes == []


def test_grown_rows_keep_what_they_learned(text_task: Task) -> None:
    model, strategy = line(3), TIES(density=1.0)
    learn(model, strategy, text_task("a", [1]), torch.ones(1, 3))
    model.weight = nn.Parameter(torch.cat([model.weight.detach(), torch.full((1, 3), 7.0)]))
    strategy.before_task(model, text_task("b", [1]))
    strategy.after_task(model, text_task("b", [1]))
    assert model.weight[1].tolist() == [7.0] * 3


def test_the_cost_is_what_the_docstring_says(text_task: Task) -> None:
    model, strategy = line(1000), TIES(density=0.2)
    learn(model, strategy, text_task("a", [1]), torch.randn(1, 1000))
    assert num_bytes(strategy.changes[0]["weight"]) == 1600


def test_the_state_gives_the_same_merge(text_task: Task) -> None:
    results: list[Tensor] = []
    for through_state in (False, True):
        model, strategy = line(20), TIES()
        generator = torch.Generator().manual_seed(0)
        learn(model, strategy, text_task("a", [1]), torch.randn(1, 20, generator=generator))
        if through_state:
            state, strategy = strategy.state_dict(), TIES()
            strategy.restore(model, state)
            assert list(strategy.state_dict()) == list(state)
        learn(model, strategy, text_task("b", [1]), torch.randn(1, 20, generator=generator))
        results.append(model.weight.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.1}, {"scale": 0.0}])
def test_refuses_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        TIES(**options)
