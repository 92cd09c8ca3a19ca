"""The reservoir against chi-square, and the mixture against its ratio."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from retain.strategies.replay import Replay, left_out, number_of, text_bytes
from retain.types import Example, Message

Task = Callable[..., Any]
MODEL = nn.Identity()


def filled(tasks: Sequence[Any], **options: Any) -> Replay:
    strategy = Replay(**options)
    for task in tasks:
        strategy.after_task(MODEL, task)
    return strategy


def tokens(task: Any, examples: Sequence[Example]) -> int:
    return sum(task.num_tokens(example) for example in examples)


def replayed(examples: Sequence[Example]) -> list[Example]:
    return [example for example in examples if example.source == "replay"]


# The memory


def test_every_row_is_as_likely_to_stay(text_task: Task) -> None:
    """Counts over seeds have the mean and the spread of draws without replacement."""
    num, capacity, runs = 120, 30, 400
    counts: Counter[str] = Counter()
    for seed in range(runs):
        tasks = [text_task(f"task {k}", [1] * (num // 4), seed=seed) for k in range(4)]
        counts.update(example.id for example in filled(tasks, capacity=capacity).memory)
    expected, share = runs * capacity / num, capacity / num
    statistic = sum((counts[f"task {k} {i}"] - expected) ** 2 for k in range(4) for i in range(num // 4))
    chi_square = statistic / (runs * share * (1 - share)) * (num - 1) / num
    assert abs(chi_square - (num - 1)) < 4 * (2 * (num - 1)) ** 0.5
    first_half = sum(counts[f"task {k} {i}"] for k in range(2) for i in range(num // 4)) / counts.total()
    assert first_half == pytest.approx(
        0.5, abs=0.02
    )  # counting the memory instead of the rows seen keeps only late ones


def test_the_memory_is_full_or_holds_everything(text_task: Task) -> None:
    assert len(filled([text_task("a", [1] * 7)], capacity=10).memory) == 7
    assert len(filled([text_task("a", [1] * 7), text_task("b", [1] * 7)], capacity=10).memory) == 10


def test_a_row_that_is_offered_again_counts_once(text_task: Task) -> None:
    a, b = text_task("a", [1] * 40), text_task("b", [1] * 40)
    once = filled([a, b], capacity=20)
    for tasks in ([a, a, a, b, a, b], [b, a], [replace(a, examples=a.examples * 3), b]):
        assert filled(tasks, capacity=20).memory == once.memory
    assert len({example.id for example in once.memory}) == 20


def test_a_known_row_stays_as_it_came(text_task: Task) -> None:
    a = text_task("a", [1])
    changed = replace(a, examples=[replace(a.examples[0], weight=5.0)])
    assert filled([a, changed]).memory == list(a.examples)


def test_the_seed_is_the_first_tasks(text_task: Task) -> None:
    a, b = text_task("a", [1] * 40), text_task("b", [1] * 40)
    assert filled([a, b], capacity=9).memory == filled([a, replace(b, seed=7)], capacity=9).memory
    assert filled([a], capacity=9).memory != filled([replace(a, seed=7)], capacity=9).memory


def test_bytes_are_bounded_and_do_not_favour_late_rows(text_task: Task) -> None:
    """The same rows stay whether they come at once or one after another."""
    rows = [Example(id=str(i), text="ư" * random.Random(i).randint(1, 40), task="a") for i in range(200)]
    together = replace(text_task("a", []), examples=rows)
    strategy = filled([together], capacity_bytes=1000)
    assert 900 < sum(len(example.text.encode()) for example in strategy.memory) <= 1000
    for order in (rows, rows[::-1]):
        assert (
            filled([replace(together, examples=[row]) for row in order], capacity_bytes=1000).memory == strategy.memory
        )


def test_no_small_row_slips_in_behind_a_large_one_that_had_to_leave(text_task: Task) -> None:
    """Else short rows would be likelier to stay, and late ones."""
    ids = sorted("abc", key=lambda id: number_of(0, id))
    first, large, small = (Example(id, text="x" * size) for id, size in zip(ids, (10, 100, 1), strict=True))
    task = text_task("a", [])
    assert filled([replace(task, examples=[first, large, small])], capacity_bytes=50).memory == [first]
    assert filled([replace(task, examples=[row]) for row in (first, large, small)], capacity_bytes=50).memory == [first]


def test_all_text_of_a_row_counts() -> None:
    row = Example(
        "0", messages=(Message("user", "hỏi"), Message("assistant", "đáp")), choices=("a",), references=("bc",)
    )
    assert text_bytes(row) == len("hỏiđápabc".encode())


# The mixture


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("budget", ["add", "replace"])
@pytest.mark.parametrize("balance", ["task", "none"])
def test_the_share_of_old_tokens_is_the_ratio(text_task: Task, ratio: float, budget: Any, balance: Any) -> None:
    sizes = [random.Random(i).randint(3, 30) for i in range(400)]
    a, b, new = text_task("a", sizes), text_task("b", sizes[:150]), text_task("new", sizes)
    new.tokens.update(a.tokens | b.tokens)
    strategy = filled([a, b], ratio=ratio, budget=budget, balance=balance)
    for epoch in range(3):
        mixed = strategy.mix_examples(new, epoch)
        old, total = tokens(new, replayed(mixed)), tokens(new, mixed)
        assert abs(old - ratio * total) <= 60  # half a row on either side
        if budget == "add":
            assert [example for example in mixed if example.source == "task"] == list(new.examples)
        else:
            assert abs(total - tokens(new, new.examples)) <= 30


def test_no_row_comes_twice_before_all_came_once(text_task: Task) -> None:
    old, new = text_task("old", [10] * 20), text_task("new", [10] * 100)
    new.tokens.update(old.tokens)
    few = Counter(example.id for example in replayed(filled([old], ratio=0.1).mix_examples(new, 0)))
    assert few.total() == 11
    assert max(few.values()) == 1
    many = Counter(example.id for example in replayed(filled([old], ratio=0.5).mix_examples(new, 0)))
    assert many.total() == 100
    assert set(many.values()) == {5}  # a small memory repeats, evenly


def test_old_tasks_share_evenly_whatever_their_size(text_task: Task) -> None:
    base, large, new = text_task("base", [10] * 30), text_task("large", [20] * 900), text_task("new", [10] * 270)
    new.tokens.update(base.tokens | large.tokens)
    strategy = filled([base, large], ratio=0.1, capacity=1000)
    drawn = Counter[str]()
    for example in replayed(strategy.mix_examples(new, 0)):
        drawn[example.task] += new.num_tokens(example)
    assert abs(drawn["base"] - drawn["large"]) <= 20
    unbalanced = replayed(replace_option(strategy, balance="none").mix_examples(new, 0))
    assert sum(example.task == "base" for example in unbalanced) <= 3


def replace_option(strategy: Replay, **options: Any) -> Replay:
    other = Replay(**{**vars_of(strategy), **options})
    other.restore(MODEL, strategy.state_dict())
    return other


def vars_of(strategy: Replay) -> dict[str, Any]:
    return {name: getattr(strategy, name) for name in ("capacity", "capacity_bytes", "ratio", "balance", "budget")}


def test_a_task_that_runs_out_leaves_its_share_to_others(text_task: Task) -> None:
    base, large, new = text_task("base", [10] * 5), text_task("large", [10] * 50), text_task("new", [10] * 90)
    new.tokens.update(base.tokens | large.tokens)
    drawn = replayed(filled([base, large], ratio=0.25).mix_examples(new, 0))
    assert Counter(example.task for example in drawn) == {"base": 5, "large": 25}


def test_the_rows_left_out_rotate(text_task: Task) -> None:
    old, new = text_task("old", [10] * 50), text_task("new", [10] * 100)
    new.tokens.update(old.tokens)
    strategy = filled([old], ratio=0.2, budget="replace")
    out: Counter[str] = Counter()
    for epoch in range(5):
        here = {example.id for example in strategy.mix_examples(new, epoch)}
        missing = [example.id for example in new.examples if example.id not in here]
        assert len(missing) == 20
        out.update(missing)
    assert out == Counter({example.id: 1 for example in new.examples})


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_long_rows_are_left_out_as_often_as_short_ones(share: float) -> None:
    sizes = [1] * 500 + [20] * 25
    times = [0] * len(sizes)
    for seed in range(200):
        for index, out in enumerate(left_out(sizes, share=share, epoch=seed, generator=random.Random(seed))):
            times[index] += out
    assert sum(times[:500]) / 500 / 200 == pytest.approx(share, abs=0.02)
    assert sum(times[500:]) / 25 / 200 == pytest.approx(share, abs=0.03)


def test_the_same_call_gives_the_same_rows(text_task: Task) -> None:
    old, new = text_task("old", [10] * 200), text_task("new", [10] * 100)
    new.tokens.update(old.tokens)
    strategy = filled([old], budget="replace")
    state = random.getstate()
    epochs = [strategy.mix_examples(new, epoch) for epoch in range(3)]
    assert [strategy.mix_examples(new, epoch) for epoch in (2, 0, 1)] == [epochs[2], epochs[0], epochs[1]]
    assert epochs[0] != epochs[1] != epochs[2]
    assert random.getstate() == state


def test_old_rows_say_so_and_keep_their_task(text_task: Task) -> None:
    base = text_task("base", [5] * 3)
    base = replace(base, examples=[replace(example, source="generated") for example in base.examples])
    new = text_task("new", [5] * 30)
    new.tokens.update(base.tokens)
    strategy = filled([base])
    mixed = replayed(strategy.mix_examples(new, 0))
    assert mixed
    assert {example.task for example in mixed} == {"base"}
    assert {example.source for example in strategy.memory} == {"generated"}


def test_new_rows_enter_the_memory_only_after_their_task(text_task: Task) -> None:
    old, new = text_task("old", [5] * 30), text_task("new", [5] * 30)
    new.tokens.update(old.tokens)
    strategy = filled([old])
    before = strategy.state_dict()
    strategy.mix_examples(new, 0)
    assert strategy.state_dict() == before
    strategy.after_task(MODEL, new)
    assert any(example.task == "new" for example in strategy.memory)


@pytest.mark.parametrize("options", [{}, {"ratio": 0.0}])
def test_without_memory_or_ratio_nothing_is_mixed(text_task: Task, options: dict[str, Any]) -> None:
    new = text_task("new", [5] * 3)
    strategy = filled([text_task("old", [5])] if options else [], **options)
    assert strategy.mix_examples(new, 0) is new.examples


def test_the_state_gives_the_same_draws(text_task: Task) -> None:
    old, more, new = text_task("old", [10] * 90), text_task("more", [10] * 90), text_task("new", [10] * 100)
    new.tokens.update(old.tokens | more.tokens)
    strategy, other = filled([old], capacity=60), Replay(capacity=60)
    other.restore(MODEL, strategy.state_dict())
    assert other.mix_examples(new, 1) == strategy.mix_examples(new, 1)
    for one in (strategy, other):
        one.after_task(MODEL, more)
    assert other.state_dict() == strategy.state_dict()
    assert other.mix_examples(new, 2) == strategy.mix_examples(new, 2)


@pytest.mark.parametrize("options", [{"capacity": 0}, {"capacity_bytes": 0}, {"ratio": -0.1}, {"ratio": 1.0}])
def test_refuses_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        Replay(**options)
