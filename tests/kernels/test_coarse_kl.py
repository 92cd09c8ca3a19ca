import pytest
import torch

from retain.kernels.coarse_kl import coarse_kl, coarsened, likeliest


def logits(seed: int, vocabulary: int = 11) -> torch.Tensor:
    return torch.randn(5, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("top", [1, 3, 10, 11, 64])
def test_buckets_are_summed_by_hand(top: int) -> None:
    old, new = logits(0), logits(1)
    ids, log_p, rest = likeliest(old, top)
    found = coarse_kl(log_p, rest, *coarsened(new, ids))
    p, q = old.softmax(-1), new.softmax(-1)
    for row in range(len(p)):
        order = p[row].argsort(descending=True)
        kept, others = order[:top], order[top:]
        buckets = [(p[row, i], q[row, i]) for i in kept]
        buckets += [(p[row, others].sum(), q[row, others].sum())] if len(others) else []
        assert float(found[row]) == pytest.approx(sum(float(a * (a / b).log()) for a, b in buckets), abs=1e-12)
    whole = (p * (p / q).log()).sum(-1)
    assert bool((found <= whole + 1e-12).all())
    if top >= 11:
        torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("top", [2, 11])
def test_zero_with_zero_gradient_at_the_old_model(top: int) -> None:
    old = logits(2)
    ids, log_p, rest = likeliest(old, top)
    new = old.clone().requires_grad_()
    value = coarse_kl(log_p, rest, *coarsened(new, ids)).sum()
    value.backward()
    assert abs(value.item()) < 1e-14
    assert new.grad is not None
    assert float(new.grad.abs().max()) < 1e-14


def test_the_gradient_is_q_minus_p_where_nothing_is_left_out() -> None:
    old, new = logits(3), logits(4).requires_grad_()
    ids, log_p, rest = likeliest(old, 11)
    coarse_kl(log_p, rest, *coarsened(new, ids)).sum().backward()
    torch.testing.assert_close(new.grad, new.detach().softmax(-1) - old.softmax(-1))


@pytest.mark.parametrize("top", [3, 11])
def test_the_gradient_is_right(top: int) -> None:
    ids, log_p, rest = likeliest(logits(5), top)
    new = logits(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: coarse_kl(log_p, rest, *coarsened(x, ids)), new)


def test_small_types_are_read_in_float32() -> None:
    _, log_p, rest = likeliest(logits(7).bfloat16(), 3)
    assert log_p.dtype == rest.dtype == torch.float32
