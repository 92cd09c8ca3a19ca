"""The row formats that are accepted, told apart by their columns, and their rows as examples.

    messages           {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    sharegpt           {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
    alpaca             {"instruction": "...", "input": "...", "output": "..."}
    prompt_completion  {"prompt": "...", "completion": "..."}, as text or as lists of messages
    text_label         {"text": "...", "label": "..."}
    sentence_pair      {"sentence1": "...", "sentence2": "...", "label": "..."}
    text_labels        {"text": "...", "labels": ["...", "..."]}
    tokens_tags        {"tokens": ["...", "..."], "tags": ["...", "..."]}
    text               {"text": "..."} or {"document": "..."}

Any row may also carry `choices` (the labels to choose from), `answer` (the number of the right one; without choices a
further right answer), `references` (further right answers), `weight` and `task`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from retain.data.conversations import (
    RowProblem,
    from_alpaca,
    from_messages,
    from_pair,
    from_sharegpt,
    from_text_label,
)
from retain.data.examples import SHARED_COLUMNS, make_example, name_label
from retain.data.labelled import SEVERAL, check_labels, from_sentence_pair, from_text_labels, from_tokens, labels_of_row
from retain.data.readers import Row
from retain.errors import ConfigError, DataError
from retain.types import Example, Message

__all__ = ["FORMATS", "Format", "columns_not_used", "detect_format", "rename_columns", "to_examples"]

_NUM_SHOWN = 8  # rows that an error names; the rest are counted


@dataclass(frozen=True, slots=True)
class Format:
    """What the rows of a format look like.

    Args:
        about: one line for people.
        required: its columns, each with the names that it goes by.
        optional: further columns that it reads.
        turns: the row's conversation; None where the row is raw text.
    """

    about: str
    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    turns: Callable[[Row], list[Message]] | None = None

    def fits(self, row: Row) -> bool:
        """Does the row have the columns?"""
        return all(any(row.get(name) is not None for name in names) for names in self.required)

    @property
    def columns(self) -> set[str]:
        """All columns that it reads."""
        return {name for names in self.required for name in names} | set(self.optional) | set(SHARED_COLUMNS)


FORMATS: Mapping[str, Format] = {
    "messages": Format("conversations of role and content (OpenAI)", (("messages",),), (), from_messages),
    "sharegpt": Format("conversations of from and value", (("conversations",),), ("system",), from_sharegpt),
    "alpaca": Format(
        "instruction, input and output", (("instruction",), ("output",)), ("input", "system", "history"), from_alpaca
    ),
    "prompt_completion": Format(
        "prompt and completion, as text or messages", (("prompt",), ("completion", "choices")), ("system",), from_pair
    ),
    "text_label": Format("text and its class", (("text",), ("label",)), (), from_text_label),
    "sentence_pair": Format(
        "two texts and their class",
        (("sentence1", "text", "premise"), ("sentence2", "text_pair", "hypothesis"), ("label",)),
        (),
        from_sentence_pair,
    ),
    "text_labels": Format("text and any number of classes", (("text",), ("labels",)), (), from_text_labels),
    "tokens_tags": Format("words and a tag of each", (("tokens",), ("tags", "ner_tags")), (), from_tokens),
    "text": Format("raw text, trained whole", (("text", "document"),)),
}
"""By name, in the order in which they are told apart."""

_KNOWN_AS = {
    "prompt": ("question", "query", "instruction", "input", "source", "user", "src", "en"),
    "completion": ("answer", "response", "output", "target", "summary", "assistant", "chosen", "tgt", "vi"),
    "text": ("sentence", "content", "review", "utterance", "input", "body"),
    "label": ("category", "class", "intent", "sentiment", "topic", "target", "labels"),
    "messages": ("dialogue", "dialog", "chat", "conversation", "turns"),
}
"""Names that other data sets give to our columns, to propose a mapping."""


def rename_columns(rows: Sequence[Row], columns: Mapping[str, str], *, where: str = "the data") -> list[Row]:
    """The rows with `{ours: theirs}` applied: their column becomes ours, in its place.

    Raises:
        ConfigError: a column that no row has.
    """
    if not columns:
        return list(rows)
    found = list(dict.fromkeys(name for row in rows for name in row))
    missing = {ours: theirs for ours, theirs in columns.items() if theirs not in found}
    if missing:
        raise ConfigError(
            f"{where} lacks columns that `columns` maps",
            problems=[
                f"columns.{ours}: no column {theirs!r}{_near(theirs, found)}" for ours, theirs in missing.items()
            ],
            hint=f"the columns are {', '.join(found)}; `columns` reads {{our name: the file's name}}",
        )
    taken = set(columns.values())
    return [
        {name: value for name, value in row.items() if name not in taken and name not in columns}
        | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
        for row in rows
    ]


def detect_format(rows: Sequence[Row], *, where: str = "the data") -> str:
    """The format of the rows, by their columns; all rows must agree.

    Raises:
        DataError: no format fits, two do, or a row differs from the first.
    """
    first = ""
    for number, row in enumerate(rows, 1):
        name = _format_of(row, number, where)
        first = first or name
        if name != first:
            raise DataError(
                f"{where} mixes formats: row 1 is {first}, row {number} is {name}",
                problems=[f"row {n}: columns {', '.join(_present(rows[n - 1]))}" for n in (1, number)],
                hint="put each format into its own file and task, or name one with `format`",
            )
    return first


def to_examples(
    rows: Sequence[Row],
    format: str,
    *,
    task: str = "",
    columns: Mapping[str, str] | None = None,
    choices: Sequence[str] = (),
    where: str = "the data",
) -> list[Example]:
    """The rows as examples, in their order.

    Args:
        rows: of `readers.read_rows`.
        format: a name in `FORMATS`, or `auto`.
        task: the task that they belong to; where not given, the row's own `task`.
        columns: {our column: the file's column}.
        choices: the label set. Every answer must be in it; a label given as a number counts in it, from 0.
        where: what errors call the data.

    Raises:
        DataError: rows that cannot be used, all of them counted.
        ConfigError: an unknown format, or a column that is not there.
    """
    rows = rename_columns(rows, columns or {}, where=where)
    if format == "auto":
        format = detect_format(rows, where=where)
    if format not in FORMATS:
        raise ConfigError(
            f"format: {format!r} is unknown{_near(format, FORMATS)}", problems=[f"allowed: auto, {', '.join(FORMATS)}"]
        )
    if not any(FORMATS[format].fits(row) for row in rows):
        raise _wrong_columns(rows[0], 1, where, format)
    examples: list[Example] = []
    problems: list[str] = []
    for number, row in enumerate(rows, 1):
        try:
            named = name_label(row, choices) if format in ("text_label", "sentence_pair") else row
            label_set = () if format in SEVERAL else tuple(choices)
            example = make_example(named, FORMATS[format].turns, task=task, label_set=label_set)
            if choices and format in SEVERAL:
                check_labels(labels_of_row(example.answer, format), choices)
            examples.append(example)
        except RowProblem as problem:
            problems.append(f"row {number}: {problem}")
    if problems:
        more = len(problems) - _NUM_SHOWN
        raise DataError(
            f"{where}: {len(problems)} of {len(rows)} rows cannot be used as {format}",
            problems=[*problems[:_NUM_SHOWN], *([f"... and {more} more rows"] if more > 0 else [])],
            hint="mend or remove these rows; nothing is left out without your saying so",
        )
    return examples


def columns_not_used(rows: Sequence[Row], format: str) -> list[str]:
    """Columns of the rows that the format does not read, such as `tools`."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name not in FORMATS[format].columns]


def _format_of(row: Row, number: int, where: str) -> str:
    fitting = [name for name, format in FORMATS.items() if format.fits(row)]
    if not fitting:
        raise _wrong_columns(row, number, where)
    if "sentence_pair" in fitting and "text_label" in fitting:
        fitting.remove("text_label")  # a second text makes it a pair
    if "text" in fitting and {"alpaca", "text_label", "sentence_pair", "text_labels"}.intersection(fitting):
        fitting.remove("text")  # Alpaca's own files repeat the row as `text`; a label makes the text a question
    if len(fitting) > 1:
        raise DataError(
            f"{where}: row {number} is both {' and '.join(fitting)}",
            problems=[f"its columns: {', '.join(_present(row))}"],
            hint=f"say which is meant: `format: {fitting[0]}`",
        )
    return fitting[0]


def _wrong_columns(row: Row, number: int, where: str, format: str = "") -> DataError:
    """The error for a row that no format fits: what it has, what is nearest, how to map it."""
    found = _present(row)
    proposals = {name: _proposal(found, FORMATS[name]) for name in ([format] if format else FORMATS)}
    nearest = max(
        proposals, key=lambda name: (len(proposals[name]) / len(FORMATS[name].required), len(proposals[name]))
    )
    mapping = {ours: theirs for ours, theirs in proposals[nearest].items() if ours != theirs}
    wanted = ", ".join(f"`{' or '.join(names)}`" for names in FORMATS[nearest].required)
    complete = len(proposals[nearest]) == len(FORMATS[nearest].required)
    pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in mapping.items())
    return DataError(
        f"{where}: row {number} {'is not ' + format if format else 'fits no format'}",
        problems=[f"columns found: {', '.join(found) or 'none'}", f"nearest: {nearest}, with {wanted}"],
        hint=f"map them: `columns: {{{pairs}}}`"
        if complete and mapping
        else "map your columns with `columns: {our name: the file's name}`",
    )


def _proposal(found: Sequence[str], format: Format) -> dict[str, str]:
    """{our required column: the row's column that is likely meant}, as far as there is one."""
    proposal: dict[str, str] = {}
    for names in format.required:
        exact = [name for name in names if name in found]
        known = [name for name in found if name.lower() in _KNOWN_AS.get(names[0], ())]
        near = get_close_matches(names[0], found, n=1, cutoff=0.7)
        free = [name for name in (*exact, *known, *near) if name not in proposal.values()]
        if free:
            proposal[names[0]] = free[0]
    return proposal


def _present(row: Row) -> list[str]:
    return [name for name, value in row.items() if value is not None]


def _near(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f". Did you mean {near[0]!r}?" if near else "."
