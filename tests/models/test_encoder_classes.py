"""Rows for new classes: old ones stay bit for bit, new ones depend on the seed and their names alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from retain.errors import CompatibilityError, DataError
from retain.methods.lora import LoRA
from retain.models.encoder_classes import classifiers, kind_of, labels_in, labels_of, pooled_token, resize
from retain.types import Task


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "electra"])
def test_old_rows_stay_bit_for_bit(
    build_encoder: Callable[..., Any], tasks: dict[str, Task], architecture: str
) -> None:
    encoder = build_encoder(architecture).equip(tasks["colours"], tasks["animals"]).prepare(tasks["colours"])
    [head] = classifiers(encoder.model)
    with torch.no_grad():
        head.bias.normal_()
    weight, bias = head.weight.clone(), head.bias.clone()
    encoder.prepare(tasks["animals"])
    assert torch.equal(head.weight[:2], weight)
    assert torch.equal(head.bias[:2], bias)
    assert head.weight.shape == (4, 16)
    assert not head.bias[2:].any()
    assert encoder.model.config.id2label == {0: "blue", 1: "green", 2: "cat", 3: "dog"}
    before = head.weight.clone()
    encoder.prepare(tasks["colours"])  # nothing is new
    assert torch.equal(head.weight, before)


def test_the_token_that_a_classifier_reads(build_encoder: Callable[..., Any], tasks: dict[str, Task]) -> None:
    """BERT's own configuration does not say it; of tags and text, no single state is read."""
    for kind in ("colours", "topics", "tags", "text"):
        encoder = build_encoder()
        encoder.model.config.bos_token_id = None
        encoder.equip(tasks[kind])
        wanted = encoder.renderer.tokenizer.cls_token_id if kind in ("colours", "topics") else None
        assert pooled_token(encoder.model) == wanted


def test_a_new_row_depends_on_seed_and_name_alone() -> None:
    def rows(names: list[str], seed: int) -> torch.Tensor:
        layer = nn.Linear(500, 1)
        resize(layer, [], seed=0, std=0.0)
        resize(layer, names, seed=seed, std=0.02)
        return layer.weight.detach()

    a, b = rows(["x", "y"], 0), rows(["z", "y"], 0)
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], b[0])
    assert not torch.equal(a, rows(["x", "y"], 1))
    assert float(a.std()) == pytest.approx(0.02, rel=0.1)


def test_peft_keeps_its_copy_of_the_head_as_large(encoder: Any, tasks: dict[str, Task]) -> None:
    encoder.equip(tasks["colours"], tasks["animals"]).prepare(tasks["colours"])
    encoder.model = LoRA(r=2).apply(encoder.model)
    encoder.prepare(tasks["animals"])
    heads = classifiers(encoder.model)
    assert [len(head.weight) for head in heads] == [4, 4]
    assert sorted(head.weight.requires_grad for head in heads) == [False, True]
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_knows_what_a_task_asks(tasks: dict[str, Task]) -> None:
    kinds = {name: kind_of(task) for name, task in tasks.items()}
    assert kinds == {"colours": "single", "animals": "single", "topics": "multi", "tags": "tokens", "text": ""}
    assert labels_of(tasks["colours"]) == ("blue", "green")
    assert labels_of(tasks["tags"]) == ("O", "B-who", "I-who")


def test_refuses_answers_that_are_no_labels(tasks: dict[str, Task]) -> None:
    rows = tasks["colours"].train
    from dataclasses import replace

    from retain.types import Message

    free = tuple(
        replace(row, messages=(row.messages[0], Message("assistant", f"an answer {i}")))
        for i, row in enumerate(rows * 3)
    )
    with pytest.raises(DataError, match="these answers are none"):
        labels_of(Task("chat", free))


def test_refuses_another_kind_of_labels(encoder: Any, tasks: dict[str, Task]) -> None:
    encoder.equip(tasks["colours"])
    with pytest.raises(CompatibilityError, match="a label a word, and the model's head is made for a label a row"):
        encoder.prepare(tasks["tags"])
    assert labels_in(encoder.model).kind == "single"
