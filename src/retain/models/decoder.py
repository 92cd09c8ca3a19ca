"""Decoder-only transformers: GPT, Llama, Qwen, Gemma, Mistral and whatever `AutoModelForCausalLM` loads."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from retain.data.packing import pack, pad, shifted
from retain.data.rendering import Renderer
from retain.models.causal import answer_by_text, causal_loss, choose_by_answer, generate_causal, likelihoods
from retain.models.family import Outputs, Tokenizer, cannot_count
from retain.models.head import check_head, run_to_head
from retain.models.tree import grow_trees, reads_trees, tree_likelihoods
from retain.models.vocabulary import SMALLEST_VOCABULARY, check_sizes, read_aloud, subword_tokenizer
from retain.types import GREEDY, Batch, Encoded, Example, Message, Sampling, Task

__all__ = ["DecoderFamily"]

WORTH_A_TREE = 0.9
"""Share of the tokens left by sharing prefixes above which plain rows, with their plain mask, are quicker."""

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")


@dataclass(frozen=True)
class DecoderFamily:
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
    needs_gradients: ClassVar[bool] = True
    generates: ClassVar[bool] = True

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
        check_sizes(
            vocab_size=(self.vocab_size, SMALLEST_VOCABULARY),
            **{name: (getattr(self, name), 1) for name in SIZES if name != "vocab_size"},
        )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads ({self.num_attention_heads}), "
                f"got {self.hidden_size}"
            )

    def create(self, examples: Sequence[Example], *, seed: int) -> tuple[nn.Module, Tokenizer]:
        """A random model in float32 and evaluation mode, with a byte-level tokenizer learned on the examples.

        Args:
            examples: what the tokenizer is learned from.
            seed: of the weights.
        """
        tokenizer = subword_tokenizer(map(read_aloud, examples), vocab_size=self.vocab_size)
        sizes = {name: getattr(self, name) for name in SIZES} | {"vocab_size": len(tokenizer)}
        config = AutoConfig.for_model(
            self.architecture,
            **sizes,
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
        return model, AutoTokenizer.from_pretrained(folder)

    def equip(
        self, model: nn.Module, renderer: Renderer, tasks: Sequence[Task], *, seed: int, saved: Path | None = None
    ) -> nn.Module:
        """The model as it is: one head says everything."""
        return model

    def prepare(self, model: nn.Module, renderer: Renderer, task: Task, *, seed: int) -> nn.Module:
        """Nothing to grow: labels are text."""
        return model

    def encode(self, example: Example, renderer: Renderer) -> Encoded:
        """Ids, and as the target of each position the token after it."""
        return shifted(example, *renderer.encode(example))

    def vary(self, row: Encoded, renderer: Renderer, *, draw: str) -> Encoded:
        """The row: nothing of it is drawn at random."""
        return row

    def collate(self, rows: Sequence[Encoded], tokenizer: Tokenizer, *, packed: bool) -> Batch:
        """One row without padding where packed, else rows padded on the right."""
        return pack(rows) if packed else pad(rows, pad_id=tokenizer.pad_token_id or 0)

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """One pass; the head waits for `Outputs`."""
        return run_to_head(model, batch.inputs, batch.counted)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Nats, weighted and summed over counted targets."""
        return causal_loss(outputs, batch)

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

    def choose(
        self, model: nn.Module, renderer: Renderer, rows: Sequence[tuple[Sequence[Message], Sequence[str]]]
    ) -> list[list[float]]:
        """Log p of each row's labels as answers, nats."""
        return choose_by_answer(self, model, renderer, rows)

    def answer(
        self,
        model: nn.Module,
        renderer: Renderer,
        prompts: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The text after each rendered prompt."""
        return answer_by_text(self, model, renderer, prompts, max_new_tokens=max_new_tokens, sampling=sampling)

    def generate(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The continuation of every prompt."""
        return generate_causal(model, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling)

    def fit(self, model: nn.Module, examples: Sequence[Example], renderer: Renderer) -> None:
        """A decoder learns by gradients.

        Raises:
            CompatibilityError: always.
        """
        raise cannot_count("a decoder")
