"""The chunked loss against plain logits, in float64."""

import pytest
import torch
from torch.nn import functional as F

from retain.kernels.cross_entropy import chunked_cross_entropy, target_nats

CAP = 3.0


def make(*, bias: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Linear]:
    torch.manual_seed(0)
    hidden = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(8, 50, bias=bias, dtype=torch.float64)
    return hidden, torch.randint(0, 50, (37,)), head


@pytest.mark.parametrize("chunk", [1, 5, 37, 100])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_plain_logits(chunk: int, capped: bool, weighted: bool) -> None:
    hidden, targets, head = make(bias=capped)
    weights = torch.rand(37, dtype=torch.float64) if weighted else None

    def capped_head(rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(head(rows) / CAP) * CAP

    chosen = capped_head if capped else head
    plain = F.cross_entropy(chosen(hidden), targets, reduction="none")
    expected = (plain * weights).sum() if weights is not None else plain.sum()
    wanted = torch.autograd.grad(expected, [hidden, *head.parameters()])
    loss = chunked_cross_entropy(
        hidden, targets, chosen, weights=weights, weight=None if capped else head.weight, chunk=chunk
    )
    got = torch.autograd.grad(loss, [hidden, *head.parameters()])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_no_targets_is_a_zero_that_has_a_gradient() -> None:
    hidden, _, head = make()
    loss = chunked_cross_entropy(hidden[:0], torch.zeros(0, dtype=torch.long), head, weight=head.weight)
    loss.backward()
    assert loss.item() == 0.0


def test_never_holds_more_logits_than_a_chunk() -> None:
    hidden, targets, head = make()
    seen: list[int] = []

    def watched(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return head(rows)

    target_nats(hidden, targets, watched, chunk=10).sum().backward()
    assert max(seen) == 10
    assert sum(seen) == 2 * 37  # forward, and once more in backward
