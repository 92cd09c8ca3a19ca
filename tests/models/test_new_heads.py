"""New heads are trained by every method, and `peft` with `transformers` alone loads what was saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from retain.methods.adapter import Adapter
from retain.methods.full import Full
from retain.methods.lora import LoRA
from retain.methods.p_tuning import Ptuning
from retain.methods.prefix import Prefix
from retain.methods.prompt import Prompt
from retain.models.encoder_classes import classifiers
from retain.models.new_heads import trained_heads
from retain.parameters import trainable
from retain.types import Task

METHODS = {
    "full": Full(),
    "lora": LoRA(r=2),
    "adapter": Adapter(size=4),
    "houlsby": Adapter(size=4, placement="houlsby"),
    "p_tuning": Ptuning(num_tokens=3, hidden_size=8),
    "prefix": Prefix(num_tokens=3),
    "prompt": Prompt(num_tokens=3),
}

SOFT = ("p_tuning", "prefix", "prompt")

AUTO = {
    "colours": AutoModelForSequenceClassification,
    "topics": AutoModelForSequenceClassification,
    "tags": AutoModelForTokenClassification,
    "text": AutoModelForMaskedLM,
}


def perturbed(model: Any) -> Any:
    """As after training: all that moves has moved."""
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["colours", "tags"])
def test_reloads_to_equal_logits(
    build_encoder: Callable[..., Any], tasks: dict[str, Task], name: str, kind: str, tmp_path: Path
) -> None:
    task, method = tasks[kind], METHODS[name]
    encoder = build_encoder().equip(task)
    encoder.model = method.apply(encoder.model)
    perturbed(encoder.prepare(task).model)
    moving = trainable(encoder.model)
    assert any("classifier" in parameter for parameter in moving)
    assert kind == "tags" or any("pooler" in parameter for parameter in moving)
    method.save(encoder.model, tmp_path)
    encoder.model.config.save_pretrained(tmp_path)
    again = build_encoder().equip(saved=tmp_path)
    again.model = method.load(again.model, tmp_path).eval()
    assert list(trainable(again.model)) == list(moving)
    inputs = encoder.batch(task.train).inputs
    with torch.no_grad():
        torch.testing.assert_close(again.model(**inputs).logits, encoder.model(**inputs).logits)


def test_a_prefix_in_attention_is_reloaded_and_read_by_both_heads(
    build_encoder: Callable[..., Any], tasks: dict[str, Task], tmp_path: Path
) -> None:
    """Where PEFT has no prefix, its layout holds ours."""
    method, learned = METHODS["prefix"], (tasks["colours"], tasks["text"])
    encoder = build_encoder("distilbert").equip(*learned)
    batches = [encoder.batch(tasks["text"].train)]
    bare = encoder.family.forward(encoder.model, batches[0]).hidden
    encoder.model = method.apply(encoder.model)
    perturbed(encoder.prepare(tasks["colours"]).model)
    batches.append(encoder.batch(tasks["colours"].train))
    ours = [encoder.family.forward(encoder.model, batch).logits() for batch in batches]
    assert not torch.allclose(encoder.family.forward(encoder.model, batches[0]).hidden, bare, atol=1e-4)
    method.save(encoder.model, tmp_path)
    encoder.model.config.save_pretrained(tmp_path)
    again = build_encoder("distilbert").equip(*learned, saved=tmp_path)
    again.model = method.load(again.model, tmp_path).eval()
    assert trainable(again.model).keys() == trainable(encoder.model).keys()
    for batch, logits in zip(batches, ours, strict=True):
        assert torch.equal(again.family.forward(again.model, batch).logits(), logits)
    with method.detached(again.model) as base:
        assert torch.equal(again.family.forward(base, batches[0]).hidden, bare)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("kind", AUTO)
@pytest.mark.parametrize("name", SOFT)
def test_plain_peft_reads_a_soft_prompt(
    build_encoder: Callable[..., Any], tasks: dict[str, Task], name: str, kind: str, architecture: str, tmp_path: Path
) -> None:
    encoder, method = build_encoder(architecture), METHODS[name]
    base = encoder.model.base_model
    base.save_pretrained(tmp_path / "base") if kind != "text" else encoder.model.save_pretrained(tmp_path / "base")
    encoder.equip(tasks[kind])
    encoder.model = method.apply(encoder.model)
    perturbed(encoder.prepare(tasks[kind]).model)
    method.save(encoder.model, tmp_path / "prompt")
    encoder.model.config.save_pretrained(tmp_path / "prompt")
    whole = AUTO[kind].from_pretrained(
        tmp_path / "base", config=AutoConfig.from_pretrained(tmp_path / "prompt"), ignore_mismatched_sizes=True
    )
    plain = PeftModel.from_pretrained(whole, tmp_path / "prompt").eval()
    inputs = encoder.batch(tasks[kind].train).inputs
    with torch.no_grad():
        ours, theirs = (model(**inputs).logits for model in (encoder.model, plain))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOFT)
def test_soft_prompts_move_nothing_but_themselves_and_the_heads(
    build_encoder: Callable[..., Any], tasks: dict[str, Task], name: str
) -> None:
    """Over several tasks in a row, and detached the base is there bit for bit."""
    method, encoder = METHODS[name], build_encoder()
    for parameter in encoder.model.parameters():  # so that it tells words apart
        parameter.data *= 10 if parameter.dim() > 1 else 1
    encoder.equip(tasks["colours"], tasks["animals"], tasks["text"])
    batches = [encoder.batch(tasks["text"].train)]
    bare = encoder.family.forward(encoder.model, batches[0]).hidden
    frozen = {key: value.clone() for key, value in encoder.model.named_parameters()}
    encoder.model = method.apply(encoder.model)
    kept: list[torch.Tensor] = []
    for task in (tasks["colours"], tasks["animals"]):
        encoder.prepare(task)
        assert all(key.startswith(("prompts.", *trained_heads(encoder.model))) for key in trainable(encoder.model))
        batch = encoder.batch(task.train)
        before = float(encoder.family.loss(encoder.family.forward(encoder.model.eval(), batch), batch).detach())
        optimizer = torch.optim.AdamW(trainable(encoder.model).values(), lr=0.03, weight_decay=0.1)
        for _ in range(30):
            optimizer.zero_grad()
            encoder.family.loss(encoder.family.forward(encoder.model, batch), batch).backward()
            assert all(p.grad is not None for key, p in trainable(encoder.model).items() if "predictions" not in key)
            optimizer.step()
        assert float(encoder.family.loss(encoder.family.forward(encoder.model, batch), batch).detach()) < 0.5 * before
        kept.append(encoder.model.classifier.weight.detach().clone())
    assert [len(rows) for rows in kept] == [2, 4]
    own = dict(encoder.model.named_parameters())
    moved = {key for key, value in frozen.items() if key in own and not torch.equal(value, own[key])}
    assert all(key.startswith(trained_heads(encoder.model)) for key in moved)
    after = encoder.family.forward(encoder.model, batches[0]).hidden
    assert not torch.allclose(after, bare, atol=1e-4), "the pass that guesses hidden tokens reads the prompt, too"
    with method.detached(encoder.model) as base:
        assert torch.equal(encoder.family.forward(base, batches[0]).hidden, bare)


def test_plain_peft_loads_a_lora(build_encoder: Callable[..., Any], tasks: dict[str, Task], tmp_path: Path) -> None:
    encoder = build_encoder()
    encoder.model.save_pretrained(tmp_path / "base")
    encoder.equip(tasks["colours"], tasks["text"])  # with a language model's head beside the classifier
    encoder.model = LoRA(r=2).apply(encoder.model)
    perturbed(encoder.prepare(tasks["colours"]).model)
    LoRA(r=2).save(encoder.model, tmp_path / "lora")
    encoder.model.config.save_pretrained(tmp_path / "lora")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS"
    assert "classifier" in settings["modules_to_save"]
    assert not any("cls.predictions" in name for name in trainable(encoder.model))

    config = AutoConfig.from_pretrained(tmp_path / "lora")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", config=config)
    plain = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    inputs = encoder.batch(tasks["colours"].train).inputs
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, encoder.model(**inputs).logits)
    merged = LoRA(r=2).merge(encoder.model)
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert len(classifiers(merged)) == 1


def test_a_decoder_has_none(llama: Any) -> None:
    assert trained_heads(llama) == ()
