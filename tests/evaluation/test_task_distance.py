import json
import time

import numpy as np
import pytest

from retain.evaluation.task_distance import task_distances
from retain.types import Example, Message

SUBJECTS = {"home": ["the cat", "my aunt", "a neighbour", "the baker"], "sea": ["the crew", "a whale", "the captain"]}
VERBS = {"home": ["feeds", "washes", "hides"], "sea": ["hauls", "steers", "salutes"]}
OBJECTS = {"home": ["the spoons", "two hens", "a warm loaf"], "sea": ["the anchor", "a broken mast", "the old buoy"]}


def prose(world: str, num: int, seed: int) -> list[Example]:
    generator = np.random.default_rng(seed)
    draw = lambda words: words[generator.integers(len(words))]  # noqa: E731
    return [
        Example(
            id=f"{world}{seed}{i}", text=f"{draw(SUBJECTS[world])} {draw(VERBS[world])} {draw(OBJECTS[world])} {i % 9}"
        )
        for i in range(num)
    ]


def digits(num: int, seed: int) -> list[Example]:
    generator = np.random.default_rng(seed)
    return [
        Example(id=str(i), messages=(Message("user", f"{a}+{b}"), Message("assistant", str(a + b))))
        for i, (a, b) in enumerate(generator.integers(0, 999, (num, 2)).tolist())
    ]


def test_distances_are_in_the_order_that_a_reader_expects():
    tasks = {
        "home": prose("home", 80, 0),
        "more": prose("home", 80, 1),
        "sea": prose("sea", 80, 2),
        "sums": digits(80, 3),
    }
    found = {(d.first, d.second): d.nats for d in task_distances(tasks)}
    assert list(found) == [
        ("home", "more"), ("home", "sea"), ("home", "sums"), ("more", "sea"), ("more", "sums"), ("sea", "sums")
    ]  # fmt: skip
    same, other, far = found["home", "more"], found["home", "sea"], found["home", "sums"]
    assert abs(same.mean) < 0.1
    assert same.high < other.low
    assert other.high < far.low
    assert other.low <= other.mean <= other.high


def test_it_is_symmetric_and_knows_neither_names_nor_the_order_of_rows():
    one, other = prose("home", 60, 0), prose("sea", 90, 1)
    [first] = task_distances({"a": one, "b": other})
    [second] = task_distances({"x": other[::-1], "y": one})
    assert first.nats.mean == pytest.approx(second.nats.mean, abs=1e-12)
    assert first.nats.num == second.nats.num
    assert task_distances({"a": one, "b": other}, seed=1)[0].nats.mean != first.nats.mean


def test_known_pairs_and_tiny_tasks_are_left_out():
    tasks = {"a": prose("home", 20, 0), "b": prose("sea", 20, 1), "c": digits(20, 2), "tiny": prose("sea", 3, 3)}
    found = task_distances(tasks, known={frozenset({"b", "a"})})
    assert [(d.first, d.second) for d in found] == [("a", "c"), ("b", "c")]
    assert task_distances({"a": tasks["a"]}) == []


def test_as_provenance_holds_it():
    [distance] = task_distances({"a": prose("home", 20, 0), "b": prose("sea", 20, 1)})
    told = json.loads(json.dumps(distance.as_dict()))
    assert told["tasks"] == ["a", "b"]
    assert told["low"] <= told["nats"] <= told["high"]
    assert str(distance).startswith("a and b are ")


def test_ten_thousand_rows_take_seconds():
    tasks = {"a": prose("home", 5000, 0), "b": digits(5000, 1)}
    started = time.process_time()
    task_distances(tasks)
    assert time.process_time() - started < 5
