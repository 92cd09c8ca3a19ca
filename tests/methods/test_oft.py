"""OFT: a rotation of what a weight reads, so that lengths and angles of its rows stay."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from retain.methods.oft import OFT
from retain.parameters import trainable


def test_rows_keep_their_lengths_and_angles(build_llama: Callable[..., nn.Module]) -> None:
    method = OFT(block_size=8, exact=True)
    base = dict(build_llama().double().named_parameters())
    model = method.apply(build_llama().double()).double()
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.3)
    now = dict(method.merge(model).named_parameters())
    for name in method.weight_changes(method.apply(build_llama())):
        assert not torch.allclose(now[name], base[name])
        torch.testing.assert_close(now[name] @ now[name].T, base[name] @ base[name].T)  # W R R^T W^T = W W^T


def test_the_series_is_near_a_rotation_where_it_is_small(build_llama: Callable[..., nn.Module]) -> None:
    method = OFT(block_size=8)
    model = method.apply(build_llama())
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.01)
    base, now = dict(build_llama().named_parameters()), dict(method.merge(model).named_parameters())
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(now[name] @ now[name].T, base[name] @ base[name].T, rtol=1e-3, atol=1e-5)


def test_a_block_that_does_not_divide_the_width_becomes_one_that_does(llama: nn.Module) -> None:
    model = OFT(block_size=12).apply(llama)
    assert {tuple(p.shape) for n, p in trainable(model).items() if "q_proj" in n} in ({(4, 28)}, {(2, 120)})


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="block_size"):
        OFT(block_size=1)
    with pytest.raises(ValueError, match="dropout"):
        OFT(dropout=1.0)
