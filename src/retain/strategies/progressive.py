"""Progressive networks: a new column for every task, beside frozen columns that it reads.

    h_i^(k) = activation(W_i^(k) h_{i-1}^(k) + U_i^(k) activation(V_i^(k) (alpha^(k) * h_{i-1}^(<k))))

Everything of the columns before k, and the base model, is frozen: what was learned cannot be forgotten, and a task is
answered by its own column. What a column is, the tuning method says: an adapter stack (`adapter`), a whole network
(`columns`), a pair of factors added to those before it (`lora`), a soft prompt after those before it (`prompt`).

Source: Rusu et al. 2016, https://arxiv.org/abs/1606.04671, eq. 2; for prompts: Razdaibiedina et al. 2023,
https://arxiv.org/abs/2301.12314.
"""

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from retain.errors import CompatibilityError
from retain.strategies.strategy import State, Strategy, TaskMethod, TaskView
from retain.types import Example

__all__ = ["Progressive"]


@dataclass
class Progressive(Strategy):
    """A column a task; forgetting is zero by construction, and the model grows with every task.

    Args:
        laterals: let a new column read the earlier ones; without, every task has a module of its own that knows
            nothing of the others.
        infer: how the task of a prompt is found where nobody names it: `prototype` takes the task whose prompts are
            nearest to it in the base model's states (cosine, of means); `likelihood` the one whose column gives the
            prompt the highest likelihood, which costs a pass a column.
        num_samples: rows of a task that its prototype is the mean of, above 0.

    Memory: a column a task; laterals make it grow with the square of the number of tasks. A prototype is one vector.
    The base model itself, unknown task names and probes are answered with no column.
    """

    name: ClassVar[str] = "progressive"
    reference: ClassVar[str] = "https://arxiv.org/abs/1606.04671"
    needs_task_name: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    remembers: ClassVar[bool] = False  # of the base: it is there, unchanged

    laterals: bool = True
    infer: Literal["likelihood", "prototype"] = "prototype"
    num_samples: int = 100

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples: expected a whole number above 0, got {self.num_samples}")
        self.columns: dict[str, list[str]] = {}  # the modules that answer for each task, its own last
        self.prototypes: dict[str, Tensor] = {}  # (width,) of each task
        self.method: TaskMethod | None = None
        self.learned: tuple[str, ...] = ()  # before this strategy came

    def supports(self, method: TaskMethod) -> str | None:
        """Methods that can put a further module beside frozen ones."""
        return None if method.can_extend else f"method {method.name!r} cannot put a new column beside frozen ones"

    def bind(self, method: TaskMethod, *, learned: Sequence[str] = ()) -> None:
        """Take the method that columns are made and switched by, and the tasks that were learned without columns."""
        self.method, self.learned = method, tuple(learned)

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """A new column, of weights that the run's seed and the task's place decide; all that was there is frozen.

        Raises:
            CompatibilityError: if the method cannot extend, or the task has a column already.
        """
        method = self.method = task.method
        if reason := self.supports(method):
            raise CompatibilityError(reason, hint="use `method: adapter`, `lora`, `prompt` or `columns`")
        if task.name in self.columns:
            raise CompatibilityError(
                f"task {task.name!r} has a column already, and a column never moves again",
                hint="give the new rows a task name of their own",
            )
        present = method.modules(model)
        if not self.columns and self.learned:
            self.columns = {name: list(present) for name in self.learned}
        taken = {module for modules in self.columns.values() for module in modules}
        unused = [name for name in present if name not in taken]  # what `apply` made
        earlier = [name for name in present if name in taken] if self.laterals else []
        module = unused[0] if unused else module_name(task.name, len(present))
        method.activate(model, earlier)
        if not unused:
            with torch.random.fork_rng():
                torch.manual_seed(zlib.crc32(f"{task.seed}/{module}".encode()))
                model = method.extend(model, module)
        self.columns[task.name] = [*earlier, module]
        return self.select(model, task.name)

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Keep the mean of the task's prompts, as the base model sees them."""
        if self.infer == "prototype" and task.name in self.columns:
            generator = random.Random(f"{task.seed}/{task.name}")
            rows = generator.sample(list(task.examples), min(self.num_samples, len(task.examples)))
            prompts = [prompt_text(row) for row in rows]
            self.prototypes[task.name] = self._embedded(model, task, prompts).mean(0)
            self.select(model, task.name)

    def select(self, model: nn.Module, task_name: str) -> nn.Module:
        """The task's column, with those that it reads; the base model for a task that was never learned.

        Raises:
            CompatibilityError: before `bind` or `before_task`.
        """
        if self.method is None:
            raise CompatibilityError("the strategy knows no method to switch columns by", hint="call `bind(method)`")
        if not self.columns and task_name in self.learned:
            return self.method.activate(model, self.method.modules(model))
        return self.method.activate(model, self.columns.get(task_name, []))

    def infer_tasks(self, model: nn.Module, task: TaskView, examples: Sequence[Example]) -> list[str]:
        """The learned task that each prompt most likely is of; no name where no task is known."""
        prompts = [prompt_text(example) for example in examples]
        if self.infer == "prototype":
            states = self._embedded(model, task, prompts)  # (examples, width)
            known = list(self.prototypes)
            scores = [nn.functional.cosine_similarity(states, self.prototypes[name][None]).tolist() for name in known]
        else:
            known = list(self.columns)
            scores = [task.loglikelihood(self.select(model, name), prompts) for name in known]
        places = [max(range(len(known)), key=lambda k: scores[k][i], default=None) for i in range(len(prompts))]
        return ["" if place is None else known[place] for place in places]

    def state_dict(self) -> State:
        """Which column is whose, and the prototypes; the columns themselves are the method's to save."""
        columns = {task: list(modules) for task, modules in self.columns.items()}
        return {"columns": columns} | {f"prototype/{name}": value for name, value in self.prototypes.items()}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back; the method has loaded the columns."""
        self.columns = {task: list(modules) for task, modules in state["columns"].items()}
        prefix = "prototype/"
        self.prototypes = {key.removeprefix(prefix): p for key, p in state.items() if key.startswith(prefix)}
        return model

    def _embedded(self, model: nn.Module, task: TaskView, prompts: Sequence[Example]) -> Tensor:
        """(prompts, width), of unit length: the base model's mean state over each."""
        return nn.functional.normalize(task.embed(self.select(model, ""), prompts), dim=1)


def prompt_text(example: Example) -> Example:
    """The prompt as a row of raw text, so that all of it counts; of a row of raw text, the text."""
    text = "\n".join(message.content for message in example.prompt) or example.text
    return Example(id=f"prompt: {text}", text=text, source="generated")  # an id is of the content: rows are kept by it


def module_name(task: str, index: int) -> str:
    """A name for modules and folders: letters, digits, `-` and `_`; unlike all others by its number."""
    return f"{index + 1}-{re.sub(r'[^A-Za-z0-9_]+', '-', task).strip('-')[:40]}"
