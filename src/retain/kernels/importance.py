"""How much a task depends on each weight: means over the task's examples, in evaluation mode."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from retain import distributed
from retain.kernels.fisher import Kind, add_fisher, at_least_float
from retain.kernels.per_example import Sums, absolute_gradients, zero_sums
from retain.parameters import differentiating
from retain.types import Batch, Example

__all__ = ["Passes", "diagonal_fisher", "mean_over_examples", "output_sensitivity"]

log = logging.getLogger("retain")

TOKENS_PER_PASS = 1024
"""Tokens of a pass: its logits exist whole, so it must be smaller than a training pass."""


class HasLogits(Protocol):
    """What a forward pass gives."""

    def logits(self) -> Tensor:
        """(num_targets, vocabulary)."""
        ...


class Passes(Protocol):
    """What is needed of a task: rows, a seed, and forward passes (`strategies.TaskView` has them)."""

    @property
    def name(self) -> str:
        """The task's name."""
        ...

    @property
    def examples(self) -> Sequence[Example]:
        """The task's rows."""
        ...

    @property
    def seed(self) -> int:
        """The run's seed."""
        ...

    def batches(self, examples: Sequence[Example], *, max_tokens: int | None = None) -> Iterator[Batch]:
        """This process's share of the examples as micro-batches."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> HasLogits:
        """One pass."""
        ...


def mean_over_examples(
    model: nn.Module, task: Passes, add: Callable[[Batch, dict[str, Tensor]], Sums | None], *, num_samples: int
) -> dict[str, Tensor]:
    """The mean over a sample of a task's examples, of all processes, of what `add` adds up.

    Args:
        model: in any mode; it comes back in the same, and so does the random state.
        task: gives rows, passes and the seed; every process takes its share of the rows.
        add: adds a batch's sum over its examples to the sums that it is given. Where it tells that hooks were not
            enough, the log does.
        num_samples: rows, drawn without replacement from the seed; all of them if there are fewer.

    Returns:
        by parameter name, for what moves, in float32 at least.
    """
    generator = random.Random(f"{task.seed}/{task.name}")
    examples = generator.sample(task.examples, min(num_samples, len(task.examples)))
    sums = zero_sums(model)
    num = 0
    engines: set[str] = set()
    with differentiating(model):
        for batch in task.batches(examples, max_tokens=TOKENS_PER_PASS):
            if found := add(batch, sums):
                engines.add(found.engine if not found.apart else f"torch.func for {', '.join(found.apart)}")
            num += len(batch.examples)
    if engines - {"hooks"}:
        said = ", ".join(sorted(engines)).replace("loop", "one pass an example, which is slow")
        log.info("per-example gradients of %s: %s", task.name, said)
    distributed.sum_tensors(list(sums.values()))
    count = max(distributed.sum_number(num), 1.0)
    return {name: value.div_(count) for name, value in sums.items()}


def diagonal_fisher(
    model: nn.Module, task: Passes, *, kind: Kind = "sampled", num_samples: int = 200
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of a task, a mean over its examples.

    Args:
        model: at the weights that the task ended with.
        task: gives rows, passes and the seed.
        kind: how the expectation over targets is taken; see `kernels.fisher`.
        num_samples: rows that it is estimated from.

    Returns:
        by parameter name, in float32 at least.
    """

    def add(batch: Batch, sums: dict[str, Tensor]) -> Sums | None:
        return add_fisher(
            model, batch, lambda part: task.forward(model, part).logits(), kind=kind, seed=task.seed, into=sums
        )

    return mean_over_examples(model, task, add, num_samples=num_samples)


def output_sensitivity(model: nn.Module, task: Passes, *, num_samples: int = 200) -> dict[str, Tensor]:
    """How much each weight changes a task's outputs: the mean over examples of |d sum_t |f_t(x)|^2 / d theta|.

    f_t(x) are the logits at target t, and |.|^2 is the sum of their squares. The absolute value is of one example's
    gradient, never of a batch's: gradients of examples that disagree would cancel. A target of weight w counts w times,
    as in the loss.

    Args:
        model: at the weights that the task ended with.
        task: gives rows, passes and the seed. No label is read.
        num_samples: rows that it is estimated from.

    Returns:
        by parameter name, in float32 at least.

    Source: Aljundi et al. 2018, https://arxiv.org/abs/1711.09601, eq. 2 and 5.
    """

    def squared_length(batch: Batch) -> Tensor:
        logits = at_least_float(task.forward(model, batch).logits())  # (num_targets, vocabulary)
        return batch.weights.to(logits.dtype) * logits.square().sum(dim=-1)

    def add(batch: Batch, sums: dict[str, Tensor]) -> Sums:
        return absolute_gradients(model, batch, squared_length, into=sums)

    return mean_over_examples(model, task, add, num_samples=num_samples)
