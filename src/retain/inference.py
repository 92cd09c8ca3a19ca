"""A model that only answers: a stage of a lineage, or any model by name."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from retain import distributed
from retain.config import RunConfig, load_config
from retain.data.rendering import Renderer
from retain.data.tasks import TaskConfig, load_task
from retain.errors import ConfigError
from retain.evaluation.evaluate import Evaluation, EvaluationConfig, evaluate
from retain.lineage import Lineage
from retain.memory import take_memory
from retain.models.family import Family, pretrained
from retain.models.source import Source, open_source
from retain.parameters import cast_frozen
from retain.strategies.strategy import Strategy
from retain.task_view import BoundTask
from retain.types import Example, Message, Sampling, Task

__all__ = [
    "Answering",
    "answer",
    "base_source",
    "load_for_answering",
    "load_renderer",
    "load_stage",
    "rows_to_score",
    "score",
]


@dataclass(frozen=True)
class Answering:
    """A model in evaluation mode, and all that it takes to ask it."""

    model: nn.Module
    family: Family
    renderer: Renderer
    notice: str = ""
    """What the base model's licence asks to be shown."""
    strategy: Strategy = field(default_factory=Strategy)
    """By which the model answers for a task."""
    view: BoundTask | None = None
    """What the strategy reads a prompt by, where nobody names its task; None where it needs no names."""
    learned: tuple[str, ...] = ()
    """The tasks that the model has learned."""

    def for_task(self, name: str) -> nn.Module:
        """The model that answers for a task.

        Raises:
            ConfigError: if the model was never taught a task of that name; `base` and no name are the base model.
        """
        if name not in ("", "base", *self.learned):
            raise ConfigError(
                f"the model has learned no task `{name}`", hint=f"its tasks are {', '.join(self.learned) or 'none'}"
            )
        return self.strategy.select(self.model, name)

    def infer_tasks(self, rows: Sequence[Example]) -> list[str]:
        """The learned task that each row's prompt seems to be of; no names where the strategy needs none."""
        return [""] * len(rows) if self.view is None else self.strategy.infer_tasks(self.model, self.view, rows)


def base_source(lineage: Lineage, config: RunConfig) -> Source:
    """The base model of a lineage."""
    model = config.model
    folder = None if model.name else lineage.stage_folder(0) / "model"
    return open_source(model.name, model.family, folder=folder, trust_remote_code=model.trust_remote_code)


def load_base(source: Source, template: str = "auto", *, seed: int = 0) -> tuple[nn.Module, Renderer]:
    """A base model and its renderer; the model stops at the renderer's stop tokens."""
    model, tokenizer = source.load((), seed=seed)
    renderer = Renderer(tokenizer, template)
    if source.family.generates:
        pretrained(model).generation_config.eos_token_id = list(renderer.stop_ids)
    return model, renderer


def load_stage(lineage: Lineage, stage: int | None = None) -> tuple[Answering, RunConfig]:
    """The model that a stage of a lineage is, its hashes checked; the head where no stage is named.

    Raises:
        LineageError: if there is no such stage, or it is damaged.
    """
    config = load_config(lineage.path / "config.yaml", check_files=False).config
    index = lineage.head if stage is None else stage
    folder = lineage.verified_folder(index)
    source = base_source(lineage, config)
    model, renderer = load_base(source, config.model.template, seed=config.train.seed)
    saved = folder / "weights" if index else None
    model = source.family.equip(model, renderer, (), seed=config.train.seed, saved=saved)
    if index == 0:
        return Answering(model.to(distributed.device()).eval(), source.family, renderer, source.notice), config
    line = [info.name for info in lineage.log(index)[1:]]
    config.strategy.bind(config.method, learned=line)
    model = config.method.load(model, folder / "weights")
    model, _ = take_memory(config.strategy, model, folder)
    model = model.to(distributed.device()).eval()
    train = config.train
    view = BoundTask(
        name="", examples=(), family=source.family, renderer=renderer, method=config.method, packed=False,
        max_length=train.max_length, max_tokens=train.max_tokens_per_batch, seed=train.seed,
        precision=distributed.resolve_precision("auto"),
    )  # fmt: skip
    if config.strategy.needs_task_name:
        return Answering(model, source.family, renderer, source.notice, config.strategy, view, tuple(line)), config
    return Answering(model, source.family, renderer, source.notice, learned=tuple(line)), config


