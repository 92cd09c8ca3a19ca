from typing import Any

import pytest

from retain.data.conversations import (
    RowProblem,
    as_text,
    from_alpaca,
    from_messages,
    from_pair,
    from_sharegpt,
    from_text_label,
)
from retain.types import Message

QUESTION, ANSWER = Message("user", "q"), Message("assistant", "a")


def test_messages():
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q", "weight": None},
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "b", "weight": 0.5},
    ]
    assert from_messages({"messages": turns}) == [
        Message("system", "s"),
        QUESTION,
        Message("assistant", "a", 0.0),
        Message("tool", "t"),
        Message("assistant", "b", 0.5),
    ]


def test_parts_and_unanswered_turns():
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "thanks"},
    ]
    assert from_messages({"messages": turns}) == [Message("user", "q?"), ANSWER]


def test_sharegpt():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert from_sharegpt({"conversations": turns}) == [QUESTION, ANSWER]
    assert from_sharegpt({"conversations": turns, "system": "s"}) == [Message("system", "s"), QUESTION, ANSWER]
    assert from_sharegpt({"conversations": [{"role": "user", "content": "q"}, {"from": "GPT", "value": "a"}]}) == [
        QUESTION,
        ANSWER,
    ]


def test_alpaca():
    assert from_alpaca({"instruction": "q", "input": "", "output": "a"}) == [QUESTION, ANSWER]
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["x", "y"]]}
    assert from_alpaca(row) == [
        Message("system", "s"),
        Message("user", "x"),
        Message("assistant", "y"),
        Message("user", "q\n\ni"),
        ANSWER,
    ]
    with pytest.raises(RowProblem, match=r"history: expected \[question, answer\]"):
        from_alpaca({**row, "history": ["x"]})


def test_prompt_and_completion():
    assert from_pair({"prompt": "q", "completion": "a"}) == [QUESTION, ANSWER]
    assert from_pair({"prompt": "q", "completion": 3, "system": "s"})[0] == Message("system", "s")
    prompt = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "q"}]
    untrained = [Message("user", "x"), Message("assistant", "y", 0.0), QUESTION]
    assert from_pair({"prompt": prompt, "completion": [{"role": "assistant", "content": "a"}]}) == [*untrained, ANSWER]
    assert from_pair({"prompt": prompt, "completion": "a"}) == [*untrained, ANSWER]


def test_text_and_label():
    assert from_text_label({"text": "q", "label": 2}) == [QUESTION, Message("assistant", "2")]


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ("hi", "messages: expected a list of messages, got 'hi'"),
        ([], "expected a list of messages"),
        (["hi"], r"messages\[0\]: expected \{'role'"),
        ([{"role": "asistant", "content": "a"}], r"role 'asistant' is unknown. Did you mean 'assistant'\?"),
        ([{"content": "a"}], "role None is unknown"),
        ([{"role": "user"}], r"messages\[0\].content: expected text, got nothing"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "tool calls are not trained"),
        ([{"role": "user", "content": [{"type": "image"}]}], "only parts of text"),
        ([{"role": "assistant", "content": "a", "weight": 2}], r"weight: expected a number from 0 to 1, got 2"),
        ([{"role": "assistant", "content": "a", "weight": "1"}], "weight: expected a number from 0 to 1"),
    ],
)
def test_what_cannot_be_used(turns: Any, problem: str):
    with pytest.raises(RowProblem, match=problem):
        from_messages({"messages": turns})


def test_as_text():
    assert [as_text(value, "c") for value in ("Hà", 3, 0.5, True)] == ["Hà", "3", "0.5", "true"]
    for value, problem in (
        (None, "got nothing"),
        ([1], r"got \[1\]"),
        ("a\ud800", "character 1 is half of a surrogate"),
    ):
        with pytest.raises(RowProblem, match=problem):
            as_text(value, "c")
