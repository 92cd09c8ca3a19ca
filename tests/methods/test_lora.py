"""LoRA: identity at the start, equal logits after a reload and a merge, nothing left on when detached."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from retain.errors import CompatibilityError, ConfigError
from retain.methods.lora import LoRA
from retain.models.decoder import DecoderFamily
from retain.models.recurrent import RecurrentFamily
from retain.parameters import trainable

IDS = torch.arange(5, 15)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def tuned(build_llama: Callable[..., torch.nn.Module], **options: object) -> torch.nn.Module:
    model = LoRA(r=4, **options).apply(build_llama())
    shake(model)
    return model.eval()


def shake(model: torch.nn.Module) -> None:
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)


def test_starts_as_the_base_and_trains_its_own_parameters_only(build_llama: Callable[..., torch.nn.Module]) -> None:
    base = build_llama()
    before = logits(base)
    model = LoRA(r=4).apply(base)
    assert torch.equal(logits(model), before)
    assert trainable(model)
    assert all("lora_" in name for name in trainable(model))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_save_load_merge_and_detach(
    build_llama: Callable[..., torch.nn.Module], tmp_path: Path, options: dict[str, bool]
) -> None:
    method = LoRA(r=4, **options)
    model = tuned(build_llama, **options)
    changed = logits(model)
    assert (changed - logits(build_llama())).abs().max() > 1e-3
    with method.detached(model) as base:
        assert torch.equal(logits(base), logits(build_llama()))
    assert torch.equal(logits(model), changed)
    method.save(model, tmp_path)
    again = method.load(build_llama(), tmp_path)
    assert torch.equal(logits(again.eval()), changed)
    assert trainable(again).keys() == trainable(model).keys()
    torch.testing.assert_close(logits(method.merge(model)), changed, rtol=1e-4, atol=1e-5)


def test_weight_changes_are_what_a_merge_adds(build_llama: Callable[..., torch.nn.Module]) -> None:
    model = tuned(build_llama)
    changes = LoRA(r=4).weight_changes(model)
    merged = dict(LoRA().merge(model).named_parameters())
    base = dict(build_llama().named_parameters())
    assert len(changes) == 14  # seven linear layers in each of two blocks
    for name, change in changes.items():
        torch.testing.assert_close(merged[name] - base[name], change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pairs", [1, 2])
def test_low_rank_factors_make_the_weight_changes(build_llama: Callable[..., torch.nn.Module], pairs: int) -> None:
    model = tuned(build_llama)
    if pairs == 2:
        LoRA(r=4).extend(model, "second")
    shake(model)
    named = dict(model.named_parameters())
    got: dict[str, torch.Tensor] = {}
    for change in LoRA(r=4).low_rank(model):
        product = change.scale * named[change.left] @ named[change.right]
        assert product.shape == named[change.weight].shape
        assert not change.transposed
        got[change.weight] = got.get(change.weight, torch.zeros(())) + product
    wanted = LoRA(r=4).weight_changes(model)
    assert len(got) == len(wanted) > 0
    for value, other in zip(got.values(), wanted.values(), strict=True):
        torch.testing.assert_close(value, other)
    assert LoRA(use_dora=True).low_rank(tuned(build_llama, use_dora=True)) == []


def test_a_target_that_is_not_there_is_refused_with_what_is(llama: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match="q_proj"):
        LoRA(target_modules=("query",)).apply(llama)


@pytest.mark.parametrize("target", [("lm_head",), ("q_proj", "embed_tokens"), r".*embed_tokens"])
def test_one_end_of_a_shared_weight_is_refused(build_llama: Callable[..., torch.nn.Module], target: object) -> None:
    with pytest.raises(CompatibilityError, match="shares its weight"):
        LoRA(r=2, target_modules=target).apply(build_llama(tied=True))
    assert trainable(LoRA(r=2, target_modules=target).apply(build_llama(tied=False)))
    assert trainable(LoRA(r=2, target_modules=("q_proj",)).apply(build_llama(tied=True)))


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="r: expected"):
        LoRA(r=0)
    with pytest.raises(ValueError, match="dropout"):
        LoRA(dropout=1.0)


def test_detaching_a_bare_model_is_refused(llama: torch.nn.Module) -> None:
    with pytest.raises(CompatibilityError), LoRA().detached(llama):
        pass


def test_supports() -> None:
    assert LoRA().supports(DecoderFamily()) is None
    assert "not linear" in (LoRA().supports(RecurrentFamily()) or "")


def test_further_pairs_are_summed_and_only_the_newest_moves(
    build_llama: Callable[..., torch.nn.Module], tmp_path: Path
) -> None:
    method = LoRA(r=4, dropout=0.5)
    model = method.apply(build_llama())
    base = logits(model.eval())
    shake(model)
    first, change = logits(model), method.weight_changes(model)
    method.extend(model, "2-other")
    assert torch.equal(logits(model.eval()), first), "B starts at zero"
    assert all("2-other" in name for name in trainable(model))
    shake(model)
    both, changes = logits(model), method.weight_changes(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    method.activate(model, ["2-other"])
    for name, alone in method.weight_changes(model).items():
        torch.testing.assert_close(changes[name], change[name] + alone)
    assert torch.equal(logits(method.activate(model, [])), base)
    assert torch.equal(logits(method.activate(model, ["default"])), first)
    assert torch.equal(logits(method.activate(model, ["default", "2-other"])), both)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert method.modules(model) == ["default", "2-other"]

    method.save(model, tmp_path)
    again = method.load(build_llama(), tmp_path).eval()
    assert torch.equal(logits(again), both)
    assert torch.equal(logits(method.activate(again, ["default"])), first)
    assert method.modules(again) == ["default", "2-other"]
    method.activate(again, ["default", "2-other"])
    torch.testing.assert_close(logits(method.merge(again)), both, rtol=1e-4, atol=1e-5)


def test_a_frozen_pair_draws_no_dropout(build_llama: Callable[..., torch.nn.Module]) -> None:
    method = LoRA(r=4, dropout=0.5)
    model = method.apply(build_llama())
    shake(model)
    method.extend(model, "2-other")
    method.activate(model, ["default"])
    assert torch.equal(logits(model.train()), logits(model.eval()))


def test_a_pair_made_while_others_are_off_stands_alone(build_llama: Callable[..., torch.nn.Module]) -> None:
    method = LoRA(r=4)
    model = method.apply(build_llama())
    shake(model)
    method.extend(method.activate(model, []), "2-other")
    assert torch.equal(logits(model), logits(method.activate(model, [])))


def test_a_bare_base_has_nothing_to_switch(llama: torch.nn.Module) -> None:
    assert LoRA().activate(llama, []) is llama
    with pytest.raises(CompatibilityError):
        LoRA().activate(llama, ["default"])
