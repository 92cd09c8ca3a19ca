"""The distillation term against the KL of two tables, its closed-form gradient."""

import math

import pytest
import torch
from torch import Tensor

from retain.kernels.distillation import distillation_nats


def draw(num: int = 7, vocabulary: int = 11, *, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_of_two_hand_made_tables() -> None:
    teacher, model = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    nats = distillation_nats(model.log(), teacher.log())
    assert float(nats) == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.5))


def test_the_teacher_comes_first() -> None:
    """KL(teacher || model) is infinite where the model rules out what the teacher expects, and not the reverse."""
    flat, sharp = torch.tensor([[0.0, 0.0]]), torch.tensor([[50.0, 0.0]])
    assert float(distillation_nats(sharp, flat)) == pytest.approx(25 - math.log(2))
    assert float(distillation_nats(flat, sharp)) == pytest.approx(math.log(2))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_the_gradient_is_the_temperature_times_the_difference(temperature: float) -> None:
    logits, teacher = draw().requires_grad_(), draw(seed=1)
    distillation_nats(logits, teacher, temperature=temperature).sum().backward()
    q, p = ((x.detach() / temperature).softmax(-1) for x in (logits, teacher))
    torch.testing.assert_close(logits.grad, temperature * (q - p))


def test_nothing_where_the_models_agree() -> None:
    logits = draw().requires_grad_()
    nats = distillation_nats(logits, logits.detach().clone(), temperature=2.0)
    nats.sum().backward()
    assert torch.equal(nats, torch.zeros_like(nats))
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-15)


def test_a_constant_added_to_all_logits_means_nothing() -> None:
    logits, teacher = draw(), draw(seed=1)
    torch.testing.assert_close(distillation_nats(logits + 9, teacher - 4), distillation_nats(logits, teacher))


def test_the_teacher_gets_no_gradient() -> None:
    logits, teacher = draw().requires_grad_(), draw(seed=1).requires_grad_()
    distillation_nats(logits, teacher).sum().backward()
    assert teacher.grad is None


def test_small_types_are_summed_in_float32() -> None:
    logits, teacher = draw().bfloat16(), draw(seed=1).bfloat16()
    nats = distillation_nats(logits, teacher)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, distillation_nats(logits.double(), teacher.double()).float(), rtol=1e-5, atol=1e-6)
