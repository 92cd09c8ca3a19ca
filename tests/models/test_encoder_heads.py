"""Which class answers: made from what was loaded, with its encoder's weights, and with what a stage has saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from retain.errors import CompatibilityError
from retain.models.encoder_classes import labels_in, new_modules
from retain.models.encoder_heads import beside, equipped, masked_model
from retain.types import Task


def test_the_encoder_keeps_its_weights(encoder: Any, tasks: dict[str, Task]) -> None:
    before = {name: value.clone() for name, value in encoder.model.base_model.state_dict().items()}
    encoder.equip(tasks["colours"])
    after = encoder.model.base_model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert new_modules(encoder.model) == ["classifier", "bert.pooler"]  # a masked language model has no pooler
    assert type(encoder.model).__name__ == "BertForSequenceClassification"
    assert encoder.model.config.id2label == {}
    assert encoder.renderer.labels.kind == "single"


def test_new_weights_come_from_the_seed(build_encoder: Callable[..., Any], tasks: dict[str, Task]) -> None:
    poolers = [build_encoder().equip(tasks["colours"], seed=seed).model.bert.pooler.dense.weight for seed in (0, 0, 1)]
    assert torch.equal(poolers[0], poolers[1])
    assert not torch.equal(poolers[0], poolers[2])


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "electra"])
def test_text_and_classes_share_the_encoder(
    build_encoder: Callable[..., Any], tasks: dict[str, Task], architecture: str
) -> None:
    encoder = build_encoder(architecture).equip(tasks["text"], tasks["colours"]).prepare(tasks["colours"])
    language = masked_model(encoder.model)
    assert language.base_model is encoder.model.base_model
    embeddings = encoder.model.get_input_embeddings().weight
    assert language.get_output_embeddings().weight is embeddings
    own = {id(parameter) for parameter in encoder.model.parameters()}
    assert {id(parameter) for parameter in language.parameters()} <= own
    assert beside(encoder.model)
    loss = encoder.family.loss(
        encoder.family.forward(encoder.model, batch := encoder.batch(tasks["text"].train)), batch
    )
    loss.backward()
    assert embeddings.grad is not None


def test_a_bare_encoder_gets_a_new_language_head(encoder: Any, tasks: dict[str, Task], tmp_path: Path) -> None:
    encoder.model.base_model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    made = equipped(bare, [tasks["text"]], per_task=False, seed=0)
    assert type(made).__name__ == "BertForMaskedLM"
    assert new_modules(made) == ["cls.predictions.transform"]  # all but what is tied to the embeddings
    assert made.get_output_embeddings().weight is made.get_input_embeddings().weight


def test_takes_a_saved_stages_rows(build_encoder: Callable[..., Any], tasks: dict[str, Task], tmp_path: Path) -> None:
    first = build_encoder().equip(tasks["colours"], tasks["animals"]).prepare(tasks["colours"])
    first.model.save_pretrained(tmp_path)
    again = build_encoder().equip(saved=tmp_path)
    assert again.renderer.labels == first.renderer.labels == labels_in(again.model)
    assert again.model.classifier.weight.shape == (2, 16)
    assert new_modules(again.model) == new_modules(first.model)


def test_refuses_two_kinds_of_labels(encoder: Any, tasks: dict[str, Task]) -> None:
    with pytest.raises(CompatibilityError, match="different heads") as caught:
        encoder.equip(tasks["colours"], tasks["tags"])
    assert "task tags: tokens" in str(caught.value)
    with pytest.raises(CompatibilityError, match="no head for masked"):
        masked_model(encoder.equip(tasks["colours"]).model.base_model)
