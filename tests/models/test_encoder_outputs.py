"""Forward passes to the head: a choice between 0 and z is a sigmoid, and a head's copies are told apart."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from retain.errors import DataError, ModelError
from retain.methods.lora import LoRA
from retain.methods.prefix import Prefix
from retain.methods.prompt import Prompt
from retain.models.encoder_classes import classifiers
from retain.models.encoder_outputs import outputs_of, run_to, yes_or_no
from retain.types import Batch, Task


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


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@pytest.mark.parametrize("method", [None, Prompt(num_tokens=3), Prefix(num_tokens=3)])
def test_rows_end_where_positions_do(
    build_encoder: Callable[..., Any], tasks: dict[str, Task], method: Any, architecture: str
) -> None:
    """The longest row is the longest that the network reads: RoBERTa's first two positions are padding's."""
    encoder = build_encoder(architecture).equip(tasks["colours"]).prepare(tasks["colours"])
    encoder.model = method.apply(encoder.model) if method else encoder.model
    room = 64 - (2 if architecture == "roberta" else 0) - (3 if method else 0)
    batch = encoder.batch(tasks["colours"].train[:1])

    def of(length: int) -> Batch:
        inputs = {name: torch.full((1, length), 5 if name == "input_ids" else 1) for name in batch.inputs}
        return replace(batch, inputs=inputs)

    assert outputs_of(encoder.model, of(room)).logits().shape == (1, 2)
    with pytest.raises(DataError, match=f"positions for {room}"):
        outputs_of(encoder.model, of(room + 1))
    with pytest.raises((IndexError, RuntimeError)):
        encoder.model(**of(room + 1).inputs)
