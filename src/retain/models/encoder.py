"""Encoders: BERT, RoBERTa, DistilBERT, ELECTRA, DeBERTa and kin, as classifiers and as masked language models.

What a task asks is told by its rows and its metric:

    raw text                          guess hidden tokens; more pre-training
    a label an answer                 one of the head's classes (softmax)
    `label_f1`: a list of labels      each of the task's classes, yes or no (sigmoid)
    `tag_accuracy`, `tag_f1`: tags    one class of each word

A prompt of two turns is a pair of sentences. Yes or no with logit z is a choice between the logits 0 and z, so every
loss here is a cross-entropy, and a strategy that reads logits works for all of them alike.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from retain.data.labels import Labels, write_labels
from retain.data.rendering import Renderer
from retain.errors import CompatibilityError
from retain.models.encoder_classes import grow, kind_of, labelled, labels_in
from retain.models.encoder_heads import equipped
from retain.models.encoder_outputs import class_logits, outputs_of, pseudo_likelihoods
from retain.models.encoder_rows import ended, labelled_row, tagged_row, text_row
from retain.models.encoder_tokenizer import SMALLEST, encoder_tokenizer, readable
from retain.models.family import Family, Outputs, Tokenizer, pretrained
from retain.models.masking import masked
from retain.models.vocabulary import check_transformer, read_aloud
from retain.types import GREEDY, Batch, Encoded, Example, Message, Sampling, Task

__all__ = ["EncoderFamily", "is_encoder"]

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")

AUTO = {
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForPreTraining": AutoModelForMaskedLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
"""The class that loads a folder, by the end of its architecture's name."""


