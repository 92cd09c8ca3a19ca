"""What the model is asked, what is taken of it, and how it is mixed in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from torch import nn

from retain.data.rendering import Renderer
from retain.data.written_rows import as_text
from retain.methods.full import Full
from retain.models.decoder import DecoderFamily
from retain.strategies.lamol import LAMOL, request
from retain.task_view import BoundTask
from retain.train_config import TrainConfig
from retain.trainer import train_task
from retain.types import Example, Message, Sampling

MODEL = nn.Identity()


def rows(task: str, num: int = 8, labels: Sequence[str] = ("yes", "no")) -> tuple[Example, ...]:
    return tuple(
        Example(
            id=f"{task} {i}", task=task,
            messages=(Message("user", f"{task} {i}?"), Message("assistant", labels[i % len(labels)])),
        )
        for i in range(num)
    )  # fmt: skip


BASE = tuple(Example(id=f"b{i}", text=f"base {i}", source="generated", task="base") for i in range(3))


@dataclass
class Scripted:
    """A view whose model writes what the test says, of the task that it is asked for."""

    name: str
    examples: Sequence[Example]
    says: Callable[[str, int], str] = lambda task, at: "junk"
    seed: int = 0
    asked: list[tuple[str, int, Sampling]] = field(default_factory=list)
    made: int = 0

    def num_tokens(self, example: Example) -> int:
        return len((example.text or example.messages[-1].content).split("[["))

    def generate(
        self, model: nn.Module, prompts: Sequence[Example], *, max_new_tokens: int, sampling: Sampling
    ) -> list[str]:
        texts: list[str] = []
        for prompt in prompts:
            [question] = prompt.prompt
            task = question.content.split("'")[1]
            self.asked.append((task, max_new_tokens, sampling))
            texts.append(self.says(task, self.made))
            self.made += 1
        return texts


def one_more(task: str, at: int) -> str:
    """A new row of the task."""
    return f"[[user]]{task} new {at}?[[assistant]]yes[[end]]"


def learned(*tasks: str, base: bool = False, **options: Any) -> LAMOL:
    strategy = LAMOL(**options)
    if base:
        strategy.after_task(MODEL, Scripted("base", BASE))
    for task in tasks:
        strategy.after_task(MODEL, Scripted(task, rows(task)))
    return strategy


def test_each_row_is_learned_twice() -> None:
    task = Scripted("desk", rows("desk"))
    strategy = LAMOL(generation_weight=0.25)
    strategy.before_task(MODEL, task)
    plain, texts = strategy.mix_examples(task, 0)[:8], strategy.mix_examples(task, 0)[8:]
    assert tuple(plain) == task.examples
    for row, text in zip(task.examples, texts, strict=True):
        assert (text.weight, text.answer) == (0.25, as_text(row))
        assert text.prompt == request("desk", "").prompt
    assert strategy.steps_factor == 2.0
    assert len({row.id for row in (*plain, *texts)}) == 16


def test_a_rows_own_weight_counts_in_its_text() -> None:
    task = Scripted("desk", [replace(rows("desk")[0], weight=2.0)])
    assert [row.weight for row in LAMOL(generation_weight=0.25).mix_examples(task, 0)] == [2.0, 0.5]


@pytest.mark.parametrize(("gamma", "num", "wanted"), [(0.2, 8, 2), (0.05, 8, 1), (1.0, 8, 8), (0.5, 7, 4)])
def test_the_quota_is_gamma_of_the_new_rows_split_equally(gamma: float, num: int, wanted: int) -> None:
    strategy = learned("a", "b", gamma=gamma)
    task = Scripted("new", rows("new", num), one_more)
    strategy.before_task(MODEL, task)
    assert len(strategy.pseudo) == wanted  # rounded up
    counts = [sum(row.task == name for row in strategy.pseudo) for name in ("a", "b")]
    assert sum(counts) == wanted
    assert 0 <= counts[0] - counts[1] <= 1
    assert all(row.source == "generated" for row in strategy.pseudo)
    mixed = strategy.mix_examples(task, 0)
    assert len(mixed) == 2 * (num + wanted)
    assert strategy.steps_factor == len(mixed) / num
    assert mixed == strategy.mix_examples(task, 1)


def test_old_rows_are_written_as_texts_of_their_own_task() -> None:
    strategy = learned("a", gamma=0.5)
    task = Scripted("new", rows("new"), one_more)
    strategy.before_task(MODEL, task)
    texts = strategy.mix_examples(task, 0)[8 + 4 + 8 :]
    assert [text.answer for text in texts] == [as_text(row) for row in strategy.pseudo]
    assert {text.prompt[0].content for text in texts} == {"Write an example of the task 'a'."}


def test_what_is_no_row_is_asked_for_again() -> None:
    says = ["junk", "[[user]]q[[assistant]]maybe[[end]]", "[[user]]q[[assistant]]yes[[end]]", "[[user]]cut"]
    script = [*says, "[[user]]q[[assistant]]yes[[end]]", "[[user]]r[[assistant]]no[[end]]"]
    strategy = learned("a", gamma=0.5)  # 4 rows
    task = Scripted("new", rows("new"), lambda _, at: script[at] if at < len(script) else one_more("a", at))
    strategy.before_task(MODEL, task)
    assert [row.messages[0].content for row in strategy.pseudo] == ["q", "r", "a new 6?", "a new 7?"]
    assert len(strategy.pseudo) == 4
    [note] = strategy.notes
    assert "4 rows wanted, 8 written, 4 kept" in note
    for reason in ("1 not a row", "1 a label that the task does not have", "1 cut off", "1 a repeat"):
        assert reason in note


def test_a_shortfall_is_told() -> None:
    strategy = learned("a", "b", gamma=1.0, max_rounds=3)
    task = Scripted("new", rows("new"), lambda name, at: one_more(name, at) if name == "a" else "junk")
    strategy.before_task(MODEL, task)
    assert strategy.notes == (
        "lamol: of a 4 rows wanted, 4 written, 4 kept",
        "lamol: of b 4 rows wanted, 12 written, 0 kept (4 short); dropped: 12 not a row",
    )


def test_the_model_is_asked_by_the_papers_sampling_and_other_seeds_each_time() -> None:
    strategy = learned("a", "b", gamma=1.0, max_rounds=2)
    task = Scripted("new", rows("new"))
    strategy.before_task(MODEL, task)
    assert {(sampling.temperature, sampling.top_k) for _, _, sampling in task.asked} == {(1.0, 20)}
    assert len({sampling.seed for _, _, sampling in task.asked}) == 4, "two tasks, two rounds"
    assert {length for _, length, _ in task.asked} == {4}, "as long as the longest row that was seen"


def test_the_new_task_is_not_asked_for() -> None:
    strategy = learned("a")
    task = Scripted("new", rows("new"), one_more)
    strategy.before_task(MODEL, task)
    assert {name for name, _, _ in task.asked} == {"a"}


def test_no_row_of_an_old_task_is_kept() -> None:
    state = learned("a", "b").state_dict()
    assert state["pseudo"] == state["base"] == []
    assert "a 0?" not in repr(state)


def test_the_bases_rows_have_a_tasks_share_and_stay_as_they_are() -> None:
    strategy = learned("a", base=True, gamma=0.5)
    task = Scripted("new", rows("new"), one_more)
    strategy.before_task(MODEL, task)
    of_base = [row for row in strategy.pseudo if row.task == "base"]
    assert len(of_base) == 2
    assert set(of_base) <= set(BASE)
    assert strategy.notes[0] == "lamol: of base 2 rows wanted, 2 written, 2 kept"
    mixed = strategy.mix_examples(task, 0)
    assert len(mixed) == 8 + 4 + 8 + 2, "they are not written as texts"
    assert {name for name, _, _ in task.asked} == {"a"}


def test_fewer_rows_of_the_base_than_its_share_are_told() -> None:
    strategy = learned(base=True, gamma=1.0)
    strategy.before_task(MODEL, Scripted("new", rows("new")))
    assert len(strategy.pseudo) == 3
    assert strategy.notes == ("lamol: of base 8 rows wanted, 3 written, 3 kept (5 short)",)


def test_without_generation_weight_and_gamma_it_is_sequential() -> None:
    strategy = learned("a", base=True, gamma=0.0, generation_weight=0.0)
    task = Scripted("new", rows("new"), one_more)
    strategy.before_task(MODEL, task)
    assert tuple(strategy.mix_examples(task, 0)) == task.examples
    assert (strategy.steps_factor, strategy.notes, task.asked) == (1.0, (), [])


def test_rows_that_another_strategy_replays_are_not_texts_of_this_task() -> None:
    task = Scripted("new", [*rows("new", 2), replace(rows("a")[0], source="replay")])
    assert len(LAMOL().mix_examples(task, 0)) == 3 + 2


def test_goes_on_from_its_state() -> None:
    strategy, other = learned("a", base=True, gamma=1.0), LAMOL(gamma=1.0)
    task = Scripted("new", rows("new"), one_more)
    strategy.before_task(MODEL, task)
    other.restore(MODEL, strategy.state_dict())
    assert other.mix_examples(task, 0) == strategy.mix_examples(task, 0)
    assert other.state_dict() == strategy.state_dict()
    assert other.notes == strategy.notes


def test_a_small_model_learns_to_write_rows_of_its_task(llama: nn.Module, tokenizer: Any) -> None:
    """The whole way: texts are trained, asked for, and read back, with the task's labels."""
    colours = {"red fox": "red", "green dog": "green", "the lazy fox": "red", "brown dog": "green"}
    task = [
        Example(id=f"{i}", messages=(Message("user", q), Message("assistant", a)), task="colour")
        for i, (q, a) in enumerate([*colours.items()] * 2)
    ]
    view = BoundTask(
        name="colour", examples=task, family=DecoderFamily(), renderer=Renderer(tokenizer), method=Full(),
        max_length=128, max_tokens=10_000, packed=True, precision="fp32",
    )  # fmt: skip
    strategy = LAMOL(gamma=0.5, generation_weight=1.0, top_k=2)
    config = TrainConfig(learning_rate=1e-2, max_steps=40, per_device_train_batch_size=16, precision="fp32")
    train_task(llama, view, strategy=strategy, config=config)
    strategy.after_task(llama, view)
    strategy.before_task(llama, replace(view, name="next", examples=rows("next", 4)))
    right = [colours.get(row.messages[0].content) == row.answer for row in strategy.pseudo]
    assert len(right) == 2
    assert all(right)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gamma": -0.1}, "gamma: expected a number of 0 or more, got -0.1"),
        ({"generation_weight": float("inf")}, "generation_weight: "),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"top_k": -1}, "top_k: "),
        ({"max_rounds": 0}, "max_rounds: "),
    ],
)
def test_settings_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LAMOL(**options)
