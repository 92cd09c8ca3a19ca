import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retain.data.tasks import TaskConfig, choose_metric, load_task, prompt_key
from retain.errors import ConfigError, DataError
from retain.types import Example, Message

Write = Callable[[str, list[dict[str, Any]]], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes rows into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write_rows(name: str, rows: list[dict[str, Any]]) -> str:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return write_rows


def pairs(num: int, *, start: int = 0, answer: str = "yes") -> list[dict[str, Any]]:
    return [{"prompt": f"q{k}", "completion": answer} for k in range(start, start + num)]


def test_a_task_from_two_files(write: Write):
    config = TaskConfig(name="mine", train=write("a.jsonl", pairs(5)), test=write("b.jsonl", pairs(2, start=5)))
    loaded = load_task(config)
    task = loaded.task
    assert [example.prompt[0].content for example in task.train] == ["q0", "q1", "q2", "q3", "q4"]
    assert [example.prompt[0].content for example in task.test] == ["q5", "q6"]
    assert {example.task for example in task.train + task.test} == {"mine"}
    assert (task.name, task.metric, task.choices, task.max_new_tokens) == ("mine", "exact_match", (), 64)
    assert (loaded.format, loaded.sample) == ("prompt_completion", task.train[0])
    assert loaded.notes[0] == "a.jsonl: 5 rows of prompt_completion"
    assert "scored by exact_match" in loaded.notes


def test_paths_start_from_the_root(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write("a.jsonl", pairs(5))
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(DataError, match="does not exist"):
        load_task(TaskConfig(name="a", train="a.jsonl"))
    assert load_task(TaskConfig(name="a", train="a.jsonl"), root=tmp_path).task.train


def test_rows_are_held_out_where_there_is_no_test_file(write: Write):
    rows = pairs(300) + pairs(300, answer="no")  # every question twice: both go to one side
    config = TaskConfig(name="a", train=write("a.jsonl", rows))
    task = load_task(config, seed=3).task
    assert (len(task.train), len(task.test)) == (540, 60)
    assert not {prompt_key(e) for e in task.train} & {prompt_key(e) for e in task.test}
    assert load_task(config, seed=3).task == task
    assert load_task(config, seed=4).task.test != task.test
    assert "no test file: 60 of the training rows are held out for it" in load_task(config).notes


@pytest.mark.parametrize(("num", "held"), [(2, 1), (10, 5), (60, 20), (300, 30)])
def test_at_least_some_rows_are_held_out(write: Write, num: int, held: int):
    assert len(load_task(TaskConfig(name="a", train=write("a.jsonl", pairs(num)))).task.test) == held


def test_no_rows_are_held_out_where_none_are_wanted(write: Write):
    assert load_task(TaskConfig(name="a", train=write("a.jsonl", pairs(1)), test_fraction=0.0)).task.test == ()
    with pytest.raises(DataError, match="too few different rows"):
        load_task(TaskConfig(name="a", train="a.jsonl"))


def test_samples_are_seeded_and_keep_the_order(write: Write):
    config = TaskConfig(
        name="a", train=write("a.jsonl", pairs(100)), test=write("b.jsonl", pairs(50, start=100)),
        validation=write("c.jsonl", pairs(50, start=200)), max_train_rows=10, max_test_rows=5,
    )  # fmt: skip
    task = load_task(config, seed=1).task
    assert (len(task.train), len(task.test), len(task.validation)) == (10, 5, 5)
    numbers = [int(example.prompt[0].content[1:]) for example in task.train]
    assert numbers == sorted(numbers) != list(range(10))
    assert load_task(config, seed=1).task == task
    assert load_task(config, seed=2).task.train != task.train


def test_training_rows_that_a_test_asks_are_dropped(write: Write):
    config = TaskConfig(
        name="a", train=write("a.jsonl", pairs(10)), test=write("b.jsonl", pairs(4, start=8, answer="other")),
        validation=write("c.jsonl", pairs(1)),
    )  # fmt: skip
    loaded = load_task(config)
    assert [example.prompt[0].content for example in loaded.task.train] == [f"q{k}" for k in range(1, 8)]
    assert "2 training rows that ask what a test row asks were dropped" in loaded.notes
    assert "1 training rows that ask what a validation row asks were dropped" in loaded.notes
    write("b.jsonl", pairs(10))
    with pytest.raises(DataError, match="every training row asks what a test row asks"):
        load_task(config)


def test_the_same_file_for_both_is_said_and_done(write: Write):
    loaded = load_task(TaskConfig(name="a", train=write("a.jsonl", pairs(5)), test="a.jsonl"))
    assert (len(loaded.task.train), len(loaded.task.test)) == (5, 5)
    assert any("the same rows" in note for note in loaded.notes)


def test_labels_of_the_training_rows(write: Write):
    train = [{"text": f"q{k}", "label": "no" if k % 2 else "yes"} for k in range(20)]
    config = TaskConfig(
        name="a", train=write("a.jsonl", train), test=write("b.jsonl", [{"text": "q", "label": "no"}]), max_train_rows=1
    )
    task = load_task(config).task
    assert (task.metric, task.choices) == ("accuracy", ("no", "yes"))
    write("b.jsonl", [{"text": "q", "label": "nope"}])
    with pytest.raises(DataError, match=r"b\.jsonl: 1 of 1 rows .*\n.*row 1: label 'nope' is none of the choices"):
        load_task(config)


def test_labels_of_the_recipe(write: Write):
    config = TaskConfig(name="a", train=write("a.jsonl", pairs(30)), choices=("yes", "no"))
    assert (load_task(config).task.choices, load_task(config).task.metric) == (("yes", "no"), "accuracy")
    with pytest.raises(DataError, match="label 'yes' is none of the choices"):
        load_task(TaskConfig(name="a", train="a.jsonl", choices=("yep", "no")))
    numbers = TaskConfig(
        name="a",
        train=write("n.jsonl", [{"text": f"q{k}", "label": k % 2} for k in range(30)]),
        choices=("bad", "good"),
    )
    assert {example.answer for example in load_task(numbers).task.train} == {"bad", "good"}
    with pytest.raises(ConfigError, match="raw text has no labels"):
        load_task(TaskConfig(name="a", train=write("t.jsonl", [{"text": "a"}, {"text": "b"}]), choices=("a", "b")))


def test_choices_of_the_rows(write: Write):
    same = [{**row, "choices": ["yes", "no"]} for row in pairs(30)]
    task = load_task(TaskConfig(name="a", train=write("a.jsonl", same))).task
    assert (task.choices, task.metric) == (("yes", "no"), "accuracy")
    own = [{**row, "choices": ["yes", f"no{k}"]} for k, row in enumerate(pairs(30))]
    task = load_task(TaskConfig(name="a", train=write("a.jsonl", own))).task
    assert (task.choices, task.metric) == ((), "accuracy")


def test_accuracy_needs_labels(write: Write):
    with pytest.raises(ConfigError, match="accuracy needs labels"):
        load_task(TaskConfig(name="a", train=write("a.jsonl", pairs(30)), metric="accuracy"))


def test_answers_that_look_like_labels_are_pointed_out(write: Write):
    rows = [{"question": f"q{k}", "completion": "no" if k % 2 else "yes"} for k in range(60)]
    config = TaskConfig(name="a", train=write("a.jsonl", rows), columns={"prompt": "question"})
    (note,) = [note for note in load_task(config).notes if "take only 2 values" in note]
    assert "`format: text_label` and `columns: {text: question, label: completion}`" in note
    followed = TaskConfig(
        name="a", train="a.jsonl", format="text_label", columns={"text": "question", "label": "completion"}
    )
    assert load_task(followed).task.choices == ("no", "yes")
    rows = [{"prompt": f"q{k}", "completion": f"a{k}"} for k in range(40)]
    assert not any("values" in note for note in load_task(TaskConfig(name="a", train=write("a.jsonl", rows))).notes)


def test_columns_and_where(write: Write):
    rows = [{"question": f"q{k}", "completion": "a", "year": 2000 + k % 2, "task": "old"} for k in range(10)]
    config = TaskConfig(
        name="a",
        train=write("a.jsonl", rows),
        columns={"prompt": "question"},
        where={"year": "2001"},
        test_fraction=0.0,
    )
    loaded = load_task(config)
    assert [example.prompt[0].content for example in loaded.task.train] == ["q1", "q3", "q5", "q7", "q9"]
    assert loaded.task.train[0].task == "a"
    assert "columns that are not used: year" in loaded.notes
    with pytest.raises(DataError, match="no row has year = '2002'"):
        load_task(TaskConfig(name="a", train="a.jsonl", columns={"prompt": "question"}, where={"year": "2002"}))


def answered(*answers: str, choices: tuple[str, ...] = ()) -> list[Example]:
    return [Example(a, (Message("user", "q"), Message("assistant", a)), choices=choices) for a in answers]


@pytest.mark.parametrize(
    ("examples", "metric"),
    [
        ([Example("a", text="t")], "perplexity"),
        (answered("x", "y", choices=("x", "y")), "accuracy"),
        (answered('{"a": 1}', "[2]"), "json_equality"),
        (answered("42", "3.5"), "exact_match"),
        (answered("one two three four five"), "exact_match"),
        (answered("one two three four five six"), "rouge_l"),
        (answered("two\nlines"), "rouge_l"),
        (answered(*"abcdefghi", "a much longer answer than the others are"), "exact_match"),
        (answered(*"abcdefgh", *["a much longer answer than the others are"] * 2), "rouge_l"),
    ],
)
def test_choose_metric(examples: list[Example], metric: str):
    assert choose_metric(examples) == metric


def test_choose_metric_of_a_label_set():
    assert choose_metric(answered("a long answer that is one of two labels"), ("x", "y")) == "accuracy"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"name": "a/b"}, "name: expected"),
        ({"name": ""}, "name: expected"),
        ({"format": "mesages"}, "format: expected auto, messages"),
        ({"choices": ("a", "a")}, "choices: expected two or more"),
        ({"test_fraction": 1.0}, "test_fraction: expected"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number above 0, got 0"),
        ({"max_train_rows": -1}, "max_train_rows: expected"),
        ({"max_test_rows": 0}, "max_test_rows: expected"),
    ],
)
def test_a_wrong_configuration(options: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        TaskConfig(**{"name": "a", "train": "a.jsonl", **options})


def test_prompt_key():
    chat = (Message("user", "q"), Message("assistant", "a"))
    assert prompt_key(Example("1", chat)) == prompt_key(Example("2", (chat[0], Message("assistant", "b"))))
    assert prompt_key(Example("1", chat)) != prompt_key(Example("2", text="q"))
