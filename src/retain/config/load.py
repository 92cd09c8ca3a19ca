"""From a recipe and the command line to a configuration, or to every problem with it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, get_type_hints

from retain.config.fields import build, checked, said_by, shown, suggestion
from retain.config.names import find, make
from retain.config.paths import is_local, missing_file
from retain.config.run_config import Budget, ModelConfig, RunConfig, to_tree
from retain.config.tree import Tree, leaves, read_tree
from retain.data.tasks import TaskConfig
from retain.errors import ConfigError, UserError
from retain.evaluation import METRICS
from retain.evaluation.evaluate import EvaluationConfig
from retain.methods import METHODS
from retain.methods.method import Method
from retain.models import FAMILIES
from retain.models.family import Family
from retain.strategies import STRATEGIES
from retain.strategies.chain import Chain
from retain.strategies.strategy import Strategy
from retain.train_config import TrainConfig

__all__ = ["LoadedConfig", "load_config", "settings"]

DEFAULT_METHOD = "lora"
DEFAULT_STRATEGY = "replay"


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and how it came about.

    Args:
        config: what is run.
        sources: `flag`, `recipe` or `default` of every setting, by its dotted key.
        notes: other tools' spellings that were understood, as sentences.
    """

    config: RunConfig
    sources: Mapping[str, str]
    notes: tuple[str, ...] = ()


