"""The mixture against joint training's, the frozen copies bit by bit, and who writes and who answers."""

from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain.data.rendering import Renderer
from retain.data.written_rows import as_text
from retain.methods.full import Full
from retain.models.recurrent import RecurrentFamily
from retain.strategies.scholar import Scholar, request
from retain.strategies.strategy import Strategy
from retain.task_view import BoundTask
from retain.train_config import TrainConfig
from retain.trainer import train_helper, train_task
from retain.types import GREEDY, Example, Message, Sampling


def rows(task: str, num: int = 6) -> tuple[Example, ...]:
    return tuple(
        Example(
            id=f"{task} {i}", task=task, messages=(Message("user", f"{task} {i}?"), Message("assistant", f"yes {i}"))
        )
        for i in range(num)
    )


BASE = tuple(Example(id=f"b{i}", text=f"base {i}", source="generated", task="base") for i in range(3))


class Perfect:
    """A generator that has learned its texts by heart: asked for n, it goes through them."""

    def __init__(self) -> None:
        self.texts: list[Example] = []
        self.given = 0


@dataclass
class Scripted:
    """A view whose helper networks learn by heart, and whose solver answers by rule."""

    name: str
    examples: Sequence[Example]
    perfect: Perfect = field(default_factory=Perfect)
    answer: Callable[[str], str] = lambda prompt: "yes " + prompt.split()[1].rstrip("?")
    says: Callable[[int], str] | None = None
    seed: int = 0
    asked: list[Any] = field(default_factory=list)

    def num_tokens(self, example: Example) -> int:
        return len(example.text or example.answer)

    def fit(self, model: nn.Module, examples: Sequence[Example]) -> nn.Module:
        self.perfect.texts = list(examples)
        return model

    def generate(
        self, model: nn.Module, prompts: Sequence[Example], *, max_new_tokens: int, sampling: Sampling
    ) -> list[str]:
        self.asked.append((model, list(prompts), sampling))
        if prompts[0].prompt != request("").prompt:
            return [self.answer(prompt.prompt[0].content) for prompt in prompts]
        texts = self.perfect.texts
        first, self.perfect.given = self.perfect.given, self.perfect.given + len(prompts)
        places = range(first, self.perfect.given)
        return [self.says(at) if self.says else texts[at % len(texts)].answer for at in places]


def learn(strategy: Scholar, *views: Scripted) -> nn.Module:
    model = nn.Linear(2, 2)
    for view in views:
        if view.name != "base":
            strategy.before_task(model, view)
        strategy.after_task(model, view)
    return model


def content(row: Example) -> Any:
    return row.messages, row.text


@pytest.mark.parametrize("num_tasks", [2, 3, 4])
def test_with_a_perfect_generator_the_mixture_is_that_of_joint_training(num_tasks: int) -> None:
    """Every task has 1 / t of the weight, and old rows come back as they were."""
    perfect, strategy = Perfect(), Scholar()
    views = [Scripted(f"task{k}", rows(f"task{k}"), perfect) for k in range(num_tasks)]
    model = learn(strategy, *views[:-1])
    strategy.before_task(model, views[-1])
    mixed = strategy.mix_examples(views[-1], 0)
    weights: Counter[str] = Counter()
    for row in mixed:
        weights[row.messages[0].content.split()[0]] += row.weight
    assert weights == {view.name: 6 for view in views}
    known = {content(row) for view in views for row in view.examples}
    assert {content(row) for row in mixed} == known
    assert strategy.steps_factor == num_tasks


@pytest.mark.parametrize(("share", "num"), [(0.5, 6), (0.75, 2), (0.25, 18), (1.0, 0)])
def test_the_share_of_real_rows(share: float, num: int) -> None:
    perfect, strategy = Perfect(), Scholar(real_share=share)
    first, second = (Scripted(name, rows(name), perfect) for name in ("first", "second"))
    model = learn(strategy, first)
    strategy.before_task(model, second)
    assert len(strategy.rows) == num
    assert sum(row.weight for row in strategy.rows) == pytest.approx(6 * (1 - share) / share)


def test_fewer_rows_than_the_share_needs_count_more() -> None:
    perfect, strategy = Perfect(), Scholar(real_share=0.25, max_rows=6)
    first, second = (Scripted(name, rows(name), perfect) for name in ("first", "second"))
    model = learn(strategy, first)
    strategy.before_task(model, second)
    assert [row.weight for row in strategy.rows] == [3.0] * 6


def test_the_generator_writes_and_the_solver_answers() -> None:
    perfect, strategy = Perfect(), Scholar(top_k=7)
    first = Scripted("first", rows("first"), perfect)
    second = Scripted("second", rows("second"), perfect, answer=lambda prompt: " as the old solver says ")
    model = learn(strategy, first)
    strategy.before_task(model, second)
    (writer, _, drawn), (solver, asked, greedy) = second.asked
    assert writer is strategy.generator
    assert solver is model
    assert (drawn.temperature, drawn.top_k, greedy) == (1.0, 7, GREEDY)
    assert {row.answer for row in strategy.rows} == {"as the old solver says"}
    assert [row.prompt for row in strategy.rows] == [row.prompt for row in asked]
    assert all(row.source == "generated" for row in strategy.rows)


def test_the_generator_learns_the_same_mixture() -> None:
    perfect, strategy = Perfect(), Scholar()
    views = [Scripted(name, rows(name), perfect) for name in ("first", "second")]
    learn(strategy, *views)
    assert Counter(text.answer for text in perfect.texts) == Counter(as_text(row) for v in views for row in v.examples)
    assert strategy.rows == []


