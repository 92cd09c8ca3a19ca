"""Sums in chunks against the sum at once: values, gradients, and what exists at a time."""

import pytest
import torch
from torch import Tensor, nn

from retain.kernels.chunks import LOGITS_PER_CHUNK, rows_at_once, slices, summed_in_chunks


def test_every_row_is_in_one_chunk() -> None:
    assert [(part.start, part.stop) for part in slices(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert list(slices(0, 3)) == []


def test_rows_at_once_follow_from_the_vocabulary() -> None:
    hidden = torch.zeros(1, 2)
    assert rows_at_once(hidden, lambda rows: rows.new_zeros(len(rows), 2**20)) == LOGITS_PER_CHUNK // 2**20
    assert rows_at_once(hidden, lambda rows: rows.new_empty(len(rows), 1).expand(-1, 2**25)) == 16


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_nothing(chunk: int) -> None:
    torch.manual_seed(0)
    head, other = nn.Linear(4, 11).double(), nn.Linear(2, 2).double()
    head.bias.requires_grad_(False)
    weights = torch.rand(7, dtype=torch.float64)
    hidden = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    sizes: list[int] = []

    def term(rows: Tensor, part: slice) -> Tensor:
        sizes.append(len(rows))
        return (weights[part] * head(rows).logsumexp(-1)).sum()

    moving = [head.weight, other.weight, head.bias]
    value = 3 * summed_in_chunks(term, hidden * 1, moving, chunk=chunk)
    assert max(sizes) == min(chunk, 7)
    assert len(sizes) == -(-7 // chunk)
    expected = 3 * (weights * head(hidden).logsumexp(-1)).sum()
    torch.testing.assert_close(value, expected)
    for one, wanted in zip(*(torch.autograd.grad(v, [hidden, head.weight]) for v in (value, expected)), strict=True):
        torch.testing.assert_close(one, wanted)
    with torch.no_grad():
        torch.testing.assert_close(3 * summed_in_chunks(term, hidden, moving, chunk=chunk), expected)


def test_a_head_of_which_nothing_moves() -> None:
    hidden = torch.randn(5, 3, requires_grad=True)
    summed_in_chunks(lambda rows, part: rows.square().sum(), hidden, [], chunk=2).backward()
    torch.testing.assert_close(hidden.grad, 2 * hidden.detach())


def test_no_rows_are_zero() -> None:
    value = summed_in_chunks(lambda rows, part: rows.sum(), torch.zeros(0, 3, requires_grad=True), [], chunk=2)
    value.backward()
    assert float(value.detach()) == 0
