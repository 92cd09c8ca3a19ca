"""Several strategies as one, in an order that is defined and not luck.

    mix_examples, select                            in the order of the list, each given what the one before it made
    before_task                                     those that add weights, then the others
    loss_term, add_penalty                          summed
    edit_gradients                                  those that watch gradients, then those that change them
    after_step, after_task                          those that move weights, then those that watch

Two that move the same weights are refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from retain.errors import CompatibilityError
from retain.strategies.strategy import ModelOutputs, State, Strategy, TaskMethod, TaskView
from retain.types import Batch, Example, Sampling

__all__ = ["Chain", "links"]


@dataclass(frozen=True)
class MixedTask:
    """A task whose rows are another strategy's mixture."""

    task: TaskView
    examples: Sequence[Example]

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.task.seed

    @property
    def method(self) -> TaskMethod:
        """The tuning method."""
        return self.task.method

    def num_tokens(self, example: Example) -> int:
        """Tokens of the example as the model sees it."""
        return self.task.num_tokens(example)

    def batches(self, examples: Sequence[Example], *, max_tokens: int | None = None) -> Iterator[Batch]:
        """This process's share of the examples as micro-batches."""
        return self.task.batches(examples, max_tokens=max_tokens)

    def forward(self, model: nn.Module, batch: Batch) -> ModelOutputs:
        """One pass."""
        return self.task.forward(model, batch)

    def loss(self, outputs: ModelOutputs, batch: Batch) -> Tensor:
        """Nats, weighted and summed over counted targets."""
        return self.task.loss(outputs, batch)

    def loglikelihood(self, model: nn.Module, examples: Sequence[Example]) -> list[float]:
        """Log p of each example's trained tokens."""
        return self.task.loglikelihood(model, examples)

    def embed(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """(examples, width), what the head reads."""
        return self.task.embed(model, examples)

    def fit(self, model: nn.Module, examples: Sequence[Example]) -> nn.Module:
        """Train a helper network."""
        return self.task.fit(model, examples)

    def generate(
        self, model: nn.Module, prompts: Sequence[Example], *, max_new_tokens: int, sampling: Sampling
    ) -> list[str]:
        """What the model answers."""
        return self.task.generate(model, prompts, max_new_tokens=max_new_tokens, sampling=sampling)


class Chain(Strategy):
    """`Chain(Replay(), EWC())` protects by both; a list in a recipe is a chain.

    Args:
        strategies: in the order of the list; a chain among them counts as its parts.

    Raises:
        CompatibilityError: if two of them move the same weights after a step, one stands alone, or one copies the
            network that another grows.
    """

    name: ClassVar[str] = "chain"

    def __init__(self, *strategies: Strategy) -> None:
        self.strategies = tuple(
            part
            for strategy in strategies
            for part in (strategy.strategies if isinstance(strategy, Chain) else (strategy,))
        )
        for strategy in self.strategies:
            if strategy.stands_alone and len(self.strategies) > 1:
                raise CompatibilityError(
                    f"{strategy.name!r} cannot be combined: it replaces the training that the others protect",
                    hint=f"run it on its own: `strategy: {{name: {strategy.name}}}`",
                )
        movers = [repr(strategy.name) for strategy in self.strategies if strategy.moves_weights]
        if len(movers) > 1:
            raise CompatibilityError(
                f"{' and '.join(movers)} both move the weights after each step, so one would undo the other",
                hint="keep one of them",
            )
        growing = [repr(strategy.name) for strategy in self.strategies if strategy.grows]
        copying = [repr(strategy.name) for strategy in self.strategies if strategy.copies_network]
        if growing and copying:
            raise CompatibilityError(
                f"{copying[0]} keeps a second network of the model's shape, and {growing[0]} changes that shape",
                hint="keep one of them",
            )

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.strategies))})"

    @property
    def needs_gradients(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Does any of them?"""
        return any(strategy.needs_gradients for strategy in self.strategies)

    @property
    def needs_task_name(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Does any of them?"""
        return any(strategy.needs_task_name for strategy in self.strategies)

    @property
    def remembers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Does any of them?"""
        return any(strategy.remembers for strategy in self.strategies)

    @property
    def steps_factor(self) -> float:
        """The largest of theirs."""
        return max((strategy.steps_factor for strategy in self.strategies), default=1.0)

    @property
    def notes(self) -> Sequence[str]:
        """Those of each."""
        return [note for strategy in self.strategies for note in strategy.notes]

    def supports(self, method: TaskMethod) -> str | None:
        """The first reason that one of them has."""
        reasons = [(strategy.name, strategy.supports(method)) for strategy in self.strategies]
        return next((f"{name}: {reason}" for name, reason in reasons if reason), None)

    def bind(self, method: TaskMethod, *, learned: Sequence[str] = ()) -> None:
        """Each takes the method."""
        for strategy in self.strategies:
            strategy.bind(method, learned=learned)

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Each changes what the one before it made, those that add weights first."""
        for strategy in sorted(self.strategies, key=lambda strategy: not strategy.grows):
            model = strategy.before_task(model, task)
        return model

    def mix_examples(self, task: TaskView, epoch: int) -> Sequence[Example]:
        """Each mixes into what the one before it mixed."""
        examples = task.examples
        for strategy in self.strategies:
            examples = strategy.mix_examples(MixedTask(task, examples), epoch)
        return examples

    def loss_term(self, model: nn.Module, batch: Batch, outputs: ModelOutputs) -> Tensor | None:
        """The sum of their terms."""
        return _sum([strategy.loss_term(model, batch, outputs) for strategy in self.strategies])

    def edit_gradients(self, model: nn.Module) -> None:
        """Those that watch see the gradient before anyone changes it."""
        for strategy in sorted(self.strategies, key=lambda strategy: not strategy.watches_gradients):
            strategy.edit_gradients(model)

    def add_penalty(self, model: nn.Module) -> Tensor | None:
        """The sum of their penalties."""
        return _sum([strategy.add_penalty(model) for strategy in self.strategies])

    def after_step(self, model: nn.Module, learning_rate: float) -> None:
        """Those that watch see the weights where they stay."""
        for strategy in sorted(self.strategies, key=lambda strategy: not strategy.moves_weights):
            strategy.after_step(model, learning_rate)

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Those that move weights, then those that consolidate on them."""
        for strategy in sorted(self.strategies, key=lambda strategy: not strategy.merges):
            strategy.after_task(model, task)

    def select(self, model: nn.Module, task_name: str) -> nn.Module:
        """Each chooses from what the one before it chose."""
        for strategy in self.strategies:
            model = strategy.select(model, task_name)
        return model

    def infer_tasks(self, model: nn.Module, task: TaskView, examples: Sequence[Example]) -> list[str]:
        """The names that the first one finds which needs them."""
        needing = [strategy for strategy in self.strategies if strategy.needs_task_name]
        return (needing[0] if needing else Strategy()).infer_tasks(model, task, examples)

    def state_dict(self) -> State:
        """Their states, as `0.replay/memory`."""
        return {
            f"{prefix}{key}": value
            for prefix, strategy in self._prefixed()
            for key, value in strategy.state_dict().items()
        }

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Give each its state back.

        Raises:
            CompatibilityError: if the state is of other strategies, or of the same ones in another order.
        """
        parts = {key.split("/")[0] + "/" for key in state}
        if strangers := parts - {prefix for prefix, _ in self._prefixed()}:
            raise CompatibilityError(
                f"the saved memory is not of {self!r}", problems=[f"it holds {name}" for name in sorted(strangers)],
                hint="continue with the strategies that the memory was made by, in the same order",
            )  # fmt: skip
        for prefix, strategy in self._prefixed():
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            model = strategy.restore(model, own)
        return model

    def _prefixed(self) -> list[tuple[str, Strategy]]:
        return [(f"{index}.{strategy.name}/", strategy) for index, strategy in enumerate(self.strategies)]


def links(strategy: Strategy) -> tuple[Strategy, ...]:
    """The strategies of a chain, or the one strategy."""
    return strategy.strategies if isinstance(strategy, Chain) else (strategy,)


def _sum(values: Sequence[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    return sum(present[1:], start=present[0]) if present else None
