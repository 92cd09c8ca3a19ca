"""N-gram language models as a family: fitted by counting, read from a folder or started from nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from torch import nn
from transformers import AutoTokenizer

from retain.data.rendering import Renderer
from retain.errors import ModelError
from retain.models.arpa import write_arpa
from retain.models.backoff import Floats, windows
from retain.models.causal import CausalFamily
from retain.models.family import Outputs, Tokenizer
from retain.models.hub import resolve
from retain.models.kneser_ney import tally
from retain.models.ngram_network import ClassCounts, NGramConfig, NGramForCausalLM
from retain.models.vocabulary import SMALLEST_VOCABULARY, TOKENIZERS, check_sizes, read_aloud
from retain.types import Batch, Example, Message

__all__ = ["NGramFamily", "export_arpa"]

LONGEST_LABEL = 64
"""Characters of an answer up to which it may be a class that other rows share."""

GRAMS_AT_ONCE = 2**18


@dataclass(frozen=True)
class NGramFamily(CausalFamily):
    """Statistical language models: n-grams with interpolated modified Kneser-Ney smoothing, fitted by counting.

    They have no gradients and nothing is forgotten: new counts are added to old ones, so tasks learned one after
    another give the same model as all of them at once. A row is counted whole, however long it is, and once, whatever
    `num_train_epochs` says. A model whose probabilities an ARPA file gives can be asked all that others are, and learns
    nothing. The fields say how a model that starts from nothing is made.

    Args:
        order: words of the longest n-gram.
        vocab_size: tokens of the vocabulary at most, 258 or more; only where `tokenizer` learns one.
        tokenizer: how text is cut: `bpe` (byte-level subwords), `characters` or `words`, learned on the rows; or a
            model whose tokenizer is used, so that scores a token can be held against that model's.
        classify: how labels are chosen: `bayes`, by one n-gram model of the prompts a label and Bayes' rule, or
            `continuation`, by the label's tokens after the prompt, of which an n-gram sees only the last few words.
    """

    name: ClassVar[str] = "ngram"
    needs_gradients: ClassVar[bool] = False

    order: int = 4
    vocab_size: int = 4096
    tokenizer: str = "bpe"
    classify: str = "bayes"

    def __post_init__(self) -> None:
        if self.classify not in ("bayes", "continuation"):
            raise ValueError(f"classify: expected bayes or continuation, got {self.classify!r}")
        if not self.tokenizer:
            raise ValueError(f"tokenizer: expected {', '.join(TOKENIZERS)} or a model's name, got ''")
        check_sizes(order=(self.order, 1), vocab_size=(self.vocab_size, SMALLEST_VOCABULARY))

    @property
    def starts_as(self) -> str:
        """As `3-gram`."""
        return f"{self.order}-gram"

    def create(self, examples: Sequence[Example], *, seed: int) -> tuple[nn.Module, Tokenizer]:
        """A model that has counted nothing, and a tokenizer learned on the examples or taken from a model."""
        if self.tokenizer in TOKENIZERS:
            tokenizer = TOKENIZERS[self.tokenizer](map(read_aloud, examples), vocab_size=self.vocab_size)
        else:
            tokenizer = AutoTokenizer.from_pretrained(resolve(self.tokenizer).folder)
        config = NGramConfig(
            vocab_size=len(tokenizer),
            order=self.order,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return NGramForCausalLM(config).eval(), tokenizer

    def load(self, folder: Path, **options: Any) -> tuple[nn.Module, Tokenizer]:
        """The model with its counts, and its tokenizer; safetensors only.

        Raises:
            ModelError: the folder holds a model of another family.
        """
        found = NGramConfig.get_config_dict(folder)[0].get("model_type")
        if found != NGramConfig.model_type:
            raise ModelError(
                f"{folder} is not an n-gram model",
                problems=[f"config.json: model_type is {found!r}, not {NGramConfig.model_type!r}"],
                hint="leave `family` out, and it is found from the model",
            )
        return NGramForCausalLM.from_pretrained(folder), self.load_tokenizer(folder)

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """The contexts at counted targets are what the head, the counts, reads."""
        network = _network(model)
        contexts = network.contexts(batch.inputs["input_ids"], batch.inputs.get("attention_mask"))
        return Outputs(hidden=contexts[batch.counted], head=network.next_token)

    def loglikelihood(
        self, model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[float]:
        """Log p(continuation | context) in nats; the context begins a text."""
        order, begin = _network(model).config.order, _network(model).config.vocab_size
        probabilities = _network(model).words.model
        result: list[float] = []
        for group in _groups([len(context) + len(rest) for context, rest in pairs]):
            rows = [pairs[i][0] + pairs[i][1] for i in group]
            grams = windows(rows, order, begin=begin)
            owners = np.repeat(np.arange(len(group)), [len(row) for row in rows])
            starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
            counted = np.arange(len(grams)) - starts[owners] >= np.array([len(pairs[i][0]) for i in group])[owners]
            scores = probabilities.score(grams[counted])
            result += np.bincount(owners[counted], scores, minlength=len(group)).tolist()
        return result

    def choose(
        self, model: nn.Module, renderer: Renderer, rows: Sequence[tuple[Sequence[Message], Sequence[str]]]
    ) -> list[list[float]]:
        """Log p of each row's labels, nats.

        By Bayes' rule, log p(label) + log p(prompt's text | label) for each label, normalised over the row's labels:

            p(label) = (rows of the label + 1) / (rows of all the row's labels + number of labels)

        where half of the row's labels or more have been counted as answers; the others are worded like the least likely
        of these. Elsewhere, and with `continuation`, log p of the labels as answers.
        """
        counts = _network(model).labels
        known = counts.classes
        by_bayes = [
            self.classify == "bayes" and 2 * sum(label in known for label in labels) >= len(labels)
            for _, labels in rows
        ]
        rest = [row for row, bayes in zip(rows, by_bayes, strict=True) if not bayes]
        continued = iter(super().choose(model, renderer, rest))
        return [
            _posterior(counts, known, renderer.text_ids(_asked(prompt)), labels) if bayes else next(continued)
            for (prompt, labels), bayes in zip(rows, by_bayes, strict=True)
        ]

    def fit(self, model: nn.Module, examples: Sequence[Example], renderer: Renderer) -> None:
        """Add the examples' counts.

        A token is counted after its context where it is trained at all: weights above 0 count alike. Of raw text the
        first token is counted, too, as what begins a text. A conversation whose answer is short is also counted as a
        text, its prompt, of a class, its answer.

        Raises:
            CompatibilityError: the model's probabilities are given by an ARPA file.
        """
        network = _network(model)
        begin = network.config.vocab_size
        rows: list[list[int]] = []
        trained: list[bool] = []
        for example in examples:
            ids, weights = renderer.encode(example)
            counts = [weight * example.weight > 0 for weight in weights]
            if not example.messages:
                counts[0] = example.weight > 0
            rows.append(ids)
            trained += counts
        network.words.add(tally(windows(rows, network.config.order, begin=begin)[np.array(trained, dtype=bool)]))
        if self.classify != "bayes":
            return
        labelled = [row for row in examples if row.messages and row.weight > 0 and _is_label(row)]
        texts = [renderer.text_ids(_asked(row.prompt)) for row in labelled]
        owners = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        network.labels.learn(
            windows(texts, network.config.order, begin=begin), [row.answer for row in labelled], owners
        )


def export_arpa(model: nn.Module, tokenizer: Tokenizer, path: Path) -> None:
    """Write an n-gram model for other tools: its probabilities as an ARPA file, its tokens as words."""
    network = _network(model)
    tokens = tokenizer.convert_ids_to_tokens(list(range(network.config.vocab_size)))
    write_arpa(network.words.model, tokens, path, end=tokenizer.eos_token)


def _network(model: nn.Module) -> NGramForCausalLM:
    return cast("NGramForCausalLM", model)


def _asked(prompt: Sequence[Message]) -> str:
    """What a conversation says before its answer, without the template's words, which are the same for all labels."""
    return "\n".join(message.content for message in prompt)


def _is_label(example: Example) -> bool:
    """May the answer be a class? It is one of the row's choices, or short."""
    return example.answer in example.choices or len(example.answer) <= LONGEST_LABEL


def _posterior(counts: ClassCounts, known: dict[str, int], ids: list[int], labels: Sequence[str]) -> list[float]:
    """log p(label | text), (labels,)."""
    numbers = np.array([known.get(label, -1) for label in labels])
    rows = np.where(numbers >= 0, counts.num_rows.cpu().numpy()[numbers], 0)
    joint: Floats = np.log((rows + 1) / (rows.sum() + len(labels)))
    grams = windows([ids], counts.order - 1, begin=counts.vocab_size)
    if len(grams):
        worded = counts.worded(np.tile(grams, (len(labels), 1)), np.repeat(numbers, len(grams)))
        wordings = counts.model.score(worded).reshape(len(labels), -1).sum(axis=1)
        # All texts together say of any prompt that it is likelier than most classes do: that is no sign of a new class.
        joint = joint + np.where(numbers >= 0, wordings, wordings[numbers >= 0].min(initial=0.0))
    return (joint - np.logaddexp.reduce(joint)).tolist()


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Indices, in order, in groups of about `GRAMS_AT_ONCE` tokens."""
    groups: list[list[int]] = []
    size = GRAMS_AT_ONCE
    for index, length in enumerate(lengths):
        if size + length > GRAMS_AT_ONCE:
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += length
    return groups
