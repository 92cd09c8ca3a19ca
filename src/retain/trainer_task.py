"""The rows of a `transformers.Trainer` as a strategy sees a task: what `protect` hands to strategies.

A row of the Trainer's data set (token ids, labels, masks) travels as an `Example` whose text is the row in JSON, so a
memory can keep it and mix it into the rows of a later Trainer. Rows that a model writes are plain text and become token
ids when they are needed.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from retain import distributed
from retain.errors import CompatibilityError, DataError
from retain.kernels.low_rank import LowRank
from retain.methods.lora import LoRA
from retain.models.causal import generate_causal
from retain.parameters import evaluating
from retain.strategies.strategy import ModelOutputs, TaskMethod
from retain.types import IGNORED, Batch, Example, Sampling

__all__ = ["TrainerMethod", "TrainerTask", "example_of"]

PREFIX = '{"row": '
"""How the text of an example begins that is a row of a Trainer."""

FILLED = ("attention_mask", "completion_mask", "assistant_masks")
"""Columns that are 1 at every token of a text that is trained whole."""


def example_of(row: Mapping[str, Any], *, task: str) -> Example:
    """A row of a Trainer's data set.

    Raises:
        DataError: if it holds what JSON cannot, such as a picture.
    """
    try:
        text = json.dumps({"row": dict(row)}, ensure_ascii=False)
    except TypeError as error:
        raise DataError(
            f"a row of the Trainer's data set cannot be kept: {error}",
            hint="strategies keep rows of token ids, labels and texts",
        ) from error
    return Example(id=blake2b(text.encode(), digest_size=8).hexdigest(), text=text, task=task)


@dataclass(frozen=True)
class TrainerMethod:
    """What a Trainer tunes: a PEFT adapter, whose base is there without it, or the model itself."""

    adapter: bool

    @property
    def name(self) -> str:
        """`lora` stands for any adapter of PEFT's."""
        return "lora" if self.adapter else "full"

    @property
    def can_detach(self) -> bool:
        """Is the base's own behaviour still there?"""
        return self.adapter

    @property
    def can_extend(self) -> bool:
        """A Trainer has one model."""
        return False

    @property
    def no_products(self) -> str:
        """Nothing is known of the adapter before it is looked at."""
        return ""

    def detached(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The adapter off while inside.

        Raises:
            CompatibilityError: if there is none.
        """
        if not isinstance(model, PeftModel):
            raise CompatibilityError(
                "the base model is overwritten by full fine-tuning", hint="train an adapter, or choose `previous`"
            )
        return model.disable_adapter()

    def low_rank(self, model: nn.Module) -> Sequence[LowRank]:
        """The changes of frozen weights that are trained as products of two factors; empty where there are none."""
        return LoRA().low_rank(model) if self.adapter else ()

    def modules(self, model: nn.Module) -> list[str]:
        """None: a Trainer has one model."""
        return []

    def extend(self, model: nn.Module, name: str) -> nn.Module:
        """Refused.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError("a Trainer's model cannot be extended task by task", hint="use `retain train`")

    def activate(self, model: nn.Module, names: Sequence[str]) -> nn.Module:
        """Refused.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError("a Trainer's model has no modules of tasks", hint="use `retain train`")


@dataclass(frozen=True)
class TrainerOutputs:
    """One pass of a Trainer's model, which makes its logits; there is no head left to run.

    Args:
        hidden: (num_targets, classes), the logits at the counted targets.
        classes: None: a Trainer's head does not grow.
    """

    hidden: Tensor
    classes: Tensor | None = None

    def head(self, hidden: Tensor) -> Tensor:
        """What it is given."""
        return hidden

    def logits(self) -> Tensor:
        """(num_targets, classes)."""
        return self.hidden


@dataclass(frozen=True)
class TrainerTask:
    """The one implementation of `strategies.TaskView` over a Trainer's data.

    Args:
        name: the task's name; `base` for what stands for the base model.
        examples: made by `example_of`, or plain texts.
        columns: of the data set, which a text must have, too.
        collate: rows into a batch, as the Trainer's own loader does it.
        method: what is tuned.
        autocast: the Trainer's precision.
        device: where it computes.
        batch_size: rows of a pass.
        seed: the Trainer's.
        tokenizer: for texts; None where the Trainer has none.
        kind: `causal` outputs predict the next token; `same` ones their own position's label, or the row's.
    """

    name: str
    examples: Sequence[Example]
    columns: tuple[str, ...]
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    method: TaskMethod
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    batch_size: int
    seed: int
    tokenizer: Any = None
    kind: Literal["causal", "same"] = "causal"
    rows: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]], repr=False)

    @staticmethod
    def kind_of(model: nn.Module) -> Literal["causal", "same"]:
        """How the model's labels lie."""
        bare = model.get_base_model() if isinstance(model, PeftModel) else model
        return "causal" if type(bare).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else "same"

    def example(self, row: str | Mapping[str, Any], *, name: str) -> Example:
        """A text, or a row with the columns of the data set, as an example of the task `name`.

        Raises:
            DataError: if a column is missing.
        """
        if isinstance(row, str):
            return Example(id=blake2b(row.encode(), digest_size=8).hexdigest(), text=row, task=name)
        if missing := sorted(set(self.columns) - set(row)):
            raise DataError(
                f"a row for {name!r} has no {', '.join(missing)}",
                problems=[f"the training data has the columns {', '.join(self.columns)}"],
                hint="give texts, or rows as `trainer.train_dataset` has them",
            )
        return example_of(row, task=name)

    def row(self, example: Example) -> dict[str, Any]:
        """What the collator is given of an example."""
        if example.id not in self.rows:
            self.rows[example.id] = (
                json.loads(example.text)["row"] if example.text.startswith(PREFIX) else self._tokenized(example)
            )
        return self.rows[example.id]

    def _tokenized(self, example: Example) -> dict[str, Any]:
        """A text as a row with the columns of the others, trained whole."""
        unknown = sorted(set(self.columns) - {"input_ids", "labels", *FILLED})
        if self.tokenizer is None or unknown or self.kind != "causal":
            raise CompatibilityError(
                "this Trainer's rows cannot be made from a text",
                problems=[f"columns that a text does not have: {', '.join(unknown)}"] if unknown else [],
                hint="give `base` rows of the same columns as the training data",
            )
        text = example.text
        if example.messages:
            turns = [{"role": turn.role, "content": turn.content} for turn in example.messages]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        ids = self.tokenizer(text)["input_ids"]
        row: dict[str, Any] = {name: [1] * len(ids) for name in FILLED if name in self.columns}
        return row | {name: list(ids) for name in ("input_ids", "labels") if name in self.columns}

    def num_tokens(self, example: Example) -> int:
        """Tokens of the row; 1 where it has no token ids."""
        return len(self.row(example).get("input_ids", ())) or 1

    def batch(self, examples: Sequence[Example]) -> Batch:
        """One pass's batch."""
        return self.batch_of(self.collate([self.row(example) for example in examples]), examples)

    def batch_of(self, collated: Mapping[str, Any], examples: Sequence[Example] = ()) -> Batch:
        """What the Trainer's collator made, as a batch: labels that count as targets, and whose they are.

        Args:
            collated: with `labels`: (rows, length), or (rows,) where each row is of one class.
            examples: the rows' examples, where they are known.
        """
        inputs = {name: value.to(self.device) for name, value in collated.items() if isinstance(value, Tensor)}
        labels = inputs.pop("labels")
        targets = labels[:, None] if labels.dim() == 1 else labels  # (rows, length)
        if self.kind == "causal":
            targets = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)], dim=1)
        documents = torch.arange(len(targets), device=self.device)[:, None].expand_as(targets)
        positions = inputs.get("position_ids")
        if positions is not None and len(targets) == 1:  # rows one after another, positions from 0 in each
            documents = positions.eq(0).cumsum(dim=1) - 1
            last = F.pad(positions[:, 1:].eq(0), (0, 1), value=True)
            targets = targets.masked_fill(last, IGNORED) if self.kind == "causal" else targets
        weights = torch.ones(int((targets != IGNORED).sum()), device=self.device)
        return Batch(inputs, targets, documents.contiguous(), weights, tuple(examples))

    def batches(self, examples: Sequence[Example], *, max_tokens: int | None = None) -> Iterator[Batch]:
        """This process's share of the examples, in order."""
        mine = list(examples)[distributed.rank() :: distributed.world_size()]
        longest = max(map(self.num_tokens, mine), default=1)
        size = self.batch_size if max_tokens is None else max(1, min(self.batch_size, max_tokens // longest))
        for start in range(0, len(mine), size):
            yield self.batch(mine[start : start + size])

    def forward(self, model: nn.Module, batch: Batch) -> TrainerOutputs:
        """One pass, in the Trainer's precision."""
        with self.autocast():
            logits: Tensor = model(**batch.inputs).logits
        shaped = logits[:, None] if logits.dim() == 2 else logits  # (rows, length, classes)
        return TrainerOutputs(shaped[batch.counted])

    def loss(self, outputs: ModelOutputs, batch: Batch) -> Tensor:
        """Nats, weighted and summed over counted targets."""
        return (self._nats(outputs, batch) * batch.weights).sum()

    def _nats(self, outputs: ModelOutputs, batch: Batch) -> Tensor:
        logits = outputs.logits()
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, batch.targets[batch.counted], reduction="none")

    @torch.no_grad()
    def loglikelihood(self, model: nn.Module, examples: Sequence[Example]) -> list[float]:
        """Log p of each example's counted labels."""
        sums = self._sums(model, examples, lambda batch: -self._nats(self.forward(model, batch), batch)[:, None])
        return [float(total) for total in sums]

    @torch.no_grad()
    def embed(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """(examples, width): the last hidden states where targets count, averaged over each example's."""

        def states(batch: Batch) -> Tensor:
            with self.autocast():
                hidden = model(**batch.inputs, output_hidden_states=True).hidden_states[-1]  # (rows, length, width)
            at_targets = hidden[batch.counted] if batch.targets.shape[1] > 1 else hidden[:, 0]
            return torch.cat([at_targets, torch.ones_like(at_targets[:, :1])], dim=1)

        sums = self._sums(model, examples, states)
        return (sums[:, :-1] / sums[:, -1:].clamp(min=1)).float()

    def _sums(self, model: nn.Module, examples: Sequence[Example], values: Callable[[Batch], Tensor]) -> Tensor:
        """(examples, n), float64 on the CPU: the sum over each example's targets; of all processes."""
        parts: list[Tensor] = []
        with evaluating(model):
            for batch in self.batches(examples):
                rows = values(batch).double()
                sums = rows.new_zeros(len(batch.examples), rows.shape[1])
                parts.append(sums.index_add_(0, batch.target_documents, rows).cpu())
        gathered = distributed.gather_objects(torch.cat(parts) if parts else torch.zeros(0, 1))
        width = max(part.shape[1] for part in gathered)
        whole = torch.zeros(len(examples), width, dtype=torch.float64)
        for rank, part in enumerate(gathered):
            whole[rank :: len(gathered), : part.shape[1]] = part
        return whole

    def fit(self, model: nn.Module, examples: Sequence[Example]) -> nn.Module:
        """Refused: a Trainer trains its own model only.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError(
            "a strategy that trains a network of its own needs our loop", hint="use `retain train`"
        )

    def generate(
        self, model: nn.Module, prompts: Sequence[Example], *, max_new_tokens: int, sampling: Sampling
    ) -> list[str]:
        """What the model answers to each prompt, or how it continues each text."""
        if self.tokenizer is None or self.kind != "causal":
            raise CompatibilityError(
                "this Trainer's model cannot write text", hint="give `base` rows of the training data's columns"
            )
        with evaluating(model), self.autocast():
            return generate_causal(
                model, self.tokenizer, [self._prompt_ids(prompt) for prompt in prompts],
                max_new_tokens=max_new_tokens, sampling=sampling,
            )  # fmt: skip

    def _prompt_ids(self, prompt: Example) -> list[int]:
        if not prompt.messages:
            return list(self.tokenizer(prompt.text)["input_ids"])
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.prompt]
        return list(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])

    @cached_property
    def chat(self) -> bool:
        """Does the model answer requests?"""
        return bool(self.tokenizer is not None and self.tokenizer.chat_template)
