"""P-tuning: the network is all that is trained, what it makes is a prompt of PEFT's, and it can be trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from retain.errors import CompatibilityError, LineageError
from retain.methods.p_tuning import Ptuning
from retain.models.decoder import DecoderFamily
from retain.models.recurrent import RecurrentFamily
from retain.parameters import trainable

IDS = torch.arange(5, 15)[None]


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]


@pytest.fixture(params=["mlp", "lstm"])
def method(request: pytest.FixtureRequest) -> Ptuning:
    return Ptuning(num_tokens=3, encoder=request.param, hidden_size=8)


def test_the_network_is_all_that_is_trained(llama: nn.Module, method: Ptuning) -> None:
    before = logits(llama)
    model = method.apply(llama)
    assert all(name.startswith("prompts.network.") for name in trainable(model))
    assert not torch.equal(logits(model), before)
    model.train()(input_ids=IDS, use_cache=False).logits[:, -1].square().sum().backward()
    assert all(p.grad is not None for p in trainable(model).values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    with method.detached(model) as base:
        assert torch.equal(logits(base), before)


def test_reads_what_the_network_makes(build_llama: Callable[..., nn.Module], method: Ptuning) -> None:
    model, base = method.apply(build_llama()), build_llama()
    whole = torch.cat([method.place(model).made(), base.get_input_embeddings()(IDS[0])])[None]
    with torch.no_grad():
        torch.testing.assert_close(logits(model), base(inputs_embeds=whole).logits[:, 3:])


def test_save_and_load(build_llama: Callable[..., nn.Module], method: Ptuning, tmp_path: Path) -> None:
    model = method.apply(build_llama())
    for parameter in trainable(model).values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    method.save(model, tmp_path)
    again = method.load(build_llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert trainable(again).keys() == trainable(model).keys()
    theirs = PeftModel.from_pretrained(build_llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)
    with pytest.raises(LineageError, match="does not fit"):
        Ptuning(num_tokens=4, encoder=method.encoder, hidden_size=8).load(build_llama(), tmp_path)


def test_generates_as_without_a_cache(llama: nn.Module, method: Ptuning) -> None:
    model = method.apply(llama)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = IDS
    for _ in range(4):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(input_ids=IDS, **settings), ids)


def test_refusals(llama: nn.Module, tmp_path: Path) -> None:
    assert Ptuning().supports(DecoderFamily()) is None
    assert "recurrent" in (Ptuning().supports(RecurrentFamily()) or "")
    assert not Ptuning.packs
    for name in ("num_tokens", "hidden_size"):
        with pytest.raises(ValueError, match=name):
            Ptuning(**{name: 0})
    for call in (Ptuning().merge, Ptuning().weight_changes, lambda m: Ptuning().save(m, tmp_path)):
        with pytest.raises(CompatibilityError):
            call(llama)
