"""Decoder-only transformers: GPT, Llama, Qwen, Gemma, Mistral and whatever `AutoModelForCausalLM` loads."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from retain.models.causal import CausalFamily, likelihoods
from retain.models.family import Tokenizer
from retain.models.head import check_head
from retain.models.tree import grow_trees, reads_trees, tree_likelihoods
from retain.models.vocabulary import SMALLEST_VOCABULARY, check_transformer, read_aloud, subword_tokenizer
from retain.types import Example

__all__ = ["DecoderFamily"]

WORTH_A_TREE = 0.9
"""Share of the tokens left by sharing prefixes above which plain rows, with their plain mask, are quicker."""

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")


@dataclass(frozen=True)
class DecoderFamily(CausalFamily):
    """Causal transformers; packed documents are isolated by their restarting positions.

    Isolation needs `position_ids`, no attention mask and no cache (`transformers.masking_utils`); `pack` and
    `run_to_head` see to all three. The fields say how a model that starts from nothing is made.

    Args:
        architecture: its `model_type` in `transformers` (`llama`, `gpt2`, `qwen3`, ...); empty where a model is named.
        hidden_size: width; a multiple of `num_attention_heads`.
        num_hidden_layers: layers.
        num_attention_heads: heads of each.
        vocab_size: tokens of the vocabulary at most, 258 or more.
        max_position_embeddings: tokens that a row may have.
    """

    name: ClassVar[str] = "decoder"
    isolates_documents: ClassVar[bool] = True

    architecture: str = ""
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    vocab_size: int = 4096
    max_position_embeddings: int = 1024

    def __post_init__(self) -> None:
        if self.architecture and self.architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            near = difflib.get_close_matches(self.architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
            raise ValueError(
                f"architecture: expected a model_type of a causal transformer such as "
                f"{', '.join(near) or 'llama, gpt2 or qwen3'}, got {self.architecture!r}"
            )
        check_transformer(
            self._sizes, width="hidden_size", heads="num_attention_heads", least_vocabulary=SMALLEST_VOCABULARY
        )

    @property
    def starts_as(self) -> str:
        """The `model_type`."""
        return self.architecture

    def create(self, examples: Sequence[Example], *, seed: int) -> tuple[nn.Module, Tokenizer]:
        """A random model in float32 and evaluation mode, with a byte-level tokenizer learned on the examples."""
        tokenizer = subword_tokenizer(map(read_aloud, examples), vocab_size=self.vocab_size)
        config = AutoConfig.for_model(
            self.architecture,
            **self._sizes | {"vocab_size": len(tokenizer)},
            num_key_value_heads=self.num_attention_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            intermediate_size=4 * self.hidden_size,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        check_head(model)
        return model, tokenizer

    def load(self, folder: Path, **options: Any) -> tuple[nn.Module, Tokenizer]:
        """The model in float32 and evaluation mode, with its tokenizer; safetensors only."""
        options = {"dtype": torch.float32} | options
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options).eval()
        check_head(model)
        return model, self.load_tokenizer(folder)

    def loglikelihood(
        self, model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[float]:
        """Log-likelihoods in nats; what several sequences begin with is read once, as the trunk of a tree."""
        trees = grow_trees(pairs)
        pad_id = tokenizer.pad_token_id or 0
        read = sum(len(tree.tokens) for tree in trees)
        plain = sum(len(context) + len(rest) for context, rest in pairs)
        if read >= WORTH_A_TREE * plain or not reads_trees(model, pairs, pad_id=pad_id):
            return likelihoods(model, pairs, pad_id=pad_id)
        return tree_likelihoods(model, pairs, trees, pad_id=pad_id)

    @property
    def _sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in SIZES}
