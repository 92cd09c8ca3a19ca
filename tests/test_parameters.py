from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from retain.parameters import (
    Counts,
    cast_frozen,
    copied,
    device_of,
    differentiating,
    evaluating,
    freeze,
    known_rows,
    local,
    num_bytes,
    put_back,
    swapped,
    trainable,
)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))


def test_trainable_is_what_requires_a_gradient() -> None:
    model = small()
    model[0].bias.requires_grad_(False)
    found = trainable(model)
    assert list(found) == ["0.weight", "2.weight", "2.bias"]
    assert found["0.weight"] is model[0].weight


def test_tied_parameters_count_once(build_llama: Callable[..., Any]) -> None:
    tied, untied = trainable(build_llama(tied=True)), trainable(build_llama(tied=False))
    assert "model.embed_tokens.weight" in tied
    assert "lm_head.weight" not in tied
    assert "lm_head.weight" in untied


def test_freeze_lets_nothing_move() -> None:
    model = small()
    assert freeze(model) is model
    assert trainable(model) == {}


def test_only_what_is_frozen_becomes_smaller() -> None:
    model = small()
    model[0].requires_grad_(False)
    model.register_parameter("steps", nn.Parameter(torch.tensor([3]), requires_grad=False))
    moving = model[2].weight
    assert cast_frozen(model, torch.bfloat16) is model
    assert model[0].weight.dtype == torch.bfloat16
    assert moving.dtype == torch.float32
    assert model.steps.dtype == torch.int64
    assert model[2].running_mean.dtype == torch.float32


def test_a_plain_tensor_is_local() -> None:
    tensor = torch.ones(2)
    assert local(tensor) is tensor


def test_num_bytes() -> None:
    assert num_bytes([torch.zeros(3, 4), torch.zeros(5, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)]) == (
        48 + 10 + 16
    )
    assert num_bytes([]) == 0


def test_evaluating_restores_modes_and_random_state() -> None:
    model = small().train()
    model[1].eval()  # a module of its own mind stays so
    state = torch.get_rng_state()
    with evaluating(model) as same:
        assert same is model
        assert not any(module.training for module in model.modules())
        torch.rand(7)
        model(torch.rand(5, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert model[2].num_batches_tracked == 0


def test_evaluating_restores_after_an_error() -> None:
    model = small().train()
    state = torch.get_rng_state()

    def fail() -> None:
        torch.rand(3)
        raise KeyError

    with pytest.raises(KeyError), evaluating(model):
        fail()
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.Linear])
def test_recurrent_layers_are_differentiated_without_cudnn(kind: Callable[..., nn.Module]) -> None:
    """cuDNN's backward pass refuses evaluation mode, and says so only on a GPU."""
    model = nn.Sequential(kind(3, 3)).train()
    before = torch.backends.cudnn.enabled
    state = torch.get_rng_state()
    with torch.no_grad(), differentiating(model) as same:
        assert same is model
        assert torch.is_grad_enabled()
        assert not model.training
        assert torch.backends.cudnn.enabled == (before and kind is nn.Linear)
        torch.rand(3)
    assert torch.backends.cudnn.enabled == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(KeyError), differentiating(model):
        raise KeyError
    assert torch.backends.cudnn.enabled == before


def test_swapped_shows_the_earlier_model_and_puts_the_later_one_back() -> None:
    model = small().eval()
    x = torch.rand(5, 3)
    earlier = {"0.weight": model[0].weight.detach().clone()}
    before = model(x)
    with torch.no_grad():
        model[0].weight += 1
    after = model(x)  # its graph is alive while the other weights are in
    with swapped(model, earlier) as same:
        inside = model(x)
        assert same is model
        assert torch.equal(inside, before)
        assert not inside.requires_grad
    assert torch.equal(model(x), after)
    after.sum().backward()
    assert model[0].weight.grad is not None


def test_swapped_fills_the_first_rows_of_a_weight_that_has_grown() -> None:
    model = nn.Linear(2, 3, bias=False)
    kept = model.weight.detach().clone()
    with swapped(model, {"weight": torch.zeros(2, 2)}):
        assert torch.equal(model.weight[:2], torch.zeros(2, 2))
        assert torch.equal(model.weight[2], kept[2])
    assert torch.equal(model.weight, kept)


def test_what_was_copied_can_be_put_back() -> None:
    model = small()
    model[0].bias.requires_grad_(False)
    kept = copied(model)
    assert list(kept) == list(trainable(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert all(torch.equal(kept[name], before[name]) for name in kept)  # copies, not the weights themselves
    put_back(model, kept)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[0].bias, before["0.bias"] + 1)


def test_rows_that_were_grown_stay() -> None:
    model = small()
    kept = {"0.weight": torch.full((2, 3), 7.0)}
    last = model[0].weight[2:].clone()
    assert known_rows(model[0].weight, kept["0.weight"]).shape == (2, 3)
    put_back(model, kept)
    assert torch.equal(model[0].weight[:2], kept["0.weight"])
    assert torch.equal(model[0].weight[2:], last)


def test_an_earlier_models_bf16_copies_do_not_outlive_it() -> None:
    """Autocast remembers a weight's bf16 copy by the weight, and one made without gradients has none."""
    model = nn.Linear(2, 2, bias=False)
    x = torch.eye(2)
    with torch.autocast("cpu", torch.bfloat16):
        now = model(x)
        with swapped(model, {"weight": torch.zeros(2, 2)}):
            assert torch.equal(model(x), torch.zeros(2, 2, dtype=torch.bfloat16))
        again = model(x)
    assert torch.equal(now, again)
    assert again.requires_grad


class Tallies(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0, dtype=torch.int64))


def test_counts_take_any_size_and_are_copied_and_put_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Tallies())
    kept = copied(model)
    assert set(kept) == {"0.weight", "0.bias", "1.seen"}
    model[1].seen = torch.arange(5)
    other = nn.Sequential(nn.Linear(2, 2), Tallies())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[1].seen, torch.arange(5))
    assert not other.load_state_dict({"1.seen": torch.arange(3)}, strict=False).unexpected_keys
    assert other.load_state_dict({}, strict=False).missing_keys[-1] == "1.seen"
    put_back(model, kept)
    assert len(model[1].seen) == 0
    assert copied(Tallies()).keys() == {"seen"}
    assert device_of(Tallies()) == torch.device("cpu")
