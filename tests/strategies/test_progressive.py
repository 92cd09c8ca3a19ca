"""Progressive columns: what was learned is bit-identical after any later training, and tasks are told apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retain.errors import CompatibilityError
from retain.parameters import trainable
from retain.strategies.progressive import Progressive, module_name, prompt_text
from retain.types import Example, Message

ToyTask = Any


class Columns(nn.Module):
    """A frozen base and the sum of the active columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(3, 4).double().requires_grad_(False)
        self.columns = nn.ModuleDict({"default": nn.Linear(3, 4).double()})
        self.active: list[str] = ["default"]

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + sum(self.columns[name](x) for name in self.active)


@dataclass
class ToyMethod:
    """Columns that are switched by name."""

    name: str = "toy"
    can_detach: bool = True
    can_extend: bool = True
    read: list[list[str]] = field(default_factory=list)

    def modules(self, model: Any) -> list[str]:
        return list(model.columns)

    def extend(self, model: Any, name: str) -> nn.Module:
        model.requires_grad_(False)
        self.read.append(list(model.active))
        model.columns[name] = nn.Linear(3, 4).double()
        model.active = [*model.active, name]
        return model

    def activate(self, model: Any, names: Sequence[str]) -> nn.Module:
        model.active = list(names)
        return model


@dataclass(frozen=True)
class TextTask:
    """A view whose states and likelihoods are those of a table."""

    name: str
    method: ToyMethod
    examples: tuple[Example, ...] = ()
    seed: int = 0

    def embed(self, model: Any, examples: Sequence[Example]) -> Tensor:
        assert model.active == [], "prototypes are of the base model"
        return torch.tensor([[1.0, 0.0] if "red" in example.text else [0.0, 5.0] for example in examples])

    def loglikelihood(self, model: Any, examples: Sequence[Example]) -> list[float]:
        likes_red = model.active[-1] == "default"
        return [-1.0 if ("red" in example.text) == likes_red else -2.0 for example in examples]


def rows(word: str) -> tuple[Example, ...]:
    return tuple(
        Example(id=f"{word} {i}", messages=(Message("user", f"{word} {i}?"), Message("assistant", "yes")))
        for i in range(4)
    )


def learn(strategy: Progressive, model: nn.Module, task: ToyTask, *, steps: int = 5) -> None:
    strategy.before_task(model, task)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1, weight_decay=0.5)
    for _ in range(steps):
        for batch in task.batches(task.examples):
            optimizer.zero_grad()
            task.loss(task.forward(model, batch), batch).backward()
            optimizer.step()


def test_old_columns_are_bit_identical_and_forgetting_is_zero(toy_task: Callable[..., ToyTask]) -> None:
    model, strategy, x = Columns(), Progressive(infer="likelihood"), torch.randn(5, 3, dtype=torch.float64)
    method = ToyMethod()
    base = model.base(x)
    outputs: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    for number, name in enumerate(["one", "two", "three"]):
        task = toy_task(name, data_seed=number, method=method)
        learn(strategy, model, task)
        strategy.after_task(model, task)
        for old, output in outputs.items():
            assert torch.equal(strategy.select(model, old)(x), output), f"{old} after {name}"
        assert all(torch.equal(model.state_dict()[key], value) for key, value in states.items())
        outputs[name] = strategy.select(model, name)(x).detach()
        states = {key: value.clone() for key, value in model.state_dict().items()}
    assert torch.equal(strategy.select(model, "never learned")(x), base)
    assert torch.equal(strategy.select(model, "base")(x), base)
    assert strategy.columns == {
        "one": ["default"], "two": ["default", "2-two"], "three": ["default", "2-two", "3-three"],
    }  # fmt: skip
    assert method.read == [["default"], ["default", "2-two"]]


