from typing import Any

import pytest

from retain.data.formats import FORMATS, columns_not_used, detect_format, rename_columns, to_examples
from retain.errors import ConfigError, DataError
from retain.types import Message

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a", "text": "### Instruction: q"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "text_label": {"text": "q", "label": "a"},
    "sentence_pair": {"text": "q", "text_pair": "r", "label": "a"},
    "text_labels": {"text": "q", "labels": ["a"]},
    "tokens_tags": {"tokens": ["q"], "tags": ["a"]},
    "text": {"text": "q"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_told_by_its_columns(name: str):
    row = ROWS[name] | {"extra": 1, "task": "t", "prompt" if name == "messages" else "more": None}
    assert detect_format([row, row]) == name
    (example,) = to_examples([row], "auto", task="mine")
    assert example.task == "mine"
    if name == "text":
        assert (example.text, example.messages) == ("q", ())
    else:
        more = (Message("user", "r"),) if name == "sentence_pair" else ()
        said = '["a"]' if name == "text_labels" else "a"
        assert example.messages == (Message("user", "q"), *more, Message("assistant", said))
    assert to_examples([row], name, task="mine") == [example]
    assert columns_not_used([row], name) == [
        *(["text"] if name == "alpaca" else []), "extra", "prompt" if name == "messages" else "more"
    ]  # fmt: skip


def test_document_is_text():
    assert detect_format([{"document": "d"}]) == "text"
    assert to_examples([{"document": "d"}], "text")[0].text == "d"


def test_choices_stand_for_a_completion():
    row = {"prompt": "q", "choices": ["x", "y"], "answer": 1}
    assert detect_format([row]) == "prompt_completion"
    assert to_examples([row], "auto")[0].answer == "y"


@pytest.mark.parametrize(
    ("row", "both"),
    [
        ({"text": "t", "messages": CHAT}, "messages and text"),
        ({"prompt": "p", "completion": "c", "messages": CHAT}, "messages and prompt_completion"),
        ({"conversations": [], "messages": CHAT}, "messages and sharegpt"),
    ],
)
def test_a_row_of_two_formats(row: dict[str, Any], both: str):
    with pytest.raises(DataError, match=f"row 2 is both {both}") as caught:
        detect_format([{"messages": CHAT}, row])
    assert "`format: messages`" in caught.value.hint
    assert to_examples([row], "messages")[0].answer == "a"


def test_mixed_formats():
    with pytest.raises(DataError) as caught:
        detect_format([ROWS["text"], ROWS["text"], ROWS["messages"]], where="a.jsonl")
    assert caught.value.message == "a.jsonl mixes formats: row 1 is text, row 3 is messages"
    assert caught.value.problems == ("row 1: columns text", "row 3: columns messages")


@pytest.mark.parametrize(
    ("row", "nearest", "hint"),
    [
        ({"question": "q", "answer": "a"}, "prompt_completion", "columns: {prompt: question, completion: answer}"),
        ({"prompt": "q", "completions": "a"}, "prompt_completion", "columns: {completion: completions}"),
        ({"sentence": "q", "category": "a"}, "text_label", "columns: {text: sentence, label: category}"),
        ({"dialogue": CHAT}, "messages", "columns: {messages: dialogue}"),
        ({"instruction": "q", "response": "a"}, "prompt_completion", "{prompt: instruction, completion: response}"),
        ({"a": 1, "b": None}, "messages", "map your columns"),
    ],
)
def test_a_wrong_column(row: dict[str, Any], nearest: str, hint: str):
    with pytest.raises(DataError, match=r"a\.csv: row 1 fits no format") as caught:
        detect_format([row], where="a.csv")
    found = ", ".join(name for name, value in row.items() if value is not None)
    assert caught.value.problems[0] == f"columns found: {found}"
    assert caught.value.problems[1].startswith(f"nearest: {nearest}, with ")
    assert hint in caught.value.hint


def test_the_proposed_mapping_works():
    rows = [{"question": "q", "answer": "a", "id": 3}]
    columns = {"prompt": "question", "completion": "answer"}
    assert rename_columns(rows, columns) == [{"id": 3, "prompt": "q", "completion": "a"}]
    (example,) = to_examples(rows, "auto", columns=columns)
    assert (example.answer, example.references) == ("a", ())


def test_columns_may_be_exchanged():
    assert rename_columns([{"en": "q", "vi": "a"}], {"prompt": "vi", "completion": "en"}) == [
        {"prompt": "a", "completion": "q"}
    ]
    assert rename_columns([{"prompt": "q", "completion": "a"}], {"prompt": "completion", "completion": "prompt"}) == [
        {"prompt": "a", "completion": "q"}
    ]


def test_a_mapped_column_that_is_not_there():
    with pytest.raises(ConfigError) as caught:
        to_examples([{"question": "q"}], "auto", columns={"prompt": "qestion"}, where="a.csv")
    assert caught.value.problems == ("columns.prompt: no column 'qestion'. Did you mean 'question'?",)
    assert "question" in caught.value.hint


def test_an_explicit_format_that_no_row_has():
    with pytest.raises(DataError, match="row 1 is not alpaca") as caught:
        to_examples([{"prompt": "q", "completion": "a"}], "alpaca")
    assert "nearest: alpaca, with `instruction`, `output`" in str(caught.value)
    with pytest.raises(ConfigError, match=r"format: 'mesages' is unknown\. Did you mean 'messages'"):
        to_examples([ROWS["messages"]], "mesages")


def test_empty_completions_are_all_counted():
    rows = [{"prompt": "q", "completion": "" if k % 2 else "a"} for k in range(40)]
    with pytest.raises(DataError) as caught:
        to_examples(rows, "auto", where="a.jsonl")
    assert caught.value.message == "a.jsonl: 20 of 40 rows cannot be used as prompt_completion"
    assert caught.value.problems[0] == "row 2: the completion is empty"
    assert caught.value.problems[-1] == "... and 12 more rows"
    assert len(caught.value.problems) == 9


def test_labels_outside_the_set():
    rows = [{"text": "q", "label": "card_arival"}, {"text": "q", "label": "card_arrival"}, {"text": "q", "label": 7}]
    with pytest.raises(DataError) as caught:
        to_examples(rows, "auto", choices=["card_arrival", "card_linking"])
    assert caught.value.problems == (
        "row 1: label 'card_arival' is none of the choices. Did you mean 'card_arrival'? "
        "Allowed: card_arrival, card_linking",
        "row 3: label: 7 is no number of a label; there are 2, counted from 0",
    )
    assert [
        e.answer for e in to_examples([rows[1], {"text": "q", "label": 1}], "auto", choices=["card_arrival", "x"])
    ] == [
        "card_arrival",
        "x",
    ]
