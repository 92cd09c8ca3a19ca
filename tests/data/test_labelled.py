"""Pairs of sentences, texts with any number of labels, and tagged words, as rows and as errors."""

from typing import Any

import pytest

from retain.data.formats import detect_format, to_examples
from retain.errors import DataError


@pytest.mark.parametrize(
    ("row", "format", "asked", "answer"),
    [
        ({"sentence1": "a", "sentence2": "b", "label": "same"}, "sentence_pair", ["a", "b"], "same"),
        ({"premise": "a", "hypothesis": "b", "label": 1}, "sentence_pair", ["a", "b"], "1"),
        ({"text": "a", "text_pair": "b", "label": "x"}, "sentence_pair", ["a", "b"], "x"),
        ({"text": "a", "labels": ["y", "x"]}, "text_labels", ["a"], '["x", "y"]'),
        ({"text": "a", "labels": []}, "text_labels", ["a"], "[]"),
        ({"tokens": ["An", "lives"], "tags": ["B-who", "O"]}, "tokens_tags", ["An lives"], "B-who O"),
        ({"tokens": ["An"], "ner_tags": [3]}, "tokens_tags", ["An"], "3"),
        ({"text": "a", "label": "x"}, "text_label", ["a"], "x"),
    ],
)
def test_reads(row: dict[str, Any], format: str, asked: list[str], answer: str) -> None:
    assert detect_format([row]) == format
    [example] = to_examples([row], format)
    assert [turn.content for turn in example.prompt] == asked
    assert example.answer == answer


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"tokens": ["a b"], "tags": ["O"]}, "white space"),
        ({"tokens": ["a"], "tags": ["O", "O"]}, "2 tags for 1 tokens"),
        ({"tokens": [], "tags": []}, "there are none"),
        ({"tokens": "a b", "tags": ["O"]}, "expected a list"),
        ({"text": "a", "labels": "x"}, "expected a list"),
        ({"text": "a", "labels": ["xx"]}, "Did you mean 'x'?"),
    ],
)
def test_refuses(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        to_examples([row], detect_format([row]), choices=("x", "O"))
    assert problem in str(caught.value)
