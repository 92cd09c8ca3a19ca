"""LAMOL: one model that answers a task's rows and also writes such rows; it rehearses old tasks on what it writes.

Each row is learned twice: as it is, and as a whole conversation that the model says when it is asked for a row of the
task. Before a new task it is asked for gamma * |D_new| rows of the old ones.

    L = L_answer + lambda * L_generate

Source: Sun et al. 2020, https://arxiv.org/abs/1909.03329, eq. 1 and section 3.2, with a token for each task.
Differs: the token is a request in words, so that no row of the vocabulary is added and a model that follows
instructions has a start; texts that are no rows of the task are asked for again, where the authors drop them and go on
with fewer; repeats are dropped; a whole conversation is written, not one question and one answer.
"""

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from torch import nn

from retain import distributed
from retain.data.written_rows import RowForm, Yield, as_text, collect, quotas
from retain.strategies.strategy import State, Strategy, TaskView
from retain.types import Example, Message, Sampling

__all__ = ["LAMOL"]


@dataclass
class LAMOL(Strategy):
    """Rehearse old tasks on rows that the model writes itself; no row of theirs is kept.

    What is kept of a task is how its rows look: the order of turns, and the labels where it has them. Old rows are
    told apart from new ones by their task's name, so that no task drowns among larger ones. The rows that stand for
    the base model are taken as they are: it wrote them itself (or they are the user's), and they get a task's share.

    Args:
        gamma: rows to rehearse for every new one, 0 or more; the paper's are 0.05 and 0.2.
        generation_weight: lambda, the loss weight of a row as a text, 0 or more; 0 learns no generator.
        temperature: of the draws, above 0.
        top_k: tokens to draw from, above 0; 0 sets no limit.
        max_rounds: how often rows that are missing are asked for again, above 0. What is missing then is told in the
            report.
    """

    name: ClassVar[str] = "lamol"
    reference: ClassVar[str] = "https://arxiv.org/abs/1909.03329"
    writes: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True

    gamma: float = 0.2
    generation_weight: float = 0.25
    temperature: float = 1.0
    top_k: int = 20
    max_rounds: int = 8

    def __post_init__(self) -> None:
        for name, value in (("gamma", self.gamma), ("generation_weight", self.generation_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a number of 0 or more, got {value}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected a whole number of 0 or more, got {self.top_k}")
        if self.max_rounds < 1:
            raise ValueError(f"max_rounds: expected a whole number above 0, got {self.max_rounds}")
        self.forms: dict[str, RowForm] = {}  # of each old task
        self.lengths: dict[str, int] = {}  # tokens of each old task's longest row as a text
        self.base: list[Example] = []  # rows that stand for the base model
        self.pseudo: list[Example] = []  # rows to rehearse while the task at hand trains
        self.told: tuple[str, ...] = ()
        self.factor = 1.0

    @property
    def steps_factor(self) -> float:
        """The mixture's rows for every row of the task, so that a number of steps holds as many of the task's."""
        return self.factor

    @property
    def notes(self) -> Sequence[str]:
        """The yield of every old task."""
        return self.told

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Let the model, as it stands, write rows of the old tasks."""
        self.pseudo, told = [], list[str]()
        sources = [*(["base"] if self.base else []), *self.forms]
        for source, wanted in quotas(math.ceil(self.gamma * len(task.examples)), sources).items() if sources else ():
            rows, found = self._rows_of(source, wanted, model, task)
            self.pseudo += rows
            if wanted:
                told.append(f"lamol: {found}")
        self.told = tuple(told)
        self.factor = len(self.mix_examples(task, 0)) / max(len(task.examples), 1)
        return model

    def mix_examples(self, task: TaskView, epoch: int) -> Sequence[Example]:
        """The task's rows and the old ones, and each of them as a text; the base model's only as they are."""
        if not self.generation_weight:
            return [*task.examples, *self.pseudo]
        own = [row for row in task.examples if row.source == "task"]  # not what another strategy has mixed in
        old = [row for row in self.pseudo if row.task in self.forms]
        texts = [*(self._text(row, task.name) for row in own), *(self._text(row, row.task) for row in old)]
        return [*task.examples, *self.pseudo, *texts]

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Keep how the task's rows look, and not the rows; of the base model, its own."""
        self.pseudo = []
        if task.name == "base":
            self.base = list(task.examples)
        else:
            self.forms[task.name] = RowForm.of(task.name, task.examples)
            texts = (self._text(row, task.name) for row in task.examples)
            self.lengths[task.name] = max(map(task.num_tokens, texts), default=1)

    def state_dict(self) -> State:
        """How the old tasks' rows look, and the rows that are rehearsed now."""
        return {
            "forms": [asdict(form) for form in self.forms.values()], "lengths": dict(self.lengths),
            "base": list(self.base), "pseudo": list(self.pseudo), "told": self.told,
        }  # fmt: skip

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back."""
        self.forms = {form["task"]: RowForm(**form) for form in state["forms"]}
        self.lengths, self.told = dict(state["lengths"]), state["told"]
        self.base, self.pseudo = list(state["base"]), list(state["pseudo"])
        return model

    def _rows_of(self, source: str, wanted: int, model: nn.Module, task: TaskView) -> tuple[list[Example], Yield]:
        """The rows of one source, the same on every process."""
        if source == "base":
            generator = random.Random(f"{task.seed}/{task.name}/base")
            rows = generator.sample(self.base, min(wanted, len(self.base)))
            return rows, Yield(source, wanted, made=len(rows), kept=len(rows))

        def write(num: int, turn: int) -> list[str]:
            sampling = Sampling(
                temperature=self.temperature, top_k=self.top_k,
                seed=zlib.crc32(f"{task.seed}/{task.name}/{source}/{turn}".encode()),
            )  # fmt: skip
            asked = [request(source, "")] * num
            return task.generate(model, asked, max_new_tokens=self.lengths[source], sampling=sampling)

        found = collect(write, self.forms[source].read, task=source, wanted=wanted, max_rounds=self.max_rounds)
        return distributed.gather_objects(found)[0]

    def _text(self, row: Example, task: str) -> Example:
        """The row as what the model says when it is asked for one of the task's."""
        asked = request(task, as_text(row))
        # not of source `task`: a row as a text is longer, and is cut where only the row itself fits
        return replace(asked, id=f"{row.id} of {task}", weight=self.generation_weight * row.weight, task=task)


def request(task: str, text: str) -> Example:
    """The model is asked for a row of the task, and says the text."""
    messages = (Message("user", f"Write an example of the task {task!r}."), Message("assistant", text))
    return Example(id="", messages=messages, source="generated")
