"""Deep generative replay: a generator writes old prompts, the old solver answers them, the new solver learns both.

    L = r E_new loss(S(x), y) + (1 - r) E_{x' ~ G_old} loss(S(x'), S_old(x'))         r = 1 / t at the t-th task

The solver S is the model. The generator G is a second network like it, which begins as a copy of the base model and is
trained after each task on the same mixture of new rows and rows that it wrote itself.

Source: Shin et al. 2017, https://arxiv.org/abs/1705.08690, eq. 1.
Differs: rows are written and answered once, before the new task trains: so old generator and old solver are neither
kept nor moved while it does. A row is written as a whole, its answer included, which the old solver's replaces.
"""

import random
import zlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from retain import distributed
from retain.data.written_rows import RowForm, Yield, as_text, collect
from retain.parameters import trainable
from retain.strategies.strategy import State, Strategy, TaskView
from retain.types import GREEDY, Example, Message, Sampling

__all__ = ["Scholar"]


@dataclass
class Scholar(Strategy):
    """A generator and a solver, for small models that are trained from nothing; no row of old tasks is kept.

    It costs a second network, in memory and in training. The rows that stand for the base model, where there are any,
    count as one old task and are taken as they are.

    Args:
        real_share: r, in (0, 1]; None: 1 / t, every task alike. 1 learns no generator.
        max_rows: old rows beside a task at most, above 0; where their share needs more, each counts more.
        temperature: of the generator's draws, above 0.
        top_k: tokens to draw from; 0 sets no limit.
        max_rounds: how often rows that are missing are asked for again, above 0.
    """

    name: ClassVar[str] = "scholar"
    reference: ClassVar[str] = "https://arxiv.org/abs/1705.08690"
    writes: ClassVar[bool] = True
    copies_network: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True

    real_share: float | None = None
    max_rows: int = 2000
    temperature: float = 1.0
    top_k: int = 20
    max_rounds: int = 8

    def __post_init__(self) -> None:
        if self.real_share is not None and not 0 < self.real_share <= 1:
            raise ValueError(f"real_share: expected a share in (0, 1] or null, got {self.real_share}")
        for name, value in (("max_rows", self.max_rows), ("max_rounds", self.max_rounds)):
            if value < 1:
                raise ValueError(f"{name}: expected a whole number above 0, got {value}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected a whole number of 0 or more, got {self.top_k}")
        self.generator: nn.Module | None = None
        self.shapes: tuple[tuple[tuple[str, float], ...], ...] = ()  # of all rows so far
        self.longest = 1  # tokens of the longest of them as a text
        self.learned = 0  # tasks
        self.base: list[Example] = []  # rows that stand for the base model
        self.rows: list[Example] = []  # old rows beside the task at hand
        self.factor = 1.0
        self.told: tuple[str, ...] = ()

    @property
    def steps_factor(self) -> float:
        """The mixture's rows for every row of the task."""
        return self.factor

    @property
    def notes(self) -> Sequence[str]:
        """The generator's yield."""
        return self.told

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Let the old generator write prompts, and the model as it stands answer them."""
        self._begin(model)
        self.rows, self.told = [], ()
        old = self.learned + bool(self.base)
        share = 1 / (old + 1) if self.real_share is None else self.real_share
        for source, part in (("base", bool(self.base) / max(old, 1)), ("old tasks", self.learned / max(old, 1))):
            quota = len(task.examples) * (1 - share) / share * part
            if wanted := round(min(quota, self.max_rows * part)):
                rows, found = self._drawn(task, wanted) if source == "base" else self._written(model, task, wanted)
                self.rows += [replace(row, weight=row.weight * quota / wanted) for row in rows]
                self.told = (*self.told, f"scholar: {found}")
        self.factor = 1 + len(self.rows) / max(len(task.examples), 1)
        return model

    def mix_examples(self, task: TaskView, epoch: int) -> Sequence[Example]:
        """The task's rows and the old solver's."""
        return [*task.examples, *self.rows]

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Train the generator on the mixture that the solver has just learned, but for the base model's rows."""
        self._begin(model)
        if task.name == "base":
            self.base = list(task.examples)
            return
        rows = [*task.examples, *(row for row in self.rows if row.task != "base")]
        texts = [
            replace(request(as_text(row)), id=f"{row.id} written", weight=row.weight, task=task.name) for row in rows
        ]
        if self.generator is not None and rows:
            self.generator = task.fit(self.generator, texts).eval()
        self.shapes = tuple(dict.fromkeys([*self.shapes, *RowForm.of("", task.examples).shapes]))
        self.longest = max([self.longest, *map(task.num_tokens, texts)])
        self.learned += 1
        self.rows = []

    def state_dict(self) -> State:
        """The generator's weights, as far as it moves, and the rows at hand."""
        moving = {} if self.generator is None else trainable(self.generator)
        return {
            "shapes": self.shapes, "longest": self.longest, "learned": self.learned, "told": self.told,
            "base": list(self.base), "rows": list(self.rows),
            **{f"generator/{name}": value.detach().clone() for name, value in moving.items()},
        }  # fmt: skip

    @torch.no_grad()
    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back; the generator is the model's copy with its own weights."""
        self.shapes, self.longest, self.learned = state["shapes"], state["longest"], state["learned"]
        self.base, self.rows, self.told = list(state["base"]), list(state["rows"]), state["told"]
        saved = {key.removeprefix("generator/"): value for key, value in state.items() if key.startswith("generator/")}
        self.generator = copied_network(model) if saved else None
        for name, parameter in self.generator.named_parameters() if self.generator else ():
            parameter.requires_grad_(name in saved)  # whatever of the solver was frozen since
            if name in saved:
                parameter.copy_(saved[name])
        return model

    def _begin(self, model: nn.Module) -> None:
        """The generator begins as a copy of the base model."""
        if self.generator is None and self.real_share != 1:
            self.generator = copied_network(model)

    def _drawn(self, task: TaskView, wanted: int) -> tuple[list[Example], Yield]:
        """Rows of the base model."""
        times, more = divmod(wanted, len(self.base))  # none comes again before all have come
        rows = [*self.base * times, *random.Random(f"{task.seed}/{task.name}").sample(self.base, more)]
        return rows, Yield("base", wanted, made=len(rows), kept=len(rows))

    def _written(self, model: nn.Module, task: TaskView, wanted: int) -> tuple[list[Example], Yield]:
        """Prompts of the generator with the solver's answers, the same on every process."""
        generator = self.generator
        assert generator is not None
        form = RowForm("", self.shapes)

        def write(num: int, turn: int) -> list[str]:
            seed = zlib.crc32(f"{task.seed}/{task.name}/{turn}".encode())
            sampling = Sampling(temperature=self.temperature, top_k=self.top_k, seed=seed)
            return task.generate(generator, [request("")] * num, max_new_tokens=self.longest, sampling=sampling)

        rows, found = collect(
            write, form.read, task="old tasks", wanted=wanted, max_rounds=self.max_rounds, repeats=True
        )
        asked = [row for row in rows if row.messages]  # raw text is its own answer
        answers = task.generate(model, asked, max_new_tokens=self.longest, sampling=GREEDY) if asked else []
        answered = [row for row in rows if not row.messages]
        for row, answer in zip(asked, answers, strict=True):
            if answer.strip():
                messages = (*row.prompt, replace(row.messages[-1], content=answer.strip()))
                answered.append(replace(row, id=f"{row.id} {answer.strip()}", messages=messages))
        if unanswered := len(rows) - len(answered):
            found.dropped["without an answer"] = unanswered
        found.kept = len(answered)
        return distributed.gather_objects((answered, found))[0]


def request(text: str) -> Example:
    """The generator is asked for a row, and says the text."""
    return Example(
        id="", messages=(Message("user", "Write an example."), Message("assistant", text)), source="generated"
    )


def copied_network(model: nn.Module) -> nn.Module:
    """A second network with the same weights, in evaluation mode, without gradients."""
    copy = deepcopy(model).eval()
    copy.zero_grad()
    return copy
