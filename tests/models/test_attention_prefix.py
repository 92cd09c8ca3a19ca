"""A prefix in attention without a cache: attention written out, a base that is left alone, copies of their own."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from retain.models.attention_prefix import NAME, attach_to_attention, attention_in, prefixed
from retain.models.virtual_tokens import Prefix, attached, num_virtual
from retain.types import Task

SHAPES = {"distilbert": 2, "modernbert": 2, "albert": 1}
"""Attention modules of two layers; ALBERT's layers are one."""


def placed(model: nn.Module, modules: int, *, tokens: int = 3) -> Prefix:
    place = Prefix(tokens, (modules, 2, 8))
    nn.init.normal_(place.weight)
    attach_to_attention(model, place)
    return place


@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_attention_is_to_the_prefix_and_the_layers_own(masked: str | None) -> None:
    place, module = Prefix(3, (2, 4, 5)), nn.Identity()
    nn.init.normal_(place.weight)
    vars(module).update(prefix=(place, 1), is_causal=False)
    query, key, value = torch.randn(3, 2, 4, 6, 5)
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    seen[1, :, :, 4:] = False
    mask = None if masked is None else seen if masked == "bool" else torch.zeros(2, 1, 6, 6).masked_fill(~seen, -1e9)
    found, _ = prefixed(module, query, key, value, mask, scaling=0.5)  # (rows, time, heads, width)
    before, first = place.layers(2, torch.float32)[1]
    scores = query @ torch.cat([before, key], dim=2).mT * 0.5
    if masked:
        scores[1, :, :, 7:] = -1e9
    wanted = scores.softmax(-1) @ torch.cat([first, value], dim=2)
    torch.testing.assert_close(found, wanted.transpose(1, 2))
    place.active = False
    bare, _ = prefixed(module, query, key, value, mask, scaling=0.5)
    assert not torch.allclose(bare, found, atol=1e-3)


@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("kind", ["colours", "tags", "text"])
def test_rows_read_it_and_padding_changes_nothing(
    build_encoder: Callable[..., Any], tasks: dict[str, Task], kind: str, architecture: str
) -> None:
    encoder = build_encoder(architecture).equip(tasks[kind]).prepare(tasks[kind])
    rows = tasks[kind].train
    before = encoder.family.forward(encoder.model, encoder.batch(rows)).logits()
    place = placed(encoder.model, SHAPES[architecture])
    assert attached(encoder.model) is place
    assert num_virtual(encoder.model) == 0, "the text's positions are what they were"
    together = encoder.family.forward(encoder.model, encoder.batch(rows)).logits()
    alone = [encoder.family.forward(encoder.model, encoder.batch([row])).logits() for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together, before, atol=1e-5)
    copied = deepcopy(encoder.model)
    place.weight.data += 1
    torch.testing.assert_close(encoder.family.forward(copied, encoder.batch(rows)).logits(), together)
    assert not torch.allclose(encoder.family.forward(encoder.model, encoder.batch(rows)).logits(), together, atol=1e-6)
    encoder.family.forward(encoder.model, encoder.batch(rows)).hidden.square().sum().backward()
    assert bool((place.weight.grad != 0).any())
    place.active = False
    assert torch.equal(encoder.family.forward(encoder.model, encoder.batch(rows)).logits(), before)


def test_modules_are_found_in_order_and_left_as_they_were(build_encoder: Callable[..., Any]) -> None:
    model = build_encoder("distilbert").model
    implementation = model.config._attn_implementation
    ids = torch.arange(5, 9)[None]
    found = attention_in(model, ids)
    assert list(found) == [layer.attention for layer in model.distilbert.transformer.layer]
    assert [tuple(key.shape) for key, _ in found.values()] == [(1, 2, 4, 8)] * 2
    first = next(iter(found)).k_lin(model.distilbert.embeddings(ids)).unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(next(iter(found.values()))[0], first)
    assert model.config._attn_implementation == implementation != NAME
    assert not attention_in(build_encoder("deberta-v2").model, ids)
