from hashlib import blake2b
from typing import Any

import pytest

from retain.data.conversations import RowProblem, from_messages, from_pair
from retain.data.examples import make_example, name_label
from retain.types import Example, Message

PAIR = {"prompt": "q", "completion": "yes"}


def make(row: dict[str, Any], *, label_set: tuple[str, ...] = (), task: str = "") -> Example:
    return make_example(row, from_pair if "prompt" in row else None, task=task, label_set=label_set)


def test_what_a_row_may_carry():
    row = {**PAIR, "choices": ["no", "yes"], "references": ["yep"], "weight": 0.5, "task": "mine"}
    example = make(row)
    assert example.messages == (Message("user", "q"), Message("assistant", "yes"))
    assert (example.choices, example.references, example.weight, example.task) == (("no", "yes"), ("yep",), 0.5, "mine")
    assert make(row, task="given").task == "given"
    assert make({"text": "raw"}) == Example(make({"text": "raw"}).id, text="raw")
    assert make({"document": "raw", "text": None}).text == "raw"


def test_equal_content_has_an_equal_id():
    assert make(PAIR).id == make({**PAIR, "task": "other", "weight": 2, "line": 7}).id
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    assert make_example({"messages": turns}, from_messages, task="", label_set=()).id == make(PAIR).id
    others = [
        {**PAIR, "prompt": "p"},
        {**PAIR, "completion": "no"},
        {**PAIR, "system": "s"},
        {**PAIR, "choices": ["yes", "no"]},
        {**PAIR, "references": ["yep"]},
        {"text": "qyes"},
    ]
    ids = {make(row).id for row in [PAIR, *others]}
    assert len(ids) == 7
    assert all(len(name) == 16 for name in ids)
    content = b'[[["user", "q", 1.0], ["assistant", "yes", 1.0]], "", [], []]'
    assert make(PAIR).id == blake2b(content, digest_size=8).hexdigest()  # lineages keep it: it must never change


@pytest.mark.parametrize("answer", [1, "yes"])
def test_the_answer_names_a_choice(answer: Any):
    row = {"prompt": "q", "choices": ["no", "yes"], "answer": answer}
    assert make(row).answer == make({**row, "completion": "yes"}).answer == "yes"
    assert make({**row, "completion": None}).references == ()


def test_an_answer_without_choices_is_a_reference():
    assert make({**PAIR, "references": ["y"], "answer": 72}).references == ("y", "72")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "q", "completion": " \n"}, "the completion is empty"),
        ({"prompt": "q", "completion": None}, "completion: expected text, got nothing"),
        ({**PAIR, "choices": "yes"}, "choices: expected a list of texts"),
        ({**PAIR, "choices": ["yes"]}, "two or more different"),
        ({**PAIR, "choices": ["yes", "yes"]}, "two or more different"),
        (
            {**PAIR, "choices": ["yess", "no"]},
            r"label 'yes' is none of the choices. Did you mean 'yess'\? Allowed: yess, no",
        ),
        ({**PAIR, "choices": ["yes", "no"], "answer": 2}, "answer: 2 names no choice; there are 2"),
        ({**PAIR, "choices": ["yes", "no"], "answer": 1}, "answer: it says 'no', the completion 'yes'"),
        ({**PAIR, "weight": -1}, "weight: expected a number of 0 or more, got -1"),
        ({**PAIR, "weight": "heavy"}, "weight: expected a number"),
        ({**PAIR, "weight": float("nan")}, "weight: expected a number"),
        ({**PAIR, "references": [None]}, "references: expected text, got nothing"),
        ({"text": " "}, "text: it is empty"),
        ({"prompt": [{"role": "system", "content": "s"}], "completion": "a"}, "no question before the answer"),
        ({"prompt": "q", "completion": [{"role": "user", "content": "s"}]}, "no answer of the assistant"),
        (
            {
                "prompt": "q",
                "completion": [{"role": "assistant", "content": ""}, {"role": "assistant", "content": "b"}],
            },
            "turn 2 is empty",
        ),
    ],
)
def test_what_cannot_be_used(row: dict[str, Any], problem: str):
    with pytest.raises(RowProblem, match=problem):
        make(row)


def test_the_label_set():
    assert make(PAIR, label_set=("yes", "no")).choices == ()
    with pytest.raises(RowProblem, match=r"Allowed: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\. \(20 in all\)"):
        make(PAIR, label_set=tuple(map(str, range(20))))


def test_numbers_of_labels():
    assert name_label({"label": 1}, ("bad", "good"))["label"] == "good"
    for row, label_set in (({"label": 1}, ("1", "2")), ({"label": "good"}, ("bad", "good")), ({"label": 1}, ())):
        assert name_label(row, label_set) == row
    with pytest.raises(RowProblem, match="label: 2 is no number of a label; there are 2"):
        name_label({"label": 2}, ("bad", "good"))