def test_the_generator_is_a_network_of_its_own() -> None:
    strategy = Scholar()
    model = learn(strategy, Scripted("first", rows("first")))
    assert strategy.generator is not None
    before = {name: value.clone() for name, value in strategy.state_dict().items() if isinstance(value, Tensor)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert len(before) == 2
    assert all(torch.equal(value, strategy.state_dict()[name]) for name, value in before.items())


def test_a_shortfall_is_told() -> None:
    script = ["junk", "[[user]]first 1?[[assistant]]yes 1[[end]]", "[[user]]first 2?"]
    perfect, strategy = Perfect(), Scholar(max_rounds=1)
    first = Scripted("first", rows("first"), perfect)
    model = learn(strategy, first)
    second = Scripted("second", rows("second"), perfect, says=lambda at: script[at % 3], answer=lambda _: "x")
    strategy.before_task(model, second)
    assert strategy.notes == (
        "scholar: of old tasks 6 rows wanted, 6 written, 2 kept (4 short); dropped: 2 not a row, 2 cut off",
    )
    silent = replace(second, answer=lambda _: " ")
    strategy.before_task(model, silent)
    assert strategy.rows == []
    assert "2 without an answer" in strategy.notes[0]


def test_no_row_of_an_old_task_is_kept() -> None:
    strategy = Scholar()
    learn(strategy, Scripted("first", rows("first")))
    assert "first" not in repr(strategy.state_dict())


def test_the_bases_rows_count_as_one_old_task() -> None:
    perfect, strategy = Perfect(), Scholar()
    views = [Scripted("base", BASE, perfect), *(Scripted(name, rows(name, 8), perfect) for name in ("first", "second"))]
    model = learn(strategy, *views[:2])
    assert not any("base" in text.answer for text in perfect.texts)
    strategy.before_task(model, views[2])
    counts = Counter(row.task for row in strategy.rows)
    assert counts == {"base": 8, "": 8}
    of_base = Counter(row.id for row in strategy.rows if row.task == "base")
    assert set(of_base.values()) == {2, 3}, "all come before any comes again"


def test_goes_on_from_its_state() -> None:
    perfect, strategy, other = Perfect(), Scholar(), Scholar()
    views = [Scripted("base", BASE, perfect), *(Scripted(name, rows(name), perfect) for name in ("first", "second"))]
    model = learn(strategy, *views[:2])
    strategy.before_task(model, views[2])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1  # the solver moves on
    other.restore(model, strategy.state_dict())
    assert other.mix_examples(views[2], 0) == strategy.mix_examples(views[2], 0)
    assert other.generator is not None
    assert strategy.generator is not None
    for one, another in zip(strategy.generator.parameters(), other.generator.parameters(), strict=True):
        assert torch.equal(one, another)
    assert other.notes == strategy.notes


# A recurrent model


COLOURS = ["red fox", "green dog", "blue bird", "brown cat"]


def colours(task: str) -> tuple[Example, ...]:
    return tuple(
        Example(
            id=f"{task} {i}",
            task=task,
            messages=(Message("user", f"{task} {what}"), Message("assistant", what.split()[task == "second"])),
        )
        for i, what in enumerate(COLOURS)
    )


@pytest.fixture(scope="module")
def world() -> Any:
    family = RecurrentFamily(cell="gru", hidden_size=96, vocab_size=400)
    both = [row for name in ("first", "second") for row in colours(name)]
    network, tokenizer = family.create([*both, *(request(as_text(row)) for row in both)] * 3, seed=0)
    config = TrainConfig(learning_rate=1e-2, max_steps=80, precision="fp32", per_device_train_batch_size=8)

    def view(name: str) -> BoundTask:
        return BoundTask(
            name=name, examples=colours(name), family=family, renderer=Renderer(tokenizer), method=Full(),
            max_length=200, max_tokens=10_000, packed=False, precision="fp32",
            learn=partial(train_helper, config=config),
        )  # fmt: skip

    return network, view, config


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_whole_way_on_a_recurrent_model(world: Any) -> None:
    """The first task is plain training; the frozen generator stays bit by bit; old answers survive the second task."""
    network, view, config = world
    strategy, model, plain = Scholar(top_k=3, real_share=0.25, max_rows=8), deepcopy(network), deepcopy(network)
    first, second = view("first"), view("second")
    train_task(model, first, strategy=strategy, config=config)
    train_task(plain, first, strategy=Strategy(), config=config)
    assert torch.equal(weights(model), weights(plain))
    assert strategy.generator is not None
    assert torch.equal(weights(strategy.generator), weights(network)), "the copy of the base model did not move"
    strategy.after_task(model, first)
    assert torch.equal(weights(model), weights(plain)), "the solver is not the generator"
    before = weights(strategy.generator)
    train_task(model, second, strategy=strategy, config=config)
    train_task(plain, second, strategy=Strategy(), config=config)
    assert torch.equal(weights(strategy.generator), before)
    assert strategy.rows
    assert second.mean_loss(model, first.examples) < 0.5 * second.mean_loss(plain, first.examples)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"real_share": 0.0}, "real_share: expected a share in"),
        ({"max_rows": 0}, "max_rows: expected a whole number above 0, got 0"),
        ({"max_rounds": 0}, "max_rounds: "),
        ({"temperature": 0.0}, "temperature: "),
        ({"top_k": -1}, "top_k: "),
    ],
)
def test_settings_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Scholar(**options)
