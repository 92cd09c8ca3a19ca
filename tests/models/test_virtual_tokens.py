"""Virtual tokens: masks, the shape of keys and values, and where they are attached."""

import pytest
import torch
from torch import nn

from retain.errors import CompatibilityError
from retain.models.virtual_tokens import Prefix, VirtualTokens, attach, attached, head_shape, input_embeddings, seen


class Fixed(VirtualTokens):
    """Two tokens that never change, or none."""

    on = True

    def values(self) -> torch.Tensor | None:
        return torch.ones(2, 32) if self.on else None


def test_masks() -> None:
    assert seen(torch.tensor([[1, 0]]), 2, first=True).tolist() == [[1, 1, 1, 0]]
    mask = torch.tensor([[[[True, False], [False, True]]]])
    assert seen(mask, 1, first=True)[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert seen(mask, 1, first=False)[0, 0].int().tolist() == [[1, 1, 0], [1, 0, 1]]


def test_embeddings_come_before_the_text(llama: nn.Module) -> None:
    ids = torch.arange(5, 9)[None]
    base = llama(input_ids=ids).logits
    whole = torch.cat([torch.ones(1, 2, 32), input_embeddings(llama)(ids)], dim=1)
    wanted = llama(inputs_embeds=whole).logits
    assert attached(llama) is None
    place = Fixed(input_embeddings(llama))
    attach(llama, place)
    assert attached(llama) is place
    torch.testing.assert_close(llama(input_ids=ids).logits, wanted)
    positions = torch.arange(4)[None]
    torch.testing.assert_close(llama(input_ids=ids, position_ids=positions).logits, wanted)
    place.on = False
    assert torch.equal(llama(input_ids=ids).logits, base)


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
