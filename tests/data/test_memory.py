"""The reservoir against chi-square; the other selections against balance, brute force and the order of offers."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from retain.data.coresets import central, herding
from retain.data.memory import Reservoir, number_of, text_bytes
from retain.types import Example, Message

SELECTIONS = ("reservoir", "balanced", "class", "herding", "kmeans")


def rows_of(task: str, num: int, *, answers: int = 1) -> list[Example]:
    return [
        Example(f"{task} {i}", (Message("user", f"{task} {i}"), Message("assistant", str(i % answers))), task=task)
        for i in range(num)
    ]


def embed(rows: Sequence[Example]) -> Tensor:
    return torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(number_of(5, r.id) >> 2)) for r in rows])


def filled(offers: Sequence[Sequence[Example]], capacity: int = 1000, *, seed: int = 0, **options: Any) -> Reservoir:
    memory = Reservoir(capacity, **options)
    for rows in offers:
        memory.offer(rows, seed=seed, embed=embed)
    return memory


# Every row alike


def test_every_row_is_as_likely_to_stay() -> None:
    """Counts over seeds have the mean and the spread of draws without replacement."""
    num, capacity, runs = 120, 30, 400
    tasks = [rows_of(f"task {k}", num // 4) for k in range(4)]
    counts: Counter[str] = Counter()
    for seed in range(runs):
        counts.update(row.id for row in filled(tasks, capacity, seed=seed).rows)
    expected, share = runs * capacity / num, capacity / num
    statistic = sum((counts[row.id] - expected) ** 2 for rows in tasks for row in rows)
    chi_square = statistic / (runs * share * (1 - share)) * (num - 1) / num
    assert abs(chi_square - (num - 1)) < 4 * (2 * (num - 1)) ** 0.5
    first_half = sum(counts[row.id] for rows in tasks[:2] for row in rows) / counts.total()
    assert first_half == pytest.approx(
        0.5, abs=0.02
    )  # counting the memory instead of the rows seen keeps only late ones


def test_within_a_balanced_task_every_row_is_as_likely_to_stay() -> None:
    tasks = [rows_of("a", 40), rows_of("b", 10)]
    counts: Counter[str] = Counter()
    for seed in range(500):
        counts.update(row.id for row in filled(tasks, 10, seed=seed, selection="balanced").rows)
    for rows, kept in ((tasks[0], 5), (tasks[1], 5)):
        share = kept / len(rows)
        statistic = sum((counts[row.id] - 500 * share) ** 2 for row in rows) / (500 * share * (1 - share))
        chi_square = statistic * (len(rows) - 1) / len(rows)
        assert abs(chi_square - (len(rows) - 1)) < 4 * (2 * (len(rows) - 1)) ** 0.5


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_memory_is_full_or_holds_everything(selection: Any) -> None:
    assert len(filled([rows_of("a", 7)], 10, selection=selection).rows) == 7
    assert len(filled([rows_of("a", 7), rows_of("b", 7)], 10, selection=selection).rows) == 10


def test_a_row_that_is_offered_again_counts_once() -> None:
    a, b = rows_of("a", 40), rows_of("b", 40)
    once = filled([a, b], 20)
    for offers in ([a, a, a, b, a, b], [b, a], [a * 3, b]):
        assert filled(offers, 20).rows == once.rows
    assert len({row.id for row in once.rows}) == 20


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_known_row_stays_as_it_came(selection: Any) -> None:
    a = rows_of("a", 1)
    assert filled([a, [replace(a[0], weight=5.0)]], selection=selection).rows == a


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_seed_is_the_first_offers(selection: Any) -> None:
    a, b = rows_of("a", 40), rows_of("b", 40)
    one, other = filled([a], 9, selection=selection), filled([a], 9, selection=selection)
    one.offer(b, seed=0, embed=embed)
    other.offer(b, seed=7, embed=embed)
    assert one.rows == other.rows
    if selection != "herding":  # which draws nothing
        assert filled([a], 9, seed=7, selection=selection).rows != filled([a], 9, selection=selection).rows


# Limits in bytes


def test_bytes_are_bounded_and_do_not_favour_late_rows() -> None:
    """The same rows stay whether they come at once or one after another."""
    rows = [Example(id=str(i), text="ư" * random.Random(i).randint(1, 40), task="a") for i in range(200)]
    memory = filled([rows], capacity_bytes=1000)
    assert 900 < sum(len(row.text.encode()) for row in memory.rows) <= 1000
    for order in (rows, rows[::-1]):
        assert filled([[row] for row in order], capacity_bytes=1000).rows == memory.rows


def test_no_small_row_slips_in_behind_a_large_one_that_had_to_leave() -> None:
    """Else short rows would be likelier to stay, and late ones."""
    ids = sorted("abc", key=lambda id: number_of(0, id))
    first, large, small = (Example(id, text="x" * size) for id, size in zip(ids, (10, 100, 1), strict=True))
    assert filled([[first, large, small]], capacity_bytes=50).rows == [first]
    assert filled([[row] for row in (first, large, small)], capacity_bytes=50).rows == [first]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_both_limits_hold_for_every_selection(selection: Any) -> None:
    generator = random.Random(0)
    memory = Reservoir(20, 800, selection)
    for task in "abcd":
        rows = [Example(f"{task} {i}", text="x" * generator.randint(1, 90), task=task) for i in range(30)]
        memory.offer(rows, seed=0, embed=embed)
        assert len(memory.rows) <= 20
        assert 600 < sum(map(text_bytes, memory.rows)) <= 800
        if selection != "reservoir":
            counts = Counter(row.task for row in memory.rows).values()
            assert max(counts) - min(counts) <= 1


def test_all_text_of_a_row_counts() -> None:
    row = Example(
        "0", messages=(Message("user", "hỏi"), Message("assistant", "đáp")), choices=("a",), references=("bc",)
    )
    assert text_bytes(row) == len("hỏiđápabc".encode())


# Every task alike


@pytest.mark.parametrize("selection", SELECTIONS[1:])
@pytest.mark.parametrize("capacity", [1, 7, 10, 40])
def test_no_task_has_two_rows_more_than_another_that_has_any_left(selection: Any, capacity: int) -> None:
    sizes = {"base": 6, "a": 50, "b": 17, "c": 3}
    memory = Reservoir(capacity, selection=selection)
    for count, (task, size) in enumerate(sizes.items(), start=1):
        memory.offer(rows_of(task, size), seed=0, embed=embed)
        counts = Counter(row.task for row in memory.rows)
        seen = list(sizes)[:count]
        assert counts.total() == min(capacity, sum(sizes[name] for name in seen))
        unfinished = [name for name in seen if counts[name] < sizes[name]]
        most = max(counts.values())
        assert all(counts[name] >= most - 1 for name in unfinished)


def test_within_a_task_no_answer_has_two_rows_more_than_another() -> None:
    common = rows_of("a", 100, answers=2)
    rare = [Example(f"rare {i}", (*row.prompt, Message("assistant", "rare")), task="a") for i, row in enumerate(common)]
    memory = filled([[*common, *rare[:3]], rows_of("b", 50)], 16, selection="class")
    counts = Counter(row.answer for row in memory.rows if row.task == "a")
    assert counts.total() == 8
    assert sorted(counts.values()) == [2, 3, 3]
    alone = Counter(row.answer for row in filled([[*common, *rare[:2]]], 10, selection="class").rows)
    assert alone == {"rare": 2, "0": 4, "1": 4}  # there are no more rare ones


def test_free_answers_do_not_push_labels_out() -> None:
    """Each free answer is a class of its own, but only within its task."""
    labelled, free = rows_of("labelled", 50, answers=2), rows_of("free", 50, answers=50)
    counts = Counter(row.task for row in filled([labelled, free], 20, selection="class").rows)
    assert counts == {"labelled": 10, "free": 10}


@pytest.mark.parametrize("selection", ["reservoir", "balanced", "class"])
def test_the_order_of_offers_means_nothing(selection: Any) -> None:
    tasks = [rows_of("a", 31, answers=3), rows_of("b", 4), rows_of("c", 17, answers=5), rows_of("d", 9)]
    pieces = [rows[i::2] for rows in tasks for i in range(2)]
    for capacity in (3, 10, 26, 50):
        expected = filled([[row for rows in tasks for row in rows]], capacity, selection=selection).rows
        for order in list(permutations(range(4)))[::5]:
            assert filled([tasks[i] for i in order], capacity, selection=selection).rows == expected
        for seed in range(10):
            shuffled = random.Random(seed).sample(pieces, len(pieces))
            assert filled(shuffled, capacity, selection=selection).rows == expected


# By embedding


def test_herding_keeps_the_first_rows_of_each_tasks_order() -> None:
    a, b = rows_of("a", 20), rows_of("b", 20)
    memory = filled([a], 10, selection="herding")
    by_number = sorted(a, key=lambda row: number_of(0, row.id))
    order = [by_number[i] for i in herding(embed(by_number), 20)]
    assert memory.rows == order[:10]
    memory.offer(b, seed=0, embed=embed)
    assert [row for row in memory.rows if row.task == "a"] == order[:5]


def test_kmeans_keeps_the_rows_nearest_to_the_means() -> None:
    a = rows_of("a", 30)
    by_number = sorted(a, key=lambda row: number_of(0, row.id))
    wanted = [by_number[i] for i in central(embed(by_number), 6, seed=0)]
    assert filled([a], 6, selection="kmeans").rows == wanted
    assert filled([a[::-1]], 6, selection="kmeans").rows == wanted


@pytest.mark.parametrize("selection", ["herding", "kmeans"])
def test_only_the_new_tasks_rows_are_embedded(selection: Any) -> None:
    seen: list[str] = []

    def look(rows: Sequence[Example]) -> Tensor:
        seen.extend(row.task for row in rows)
        return embed(rows)

    memory = Reservoir(10, selection=selection)
    memory.offer(rows_of("a", 20), seed=0, embed=look)
    memory.offer(rows_of("b", 20), seed=0, embed=look)
    assert Counter(seen) == {"a": 20, "b": 20}


# State


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_state_gives_the_same_memory(selection: Any) -> None:
    memory, other = filled([rows_of("a", 90)], 60, selection=selection), Reservoir(60, selection=selection)
    other.restore(memory.state_dict())
    for one in (memory, other):
        one.offer(rows_of("b", 90), seed=3, embed=embed)
    assert other.state_dict() == memory.state_dict()


def test_the_rows_are_those_of_earlier_versions() -> None:
    """A lineage goes on with the memory that it would have had."""
    rows = [Example(id=f"r{i}", task="a") for i in range(20)]
    assert [row.id for row in filled([rows], 5).rows] == ["r0", "r9", "r19", "r16", "r5"]


@pytest.mark.parametrize("options", [{"capacity": 0}, {"capacity": 1, "capacity_bytes": 0}])
def test_refuses_limits_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{list(options)[-1]}: expected"):
        Reservoir(**options)
