"""What training will see of a file, counted before anything is trained."""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retain.data.formats import columns_not_used, detect_format, rename_columns, to_examples
from retain.data.labelled import SEVERAL
from retain.data.readers import read_rows
from retain.data.rendering import Renderer
from retain.data.tasks import choose_metric, prompt_key
from retain.types import IGNORED, Encoded, Example, Task

__all__ = ["DataReport", "Lengths", "check_data", "preview"]

_NUM_SAMPLES = 3
_MANY_LABELS = 100  # more distinct answers than this are no labels


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens a row: how they are spread."""

    least: int
    median: int
    most_of_95_percent: int
    most: int
    total: int

    def __str__(self) -> str:
        return (
            f"median {self.median}, 95% up to {self.most_of_95_percent}, "
            f"from {self.least} to {self.most}; {self.total} in all"
        )


@dataclass(frozen=True, slots=True)
class DataReport:
    """The counts of a file, as a model's tokenizer and template make them.

    Args:
        source: the file.
        format: of its rows.
        rows: how many.
        learned: the examples that they are learned as; more, where a family learns each answer of a conversation apart.
        columns_not_used: columns that nothing reads.
        prompt_tokens: tokens an example that are only read.
        completion_tokens: targets an example: its trained tokens, or classes.
        max_length: tokens that a row may have.
        over_length: examples that are longer: an error, dropped, truncated or split, as `on_overflow` says.
        tokens_over: tokens of those beyond `max_length`.
        targets_over: the share of all trained tokens that truncation would lose, 0 to 1.
        masked: examples of which no token is trained.
        masked_if_truncated: further examples of which truncation would leave no trained token.
        duplicates: rows that repeat an earlier one.
        near_duplicates: further rows that repeat one but for case, punctuation and spacing.
        test_rows: rows of the test file; 0 where none was given.
        overlap: rows that ask what a test row asks; training leaves them out.
        labels: how often each answer occurs, where there are few enough to be labels.
        notes: what the renderer had to adapt.
        samples: the first three examples, as the model sees them.
    """

    source: str
    format: str
    rows: int
    learned: int
    columns_not_used: tuple[str, ...]
    prompt_tokens: Lengths
    completion_tokens: Lengths
    max_length: int
    over_length: int
    tokens_over: int
    targets_over: float
    masked: int
    masked_if_truncated: int
    duplicates: int
    near_duplicates: int
    test_rows: int
    overlap: int
    labels: Mapping[str, int]
    notes: tuple[str, ...]
    samples: tuple[Encoded, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it as what JSON can hold."""
        return asdict(self)

    def lines(self) -> Iterator[tuple[str, str]]:
        """(name, value) of every count, for people."""
        yield "format", self.format
        learned = f", learned as {self.learned} examples" if self.learned != self.rows else ""
        yield "rows", f"{self.rows}{learned}"
        if self.columns_not_used:
            yield "columns not used", ", ".join(self.columns_not_used)
        yield "prompt tokens", str(self.prompt_tokens)
        yield "trained tokens", str(self.completion_tokens)
        over = f"{self.over_length} ({self.over_length / self.learned:.1%})"
        if self.over_length:
            over += f"; truncating them would lose {self.targets_over:.1%} of the trained tokens"
        yield f"longer than {self.max_length}", over
        masked = str(self.masked)
        if self.masked_if_truncated:
            masked += f", and {self.masked_if_truncated} more if truncated"
        yield "nothing trained", masked
        yield "duplicates", f"{self.duplicates} exact, {self.near_duplicates} but for case, punctuation and spacing"
        if self.test_rows:
            yield "overlap with test", f"{self.overlap} rows ask what one of the {self.test_rows} test rows asks"
        if self.labels:
            counted = [f"{label} {count}" for label, count in list(self.labels.items())[:12]]
            more = f", ... ({len(self.labels)} in all)" if len(self.labels) > 12 else ""
            yield "labels", ", ".join(counted) + more
        for note in self.notes:
            yield "note", note


