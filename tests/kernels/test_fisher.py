"""The three Fishers against closed forms and full enumeration, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain.errors import CompatibilityError
from retain.kernels import fisher
from retain.kernels.fisher import Kind, add_fisher
from retain.kernels.per_example import zero_sums
from retain.types import IGNORED, Batch, Example

NUM, WIDTH, CLASSES = 24, 3, 4


@pytest.fixture
def softmax_regression() -> tuple[nn.Module, Batch]:
    """One target a row, a third of the labels wrong."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    x = torch.randn(NUM, 1, WIDTH, dtype=torch.float64)
    labels = model(x).argmax(-1)
    labels[::3] = (labels[::3] + 1) % CLASSES
    return model, rows_of(x, labels)


def rows_of(x: Tensor, labels: Tensor) -> Batch:
    owners = torch.arange(len(x))[:, None].expand(labels.shape)
    examples = tuple(Example(id=f"row {index}") for index in range(len(x)))
    return Batch({"x": x}, labels, owners, torch.ones(int((labels != IGNORED).sum()), dtype=torch.float64), examples)


def part_of(batch: Batch, rows: slice) -> Batch:
    x, labels = batch.inputs["x"][rows], batch.targets[rows]
    weights = batch.weights[(batch.counted.nonzero()[:, 0] >= rows.start) & (batch.counted.nonzero()[:, 0] < rows.stop)]
    return replace(rows_of(x, labels), examples=batch.examples[rows], weights=weights)


def of(model: nn.Module, batch: Batch, kind: Kind, *, seed: int = 0) -> dict[str, Tensor]:
    sums = zero_sums(model)
    add_fisher(model, batch, lambda part: model(part.inputs["x"])[part.counted], kind=kind, seed=seed, into=sums)
    return sums


def outer(residual: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Sum of squares of residual[k] * x[i] over rows."""
    return {"weight": torch.einsum("nk,ni->ki", residual**2, x**2), "bias": (residual**2).sum(0)}


def test_exact_is_the_closed_form(softmax_regression: tuple[nn.Module, Batch]) -> None:
    """F_ki = sum over rows of p_k (1 - p_k) x_i^2."""
    model, batch = softmax_regression
    x = batch.inputs["x"][:, 0]
    p = model(x).softmax(-1).detach()
    wanted = {"weight": torch.einsum("nk,ni->ki", p * (1 - p), x**2), "bias": (p * (1 - p)).sum(0)}
    got = of(model, batch, "exact")
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)


def test_empirical_is_the_closed_form(softmax_regression: tuple[nn.Module, Batch]) -> None:
    """F_ki = sum over rows of (p_k - [y = k])^2 x_i^2; with wrong labels it is not the exact one."""
    model, batch = softmax_regression
    x = batch.inputs["x"][:, 0]
    wanted = outer(model(x).softmax(-1).detach() - F.one_hot(batch.targets[:, 0], CLASSES), x)
    got = of(model, batch, "empirical")
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)
    assert float((got["weight"] / of(model, batch, "exact")["weight"]).max()) > 1.2


def test_sampled_is_exact_in_the_mean(softmax_regression: tuple[nn.Module, Batch]) -> None:
    model, batch = softmax_regression
    exact = of(model, batch, "exact")
    draws = [of(model, batch, "sampled", seed=seed) for seed in range(400)]
    for name, value in exact.items():
        values = torch.stack([draw[name] for draw in draws])
        error = values.std(dim=0) / len(draws) ** 0.5
        z = (values.mean(dim=0) - value) / error
        assert float(z.abs().max()) < 4  # 16 figures: a fair sampler fails once in a thousand
        assert float(z.square().mean()) < 2.5


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("size", [1, 7])
def test_the_batch_size_changes_nothing(softmax_regression: tuple[nn.Module, Batch], kind: Kind, size: int) -> None:
    model, batch = softmax_regression
    whole = of(model, batch, kind)
    parts = [of(model, part_of(batch, slice(at, at + size)), kind) for at in range(0, NUM, size)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-9, atol=1e-12)


class TwoTargets(nn.Module):
    """A recurrent net: its second output depends on the parameters through the first, so that scores share weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, 2, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.inner(x[:, :1]))
        return self.head(torch.cat([first, torch.tanh(self.inner(x[:, 1:] + first))], dim=1))


