"""Freeze layers: after the first task, what reads the input no longer moves.

The embeddings and the bottom layers are frozen. What looks like forgetting is often no loss of knowledge but a change
of these layers under what lies above them.

Source: Zheng et al. 2025, *Spurious forgetting in continual learning of language models*,
https://arxiv.org/abs/2501.13453.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from retain.errors import CompatibilityError
from retain.parameters import is_embedding, layer_number, modules_of
from retain.strategies.strategy import State, Strategy, TaskView

__all__ = ["FreezeLayers"]


@dataclass
class FreezeLayers(Strategy):
    """Keep the embeddings and the bottom layers as the first task, or the base model, left them.

    Args:
        num_layers: how many layers from the bottom are frozen, at least 0 and fewer than there are.
        embeddings: are the embeddings frozen, too? An output head that is tied to them then is, as well.
        patterns: regular expressions; parameters whose name one of them is found in are frozen besides.

    The first task moves everything, unless the base model is to be protected (stage 0): then the freezing starts with
    it. What the method froze stays frozen. Adapters lie in the layers that they change, and are frozen with them.
    Nothing is kept but the names of tasks.
    """

    name: ClassVar[str] = "freeze_layers"
    reference: ClassVar[str] = "https://arxiv.org/abs/2501.13453"

    num_layers: int = 3
    embeddings: bool = True
    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_layers < 0:
            raise ValueError(f"num_layers: expected a whole number of at least 0, got {self.num_layers}")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"patterns: expected regular expressions, got {pattern!r}: {error}") from error
        self.tasks: list[str] = []

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Freeze, if there is something to keep.

        Raises:
            CompatibilityError: if the model has no such layers or parameters.
        """
        if self.tasks:
            self._freeze(model)
        return model

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """From now on there is something to keep."""
        self.tasks.append(task.name)

    def state_dict(self) -> State:
        """The tasks so far."""
        return {"tasks": list(self.tasks)}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back, and freeze what was frozen: a method that was loaded again lets everything move."""
        self.tasks = list(state["tasks"])
        if len(self.tasks) > 1:  # with one, the freezing waits for the next task
            self._freeze(model)
        return model

    def _freeze(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        chosen = [*self._bottom(list(parameters)), *self._matching(list(parameters))]
        for name in chosen:
            parameters[name].requires_grad_(False)

    def _bottom(self, names: list[str]) -> list[str]:
        """Parameters of the embeddings and of the bottom layers."""
        numbers = {name: number for name in names if (number := layer_number(name)) is not None}
        count = len(set(numbers.values()))
        if self.num_layers and self.num_layers >= count:
            raise CompatibilityError(
                f"strategy.num_layers: {self.num_layers} layers cannot be frozen, as the model has {count}",
                problems=[f"its parameters are in {', '.join(modules_of(names))}"],
                hint="freeze fewer, or name the parameters with `patterns` and set `num_layers: 0`",
            )
        frozen = [name for name, number in numbers.items() if number < self.num_layers]
        read = [name for name in names if name not in numbers and is_embedding(name)] if self.embeddings else []
        if self.embeddings and not read:
            raise CompatibilityError(
                "strategy.embeddings: no parameter of this model is named as an embedding's",
                problems=[f"its parameters are in {', '.join(modules_of(names))}"],
                hint="name it with `patterns` and set `embeddings: false`",
            )
        return [*read, *frozen]

    def _matching(self, names: list[str]) -> list[str]:
        """Parameters that a pattern is found in."""
        found = {pattern: [name for name in names if re.search(pattern, name)] for pattern in self.patterns}
        if empty := [pattern for pattern, matches in found.items() if not matches]:
            raise CompatibilityError(
                f"strategy.patterns: {', '.join(map(repr, empty))} is found in no parameter's name",
                problems=[f"the parameters are in {', '.join(modules_of(names))}"],
                hint="`patterns` are regular expressions for names such as " + repr(names[0]),
            )
        return [name for matches in found.values() for name in matches]
