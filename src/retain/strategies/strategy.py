"""What protects old abilities: the places where a continual-learning method may touch learning, and their sum.

One optimizer step calls the places in this order; `trainer.train_task` is the only caller in this package, and
`retain.strategies` needs nothing but torch, so any other loop can call them the same way.

    loss_term        each micro-batch, before backward
    edit_gradients   the data loss's gradients, complete and unclipped
    add_penalty      once a step, adds its own gradient in place
    after_step       after the optimizer moved the weights
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from retain.kernels.low_rank import LowRank
from retain.types import Batch, Example, Sampling

__all__ = ["ModelOutputs", "State", "Strategy", "TaskMethod", "TaskView"]

State = dict[str, Any]
"""A strategy's memory: tensors, lists of `Example`, and what JSON can hold, by name."""


class ModelOutputs(Protocol):
    """What a strategy may know of a forward pass (`models.family.Outputs` in this package)."""

    @property
    def hidden(self) -> Tensor:
        """(num_targets, width), what the output head is given, in the order of the batch's counted targets."""
        ...

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """(n, width) -> (n, vocabulary), the output head; for terms that never hold the logits of all targets."""
        ...

    @property
    def classes(self) -> Tensor | None:
        """(num_targets, logits of each), the class that each logit is of; None where they are of tokens.

        A classifier's head wants all of `hidden` at once. Its classes are counted in the order in which it got them.
        """
        ...

    def logits(self) -> Tensor:
        """(num_targets, vocabulary): the head of `hidden`."""
        ...


