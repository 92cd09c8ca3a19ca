"""What is seen of a forward pass, and that nothing unseen passes for seen."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain.kernels.parameter_uses import Layout, ParameterUses, Use
from retain.kernels.use_rules import RULES
from retain.types import IGNORED, Batch, Example

ROWS, LENGTH, WIDTH = 2, 3, 4


def make_batch(owners: Tensor, targets: Tensor | None = None) -> Batch:
    targets = owners if targets is None else targets
    examples = tuple(Example(id=str(index)) for index in range(int(owners.max()) + 1))
    return Batch({}, targets, owners, torch.ones(int((targets != IGNORED).sum())), examples)


ONE_A_ROW = torch.tensor([[0, 0, 0], [1, 1, -1]])
PACKED = torch.tensor([[0, 0, 1, 2, 2]])


def unused(_: object) -> None:
    raise AssertionError


def test_a_layout_sorts_positions_by_document() -> None:
    values = torch.arange(8.0).reshape(1, 4, 2)
    assert [piece.tolist() for piece in Layout(None, [1, 3]).split(values)] == [[[0, 1]], [[2, 3], [4, 5], [6, 7]]]
    assert [piece.tolist() for piece in Layout(torch.tensor([3, 0]), [1, 1]).split(values)] == [[[6, 7]], [[0, 1]]]


def test_rows_that_are_documents_are_views_without_their_padding() -> None:
    values = torch.arange(12.0).reshape(2, 3, 2)
    pieces = ParameterUses({}, make_batch(ONE_A_ROW), unused, RULES).layout((2, 3)).split(values)
    assert [piece.tolist() for piece in pieces] == [values[0].tolist(), values[1, :2].tolist()]
    assert pieces[0].data_ptr() == values.data_ptr()


@pytest.mark.parametrize(
    ("owners", "leading", "expected"),
    [
        (ONE_A_ROW, (2, 3), [0, 0, 0, 1, 1, 1]),  # what lies on padding has no gradient
        (ONE_A_ROW, (2, 7), [0] * 7 + [1] * 7),  # an encoder's positions
        (ONE_A_ROW, (2,), [0, 1]),  # one vector a row
        (ONE_A_ROW, (6,), [0, 0, 0, 1, 1, -1]),  # flattened
        (ONE_A_ROW, (3,), [0, 0, 1]),  # the counted targets
        (ONE_A_ROW, (3, 2), None),  # time before rows
        (PACKED, (1, 5), [0, 0, 1, 2, 2]),
        (PACKED, (1, 5, 2), [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]),  # heads behind time
        (PACKED, (1, 2, 5), [0, 0, 1, 2, 2] * 2),  # heads before time
        (PACKED, (1, 5, 5), None),  # five heads, before or behind: the shape does not tell
        (PACKED, (1,), None),
        (PACKED, (4,), None),
    ],
)
def test_the_documents_of_a_shape(owners: Tensor, leading: tuple[int, ...], expected: list[int] | None) -> None:
    targets = torch.where(owners == owners.max(), IGNORED, owners)  # (3,) counted targets
    if owners is ONE_A_ROW:
        targets = torch.tensor([[5, 5, IGNORED], [5, IGNORED, IGNORED]])
    found = ParameterUses({}, make_batch(owners, targets), unused, RULES).owners(leading)
    assert (found if found is None else found.tolist()) == expected


def seen(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[set[str], dict[str, list[Use]]]:
    """The names that were missed, and the uses of the others once their gradients are there."""
    complete: dict[str, list[Use]] = {}
    owners = torch.arange(len(x))[:, None].expand(len(x), x.shape[1])
    uses = ParameterUses(
        dict(model.named_parameters()),
        make_batch(owners),
        lambda found: complete.update({found[0].source.name: list(found)}),
        RULES,
    )
    with uses:
        total = forward(x).sum()
    missed = uses.missed(total)
    if not missed:
        total.backward()
        uses.finish()
    return missed, complete


def test_backward_computes_no_gradient_of_a_weight() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 1))
    missed, complete = seen(model, model, torch.randn(ROWS, LENGTH, WIDTH))
    assert not missed
    assert complete.keys() == dict(model.named_parameters()).keys()
    assert all(parameter.grad is None for parameter in model.parameters())


class Holder(nn.Module):
    """One parameter, used as a test says."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))


@pytest.mark.parametrize(
    "forward",
    [
        lambda w, x: x @ w,
        lambda w, x: F.linear(x, w.T),
        lambda w, x: F.linear(x, w) + (w**2).sum(),  # one use seen, the other not
        lambda w, x: F.linear(x.transpose(0, 1), w),  # time first
        lambda w, x: x * w.reshape(-1)[:WIDTH].tanh().cumsum(0)[None].expand(3, WIDTH)[:, None, :],
    ],
)
def test_an_unknown_use_is_missed(forward: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Holder(WIDTH, WIDTH)
    missed, complete = seen(model, lambda x: forward(model.weight, x), torch.randn(3, 2, WIDTH))
    assert missed == {"weight"}
    assert not complete


def test_an_input_that_is_overwritten_is_missed() -> None:
    model = nn.Linear(WIDTH, WIDTH)

    def forward(x: Tensor) -> Tensor:
        hidden = x * 1
        result = model(hidden)
        hidden.zero_()
        return result

    assert seen(model, forward, torch.randn(ROWS, LENGTH, WIDTH))[0] == {"weight", "bias"}


def test_an_output_may_be_changed_in_place() -> None:
    model = nn.Linear(WIDTH, 1)
    missed, complete = seen(model, lambda x: model(x).mul_(3.0), torch.randn(ROWS, LENGTH, WIDTH))
    assert not missed
    assert complete["bias"][0].right[0].tolist() == [[3.0]] * LENGTH


def test_a_use_that_does_not_reach_the_loss_counts_nothing() -> None:
    model = Holder(WIDTH, WIDTH)

    def forward(x: Tensor) -> Tensor:
        F.linear(x, model.weight)
        return F.linear(x, model.weight)

    missed, complete = seen(model, forward, torch.randn(ROWS, LENGTH, WIDTH))
    assert not missed
    assert len(complete["weight"]) == 1


@pytest.mark.parametrize("function", [lambda w: 1.0 + w, lambda w: w.exp() / 2, lambda w: (w * 3 - 1).view(1, -1)])
def test_a_vector_made_from_one_parameter_goes_back_to_it(function: Callable[[Tensor], Tensor]) -> None:
    model, x = Holder(WIDTH), torch.randn(ROWS, LENGTH, WIDTH)
    missed, complete = seen(model, lambda x: x * function(model.weight), x)
    assert not missed
    (use,) = complete["weight"]
    got = torch.stack([use.source.back(piece.sum(dim=0)) for piece in use.right])
    for row, gradient in zip(x, got, strict=True):
        (wanted,) = torch.autograd.grad((row * function(model.weight)).sum(), model.weight)
        torch.testing.assert_close(gradient, wanted)


def test_a_detached_copy_is_no_use() -> None:
    model = Holder(WIDTH)
    missed, complete = seen(model, lambda x: x.requires_grad_() * model.weight.detach(), torch.randn(1, 2, WIDTH))
    assert not missed
    assert not complete
