"""A prefix in attention that takes no keys and values from outside: DistilBERT's, ALBERT's, ModernBERT's.

`transformers` calls attention by a name that can be registered. This one is its `sdpa`, with a layer's prefix before
its own keys and values:

    attention(q, k, v) = softmax(q [K ; k]^T / sqrt(d)) [V ; v]

Every token sees all of the prefix, and positions stay what they were.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retain.models.family import pretrained
from retain.models.virtual_tokens import PLACE, Prefix

__all__ = ["attach_to_attention", "attention_in"]

NAME, WATCHED = "retain_prefix", "retain_watched"
"""Attention with a prefix, and attention that is only looked at, as a configuration names them."""

SLOT = "prefix"
"""An attention module's own attribute: its prefix, and the number of its layer there."""


def prefixed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """`sdpa`, a module's prefix before its keys and values, (rows, heads, time, width) each."""
    place: Prefix | None
    place, layer = vars(module).get(SLOT, (None, 0))
    if place is not None and place.active:
        before, first = place.layers(len(key), key.dtype)[layer]
        key, value = torch.cat([before, key], dim=2), torch.cat([first, value], dim=2)
        if attention_mask is not None:  # (rows, 1, time, time), true where a key is seen, or what is added to a score
            visible = float(attention_mask.dtype == torch.bool)
            shape = (*attention_mask.shape[:-1], before.shape[2])
            attention_mask = torch.cat([attention_mask.new_full(shape, visible), attention_mask], dim=-1)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, prefixed)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_in(model: nn.Module, ids: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """The attention modules that a pass calls by name, in order, each with the first keys and values that it makes.

    Args:
        model: a `transformers` model.
        ids: (1, time), what is read.
    """
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        found.setdefault(module, (key, value))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    before, ALL_ATTENTION_FUNCTIONS[WATCHED] = call_by(model, WATCHED), watch
    try:
        model(input_ids=ids)
    finally:
        call_by(model, before)
        del ALL_ATTENTION_FUNCTIONS[WATCHED]
    return found


def attach_to_attention(model: nn.Module, place: Prefix) -> None:
    """Let each attention module read its layer of a prefix; one that several layers share has one for all of them."""
    model.add_module(PLACE, place)
    place.in_cache = False
    ids = torch.zeros(1, 1, dtype=torch.long, device=pretrained(model).device)
    with torch.no_grad():
        for layer, module in enumerate(attention_in(model, ids)):
            vars(module)[SLOT] = (place, layer)
    call_by(model, NAME)


def call_by(model: nn.Module, name: str) -> str:
    """Let an encoder call attention by another name; the one it used."""
    config: Any = pretrained(model).base_model.config
    before: str = config._attn_implementation
    config._attn_implementation = name
    return before
