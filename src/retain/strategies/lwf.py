"""Learning without forgetting: on every trained token, stay near what an earlier model would have predicted.

    term = strength * sum over counted targets of  weight * T^2 * KL(p_teacher || p_model),   p = softmax(logits / T)

The teacher is the model as the previous task left it, or the base model. It is never a second network: it is this one
with an earlier copy of what moves, or, where the method can detach, with the method's change off.

Source: Li and Hoiem 2016, https://arxiv.org/abs/1606.09282, eq. 2-3; the temperature as in Hinton et al. 2015,
https://arxiv.org/abs/1503.02531.
Differs: the KL in place of the cross-entropy with the teacher's predictions, which has the same gradient and is 0 where
nothing changed. There is one head, not one for each task; of a classifier that has grown the two are compared over the
classes that the teacher had learned, as the paper compares them at the old tasks' heads. The teacher is asked again at
every step instead of once, so nothing is stored for each row and nothing can get out of line with a shuffled order.
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from retain.kernels.chunks import rows_at_once, summed_in_chunks
from retain.kernels.distillation import distillation_nats
from retain.parameters import copied, evaluating, swapped, trainable
from retain.strategies.strategy import ModelOutputs, State, Strategy, TaskView
from retain.types import Batch

__all__ = ["LwF"]


@dataclass
class LwF(Strategy):
    """Distil from the model before the task, or from the base model.

    Args:
        strength: weight of the term beside the loss, at least 0.
        temperature: T, above 0; larger ones weigh the teacher's unlikely tokens more.
        teacher: `previous` is the model as the task found it; `base` is the base model, whatever came in between (where
            the method cannot detach: the model as this strategy first met it).
        rows: on which rows of a batch: `all`; `task`, the new task's own; `old`, those that another strategy brought in
            (replayed or generated), so that the new task itself is not held back. All is the default: the teacher knows
            old rows best, and without a memory there are none.

    Costs a forward pass without gradients for each one with. The logits of both exist for some targets at a time.
    Memory: a copy of what moves; none for the base model
    where the method can detach. Between tasks a copy is kept on disk only of the base model: the previous one's
    weights are the lineage's.
    """

    name: ClassVar[str] = "lwf"
    reference: ClassVar[str] = "https://arxiv.org/abs/1606.09282"

    strength: float = 1.0
    temperature: float = 2.0
    teacher: Literal["previous", "base"] = "previous"
    rows: Literal["all", "task", "old"] = "all"

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"strength: expected a number of at least 0, got {self.strength}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature}")
        self.tasks: list[str] = []  # consolidated; before the first there is nothing to keep
        self.earlier: dict[str, Tensor] = {}  # the teacher's values of what moves
        self.task: TaskView | None = None
        self.sizes: dict[str, int] = {}  # rows of each parameter that the teacher had learned, by name
        self.num_classes: int | None = None  # that the teacher had learned; None where it knows all

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Keep the weights as they are, where they are the teacher's."""
        self.task = task
        first = not self.tasks
        if (not first) if self.teacher == "previous" else (first and not task.method.can_detach):
            self.earlier = copied(model)
        grown = [num for name, num in self.sizes.items() if num < rows_of(model).get(name, 0)]
        self.num_classes = min(grown, default=None)
        return model

    def loss_term(self, model: nn.Module, batch: Batch, outputs: ModelOutputs) -> Tensor | None:
        """strength * T^2 * KL, weighted and summed like the loss itself."""
        if not self.strength or not self.tasks or self.task is None:
            return None
        wanted = self._wanted(batch)
        if not wanted.any():
            return None
        task = self.task
        if outputs.classes is not None:
            return self._over_classes(model, task, batch, outputs, outputs.classes, wanted)
        with self._teaching(model, task) as teacher:
            theirs = task.forward(teacher, batch)
        ours, known, weights = outputs.hidden[wanted], theirs.hidden[wanted], batch.weights[wanted]

        def term(rows: Tensor, part: slice) -> Tensor:
            with self._teaching(model, task):  # its head may be another one
                expected = theirs.head(known[part])  # (rows, vocabulary)
            nats = distillation_nats(outputs.head(rows), expected, temperature=self.temperature)
            return (weights[part] * nats).sum()

        size = rows_at_once(known, theirs.head)
        return self.strength * summed_in_chunks(term, ours, list(trainable(model).values()), chunk=size)

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """The previous model's copy has done its work; the base model's stays."""
        if self.teacher == "previous":
            self.earlier = {}
        elif not self.tasks and not self.earlier and not task.method.can_detach:
            self.earlier = copied(model)
        if self.teacher == "previous" or not self.tasks:
            known = self.teacher == "previous" or task.name == "base"  # else it never learned this task's classes
            self.sizes = {name: num * known for name, num in rows_of(model).items()}
        self.tasks.append(task.name)

    def state_dict(self) -> State:
        """The teacher, and how much of the head it had learned."""
        teacher = {f"teacher/{name}": value for name, value in self.earlier.items()}
        return {"tasks": list(self.tasks), "sizes": dict(self.sizes), **teacher}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take it back, each tensor to its parameter's device."""
        devices = {name: parameter.device for name, parameter in model.named_parameters()}
        found = {key.removeprefix("teacher/"): value for key, value in state.items() if key.startswith("teacher/")}
        self.tasks, self.sizes = list(state["tasks"]), dict(state.get("sizes", {}))
        self.earlier = {  # copied: products of the same numbers differ in the last bit where a file's bytes lie
            name: value.to(devices.get(name, value.device), copy=True) for name, value in found.items()
        }
        return model

    def _over_classes(
        self, model: nn.Module, task: TaskView, batch: Batch, outputs: ModelOutputs, classes: Tensor, wanted: Tensor
    ) -> Tensor | None:
        """The term of a classifier: rows of its head that are new have no teacher, and are not moved."""
        known = classes < (classes.max() + 1 if self.num_classes is None else self.num_classes)  # (num_targets, logits)
        wanted = wanted & known.any(dim=1)
        if not wanted.any():
            return None
        with self._teaching(model, task) as teacher:
            expected = task.forward(teacher, batch).logits()[wanted]
        columns = known[wanted][0]  # the same at every target
        ours = outputs.logits()[wanted][:, columns]
        nats = distillation_nats(ours, expected[:, columns], temperature=self.temperature)
        return self.strength * (batch.weights[wanted] * nats).sum()

    def _wanted(self, batch: Batch) -> Tensor:
        """(num_targets,), bool, whether the target's row is one to distil on."""
        flags = [self.rows == "all" or (row.source == "task") == (self.rows == "task") for row in batch.examples]
        return torch.tensor(flags, device=batch.targets.device)[batch.target_documents]

    @contextmanager
    def _teaching(self, model: nn.Module, task: TaskView) -> Generator[nn.Module]:
        """The model as the teacher while inside: in evaluation mode, without gradients."""
        with ExitStack() as stack:
            if self.teacher == "base" and task.method.can_detach:
                for parameter in model.parameters():  # PEFT's switch lets every adapter weight move again
                    stack.callback(parameter.requires_grad_, parameter.requires_grad)
                stack.callback(torch.clear_autocast_cache)  # bf16 copies made here have no gradient
                stack.enter_context(task.method.detached(model))
                stack.enter_context(torch.no_grad())
            else:
                stack.enter_context(swapped(model, self.earlier))
            yield stack.enter_context(evaluating(model))


def rows_of(model: nn.Module) -> dict[str, int]:
    """How many rows each parameter has that moves; a head's grow with its classes."""
    return {name: len(parameter) for name, parameter in trainable(model).items() if parameter.dim()}
