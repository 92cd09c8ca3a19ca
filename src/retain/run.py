"""The experiment from top to bottom. READ THIS FIRST.

    train         a recipe: stage 0, then its tasks in order
    extend        a lineage that exists: further tasks
    learn_base    stage 0: score the base model, and let the strategy consolidate on it
    learn         one task: train, consolidate, score, hold against the budget, commit

A lineage is all that persists. `train` writes it; `extend` reads it back in a new process and goes on with weights and
memory intact. Interrupted, either goes on from the last checkpoint when it is called again.
"""

import difflib
import logging
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from retain import distributed
from retain.budget import enforce_budget
from retain.config import RunConfig, check_compatibility, dump_config, load_config
from retain.data.self_text import write_self_text
from retain.data.tasks import TaskConfig, load_task
from retain.errors import ConfigError, LineageError
from retain.evaluation.inferred import inferred_notes
from retain.evaluation.task_distance import task_distances
from retain.experiment import Experiment, open_experiment, read_distribution
from retain.inference import base_source
from retain.lineage import EARLIER, BaseModel, Lineage
from retain.models.family import pretrained
from retain.models.seq2seq import SOURCE_TEMPLATES
from retain.models.source import Source, open_source
from retain.storage.files import disk_errors
from retain.storage.stage import write_record
from retain.storage.state import load_state, save_state
from retain.trainer import Observer, train_task
from retain.types import Example, StageRecord, Task

__all__ = ["extend", "train"]

log = logging.getLogger("retain")

UNPROTECTED = "the base model writes no text that could stand for its abilities: `protect_base: FILE` protects it"
UNMEASURED = "probes and the KL to the base model are not measured: the model writes no text"


def train(
    config: RunConfig,
    *,
    observers: Sequence[Observer] = (),
    accept: bool = False,
    base: Lineage | None = None,
    sources: Mapping[str, str] | None = None,
) -> Lineage:
    """Learn a recipe's tasks, one after another, and score everything before the first and after each.

    Args:
        config: the recipe. Its `output_dir` is new, or holds the lineage of the same recipe, which is finished.
        observers: called after every optimizer step.
        accept: commit also what is over the forgetting budget, on the record.
        base: a lineage of the same model and tasks; its base model's scores are taken over instead of made again.
        sources: where each setting came from, for the record.

    Raises:
        BudgetExceeded: a stage lost more than the budget allows; what came before it is committed.
        UserError: the recipe, data or model cannot be used; found before anything heavy starts where it can be.
        KeyboardInterrupt: interrupted; the same call goes on.
    """
    source = open_source(config.model.name, config.model.family, trust_remote_code=config.model.trust_remote_code)
    source.check_learns()
    check_compatibility(config, source.family)
    tasks = load_tasks(config)
    lineage = start_lineage(config, source)
    with writing(lineage, "retain train"):
        experiment = open_experiment(config, lineage, source, tasks, observers, sources)
        if lineage.head < 0:
            learn_base(experiment, shared=base)
        for task in tasks[len(experiment.lineage.log()) - 1 :]:
            learn(experiment, task, accept=accept)
    return lineage


def extend(
    path: Path,
    new: Sequence[TaskConfig] = (),
    *,
    overrides: Sequence[str] = (),
    observers: Sequence[Observer] = (),
    accept: bool = False,
) -> Lineage:
    """Learn further tasks on a lineage, its weights and the strategy's memory as the head left them.

    Args:
        path: the lineage.
        new: tasks to add; none finishes what was interrupted.
        overrides: changed settings, as on the command line.
        observers, accept: as for `train`.

    Raises:
        LineageError: a new task has the name of one that is learned; and all that `train` raises.
    """
    lineage = Lineage.open(path)
    with writing(lineage, "retain continue"):
        loaded = load_config(path / "config.yaml", overrides, check_files=False)
        config, sources = loaded.config, {k: "lineage" if v == "recipe" else v for k, v in loaded.sources.items()}
        learned = {stage.name for stage in lineage.log()}
        named = {task.name for task in new}
        if taken := sorted(learned & named):
            raise LineageError(
                f"task {taken[0]!r} is a stage of {path} already",
                problems=[f"the line is {', '.join(stage.name for stage in lineage.log())}"],
                hint="give the new task a name of its own (`--name`), or roll back to before that stage",
            )
        unfinished = not new or lineage.partial()  # what a rollback left behind is not taken up again
        kept = [task for task in config.tasks if task.name in learned or (unfinished and task.name not in named)]
        config = replace(config, tasks=(*kept, *new), output_dir=path)
        source = base_source(lineage, config)
        check_compatibility(config, source.family)
        tasks = load_tasks(config, lineage)
        if distributed.is_main():
            lineage.save_config(dump_config(config))
        experiment = open_experiment(config, lineage, source, tasks, observers, sources)
        if len(tasks) > len(learned) - 1:
            prepare_late(experiment)
        for task in tasks[len(experiment.lineage.log()) - 1 :]:
            learn(experiment, task, accept=accept)
    return lineage


