"""A chain is the sum of its parts, in a defined order."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from retain.errors import CompatibilityError
from retain.strategies.chain import Chain, MixedTask
from retain.strategies.ewc import EWC
from retain.strategies.joint import Joint
from retain.strategies.replay import Replay
from retain.strategies.sequential import Sequential
from retain.strategies.strategy import State, Strategy, TaskView
from retain.types import Example

Task = Callable[..., Any]


class Noted(Strategy):
    """Notes every call in a list that all share."""

    def __init__(self, name: str, calls: list[str], value: float | None = None) -> None:
        self.label, self.calls, self.value = name, calls, value
        self.state: State = {}

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        self.calls.append(f"{self.label} before_task")
        return nn.Sequential(model)

    def mix_examples(self, task: TaskView, epoch: int) -> Sequence[Example]:
        return [*task.examples, Example(id=f"{self.label} {len(task.examples)}")]

    def loss_term(self, model: nn.Module, batch: Any, outputs: Any) -> Tensor | None:
        return None if self.value is None else torch.tensor(self.value)

    def edit_gradients(self, model: nn.Module) -> None:
        self.calls.append(f"{self.label} edit_gradients")

    def add_penalty(self, model: nn.Module) -> Tensor | None:
        return None if self.value is None else torch.tensor(10 * self.value)

    def after_step(self, model: nn.Module, learning_rate: float) -> None:
        self.calls.append(f"{self.label} after_step {learning_rate}")

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        self.calls.append(f"{self.label} after_task")

    def select(self, model: nn.Module, task_name: str) -> nn.Module:
        self.calls.append(f"{self.label} select {task_name}")
        return nn.Sequential(model)

    def state_dict(self) -> State:
        return {"label": self.label, "a/b": 1}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        self.state = state
        return nn.Sequential(model)


class Watcher(Noted):
    name: ClassVar[str] = "watcher"
    watches_gradients: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = False
    remembers: ClassVar[bool] = False


class Mover(Noted):
    name: ClassVar[str] = "mover"
    moves_weights: ClassVar[bool] = True
    needs_task_name: ClassVar[bool] = True

    @property
    def steps_factor(self) -> float:
        return 3.0


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def chain(calls: list[str]) -> Chain:
    return Chain(Noted("a", calls, 1.0), Watcher("b", calls), Mover("c", calls, 2.0), Watcher("d", calls))


def test_who_watches_sees_the_gradient_before_it_is_changed(chain: Chain, calls: list[str]) -> None:
    chain.edit_gradients(nn.Identity())
    assert [call[0] for call in calls] == ["b", "d", "a", "c"]


def test_who_moves_weights_comes_before_who_watches(chain: Chain, calls: list[str]) -> None:
    chain.after_step(nn.Identity(), 0.5)
    assert calls == ["c after_step 0.5", "a after_step 0.5", "b after_step 0.5", "d after_step 0.5"]


def test_a_copy_of_the_network_and_one_that_grows_are_refused(calls: list[str]) -> None:
    class Growing(Noted):
        grows: ClassVar[bool] = True

    class Copying(Noted):
        copies_network: ClassVar[bool] = True

    with pytest.raises(CompatibilityError, match="keeps a second network"):
        Chain(Growing("a", calls), Copying("b", calls))


def test_who_merges_comes_before_who_consolidates_on_it(calls: list[str], toy_task: Task) -> None:
    class Merging(Noted):
        merges: ClassVar[bool] = True

    Chain(Noted("a", calls), Merging("b", calls), Noted("c", calls)).after_task(nn.Identity(), toy_task())
    assert [call[0] for call in calls] == list("bac")


def test_everything_else_goes_in_the_order_of_the_list(chain: Chain, calls: list[str], toy_task: Task) -> None:
    model = nn.Identity()
    changed = chain.before_task(model, toy_task())
    selected = chain.select(model, "toy")
    chain.after_task(model, toy_task())
    assert [call[0] for call in calls] == list("abcd") * 3
    for wrapped in (changed, selected):  # each got what the one before it made
        assert wrapped[0][0][0][0] is model


def test_terms_and_penalties_are_summed(chain: Chain, calls: list[str]) -> None:
    assert float(chain.loss_term(nn.Identity(), None, None)) == 3.0
    assert float(chain.add_penalty(nn.Identity())) == 30.0
    silent = Chain(Noted("a", calls), Watcher("b", calls))
    assert silent.loss_term(nn.Identity(), None, None) is None
    assert silent.add_penalty(nn.Identity()) is None


def test_each_mixes_into_what_the_one_before_it_mixed(chain: Chain, toy_task: Task) -> None:
    mixed = chain.mix_examples(toy_task(num=5), 0)
    assert [example.id for example in mixed[5:]] == ["a 5", "b 6", "c 7", "d 8"]


def test_a_mixed_task_is_the_task_but_for_its_rows(toy_task: Task) -> None:
    task = toy_task(num=5)
    mixed = MixedTask(task, task.examples[:2])
    model = nn.Linear(3, 4, dtype=torch.float64)
    assert (mixed.name, mixed.seed, mixed.method, len(mixed.examples)) == (task.name, task.seed, task.method, 2)
    assert mixed.num_tokens(task.examples[0]) == 1
    (batch,) = mixed.batches(mixed.examples)
    outputs = mixed.forward(model, batch)
    assert torch.equal(mixed.loss(outputs, batch), task.loss(task.forward(model, batch), batch))


def test_replays_in_a_chain_share_the_final_mixture(text_task: Task) -> None:
    old, new = text_task("old", [10] * 100), text_task("new", [10] * 90)
    new.tokens.update(old.tokens)
    chain = Chain(Replay(ratio=0.1), Replay(ratio=0.1))
    chain.after_task(nn.Identity(), old)
    mixed = chain.mix_examples(new, 0)
    assert sum(example.source == "replay" for example in mixed) == 10 + 11


def test_needs_are_those_of_any(chain: Chain, calls: list[str]) -> None:
    assert (chain.needs_gradients, chain.needs_task_name, chain.remembers, chain.steps_factor) == (
        True,
        True,
        True,
        3.0,
    )
    watchers = Chain(Watcher("a", calls))
    assert (watchers.needs_gradients, watchers.needs_task_name, watchers.remembers) == (False, False, False)
    assert Chain().steps_factor == 1.0
    assert not Chain(Replay(), Sequential()).needs_gradients
    assert Chain(Replay(), EWC()).needs_gradients


def test_states_are_kept_apart(chain: Chain) -> None:
    state = chain.state_dict()
    assert state["1.watcher/label"] == "b"
    assert state["3.watcher/label"] == "d"
    model = nn.Identity()
    assert chain.restore(model, state)[0][0][0][0] is model
    assert [strategy.state for strategy in chain.strategies] == [{"label": label, "a/b": 1} for label in "abcd"]


def test_refuses_the_state_of_others() -> None:
    state = Chain(Replay(), EWC()).state_dict()
    with pytest.raises(CompatibilityError, match=r"0\.replay"):
        Chain(EWC(), Replay()).restore(nn.Identity(), state)


def test_a_chain_in_a_chain_is_its_parts(calls: list[str]) -> None:
    parts = [Noted(label, calls) for label in "abc"]
    assert Chain(parts[0], Chain(parts[1], parts[2])).strategies == tuple(parts)


def test_refuses_two_that_move_the_same_weights(calls: list[str]) -> None:
    with pytest.raises(CompatibilityError, match=r"both move the weights[\s\S]*keep one"):
        Chain(Mover("a", calls), Mover("b", calls))


def test_refuses_joint_beside_others() -> None:
    with pytest.raises(CompatibilityError, match=r"'joint' cannot be combined[\s\S]*on its own"):
        Chain(Replay(), Joint())
    assert Chain(Joint()).steps_factor == 1.0


def test_replay_and_ewc_each_do_their_part(toy_task: Task) -> None:
    torch.manual_seed(0)
    model, old, new = nn.Linear(3, 4, dtype=torch.float64), toy_task("old"), toy_task("new", data_seed=1)
    both = replace(new, inputs=old.inputs | new.inputs, targets=old.targets | new.targets)
    chain, replay, ewc = Chain(Replay(), EWC()), Replay(), EWC()
    for strategy in (chain, replay, ewc):
        strategy.after_task(model, old)
    with torch.no_grad():
        model.weight += 0.1
    assert chain.mix_examples(both, 0) == replay.mix_examples(both, 0)
    assert torch.equal(chain.add_penalty(model), ewc.add_penalty(model))
    assert len(chain.strategies) == 2
    assert repr(chain) == f"Chain({replay!r}, {ewc!r})"


def test_notes_are_those_of_each(calls: list[str]) -> None:
    class Telling(Noted):
        @property
        def notes(self) -> Sequence[str]:
            return [f"{self.label} wrote 3 rows"]

    assert Chain(Telling("a", calls), Sequential(), Telling("b", calls)).notes == ["a wrote 3 rows", "b wrote 3 rows"]


def test_those_that_add_weights_come_first() -> None:
    seen: list[str] = []

    class Grows(Strategy):
        name, grows = "grows", True

        def before_task(self, model: nn.Module, task: Any) -> nn.Module:
            seen.append("grows")
            return model

    class Freezes(Strategy):
        name = "freezes"

        def before_task(self, model: nn.Module, task: Any) -> nn.Module:
            seen.append("freezes")
            return model

    Chain(Freezes(), Grows()).before_task(nn.Linear(1, 1), None)  # pyright: ignore[reportArgumentType]
    assert seen == ["grows", "freezes"]
