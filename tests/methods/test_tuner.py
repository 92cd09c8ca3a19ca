"""What the methods of PEFT's have in common: the base at the start, equal logits after a reload and a merge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from retain.errors import CompatibilityError, ConfigError
from retain.methods.ia3 import IA3
from retain.methods.lora import LoRA
from retain.methods.oft import OFT
from retain.methods.peft import Peft
from retain.methods.tuner import Tuner, has_conv1d, linear_names, task_type
from retain.models.decoder import DecoderFamily
from retain.models.recurrent import RecurrentFamily
from retain.parameters import trainable

IDS = torch.arange(5, 15)[None]

METHODS: dict[str, Tuner] = {
    "lora": LoRA(r=4, dropout=0.1),
    "rslora": LoRA(r=4, use_rslora=True),
    "dora": LoRA(r=4, use_dora=True),
    "pissa": LoRA(r=4, init="pissa", dropout=0.1),
    "ia3": IA3(),
    "oft": OFT(block_size=8),
    "oft-exact": OFT(block_size=8, exact=True),
    "vera": Peft("VERA", {"r": 8}),
    "loha": Peft("LOHA", {"r": 2}),
}
LINEAR_ONLY = ("loha", "oft", "oft-exact")
"""What PEFT computes for `nn.Linear`, and not for GPT-2's Conv1D."""


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


CASES = [f"llama-{name}" for name in METHODS] + [f"gpt2-{name}" for name in METHODS if name not in LINEAR_ONLY]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> list[str]:
    return request.param.split("-", 1)


@pytest.fixture
def build(case: list[str], build_llama: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return build_llama if case[0] == "llama" else gpt2


@pytest.fixture
def method(case: list[str]) -> Tuner:
    return METHODS[case[1]]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def shake(model: nn.Module, std: float = 0.03) -> None:
    for parameter in trainable(model).values():
        parameter.data += std * torch.randn_like(parameter)


def test_starts_as_the_base_and_moves_nothing_of_it(build: Callable[[], nn.Module], method: Tuner) -> None:
    base = build()
    before, values = logits(base), {name: p.clone() for name, p in base.named_parameters()}
    model = method.apply(base)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    assert trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    model.train()(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in trainable(model).values())
    assert not torch.equal(logits(model), before)
    left = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(left[name], value) for name, value in values.items())
    with method.detached(model) as detached:
        assert torch.equal(logits(detached), before)


def test_save_load_and_merge(build: Callable[[], nn.Module], method: Tuner, tmp_path: Path) -> None:
    model = method.apply(build())
    shake(model)
    changed = logits(model)
    assert (changed - logits(build())).abs().max() > 1e-3
    method.save(model, tmp_path)
    again = method.load(build(), tmp_path)
    assert torch.equal(logits(again), changed)
    assert trainable(again).keys() == trainable(model).keys()
    theirs = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(logits(theirs), changed, rtol=1e-5, atol=1e-6)
    changes = method.weight_changes(model)
    merged = method.merge(model)
    torch.testing.assert_close(logits(merged), changed, rtol=1e-3, atol=1e-5)
    now, base = dict(merged.named_parameters()), dict(build().named_parameters())
    moved = {name for name, value in base.items() if not torch.equal(value, now[name])}
    assert changes.keys() == moved
    for name, change in changes.items():
        torch.testing.assert_close(now[name] - base[name], change, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_is_switched_off_is_the_base(llama: nn.Module, method: Tuner) -> None:
    before = logits(llama)
    assert method.activate(llama, []) is llama
    model = method.apply(llama)
    shake(model)
    changed, flags = logits(model), [p.requires_grad for p in model.parameters()]
    names = method.modules(model)
    assert torch.equal(logits(method.activate(model, [])), before)
    assert torch.equal(logits(method.activate(model, names)), changed)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_the_norms_of_layers_alone(llama: nn.Module) -> None:
    method = Peft("LN_TUNING", {"target_modules": ["input_layernorm", "norm"]})
    before = logits(llama)
    model = method.apply(llama)
    assert all("norm" in name for name in trainable(model))
    shake(model)
    with method.detached(model):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", LINEAR_ONLY)
def test_layers_of_a_kind_that_peft_cannot_adapt_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="Conv1D"):
        METHODS[name].apply(gpt2())


def test_refusals(llama: nn.Module) -> None:
    assert IA3().supports(DecoderFamily()) is None
    assert "recurrent" in (OFT().supports(RecurrentFamily()) or "")
    for call in (IA3().merge, IA3().modules, IA3().weight_changes, lambda m: IA3().extend(m, "x")):
        with pytest.raises(CompatibilityError):
            call(llama)
    with pytest.raises(ConfigError, match="adapts nothing") as caught:
        OFT(target_modules=("query",)).apply(llama)
    assert "q_proj" in str(caught.value)


def test_what_a_model_does() -> None:
    settings: dict[str, Any] = {
        "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8
    }  # fmt: skip
    assert task_type(BertForSequenceClassification(BertConfig(**settings))) == "SEQ_CLS"
    assert task_type(BertForMaskedLM(BertConfig(**settings))) is None
    assert task_type(gpt2()) == "CAUSAL_LM"
    assert has_conv1d(gpt2())
    assert linear_names(gpt2()) == ["c_attn", "c_fc", "c_proj", "lm_head"]
