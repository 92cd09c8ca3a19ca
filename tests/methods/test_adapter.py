"""Adapters: identity at the start, closed-form laterals, columns that never change, equal logits after a reload."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from retain.errors import CompatibilityError, ConfigError, LineageError
from retain.methods.adapter import Adapter, places
from retain.models.decoder import DecoderFamily
from retain.models.recurrent import RecurrentFamily
from retain.models.recurrent_network import RecurrentConfig, RecurrentForCausalLM
from retain.parameters import trainable

IDS = torch.arange(5, 15)[None]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def shake(model: nn.Module) -> None:
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.2)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()


def recurrent(cell: str = "lstm") -> nn.Module:
    return RecurrentForCausalLM(RecurrentConfig(vocab_size=64, hidden_size=16, cell=cell, num_layers=2)).eval()


@pytest.mark.parametrize(("placement", "num"), [("pfeiffer", 2), ("houlsby", 4)])
def test_starts_as_the_base_and_trains_its_own_parameters_only(llama: nn.Module, placement: str, num: int) -> None:
    names, before = set(llama.state_dict()), logits(llama)
    model = Adapter(size=3, placement=placement).apply(llama)
    assert torch.equal(logits(model), before)
    assert names <= set(model.state_dict()), "the base's weights keep their names"
    assert trainable(model).keys() == model.state_dict().keys() - names
    assert sum(p.numel() for p in trainable(model).values()) == num * (32 * 3 + 3 + 3 * 32 + 32)


def test_one_adapter_is_the_papers_equation(llama: nn.Module) -> None:
    model = Adapter(size=3).apply(llama)
    shake(model)
    seen: list[torch.Tensor] = []
    mlp = model.model.layers[0].mlp
    mlp.down_proj.register_forward_hook(lambda _, __, output: seen.append(output))
    mlp.register_forward_hook(lambda _, __, output: seen.append(output))
    logits(model)
    own = dict(places(model)[0].columns["default"].named_parameters())
    bottleneck = torch.relu(seen[0] @ own["down.weight"].T + own["down.bias"])
    torch.testing.assert_close(seen[1], seen[0] + bottleneck @ own["up.weight"].T + own["up.bias"])


def test_laterals_are_the_papers_equation(llama: nn.Module) -> None:
    method = Adapter(size=3)
    model = method.apply(llama)
    shake(model)
    place = places(method.extend(model, "2"))[0]
    shake(model)
    hidden = torch.randn(4, 32)
    one, two = place.column("default"), place.column("2")
    with torch.no_grad():
        z = torch.relu(one.down(hidden))
        lateral = torch.relu((two.alpha[0] * z) @ two.lateral_in.weight.T + two.lateral_in.bias)
        inner = torch.relu(two.down(hidden) + lateral @ two.lateral_out.weight.T)
        torch.testing.assert_close(place(hidden), hidden + two.up(inner))


@pytest.mark.parametrize("build", [gpt2, recurrent, lambda: recurrent("gru")], ids=["gpt2", "lstm", "gru"])
def test_other_networks(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    base = build()
    before = logits(base)
    method = Adapter(size=4, placement="houlsby")
    model = method.apply(base)
    assert torch.equal(logits(model), before)
    shake(model)
    assert not torch.equal(logits(model), before)
    padded = torch.cat([IDS, torch.zeros_like(IDS)], dim=1)
    mask = (padded > 0).long()
    with torch.no_grad():  # a packed sequence inside a recurrent network
        flipped = model(input_ids=padded.flip(1), attention_mask=mask.flip(1), use_cache=True).logits
    assert torch.isfinite(flipped).all()
    model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    copied = deepcopy(model)
    shake(copied)
    assert not torch.equal(logits(copied), logits(model)), "a copy answers with adapters of its own"


def test_columns_are_frozen_and_laterals_live(llama: nn.Module) -> None:
    method = Adapter(size=16, dropout=0.5, activation="gelu")
    model = method.apply(llama)
    shake(model)
    first = logits(model)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    method.extend(model, "2")
    torch.testing.assert_close(logits(model), logits(method.activate(model, [])), rtol=0, atol=0)  # W_up is zero
    method.activate(model, ["default", "2"])
    shake(model)
    assert all(".2." in name for name in trainable(model))
    second = logits(model)
    model.train()(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in old), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, f"{name} is alive"
    assert torch.equal(logits(method.activate(model, ["default"])), first)
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in old.items())
    with torch.no_grad():
        places(model)[0].column("default").down.weight.add_(1.0)
    assert not torch.equal(logits(method.activate(model, ["default", "2"])), second), "column 2 reads column 1"


def test_a_column_made_without_others_reads_none(llama: nn.Module) -> None:
    method = Adapter(size=3)
    model = method.apply(llama)
    method.extend(method.activate(model, []), "2")
    assert places(model)[0].column("2").reads == ()
    assert method.modules(model) == ["default", "2"]


def test_save_and_load(build_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    method = Adapter(size=3)
    model = method.apply(build_llama())
    shake(model)
    method.extend(model, "2")
    shake(model)
    both = logits(model)
    one = logits(method.activate(model, ["default"]))
    method.save(model, tmp_path)
    base = build_llama()
    state = torch.get_rng_state()
    again = method.load(base, tmp_path)
    assert torch.equal(logits(again), both)
    assert torch.equal(logits(method.activate(again, ["default"])), one)
    assert method.modules(again) == ["default", "2"]
    assert torch.equal(state, torch.get_rng_state()), "loading draws nothing"
    with pytest.raises(LineageError, match="not of this model"):
        method.load(gpt2(), tmp_path)


def test_detached_is_the_base(llama: nn.Module) -> None:
    before = logits(llama)
    method = Adapter(size=3)
    model = method.apply(llama)
    shake(model)
    changed = logits(model)
    with method.detached(model) as base:
        assert torch.equal(logits(base), before)
    assert torch.equal(logits(model), changed)


def test_refusals(llama: nn.Module) -> None:
    assert Adapter().supports(DecoderFamily()) is None
    assert Adapter().supports(RecurrentFamily()) is None
    with pytest.raises(CompatibilityError, match="merged"):
        Adapter().merge(llama)
    with pytest.raises(CompatibilityError, match="no weight"):
        Adapter().weight_changes(llama)
    with pytest.raises(CompatibilityError, match="no adapter"):
        Adapter().activate(llama, ["default"])
    assert Adapter().activate(llama, []) is llama
    with pytest.raises(ConfigError, match="mlp"):
        Adapter().apply(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="size"):
        Adapter(size=0)
    with pytest.raises(ValueError, match="dropout"):
        Adapter(dropout=1.0)
