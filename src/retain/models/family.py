"""What a network generation must answer, so that one loop trains them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from retain.data.rendering import Renderer
from retain.errors import CompatibilityError
from retain.types import GREEDY, Batch, Encoded, Example, Message, Sampling, Task

__all__ = ["Family", "Outputs", "Tokenizer", "cannot_count", "cannot_pack", "pretrained"]

Tokenizer = Any
"""A `transformers` tokenizer (they share no typed base that pyright can see through)."""


def pretrained(model: nn.Module) -> PreTrainedModel:
    """The model with what `transformers` gives it; a wrapper of PEFT's passes all of that on."""
    return cast("PreTrainedModel", model)


def cannot_count(what: str) -> CompatibilityError:
    """The error of `fit` for a kind of model that learns by gradients."""
    return CompatibilityError(f"{what} cannot be fitted by counting", hint="train it with `retain train`")


def cannot_pack(what: str) -> CompatibilityError:
    """The error of `collate` for a kind of model whose packed documents would see one another."""
    return CompatibilityError(f"{what} cannot read packed documents apart", hint="set train.packing to never")


@dataclass(frozen=True)
class Outputs:
    """One forward pass, stopped before the output head.

    Args:
        hidden: (num_targets, width), the head's input at the counted targets only, in row-major order.
        head: (n, width) -> (n, vocabulary), the head with all that the model does to its logits (soft caps, scales).
        weight: (vocabulary, width), the head's weight where the head is nothing but a matrix product, else None.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    weight: Tensor | None = None

    def logits(self) -> Tensor:
        """(num_targets, vocabulary), of the same pass; made only when asked."""
        return self.head(self.hidden)


class Family(Protocol):
    """One network generation, bound to nothing: models and tokenizers are passed in."""

    name: ClassVar[str]
    isolates_documents: ClassVar[bool]  # may documents be packed into one row without seeing one another?
    needs_gradients: ClassVar[bool]  # False: `fit` learns by counting, instead of the loop
    generates: ClassVar[bool]  # does it write text? If not, there are no probes, no KL and no text of its own

    @property
    def architecture(self) -> str:
        """What `create` makes, as its configuration's `model_type` or cell; empty where a model must be named."""
        ...

    def create(self, examples: Sequence[Example], *, seed: int) -> tuple[nn.Module, Tokenizer]:
        """A random model of `architecture`, float32 and in evaluation mode, and a tokenizer learned on the examples."""
        ...

    def load(self, folder: Path, **options: Any) -> tuple[nn.Module, Tokenizer]:
        """The model (float32, in evaluation mode) and its tokenizer from a folder that `models.hub` resolved."""
        ...

    def equip(
        self, model: nn.Module, renderer: Renderer, tasks: Sequence[Task], *, seed: int, saved: Path | None = None
    ) -> nn.Module:
        """Give a base model the heads that all these tasks need; called before a method is applied.

        Args:
            model: as `load` or `create` made it.
            renderer: is given the labels that the model knows.
            tasks: that the model has learned or will learn.
            seed: of new weights.
            saved: the weights' folder of the stage that is loaded into the model next.
        """
        ...

    def prepare(self, model: nn.Module, renderer: Renderer, task: Task, *, seed: int) -> nn.Module:
        """Grow what the next task needs, in place: rows for new classes; called before its optimizer is made.

        Args:
            model: with the method applied.
            renderer: is given the task's labels.
            task: that is learned next.
            seed: of the new rows.
        """
        ...

    def encode(self, example: Example, renderer: Renderer) -> Encoded:
        """Ids and targets of one example, from the one renderer."""
        ...

    def vary(self, row: Encoded, renderer: Renderer, *, draw: str) -> Encoded:
        """The row as one epoch reads it: what is drawn at random for a row is drawn anew, by `draw` and the row."""
        ...

    def collate(self, rows: Sequence[Encoded], tokenizer: Tokenizer, *, packed: bool) -> Batch:
        """One micro-batch: one row without padding where packed, else padded rows."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """One pass through the outermost module, the output head intercepted."""
        ...

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Nats, weighted and summed over the counted targets; in chunks, the head at targets only."""
        ...

    def loglikelihood(
        self, model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[float]:
        """Log p(continuation | context) in nats, of token ids, for every pair; shared contexts are read once."""
        ...

    def choose(
        self, model: nn.Module, renderer: Renderer, rows: Sequence[tuple[Sequence[Message], Sequence[str]]]
    ) -> list[list[float]]:
        """Log p of each row's labels after its prompt, nats: what says which label the model chooses."""
        ...

    def answer(
        self,
        model: nn.Module,
        renderer: Renderer,
        prompts: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """What the model says to each conversation."""
        ...

    def generate(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The continuation of every prompt, without the stop token."""
        ...

    def fit(self, model: nn.Module, examples: Sequence[Example], renderer: Renderer) -> None:
        """Learn by counting; only of families that have no gradients."""
        ...
