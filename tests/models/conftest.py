"""A tiny encoder from nothing, and the parts that its tests share."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from retain.data.rendering import Renderer
from retain.models.encoder import EncoderFamily
from retain.types import Batch, Example, Message, Task

TEXTS = ["the sky is blue", "a leaf is green and wet", "blood is red", "the dog barks at the old cat", "nobody knows"]


@dataclass
class Encoder:
    """A family, its model and its renderer."""

    family: EncoderFamily
    model: nn.Module
    renderer: Renderer

    def equip(self, *tasks: Task, **options: Any) -> "Encoder":
        """With heads for the tasks."""
        self.model = self.family.equip(self.model, self.renderer, tasks, **{"seed": 0, **options})
        return self

    def prepare(self, task: Task, seed: int = 0) -> "Encoder":
        """With rows for the task."""
        self.model = self.family.prepare(self.model, self.renderer, task, seed=seed)
        return self

    def batch(self, examples: Sequence[Example], draw: str = "0") -> Batch:
        """Rows as training reads them."""
        rows = [self.family.encode(example, self.renderer) for example in examples]
        varied = [self.family.vary(row, self.renderer, draw=draw) for row in rows]
        return self.family.collate(varied, self.renderer.tokenizer, packed=False)


def labelled(task: str, rows: Sequence[tuple[str, str]], metric: str = "accuracy", **more: Any) -> Task:
    """A task of (text, answer) rows."""
    examples = tuple(
        Example(id=f"{task} {i}", task=task, messages=(Message("user", text), Message("assistant", answer)))
        for i, (text, answer) in enumerate(rows)
    )
    return Task(name=task, train=examples, test=examples, metric=metric, **more)


def make_tasks() -> dict[str, Task]:
    """One of each kind, and a second one of single labels."""
    return {
        "colours": labelled(
            "colours", [("sky", "blue"), ("leaf is wet", "green"), ("the sea", "blue"), ("a frog", "green")]
        ),
        "animals": labelled(
            "animals", [("barks", "dog"), ("meows", "cat"), ("old bone", "dog"), ("the mouse", "cat")]
        ),
        "topics": labelled(
            "topics", [("sky", '["air", "blue"]'), ("sea is wet", '["blue", "water"]'), ("nobody", "[]")],
            "label_f1", choices=("air", "blue", "water"),
        ),
        "tags": labelled(
            "tags", [("An lives here", "B-who O O"), ("the old cat knows Anna", "O O O O B-who")],
            "tag_f1", choices=("O", "B-who", "I-who"),
        ),
        "text": Task("text", tuple(Example(str(i), text=text) for i, text in enumerate(TEXTS)), metric="perplexity"),
    }  # fmt: skip


@pytest.fixture
def tasks() -> dict[str, Task]:
    return make_tasks()


@pytest.fixture(scope="session")
def made_encoders() -> dict[str, tuple[nn.Module, Any]]:
    return {}


@pytest.fixture
def build_encoder(made_encoders: dict[str, tuple[nn.Module, Any]]) -> Callable[..., Encoder]:
    """Makes a tiny encoder; the same fields give the same weights."""

    def build(architecture: str = "bert", **fields: Any) -> Encoder:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
        family = EncoderFamily(architecture=architecture, **{**sizes, "max_position_embeddings": 64, **fields})
        if architecture not in made_encoders:
            made_encoders[architecture] = family.create(make_tasks()["text"].train, seed=0)
        model, tokenizer = deepcopy(made_encoders[architecture])
        return Encoder(family, model, Renderer(tokenizer))

    return build


@pytest.fixture
def encoder(build_encoder: Callable[..., Encoder]) -> Encoder:
    return build_encoder()


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)
