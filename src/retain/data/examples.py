"""A row and its conversation as an example: choices, references, weight, and an id that is a hash of the content."""

import json
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from hashlib import blake2b
from itertools import islice
from typing import Any

from retain.data.conversations import RowProblem, as_text
from retain.data.readers import Row
from retain.types import Example, Message

__all__ = ["SHARED_COLUMNS", "make_example", "name_label"]

SHARED_COLUMNS = ("choices", "answer", "references", "weight", "task")
"""Columns that a row of any format may carry."""


def make_example(
    row: Row, turns_of: Callable[[Row], list[Message]] | None, *, task: str, label_set: tuple[str, ...]
) -> Example:
    """One row as an example.

    Args:
        row: its columns.
        turns_of: reads its conversation; None where it is raw text.
        task: the task that it belongs to; empty takes the row's own.
        label_set: the labels that the answer must be one of, where the row names none itself; empty allows any.

    Raises:
        RowProblem: why it cannot be used.
    """
    choices = _texts(row, "choices")
    references = _texts(row, "references")
    if choices and len(set(choices)) < max(2, len(choices)):
        raise RowProblem(f"choices: expected two or more different texts, got {list(choices)}")
    right = _right_choice(row.get("answer"), choices)
    if right is not None and row.get("completion") is None:
        row = {**row, "completion": right}
    if right is None and row.get("answer") is not None:
        references = (*references, as_text(row["answer"], "answer"))
    turns: tuple[Message, ...] = ()
    text = ""
    if turns_of is None:
        text = as_text(row["text"] if row.get("text") is not None else row.get("document"), "text")
        if not text.strip():
            raise RowProblem("text: it is empty")
    else:
        turns = tuple(turns_of(row))
        _check_turns(turns, choices or label_set)
        if right is not None and turns[-1].content != right:
            raise RowProblem(f"answer: it says {right!r}, the completion {turns[-1].content!r}")
    return Example(
        id=_content_id(turns, text, choices, references),
        messages=turns,
        text=text,
        choices=choices,
        references=references,
        weight=_weight(row.get("weight")),
        task=task or str(row.get("task") or ""),
    )


def name_label(row: Row, label_set: Sequence[str]) -> Row:
    """The row with a label's number, counted from 0, replaced by its name."""
    label = row.get("label")
    if not label_set or not isinstance(label, int) or as_text(label, "label") in label_set:
        return row
    if not 0 <= label < len(label_set):
        raise RowProblem(f"label: {label} is no number of a label; there are {len(label_set)}, counted from 0")
    return {**row, "label": label_set[label]}


def _right_choice(answer: Any, choices: tuple[str, ...]) -> str | None:
    """The choice that `answer` names, by its number from 0 or by its text; None where there is none to name."""
    if not choices or answer is None:
        return None
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return choices[answer]
    if isinstance(answer, str) and answer in choices:
        return answer
    raise RowProblem(f"answer: {answer!r:.60} names no choice; there are {len(choices)}, counted from 0")


def _check_turns(turns: tuple[Message, ...], choices: tuple[str, ...]) -> None:
    """A question, answers that say something, and a last one from the label set."""
    if not turns or turns[-1].role != "assistant":
        raise RowProblem("no answer of the assistant")
    if all(turn.role in ("assistant", "system") for turn in turns):
        raise RowProblem("no question before the answer")
    for place, turn in enumerate(turns):
        if turn.role == "assistant" and turn.weight > 0 and not turn.content.strip():
            raise RowProblem("the completion is empty" if place == len(turns) - 1 else f"turn {place + 1} is empty")
    label = turns[-1].content
    if choices and label not in choices:
        near = get_close_matches(label, choices, n=1, cutoff=0.5)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        shown = ", ".join(islice(choices, 10)) + (f", ... ({len(choices)} in all)" if len(choices) > 10 else "")
        raise RowProblem(f"label {label!r} is none of the choices.{meant} Allowed: {shown}")


def _texts(row: Row, column: str) -> tuple[str, ...]:
    value = row.get(column)
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise RowProblem(f"{column}: expected a list of texts, got {value!r:.60}")
    return tuple(as_text(item, column) for item in value)


def _weight(value: Any) -> float:
    if value is None:
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise RowProblem(f"weight: expected a number of 0 or more, got {value!r:.60}")
    return weight


def _content_id(turns: tuple[Message, ...], text: str, choices: tuple[str, ...], references: tuple[str, ...]) -> str:
    """16 hexadecimal digits, equal for equal content, wherever the row stands."""
    content = [[[turn.role, turn.content, turn.weight] for turn in turns], text, choices, references]
    return blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