@pytest.fixture
def sequences() -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    return TwoTargets(), rows_of(torch.randn(5, 2, WIDTH, dtype=torch.float64), torch.randint(0, 2, (5, 2)))


def enumerated(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """E over all label sequences of the square of the summed score."""
    total = zero_sums(model)
    for row, labels in itertools.product(range(len(batch.targets)), itertools.product(range(2), repeat=2)):
        x = batch.inputs["x"][row : row + 1]
        likelihood = F.log_softmax(model(x)[0], dim=-1)[range(2), labels].sum()
        gradients = torch.autograd.grad(likelihood, list(model.parameters()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += likelihood.exp().detach() * gradient**2
    return total


def test_exact_of_a_sequence_is_the_expectation_over_all_label_sequences(sequences: tuple[nn.Module, Batch]) -> None:
    model, batch = sequences
    for name, value in enumerated(model, batch).items():
        torch.testing.assert_close(of(model, batch, "exact")[name], value, rtol=1e-9, atol=1e-12)


def test_empirical_of_a_sequence_squares_the_sum_over_its_tokens(sequences: tuple[nn.Module, Batch]) -> None:
    model, batch = sequences
    got = of(model, batch, "empirical")
    per_sequence, per_token = zero_sums(model), zero_sums(model)
    for x, labels in zip(batch.inputs["x"], batch.targets, strict=True):
        terms = F.cross_entropy(model(x[None])[0], labels, reduction="none")
        for sums, losses in ((per_sequence, [terms.sum()]), (per_token, terms)):
            for loss in losses:
                for name, gradient in zip(
                    sums, torch.autograd.grad(loss, list(model.parameters()), retain_graph=True), strict=True
                ):
                    sums[name] += gradient**2
    for name, value in per_sequence.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)
        assert float((per_token[name] - value).abs().max()) > 1e-3  # another quantity


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
def test_a_weight_counts_as_in_the_loss(softmax_regression: tuple[nn.Module, Batch], kind: Kind) -> None:
    model, batch = softmax_regression
    twice = of(model, replace(batch, weights=2 * batch.weights), kind)
    for name, value in of(model, batch, kind).items():
        torch.testing.assert_close(twice[name], 2 * value)


def test_a_target_that_is_not_counted_changes_nothing(sequences: tuple[nn.Module, Batch]) -> None:
    model, batch = sequences
    targets = batch.targets.clone()
    targets[:, 1] = IGNORED
    first = replace(batch, targets=targets, weights=batch.weights[: len(targets)])
    alone = rows_of(batch.inputs["x"], targets)
    for kind in ("sampled", "exact", "empirical"):
        for name, value in of(model, first, kind).items():
            torch.testing.assert_close(value, of(model, alone, kind)[name])


def test_draws_depend_on_the_example_and_the_seed_alone() -> None:
    torch.manual_seed(0)
    batch = rows_of(torch.zeros(6, 8, 1), torch.zeros(6, 8, dtype=torch.long))
    logits = torch.randn(48, 5)
    torch.manual_seed(1)
    drawn = fisher.draw(logits, batch, 0)
    assert fisher.draw(logits[8:24], part_of(batch, slice(1, 3)), 0).tolist() == drawn[8:24].tolist()
    assert fisher.draw(logits, batch, 1).tolist() != drawn.tolist()
    state = torch.get_rng_state()
    fisher.draw(logits, batch, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_draws_stay_within_the_vocabulary() -> None:
    batch = rows_of(torch.zeros(500, 1, 1), torch.zeros(500, 1, dtype=torch.long))
    certain = torch.full((500, 3), -1e9)
    certain[:, 2] = 0.0
    assert fisher.draw(certain, batch, 0).tolist() == [2] * 500


def test_exact_refuses_a_large_vocabulary(
    monkeypatch: pytest.MonkeyPatch, softmax_regression: tuple[nn.Module, Batch]
) -> None:
    monkeypatch.setattr(fisher, "MAX_EXACT_PASSES", CLASSES - 1)
    with pytest.raises(CompatibilityError, match="sampled"):
        of(*softmax_regression, "exact")


@pytest.mark.parametrize("kind", ["sampled", "exact", "empirical"])
def test_a_batch_without_targets_adds_nothing(kind: Kind) -> None:
    model = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    batch = rows_of(torch.randn(2, 1, WIDTH, dtype=torch.float64), torch.full((2, 1), IGNORED))
    assert all(float(value.sum()) == 0 for value in of(model, batch, kind).values())
