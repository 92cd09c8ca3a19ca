"""The mixture against its ratio, and what comes of a memory in it."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from retain.data.memory import Reservoir
from retain.strategies.replay import Replay
from retain.types import Example

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
    assert {example.source for example in strategy.memory.rows} == {"generated"}


def test_new_rows_enter_the_memory_only_after_their_task(text_task: Task) -> None:
    old, new = text_task("old", [5] * 30), text_task("new", [5] * 30)
    new.tokens.update(old.tokens)
    strategy = filled([old])
    before = strategy.state_dict()
    strategy.mix_examples(new, 0)
    assert strategy.state_dict() == before
    strategy.after_task(MODEL, new)
    assert any(example.task == "new" for example in strategy.memory.rows)


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


@pytest.mark.parametrize("selection", ["herding", "kmeans"])
def test_rows_are_chosen_by_where_the_model_puts_them(toy_task: Task, selection: Any) -> None:
    task = toy_task(num=30)
    model = nn.Linear(3, 4).double()
    memory = Reservoir(6, selection=selection)
    memory.offer(task.examples, seed=0, embed=lambda rows: torch.stack([task.inputs[row.id][0] for row in rows]))
    nn.init.eye_(model.weight)  # the embedding is the row itself
    nn.init.zeros_(model.bias)
    strategy = Replay(capacity=6, selection=selection)
    strategy.after_task(model, task)
    assert strategy.memory.rows == memory.rows


@pytest.mark.parametrize("options", [{"capacity": 0}, {"capacity_bytes": 0}, {"ratio": -0.1}, {"ratio": 1.0}])
def test_refuses_settings_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
        Replay(**options)
