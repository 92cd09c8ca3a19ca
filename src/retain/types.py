"""The values that pass between the parts: frozen, without behaviour beyond reading themselves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = [
    "GREEDY",
    "IGNORED",
    "Answer",
    "Batch",
    "Encoded",
    "Example",
    "Message",
    "Probe",
    "Record",
    "Sampling",
    "Score",
    "StageRecord",
    "StepInfo",
    "Task",
]

IGNORED = -100
"""The target of an output that is not trained (transformers' convention)."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Args:
        role: `system`, `user`, `assistant` or `tool`.
        content: its text.
        weight: how much its tokens count in the loss; only an assistant's turn is ever trained.
    """

    role: str
    content: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a conversation that ends in the assistant's answer, or raw text.

    Args:
        id: identifies the row's content; equal rows have equal ids.
        messages: the conversation; empty where `text` is given.
        text: raw text, trained whole; empty where `messages` are given.
        choices: the labels that the answer is chosen from, where there are any.
        references: further right answers.
        weight: how much the row counts in the loss.
        source: `task`, `replay` (an old task's row) or `generated` (a model's own text).
        task: the name of the task that it came from.
    """

    id: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    weight: float = 1.0
    source: str = "task"
    task: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last message's text: what the model should say. The text itself for raw text."""
        return self.messages[-1].content if self.messages else self.text


@dataclass(frozen=True, slots=True)
class Task:
    """What is learned at one stage.

    Args:
        name: unique within a lineage.
        train: rows to train on.
        test: rows to score; never trained on.
        validation: rows for early stopping and evaluation during training.
        metric: a name in `evaluation.scoring.METRICS`.
        choices: the label set of the whole task, where it is a classification.
        max_new_tokens: how long a generated answer may become.
    """

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...] = ()
    validation: tuple[Example, ...] = ()
    metric: str = "exact_match"
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as the model sees it.

    Args:
        example: where it came from.
        inputs: token ids by the model's argument name; `input_ids` always.
        targets: what the output at each position must predict (already shifted where the family shifts);
            `IGNORED` where nothing is trained. As long as the sequence that the loss is read from.
        weights: the loss weight of every position, as long as `targets`.
        num_truncated: tokens that `max_length` cut off.
    """

    example: Example
    inputs: Mapping[str, list[int]]
    targets: list[int]
    weights: list[float]
    num_truncated: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the model."""
        return sum(len(ids) for name, ids in self.inputs.items() if name.endswith("input_ids"))

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return sum(target != IGNORED for target in self.targets)


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: one forward pass.

    Args:
        inputs: the keyword arguments of the model's forward pass.
        targets: (rows, length), what each output must predict, or `IGNORED`.
        documents: (rows, length), which of `examples` each output belongs to; -1 for padding.
        weights: (num_targets,), the loss weight of each counted target, in row-major order.
        examples: the examples, in the order that `documents` counts them.
    """

    inputs: Mapping[str, Tensor]
    targets: Tensor
    documents: Tensor
    weights: Tensor
    examples: tuple[Example, ...]

    @property
    def counted(self) -> Tensor:
        """(rows, length), true where a target counts."""
        return self.targets != IGNORED

    @property
    def target_documents(self) -> Tensor:
        """(num_targets,), the example of each counted target."""
        return self.documents[self.counted]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.documents >= 0).sum())


@dataclass(frozen=True, slots=True)
class Sampling:
    """How text is drawn from a model.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among so many likeliest tokens; 0 sets no limit.
        top_p: sample among the likeliest tokens that hold this much probability, in (0, 1].
        repetition_penalty: divides the odds of tokens that are there already; 1 does nothing.
        seed: all that the draws depend on.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


GREEDY = Sampling()
"""The likeliest token, always."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A question about a general ability: which continuation of the context is likeliest?"""

    id: str
    ability: str
    language: str
    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one example, and how good it was.

    Args:
        suite: the task's name, or `probe:` and the ability.
        id: the example's id: the same example keeps it from stage to stage, so that statistics can be paired.
        prompt: what was asked, as a person reads it.
        expected: the right answer.
        answer: the model's.
        score: the metric of this one example.
        margin: nats by which the right choice is likelier than all others together; None where nothing was chosen.
    """

    suite: str
    id: str
    prompt: str
    expected: str
    answer: str
    score: float
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """A suite's figure after one stage.

    Args:
        value: the mean over its examples (or the corpus figure, where the metric is one).
        metric: the metric's name.
        num: how many examples.
        low, high: the 95 % confidence interval of `value` over examples.
        margin: the mean margin in nats, for choices.
        chance: what guessing reaches; None where guessing has no meaning.
    """

    value: float
    metric: str
    num: int
    low: float
    high: float
    margin: float | None = None
    chance: float | None = None


@dataclass(frozen=True, slots=True)
class StepInfo:
    """One optimizer step, for those that only look: progress, tracking, early stop.

    Losses are nats a target of the step's data; `penalty` is the strategy's, in the same unit as the loss.
    """

    task: str
    step: int
    num_steps: int
    epoch: float
    loss: float
    penalty: float
    learning_rate: float
    gradient_norm: float
    num_tokens: int
    num_targets: int
    seconds: float
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True)
class StageRecord:
    """All that is kept of a stage besides weights and memory.

    Args:
        index: 0 for the base model.
        name: `base`, or the task's name.
        scores: by suite: tasks, `probe:` abilities, `probes` (all of them) and `kl` (to the base model, nats a token).
        answers: one an example of every suite.
        history: one `StepInfo` a logged step.
        provenance: seed, versions, data hash, seconds, tokens, where each setting came from.
    """

    index: int
    name: str
    scores: Mapping[str, Score]
    answers: tuple[Answer, ...] = ()
    history: tuple[StepInfo, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Record:
    """A lineage as the report reads it: its stages in order, and what they share."""

    title: str
    model: str
    method: str
    strategy: str
    tasks: tuple[str, ...]
    stages: tuple[StageRecord, ...]
    notes: tuple[str, ...] = ()
