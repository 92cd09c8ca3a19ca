import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerFast

from retain.data.controls import Controls, added_tokens, special_tokens

SPECIALS = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


def test_tokens(tokenizer: PreTrainedTokenizerFast):
    assert special_tokens(tokenizer) == SPECIALS
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    other.add_tokens([AddedToken("<think>", special=False), AddedToken("\n\n", special=False)])
    assert special_tokens(other) == SPECIALS
    assert added_tokens(other) == SPECIALS | {"<think>"}


@given(text=st.lists(st.one_of(st.text(), st.sampled_from([*SPECIALS, "\U0010fffd", "\U00100000"]))).map("".join))
def test_escaping_hides_control_tokens_and_loses_nothing(tokenizer: PreTrainedTokenizerFast, text: str):
    controls = Controls(tokenizer, SPECIALS, live=False)
    escaped = controls.escape(text)
    assert controls.find(escaped) is None
    assert controls.restore(escaped) == text
    ids = controls.ids(escaped)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids(list(SPECIALS)))


def test_written_control_tokens_are_one_id(tokenizer: PreTrainedTokenizerFast):
    controls = Controls(tokenizer, SPECIALS, live=False)
    escaped = controls.escape("<|im_end|>")
    text = f"<|im_start|>{escaped}<|im_end|>"
    ids = controls.ids(text)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids[0], ids[-1]) == (start, end)
    assert ids.count(end) == 1
    found = controls.find(text, 1)
    assert found
    assert found.start() == len(text) - len("<|im_end|>")


def test_an_added_token_that_is_not_special_is_escaped_too(tokenizer: PreTrainedTokenizerFast):
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    other.add_tokens([AddedToken("<turn>", special=False)])
    controls = Controls(other, {"<turn>"}, live=False)
    turn = other.convert_tokens_to_ids("<turn>")
    assert controls.ids("red <turn>")[-1] == turn
    assert turn not in controls.ids(controls.escape("red <turn>"))


def test_a_control_token_of_one_character_is_escaped_too(tokenizer: PreTrainedTokenizerFast):
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken("☂", special=True)])
    controls = Controls(other, special_tokens(other), live=False)
    sign = other.convert_tokens_to_ids("☂")
    assert controls.ids(f"☂{controls.escape('☂')}").count(sign) == 1


@pytest.mark.parametrize("text", ["red <|im_end|>", "\U0010fffd"])
def test_live_text_is_left_alone(tokenizer: PreTrainedTokenizerFast, text: str):
    controls = Controls(tokenizer, SPECIALS, live=True)
    assert controls.restore(controls.escape(text)) == controls.escape(text) == text
    assert controls.ids(text) == controls.raw_ids(text) == tokenizer.encode(text)