@dataclass(frozen=True)
class EncoderFamily(Family):
    """Encoders with a classifier or a masked language model's head; rows are padded.

    Args:
        heads: `shared`, one head over all tasks: a class of any task may be the answer, and new ones come as new rows;
            or `per_task`, where each task chooses among its own classes, and is named to be answered.
        mlm_probability: the share of a raw text's tokens that have to be guessed, in (0, 1].
        architecture: its `model_type` in `transformers` (`bert`, `roberta`, ...) where it starts from nothing; else
            empty.
        hidden_size: width; a multiple of `num_attention_heads`.
        num_hidden_layers: layers.
        num_attention_heads: heads of each.
        vocab_size: tokens of the vocabulary at most, 261 or more.
        max_position_embeddings: tokens that a row may have.
    """

    name: ClassVar[str] = "encoder"
    generates: ClassVar[bool] = False

    heads: Literal["shared", "per_task"] = "shared"
    mlm_probability: float = 0.15
    architecture: str = ""
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    vocab_size: int = 4096
    max_position_embeddings: int = 512

    def __post_init__(self) -> None:
        known = sorted(set(MODEL_FOR_MASKED_LM_MAPPING_NAMES) & set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES))
        if self.architecture and self.architecture not in known:
            raise ValueError(
                f"architecture: expected an encoder's model_type such as bert, roberta or electra, "
                f"got {self.architecture!r}"
            )
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability: expected a share in (0, 1], got {self.mlm_probability}")
        check_transformer(self._sizes, width="hidden_size", heads="num_attention_heads", least_vocabulary=SMALLEST)

    @property
    def starts_as(self) -> str:
        """The `model_type`."""
        return self.architecture

    def create(self, examples: Sequence[Example], *, seed: int) -> tuple[nn.Module, Tokenizer]:
        """A random masked language model in float32 and evaluation mode, with a tokenizer learned on the examples."""
        tokenizer = encoder_tokenizer(map(read_aloud, examples), vocab_size=self.vocab_size)
        config = AutoConfig.for_model(
            self.architecture,
            **self._sizes | {"vocab_size": len(tokenizer)},
            intermediate_size=4 * self.hidden_size,
            type_vocab_size=2,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForMaskedLM.from_config(config, dtype=torch.float32).eval(), tokenizer

    def load(self, folder: Path, **options: Any) -> tuple[nn.Module, Tokenizer]:
        """The model in float32 and evaluation mode, with the head that it was saved with; safetensors only."""
        options = {"dtype": torch.float32} | options
        names: list[str] = AutoConfig.from_pretrained(folder).architectures or [""]
        auto = next((kind for ending, kind in AUTO.items() if names[0].endswith(ending)), AutoModel)
        model = auto.from_pretrained(folder, use_safetensors=True, **options)
        return model.eval(), self.load_tokenizer(folder)

    def load_tokenizer(self, folder: Path) -> Tokenizer:
        """The tokenizer, with an end and a template."""
        return readable(super().load_tokenizer(folder))

    def equip(
        self, model: nn.Module, renderer: Renderer, tasks: Sequence[Task], *, seed: int, saved: Path | None = None
    ) -> nn.Module:
        """The encoder with the heads that its tasks need, and as yet no row for a class that is to come.

        Raises:
            CompatibilityError: the tasks need heads that no one class of `transformers` has.
        """
        made = equipped(model, tasks, per_task=self.heads == "per_task", seed=seed, saved=saved)
        renderer.labels = labels_in(made)
        pretrained(made).config.bos_token_id = renderer.tokenizer.cls_token_id  # which BERT's own does not say
        return made

    def prepare(self, model: nn.Module, renderer: Renderer, task: Task, *, seed: int) -> nn.Module:
        """A row of the head for each class of the task that is new; the other rows stay bit for bit."""
        grow(model, task, seed=seed)
        renderer.labels = labels_in(model)
        return model

    def labels_for(self, task: Task) -> Labels:
        """The classes of the task; none where its rows are raw text."""
        return labelled(Labels(per_task=self.heads == "per_task"), task) if kind_of(task) else Labels()

    def encode(self, example: Example, renderer: Renderer) -> Encoded:
        """Ids, and as targets the class, the classes' yes and no, the words' classes, or the text's tokens.

        Raises:
            DataError: a label is none that the head has.
        """
        if not example.messages:
            return text_row(example, renderer.tokenizer)
        return (tagged_row if renderer.labels.kind == "tokens" else labelled_row)(example, renderer)

    def vary(self, row: Encoded, renderer: Renderer, *, draw: str) -> Encoded:
        """A raw text with other tokens hidden; any other row as it is. A row that was cut ends as a whole one does."""
        row, tokenizer = ended(row, renderer), renderer.tokenizer
        if row.example.messages:
            return row
        read, targets = masked(
            row.inputs["input_ids"],
            mask_id=tokenizer.mask_token_id,
            vocabulary=len(tokenizer),
            special=set(tokenizer.all_special_ids),
            share=self.mlm_probability,
            draw=f"{draw}/{row.example.id}",
        )
        return replace(row, inputs={"input_ids": read}, targets=targets)

    def collate(self, rows: Sequence[Encoded], tokenizer: Tokenizer, *, packed: bool) -> Batch:
        """Rows padded on the right, all of one kind.

        Raises:
            CompatibilityError: packing is asked for.
        """
        batch = super().collate(rows, tokenizer, packed=packed)
        inputs = dict(batch.inputs)
        types = inputs.pop("token_type_ids", None)
        if types is not None and "token_type_ids" in tokenizer.model_input_names:
            inputs["token_type_ids"] = types * inputs["attention_mask"]
        return replace(batch, inputs=inputs)

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """One pass; the head waits for `Outputs`."""
        return outputs_of(model, batch)

    def loglikelihood(
        self, model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[float]:
        """Log p of each continuation's tokens given the rest of the text, on both sides of it, nats."""
        return pseudo_likelihoods(model, tokenizer, pairs, self._padded(tokenizer))

    def choose(
        self, model: nn.Module, renderer: Renderer, rows: Sequence[tuple[Sequence[Message], Sequence[str]]]
    ) -> list[list[float]]:
        """Log p of each row's labels against one another, nats; a class that the head has no row for has logit 0."""
        ids = renderer.labels.ids
        logits = class_logits(model, renderer, [prompt for prompt, _ in rows], self._padded(renderer.tokenizer))
        found: list[list[float]] = []
        for (_, labels), row in zip(rows, logits, strict=True):
            known = torch.tensor([float(row[0, ids[label]]) if label in ids else 0.0 for label in labels])
            found.append(known.double().log_softmax(-1).tolist())
        return found

    def answer(
        self,
        model: nn.Module,
        renderer: Renderer,
        prompts: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The likeliest class of the whole head; those that are likelier than not, as a JSON list; or a tag a word.

        Raises:
            CompatibilityError: the model has no classes.
        """
        labels = renderer.labels
        names = list(labels.ids)
        if not names:
            raise CompatibilityError(
                "the model has learned no labels, and an encoder writes no text",
                hint="learn a task with labels first, or use a model that writes, such as `smollm2-135m`",
            )
        said: list[str] = []
        for row in class_logits(model, renderer, prompts, self._padded(renderer.tokenizer)):
            if labels.kind == "multi":
                said.append(write_labels([names[place] for place in (row[0] > 0).nonzero().flatten().tolist()]))
            else:
                said.append(" ".join(names[place] for place in row.argmax(-1).tolist()))
        return said

    def generate(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """An encoder writes no text.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError(
            "an encoder writes no text", hint="ask it for a label (`answer`), or use a model that writes"
        )

    @property
    def _sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in SIZES}

    def _padded(self, tokenizer: Tokenizer) -> Callable[[Sequence[Encoded]], Batch]:
        """Rows into a batch."""
        return lambda rows: self.collate(rows, tokenizer, packed=False)


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Is a `config.json` that of an encoder: with a head of `AUTO`, or bare?"""
    kinds = MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() - MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys()
    names: list[str] = config.get("architectures") or []
    fits = any(name.endswith((*AUTO, "Model")) and not name.endswith("LMHeadModel") for name in names)
    return fits and config.get("model_type") in kinds
