"""The classes of an encoder's head: what a task asks, and a row for each label, old ones bit for bit as they were.

What `transformers` has no field for is in `config.retain`: see `Plan`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from retain.data.labels import Kind, Labels, read_labels
from retain.errors import CompatibilityError, DataError
from retain.models.family import pretrained
from retain.types import Task

__all__ = [
    "Plan",
    "bare",
    "classifiers",
    "grow",
    "kind_of",
    "labelled",
    "labels_in",
    "name_rows",
    "new_modules",
    "plan_of",
    "pooled_token",
    "resize",
    "spread",
    "type_of",
]

CLASSIFIER = re.compile(r"(?:^|\.)classifier(?:\.original_module|\.modules_to_save\.\w+)?(?:\.out_proj)?$")
"""The last layer of a classifier's head, and PEFT's copies of it."""

MULTI, TAGGED = ("label_f1",), ("tag_accuracy", "tag_f1")
"""Metrics of rows that have any number of labels, and of rows whose words have one each."""

SAID = {"": "text", "single": "a label a row", "multi": "any number of labels a row", "tokens": "a label a word"}
"""Kinds in words."""

LEAST_SHARE = 2
"""Rows that a label has on average, at least: else the answers are no labels."""


@dataclass(frozen=True)
class Plan:
    """What `config.retain` holds of a model.

    Args:
        heads: the modules that have new weights, which every tuning method trains.
        tasks: the labels of each task, as it names them.
        per_task: does each task have a head of its own? A row is then called `task/label`.
    """

    heads: Sequence[str] = ()
    tasks: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    per_task: bool = False


def bare(model: nn.Module) -> PreTrainedModel:
    """The `transformers` model, whatever PEFT put around it."""
    return pretrained(model.get_base_model() if isinstance(model, PeftModel) else model)


def plan_of(model: nn.Module) -> Plan:
    """What the model's configuration says of its heads."""
    return Plan(**vars(bare(model).config).get("retain", {}))


def new_modules(model: nn.Module) -> list[str]:
    """The modules with weights that were made for the model's tasks, by the bare model's names; none of a decoder."""
    return list(plan_of(model).heads)


def type_of(model: nn.Module) -> str:
    """`sequence`, `token`, `masked`, or nothing for an encoder without a head."""
    name = type(bare(model)).__name__
    endings = {"ForSequenceClassification": "sequence", "ForTokenClassification": "token", "ForMaskedLM": "masked"}
    return next((kind for ending, kind in endings.items() if name.endswith(ending)), "")


def pooled_token(model: nn.Module) -> int | None:
    """The token whose state a classifier of rows reads, the first one; None of any other model."""
    return bare(model).config.bos_token_id if type_of(model) == "sequence" else None


def labels_in(model: nn.Module) -> Labels:
    """The labels that the model knows."""
    config, plan = bare(model).config, plan_of(model)
    if type_of(model) not in ("sequence", "token"):
        return Labels()
    kind: Kind = "single"
    if type_of(model) == "token":
        kind = "tokens"
    elif config.problem_type == "multi_label_classification":
        kind = "multi"
    tasks = {task: tuple(labels) for task, labels in plan.tasks.items()}
    return Labels(kind, {label: int(row) for label, row in (config.label2id or {}).items()}, tasks, plan.per_task)


def kind_of(task: Task) -> Kind:
    """What a task asks of a head: by its metric, else one label of each row; nothing where its rows are raw text."""
    rows = task.train or task.test
    if rows and all(not example.messages for example in rows):
        return ""
    if task.metric in MULTI:
        return "multi"
    return "tokens" if task.metric in TAGGED else "single"


def labels_of(task: Task) -> tuple[str, ...]:
    """The labels of a task: its choices, else all that its training rows have.

    Raises:
        DataError: the answers are no labels.
    """
    if task.choices:
        return task.choices
    kind = kind_of(task)
    try:
        found = {
            label
            for example in task.train
            for label in {"multi": read_labels, "tokens": str.split}.get(kind, lambda answer: (answer,))(example.answer)
        }
    except ValueError as error:
        raise DataError(f"task {task.name!r}: an answer is no list of labels", problems=[str(error)]) from error
    if not found or len(found) * LEAST_SHARE > max(len(task.train), 2 * LEAST_SHARE):
        raise DataError(
            f"task {task.name!r}: an encoder answers with labels, and these answers are none",
            problems=[f"{len(task.train)} rows have {len(found)} different answers"],
            hint="list the labels in `choices`; or use a model that writes text, such as `smollm2-135m`",
        )
    return tuple(sorted(found))


def labelled(known: Labels, task: Task) -> Labels:
    """The labels that a head tells apart once it has a row for each of the task's, new rows last.

    Raises:
        DataError: the answers are no labels.
    """
    own = labels_of(task)
    keys = dict.fromkeys([*known.ids, *(known.key(task.name, label) for label in own)])
    ids = {key: row for row, key in enumerate(keys)}
    return replace(known, kind=kind_of(task), ids=ids, tasks={**known.tasks, task.name: own})


def classifiers(model: nn.Module) -> list[nn.Linear]:
    """The last layer of the classifier, and PEFT's copies of it."""
    return [
        module for name, module in model.named_modules() if CLASSIFIER.search(name) and isinstance(module, nn.Linear)
    ]


def spread(model: PreTrainedModel) -> float:
    """The standard deviation of new weights."""
    return float(model.config.to_dict().get("initializer_range", 0.02))


def grow(model: nn.Module, task: Task, *, seed: int) -> None:
    """Give the classifier a row for each label of the task that it does not know; the others stay bit for bit.

    Raises:
        CompatibilityError: the task asks for another kind of head.
    """
    kind, known = kind_of(task), labels_in(model)
    if not kind:
        return
    if known.kind != kind:
        raise CompatibilityError(
            f"task {task.name!r} asks for {SAID[kind]}, and the model's head is made for {SAID[known.kind]}",
            hint="begin a lineage of its own for it",
        )
    after, own = labelled(known, task), bare(model)
    names = list(after.ids)
    vars(own.config)["retain"] = asdict(
        replace(plan_of(model), tasks={name: list(labels) for name, labels in after.tasks.items()})
    )
    for layer in classifiers(model):
        resize(layer, names, seed=seed, std=spread(own))
    name_rows(own, names)


def name_rows(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Write the rows' labels into the model's configuration, where `transformers` reads them."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: row for row, name in enumerate(names)}
    vars(model)["num_labels"] = len(names)


@torch.no_grad()
def resize(layer: nn.Linear, names: Sequence[str], *, seed: int, std: float) -> None:
    """Give a layer a row for each name: the first ones stay bit for bit, new ones are drawn.

    Args:
        layer: with as many rows or fewer; more are cut.
        names: of all rows.
        seed: a new row depends on it and on the row's name alone.
        std: of a new row's weights; its bias is 0.
    """
    known = min(len(layer.weight), len(names))
    weight = layer.weight.new_zeros(len(names), layer.in_features)
    weight[:known] = layer.weight[:known]
    for row in range(known, len(names)):
        digest = blake2b(f"{seed}/{names[row]}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        weight[row] = std * torch.randn(layer.in_features, generator=generator, dtype=torch.float64).to(weight)
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]  its stub forgets `bias=False`
        bias = layer.bias.new_zeros(len(names))
        bias[:known] = layer.bias[:known]
        layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
    layer.out_features = len(names)