class TaskMethod(Protocol):
    """The structural operations of the tuning method, as far as strategies use them (`methods.method.Method`)."""

    # As methods declare them: to a type checker, a property here would be another kind of member.
    name: ClassVar[str]
    can_detach: ClassVar[bool]  # is the base's own behaviour still there, without a second model?
    can_extend: ClassVar[bool]  # may there be several modules beside the frozen base?
    no_products: ClassVar[str]  # why its changes, which seem to be products of two factors, are none; else empty

    def detached(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The base model's own behaviour while inside."""
        ...

    def modules(self, model: nn.Module) -> list[str]:
        """The names of the modules that the method put beside the base, oldest first."""
        ...

    def extend(self, model: nn.Module, name: str) -> nn.Module:
        """Add a module that reads, or is added to, those that are active; it becomes active, and only it is trained."""
        ...

    def activate(self, model: nn.Module, names: Sequence[str]) -> nn.Module:
        """Let exactly these modules take part, the last one answering; none: the base's own behaviour."""
        ...

    def low_rank(self, model: nn.Module) -> Sequence[LowRank]:
        """The changes of frozen weights that are trained as products of two factors; empty where there are none."""
        ...


class TaskView(Protocol):
    """All that a strategy is given of a task; never the trainer."""

    @property
    def name(self) -> str:
        """The task's name; `base` for stage 0."""
        ...

    @property
    def examples(self) -> Sequence[Example]:
        """The task's own rows."""
        ...

    @property
    def seed(self) -> int:
        """The run's seed."""
        ...

    @property
    def method(self) -> TaskMethod:
        """The tuning method."""
        ...

    def num_tokens(self, example: Example) -> int:
        """Tokens of the example as the model sees it."""
        ...

    def batches(self, examples: Sequence[Example], *, max_tokens: int | None = None) -> Iterator[Batch]:
        """This process's share of the examples, in order, as micro-batches on the model's device."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> ModelOutputs:
        """One pass."""
        ...

    def loss(self, outputs: ModelOutputs, batch: Batch) -> Tensor:
        """Nats, weighted and summed over counted targets."""
        ...

    def loglikelihood(self, model: nn.Module, examples: Sequence[Example]) -> list[float]:
        """Log p of each example's trained tokens given the others, nats; of all examples, on every process."""
        ...

    def embed(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """(examples, width), float32 on the CPU: what the head reads, averaged over each example's trained tokens."""
        ...

    def fit(self, model: nn.Module, examples: Sequence[Example]) -> nn.Module:
        """Train a helper network of the same family on other rows, with the run's loop and settings."""
        ...

    def generate(
        self, model: nn.Module, prompts: Sequence[Example], *, max_new_tokens: int, sampling: Sampling
    ) -> list[str]:
        """What the model answers to each prompt, or how it continues each text."""
        ...


class Strategy:
    """Plain sequential fine-tuning; override only the places that your paper touches.

    A strategy is a dataclass: its fields are its configuration. Its memory is kept outside the fields and comes and
    goes through `state_dict` and `restore`.
    """

    name: ClassVar[str] = ""
    needs_gradients: ClassVar[bool] = True
    """False where the strategy acts on data alone, so that families that learn by counting can use it."""
    needs_task_name: ClassVar[bool] = False
    """Must the task be named when answering? The report says so."""
    reference: ClassVar[str] = ""
    """The paper."""
    watches_gradients: ClassVar[bool] = False
    """`edit_gradients` only looks (SI). In a `Chain` those that watch come before those that change."""
    remembers: ClassVar[bool] = True
    """Does `after_task` keep anything? Where it does not, nothing is written for stage 0."""
    moves_weights: ClassVar[bool] = False
    """`after_step` moves weights (projection, proximal steps). In a `Chain` those come before those that watch."""
    grows: ClassVar[bool] = False
    """`before_task` adds new weights. In a `Chain` those come first, so that the others see the model as it will be."""
    merges: ClassVar[bool] = False
    """`after_task` moves weights (averaging). In a `Chain` those come first, and the others keep what stays."""
    copies_network: ClassVar[bool] = False
    """It keeps a second network of the model's shape, so a `Chain` refuses it beside one that grows the model."""
    reads_text: ClassVar[bool] = False
    """It writes rows like those that it reads, so it needs them as conversations or text, not as token ids."""
    writes: ClassVar[bool] = False
    """It lets the model write text, so it needs one that can."""
    stands_alone: ClassVar[bool] = False
    """It replaces the training that others protect, so a `Chain` refuses it."""

    @property
    def steps_factor(self) -> float:
        """How many tasks' worth of optimizer steps the next task's mixture stands for."""
        return 1.0

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know of how the latest task was protected, one sentence each; kept with the stage."""
        return ()

    def supports(self, method: TaskMethod) -> str | None:
        """Why the strategy cannot work with the tuning method, or None."""
        return None

    def bind(self, method: TaskMethod, *, learned: Sequence[str] = ()) -> None:
        """Take the tuning method, by which `select` switches modules; called before anything else.

        Args:
            method: of the model.
            learned: the tasks that the model has learned, by whatever strategy.
        """

    def before_task(self, model: nn.Module, task: TaskView) -> nn.Module:
        """Change the architecture or the starting point; the optimizer is made afterwards."""
        return model

    def mix_examples(self, task: TaskView, epoch: int) -> Sequence[Example]:
        """The rows of an epoch, before batching; the same call gives the same rows."""
        return task.examples

    def loss_term(self, model: nn.Module, batch: Batch, outputs: ModelOutputs) -> Tensor | None:
        """A term of the micro-batch's loss: nats, summed over its counted targets."""
        return None

    def edit_gradients(self, model: nn.Module) -> None:
        """Watch or change the data loss's gradients: complete, unclipped, without any penalty's."""

    def add_penalty(self, model: nn.Module) -> Tensor | None:
        """Add the penalty's gradient to `.grad` in place and return the penalty's value, a scalar without graph."""
        return None

    def after_step(self, model: nn.Module, learning_rate: float) -> None:
        """Look at, or correct, what the optimizer moved."""

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Consolidate: Fisher, memory, teacher. Called for the base model first, as the task `base`."""

    def select(self, model: nn.Module, task_name: str) -> nn.Module:
        """The model that answers for a task; for a name that was never learned, as `base`: the base model's part."""
        return model

    def infer_tasks(self, model: nn.Module, task: TaskView, examples: Sequence[Example]) -> list[str]:
        """The learned task that each prompt most likely is of, where `needs_task_name`; else no names.

        Args:
            model: the model after the last task; which of its modules are active afterwards is open.
            task: any view of the run: only its passes are used.
            examples: whose prompts are read; their answers are not.
        """
        return [""] * len(examples)

    def state_dict(self) -> State:
        """All of the memory; what `restore` needs to go on bit for bit, also in the middle of a task."""
        return {}

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take the memory back, rebuilding what `before_task` built."""
        return model
