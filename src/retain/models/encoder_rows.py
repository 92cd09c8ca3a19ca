"""Rows as an encoder reads them: ids, token types, and as targets classes, yes and no, tags, or the text itself."""

from dataclasses import replace

from retain.data.labels import read_labels
from retain.data.rendering import Renderer
from retain.errors import DataError
from retain.models.encoder_tokenizer import bracketed, segments, words_of
from retain.models.family import Tokenizer
from retain.types import IGNORED, Encoded, Example

__all__ = ["ended", "labelled_row", "tagged_row", "text_row"]


def text_row(example: Example, tokenizer: Tokenizer) -> Encoded:
    """A raw text, whole; which of its tokens have to be guessed is drawn later."""
    ids = bracketed(tokenizer, tokenizer(example.text, add_special_tokens=False, verbose=False)["input_ids"])
    special = set(tokenizer.all_special_ids)
    targets = [IGNORED if token in special else token for token in ids]
    return Encoded(example, {"input_ids": ids}, targets, [example.weight] * len(ids))


def labelled_row(example: Example, renderer: Renderer) -> Encoded:
    """One target, the row's class; or one for each class of the row's task, yes or no."""
    labels = renderer.labels
    ids, types = segments(renderer.tokenizer, example.prompt)
    if labels.kind == "multi":
        # One more where a row would have as many targets as tokens: these are no targets of positions.
        targets = [IGNORED] * (len(labels.ids) + (len(labels.ids) == len(ids)))
        for row in labels.rows(example.task):
            targets[row] = 0
        for label in read_labels(example.answer):
            targets[class_of(example, label, renderer)] = 1
    else:
        targets = [class_of(example, example.answer, renderer)]
    return Encoded(example, {"input_ids": ids, "token_type_ids": types}, targets, [example.weight] * len(targets))


def tagged_row(example: Example, renderer: Renderer) -> Encoded:
    """A class for each word, at its first token.

    Raises:
        DataError: there are not as many tags as words.
    """
    words, tags = example.prompt[-1].content.split(), example.answer.split()
    if len(words) != len(tags):
        raise DataError(f"row {example.id}: {len(words)} words and {len(tags)} tags")
    ids, places = words_of(renderer.tokenizer, words)
    targets = [IGNORED] * len(ids)
    for place, tag in zip(places, tags, strict=True):
        if place >= 0:
            targets[place] = class_of(example, tag, renderer)
    inputs = {"input_ids": ids, "token_type_ids": [0] * len(ids)}
    return Encoded(example, inputs, targets, [example.weight] * len(ids))


def class_of(example: Example, label: str, renderer: Renderer) -> int:
    """The row of the head that stands for a label.

    Raises:
        DataError: there is none.
    """
    labels = renderer.labels
    row = labels.ids.get(labels.key(example.task, label))
    if row is None:
        known = ", ".join(list(labels.ids)[:8]) or "none yet"
        raise DataError(
            f"row {example.id}: the head has no class {label!r}",
            problems=[f"its classes: {known}"],
            hint="list every label of the task in `choices`",
        )
    return row


def ended(row: Encoded, renderer: Renderer) -> Encoded:
    """A row that was cut, with the token that ends a text at its end; nothing is asked of that token."""
    ids, end = row.inputs["input_ids"], renderer.tokenizer.sep_token_id
    if not row.num_truncated or ids[-1] == end:
        return row
    of_positions = not row.example.messages or renderer.labels.kind == "tokens"
    targets = [*row.targets[:-1], IGNORED] if of_positions else row.targets
    return replace(row, inputs={**row.inputs, "input_ids": [*ids[:-1], end]}, targets=targets)