def load_for_answering(target: str, *, stage: int | None = None) -> Answering:
    """A lineage's stage, its frozen weights in the precision in which they were trained on, or any model.

    Args:
        target: a lineage's folder, or a model as `models.hub.resolve` takes it.
        stage: which stage of a lineage; the head where None.

    Raises:
        UserError: if it is neither, or there is no such stage.
    """
    path = Path(target).expanduser()
    if (path / "lineage.json").exists():
        found = load_stage(Lineage.open(path), stage)[0]
        if distributed.resolve_precision("auto") == "bf16":
            cast_frozen(found.model, torch.bfloat16)  # else each pass would cast all of them again
        return found
    source = open_source(target)
    model, renderer = load_base(source)
    model = source.family.equip(model, renderer, (), seed=0)
    return Answering(model.to(distributed.device()).eval(), source.family, renderer, source.notice)


def load_renderer(target: str, template: str = "auto") -> tuple[Family, Renderer]:
    """A model's family and renderer without its weights.

    Args:
        target: as for `load_for_answering`, or a recipe, whose model may start from nothing.
        template: how conversations are rendered; where `auto`, as the recipe or the lineage says.

    Raises:
        UserError: if it is none of these.
    """
    path = Path(target).expanduser()
    examples: list[Example] = []
    if (path / "lineage.json").exists():
        config = load_config(path / "config.yaml", check_files=False).config
        source, own = base_source(Lineage.open(path), config), config.model.template
    elif path.suffix in (".yaml", ".yml"):
        config = load_config(path).config
        own, model = config.model.template, config.model
        source = open_source(model.name, model.family, trust_remote_code=model.trust_remote_code)
        if source.folder is None:
            examples = [row for entry in config.tasks for row in load_task(entry, seed=config.train.seed).task.train]
    else:
        source, own = open_source(target), "auto"
    folder, family = source.folder, source.family
    tokenizer = family.create(examples, seed=0)[1] if folder is None else family.load_tokenizer(folder)
    return family, Renderer(tokenizer, own if template == "auto" else template)


def rows_to_score(data: str, *, metric: str = "auto", limit: int | None = None, seed: int = 0) -> Task:
    """The rows of a file, or a sample of them, as a task that is only scored."""
    entry = TaskConfig(
        name=Path(data).stem, train=data, test=data, metric=metric, max_train_rows=1, max_test_rows=limit
    )
    return load_task(entry, seed=seed).task


def score(target: Answering, tasks: Sequence[Task], *, probes: bool = True, seed: int = 0) -> Evaluation:
    """Score a model on tasks, and on the probes where asked.

    Where each task has a column, a task that was learned is scored by its own, and every task once more as
    `inferred:<task>`; one of another name is scored by the base model.
    """
    config = EvaluationConfig(probes=probes and target.family.generates, kl=False)
    with distributed.autocast(distributed.resolve_precision("auto")):
        return evaluate(
            target.for_task("base"), tasks, family=target.family, renderer=target.renderer, config=config, seed=seed,
            select=lambda name: target.for_task(name if name in target.learned else "base"), infer=target.infer_tasks,
            unnamed=[task.name for task in tasks] if target.view is not None else (),
        )  # fmt: skip


def answer(
    target: Answering,
    messages: Sequence[Message],
    *,
    task: str = "",
    temperature: float = 0.0,
    max_new_tokens: int = 256,
) -> str:
    """The model's next turn in a conversation; where each task has a column, by that of `task` or the likeliest one."""
    with distributed.autocast(distributed.resolve_precision("auto")):
        asked = Example(id="", messages=(*messages, Message("assistant", "")))
        model = target.for_task(task or target.infer_tasks([asked])[0])
        [text] = target.family.answer(
            model, target.renderer, [messages],
            max_new_tokens=max_new_tokens, sampling=Sampling(temperature, top_p=0.95),
        )  # fmt: skip
    return text.strip()
