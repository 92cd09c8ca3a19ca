"""QLoRA: quantised weights that nothing moves or casts, a merge that answers the same; where bitsandbytes is there."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from retain.errors import ConfigError
from retain.methods import qlora
from retain.methods.qlora import QLoRA
from retain.models.decoder import DecoderFamily
from retain.models.recurrent import RecurrentFamily
from retain.parameters import cast_frozen, trainable

IDS = torch.arange(5, 15)[None]

needs_quantiser = pytest.mark.skipif(not qlora.installed(), reason="bitsandbytes is not installed")


def build() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, bos_token_id=None, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def shake(model: nn.Module) -> None:
    for parameter in trainable(model).values():
        nn.init.normal_(parameter, std=0.1)


def test_without_a_quantiser_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qlora, "installed", lambda: False)
    assert "pip install 'retain[quantised]'" in (QLoRA().supports(DecoderFamily()) or "")
    with pytest.raises(ConfigError, match="method: lora"):
        QLoRA().apply(build())


def test_refusals() -> None:
    assert "recurrent" in (QLoRA().supports(RecurrentFamily()) or "")
    with pytest.raises(ValueError, match="r: "):
        QLoRA(r=0)
    with pytest.raises(ValueError, match="dropout: "):
        QLoRA(dropout=-0.1)


@needs_quantiser
@pytest.mark.parametrize(("quantise", "error"), [("nf4", 0.25), ("fp4", 0.35), ("int8", 0.02)])
def test_the_base_is_near_and_never_moves(quantise: str, error: float) -> None:
    wanted = logits(build())
    method = QLoRA(quantise=quantise, r=4)
    model = method.apply(build())
    start = logits(model)
    assert 0 < float((start - wanted).abs().max() / wanted.abs().max()) < error
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable(model).items())
    before = {name: p.clone() for name, p in model.named_parameters()}
    shake(model)
    model.train()(input_ids=IDS).logits.square().sum().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5).step()
    logits(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    with method.detached(model):
        assert torch.equal(logits(model), start)
    types = {name: p.dtype for name, p in model.named_parameters() if not p.is_floating_point()}
    assert len(types) == 14
    cast_frozen(model, torch.bfloat16)
    assert all(model.get_parameter(name).dtype == kind for name, kind in types.items())


@needs_quantiser
@pytest.mark.parametrize(("quantise", "tolerance"), [("nf4", 1e-5), ("fp4", 1e-5), ("int8", 2e-2)])
def test_save_load_and_merge(quantise: str, tolerance: float, tmp_path: Path) -> None:
    method = QLoRA(quantise=quantise, r=4)
    model = method.apply(build())
    shake(model)
    changed = logits(model)
    method.save(model, tmp_path)
    again = method.load(build(), tmp_path)
    assert torch.equal(logits(again), changed)
    assert trainable(again).keys() == trainable(model).keys()
    plain = PeftModel.from_pretrained(build(), tmp_path)
    assert (logits(plain) - changed).abs().max() < 0.3 * changed.abs().max(), "the same adapter beside the whole base"
    changes = method.weight_changes(model)
    base = {
        n.replace(".base_layer", ""): p for n, p in method.merge(method.apply(build())).named_parameters()
    }  # dequantised
    merged = method.merge(model)
    difference = (logits(merged) - changed).abs().max() / changed.abs().max()
    assert float(difference) < tolerance
    now = dict(merged.named_parameters())
    assert now.keys() == dict(build().named_parameters()).keys()
    assert len(changes) == 14
    for name, change in changes.items():
        torch.testing.assert_close(now[name] - base[name], change, rtol=1e-4, atol=1e-6)


@needs_quantiser
def test_a_model_without_linear_layers_is_refused(build_llama: Callable[..., nn.Module]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ConfigError, match="nothing to quantise"):
        QLoRA().apply(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)))