def test_without_laterals_a_column_stands_alone(toy_task: Callable[..., ToyTask]) -> None:
    model, strategy, method = Columns(), Progressive(laterals=False), ToyMethod()
    for name in ("one", "two", "three"):
        strategy.before_task(model, toy_task(name, method=method))
        assert model.active == strategy.columns[name]
    assert method.read == [[], []]
    assert strategy.select(model, "two").active == ["2-two"]


def test_a_new_column_depends_on_the_seed_alone(toy_task: Callable[..., ToyTask]) -> None:
    drawn: list[Tensor] = []
    for noise in (1, 2):
        model, strategy = Columns(), Progressive()
        for name in ("one", "two"):
            torch.manual_seed(noise)
            before = torch.get_rng_state()
            strategy.before_task(model, toy_task(name, method=ToyMethod()))
            assert torch.equal(torch.get_rng_state(), before)
        drawn.append(model.columns["2-two"].weight)
    assert torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("infer", ["prototype", "likelihood"])
def test_the_task_of_a_prompt_is_inferred(infer: Any) -> None:
    model, strategy, method = Columns(), Progressive(infer=infer, num_samples=3), ToyMethod()
    strategy.bind(method)
    asked = [*rows("blue")[:2], rows("red")[0]]
    assert strategy.infer_tasks(model, TextTask("x", method), asked) == ["", "", ""]
    for word in ("red", "blue"):
        task = TextTask(word, method, rows(word))
        strategy.before_task(model, task)
        strategy.after_task(model, task)
        assert model.active == strategy.columns[word], "its column answers after consolidation, too"
    again = Progressive(infer=infer)
    again.bind(method)
    again.restore(model, strategy.state_dict())
    for one in (strategy, again):
        assert one.infer_tasks(model, TextTask("x", method), asked) == ["blue", "blue", "red"]


def test_what_was_learned_without_columns_is_kept(toy_task: Callable[..., ToyTask]) -> None:
    model, strategy, method = Columns(), Progressive(), ToyMethod()
    strategy.bind(method, learned=["old"])
    assert strategy.select(model, "old").active == ["default"]
    weight = model.columns["default"].weight.clone()
    learn(strategy, model, toy_task("new", method=method))
    assert strategy.columns == {"old": ["default"], "new": ["default", "2-new"]}
    assert torch.equal(model.columns["default"].weight, weight)
    assert strategy.select(model, "old").active == ["default"]


def test_a_prompt_is_read_without_its_answer() -> None:
    row = Example(id="1", messages=(Message("system", "s"), Message("user", "u"), Message("assistant", "a")))
    assert prompt_text(row).text == "s\nu"
    assert prompt_text(Example(id="2", text="raw")).text == "raw"


def test_refusals(toy_task: Callable[..., ToyTask]) -> None:
    strategy = Progressive()
    assert strategy.supports(ToyMethod()) is None
    assert "beside" in (strategy.supports(ToyMethod(can_extend=False)) or "")
    with pytest.raises(CompatibilityError, match="beside"):
        strategy.before_task(Columns(), toy_task(method=ToyMethod(can_extend=False)))
    with pytest.raises(CompatibilityError, match="bind"):
        Progressive().select(Columns(), "one")
    model, task = Columns(), toy_task("one", method=ToyMethod())
    strategy.before_task(model, task)
    with pytest.raises(CompatibilityError, match="already"):
        strategy.before_task(model, task)
    with pytest.raises(ValueError, match="num_samples"):
        Progressive(num_samples=0)


def test_module_names_are_safe_and_unique() -> None:
    assert module_name("Việt: a/b.c", 1) == "2-Vi-t-a-b-c"
    assert module_name("x", 1) != module_name("x", 2)


def test_prompts_of_rows_without_ids_are_told_apart() -> None:
    """A view keeps what it has encoded by id."""
    rows = [Example(id="", messages=(Message("user", word), Message("assistant", ""))) for word in ("red", "blue")]
    one, other = map(prompt_text, rows)
    assert one.id != other.id
