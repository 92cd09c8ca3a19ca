"""Rows as targets: classes, yes and no, and rows that were cut."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from retain.data.packing import fit_length
from retain.errors import DataError
from retain.models.encoder_rows import ended
from retain.types import IGNORED, Message, Task


def test_an_old_row_says_nothing_of_new_classes(encoder: Any, tasks: dict[str, Task]) -> None:
    later = replace(
        tasks["topics"], name="later", choices=("blue", "fire"),
        train=tuple(replace(row, task="later", messages=(row.messages[0], Message("assistant", '["fire"]')))
                    for row in tasks["topics"].train),
    )  # fmt: skip
    encoder.equip(tasks["topics"], later).prepare(tasks["topics"]).prepare(later)
    assert list(encoder.renderer.labels.ids) == ["air", "blue", "water", "fire"]
    old = encoder.family.encode(tasks["topics"].train[0], encoder.renderer)
    new = encoder.family.encode(later.train[0], encoder.renderer)
    assert old.targets[:4] == [1, 1, 0, IGNORED]
    assert new.targets[:4] == [IGNORED, 0, IGNORED, 1]


@pytest.mark.parametrize("kind", ["colours", "topics", "tags"])
def test_a_cut_row_keeps_its_classes_and_its_end(encoder: Any, tasks: dict[str, Task], kind: str) -> None:
    encoder.equip(tasks[kind]).prepare(tasks[kind])
    whole = encoder.family.encode(tasks[kind].train[1], encoder.renderer)
    [cut], _ = fit_length([whole], max_length=3, on_overflow="truncate")
    row = ended(cut, encoder.renderer)
    assert row.inputs["input_ids"] == [*whole.inputs["input_ids"][:2], encoder.renderer.tokenizer.sep_token_id]
    expected = [*whole.targets[:2], IGNORED] if kind == "tags" else whole.targets
    assert row.targets == expected


def test_as_many_classes_as_tokens_are_still_no_positions(
    build_encoder: Callable[..., Any], tasks: dict[str, Task]
) -> None:
    task = tasks["topics"]
    encoder = build_encoder().equip(task)
    length = len(encoder.renderer.tokenizer(task.train[1].prompt[0].content)["input_ids"])
    wide = replace(task, choices=("air", "blue", "water", *(f"x{i}" for i in range(length - 3))))
    encoder.prepare(wide)
    [cut], _ = fit_length(
        [encoder.family.encode(task.train[1], encoder.renderer)], max_length=3, on_overflow="truncate"
    )
    assert sum(target == 1 for target in cut.targets) == 2
    assert cut.num_targets == length


def test_says_which_class_is_missing(build_encoder: Callable[..., Any], tasks: dict[str, Task]) -> None:
    encoder = build_encoder().equip(tasks["colours"])
    with pytest.raises(DataError, match="the head has no class 'blue'"):
        encoder.family.encode(tasks["colours"].train[0], encoder.renderer)
    encoder = build_encoder().equip(tasks["tags"]).prepare(tasks["tags"])
    row = replace(tasks["tags"].train[0], messages=(Message("user", "one two"), Message("assistant", "O")))
    with pytest.raises(DataError, match="2 words and 1 tags"):
        encoder.family.encode(row, encoder.renderer)
