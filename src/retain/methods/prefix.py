"""Prefix tuning: trained keys and values before the text in every layer, and nothing else.

    attention_i(x) = softmax(q_i [K_i ; k_i]^T / sqrt(d)) [V_i ; v_i]          K_i, V_i (n, width) are trained

They start as the keys and values that the model itself computes for tokens drawn from its vocabulary, so that the tuned
model starts as the base behind a few real tokens. An encoder's text sees them on its left; of two halves, the prefix
lies in the decoder's attention to what it wrote.

Source: Li and Liang 2021, https://arxiv.org/abs/2101.00190, section 4 (the start: section 7.4), as PEFT computes it.
Differs: no MLP makes the prefix; the start takes its place. Of two halves the encoder has none.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PrefixTuningConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from retain.errors import CompatibilityError, LineageError
from retain.methods.soft_prompt import WEIGHTS, SoftPrompt, load_heads, peft_sizes, save_prompt
from retain.models.attention_prefix import attach_to_attention, attention_in
from retain.models.family import pretrained
from retain.models.new_heads import let_heads_train
from retain.models.virtual_tokens import Prefix as Place
from retain.models.virtual_tokens import attach, attached, empty_cache, head_shape, input_embeddings, own_attention
from retain.parameters import evaluating, freeze

__all__ = ["Prefix"]


@dataclass(frozen=True)
class Prefix(SoftPrompt):
    """Train keys and values of `num_tokens` virtual tokens in every layer of a frozen model, and an encoder's heads.

    Args:
        num_tokens: virtual tokens, above 0.
    """

    name: ClassVar[str] = "prefix"

    num_tokens: int = 20

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens: expected a whole number above 0, got {self.num_tokens}")

    def apply(self, model: nn.Module) -> nn.Module:
        """The model, frozen, with a prefix in float32.

        Raises:
            CompatibilityError: if its layers differ in their heads, or have no place for keys and values.
        """
        size = input_embeddings(model).num_embeddings
        pairs = keys_and_values(freeze(model), torch.randint(size, (1, self.num_tokens)))
        place = Place(self.num_tokens, head_shape(pairs))
        whole = torch.stack([torch.cat([key, value]) for key, value in pairs])  # (layers, 2, heads, tokens, width)
        place.weight.data = whole.permute(3, 0, 1, 2, 4).flatten(1).to(torch.promote_types(whole.dtype, torch.float32))
        put(model, place)
        return let_heads_train(model)

    def save(self, model: nn.Module, folder: Path) -> None:
        """PEFT's own layout, which other tools load."""
        place = self.place(model)
        layers, heads, width = place.shape
        sizes: dict[str, Any] = peft_sizes(model) | {"num_attention_heads": heads, "token_dim": heads * width}
        sizes["num_layers"], values = layers, place.weight
        if pretrained(model).config.is_encoder_decoder:
            sizes |= {"num_layers": 2 * layers, "num_transformer_submodules": 2}
            values = with_unread(values, layers)
        save_prompt(model, PrefixTuningConfig(num_virtual_tokens=len(values), **sizes), values, folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The base model with the saved prefix, trainable.

        Raises:
            LineageError: if it was made for a model of another shape.
        """
        settings: Any = PrefixTuningConfig.from_pretrained(str(folder))
        heads, halves = settings.num_attention_heads or 1, settings.num_transformer_submodules or 1
        theirs = (settings.num_layers // halves, heads, (settings.token_dim or 0) // heads)
        ours = head_shape(keys_and_values(freeze(model), torch.zeros(1, 1, dtype=torch.long)))
        if theirs != ours:
            raise LineageError(
                f"the prefix in {folder} is not of this model",
                problems=[f"layers, heads and their width are {theirs}, and the model's {ours}"],
                hint="use the base model that it was made with",
            )
        saved = load_file(folder / WEIGHTS)["prompt_embeddings"]  # (tokens, layers * 2 * width)
        if halves == 2:
            saved = without_unread(saved, ours[0])
        place = Place(len(saved), ours)
        place.weight.data = saved.to(pretrained(model).device).clone()  # aligned, so that sums round as ever
        put(model, place)
        return load_heads(model, folder)

    def place(self, model: nn.Module) -> Place:
        """The model's prefix.

        Raises:
            CompatibilityError: if it has none.
        """
        place = attached(model)
        if not isinstance(place, Place):
            raise CompatibilityError(f"{type(model).__name__} has no prefix", hint="apply the method first")
        return place


def with_unread(values: Tensor, layers: int) -> Tensor:
    """A decoder's prefix, (tokens, layers * 2 * width), as PEFT reads it of a model in two halves.

    There each layer has four parts, of which the second two, of its attention to the source, are thrown away. Written
    for as many layers as there are, PEFT would give the lower and the upper half of them the same prefix; written for
    twice as many, each has its own.
    """
    own = values.unflatten(1, (layers, -1))
    return torch.cat([own, torch.zeros_like(own)], dim=2).flatten(1)


def without_unread(saved: Tensor, layers: int) -> Tensor:
    """The decoder's prefix in what `with_unread` made."""
    return saved.unflatten(1, (layers, 2, -1))[:, :, 0].flatten(1)


@torch.no_grad()
def keys_and_values(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each layer computes of these tokens: key and value, (1, heads, time, width) each.

    A decoder that reads a source reads these tokens there, too.

    Raises:
        CompatibilityError: if the layers keep none.
    """
    own, ids = pretrained(model), ids.to(pretrained(model).device)
    halves = {"decoder_input_ids": ids} if own.config.is_encoder_decoder else {}
    cache = empty_cache(own, beside_source=bool(halves))
    with evaluating(model):
        if takes_cache(model):
            model(input_ids=ids, **halves, past_key_values=cache)
            layers: Any = own_attention(cache).layers
            return [(layer.keys, layer.values) for layer in layers]
        found = list(attention_in(model, ids).values())
    if not found:
        raise CompatibilityError(
            f"{type(model).__name__} has no place for a prefix: its attention takes no keys and values from outside",
            hint="use `method: prompt`, which every encoder reads",
        )
    return found


def takes_cache(model: nn.Module) -> bool:
    """Does the network read keys and values that were made before?"""
    return "past_key_values" in inspect.signature(pretrained(model).base_model.forward).parameters


def put(model: nn.Module, place: Place) -> None:
    """Let a model read a prefix, in its cache where it has one, and else in each layer's attention."""
    (attach if takes_cache(model) else attach_to_attention)(model, place)
