"""A run's whole configuration: the four choices, the tasks, and how to train and measure."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retain.config.fields import plain
from retain.config.names import name_of, named
from retain.config.recipe import write_recipe
from retain.data.tasks import TaskConfig
from retain.errors import CompatibilityError
from retain.evaluation.evaluate import EvaluationConfig
from retain.methods import METHODS
from retain.methods.method import Method
from retain.models import FAMILIES
from retain.models.family import Family
from retain.strategies import STRATEGIES
from retain.strategies.chain import Chain, links
from retain.strategies.strategy import Strategy
from retain.train_config import TrainConfig

__all__ = ["Budget", "ModelConfig", "RunConfig", "check_compatibility", "dump_config", "to_tree"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is tuned.

    Args:
        name: a folder, a GGUF or ARPA file, an offline model or a hub id; empty where the family starts from nothing.
        family: what network it is; None finds out.
        template: how conversations are rendered: `auto` (the model's own chat template, else ours), `plain`, or the
            text of a Jinja template.
        trust_remote_code: may Python code that comes with the model be run?
    """

    name: str = ""
    family: Family | None = None
    template: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a stage may cost.

    Args:
        forgetting: the largest loss of an old task or of the probes, as a share of the score; null allows any.
    """

    forgetting: float | None = None

    def __post_init__(self) -> None:
        if self.forgetting is not None and not 0 <= self.forgetting <= 1:
            raise ValueError(f"forgetting: expected a share between 0 and 1, got {self.forgetting}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, whole.

    Args:
        model: which model.
        method: which parameters move.
        strategy: what protects old abilities.
        protect_base: what stands for the base model's abilities: text of its own (`self`), a file, or nothing (`off`).
        protect_rows: how many rows of it the strategy is given.
        tasks: what is learned, in order.
        train: how.
        evaluation: what is measured besides the tasks.
        budget: what a stage may cost.
        output_dir: the lineage's folder.
        title: of the report.
    """

    model: ModelConfig
    method: Method
    strategy: Strategy
    tasks: tuple[TaskConfig, ...]
    output_dir: Path
    protect_base: str = "self"
    protect_rows: int = 64
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    budget: Budget = field(default_factory=Budget)
    title: str = ""

    def __post_init__(self) -> None:
        if self.protect_rows < 1:
            raise ValueError(f"protect_rows: expected a whole number above 0, got {self.protect_rows}")

    @property
    def method_name(self) -> str:
        """As in a recipe."""
        return name_of(type(self.method), METHODS)

    @property
    def strategy_name(self) -> str:
        """As in a recipe; those of a chain joined by ` + `."""
        return " + ".join(name_of(type(strategy), STRATEGIES) for strategy in links(self.strategy))


def to_tree(config: RunConfig) -> dict[str, Any]:
    """Every setting, as a recipe says it."""
    family = config.model.family
    model: dict[str, Any] = {"name": config.model.name} if config.model.name else {}
    if family is not None:
        model |= {"family": name_of(type(family), FAMILIES), **plain(family)}
    model |= {"template": config.model.template, "trust_remote_code": config.model.trust_remote_code}
    strategies = [named(strategy, STRATEGIES) for strategy in links(config.strategy)]
    return {
        "title": config.title,
        "model": model,
        "method": named(config.method, METHODS),
        "strategy": strategies if isinstance(config.strategy, Chain) else strategies[0],
        "protect_base": config.protect_base,
        "protect_rows": config.protect_rows,
        "tasks": [plain(task) for task in config.tasks],
        "train": plain(config.train),
        "evaluation": plain(config.evaluation),
        "budget": plain(config.budget),
        "output_dir": str(config.output_dir),
    }


def dump_config(config: RunConfig) -> str:
    """A recipe that says every setting, so that it reruns the whole wherever the same files are."""
    return write_recipe(to_tree(config))


def unfit_for_labels(strategy: Strategy) -> str | None:
    """Why a strategy cannot protect a model that only labels, or None."""
    if strategy.writes:
        return "it lets the model write rows, and a model of this family writes no text"
    if strategy.grows:
        return "it puts a module of its own beside the base for each task, and the head that they share would move"
    return None


def check_compatibility(config: RunConfig, family: Family) -> None:
    """Refuse choices that do not go together, before a model loads.

    Args:
        config: the choices.
        family: the model's, found or named.

    Raises:
        CompatibilityError: naming every pair, with the reason.
    """
    problems: list[str] = []
    if reason := config.method.supports(family):
        problems.append(f"$.method: {config.method_name}: {reason}")
    if config.strategy.needs_gradients and not family.needs_gradients:
        needing = [name_of(type(link), STRATEGIES) for link in links(config.strategy) if link.needs_gradients]
        problems.append(f"$.strategy: {', '.join(needing)}: works on gradients, and family {family.name!r} has none")
    problems += [
        f"$.strategy: {name_of(type(link), STRATEGIES)}: {reason}"
        for link in links(config.strategy)
        if (reason := link.supports(config.method))
    ]
    if not family.generates:
        problems += [
            f"$.strategy: {name_of(type(link), STRATEGIES)}: {reason}"
            for link in links(config.strategy)
            if (reason := unfit_for_labels(link))
        ]
    if config.evaluation.matrix == "ends" and config.budget.forgetting is not None:
        problems.append("$.evaluation.matrix: ends: the budget needs the earlier tasks' scores after every stage")
    if config.train.gradient_checkpointing and family.name == "recurrent":
        problems.append(
            f"$.train.gradient_checkpointing: a model of family {family.name!r} cannot compute a part again"
        )
    if config.train.packing == "always":
        if not family.isolates_documents:
            problems.append(f"$.train.packing: always: in family {family.name!r} packed rows would see one another")
        if not config.method.packs:
            problems.append(f"$.train.packing: always: {config.method_name} cannot tell packed rows apart")
    if problems:
        raise CompatibilityError(
            "these choices do not go together",
            problems=problems,
            hint="`retain list` shows methods, strategies and families; `train.packing: auto` packs where it is exact"
            if family.needs_gradients
            else f"{family.name!r} takes `method: full` and the strategies sequential, replay, joint, single_task",
        )
