"""Prefix tuning: at the start the base behind real tokens, PEFT's own answers, a base that is left alone."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from retain.errors import CompatibilityError, LineageError
from retain.methods.prefix import Prefix
from retain.models.causal import likelihoods
from retain.models.decoder import DecoderFamily
from retain.models.recurrent import RecurrentFamily
from retain.parameters import trainable

IDS = torch.arange(5, 15)[None]


def logits(model: nn.Module, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False, **options).logits


def gpt2(*, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=layers, n_head=2, n_positions=64)).eval()


@pytest.fixture(params=["llama", "gpt2"])
def build(request: pytest.FixtureRequest, build_llama: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return build_llama if request.param == "llama" else gpt2


def shake(model: nn.Module) -> None:
    for parameter in trainable(model).values():
        parameter.data += 0.3 * torch.randn_like(parameter)


def test_starts_as_the_base_behind_real_tokens(build: Callable[[], nn.Module]) -> None:
    """The oracle: keys and values of tokens in the cache are those tokens, read."""
    base = build()
    size = base.get_input_embeddings().num_embeddings
    torch.manual_seed(3)
    words = torch.randint(size, (1, 4))
    wanted = logits(base, torch.cat([words, IDS], dim=1))[:, 4:]
    torch.manual_seed(3)
    model = Prefix(num_tokens=4).apply(base)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model, attention_mask=torch.ones_like(IDS)), wanted, rtol=1e-4, atol=1e-5)


def test_trains_the_prefix_alone_and_detaches(build: Callable[[], nn.Module]) -> None:
    base = build()
    before, names = logits(base), set(base.state_dict())
    model = Prefix(num_tokens=3).apply(base)
    assert list(trainable(model)) == ["prompts.weight"]
    assert names < set(model.state_dict())
    values = {name: p.clone() for name, p in model.named_parameters()}
    model.train()(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    assert bool((trainable(model)["prompts.weight"].grad != 0).any(dim=1).all())
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, values[name])}
    assert moved == {"prompts.weight"}
    changed = logits(model)
    with Prefix().detached(model) as detached:
        assert torch.equal(logits(detached), before)
    assert torch.equal(logits(model), changed)
    assert torch.equal(logits(Prefix().activate(model, [])), before)
    assert torch.equal(logits(Prefix().activate(model, ["default"])), changed)


def test_save_and_load(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    method = Prefix(num_tokens=3)
    model = method.apply(build())
    shake(model)
    method.save(model, tmp_path)
    again = method.load(build(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert trainable(again).keys() == trainable(model).keys()
    theirs = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)


def test_generates_as_without_a_cache_and_over_padding(build: Callable[[], nn.Module]) -> None:
    model = Prefix(num_tokens=3).apply(build())
    shake(model)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(input_ids=IDS, **settings), ids)
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], dim=1)
    padded = model.generate(input_ids=left, attention_mask=(left > 0).long(), **settings)
    assert torch.equal(padded[:, 3:], ids)


def test_likelihoods_with_and_without_shared_contexts(llama: nn.Module) -> None:
    model = Prefix(num_tokens=3).apply(llama)
    shake(model)
    context = list(range(5, 45))
    pairs = [(context, [8, 9]), (context, [10]), (context, [11, 12, 13])]
    ours = DecoderFamily().loglikelihood(model.eval(), type("Padding", (), {"pad_token_id": 0})(), pairs)
    assert ours == pytest.approx(likelihoods(model, pairs, pad_id=0), rel=1e-4)


def test_a_copy_has_a_prefix_of_its_own(llama: nn.Module) -> None:
    model = Prefix().apply(llama)
    copied, before = deepcopy(model), logits(model)
    shake(model)
    assert torch.equal(logits(copied), before)


def test_refusals(build_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    assert Prefix().supports(DecoderFamily()) is None
    assert "recurrent" in (Prefix().supports(RecurrentFamily()) or "")
    assert not Prefix.packs
    llama = build_llama()
    assert Prefix().activate(llama, []) is llama
    model = Prefix(num_tokens=2).apply(llama)
    for call in (Prefix().merge, Prefix().weight_changes, lambda m: Prefix().extend(m, "x")):
        with pytest.raises(CompatibilityError):
            call(model)
    assert Prefix().low_rank(model) == ()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(CompatibilityError, match="gradient checkpointing"):
        model.train()(input_ids=IDS)
    with pytest.raises(ValueError, match="num_tokens"):
        Prefix(num_tokens=0)
    Prefix(num_tokens=2).save(model, tmp_path)
    with pytest.raises(LineageError, match="not of this model"):
        Prefix().load(gpt2(layers=3), tmp_path)
    with pytest.raises(CompatibilityError, match="no prefix"):
        Prefix().save(gpt2(), tmp_path)