def prepare_late(experiment: Experiment) -> None:
    """Let strategies that are new on the lineage consolidate on what the model can do now."""
    new = [strategy for strategy in experiment.unprepared if strategy.remembers]
    if not new:
        return
    rows = protected_rows(experiment)
    for strategy in new if rows else ():
        log.info("%s is new here: it consolidates on %d rows of the model as it is", strategy.name, len(rows))
        strategy.after_task(experiment.model, experiment.view("base", rows))


def load_tasks(config: RunConfig, lineage: Lineage | None = None) -> list[Task]:
    """The tasks in order: of those that the lineage learned, what it kept of them; the others from their files."""
    known = lineage.log()[1:] if lineage else []
    tasks = [read_task(lineage.stage_folder(stage.index)) for stage in known] if lineage else []
    for entry in config.tasks:
        if entry.name not in {stage.name for stage in known}:
            loaded = load_task(entry, seed=config.train.seed)
            for note in loaded.notes:
                log.info("task %s: %s", entry.name, note)
            tasks.append(loaded.task)
    return tasks


def keep_task(task: Task, folder: Path) -> None:
    """Keep what later stages need of a task: its test rows and how they are scored."""
    state = {
        "name": task.name,
        "metric": task.metric,
        "choices": list(task.choices),
        "max_new_tokens": task.max_new_tokens,
    }
    save_state({**state, "test": list(task.test)}, folder / "task")


def read_task(folder: Path) -> Task:
    """What `keep_task` kept."""
    state = load_state(folder / "task")
    return Task(
        name=state["name"], train=(), test=tuple(state["test"]), metric=state["metric"],
        choices=tuple(state["choices"]), max_new_tokens=state["max_new_tokens"],
    )  # fmt: skip


def start_lineage(config: RunConfig, source: Source) -> Lineage:
    """A new lineage in the recipe's `output_dir`, or the one there if the same recipe began it."""
    path, text = config.output_dir, dump_config(config)
    if distributed.is_main() and not (path / "lineage.json").exists():
        Lineage.create(path, base=BaseModel(source.name, source.revision, source.hash), config=text)
    distributed.barrier()
    lineage = Lineage.open(path)
    if lineage.config != text:
        raise ConfigError(
            f"output_dir {path} holds the lineage of another recipe",
            problems=differences(lineage.config, text),
            hint=f"`retain continue {path} --data FILE` adds a task to it; or choose another output_dir",
        )
    if lineage.head >= 0:
        log.info("going on with %s: %d of %d tasks are learned", path, len(lineage.log()) - 1, len(config.tasks))
    return lineage


@contextmanager
def writing(lineage: Lineage, command: str) -> Generator[None]:
    """Lock the lineage on the process that writes; what the disk refuses is the user's to repair."""
    with lineage.lock(command) if distributed.is_main() else nullcontext(), disk_errors(lineage.path):
        yield


def differences(old: str, new: str) -> list[str]:
    """The lines of two recipes that differ."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "there", "here", lineterm="", n=0)
    return [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]


def learn_base(experiment: Experiment, *, shared: Lineage | None = None) -> None:
    """Stage 0: score the base model, and let the strategy consolidate on what stands for its abilities.

    Args:
        experiment: with the base model.
        shared: a lineage whose base is the same; its scores are taken over.
    """
    started = time.perf_counter()
    lineage, config = experiment.lineage, experiment.config
    folder = begin(lineage, "base")
    apart = new_distances(experiment)
    if shared is None:
        log.info("scoring the base model")
        evaluation = experiment.evaluate()
        scores, answers, experiment.distribution = evaluation.scores, tuple(evaluation.answers), evaluation.distribution
    else:
        log.info("the base model's scores are those of %s", shared.path)
        record = shared.load_stage(0)
        scores, answers, experiment.distribution = record.scores, record.answers, read_distribution(shared)
    rows = protected_rows(experiment)
    if rows:
        log.info("%s consolidates on %d rows of the base model", config.strategy_name, len(rows))
        experiment.strategy.after_task(experiment.model, experiment.view("base", rows))
    if distributed.is_main():
        with disk_errors(folder):
            if experiment.source.folder is None:  # a model that started from nothing exists nowhere else
                base, _ = experiment.source.load(
                    [row for task in experiment.tasks for row in task.train], seed=config.train.seed
                )  # once more: the experiment's has the method's modules in it by now
                pretrained(base).save_pretrained(folder / "model")
                experiment.renderer.tokenizer.save_pretrained(folder / "model")
            if experiment.distribution is not None:
                experiment.distribution.save(folder / "distribution.safetensors")
            save_state({"rows": list(rows)}, folder / "base_text")
            save_state(experiment.strategy.state_dict(), folder / "memory")
        notes = [*experiment.source.notes, *experiment.renderer.notes, *silent_notes(experiment)]
        described = experiment.describe(started, rows=rows, notes=notes, task_distances=apart)
        lineage.commit(folder, StageRecord(0, "base", scores, answers, provenance=described))
    committed(experiment)


def committed(experiment: Experiment) -> None:
    """Let every process see the stage that the first one has written."""
    distributed.barrier()
    if not distributed.is_main():
        experiment.lineage = Lineage.open(experiment.lineage.path)


def protected_rows(experiment: Experiment) -> tuple[Example, ...]:
    """The rows that stand for the base model: the user's own, or what it writes itself."""
    config = experiment.config
    if config.protect_base == "off" or not experiment.strategy.remembers:
        return ()
    if config.protect_base == "self":
        if experiment.source.folder is None:
            log.info("the base model starts from nothing, so there is nothing of it to protect")
            return ()
        if not experiment.source.family.generates:
            log.info("%s", UNPROTECTED)
            return ()
        log.info("the base model writes %d rows that stand for its abilities", config.protect_rows)
        view = experiment.view("base", ())
        chat = experiment.renderer.tokenizer.chat_template not in (None, *SOURCE_TEMPLATES)
        return write_self_text(experiment.model, view, num=config.protect_rows, seed=config.train.seed, chat=chat)
    entry = TaskConfig(name="base", train=config.protect_base, max_train_rows=config.protect_rows, test_fraction=0.0)
    return tuple(replace(row, source="generated") for row in load_task(entry, seed=config.train.seed).task.train)


