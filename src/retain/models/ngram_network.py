"""An n-gram language model with the surface of a `transformers` model: its counts are kept, its probabilities made.

    logits_t = log p(. | x_{t-order+2} .. x_t),  interpolated modified Kneser-Ney of the counts so far

It has no parameters. Its counts are buffers; the probabilities are estimated when they are first asked for. Where they
are given instead, by an ARPA file, they are the buffers, and nothing is counted. Importing
this module lets `AutoConfig` and `AutoModelForCausalLM` load it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_model
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from retain.errors import CompatibilityError
from retain.models.backoff import BackoffModel, Ids, Level
from retain.models.kneser_ney import Tally, estimate, tally
from retain.parameters import Counts, device_of

__all__ = ["ClassCounts", "GivenProbabilities", "NGramConfig", "NGramCounts", "NGramForCausalLM"]


class NGramConfig(PretrainedConfig):
    """The shape of an n-gram language model.

    Args:
        vocab_size: tokens.
        order: words of the longest n-gram; the context is one less.
        given: are its probabilities given, instead of estimated from counts?
    """

    model_type = "retain-ngram"

    def __init__(self, vocab_size: int = 4096, order: int = 4, given: bool = False, **options: Any) -> None:
        self.vocab_size = vocab_size
        self.order = order
        self.given = given
        super().__init__(**options)


class NGramCounts(Counts):
    """A tally as buffers, and the model that it makes.

    Attributes:
        grams: (n, order), int32, as in `kneser_ney.Tally`.
        counts: (n,), int64.
    """

    grams: Tensor
    counts: Tensor

    def __init__(self, order: int, vocab_size: int) -> None:
        super().__init__()
        self.order, self.vocab_size = order, vocab_size
        self.register_buffer("grams", torch.empty(0, order, dtype=torch.int32))
        self.register_buffer("counts", torch.empty(0, dtype=torch.int64))
        self._made: tuple[Tensor, BackoffModel] | None = None

    @property
    def tallied(self) -> Tally:
        """The counts as arrays."""
        return Tally(self.grams.cpu().numpy().astype(np.int64), self.counts.cpu().numpy())

    @property
    def num_symbols(self) -> int:
        """Tokens, the beginning, and what else can only be a context."""
        return self.vocab_size + 1

    @property
    def model(self) -> BackoffModel:
        """The probabilities, estimated once for the counts as they are."""
        if self._made is None or self._made[0] is not self.counts:
            self._made = (
                self.counts,
                estimate(self.tallied, vocab_size=self.vocab_size, num_symbols=self.num_symbols),
            )
        return self._made[1]

    def add(self, new: Tally) -> None:
        """Count further data."""
        whole = self.tallied + new
        device = self.counts.device
        self.grams = torch.from_numpy(whole.grams.astype(np.int32)).to(device)
        self.counts = torch.from_numpy(whole.counts).to(device)


class ClassCounts(NGramCounts):
    """How texts of each class are worded: one n-gram model a class, sharing their discounts and what they back off to.

    A class is one more word, the nearest in every context: p(w | h, class) backs off to ever shorter h, then to
    p(w | class), and last to p(w) of all classes.

    Attributes:
        num_rows: (classes,), int64, texts of each.
        names: UTF-8 bytes of the classes' names, a JSON list.
    """

    num_rows: Tensor
    names: Tensor

    def __init__(self, order: int, vocab_size: int) -> None:
        super().__init__(order + 1, vocab_size)
        self.register_buffer("num_rows", torch.empty(0, dtype=torch.int64))
        self.register_buffer("names", _bytes([]))

    @property
    def classes(self) -> dict[str, int]:
        """The number of every class by its name."""
        return {name: number for number, name in enumerate(json.loads(bytes(self.names.tolist())))}

    @property
    def num_symbols(self) -> int:
        """Tokens, the beginning, and the classes."""
        return self.vocab_size + 1 + len(self.num_rows)

    def learn(self, grams: Ids, labels: Sequence[str], owners: Ids) -> None:
        """Count texts of some classes.

        Args:
            grams: (tokens, order), of the texts' tokens.
            labels: the class of each text.
            owners: (tokens,), which text each token is of.
        """
        known = self.classes
        for label in labels:
            known.setdefault(label, len(known))
        numbers = np.array([known[label] for label in labels], dtype=np.int64)
        rows = np.bincount(numbers, minlength=len(known))
        rows[: len(self.num_rows)] += self.num_rows.cpu().numpy()
        device = self.counts.device
        self.num_rows = torch.from_numpy(rows.astype(np.int64)).to(device)
        self.names = _bytes(list(known)).to(device)
        self.add(tally(self.worded(grams, numbers[owners])))

    def worded(self, grams: Ids, numbers: Ids) -> Ids:
        """(tokens, order): the n-grams with their class as the nearest word of the context; -1 is no class known."""
        symbols = self.vocab_size + 1 + numbers
        return np.concatenate([grams[:, :-1], symbols[:, None], grams[:, -1:]], axis=1)


class GivenProbabilities(Counts):
    """The tables of a back-off model as buffers, in the place of counts; nothing can be counted on top of them.

    Attributes:
        sizes: (order,), int64, how many n-grams of each length there are.
        keys, log_probs, backoffs: (n,), those of all lengths one after another, as in `backoff.Level`.
    """

    sizes: Tensor
    keys: Tensor
    log_probs: Tensor
    backoffs: Tensor

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        for name in ("sizes", "keys"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64))
        for name in ("log_probs", "backoffs"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    @property
    def model(self) -> BackoffModel:
        """The probabilities as they were given."""
        sizes: list[int] = self.sizes.tolist()
        tables = [table.cpu().split(sizes) for table in (self.keys, self.log_probs, self.backoffs)]
        levels = [Level(*(part.numpy() for part in parts)) for parts in zip(*tables, strict=True)]
        return BackoffModel(self.vocab_size, tuple(levels))

    def take(self, model: BackoffModel) -> None:
        """Hold this model's tables."""
        self.sizes = torch.tensor([len(level.keys) for level in model.levels])
        self.keys = torch.from_numpy(np.concatenate([level.keys for level in model.levels]))
        self.log_probs = torch.from_numpy(np.concatenate([level.log_probs for level in model.levels]))
        self.backoffs = torch.from_numpy(np.concatenate([level.backoffs for level in model.levels]))

    def add(self, new: Tally) -> None:
        """Refuse to count.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError(
            f"{len(new.counts)} n-grams cannot be counted on top of probabilities that an ARPA file gives",
            hint="start from the rows that the file was made of: `model: {family: ngram}`",
        )


class NGramForCausalLM(PreTrainedModel, GenerationMixin):
    """Counts of n-grams, and the next token's distribution that they make."""

    config_class = NGramConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: NGramConfig) -> None:
        super().__init__(config)
        vocab_size = config.vocab_size
        self.words = GivenProbabilities(vocab_size) if config.given else NGramCounts(config.order, vocab_size)
        self.labels = ClassCounts(config.order, config.vocab_size)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *unused: Any, **options: Any) -> Self:
        """Counts from a folder; there are no weights whose type or place could be chosen."""
        folder = Path(pretrained_model_name_or_path)
        model = cls(NGramConfig.from_pretrained(folder))
        load_model(model, folder / "model.safetensors")
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Of the probabilities, as far as `transformers` asks."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where the counts are."""
        return device_of(self)

    def contexts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(rows, time, order - 1): at each position the last tokens up to it; what lies before a text is `vocab_size`.

        Args:
            input_ids: (rows, time).
            attention_mask: (rows, time), 0 where a token is padding, on either side.
        """
        begin = self.config.vocab_size
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, begin)
        width = self.config.order - 1
        if not width:
            return input_ids.new_empty(*input_ids.shape, 0)
        return F.pad(input_ids, (width - 1, 0), value=begin).unfold(1, width, 1)

    def next_token(self, contexts: Tensor) -> Tensor:
        """(n, vocab_size), float64: log p of every token after each context, (n, order - 1)."""
        found = self.words.model.distribution(contexts.cpu().numpy().astype(np.int64))
        return torch.from_numpy(found).to(contexts.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> CausalLMOutput:
        """The next token's log-probabilities at every position.

        Args:
            input_ids: (rows, time).
            attention_mask: (rows, time), 0 where a token is padding, on either side.
            labels: (rows, time), `input_ids` with -100 where nothing counts; shifted inside.
            logits_to_keep: only the last so many positions' logits; 0 for all.
            **unused: what `transformers` passes to every model, such as `return_dict`.

        Raises:
            ValueError: `position_ids` are given, by which packed documents would be told apart.
        """
        if unused.get("position_ids") is not None:
            raise ValueError("an n-gram model reads on over the border of packed documents; pad them instead")
        contexts = self.contexts(input_ids, attention_mask)[:, -logits_to_keep:]  # (rows, time, order - 1)
        logits = self.next_token(contexts.flatten(0, 1)).view(*contexts.shape[:2], -1).float()  # (rows, time, vocab)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]  called by keyword
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        """The last tokens are all that the next one depends on."""
        last = max(self.config.order - 1, 1)
        mask = None if attention_mask is None else attention_mask[:, -last:]
        return {"input_ids": input_ids[:, -last:], "attention_mask": mask, "logits_to_keep": 1}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """There are no keys and values to keep."""
        return False


def _bytes(names: Sequence[str]) -> Tensor:
    return torch.tensor(list(json.dumps(list(names), ensure_ascii=False).encode()), dtype=torch.uint8)


AutoConfig.register(NGramConfig.model_type, NGramConfig)
AutoModelForCausalLM.register(NGramConfig, NGramForCausalLM)
