"""New heads are trained by every method, and `peft` with `transformers` alone loads what was saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

from retain.methods.adapter import Adapter
from retain.methods.full import Full
from retain.methods.lora import LoRA
from retain.models.encoder_classes import classifiers
from retain.models.new_heads import trained_heads
from retain.parameters import trainable
from retain.types import Task

METHODS = {
    "full": Full(),
    "lora": LoRA(r=2),
    "adapter": Adapter(size=4),
    "houlsby": Adapter(size=4, placement="houlsby"),
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