def silent_notes(experiment: Experiment) -> list[str]:
    """What is left out for a model that writes no text, one sentence each."""
    config = experiment.config
    if experiment.source.family.generates:
        return []
    base = config.protect_base == "self" and experiment.source.folder is not None and experiment.strategy.remembers
    measured = [UNMEASURED] if config.evaluation.probes or config.evaluation.kl else []
    return [*measured, *([UNPROTECTED] if base else [])]


def new_distances(experiment: Experiment) -> list[dict[str, Any]]:
    """How far apart every two tasks are that no stage has recorded yet; of a learned task its test rows are there."""
    records = [experiment.lineage.load_stage(stage.index) for stage in experiment.lineage.log()]
    recorded = [entry["tasks"] for record in records for entry in record.provenance.get("task_distances", ())]
    rows = {task.name: task.train or task.test for task in experiment.tasks}
    found = task_distances(rows, known={frozenset(pair) for pair in recorded}, seed=experiment.config.train.seed)
    for distance in sorted(found, key=lambda distance: distance.nats.mean):
        log.info("tasks %s", distance)
    return [distance.as_dict() for distance in found]


def learn(experiment: Experiment, task: Task, *, accept: bool = False) -> None:
    """One task: train, consolidate, score, hold against the budget, commit."""
    started = time.perf_counter()
    lineage, config = experiment.lineage, experiment.config
    folder = begin(lineage, task.name)
    apart = new_distances(experiment)
    family = experiment.source.family
    experiment.model = family.prepare(experiment.model, experiment.renderer, task, seed=config.train.seed)
    view = experiment.view(task.name, task.train)
    log.info(
        "learning %s: %d rows with %s and %s", task.name, len(task.train), config.method_name, config.strategy_name
    )
    result = train_task(
        experiment.model,
        view,
        strategy=experiment.strategy,
        config=config.train,
        validation=family.unfold(task.validation),
        observers=experiment.observers,
        folder=folder / "checkpoints",
        keep_last=config.budget.forgetting is not None,
    )
    experiment.model = result.model
    experiment.strategy.after_task(experiment.model, view)
    log.info("scoring after %s", task.name)
    evaluation = experiment.evaluate(learned=[*experiment.learned, task.name])
    index = lineage.next_index
    notes = [*result.notes, *inferred_notes(task.name, evaluation.scores)]
    described = experiment.describe(
        started, rows=task.train, history=result.history, notes=notes, accepted=accept, task_distances=apart
    )
    record = StageRecord(index, task.name, evaluation.scores, tuple(evaluation.answers), result.history, described)
    if distributed.is_main():
        with disk_errors(folder):
            shutil.rmtree(folder / "weights", ignore_errors=True)  # of a commit that was cut short
            config.method.save(experiment.model, folder / "weights")
            if not family.generates:  # beside an adapter, too: the names of its head's rows
                pretrained(experiment.model).config.save_pretrained(folder / "weights")
            experiment.renderer.tokenizer.save_pretrained(folder / "weights")
            save_state(experiment.strategy.state_dict(), folder / "memory")
            keep_task(task, folder)
            for earlier in experiment.earlier:
                write_record(make_folder(folder / EARLIER / f"{earlier.index:04d}"), earlier)
        if not accept:
            line = [lineage.load_stage(stage.index) for stage in lineage.log()]
            enforce_budget(line, record, config.budget.forgetting)
        lineage.commit(folder, record)
    experiment.earlier.clear()
    committed(experiment)


def begin(lineage: Lineage, name: str) -> Path:
    """The folder of the stage in progress, the same on every process."""
    return distributed.gather_objects(lineage.begin(name) if distributed.is_main() else None)[0]


def make_folder(path: Path) -> Path:
    """The folder, made where it is missing."""
    path.mkdir(parents=True, exist_ok=True)
    return path
