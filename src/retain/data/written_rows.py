r"""Rows that a model writes: a conversation as one text, back again, and what became of each text.

    [[user]]2 + 2?[[assistant]]4[[end]]

A turn begins with its role, and the text ends with `[[end]]`: what a limit on tokens cut off is noticed. Where a
content itself spells a marker, a backslash is put into it (`[\[user]]`), so every conversation comes back as it was.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Self

from retain.types import Example, Message

__all__ = ["RowForm", "Yield", "as_text", "collect", "quotas"]

NAMES = "system|user|assistant|tool|text|end"
MARKER = re.compile(rf"\[\[({NAMES})\]\]")
SPELLED = re.compile(rf"\[(\\*)\[(?=(?:{NAMES})\]\])")
ESCAPED = re.compile(rf"\[\\(\\*)\[(?=(?:{NAMES})\]\])")

MANY_LABELS = 100
"""More distinct answers than this are no label set."""


def as_text(example: Example) -> str:
    """The whole row as one text that `RowForm.read` reads back."""
    turns = [(turn.role, turn.content) for turn in example.messages] or [("text", example.text)]
    return "".join(f"[[{role}]]{escape(content)}" for role, content in turns) + "[[end]]"


def escape(content: str) -> str:
    """A content in which nothing is a marker."""
    return SPELLED.sub(lambda found: f"[\\{found[1]}[", content)


def restore(content: str) -> str:
    """What `escape` was given."""
    return ESCAPED.sub(lambda found: f"[{found[1]}[", content)


@dataclass(frozen=True)
class RowForm:
    """What is known of a task's rows once they are gone: enough to tell whether a text is one more of them.

    Args:
        task: their task.
        shapes: the roles of a row's turns and their loss weights, of every kind of row; `()` for raw text.
        labels: the answers that a row may have; empty where any will do.
        choices: what every row lets choose from; empty where they differ, or there are none.
    """

    task: str
    shapes: tuple[tuple[tuple[str, float], ...], ...]
    labels: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    @classmethod
    def of(cls, task: str, examples: Sequence[Example]) -> Self:
        """The form of a task's rows. Answers that come back again and again are labels."""
        shapes = dict.fromkeys(tuple((turn.role, turn.weight) for turn in example.messages) for example in examples)
        choices = {example.choices for example in examples}
        shared = choices.pop() if len(choices) == 1 else ()
        answers = tuple(sorted({example.answer for example in examples if example.messages}))
        labelled = not choices and len(answers) <= min(MANY_LABELS, len(examples) / 4)
        return cls(task, tuple(shapes), shared or (answers if labelled else ()), shared)

    def read(self, text: str) -> Example | str:
        """The row that a text writes out, or why it is none."""
        before, *parts = MARKER.split(text)
        roles, contents = parts[::2], parts[1::2]
        if before.strip() or not roles:
            return "not a row"
        if roles[-1] != "end" or contents[-1].strip():
            return "cut off" if "end" not in roles else "not a row"
        turns = [(role, restore(content)) for role, content in zip(roles, contents, strict=True)][:-1]
        shape = next((shape for shape in self.shapes if [role for role, _ in turns] == roles_of(shape)), None)
        if shape is None:
            return "other turns than the task's"
        if not all(content.strip() for _, content in turns):
            return "an empty turn"
        if self.labels and turns[-1][1] not in self.labels:
            return "a label that the task does not have"
        messages = tuple(Message(*turn, weight) for turn, (_, weight) in zip(turns, shape, strict=False))
        return Example(
            id=blake2b(f"{self.task}/{text.strip()}".encode(), digest_size=8).hexdigest(), messages=messages,
            text="" if messages else turns[0][1], choices=self.choices, source="generated", task=self.task,
        )  # fmt: skip


def roles_of(shape: Sequence[tuple[str, float]]) -> list[str]:
    """The markers of a row of this shape."""
    return [role for role, _ in shape] or ["text"]


@dataclass
class Yield:
    """What became of the texts that were written for one task.

    Args:
        task: whose rows were wanted.
        wanted: how many of them.
        made: texts that were written.
        kept: rows that came of them.
        dropped: the others, by reason.
    """

    task: str
    wanted: int
    made: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])

    def __str__(self) -> str:
        short = f" ({self.wanted - self.kept} short)" if self.kept < self.wanted else ""
        why = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        return f"of {self.task} {self.wanted} rows wanted, {self.made} written, {self.kept} kept{short}" + (
            f"; dropped: {why}" if why else ""
        )


def collect(
    write: Callable[[int, int], Sequence[str]],
    read: Callable[[str], Example | str],
    *,
    task: str,
    wanted: int,
    max_rounds: int,
    repeats: bool = False,
) -> tuple[list[Example], Yield]:
    """Let a model write until there are enough rows.

    Args:
        write: (how many texts, the number of the round) -> the texts.
        read: a text as a row, or why it is none.
        task: whose rows they are.
        wanted: rows that are enough.
        max_rounds: how often the model writes at most; each time as many texts as rows are missing.
        repeats: may a row come twice, as samples of a distribution do? Else all are different.
    """
    rows: list[Example] = []
    seen: set[str] = set()
    found = Yield(task, wanted)
    for turn in range(max_rounds):
        if len(rows) == wanted:
            break
        for text in write(wanted - len(rows), turn):
            row = read(text)
            if isinstance(row, Example) and row.id in seen and not repeats:
                row = "a repeat"
            found.made += 1
            if isinstance(row, str):
                found.dropped[row] += 1
            else:
                rows.append(row)
                seen.add(row.id)
    found.kept = len(rows)
    return rows, found


def quotas(wanted: int, sources: Sequence[str]) -> dict[str, int]:
    """How many of the wanted rows each source gives: as even as can be, the first ones one more."""
    return {source: wanted // len(sources) + (place < wanted % len(sources)) for place, source in enumerate(sources)}
