"""LoRA: identity at the start, equal logits after a reload and a merge, nothing left on when detached."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from retain.errors import CompatibilityError, ConfigError
from retain.methods.lora import LoRA
from retain.models.decoder import DecoderFamily
from retain.models.recurrent import RecurrentFamily
from retain.models.recurrent_network import RecurrentConfig, RecurrentForCausalLM
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
    with pytest.raises(CompatibilityError, match="no product"):
        LoRA(use_dora=True).low_rank(tuned(build_llama, use_dora=True))


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
    assert LoRA().supports(RecurrentFamily()) is None
    assert "use_dora" in (LoRA(use_dora=True).supports(RecurrentFamily()) or "")
    assert "dropout" in (LoRA(dropout=0.1).supports(RecurrentFamily()) or "")


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


def test_detaching_leaves_frozen_what_was_frozen(build_llama: Callable[..., torch.nn.Module]) -> None:
    method = LoRA(r=4)
    model = method.apply(build_llama())
    method.extend(model, "2-other")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with method.detached(model):
        pass
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    base = logits(method.activate(model, []))
    with method.detached(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), base), "it was off, and stays so"


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


def test_dora_starts_with_the_lengths_of_the_rows(build_llama: Callable[..., torch.nn.Module]) -> None:
    weights = dict(build_llama().named_parameters())
    model = LoRA(r=4, use_dora=True).apply(build_llama())
    magnitudes = [name for name in trainable(model) if "magnitude" in name]
    assert len(magnitudes) == 14
    for name in magnitudes:
        base = name.replace("base_model.model.", "").replace("lora_magnitude_vector.default.", "")
        torch.testing.assert_close(trainable(model)[name], weights[base].norm(dim=1))


def test_dora_turns_a_row_and_keeps_its_length(build_llama: Callable[..., torch.nn.Module]) -> None:
    method = LoRA(r=4, use_dora=True)
    model = method.apply(build_llama())
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    base, merged = dict(build_llama().named_parameters()), dict(method.merge(model).named_parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.allclose(merged[name], base[name], atol=1e-3)
    torch.testing.assert_close(merged[name].norm(dim=1), base[name].norm(dim=1), rtol=1e-4, atol=1e-6)


def test_rslora_scales_by_the_root_of_the_rank(build_llama: Callable[..., torch.nn.Module]) -> None:
    (plain, *_), (rooted, *_) = (
        LoRA(r=4, alpha=8, use_rslora=on).low_rank(tuned(build_llama, alpha=8, use_rslora=on)) for on in (False, True)
    )
    assert (plain.scale, rooted.scale) == (2.0, 4.0)


@pytest.mark.parametrize("rooted", [False, True])
def test_pissa_moves_the_largest_singular_values(build_llama: Callable[..., torch.nn.Module], rooted: bool) -> None:
    method = LoRA(r=4, init="pissa", use_rslora=rooted)
    model = method.apply(build_llama().double()).double()
    weight = build_llama().double().model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(logits(model), logits(build_llama().double()))
    moving = {name.rsplit(".lora_", 1)[0]: name for name in trainable(model)}
    assert len(moving) == 14
    assert all(".default." in name for name in trainable(model))
    factors = [change for change in method.low_rank(model) if "layers.0.mlp.up_proj" in change.weight]
    named = dict(model.named_parameters())
    product = factors[0].scale * named[factors[0].left] @ named[factors[0].right]
    left, sizes, right = torch.linalg.svd(weight)
    torch.testing.assert_close(product, left[:, :4] * sizes[:4] @ right[:4], rtol=1e-5, atol=1e-7)
    assert all(change.abs().max() < 1e-6 for change in method.weight_changes(model).values())


def test_pissa_keeps_one_pair(llama: torch.nn.Module) -> None:
    method = LoRA(r=40, init="pissa")  # above the rank of any weight
    before = logits(llama)
    model = method.apply(llama)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert method.modules(model) == ["default"]
    assert not method.can_extend
    assert LoRA().can_extend
    with pytest.raises(CompatibilityError, match="PiSSA"):
        method.extend(model, "other")
    with pytest.raises(ValueError, match="init: "):
        LoRA(init="pissa", use_dora=True)


def network(cell: str) -> RecurrentForCausalLM:
    torch.manual_seed(0)
    config = RecurrentConfig(vocab_size=40, cell=cell, hidden_size=8, num_layers=2, eos_token_id=1, pad_token_id=0)
    return RecurrentForCausalLM(config).double().eval()


@pytest.mark.parametrize("init", ["zero", "pissa"])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_recurrent_weights(cell: str, init: object, tmp_path: Path) -> None:
    method = LoRA(r=2, init=init)
    model = method.apply(network(cell)).double()
    before = logits(network(cell))
    torch.testing.assert_close(logits(model), before)
    shake(model)
    changed = logits(model)
    loss = model(input_ids=IDS).logits.square().sum()
    loss.backward()
    named, step = dict(model.named_parameters()), 1e-6
    for name, parameter in trainable(model).items():
        with torch.no_grad():
            parameter[0, 1] += step
            slope = float(model(input_ids=IDS).logits.square().sum() - loss.detach()) / step
            parameter[0, 1] -= step
        assert abs(slope - float(parameter.grad[0, 1])) < 1e-3 * (1 + abs(slope)), name
    assert len(trainable(model)) == 2 * 2 * 2
    with method.detached(model):
        assert torch.equal(logits(model), before)
    got: dict[str, torch.Tensor] = {}
    for change in method.low_rank(model):
        got[change.weight] = got.get(change.weight, 0) + change.scale * named[change.left] @ named[change.right]
    wanted, base = method.weight_changes(model), dict(network(cell).named_parameters())
    for (name, value), (weight, change) in zip(sorted(wanted.items()), sorted(got.items(), key=end), strict=True):
        assert weight.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]
        assert torch.equal(named[weight], base[name])
        torch.testing.assert_close(change, value)

    method.save(model, tmp_path)
    again = method.load(network(cell), tmp_path).double()
    torch.testing.assert_close(logits(again.eval()), changed)
    assert trainable(again).keys() == trainable(model).keys()
    theirs = PeftModel.from_pretrained(network(cell), tmp_path).double().eval()
    torch.testing.assert_close(logits(theirs), changed, rtol=1e-5, atol=1e-6)
    merged = method.merge(model)
    torch.testing.assert_close(logits(merged), changed)
    for name, value in wanted.items():
        torch.testing.assert_close(merged.get_parameter(name) - base[name], value)


def end(item: tuple[str, torch.Tensor]) -> str:
    return item[0].rsplit(".", 1)[-1]


def test_some_recurrent_weights_and_several_pairs() -> None:
    method = LoRA(r=2, target_modules=("weight_hh_l1",))
    model = method.apply(network("gru"))
    assert list(method.weight_changes(model)) == ["rnn.weight_hh_l1"]
    shake(model)
    first = logits(model)
    method.extend(model, "2")
    assert torch.equal(logits(model), first)
    shake(model)
    both = logits(model)
    assert torch.equal(logits(method.activate(model, ["default"])), first)
    assert torch.equal(logits(method.activate(model, [])), logits(network("gru")))
    assert torch.equal(logits(method.activate(model, ["default", "2"])), both)


def test_what_a_recurrent_network_generates_goes_through_the_pairs() -> None:
    model = LoRA(r=2).apply(network("lstm"))
    shake(model)
    ids = IDS
    for _ in range(3):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], dim=1)
    made = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(made, ids)


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits
