"""Rows of encoders' tasks as conversations: pairs of sentences, texts with any number of labels, tagged words."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, cast

from retain.data.conversations import RowProblem, as_text
from retain.data.labels import read_labels, write_labels
from retain.data.readers import Row
from retain.types import Message

__all__ = ["SEVERAL", "check_labels", "from_sentence_pair", "from_text_labels", "from_tokens", "labels_of_row"]

SEVERAL: Mapping[str, str] = {"text_labels": "label_f1", "tokens_tags": "tag_f1"}
"""Formats whose answer holds several labels, and the metric of each."""


def from_sentence_pair(row: Row) -> list[Message]:
    """Each sentence is a turn of the user's; `label` is the answer."""
    first = _first(row, ("sentence1", "text", "premise"))
    second = _first(row, ("sentence2", "text_pair", "hypothesis"))
    return [Message("user", first), Message("user", second), Message("assistant", as_text(row.get("label"), "label"))]


def from_text_labels(row: Row) -> list[Message]:
    """`text` is asked; the answer is the list of its `labels`, which may be empty."""
    labels = [as_text(label, "labels") for label in _listed(row.get("labels"), "labels")]
    return [Message("user", as_text(row.get("text"), "text")), Message("assistant", write_labels(labels))]


def from_tokens(row: Row) -> list[Message]:
    """`tokens` are asked, a space between two; the answer is as many `tags` (or `ner_tags`)."""
    column = "tags" if row.get("tags") is not None else "ner_tags"
    words = [as_text(word, "tokens") for word in _listed(row.get("tokens"), "tokens")]
    tags = [as_text(tag, column) for tag in _listed(row.get(column), column)]
    if len(words) != len(tags):
        raise RowProblem(f"{column}: {len(tags)} tags for {len(words)} tokens")
    if spaced := [text for text in (*words, *tags) if text.split() != [text]]:
        raise RowProblem(f"tokens: {spaced[0]!r:.60} is empty or has white space in it")
    if not words:
        raise RowProblem("tokens: there are none")
    return [Message("user", " ".join(words)), Message("assistant", " ".join(tags))]


def labels_of_row(answer: str, format: str) -> tuple[str, ...]:
    """The labels that an answer of a format holds."""
    if format == "text_labels":
        return read_labels(answer)
    return tuple(answer.split()) if format == "tokens_tags" else (answer,)


def check_labels(labels: Sequence[str], choices: Sequence[str]) -> None:
    """Refuse labels that are none of the choices.

    Raises:
        RowProblem: naming the first.
    """
    if unknown := [label for label in labels if label not in choices]:
        near = get_close_matches(unknown[0], choices, n=1, cutoff=0.5)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise RowProblem(f"label {unknown[0]!r} is none of the choices.{meant}")


def _first(row: Row, names: Sequence[str]) -> str:
    """The text of the first of these columns that the row has."""
    name = next((name for name in names if row.get(name) is not None), names[0])
    return as_text(row.get(name), name)


def _listed(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise RowProblem(f"{column}: expected a list, got {value!r:.60}")
    return list(cast("Sequence[Any]", value))
