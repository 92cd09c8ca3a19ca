"""Freezing: patterns name what moves, the base's values are kept, and a name that fits nothing is an error."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from retain.errors import CompatibilityError, ConfigError
from retain.methods.freeze import Freeze, matches
from retain.models.decoder import DecoderFamily
from retain.models.recurrent_network import RecurrentConfig, RecurrentForCausalLM
from retain.parameters import trainable

IDS = torch.arange(5, 15)[None]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def shake(model: nn.Module) -> None:
    for parameter in trainable(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("model.layers.1", 9),
        ("model.layers.?.mlp.*", 6),
        ("*norm*", 5),
        ("*.q_proj.weight", 2),
        ("model.embed_tokens", 1),
    ],
)
def test_patterns(llama: nn.Module, pattern: str, wanted: int) -> None:
    model = Freeze(train=(pattern,)).apply(llama)
    assert len(trainable(model)) == wanted
    assert all(matches(pattern, name) for name in trainable(model))


def test_a_pattern_is_of_whole_parts() -> None:
    assert matches("model.layers.1", "model.layers.1.mlp.weight")
    assert not matches("model.layers.1", "model.layers.11.mlp.weight")
    assert not matches("layers", "model.layers.1.mlp.weight")


def test_all_but_the_bottom_layers(build_llama: Callable[..., nn.Module]) -> None:
    model = Freeze(num_layers=1).apply(build_llama(tied=False))
    assert {name.split(".")[0] for name in trainable(model)} == {"model", "lm_head"}
    assert not [name for name in trainable(model) if "layers.0" in name or "embed" in name]
    assert len(trainable(Freeze().apply(build_llama(tied=True)))) == 2 * 9 + 1
    assert "lm_head.weight" not in trainable(Freeze().apply(build_llama(tied=True))), "it is tied to the embeddings"


def test_layers_of_a_recurrent_network() -> None:
    network = RecurrentForCausalLM(RecurrentConfig(vocab_size=40, hidden_size=8, num_layers=2))
    assert {name[-3:] for name in trainable(Freeze(num_layers=1).apply(network))} == {"_l1"}


def test_save_load_detach_and_changes(build_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    method = Freeze(train=("*.mlp.*",))
    before = logits(build_llama())
    model = method.apply(build_llama())
    shake(model)
    changed, changes = logits(model), method.weight_changes(model)
    with method.detached(model) as base:
        assert torch.equal(logits(base), before)
    assert torch.equal(logits(model), changed)
    base = dict(build_llama().named_parameters())
    now = dict(model.named_parameters())
    assert changes.keys() == {name for name in base if not torch.equal(base[name], now[name])}
    assert all(torch.equal(now[name] - base[name], change) for name, change in changes.items())

    method.save(model, tmp_path)
    again = method.load(build_llama(), tmp_path)
    assert torch.equal(logits(again), changed)
    assert trainable(again).keys() == trainable(model).keys()
    with method.detached(again):
        assert torch.equal(logits(again), before)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), changed)
    merged = method.merge(again)
    assert set(merged.state_dict()) == set(build_llama().state_dict())
    assert torch.equal(logits(merged), changed)


def test_what_is_frozen_stays_under_weight_decay(llama: nn.Module) -> None:
    model = Freeze(num_layers=1).apply(llama)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.train()(input_ids=IDS).logits.square().sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable(model).keys()


def test_names_that_fit_nothing(build_llama: Callable[..., nn.Module]) -> None:
    with pytest.raises(ConfigError, match="no parameter; near it are") as caught:
        Freeze(train=("*.mpl.*", "norm")).apply(build_llama())
    assert "mlp" in str(caught.value)
    assert "norm" in str(caught.value)
    with pytest.raises(ConfigError, match=r"shares its weight with model\.embed_tokens"):
        Freeze(train=("lm_head",)).apply(build_llama(tied=True))
    with pytest.raises(ConfigError, match="the model has 2"):
        Freeze(num_layers=2).apply(build_llama())


def test_refusals(llama: nn.Module) -> None:
    assert Freeze().supports(DecoderFamily()) is None
    with pytest.raises(ValueError, match="num_layers: expected"):
        Freeze(num_layers=-1)
    with pytest.raises(ValueError, match="no effect"):
        Freeze(num_layers=1, train=("*norm*",))
    assert Freeze().modules(llama) == []
    assert Freeze().low_rank(llama) == ()
    calls = (lambda m: Freeze().extend(m, "x"), lambda m: Freeze().activate(m, []))
    for call in (Freeze().merge, Freeze().weight_changes, *calls):
        with pytest.raises(CompatibilityError):
            call(llama)
