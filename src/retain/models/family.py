"""What a network generation must answer, so that one loop trains them all."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from retain.data.labels import Labels
from retain.data.packing import pack, pad
from retain.data.rendering import Renderer
from retain.errors import CompatibilityError
from retain.kernels.cross_entropy import chunked_cross_entropy
from retain.types import GREEDY, Batch, Encoded, Example, Message, Sampling, Task

__all__ = ["Family", "Outputs", "Tokenizer", "pretrained"]

Tokenizer = Any
"""A `transformers` tokenizer (they share no typed base that pyright can see through)."""


def pretrained(model: nn.Module) -> PreTrainedModel:
    """The model with what `transformers` gives it; a wrapper of PEFT's passes all of that on."""
    return cast("PreTrainedModel", model)


@dataclass(frozen=True)
class Outputs:
    """One forward pass, stopped before the output head.

    Args:
        hidden: (num_targets, width), the head's input at the counted targets only, in row-major order.
        head: (n, width) -> (n, vocabulary), the head with all that the model does to its logits (soft caps, scales).
        weight: (vocabulary, width), the head's weight where the head is nothing but a matrix product, else None.
        classes: (num_targets, logits of each), the class that each logit is of, where the head is a classifier's; it
            then wants all of `hidden` at once. None where logits are of tokens.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    weight: Tensor | None = None
    classes: Tensor | None = None

    def logits(self) -> Tensor:
        """(num_targets, vocabulary), of the same pass; made only when asked."""
        return self.head(self.hidden)


class Family(ABC):
    """One network generation, bound to nothing: models and tokenizers are passed in.

    A family is a dataclass; its fields say how a model that starts from nothing is made. What stands here is right for
    a network that learns by gradients and says everything, labels too, as text; override what is otherwise.
    """

    name: ClassVar[str]
    isolates_documents: ClassVar[bool] = False
    """May documents be packed into one row without seeing one another?"""
    needs_gradients: ClassVar[bool] = True
    """False where `fit` learns by counting, instead of the loop."""
    generates: ClassVar[bool] = True
    """Does it write text? If not, there are no probes, no KL and no text of its own."""

    @property
    @abstractmethod
    def starts_as(self) -> str:
        """What `create` makes, as its configuration's `model_type` or cell; empty where a model must be named."""

    @abstractmethod
    def create(self, examples: Sequence[Example], *, seed: int) -> tuple[nn.Module, Tokenizer]:
        """A random model of `starts_as`, float32 and in evaluation mode, and a tokenizer learned on the examples.

        Args:
            examples: what the tokenizer is learned from.
            seed: of the weights.
        """

    @abstractmethod
    def load(self, folder: Path, **options: Any) -> tuple[nn.Module, Tokenizer]:
        """The model (float32, in evaluation mode) and its tokenizer from a folder that `models.hub` resolved."""

    def load_tokenizer(self, folder: Path) -> Tokenizer:
        """The tokenizer alone, as `load` gives it beside the model."""
        return AutoTokenizer.from_pretrained(folder)

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
        return model

    def prepare(self, model: nn.Module, renderer: Renderer, task: Task, *, seed: int) -> nn.Module:
        """Grow what the next task needs, in place: rows for new classes; called before its optimizer is made.

        Args:
            model: with the method applied.
            renderer: is given the task's labels.
            task: that is learned next.
            seed: of the new rows.
        """
        return model

    def labels_for(self, task: Task) -> Labels:
        """What the renderer needs to know of a first task, for who looks at rows without a model; else see `prepare`.

        None of a family whose labels are text.
        """
        return Labels()

    def unfold(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples as they are learned: more of them, where one can train no more than one answer."""
        return examples

    @abstractmethod
    def encode(self, example: Example, renderer: Renderer) -> Encoded:
        """Ids and targets of one example, from the one renderer."""

    def vary(self, row: Encoded, renderer: Renderer, *, draw: str) -> Encoded:
        """The row as one epoch reads it: what is drawn at random for a row is drawn anew, by `draw` and the row."""
        return row

    def collate(self, rows: Sequence[Encoded], tokenizer: Tokenizer, *, packed: bool) -> Batch:
        """One micro-batch: one row without padding where packed, else rows padded on the right.

        Raises:
            CompatibilityError: packing is asked for, and the packed documents would see one another.
        """
        if packed and not self.isolates_documents:
            raise CompatibilityError(
                f"the {self.name} family cannot read packed documents apart", hint="set train.packing to never"
            )
        return pack(rows) if packed else pad(rows, pad_id=tokenizer.pad_token_id or 0)

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """One pass through the outermost module, the output head intercepted."""

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Nats, weighted and summed over the counted targets; in chunks, the head at targets only."""
        return chunked_cross_entropy(
            outputs.hidden, batch.targets[batch.counted], outputs.head, weights=batch.weights, weight=outputs.weight
        )

    @abstractmethod
    def loglikelihood(
        self, model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[float]:
        """Log p(continuation | context) in nats, of token ids, for every pair; shared contexts are read once."""

    def choose(
        self, model: nn.Module, renderer: Renderer, rows: Sequence[tuple[Sequence[Message], Sequence[str]]]
    ) -> list[list[float]]:
        """Log p of each row's labels after its prompt, nats: what says which label the model chooses.

        As answers, the stop token included, all in one call.
        """
        pairs: list[tuple[list[int], list[int]]] = []
        for prompt, labels in rows:
            ids = renderer.prompt_ids(prompt)
            pairs += [(ids, renderer.answer_ids(prompt, label)) for label in labels]
        values = iter(self.loglikelihood(model, renderer.tokenizer, pairs))
        return [[next(values) for _ in labels] for _, labels in rows]

    def answer(
        self,
        model: nn.Module,
        renderer: Renderer,
        prompts: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """What the model says to each conversation: the text that it writes after the rendered prompt."""
        ids = [renderer.prompt_ids(prompt) for prompt in prompts]
        return self.generate(model, renderer.tokenizer, ids, max_new_tokens=max_new_tokens, sampling=sampling)

    @abstractmethod
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

    def fit(self, model: nn.Module, examples: Sequence[Example], renderer: Renderer) -> None:
        """Learn by counting; only of families that have no gradients.

        Raises:
            CompatibilityError: the family learns by gradients.
        """
        raise CompatibilityError(
            f"the {self.name} family cannot be fitted by counting", hint="train it with `retain train`"
        )
