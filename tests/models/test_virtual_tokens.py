"""Virtual tokens: masks, the shape of keys and values, and where they are attached."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from retain.errors import CompatibilityError
from retain.models.encoder_heads import masked_model
from retain.models.virtual_tokens import (
    Prefix,
    VirtualTokens,
    attach,
    attached,
    head_shape,
    input_embeddings,
    num_virtual,
    seen,
)
from retain.types import Example, Message, Task


class Fixed(VirtualTokens):
    """Two tokens that never change, or none."""

    on = True

    def values(self) -> torch.Tensor | None:
        width = self.embed[0].weight.shape[1]
        return torch.linspace(-1, 1, 2 * width).view(2, width) if self.on else None


def test_masks() -> None:
    assert seen(torch.tensor([[1, 0]]), 2, first=True).tolist() == [[1, 1, 1, 0]]
    mask = torch.tensor([[[[True, False], [False, True]]]])
    assert seen(mask, 1, first=True)[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert seen(mask, 1, first=False)[0, 0].int().tolist() == [[1, 1, 0], [1, 0, 1]]


def test_embeddings_come_before_the_text(llama: nn.Module) -> None:
    ids = torch.arange(5, 9)[None]
    base = llama(input_ids=ids).logits
    place = Fixed(input_embeddings(llama))
    whole = torch.cat([place.values()[None], input_embeddings(llama)(ids)], dim=1)
    wanted = llama(inputs_embeds=whole).logits
    assert attached(llama) is None
    assert num_virtual(llama) == 0
    attach(llama, place)
    assert attached(llama) is place
    assert num_virtual(llama) == 2
    torch.testing.assert_close(llama(input_ids=ids).logits, wanted)
    positions = torch.arange(4)[None]
    torch.testing.assert_close(llama(input_ids=ids, position_ids=positions).logits, wanted)
    place.on = False
    assert torch.equal(llama(input_ids=ids).logits, base)


PAIR = Example(
    "0", (Message("user", "the sky"), Message("user", "a leaf"), Message("assistant", "blue")), task="colours"
)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "albert"])
@pytest.mark.parametrize("kind", ["colours", "pair", "per_task", "topics", "tags", "text", "text beside"])
def test_an_encoder_reads_them_by_hand(
    build_encoder: Callable[..., Any], tasks: dict[str, Task], kind: str, architecture: str
) -> None:
    """The oracle: embeddings, masks and types written one after the other; targets stay those of the text's tokens."""
    fields = {"heads": "per_task"} if kind == "per_task" else {}
    names = {"pair": ["colours"], "per_task": ["colours", "animals"], "text beside": ["text", "colours"]}
    learned = [tasks[name] for name in names.get(kind, [kind])]
    encoder = build_encoder(architecture, **fields).equip(*learned)
    for task in learned:
        encoder.prepare(task)
    batch = encoder.batch([PAIR] if kind == "pair" else learned[0].train)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    place = Fixed(input_embeddings(encoder.model))
    before = encoder.family.forward(encoder.model, batch).logits()
    language = masked_model(encoder.model) if kind.startswith("text") else encoder.model
    whole = torch.cat([place.values().expand(len(ids), -1, -1), place.embed[0](ids)], dim=1)
    types = {
        name: torch.cat([torch.zeros(len(ids), 2, dtype=torch.long), value], dim=1)
        for name, value in batch.inputs.items()
        if name == "token_type_ids"
    }
    longer = torch.cat([torch.ones_like(mask[:, :2]), mask], dim=1)
    with torch.no_grad():
        theirs = language(inputs_embeds=whole, attention_mask=longer, **types).logits
    attach(encoder.model, place)
    ours = encoder.family.forward(encoder.model, batch).logits()
    if kind.startswith(("text", "tags")):
        torch.testing.assert_close(ours, theirs[:, 2:][batch.counted], rtol=1e-5, atol=1e-6)
    elif kind == "topics":
        torch.testing.assert_close(ours[:, 1].view(len(ids), -1), theirs, rtol=1e-5, atol=1e-6)
    elif kind == "per_task":
        torch.testing.assert_close(ours[:, :2], theirs[:, :2], rtol=1e-5, atol=1e-6)
        assert bool((ours[:, 2:] < -1e3).all())
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, before, atol=1e-5)
    place.on = False
    assert torch.equal(encoder.family.forward(encoder.model, batch).logits(), before)


@pytest.mark.parametrize("kind", ["colours", "tags", "text"])
def test_padding_changes_nothing_behind_a_prompt(encoder: Any, tasks: dict[str, Task], kind: str) -> None:
    encoder.equip(tasks[kind]).prepare(tasks[kind])
    attach(encoder.model, Fixed(input_embeddings(encoder.model)))
    rows = tasks[kind].train
    together = encoder.family.forward(encoder.model, encoder.batch(rows)).logits()
    alone = [encoder.family.forward(encoder.model, encoder.batch([row])).logits() for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta", "modernbert"])
def test_a_text_is_read_as_far_as_positions_are_left(
    build_encoder: Callable[..., Any], tasks: dict[str, Task], architecture: str
) -> None:
    encoder = build_encoder(architecture).equip(tasks["colours"]).prepare(tasks["colours"])
    attach(encoder.model, Fixed(input_embeddings(encoder.model)))
    prompts = [(Message("user", "the sky is blue " * 30),)]
    assert encoder.family.answer(encoder.model, encoder.renderer, prompts, max_new_tokens=1)[0] in ("blue", "green")


def test_a_prefix_has_a_key_and_a_value_in_every_layer() -> None:
    place = Prefix(3, (2, 4, 5))
    place.weight.data = torch.arange(3 * 2 * 2 * 4 * 5.0).view(3, -1)
    layers = place.layers(6, torch.float64)
    assert len(layers) == 2
    key, value = layers[1]
    assert key.shape == value.shape == (6, 4, 3, 5)
    assert key.dtype == torch.float64
    flat = place.weight.double().view(3, 2, 2, 4, 5)  # (tokens, layers, key or value, heads, width), as PEFT keeps them
    assert torch.equal(key[5, 1, 2], flat[2, 1, 0, 1])
    assert torch.equal(value[0, 3, 1], flat[1, 1, 1, 3])


def test_layers_that_differ_have_no_prefix() -> None:
    one, other = torch.zeros(1, 4, 3, 5), torch.zeros(1, 2, 3, 5)
    assert head_shape([(one, one), (one, one)]) == (2, 4, 5)
    with pytest.raises(CompatibilityError, match="differ"):
        head_shape([(one, one), (other, other)])
