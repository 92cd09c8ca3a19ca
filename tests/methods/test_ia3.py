"""IA3: factors of 1 at the start, and outputs scaled as the paper says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from retain.errors import ConfigError
from retain.kernels.per_example import squared_gradients
from retain.methods.ia3 import IA3
from retain.models.decoder import DecoderFamily
from retain.parameters import trainable
from retain.types import IGNORED, Batch, Encoded, Example


def test_every_factor_starts_at_one(llama: nn.Module) -> None:
    model = IA3().apply(llama)
    assert len(trainable(model)) == 2 * 3
    assert all(bool((value == 1).all()) for value in trainable(model).values())


def test_keys_scale_their_output_and_the_feed_forward_layer_its_input(build_llama: Callable[..., nn.Module]) -> None:
    model = IA3().apply(build_llama())
    for parameter in trainable(model).values():
        nn.init.uniform_(parameter, 0.5, 2)
    base, x = build_llama().model.layers[0], torch.randn(3, 32)
    layer = model.get_base_model().model.layers[0]
    factors = dict(layer.named_parameters())
    scale = factors["self_attn.k_proj.ia3_l.default"].flatten()
    torch.testing.assert_close(layer.self_attn.k_proj(x), scale * base.self_attn.k_proj(x))
    inner, scale = torch.randn(3, 64), factors["mlp.down_proj.ia3_l.default"].flatten()
    torch.testing.assert_close(layer.mlp.down_proj(inner), base.mlp.down_proj(scale * inner))


def test_named_layers(build_llama: Callable[..., nn.Module]) -> None:
    assert len(trainable(IA3(target_modules=("q_proj",)).apply(build_llama()))) == 2
    model = IA3(target_modules=("up_proj", "down_proj"), feedforward_modules=("down_proj",)).apply(build_llama())
    assert {tuple(value.shape) for value in trainable(model).values()} == {(64, 1), (1, 64)}
    with pytest.raises(ValueError, match="feedforward_modules"):
        IA3(feedforward_modules=("down_proj",))


def test_a_type_that_peft_does_not_know_is_refused_with_the_layers(llama: nn.Module) -> None:
    llama.config.model_type = "other"
    with pytest.raises(ConfigError, match="other") as caught:
        IA3().apply(llama)
    assert "down_proj" in str(caught.value)


@pytest.mark.parametrize("engine", ["hooks", "auto"])
def test_squares_of_single_examples_gradients(build_llama: Callable[..., nn.Module], engine: Any) -> None:
    """A factor is a matrix of one row or column to `nn.Module`, and a vector to what is computed."""
    model = IA3().apply(build_llama().double()).double()
    examples = [Example(id=str(i), text="x", source="generated") for i in range(3)]
    rows = [
        Encoded(example, {"input_ids": list(range(5 + i, 12))}, [IGNORED, *range(7 + i, 13)], [1.0] * (7 - i))
        for i, example in enumerate(examples)
    ]
    batch = DecoderFamily().collate(rows, None, packed=True)

    def nats(part: Batch) -> torch.Tensor:
        logits = model(**part.inputs, use_cache=False).logits[part.counted]
        return F.cross_entropy(logits, part.targets[part.counted], reduction="none")

    fast = squared_gradients(model, batch, nats, engine=engine)
    slow = squared_gradients(model, batch, nats, engine="loop")
    assert fast.engine == "hooks"
    assert fast.values.keys() == trainable(model).keys()
    for name, value in slow.values.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(fast.values[name], value)
