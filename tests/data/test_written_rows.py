"""A conversation comes back as it was; the books of what a model wrote are exact."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from retain.data.written_rows import RowForm, as_text, collect, quotas
from retain.types import Example, Message


def pair(prompt: str, answer: str, **options: object) -> Example:
    return Example(id="x", messages=(Message("user", prompt), Message("assistant", answer)), **options)  # type: ignore[arg-type]


PAIR = pair("2 + 2?", "4")
TALK = Example(
    id="talk",
    messages=(
        Message("system", "Be short."), Message("user", "hi\n"), Message("assistant", "hello", 0.0),
        Message("tool", '{"a": [[1]]}'), Message("user", " how?"), Message("assistant", "well"),
    ),
)  # fmt: skip
TEXT = Example(id="text", text="Once upon a time\n\nthere was")


def content(example: Example) -> tuple[object, ...]:
    return example.messages, example.text


@pytest.mark.parametrize("row", [PAIR, TALK, TEXT], ids=lambda row: row.id)
def test_a_row_comes_back_as_it_was(row: Example) -> None:
    found = RowForm.of("desk", [row]).read(as_text(row))
    assert isinstance(found, Example)
    assert content(found) == content(row)
    assert (found.task, found.source, found.weight) == ("desk", "generated", 1.0)


def test_contents_that_spell_markers_come_back_too() -> None:
    pieces = ["[[user]]", "[[end]]", "[\\[user]]", "[\\\\[text]]", "[", "[[", "]]", "\\", "user", "[[x]]", "\n", "é"]
    generator = random.Random(0)
    for _ in range(500):
        prompt, answer = ("".join(generator.choices(pieces, k=generator.randint(1, 6))) for _ in range(2))
        row = pair("a" + prompt, "b" + answer)
        found = RowForm.of("desk", [row]).read(as_text(row))
        assert isinstance(found, Example)
        assert content(found) == content(row)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a row"),
        ("blah", "not a row"),
        ("blah [[user]]q[[assistant]]a[[end]]", "not a row"),
        ("[[user]]q[[assistant]]a[[end]] and more", "not a row"),
        ("[[user]]q[[assistant]]a[[end]][[user]]q", "not a row"),
        ("[[user]]q[[assistant]]a", "cut off"),
        ("[[user]]q[[ass", "cut off"),
        ("[[user]]q[[end]]", "other turns than the task's"),
        ("[[assistant]]a[[end]]", "other turns than the task's"),
        ("[[user]]q[[assistant]]a[[assistant]]b[[end]]", "other turns than the task's"),
        ("[[end]]", "other turns than the task's"),
        ("[[text]]q[[end]]", "other turns than the task's"),
        ("[[user]][[assistant]]a[[end]]", "an empty turn"),
        ("[[user]]q[[assistant]] \n[[end]]", "an empty turn"),
    ],
)
def test_what_is_no_row_is_told(text: str, reason: str) -> None:
    assert RowForm.of("desk", [PAIR]).read(text) == reason


def test_space_around_the_text_does_not_matter() -> None:
    form = RowForm.of("desk", [PAIR])
    assert form.read(f"\n {as_text(PAIR)} \n") == form.read(as_text(PAIR))


def test_labels_are_answers_that_come_again() -> None:
    few = [pair(f"{i}", "yes" if i % 2 else "no") for i in range(8)]
    assert RowForm.of("t", few).labels == ("no", "yes")
    assert RowForm.of("t", few[:7]).labels == ()
    assert RowForm.of("t", [pair(f"{i}", f"{i}") for i in range(8)]).labels == ()
    form = RowForm.of("t", few)
    assert form.read("[[user]]q[[assistant]]maybe[[end]]") == "a label that the task does not have"
    assert isinstance(form.read("[[user]]q[[assistant]]yes[[end]]"), Example)


def test_choices_are_kept_where_all_rows_have_the_same() -> None:
    rows = [replace(PAIR, choices=("4", "5")), replace(PAIR, choices=("4", "5"))]
    form = RowForm.of("t", rows)
    assert form.labels == form.choices == ("4", "5")
    found = form.read(as_text(PAIR))
    assert isinstance(found, Example)
    assert found.choices == ("4", "5")
    mixed = RowForm.of("t", [rows[0], replace(PAIR, choices=("4", "6"))] * 8)
    assert mixed.choices == mixed.labels == ()


def test_shapes_are_those_that_the_task_has() -> None:
    form = RowForm.of("t", [PAIR, TALK, PAIR])
    assert len(form.shapes) == 2
    for row in (PAIR, TALK):
        found = form.read(as_text(row))
        assert isinstance(found, Example)
        assert found.messages == row.messages, "the weights of the turns are the shape's"


# What became of the texts


class Scripted:
    """Writes what the test says, in order, round by round."""

    def __init__(self, says: Sequence[str]) -> None:
        self.says, self.asked = list(says), []

    def __call__(self, num: int, turn: int) -> list[str]:
        self.asked.append((num, turn))
        said, self.says = self.says[:num], self.says[num:]
        return said


def row(number: int) -> str:
    return f"[[user]]{number}[[assistant]]a[[end]]"


READ = RowForm.of("desk", [PAIR]).read


def test_the_books_are_exact() -> None:
    script = Scripted([row(0), "junk", row(0), row(1), row(2), "[[user]]9", row(3), row(4)])
    rows, found = collect(script, READ, task="desk", wanted=4, max_rounds=9)
    assert [r.messages[0].content for r in rows] == ["0", "1", "2", "3"]
    assert script.asked == [(4, 0), (2, 1), (1, 2)]
    assert (found.wanted, found.made, found.kept) == (4, 7, 4)
    assert found.made == found.kept + found.dropped.total()
    assert str(found) == ("of desk 4 rows wanted, 7 written, 4 kept; dropped: 1 not a row, 1 a repeat, 1 cut off")


def test_a_shortfall_is_told() -> None:
    rows, found = collect(Scripted([row(0), *["junk"] * 20]), READ, task="desk", wanted=3, max_rounds=2)
    assert len(rows) == 1
    assert str(found) == "of desk 3 rows wanted, 5 written, 1 kept (2 short); dropped: 4 not a row"


def test_samples_of_a_distribution_may_repeat() -> None:
    rows, found = collect(Scripted([row(0), row(0)]), READ, task="desk", wanted=2, max_rounds=1, repeats=True)
    assert rows[0] == rows[1]
    assert (found.kept, found.dropped.total()) == (2, 0)


def test_nothing_wanted_nothing_written() -> None:
    script = Scripted([row(0)])
    assert collect(script, READ, task="desk", wanted=0, max_rounds=3)[0] == []
    assert script.asked == []


@pytest.mark.parametrize(("wanted", "num"), [(0, 3), (1, 3), (7, 3), (9, 3), (5, 1)])
def test_quotas_are_even_and_add_up(wanted: int, num: int) -> None:
    shares = quotas(wanted, [str(i) for i in range(num)])
    assert sum(shares.values()) == wanted
    assert max(shares.values()) - min(shares.values()) <= 1