def settings(config: RunConfig, sources: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The value of every setting by its dotted key, and where it came from, for the record.

    Args:
        config: what is run.
        sources: as in `LoadedConfig`; a setting that it does not name was `given` in Python.
    """
    found: dict[str, dict[str, Any]] = {}
    tree = to_tree(config)
    for keys in leaves(tree):
        value: Any = tree
        for key in keys:
            value = value[int(key)] if isinstance(value, list) else value[key]
        name = ".".join(keys)
        found[name] = {"value": value, "source": sources.get(name, "given")}
    return found


SECTIONS = frozenset(field.name for field in fields(RunConfig))
RESERVED = ("base", "kl", "probes")


def load_config(path: Path | None, overrides: Sequence[str] = (), *, check_files: bool = True) -> LoadedConfig:
    """Read a recipe and the command line's settings, check everything that can be checked without a model.

    Args:
        path: the recipe; None for settings alone.
        overrides: `train.learning_rate=1e-4`, `strategy.0.ratio=0.1`, in the recipe's keys or another tool's.
        check_files: must the tasks' files exist? A lineage goes on without those that it has learned.

    Raises:
        ConfigError: naming every problem with its path.
    """
    tree = read_tree(path, overrides, SECTIONS)
    config = assemble(tree, check_files=check_files)
    if tree.problems or config is None:
        name = path.name if path else "the command line"
        count = len(tree.problems)
        raise ConfigError(
            f"{name} has {count} problem{'s' if count != 1 else ''}", problems=tree.problems, hint=way_out(tree)
        )
    resolved = to_tree(config)
    sources = {".".join(keys): tree.origin(keys) for keys in leaves(resolved)}
    return LoadedConfig(config, sources, tuple(tree.notes))


def assemble(tree: Tree, *, check_files: bool) -> RunConfig | None:
    """The configuration; with problems, which go into the tree, it is none that can be used."""
    given, problems = tree.values, tree.problems
    model = make_model(given.get("model"), problems)
    method = given.get("method", {})
    method = {"name": DEFAULT_METHOD} | method if isinstance(method, dict) else method
    parts = {
        "method": make(method, METHODS, Method, "$.method", problems),
        "strategy": make_strategy(given.get("strategy", {"name": DEFAULT_STRATEGY}), problems),
        "train": make_section(TrainConfig, given, "train", problems),
        "evaluation": make_section(EvaluationConfig, given, "evaluation", problems),
        "budget": make_section(Budget, given, "budget", problems),
    }
    tasks = make_tasks(given.get("tasks"), problems)
    check_tasks(tasks, problems)
    scalars = make_scalars(given, problems)
    if check_files:
        check_sources(tasks, str(scalars.get("protect_base", "self")), problems)
    try:
        return RunConfig(model=cast("ModelConfig", model), tasks=tuple(tasks.values()), **parts, **scalars)
    except ValueError as error:
        problems.append(f"$.{error}")
        return None


def make_scalars(given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The settings that are one value each."""
    scalars: dict[str, Any] = {"output_dir": Path()}
    for name, hint in get_type_hints(RunConfig).items():
        if name in given and hint in (int, str, Path):
            try:
                scalars[name] = checked(hint, given[name])
            except ValueError as error:
                problems.append(f"$.{name}: {error}")
    if "output_dir" not in given:
        problems.append("$.output_dir: missing; expected the folder for the lineage, like runs/my-model")
    return scalars


def make_section(cls: type, given: Mapping[str, Any], name: str, problems: list[str]) -> Any:
    """The dataclass of a section; its defaults where the section is absent."""
    section = given.get(name, {})
    if isinstance(section, Mapping):
        return build(cls, cast("Mapping[str, Any]", section), f"$.{name}", problems)
    problems.append(f"$.{name}: expected keys with values, got {shown(section)}")
    return None


def make_model(given: Any, problems: list[str]) -> ModelConfig | None:
    """Which model: a name, or a name and the family's own fields."""
    if not isinstance(given, dict):
        said = "missing" if given is None else f"got {shown(given)}"
        problems.append(f"$.model: {said}; expected a folder, a GGUF or ARPA file, an offline model or a hub id")
        return None
    options = cast("dict[str, Any]", given)
    own = {field.name for field in fields(ModelConfig)}
    base = build(ModelConfig, {key: options[key] for key in options if key in own - {"family"}}, "$.model", problems)
    rest = {key: value for key, value in options.items() if key not in own}
    if "family" not in options:
        for key in rest:
            near = suggestion(key, own)
            more = near if near.startswith("Did") else f"{near}, and with `family` the fields of the family"
            problems.append(f"$.model.{key}: unknown key. {more}")
        return base
    chosen = options["family"]
    if not isinstance(chosen, str):
        problems.append(f"$.model.family: expected the name of a family, got {shown(chosen)}")
        return base
    found = find(chosen, FAMILIES, Family, "$.model.family", problems)
    family = None if found is None else build(found, rest, "$.model", problems)
    return None if base is None else replace(base, family=family)


def make_strategy(given: Any, problems: list[str]) -> Strategy | None:
    """One strategy, or a chain of them where a list is given."""
    if not isinstance(given, list):
        return make(given, STRATEGIES, Strategy, "$.strategy", problems)
    items = cast("list[Any]", given)
    made = [make(item, STRATEGIES, Strategy, f"$.strategy[{at}]", problems) for at, item in enumerate(items)]
    if not made:
        problems.append("$.strategy: expected a strategy or a list of them, got an empty list")
    if not made or None in made:
        return None
    try:
        return Chain(*made)
    except (ValueError, UserError) as error:
        problems.extend(f"$.strategy: {line}" for line in said_by(error))
        return None


def make_tasks(given: Any, problems: list[str]) -> dict[int, TaskConfig]:
    """The tasks that could be made, by their position in the recipe."""
    if not isinstance(given, list) or not given:
        said = "missing" if given is None else f"got {shown(given)}"
        problems.append(f"$.tasks: {said}; expected a list of tasks, each with `name` and `train`")
        return {}
    tasks: dict[int, TaskConfig] = {}
    for at, item in enumerate(cast("list[Any]", given)):
        if not isinstance(item, Mapping):
            problems.append(f"$.tasks[{at}]: expected a task with `name` and `train`, got {shown(item)}")
        elif task := build(TaskConfig, cast("Mapping[str, Any]", item), f"$.tasks[{at}]", problems):
            tasks[at] = task
    return tasks


def check_tasks(tasks: Mapping[int, TaskConfig], problems: list[str]) -> None:
    """A task's name is its own, and none that the scores use already; its metric exists."""
    first: dict[str, int] = {}
    for at, task in tasks.items():
        if task.name in first:
            problems.append(f"$.tasks[{at}].name: {task.name!r} names $.tasks[{first[task.name]}] already")
        first.setdefault(task.name, at)
        if task.name in RESERVED or task.name.startswith("probe:"):
            problems.append(f"$.tasks[{at}].name: {task.name!r} is the name of a suite of ours; choose another")
        if task.metric not in ("auto", *METRICS):
            problems.append(f"$.tasks[{at}].metric: no metric `{task.metric}`. {suggestion(task.metric, METRICS)}")


def check_sources(tasks: Mapping[int, TaskConfig], protect_base: str, problems: list[str]) -> None:
    """Every file that is named exists."""
    named = {
        f"$.tasks[{at}].{key}": source
        for at, task in tasks.items()
        for key, source in (("train", task.train), ("test", task.test), ("validation", task.validation))
        if source
    }
    if protect_base not in ("self", "off"):
        named["$.protect_base"] = protect_base
    for path, source in named.items():
        local = path == "$.protect_base" or is_local(source, Path())
        if local and (said := missing_file(source)):
            problems.append(f"{path}: {said}")


def way_out(tree: Tree) -> str:
    """What to do about the first problem with a choice, else about the first problem."""
    for problem in tree.problems:
        if at := re.match(r"\$\.(method|strategy)(?:\[(\d+)\])?", problem):
            choice: Any = tree.values.get(at[1])
            if isinstance(choice, list):
                choice = dict(enumerate(cast("list[Any]", choice))).get(int(at[2] or 0))
            name = choice.get("name", DEFAULT_METHOD) if isinstance(choice, dict) else None
            if name in (METHODS if at[1] == "method" else STRATEGIES):
                return f"`retain list {name}` shows every field with its default"
            return f"`retain list {'methods' if at[1] == 'method' else 'strategies'}` shows them all"
    return "`retain init` writes a complete recipe to compare with"
