"""The classes that a head tells apart, by name; and how labels lie in rows whose answer is more than one label.

A multi-label row's answer is a JSON list of its labels. A row of tagged words asks the words, a space between two, and
answers as many tags.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

__all__ = ["Kind", "Labels", "read_labels", "write_labels"]

Kind = Literal["", "single", "multi", "tokens"]
"""What a head says of a text: one label, any number of labels, or a label of each word; empty where there is none."""


@dataclass(frozen=True)
class Labels:
    """What the rows of a classifier stand for.

    Args:
        kind: how it labels.
        ids: the row of each label; where each task has its own head, of `task/label`.
        tasks: the labels of each task, as it names them.
        per_task: does each task choose among its own labels only?
    """

    kind: Kind = ""
    ids: Mapping[str, int] = field(default_factory=dict[str, int])
    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    per_task: bool = False

    def key(self, task: str, label: str) -> str:
        """The label's name in `ids`."""
        return f"{task}/{label}" if self.per_task else label

    def rows(self, task: str) -> list[int]:
        """The rows of a task's own labels, in its order; all rows for a task that is not known."""
        if task not in self.tasks:
            return list(self.ids.values())
        return [self.ids[self.key(task, label)] for label in self.tasks[task]]

    def options(self, task: str, labels: Sequence[str]) -> list[str]:
        """What a row of the task is answered from: its labels, and of a head that all tasks share all others, too.

        Where labels are text, and where each task has its own head, there are no others.
        """
        own = [self.key(task, label) for label in labels]
        return own if self.per_task else [*own, *(label for label in self.ids if label not in labels)]


def write_labels(labels: Sequence[str]) -> str:
    """Any number of labels as one answer, sorted."""
    return json.dumps(sorted(set(labels)), ensure_ascii=False)


def read_labels(answer: str) -> tuple[str, ...]:
    """What `write_labels` was given.

    Raises:
        ValueError: it is no JSON list of texts.
    """
    try:
        value: Any = json.loads(answer)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, list) or not all(isinstance(label, str) for label in cast("list[Any]", value)):
        raise ValueError(f"expected a JSON list of labels, got {answer!r:.60}")
    return tuple(cast("list[str]", value))
