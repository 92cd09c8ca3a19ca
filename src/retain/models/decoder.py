"""Decoder-only transformers: GPT, Llama, Qwen, Gemma, Mistral and whatever `AutoModelForCausalLM` loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from retain.data.packing import pack, pad, shifted
from retain.data.rendering import Renderer
from retain.errors import CompatibilityError
from retain.models.causal import causal_loss, generate_causal, likelihoods
from retain.models.family import Outputs, Tokenizer
from retain.models.head import check_head, run_to_head
from retain.models.tree import reads_trees, tree_likelihoods
from retain.types import GREEDY, Batch, Encoded, Example, Sampling, Task

__all__ = ["DecoderFamily"]


@dataclass(frozen=True)
class DecoderFamily:
    """Causal transformers; packed documents are isolated by their restarting positions.

    Isolation needs `position_ids`, no attention mask and no cache (`transformers.masking_utils`); `pack` and
    `run_to_head` see to all three.
    """

    name: ClassVar[str] = "decoder"
    isolates_documents: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True

    def load(self, folder: Path, **options: Any) -> tuple[nn.Module, Tokenizer]:
        """The model in float32 and evaluation mode, with its tokenizer; safetensors only."""
        options = {"dtype": torch.float32} | options
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options).eval()
        check_head(model)
        return model, AutoTokenizer.from_pretrained(folder)

    def prepare(self, model: nn.Module, tokenizer: Tokenizer, task: Task) -> nn.Module:
        """Nothing to grow: labels are text."""
        return model

    def encode(self, example: Example, renderer: Renderer) -> Encoded:
        """Ids, and as the target of each position the token after it."""
        return shifted(example, *renderer.encode(example))

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
        """Log-likelihoods in nats; a context with many continuations is read once, as the trunk of a tree."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (context, _) in enumerate(pairs):
            groups.setdefault(tuple(context), []).append(index)
        trees = [members for members in groups.values() if len(members) > 1]
        pad_id = tokenizer.pad_token_id or 0
        if not trees or not reads_trees(model, pairs, trees[0], pad_id=pad_id):
            return likelihoods(model, pairs, pad_id=pad_id)
        single = [members[0] for members in groups.values() if len(members) == 1]
        result = tree_likelihoods(model, pairs, trees, pad_id=pad_id)
        result |= dict(zip(single, likelihoods(model, [pairs[i] for i in single], pad_id=pad_id), strict=True))
        return [result[index] for index in range(len(pairs))]

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
        raise CompatibilityError("a decoder cannot be fitted by counting", hint="train it with `retain train`")
