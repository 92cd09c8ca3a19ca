"""All that is alive while a lineage grows: the model, the strategy's memory, the tasks, and how they are scored."""

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from retain import distributed
from retain.config import RunConfig, settings
from retain.data.rendering import Renderer
from retain.evaluation.divergence import Distribution
from retain.evaluation.evaluate import Evaluation, evaluate
from retain.lineage import Lineage
from retain.memory import take_memory
from retain.models.family import pretrained
from retain.models.source import Source
from retain.parameters import cast_frozen
from retain.provenance import provenance
from retain.strategies.strategy import Strategy
from retain.task_view import BoundTask
from retain.trainer import Observer, train_helper
from retain.types import Example, StageRecord, Task

__all__ = ["Experiment", "open_experiment", "read_distribution"]

log = logging.getLogger("retain")


@dataclass
class Experiment:
    """All that is alive while a lineage grows."""

    config: RunConfig
    lineage: Lineage
    source: Source
    strategy: Strategy
    renderer: Renderer
    model: nn.Module
    tasks: list[Task]
    observers: Sequence[Observer] = ()
    sources: Mapping[str, str] = field(default_factory=dict[str, str])  # where each setting came from
    distribution: Distribution | None = None  # what the base model expects on general texts
    earlier: list[StageRecord] = field(default_factory=list[StageRecord])  # see `score_earlier`
    unprepared: list[Strategy] = field(default_factory=list[Strategy])  # new on this lineage, so without any memory

    @property
    def precision(self) -> str:
        """`bf16` or `fp32`."""
        return distributed.resolve_precision(self.config.train.precision)

    @property
    def learned(self) -> set[str]:
        """The names of the tasks on the line."""
        return {stage.name for stage in self.lineage.log()}

    def view(self, name: str, examples: Sequence[Example]) -> BoundTask:
        """A task as the loop and the strategy see it."""
        train, family, method = self.config.train, self.source.family, self.config.method
        return BoundTask(
            name=name,
            examples=family.unfold(examples),
            family=family,
            renderer=self.renderer,
            method=method,
            max_length=train.max_length,
            max_tokens=train.max_tokens_per_batch,
            packed=train.packing != "never" and family.isolates_documents and method.packs,
            precision=self.precision,
            seed=train.seed,
            on_overflow=train.on_overflow,
            overflow_threshold=train.overflow_threshold,
            learn=partial(train_helper, config=train),
        )

    def evaluate(
        self, tasks: Sequence[Task] | None = None, *, probes: bool = True, learned: Sequence[str] = ()
    ) -> Evaluation:
        """Score the model as it stands: the tasks, and the probes and the KL to the base model where asked.

        Args:
            tasks: where None, those of the experiment's that the recipe's `evaluation.matrix` asks for.
            probes: ask them, and measure the KL.
            learned: the tasks learned so far; where the strategy needs names, they are scored once more with their
                names inferred.
        """
        config = self.config.evaluation
        probes = probes and self.source.family.generates
        if tasks is None:
            tasks = self.due(learned)
        with distributed.autocast(self.precision):
            return evaluate(
                self.strategy.select(self.model, "base"),
                tasks,
                family=self.source.family,
                renderer=self.renderer,
                config=config if probes else replace(config, probes=False, kl=False),
                base=self.distribution,
                seed=self.config.train.seed,
                select=lambda name: self.strategy.select(self.model, name),
                infer=lambda rows: self.strategy.infer_tasks(self.model, self.view("", ()), rows),
                unnamed=learned if self.strategy.needs_task_name else (),
            )

    def due(self, learned: Sequence[str]) -> list[Task]:
        """The tasks to score once these are learned, in order; none are: the base model, which is asked all."""
        matrix = self.config.evaluation.matrix
        if matrix == "full" or not learned:
            return self.tasks
        among = learned if matrix == "lower" or learned[-1] == self.tasks[-1].name else learned[-1:]
        return [task for task in self.tasks if task.name in among]

    def describe(self, started: float, *, rows: Sequence[Example], **more: Any) -> dict[str, Any]:
        """The provenance of a stage that began at `time.perf_counter() == started`."""
        return provenance(
            method=self.config.method_name,
            strategy=self.config.strategy_name,
            seed=self.config.train.seed,
            precision=self.precision,
            seconds=time.perf_counter() - started,
            examples=rows,
            settings=settings(self.config, self.sources),
            **more,
        )


def open_experiment(
    config: RunConfig,
    lineage: Lineage,
    source: Source,
    tasks: list[Task],
    observers: Sequence[Observer] = (),
    sources: Mapping[str, str] | None = None,
) -> Experiment:
    """Load the base model, and on it the weights and the memory of the lineage's head."""
    model, tokenizer = source.load([row for task in tasks for row in task.train], seed=config.train.seed)
    renderer = Renderer(tokenizer, config.model.template)
    if source.family.generates:  # saved with the model: it stops elsewhere too
        pretrained(model).generation_config.eos_token_id = list(renderer.stop_ids)
    head = lineage.stage_folder(lineage.head) / "weights" if lineage.head > 0 else None
    model = source.family.equip(model, renderer, tasks, seed=config.train.seed, saved=head)
    torch.manual_seed(config.train.seed)  # of a new adapter
    experiment = Experiment(
        config=config,
        lineage=lineage,
        source=source,
        strategy=copy.deepcopy(config.strategy),  # the recipe's stays without memory
        renderer=renderer,
        model=model.to(distributed.device()),
        tasks=tasks,
        observers=observers,
        sources=sources or {},
    )
    experiment.strategy.bind(config.method, learned=[stage.name for stage in lineage.log()[1:]])
    if lineage.head >= 0:
        take_head(experiment)
    else:
        experiment.model = config.method.apply(experiment.model)
    if experiment.precision == "bf16":
        cast_frozen(experiment.model, torch.bfloat16)
    experiment.model.eval()
    return experiment


def read_distribution(lineage: Lineage) -> Distribution | None:
    """What the lineage's base model expects on general texts; None where the KL is not measured."""
    path = lineage.stage_folder(0) / "distribution.safetensors"
    return Distribution.load(path) if path.exists() else None


def take_head(experiment: Experiment) -> None:
    """Give the base model the head's weights and the strategy its memory; score tasks that earlier stages never saw."""
    lineage, method = experiment.lineage, experiment.config.method
    head = lineage.stage_folder(lineage.head)
    experiment.distribution = read_distribution(lineage)
    seen = lineage.load_stage(0).scores
    new = [task for task in experiment.tasks if task.name not in seen and task.name not in experiment.learned]
    if new:
        experiment.model.eval()
        experiment.earlier.append(score_earlier(experiment, 0, new))
    if lineage.head == 0:
        experiment.model = method.apply(experiment.model)
    else:
        experiment.model = method.load(experiment.model, head / "weights").to(distributed.device())
    experiment.model, experiment.unprepared = take_memory(experiment.strategy, experiment.model, head)
    if new and lineage.head > 0:
        experiment.model.eval()
        experiment.earlier.append(score_earlier(experiment, lineage.head, new))


def score_earlier(experiment: Experiment, index: int, tasks: Sequence[Task]) -> StageRecord:
    """What an earlier stage scores on tasks that the lineage did not know then."""
    log.info("scoring the new tasks on stage %d", index)
    evaluation = experiment.evaluate(tasks, probes=False)
    name = next(stage.name for stage in experiment.lineage.log() if stage.index == index)
    return StageRecord(index, name, evaluation.scores, tuple(evaluation.answers))
