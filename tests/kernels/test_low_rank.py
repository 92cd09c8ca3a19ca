"""The pull of low-rank changes against autograd and against full matrices, in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from retain.kernels import low_rank
from retain.kernels.low_rank import LowRank, add_low_rank_penalty, only_moving


class Pairs(nn.Module):
    """Two adapted weights: one by two pairs, and one that is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.turned = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(4, 3))
        self.requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(6, 2))
        self.A2, self.B2 = nn.Parameter(torch.randn(1, 5)), nn.Parameter(torch.randn(6, 1))
        self.At, self.Bt = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))
        self.double()


CHANGES = [
    LowRank("weight", "B", "A", scale=2.0),
    LowRank("weight", "B2", "A2", scale=0.5),
    LowRank("turned", "Bt", "At", scale=3.0, transposed=True),
]


@pytest.fixture
def model() -> Pairs:
    return Pairs()


@pytest.fixture
def importance(model: Pairs) -> dict[str, Tensor]:
    return {"weight": torch.rand(6, 5).double(), "turned": torch.rand(4, 3).double()}


def earlier(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn_like(p) for name, p in model.named_parameters() if name in names}


def written(model: Pairs, importance: dict[str, Tensor], anchors: dict[str, Tensor], scale: float) -> Tensor:
    """With full matrices."""
    total = torch.zeros(()).double()
    named = dict(model.named_parameters())
    for weight in ("weight", "turned"):
        change = torch.zeros_like(named[weight])
        for part in CHANGES:
            if part.weight == weight:
                product = part.scale * named[part.left] @ named[part.right]
                if part.left in anchors:
                    product = product - part.scale * anchors[part.left] @ anchors[part.right]
                change = change + (product.T if part.transposed else product)
        total = total + scale / 2 * (importance[weight] * change**2).sum()
    return total


@pytest.mark.parametrize("anchored", [["A", "B", "A2", "B2", "At", "Bt"], ["A", "B", "At", "Bt"], []])
@pytest.mark.parametrize("block", [2**18, 10])
def test_the_gradient_is_autograds(
    model: Pairs, importance: dict[str, Tensor], anchored: list[str], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "ELEMENTS_AT_ONCE", block)
    anchors = earlier(model, anchored)
    factors = [p for p in model.parameters() if p.requires_grad]
    value = written(model, importance, anchors, 3.0)
    wanted = torch.autograd.grad(value, factors)
    factors[0].grad = torch.ones_like(factors[0])  # the data's
    got = add_low_rank_penalty(model, CHANGES, importance, anchors, scale=3.0)
    torch.testing.assert_close(got, value.detach())
    for index, (factor, gradient) in enumerate(zip(factors, wanted, strict=True)):
        torch.testing.assert_close(factor.grad, gradient + (index == 0))
    assert model.weight.grad is None


def test_is_exactly_zero_at_the_anchor(model: Pairs, importance: dict[str, Tensor]) -> None:
    model.float()
    importance = {name: value.float() for name, value in importance.items()}
    anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert float(add_low_rank_penalty(model, CHANGES, importance, anchors, scale=1e9)) == 0
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.grad is not None)


def test_the_same_change_has_the_same_penalty(model: Pairs, importance: dict[str, Tensor]) -> None:
    """A pull on A and B, each on its own, would change under (A, B) -> (c A, B / c)."""
    anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.A *= 10
        model.B /= 10
    assert float(add_low_rank_penalty(model, CHANGES, importance, anchors, scale=1.0)) == pytest.approx(0, abs=1e-20)


def test_what_stopped_moving_counts_and_is_not_pulled(model: Pairs, importance: dict[str, Tensor]) -> None:
    anchors = earlier(model, ["A", "B", "A2", "B2", "At", "Bt"])
    factors = [model.A2, model.B2]
    del importance["turned"]
    wanted = torch.autograd.grad(written(model, importance | {"turned": torch.zeros(4, 3)}, anchors, 2.0), factors)
    for factor in (model.A, model.B):
        factor.requires_grad_(False)
    add_low_rank_penalty(model, CHANGES, importance, anchors, scale=2.0)
    for factor, gradient in zip(factors, wanted, strict=True):
        torch.testing.assert_close(factor.grad, gradient)
    assert model.A.grad is None
    model.A2.requires_grad_(False)  # half of a pair
    model.A2.grad = None
    add_low_rank_penalty(model, CHANGES, importance, anchors, scale=2.0)
    torch.testing.assert_close(model.B2.grad, 2 * wanted[1])
    assert model.A2.grad is None
    model.B2.requires_grad_(False)
    assert add_low_rank_penalty(model, CHANGES, importance, anchors, scale=2.0) is None


def test_a_bfloat16_importance_pulls_float32_factors(model: Pairs, importance: dict[str, Tensor]) -> None:
    model.float()
    rounded = {name: value.bfloat16() for name, value in importance.items()}
    anchors = earlier(model, ["A", "B", "A2", "B2", "At", "Bt"])
    value = add_low_rank_penalty(model, CHANGES, rounded, anchors, scale=1.0)
    wanted = written(model, {name: f.float() for name, f in rounded.items()}, anchors, 1.0)
    torch.testing.assert_close(value, wanted.detach().float())


def test_only_moving_gives_the_flags_back(model: Pairs) -> None:
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with only_moving(model, {"weight", "B"}):
        moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moving == {"weight", "B"}
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
