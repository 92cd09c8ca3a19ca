"""The quadratic pull against autograd, closed forms and the proximal map's own definition, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain.kernels import quadratic
from retain.kernels.quadratic import (
    add_displacements,
    add_penalty,
    copy_all,
    groups,
    merged,
    normalised,
    placed,
    step_toward,
    weights_of,
)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()


def pull_of(model: nn.Module, *, seed: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    named = dict(model.named_parameters())
    importance = {name: torch.rand(p.shape, generator=generator, dtype=torch.float64) for name, p in named.items()}
    return importance, {name: torch.randn(p.shape, generator=generator).double() for name, p in named.items()}


def written(model: nn.Module, pulls: list[Any], scale: float) -> Tensor:
    named = dict(model.named_parameters())
    return scale / 2 * sum((f[name] * (named[name] - a[name]) ** 2).sum() for f, a in pulls for name in f)


@pytest.mark.parametrize("block", [2**18, 5])
def test_the_gradient_is_autograds(model: nn.Module, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quadratic, "ELEMENTS_AT_ONCE", block)
    pulls = [pull_of(model, seed=1), pull_of(model, seed=2)]
    value = written(model, pulls, 3.0)
    wanted = torch.autograd.grad(value, list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # the data's
    got = add_penalty(model, pulls, scale=3.0)
    assert got is not None
    assert not got.requires_grad
    torch.testing.assert_close(got, value.detach())
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient + 1)


def test_only_what_moves_is_pulled(model: nn.Module) -> None:
    pull = pull_of(model)
    model[0].requires_grad_(False)
    add_penalty(model, [pull], scale=1.0)
    assert [parameter.grad is None for parameter in model.parameters()] == [True, True, False, False]
    start = weights_of(model.requires_grad_(True))
    model[0].requires_grad_(False)
    step_toward(model, [pull], scale=1.0)
    assert [torch.equal(p, start[name]) for name, p in model.named_parameters()] == [True, True, False, False]
    assert add_penalty(model.requires_grad_(False), [pull], scale=1.0) is None
    assert add_penalty(model.requires_grad_(True), [], scale=1.0) is None


@pytest.mark.parametrize("block", [2**18, 5])
def test_the_proximal_step_is_the_minimum_that_it_claims(
    model: nn.Module, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At theta', the gradient of penalty(theta') + |theta' - theta|^2 / 2 is zero."""
    monkeypatch.setattr(quadratic, "ELEMENTS_AT_ONCE", block)
    pulls = [pull_of(model, seed=1), pull_of(model, seed=2)]
    before = weights_of(model)
    step_toward(model, pulls, scale=0.7)
    gradients = torch.autograd.grad(written(model, pulls, 0.7), list(model.parameters()))
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter - before[name], -gradient)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4)])
def test_any_shape_steps(shape: tuple[int, ...]) -> None:
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.full(shape, 3.0)))
    step_toward(model, [({"weight": torch.full(shape, 0.5)}, {"weight": torch.full(shape, 1.0)})], scale=2.0)
    assert torch.equal(model.weight.detach(), torch.full(shape, 2.0))


@pytest.mark.parametrize("block", [2**18, 3])
def test_rows_that_were_grown_are_free(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quadratic, "ELEMENTS_AT_ONCE", block)
    model = nn.Linear(3, 6, bias=False)
    nn.init.constant_(model.weight, 3.0)
    pull = {"weight": torch.full((4, 3), 0.5)}, {"weight": torch.full((4, 3), 1.0)}
    assert float(add_penalty(model, [pull], scale=1.0)) == pytest.approx(12.0)  # 12 weights, 1/2 * 1/2 * 2^2 each
    assert model.weight.grad.tolist() == [[1.0] * 3] * 4 + [[0.0] * 3] * 2
    step_toward(model, [pull], scale=2.0)
    assert model.weight.tolist() == [[2.0] * 3] * 4 + [[3.0] * 3] * 2


def test_importances_of_bfloat16_pull_weights_of_another_type(model: nn.Module) -> None:
    importance, anchor = pull_of(model)
    rounded = {name: value.bfloat16() for name, value in importance.items()}
    exact = {name: value.double() for name, value in rounded.items()}
    step_toward(model, [(rounded, anchor)], scale=0.5)
    moved = weights_of(model)
    torch.manual_seed(0)
    again = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    step_toward(again, [(exact, anchor)], scale=0.5)
    for name, value in weights_of(again).items():
        torch.testing.assert_close(moved[name], value)


def test_a_copy_shares_no_memory(model: nn.Module) -> None:
    model[1].requires_grad_(False)
    copies = weights_of(model)
    assert copies.keys() == {"0.weight", "0.bias"}
    nn.init.zeros_(model[0].weight)
    assert float(copies["0.weight"].abs().sum()) > 0


def test_normalised_has_a_mean_of_one_where_there_is_any() -> None:
    got = normalised({"used": torch.tensor([1.0, 3.0]), "unused": torch.zeros(100)})
    assert got["used"].tolist() == [0.5, 1.5]
    assert normalised({"weight": torch.zeros(3)})["weight"].tolist() == [0.0] * 3


def test_merged_adds_what_fades() -> None:
    old = {"grown": torch.ones(2), "gone": torch.ones(3), "scalar": torch.tensor(1.0)}
    got = merged({"grown": torch.ones(3), "scalar": torch.tensor(2.0), "new": torch.ones(1)}, old, decay=0.5)
    assert {name: value.tolist() for name, value in got.items()} == {
        "grown": [1.5, 1.5, 1.0], "scalar": 2.5, "new": [1.0], "gone": [1.0] * 3,
    }  # fmt: skip
    assert old["grown"].tolist() == [1.0, 1.0]


def test_placed_takes_tensors_under_a_prefix(model: nn.Module) -> None:
    state = {"anchor/0.weight": torch.ones(1), "anchor/elsewhere": torch.ones(2), "other": torch.ones(3), "num": 1}
    assert {name: len(value) for name, value in placed(model, state, "anchor/").items()} == {
        "0.weight": 1, "elsewhere": 2,
    }  # fmt: skip


def test_groups_hold_every_piece_once_in_order() -> None:
    """A parameter may be larger than a group: then it is alone."""
    pieces = [(torch.full((size,), float(i)), torch.zeros(size)) for i, size in enumerate([3, 2**18, 5, 2**17, 2**17])]
    found = [[float(first[0]) for first in columns[0]] for columns in groups(pieces)]
    assert found == [[0.0], [1.0], [2.0, 3.0], [4.0]]
    assert list(groups([])) == []


def test_displacements_are_added_in_place() -> None:
    path, gradient, before, now = torch.ones(2), torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0]), torch.zeros(2)
    add_displacements([(path, gradient, before, now)])
    assert path.tolist() == [3.0, 4.0]
    add_displacements([])


def test_copies_all() -> None:
    into = [torch.zeros(2), torch.zeros(1, dtype=torch.bfloat16)]
    copy_all(into, [torch.ones(2), torch.full((1,), 2.0)])
    assert [value.tolist() for value in into] == [[1.0, 1.0], [2.0]]
    copy_all([], [])
