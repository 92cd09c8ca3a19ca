"""Everything that is measured after a stage: every task's test rows, the probes, and the KL to the base model."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from retain.data.rendering import Renderer
from retain.errors import ConfigError
from retain.evaluation.divergence import Distribution, base_distribution, kl_to_base
from retain.evaluation.inferred import INFERRED, can_infer, score_inferred
from retain.evaluation.probes import balanced, load_probes, load_texts, score_probes, some_texts
from retain.evaluation.scoring import mean_score, score_task
from retain.evaluation.statistics import interval
from retain.models.family import Family
from retain.parameters import evaluating
from retain.types import Answer, Example, Score, Task

__all__ = ["Evaluation", "EvaluationConfig", "evaluate"]

MATRICES = ("full", "lower", "ends")


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """What is measured besides the tasks.

    Args:
        probes: ask the built-in probes of general abilities.
        kl: measure the KL to the base model on built-in texts.
        matrix: which scores of the matrix R are taken besides those of the base model. `full`: every task after every
            stage. `lower`: after every stage the tasks learned so far; forward transfer is not known then. `ends`: each
            task after its own stage, and all after the recipe's last; what a stage between cost is not known either.
        max_probes: ask at most so many, balanced over abilities; None: all.
        max_texts: measure the KL on at most so many texts; None: all.
        text_tokens: read at most so many tokens of each text. Both are settled when the base model is evaluated.
        batch_tokens: padded tokens of one pass over the texts.

    Raises:
        ConfigError: a number that is not above 0.
    """

    probes: bool = True
    kl: bool = True
    matrix: Literal["full", "lower", "ends"] = "full"
    max_probes: int | None = None
    max_texts: int | None = None
    text_tokens: int = 64
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        given = {
            "max_probes": self.max_probes,
            "max_texts": self.max_texts,
            "text_tokens": self.text_tokens,
            "batch_tokens": self.batch_tokens,
        }
        problems = [] if self.matrix in MATRICES else [f"matrix: expected {', '.join(MATRICES)}, got {self.matrix!r}"]
        problems += [
            f"{name}: expected a whole number above 0, got {value}"
            for name, value in given.items()
            if value is not None and value < 1
        ]
        if problems:
            raise ConfigError("evaluation cannot be set so", problems=problems, hint="`probes: false` asks no probes")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured.

    Args:
        scores: by suite: every task, some also as `inferred:<task>`, then `probe:<ability>`, `probes` (all of them) and
            `kl` (nats a token).
        answers: one an example of every suite; those of `probes` are its abilities'.
        distribution: the base model's on the texts, for the stages to come; None where `kl` is off.
    """

    scores: dict[str, Score]
    answers: list[Answer]
    distribution: Distribution | None


def evaluate(
    model: nn.Module,
    tasks: Sequence[Task],
    *,
    family: Family,
    renderer: Renderer,
    config: EvaluationConfig | None = None,
    base: Distribution | None = None,
    seed: int = 0,
    select: Callable[[str], nn.Module] | None = None,
    infer: Callable[[Sequence[Example]], list[str]] | None = None,
    unnamed: Collection[str] = (),
) -> Evaluation:
    """Score a model on tasks, probes and texts; it is left as it was, its mode and the random state too.

    Args:
        model: the model after a stage.
        tasks: the tasks to score, learned already or not; one without test rows is passed over.
        family: the model's.
        renderer: with the model's tokenizer.
        config: what is measured besides; None: everything.
        base: the base model's distribution, of its own evaluation. None: this model is the base, whose KL is 0.
        seed: of the bootstrap and of the choice of probes; the same for all stages of a lineage.
        select: the model that answers for a task's name, where the strategy keeps one for each. Probes and texts
            belong to no task and are asked of `model`, first, before `select` changes anything.
        infer: the names of the tasks that prompts are of, as `select` takes them.
        unnamed: tasks that are scored once more, as `inferred:<task>`, each row answered by the model for the name that
            `infer` gives it.

    Raises:
        ConfigError: a task bears the name of a suite of ours, or an unknown metric.
        DataError: rows that a task's metric cannot score.
    """
    config = config or EvaluationConfig()
    for task in tasks:
        if task.name in ("probes", "kl") or task.name.startswith(("probe:", INFERRED)):
            raise ConfigError(
                f"a task cannot be named `{task.name}`", hint="probes and kl are scored under these names"
            )
    with evaluating(model):
        probed = _probes(model, family, renderer, config, seed) if config.probes else ({}, [])
        moved = _kl(model, family, renderer, config, base, seed) if config.kl else ({}, [], None)
        scores: dict[str, Score] = {}
        answers: list[Answer] = []
        for task in tasks:
            if task.test:
                with evaluating(select(task.name) if select else model) as chosen:
                    score, given = score_task(chosen, task, family=family, renderer=renderer, seed=seed)
                scores[task.name] = score
                answers += given
                if select and infer and task.name in unnamed and can_infer(task):
                    score, given = score_inferred(task, infer, select, family=family, renderer=renderer, seed=seed)
                    scores[f"{INFERRED}{task.name}"] = score
                    answers += given
    return Evaluation(scores | probed[0] | moved[0], answers + probed[1] + moved[1], moved[2])


def _probes(
    model: nn.Module, family: Family, renderer: Renderer, config: EvaluationConfig, seed: int
) -> tuple[dict[str, Score], list[Answer]]:
    """The probes' scores, by ability and all together, and their answers."""
    probes = load_probes()
    if config.max_probes is not None:
        probes = balanced(probes, config.max_probes, seed=seed)
    answers = score_probes(model, family, renderer, probes)
    chances = {probe.id: 1 / len(probe.choices) for probe in probes}
    suites: dict[str, list[Answer]] = {}
    for answer in answers:
        suites.setdefault(answer.suite, []).append(answer)
    suites["probes"] = answers
    scores = {
        suite: mean_score(given, "accuracy", chance=math.fsum(chances[a.id] for a in given) / len(given), seed=seed)
        for suite, given in suites.items()
    }
    return scores, answers


def _kl(
    model: nn.Module,
    family: Family,
    renderer: Renderer,
    config: EvaluationConfig,
    base: Distribution | None,
    seed: int,
) -> tuple[dict[str, Score], list[Answer], Distribution]:
    """The KL to the base model, every text's share of it, and the base model's distribution."""
    if base is None:
        texts = some_texts(config.max_texts, seed=seed)
        base = base_distribution(
            model, family, renderer, texts, max_length=config.text_tokens, max_tokens=config.batch_tokens
        )
        nats = dict.fromkeys(base.texts, 0.0)
    else:
        known = set(base.texts)
        texts = tuple(text for text in load_texts() if text.id in known)
        _, nats = kl_to_base(model, family, renderer, texts, base, max_tokens=config.batch_tokens)
    counts = dict(zip(base.texts, base.counts, strict=True))
    found = interval(
        [nats[text.id] for text in texts], weights=[counts[text.id] for text in texts], bounded=False, seed=seed
    )
    answers = [Answer("kl", text.id, text.text, "", "", nats[text.id]) for text in texts]
    return {"kl": Score(found.mean, "kl", found.num, found.low, found.high)}, answers, base
