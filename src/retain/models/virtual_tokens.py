"""Virtual tokens before a model's input: trained embeddings (prompts), or trained keys and values (prefixes).

Both are hooks of the model's forward pass, so that the model stays what it was: its masks and positions are extended,
and everything of the text sees the virtual tokens. An encoder computes states for a prompt as for any token, before
those of the text; what reads a row's first state (a classifier of rows) reads the prompt's first.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache

from retain.errors import CompatibilityError
from retain.models.encoder_heads import shell_of
from retain.models.family import pretrained

__all__ = [
    "PLACE",
    "Prefix",
    "VirtualTokens",
    "attach",
    "attached",
    "empty_cache",
    "head_shape",
    "input_embeddings",
    "num_virtual",
    "own_attention",
    "seen",
]

PLACE = "prompts"
"""The name of the module that is added to the model."""


class VirtualTokens(nn.Module, ABC):
    """Embeddings that come before the input; a subclass says which.

    Args:
        embed: the model's embedding of tokens.
    """

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = (embed,)  # in a tuple: it is the model's own

    @abstractmethod
    def values(self) -> Tensor | None:
        """(tokens, width), or None for the base's own behaviour."""

    def read(self, _: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """As a forward pre-hook of the model: its input with the virtual tokens before it, at positions from 0.

        The model's outputs are longer by them. Once they lie in the cache, only masks and positions change.
        """
        if (prompt := self.values()) is None:  # (n, width)
            return arguments, inputs
        num, cache = len(prompt), inputs.get("past_key_values")
        first = cache is None or cache.get_seq_length() == 0
        changed = dict(inputs)
        if (mask := inputs.get("attention_mask")) is not None:
            changed["attention_mask"] = seen(mask, num, first=first)
        for name in ("position_ids", "cache_position"):
            if (positions := inputs.get(name)) is not None:
                own = torch.arange(num, device=positions.device).expand(*positions.shape[:-1], num)
                changed[name] = torch.cat([own, positions + num], dim=-1) if first else positions + num
        if first and (types := inputs.get("token_type_ids")) is not None:  # a prompt is of the first sentence
            changed["token_type_ids"] = torch.cat([types.new_zeros(len(types), num), types], dim=1)
        if first:
            text = inputs.get("inputs_embeds")
            if text is None:
                text = self.embed[0](changed.pop("input_ids"))  # (rows, time, width)
            before = prompt.to(text.dtype).expand(len(text), -1, -1)
            changed["inputs_embeds"] = torch.cat([before, text], dim=1)
        return arguments, changed


class Prefix(nn.Module):
    """Keys and values of virtual tokens in every layer of a transformer; of two halves, in the decoder's own attention.

    Args:
        tokens: virtual tokens.
        shape: layers, key-value heads, and their width.
    """

    def __init__(self, tokens: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        layers, heads, width = shape
        self.shape = shape
        self.weight = nn.Parameter(torch.zeros(tokens, layers * 2 * heads * width))
        self.active = True
        self.in_cache = True  # the text's positions come after it

    def layers(self, rows: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Key and value of each layer, (rows, heads, tokens, width) each."""
        layers, heads, width = self.shape
        whole = self.weight.to(dtype).view(-1, layers, 2, heads, width).permute(1, 2, 3, 0, 4)
        return [(pair[0].expand(rows, -1, -1, -1), pair[1].expand(rows, -1, -1, -1)) for pair in whole]

    def read(self, model: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """As a forward pre-hook of the model: a cache that holds the prefix already, and masks and positions for it.

        Raises:
            CompatibilityError: with gradient checkpointing, under which `transformers` leaves a cache out.
        """
        if not self.active:
            return arguments, inputs
        if model.training and any(vars(module).get("gradient_checkpointing") for module in model.modules()):
            raise CompatibilityError(
                "a prefix lies in the cache, which gradient checkpointing leaves out",
                hint="set `train.gradient_checkpointing: false`, or use `method: prompt`",
            )
        num, cache = len(self.weight), inputs.get("past_key_values")
        changed = dict(inputs)
        if (mask := inputs.get("attention_mask")) is not None:
            changed["attention_mask"] = torch.cat([mask.new_ones(*mask.shape[:-1], num), mask], dim=-1)
        for name in ("position_ids", "cache_position"):
            if (positions := inputs.get(name)) is not None:
                changed[name] = positions + num
        if cache is None or cache.get_seq_length() == 0:
            text: Tensor | None = inputs.get("input_ids")
            rows = len(inputs["inputs_embeds"] if text is None else text)
            dtype = cast("Tensor", pretrained(model).get_input_embeddings().weight).dtype
            if cache is None:
                cache = empty_cache(model, beside_source=inputs.get("encoder_hidden_states") is not None)
            own = own_attention(cache)
            for layer, (key, value) in enumerate(self.layers(rows, dtype)):
                own.update(key, value, layer)
            changed["past_key_values"] = cache
        return arguments, changed


def empty_cache(model: nn.Module, *, beside_source: bool) -> Cache:
    """A cache of nothing; beside a source, a decoder also keeps what it knows of that."""
    config = pretrained(model).config
    own = DynamicCache(config=config)
    return EncoderDecoderCache(own, DynamicCache(config=config)) if beside_source else own


def own_attention(cache: Cache) -> Cache:
    """What the text's own tokens left in the cache; the other part is what a decoder knows of its encoder's."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def attach(model: nn.Module, place: VirtualTokens | Prefix) -> None:
    """Let the model read these virtual tokens.

    Of two halves the encoder reads a prompt before the source, and the decoder a prefix before what it writes. A
    classifier that guesses hidden tokens, too, reads them in both passes.
    """
    model.add_module(PLACE, place)
    halves: Any = model
    if not pretrained(model).config.is_encoder_decoder:
        beside = shell_of(model)
        for reader in [model] if beside is None else [model, beside.model]:
            reader.register_forward_pre_hook(place.read, with_kwargs=True)
    elif isinstance(place, Prefix):
        halves.get_decoder().register_forward_pre_hook(place.read, with_kwargs=True)
    else:
        halves.get_encoder().register_forward_pre_hook(place.read, with_kwargs=True)
        halves.get_decoder().register_forward_pre_hook(see_source, with_kwargs=True)


def see_source(_: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """As a forward pre-hook of a decoder: let it see what its encoder read before the source, which no mask knows."""
    states, mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
    if states is None or mask is None or mask.shape[-1] == states.shape[1]:
        return arguments, inputs
    return arguments, {**inputs, "encoder_attention_mask": seen(mask, states.shape[1] - mask.shape[-1], first=False)}


def attached(model: nn.Module) -> nn.Module | None:
    """The virtual tokens that the model reads, on or off."""
    return dict(model.named_children()).get(PLACE)


def num_virtual(model: nn.Module) -> int:
    """Positions that the model's virtual tokens take before a text's."""
    place = attached(model)
    if isinstance(place, Prefix):
        return len(place.weight) if place.active and place.in_cache else 0
    values = place.values() if isinstance(place, VirtualTokens) else None
    return 0 if values is None else len(values)


def seen(mask: Tensor, num: int, *, first: bool) -> Tensor:
    """A mask with virtual tokens before the text, which everything after them sees.

    Args:
        mask: (rows, time), or (rows, 1, query, key), bool.
        num: virtual tokens.
        first: are they among the queries?
    """
    if mask.dim() == 2:
        return torch.cat([mask.new_ones(len(mask), num), mask], dim=1)
    wider = torch.cat([mask.new_ones(*mask.shape[:3], num), mask], dim=3)
    own = mask.new_ones(num, wider.shape[3]).tril().expand(len(mask), mask.shape[1], -1, -1)
    return torch.cat([own, wider], dim=2) if first else wider


def input_embeddings(model: nn.Module) -> nn.Embedding:
    """The model's embedding of tokens."""
    return cast("nn.Embedding", pretrained(model).get_input_embeddings())


def head_shape(caches: Sequence[tuple[Tensor, Tensor]]) -> tuple[int, int, int]:
    """Layers, heads and width of keys and values, (rows, heads, time, width) each.

    Raises:
        CompatibilityError: if layers differ.
    """
    shapes = {tuple(part.shape[1::2]) for pair in caches for part in pair}
    if len(shapes) != 1:
        raise CompatibilityError(
            "a prefix has one width in every layer, and this model's layers differ",
            problems=[f"heads and widths: {', '.join(map(str, sorted(shapes)))}"],
            hint="use `method: prompt`",
        )
    heads, width = shapes.pop()
    return len(caches), heads, width
