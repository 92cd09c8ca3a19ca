"""A task of toys: what a strategy is given, without families, tokenizers or methods."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain.data.rendering import Renderer
from retain.methods.full import Full
from retain.models.encoder import EncoderFamily
from retain.strategies.strategy import ModelOutputs
from retain.task_view import BoundTask
from retain.types import IGNORED, Batch, Example, Message, Task


@dataclass(frozen=True)
class ToyOutputs:
    """A pass's logits at the counted targets."""

    at_targets: Tensor
    classes: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        return self.at_targets

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def logits(self) -> Tensor:
        return self.at_targets


class NoMethod:
    """Everything moves, and the base cannot be had back."""

    can_detach = False

    def detached(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        return nullcontext(model)

    def low_rank(self, model: nn.Module) -> Sequence[Any]:
        return ()


@dataclass(frozen=True)
class ToyTask:
    """A `TaskView` over rows that are given as tensors.

    Args:
        name, examples, seed: as in `TaskView`.
        inputs: (length, width) of each example, by id.
        targets: (length,) of each example, by id.
        batch_size: rows of a batch.
        tokens: what `num_tokens` says of an example, by id; its length otherwise.
    """

    name: str
    examples: Sequence[Example]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    batch_size: int = 32
    tokens: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    method: Any = field(default_factory=NoMethod)

    def num_tokens(self, example: Example) -> int:
        return self.tokens.get(example.id, 0) or len(self.targets[example.id])

    def batches(self, examples: Sequence[Example], *, max_tokens: int | None = None) -> Iterator[Batch]:
        for at in range(0, len(examples), self.batch_size):
            rows = list(examples)[at : at + self.batch_size]
            length = max(len(self.targets[row.id]) for row in rows)
            width = next(iter(self.inputs.values())).shape[-1]
            x = torch.zeros(len(rows), length, width, dtype=torch.float64)
            targets, owners = torch.full((len(rows), length), IGNORED), torch.full((len(rows), length), -1)
            for index, row in enumerate(rows):
                size = len(self.targets[row.id])
                x[index, :size], targets[index, :size] = self.inputs[row.id], self.targets[row.id]
                owners[index, :size] = index
            weights = torch.ones(int((targets != IGNORED).sum()), dtype=torch.float64)
            for index, row in enumerate(rows):
                weights[owners[targets != IGNORED] == index] = row.weight
            yield Batch({"x": x}, targets, owners, weights, tuple(rows))

    def forward(self, model: nn.Module, batch: Batch) -> ToyOutputs:
        return ToyOutputs(model(batch.inputs["x"])[batch.counted])

    def loss(self, outputs: ModelOutputs, batch: Batch) -> Tensor:
        nats = F.cross_entropy(outputs.logits(), batch.targets[batch.counted], reduction="none")
        return (nats * batch.weights).sum()

    def embed(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        with torch.no_grad():
            return torch.stack([model(self.inputs[row.id]).mean(dim=0) for row in examples]).float()

    def generate(self, model: nn.Module, prompts: Sequence[Example], *, max_new_tokens: int) -> list[str]:
        raise NotImplementedError


def make_toy_task(
    name: str = "toy",
    *,
    num: int = 40,
    width: int = 3,
    classes: int = 4,
    length: int = 1,
    data_seed: int = 0,
    **options: Any,
) -> ToyTask:
    """Random features with random labels."""
    generator = torch.Generator().manual_seed(data_seed)
    examples = tuple(Example(id=f"{name} {index}", text=f"{name} {index}", task=name) for index in range(num))
    inputs = {e.id: torch.randn(length, width, generator=generator, dtype=torch.float64) for e in examples}
    targets = {e.id: torch.randint(0, classes, (length,), generator=generator) for e in examples}
    return ToyTask(name, examples, inputs, targets, **options)


def make_learnable_task(name: str, seed: int) -> ToyTask:
    """Labels that a linear rule gives, a different one for each task, on features of its own."""
    task = make_toy_task(name, num=200, width=12, classes=4, data_seed=seed, batch_size=200)
    torch.manual_seed(seed)
    rule, used = torch.randn(12, 4).double(), torch.zeros(12).double()
    used[torch.randperm(12)[:6]] = 1.0
    for example in task.examples:
        task.inputs[example.id] *= used
        task.targets[example.id] = (task.inputs[example.id] @ rule).argmax(-1)
    return task


def make_text_task(name: str, sizes: Sequence[int], *, seed: int = 0, start: int = 0) -> ToyTask:
    """Rows that have nothing but an id and a number of tokens."""
    examples = tuple(
        Example(id=f"{name} {start + i}", text=f"{name} {start + i}", task=name) for i in range(len(sizes))
    )
    return ToyTask(name, examples, tokens={e.id: size for e, size in zip(examples, sizes, strict=True)}, seed=seed)


class Classes:
    """A tiny encoder that learns two tasks of labels, the second with new ones."""

    def __init__(self, metric: str = "accuracy", heads: Any = "shared") -> None:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
        self.family = EncoderFamily(architecture="bert", heads=heads, max_position_embeddings=32, **sizes)
        names = {"old": ("blue", "green"), "new": ("dog", "cat", "cow")}
        self.tasks = {task: self.task(task, labels, metric) for task, labels in names.items()}
        rows = [row for task in self.tasks.values() for row in task.train]
        network, tokenizer = self.family.create(rows, seed=0)
        self.renderer = Renderer(tokenizer)
        self.model = self.family.equip(network, self.renderer, list(self.tasks.values()), seed=0).double()

    def task(self, name: str, labels: Sequence[str], metric: str) -> Task:
        rows = [
            Example(
                f"{name} {i}", (Message("user", f"{name} text {i}"), Message("assistant", label)), task=name,
                source="task" if name == "new" else "replay",
            )
            for i, label in enumerate([json.dumps([x]) if metric == "label_f1" else x for x in labels] * 3)
        ]  # fmt: skip
        return Task(name, tuple(rows), metric=metric, choices=tuple(labels))

    def view(self, name: str) -> BoundTask:
        self.family.prepare(self.model, self.renderer, self.tasks[name], seed=0)
        return BoundTask(
            name=name, examples=self.tasks[name].train, family=self.family, renderer=self.renderer, method=Full(),
            max_length=32, max_tokens=9999, packed=False, precision="fp32",
        )  # fmt: skip

    def shift(self) -> None:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)

    def new_rows(self) -> list[Tensor]:
        """The gradients of the rows that only the new task's classes have."""
        return [parameter.grad[2:] for parameter in self.model.classifier.parameters()]


@pytest.fixture
def classes() -> type[Classes]:
    return Classes


@pytest.fixture
def toy_task() -> Callable[..., ToyTask]:
    return make_toy_task


@pytest.fixture
def learnable_task() -> Callable[..., ToyTask]:
    return make_learnable_task


@pytest.fixture
def text_task() -> Callable[..., ToyTask]:
    return make_text_task
