import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from retain.data.tasks import TaskConfig, load_task
from retain.demo_tasks import DEMO_TASKS, write_demo_tasks
from retain.evaluation import METRICS


def made(name: str, num: int = 300) -> list[dict[str, Any]]:
    make, _ = DEMO_TASKS[name]
    generator = random.Random(1)
    return [dict(make(generator)) for _ in range(num)]


def read(path: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(str(path)).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", DEMO_TASKS)
def test_the_answer_is_decided_by_the_prompt(name: str) -> None:
    answers: dict[str, str] = {}
    for row in made(name, 3000):
        assert answers.setdefault(row["prompt"], row["completion"]) == row["completion"]


def test_the_metrics_exist_and_the_tasks_are_three() -> None:
    assert len(DEMO_TASKS) == 3
    assert all(metric in METRICS for _, metric in DEMO_TASKS.values())


def test_a_stamp_says_the_date() -> None:
    for row in made("stamp"):
        day, month, year = re.search(r"(\d+)\W+(\w{3})\w*\W+(?:\d\d)?(\d\d)", row["completion"] + "|").groups()  # type: ignore[union-attr]
        assert re.search(rf"\b{day}\b", row["prompt"])
        assert month.lower() in row["prompt"].lower()
        assert row["prompt"].rstrip(".").endswith(year) or year in row["prompt"]


def test_labels_are_few_even_and_in_two_languages() -> None:
    rows = made("desk", 2000)
    labels = {row["completion"] for row in rows}
    assert 3 <= len(labels) <= 8
    for row in rows:
        assert set(row["choices"]) == labels
    share = {label: sum(row["completion"] == label for row in rows) / len(rows) for label in labels}
    assert all(abs(value - 1 / len(labels)) < 0.06 for value in share.values())
    vietnamese = sum(bool(re.search("[ăâđêôơưạảấầậắặẹẻếềệịọỏốồộớờợụủứừựỳ]", row["prompt"])) for row in rows) / len(rows)
    assert 0.2 < vietnamese < 0.8
    prompts = " ".join(row["prompt"].lower() for row in rows)
    assert not any(re.search(rf"\b{label}\b", prompts) for label in labels), "a label would give itself away"


def test_files_are_whole_apart_and_from_the_seed(tmp_path: Path) -> None:
    entries = write_demo_tasks(tmp_path / "one", num_train=40, num_test=9, seed=4)
    again = write_demo_tasks(tmp_path / "two", num_train=40, num_test=9, seed=4)
    other = write_demo_tasks(tmp_path / "three", num_train=40, num_test=9, seed=5)
    assert [entry["name"] for entry in entries] == list(DEMO_TASKS)
    for entry, same, different in zip(entries, again, other, strict=True):
        train, test = read(entry["train"]), read(entry["test"])
        assert (len(train), len(test)) == (40, 9)
        prompts = [row["prompt"] for row in [*train, *test]]
        assert len(set(prompts)) == 49
        assert read(same["train"]) == train
        assert read(different["train"]) != train


def test_the_project_reads_its_own_files(tmp_path: Path) -> None:
    for entry in write_demo_tasks(tmp_path, num_train=20, num_test=5):
        loaded = load_task(TaskConfig(**entry))  # type: ignore[arg-type]
        assert len(loaded.task.train) == 20
        assert len(loaded.task.test) == 5
        assert loaded.task.metric == entry["metric"]
