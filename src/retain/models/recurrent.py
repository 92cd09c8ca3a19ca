"""Recurrent language models as a family: from a folder, or from nothing with a tokenizer learned on the data."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from retain.errors import ModelError
from retain.models.causal import CausalFamily, likelihoods
from retain.models.family import Tokenizer
from retain.models.recurrent_likelihood import state_likelihoods
from retain.models.recurrent_network import CELLS, RecurrentConfig, RecurrentForCausalLM
from retain.models.vocabulary import SMALLEST_VOCABULARY, TOKENIZERS, check_sizes, read_aloud
from retain.types import Example

__all__ = ["RecurrentFamily"]


@dataclass(frozen=True)
class RecurrentFamily(CausalFamily):
    """RNN, GRU and LSTM language models; the fields say how a model that starts from nothing is made.

    A state runs on over the border of two packed documents, so rows are padded, never packed.

    Args:
        cell: `lstm`, `gru` or `rnn`.
        hidden_size: width of embedding and state.
        num_layers: recurrent layers.
        vocab_size: tokens of the vocabulary at most, 258 or more.
        tokenizer: how text is cut: `bpe` (byte-level subwords), `characters` or `words`, learned on the rows.
        dropout: in [0, 1).
        tie_word_embeddings: use the embedding as the output head, too.
    """

    name: ClassVar[str] = "recurrent"

    cell: str = "lstm"
    hidden_size: int = 256
    num_layers: int = 1
    vocab_size: int = 4096
    tokenizer: str = "bpe"
    dropout: float = 0.0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {self.cell!r}")
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(f"tokenizer: expected one of {', '.join(TOKENIZERS)}, got {self.tokenizer!r}")
        check_sizes(
            hidden_size=(self.hidden_size, 1),
            num_layers=(self.num_layers, 1),
            vocab_size=(self.vocab_size, SMALLEST_VOCABULARY),
        )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")

    @property
    def starts_as(self) -> str:
        """The cell."""
        return self.cell

    def create(self, examples: Sequence[Example], *, seed: int) -> tuple[nn.Module, Tokenizer]:
        """A random model in float32 and evaluation mode, with a tokenizer learned on the examples."""
        tokenizer = TOKENIZERS[self.tokenizer](map(read_aloud, examples), vocab_size=self.vocab_size)
        config = RecurrentConfig(
            vocab_size=len(tokenizer),
            cell=self.cell,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            dropout=self.dropout,
            tie_word_embeddings=self.tie_word_embeddings,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return RecurrentForCausalLM(config).eval(), tokenizer

    def load(self, folder: Path, **options: Any) -> tuple[nn.Module, Tokenizer]:
        """The model in float32 and evaluation mode, with its tokenizer; safetensors only.

        Raises:
            ModelError: the folder holds a model of another family.
        """
        config = RecurrentConfig.get_config_dict(folder)[0]
        if config.get("model_type") != RecurrentConfig.model_type:
            raise ModelError(
                f"{folder} is not a recurrent model",
                problems=[
                    f"config.json: model_type is {config.get('model_type')!r}, not {RecurrentConfig.model_type!r}"
                ],
                hint="set `family: decoder` for a causal transformer",
            )
        options = {"dtype": torch.float32} | options
        model = RecurrentForCausalLM.from_pretrained(folder, use_safetensors=True, **options)
        return model.eval(), self.load_tokenizer(folder)

    def loglikelihood(
        self, model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[float]:
        """Log p(continuation | context) in nats; a context of many continuations is read once, and its state kept."""
        uses = Counter(tuple(context) for context, _ in pairs)
        shared = [i for i, (context, _) in enumerate(pairs) if len(context) > 1 and uses[tuple(context)] > 1]
        single = sorted(set(range(len(pairs))) - set(shared))
        pad_id = tokenizer.pad_token_id or 0
        result = dict(zip(single, likelihoods(model, [pairs[i] for i in single], pad_id=pad_id), strict=True))
        result |= dict(zip(shared, state_likelihoods(model, [pairs[i] for i in shared], pad_id=pad_id), strict=True))
        return [result[i] for i in range(len(pairs))]
