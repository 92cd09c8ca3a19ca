"""A task from its files: what is trained, what is scored, by which metric, over which labels."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from retain.data.formats import FORMATS, columns_not_used, detect_format, rename_columns, to_examples
from retain.data.labelled import SEVERAL, labels_of_row
from retain.data.readers import Row, read_rows
from retain.errors import ConfigError, DataError
from retain.types import Example, Message, Task

__all__ = ["LoadedTask", "TaskConfig", "choose_metric", "load_task", "prompt_key"]

_LEAST_TEST_ROWS = 20  # held out of a training file where it is long enough
_MANY_LABELS = 100  # more distinct answers than this are no label set


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What one task is.

    Args:
        name: unique within a lineage.
        train: the training rows: a file, a folder of `datasets.save_to_disk`, or the id of a hub data set.
        test: rows to score; where not given, some of the training rows are held out for it.
        validation: rows to evaluate on during training.
        format: a name in `data.formats.FORMATS`; `auto` tells it by the columns.
        columns: {our column: the file's column}, where the names differ.
        where: only rows with these values: {column: value}.
        metric: how answers are scored; `auto` chooses by what the answers look like.
        choices: the label set of a classification; where not given, the labels of the training rows.
        max_new_tokens: how long a generated answer may become.
        max_train_rows: train on a seeded sample of this size.
        max_test_rows: score a seeded sample of this size; validation rows likewise.
        test_fraction: the share of the training rows that is held out where `test` is not given; 0 scores nothing.
    """

    name: str
    train: str
    test: str | None = None
    validation: str | None = None
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    where: Mapping[str, str] = field(default_factory=dict[str, str])
    metric: str = "auto"
    choices: tuple[str, ...] | None = None
    max_new_tokens: int = 64
    max_train_rows: int | None = None
    max_test_rows: int | None = None
    test_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not self.name or any(sign in self.name for sign in "/\\\0"):
            raise ValueError(f"name: expected a name that can be a folder's, got {self.name!r}")
        if self.format != "auto" and self.format not in FORMATS:
            raise ValueError(f"format: expected auto, {', '.join(FORMATS)}, got {self.format!r}")
        if self.choices is not None and len(set(self.choices)) < max(2, len(self.choices)):
            raise ValueError(f"choices: expected two or more different labels, got {list(self.choices)}")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction: expected a share from 0 to below 1, got {self.test_fraction}")
        counts = {
            "max_new_tokens": self.max_new_tokens,
            "max_train_rows": self.max_train_rows,
            "max_test_rows": self.max_test_rows,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name}: expected a whole number above 0, got {count}")


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task, and what was decided on the way.

    Args:
        task: the task.
        format: the training rows' format.
        notes: what was detected, held out, dropped or ignored, one sentence each.
        sample: the first training row.
    """

    task: Task
    format: str
    notes: tuple[str, ...]
    sample: Example


def load_task(config: TaskConfig, *, root: Path | None = None, seed: int = 0) -> LoadedTask:
    """Read a task's files.

    Args:
        config: the task.
        root: the folder that relative paths start from; the working directory where not given.
        seed: of the samples and of the rows held out.

    Raises:
        DataError, ConfigError: a file, row or setting is wrong.
    """
    notes: list[str] = []
    rows, format = _read(config, config.train, root)
    notes.append(f"{config.train}: {len(rows)} rows of {format}")
    if unused := columns_not_used(rows, format):
        notes.append(f"columns that are not used: {', '.join(unused)}")
    if config.choices and format == "text":
        raise ConfigError(
            f"task {config.name!r}: raw text has no labels to choose from",
            hint="leave `choices` out, or map the columns to `text` and `label`",
        )
    train = to_examples(rows, format, task=config.name, choices=config.choices or (), where=config.train)
    labelled = format in ("text_label", "sentence_pair", *SEVERAL)
    choices = config.choices or (_labels(train, format) if labelled else ())
    test, validation = (_others(config, source, root, choices) for source in (config.test, config.validation))
    if config.test == config.train:
        notes.append("test and train are the same rows: the score says what is remembered, not what is learned")
    train = _without(train, test if config.test != config.train else [], "test", config, notes)
    train = _without(train, validation, "validation", config, notes)
    if config.test is None and config.test_fraction > 0:
        train, test = _hold_out(train, config, Random(f"{seed}/{config.name}/held out"))
        notes.append(f"no test file: {len(test)} of the training rows are held out for it")
    train = _sample(train, config.max_train_rows, Random(f"{seed}/{config.name}/train"))
    test = _sample(test, config.max_test_rows, Random(f"{seed}/{config.name}/test"))
    validation = _sample(validation, config.max_test_rows, Random(f"{seed}/{config.name}/validation"))
    choices = choices or _shared_choices([*train, *test])
    metric = config.metric
    if metric == "auto":
        metric = SEVERAL.get(format) or choose_metric(test or train, choices)
        notes.append(f"scored by {metric}")
        notes += _label_hint(train, metric, format, config.columns)
    elif metric in ("accuracy", "macro_f1") and not choices and not all(example.choices for example in test or train):
        raise ConfigError(
            f"task {config.name!r}: {metric} needs labels to choose from",
            problems=["neither `choices` nor the rows' own `choices` are given, and the format is not text_label"],
            hint="list them in `choices`, or map the columns to `text` and `label`",
        )
    task = Task(
        name=config.name,
        train=tuple(train),
        test=tuple(test),
        validation=tuple(validation),
        metric=metric,
        choices=choices,
        max_new_tokens=config.max_new_tokens,
    )
    return LoadedTask(task, format, tuple(notes), train[0])


def choose_metric(examples: Sequence[Example], choices: Sequence[str] = ()) -> str:
    """The metric that fits the answers.

    Raw text: `perplexity`. Labels to choose from: `accuracy`. JSON objects or lists: `json_equality`. Nine in ten are
    one line of at most five words: `exact_match`. Else: `rouge_l`.
    """
    if all(not example.messages for example in examples):
        return "perplexity"
    if choices or all(example.choices for example in examples):
        return "accuracy"
    answers = [example.answer.strip() for example in examples]
    if all(_is_json(answer) for answer in answers):
        return "json_equality"
    num_short = sum("\n" not in answer and len(answer.split()) <= 5 for answer in answers)
    return "exact_match" if num_short >= 0.9 * len(answers) else "rouge_l"


def prompt_key(example: Example) -> tuple[tuple[str, str], ...]:
    """What is asked: equal for two rows that ask the same, whatever the answer."""
    asked = example.prompt if example.messages else (Message("text", example.text),)
    return tuple((message.role, message.content) for message in asked)


def _read(config: TaskConfig, source: str, root: Path | None) -> tuple[list[Row], str]:
    """The rows of a source with our column names, and their format."""
    rows = rename_columns(read_rows(source, root=root), config.columns, where=source)
    if config.where:
        rows = [row for row in rows if all(str(row.get(column)) == value for column, value in config.where.items())]
        if not rows:
            raise DataError(
                f"{source}: no row has {', '.join(f'{column} = {value!r}' for column, value in config.where.items())}",
                hint="`where` keeps the rows whose columns have these values",
            )
    return rows, detect_format(rows, where=source) if config.format == "auto" else config.format


def _others(config: TaskConfig, source: str | None, root: Path | None, choices: Sequence[str]) -> list[Example]:
    """The rows of a further file, held to the label set of the training rows."""
    if source is None:
        return []
    rows, format = _read(config, source, root)
    return to_examples(rows, format, task=config.name, choices=choices, where=source)


def _without(
    train: list[Example], held: Sequence[Example], what: str, config: TaskConfig, notes: list[str]
) -> list[Example]:
    """The training rows that ask nothing that the held rows ask."""
    keys = {prompt_key(example) for example in held}
    kept = [example for example in train if prompt_key(example) not in keys]
    if len(kept) == len(train):
        return train
    if not kept:
        raise DataError(
            f"task {config.name!r}: every training row asks what a {what} row asks",
            problems=[f"train: {config.train}", f"{what}: {config.test if what == 'test' else config.validation}"],
            hint="train and test must be different rows; leave `test` out and some are held out",
        )
    notes.append(f"{len(train) - len(kept)} training rows that ask what a {what} row asks were dropped")
    return kept


def _hold_out(train: list[Example], config: TaskConfig, random: Random) -> tuple[list[Example], list[Example]]:
    """Training rows and held-out rows; rows that ask the same stay on one side."""
    keys = list(dict.fromkeys(prompt_key(example) for example in train))
    if len(keys) < 2:
        raise DataError(
            f"task {config.name!r}: {config.train} has too few different rows to hold some out for a test",
            hint="give a `test` file, or set `test_fraction: 0`",
        )
    wanted = max(round(config.test_fraction * len(keys)), min(_LEAST_TEST_ROWS, len(keys) // 2), 1)
    held = set(random.sample(keys, wanted))
    return (
        [example for example in train if prompt_key(example) not in held],
        [example for example in train if prompt_key(example) in held],
    )


def _sample(examples: list[Example], size: int | None, random: Random) -> list[Example]:
    """A sample without replacement, in the rows' order."""
    if size is None or len(examples) <= size:
        return examples
    return [examples[place] for place in sorted(random.sample(range(len(examples)), size))]


def _labels(examples: Sequence[Example], format: str) -> tuple[str, ...]:
    return tuple(sorted({label for example in examples for label in labels_of_row(example.answer, format)}))


def _shared_choices(examples: Sequence[Example]) -> tuple[str, ...]:
    """The rows' own choices, where all rows have the same."""
    sets = {example.choices for example in examples}
    return sets.pop() if len(sets) == 1 else ()


def _label_hint(train: Sequence[Example], metric: str, format: str, columns: Mapping[str, str]) -> list[str]:
    """Answers that look like labels but are scored as text: say how to make them a choice."""
    labels = {example.answer for example in train}
    if metric != "exact_match" or len(labels) > min(_MANY_LABELS, len(train) // 4):
        return []
    way = "list them in `choices`"
    if format == "prompt_completion":
        text, label = columns.get("prompt", "prompt"), columns.get("completion", "completion")
        way = f"set `format: text_label` and `columns: {{text: {text}, label: {label}}}`"
    return [f"the answers take only {len(labels)} values: to score them by likelihood, {way}"]


def _is_json(text: str) -> bool:
    try:
        value: Any = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict | list)
