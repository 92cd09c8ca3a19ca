import dataclasses
import inspect

import pytest
import torch

from retain import types
from retain.types import IGNORED, Batch, Encoded, Example, Message

CHAT = Example(id="a", messages=(Message("system", "s"), Message("user", "q"), Message("assistant", "r")))


def test_ignored_is_what_transformers_ignores() -> None:
    logits, targets = torch.randn(3, 5), torch.tensor([1, IGNORED, 2])
    expected = torch.nn.functional.cross_entropy(logits[[0, 2]], targets[[0, 2]])
    assert torch.equal(torch.nn.functional.cross_entropy(logits, targets), expected)


def test_a_conversations_prompt_and_answer() -> None:
    assert [message.role for message in CHAT.prompt] == ["system", "user"]
    assert CHAT.answer == "r"


def test_a_texts_prompt_and_answer() -> None:
    example = Example(id="b", text="all of it")
    assert example.prompt == ()
    assert example.answer == "all of it"


@pytest.mark.parametrize("cls", [getattr(types, name) for name in types.__all__ if name not in ("GREEDY", "IGNORED")])
def test_values_are_frozen(cls: type) -> None:
    assert inspect.isclass(cls)
    assert dataclasses.fields(cls)
    assert vars(cls)["__dataclass_params__"].frozen


def test_changing_a_value_is_refused() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(CHAT, "weight", 2.0)  # noqa: B010


def test_encoded_counts_tokens_of_every_input_and_targets() -> None:
    encoded = Encoded(CHAT, {"input_ids": [1, 2, 3], "decoder_input_ids": [4, 5]}, [IGNORED, 7], [0.0, 1.0])
    assert encoded.num_tokens == 5
    assert encoded.num_targets == 1


def test_a_batch_knows_whose_every_target_is() -> None:
    batch = Batch(
        inputs={},
        targets=torch.tensor([[IGNORED, 4, IGNORED, 5], [6, IGNORED, IGNORED, IGNORED]]),
        documents=torch.tensor([[0, 0, 1, 1], [2, 2, -1, -1]]),
        weights=torch.ones(3),
        examples=(CHAT, CHAT, CHAT),
    )
    assert batch.counted.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert batch.target_documents.tolist() == [0, 1, 2]
    assert batch.num_tokens == 6
