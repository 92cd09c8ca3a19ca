"""Forward passes to the head: a choice between 0 and z is a sigmoid, and a head's copies are told apart."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from retain.errors import ModelError
from retain.methods.lora import LoRA
from retain.models.encoder_classes import classifiers
from retain.models.encoder_outputs import run_to, yes_or_no
from retain.types import Task


def test_yes_or_no_is_a_sigmoid() -> None:
    logits, places = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 3, 2, 1, 1, 0])
    wanted = torch.tensor([0, 1, 1, 0, 1, 0])
    ours = F.cross_entropy(yes_or_no(logits, places), wanted, reduction="none")
    z = logits[torch.arange(6), places]
    torch.testing.assert_close(ours, F.binary_cross_entropy_with_logits(z, wanted.double(), reduction="none"))
    assert yes_or_no(logits[:1], places).shape == (1, 2)


def test_the_head_in_use_is_the_trained_one(encoder: Any, tasks: dict[str, Task]) -> None:
    encoder.equip(tasks["colours"]).prepare(tasks["colours"])
    model = LoRA(r=2).apply(encoder.model)
    original, copy = classifiers(model)
    with torch.no_grad():
        copy.bias += 1.0
    inputs = encoder.batch(tasks["colours"].train).inputs
    hidden, head = run_to(model, inputs, [original, copy])
    assert head is copy
    assert hidden.shape == (4, 16)
    with model.disable_adapter():
        assert run_to(model, inputs, [original, copy])[1] is original
    with pytest.raises(ModelError, match="does not run its head"):
        run_to(model, inputs, [])