def check_data(
    path: str,
    *,
    renderer: Renderer,
    encode: Callable[[Task], Sequence[Encoded]],
    vary: Callable[[Encoded], Encoded] = lambda row: row,
    max_length: int,
    test: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    root: Path | None = None,
) -> DataReport:
    """Read, convert and encode all rows of a file, and count.

    Args:
        path: of `readers.read_rows`.
        renderer: with the model's tokenizer and template.
        encode: the family's encoding of a task's training rows.
        vary: what the family draws at random for an encoded row.
        max_length: tokens that a row may have.
        test: the test rows, to look for overlap.
        format, columns: as in a task's configuration.
        root: the folder that relative paths start from.

    Raises:
        DataError: the file, or a row of it, cannot be used.
    """
    rows = rename_columns(read_rows(path, root=root), columns or {}, where=path)
    name = detect_format(rows, where=path) if format == "auto" else format
    task = Path(path).stem
    examples = to_examples(rows, name, task=task, where=path)
    held: list[Example] = []
    if test is not None:
        held = to_examples(read_rows(test, root=root), format, columns=columns, where=test)
    asked = {prompt_key(example) for example in held}
    encoded = encode(Task(task, tuple(examples), metric=SEVERAL.get(name) or choose_metric(examples)))
    seen = [vary(row) for row in encoded]
    targets = [row.num_targets for row in encoded]
    kept = [sum(target != IGNORED for target in row.targets[:max_length]) for row in encoded]
    over = [max(0, max(map(len, row.inputs.values())) - max_length) for row in encoded]
    distinct = len({example.id for example in examples})
    return DataReport(
        source=path,
        format=name,
        rows=len(rows),
        learned=len(encoded),
        columns_not_used=tuple(columns_not_used(rows, name)),
        prompt_tokens=_lengths([_num_read(row) for row in seen]),
        completion_tokens=_lengths([row.num_targets for row in seen]),
        max_length=max_length,
        over_length=sum(excess > 0 for excess in over),
        tokens_over=sum(over),
        targets_over=1 - sum(kept) / max(sum(targets), 1),
        masked=sum(count == 0 for count in targets),
        masked_if_truncated=sum(count > 0 and left == 0 for count, left in zip(targets, kept, strict=True)),
        duplicates=len(examples) - distinct,
        near_duplicates=distinct - len({_loosely(example) for example in examples}),
        test_rows=len(held),
        overlap=sum(prompt_key(example) in asked for example in examples),
        labels=_labels(examples),
        notes=renderer.notes,
        samples=tuple(seen[:_NUM_SAMPLES]),
    )


def preview(encoded: Encoded, renderer: Renderer) -> list[tuple[str, bool]]:
    """A row's text in pieces, each with whether it is trained.

    Where the targets are the inputs shifted by one, the pieces are the row's own text; else its inputs, which are not
    trained, and then its targets. Of a row whose targets are classes that is its answer.
    """
    ids, tokenizer = encoded.inputs["input_ids"], renderer.tokenizer
    if renderer.labels.kind and encoded.example.messages:
        return [(tokenizer.decode(ids), False), (f" {encoded.example.answer}", True)]
    counted = [(place, target) for place, target in enumerate(encoded.targets) if target != IGNORED]
    if len(encoded.targets) == len(ids) and all(
        ids[place + 1 : place + 2] in ([target], []) for place, target in counted
    ):
        trained_places = {place + 1 for place, _ in counted}
        marked = [(token, place in trained_places) for place, token in enumerate(ids)]
        if encoded.targets[-1] != IGNORED:  # a piece of a split text predicts the next piece's first token
            marked.append((encoded.targets[-1], True))
    else:
        marked = [(token, False) for token in ids] + [(target, True) for _, target in counted]
    pieces: list[tuple[list[int], bool]] = []
    for token, trained in marked:
        if pieces and pieces[-1][1] == trained:
            pieces[-1][0].append(token)
        else:
            pieces.append(([token], trained))
    return [(tokenizer.decode(tokens), trained) for tokens, trained in pieces]


def _num_read(row: Encoded) -> int:
    """Tokens that are not trained; targets that are none of these tokens (a class of the whole text) take nothing."""
    of_positions = any(len(ids) == len(row.targets) for ids in row.inputs.values())
    return row.num_tokens - row.num_targets if of_positions else row.num_tokens


def _lengths(counts: Sequence[int]) -> Lengths:
    ordered = sorted(counts)
    return Lengths(
        least=ordered[0],
        median=round(statistics.median(ordered)),
        most_of_95_percent=ordered[-(-len(ordered) * 95 // 100) - 1],
        most=ordered[-1],
        total=sum(ordered),
    )


def _loosely(example: Example) -> str:
    """The row's text without case, punctuation and spacing."""
    text = "\n".join(message.content for message in example.messages) or example.text
    return re.sub(r"[\W_]+", " ", text.casefold()).strip() or text


def _labels(examples: Sequence[Example]) -> dict[str, int]:
    """How often each answer occurs, the most frequent first; empty where the answers are no labels."""
    counts = Counter(example.answer for example in examples if example.messages)
    if len(counts) > min(_MANY_LABELS, len(examples) // 4):
        return {}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
