"""Prefix tuning: trained keys and values before the text in every layer, and nothing else.

    attention_i(x) = softmax(q_i [K_i ; k_i]^T / sqrt(d)) [V_i ; v_i]          K_i, V_i (n, width) are trained

They start as the keys and values that the model itself computes for tokens drawn from its vocabulary, so that the tuned
model starts as the base behind a few real tokens.

Source: Li and Liang 2021, https://arxiv.org/abs/2101.00190, section 4 (the start: section 7.4), as PEFT computes it.
Differs: no MLP makes the prefix; the start takes its place.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PrefixTuningConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retain.errors import CompatibilityError, LineageError
from retain.methods.soft_prompt import SoftPrompt, peft_sizes
from retain.models.family import Family, pretrained
from retain.models.virtual_tokens import Prefix as Place
from retain.models.virtual_tokens import attach, attached, head_shape, input_embeddings
from retain.parameters import evaluating, freeze

__all__ = ["Prefix"]


@dataclass(frozen=True)
class Prefix(SoftPrompt):
    """Train keys and values of `num_tokens` virtual tokens in every layer of a frozen decoder.

    Args:
        num_tokens: virtual tokens, above 0.
    """

    name: ClassVar[str] = "prefix"

    num_tokens: int = 20

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens: expected a whole number above 0, got {self.num_tokens}")

    def supports(self, family: Family) -> str | None:
        """Decoders: in one of two halves a prefix would have to lie in three kinds of attention."""
        return None if family.name == "decoder" else f"a prefix is read by decoders, and not by {family.name!r}"

    def apply(self, model: nn.Module) -> nn.Module:
        """The model, frozen, with a prefix in float32.

        Raises:
            CompatibilityError: if its layers differ in their heads.
        """
        size = input_embeddings(model).num_embeddings
        pairs = keys_and_values(freeze(model), torch.randint(size, (1, self.num_tokens)))
        place = Place(self.num_tokens, head_shape(pairs))
        whole = torch.stack([torch.cat([key, value]) for key, value in pairs])  # (layers, 2, heads, tokens, width)
        place.weight.data = whole.permute(3, 0, 1, 2, 4).flatten(1).to(torch.promote_types(whole.dtype, torch.float32))
        attach(model, place)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """PEFT's own layout, which other tools load."""
        place = self.place(model)
        _, heads, width = place.shape
        folder.mkdir(parents=True, exist_ok=True)
        sizes: dict[str, Any] = peft_sizes(model) | {"num_attention_heads": heads, "token_dim": heads * width}
        PrefixTuningConfig(num_virtual_tokens=len(place.weight), **sizes).save_pretrained(str(folder))
        values = {"prompt_embeddings": place.weight.detach().cpu().contiguous()}
        save_file(values, folder / "adapter_model.safetensors", {"format": "pt"})

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The base model with the saved prefix, trainable.

        Raises:
            LineageError: if it was made for a model of another shape.
        """
        settings: Any = PrefixTuningConfig.from_pretrained(str(folder))
        heads = settings.num_attention_heads or 1
        theirs = (settings.num_layers, heads, (settings.token_dim or 0) // heads)
        ours = head_shape(keys_and_values(freeze(model), torch.zeros(1, 1, dtype=torch.long)))
        if theirs != ours:
            raise LineageError(
                f"the prefix in {folder} is not of this model",
                problems=[f"layers, heads and their width are {theirs}, and the model's {ours}"],
                hint="use the base model that it was made with",
            )
        saved = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]  # (tokens, layers * 2 * width)
        place = Place(len(saved), ours)
        place.weight.data = saved.to(pretrained(model).device).clone()  # aligned, so that sums round as ever
        attach(model, place)
        return model

    def place(self, model: nn.Module) -> Place:
        """The model's prefix.

        Raises:
            CompatibilityError: if it has none.
        """
        place = attached(model)
        if not isinstance(place, Place):
            raise CompatibilityError(f"{type(model).__name__} has no prefix", hint="apply the method first")
        return place


@torch.no_grad()
def keys_and_values(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each layer computes of these tokens: key and value, (1, heads, time, width) each."""
    with evaluating(model):
        cache: Any = model(input_ids=ids.to(pretrained(model).device), use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]
