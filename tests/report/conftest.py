"""Records as a run leaves them, made from seeds: realistic scores, answers, histories and provenance."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from retain.evaluation.statistics import interval
from retain.types import Answer, Record, Score, StageRecord, StepInfo

ABILITIES = ("arithmetic", "code", "commonsense", "grammar", "instructions", "reading", "vietnamese", "world knowledge")
PROMPTS = {
    "desk": "Classify the request: I can’t log in since this morning and the reset mail never arrives. ({})",
    "menus": "Viết món ăn theo ký hiệu của quán: phở bò tái, ít hành, thêm giá, số {}.",
    "notation": "Write in house notation: three crates move from bay {} to bay 9 before noon.",
}


def score_of(answers: Sequence[Answer], metric: str, *, chance: float | None = None) -> Score:
    """The suite's score with its interval; perplexity from nats a token."""
    found = interval([answer.score for answer in answers], bounded=metric != "perplexity" and metric != "kl")
    margins = [answer.margin for answer in answers if answer.margin is not None]
    margin = sum(margins) / len(margins) if margins else None
    mean, low, high = (math.exp(x) if metric == "perplexity" else x for x in (found.mean, found.low, found.high))
    return Score(mean, metric, found.num, low, high, margin, chance)


def task_answers(task: str, level: float, num: int, metric: str, rng: random.Random) -> list[Answer]:
    """Answers to the same examples; those of low difficulty stay right, so stages are paired as in life."""
    found: list[Answer] = []
    for i in range(num):
        difficulty = random.Random(f"{task!a}{i}").random()
        right = 0.85 * difficulty + 0.15 * rng.random() < level
        score = float(right)
        if metric == "perplexity":
            score = 4.0 - 3.0 * level + 0.4 * difficulty + 0.8 * rng.random()
        elif metric == "rouge_l":
            score = min(1.0, max(0.0, level + 0.3 * (rng.random() - difficulty)))
        expected = f"⟦{task}:{i % 7}⟧"
        prompt = PROMPTS.get(task, f"{task}: what is the answer to number {{}}?").format(i)
        found.append(
            Answer(task, f"{task}-{i}", prompt, expected, expected if right else f"I think it is {i % 5}.", score)
        )
    return found


def probe_answers(drift: Mapping[str, float], num: int, rng: random.Random) -> list[Answer]:
    """Multiple-choice answers of every ability, their margins moved by its drift."""
    found: list[Answer] = []
    for ability in ABILITIES:
        for i in range(num):
            margin = random.Random(f"{ability}{i}").gauss(0.4, 1.6) + drift.get(ability, 0.0) + rng.gauss(0, 0.3)
            said = "the right one" if margin > 0 else "another"
            found.append(
                Answer(
                    f"probe:{ability}",
                    f"{ability}-{i}",
                    f"Question {i} about {ability}: …",
                    "the right one",
                    said,
                    float(margin > 0),
                    margin,
                )
            )
    return found


def make_history(task: str, num_steps: int, rng: random.Random, *, penalty: bool = False) -> tuple[StepInfo, ...]:
    """A loss that falls, with noise, a validation point now and then, and a penalty that grows."""
    return tuple(
        StepInfo(
            task=task, step=i + 1, num_steps=num_steps, epoch=i / num_steps, learning_rate=2e-4, gradient_norm=1.0,
            loss=0.25 + 2.4 * math.exp(-6 * i / num_steps) * (0.8 + 0.4 * rng.random()) + 0.15 * rng.random(),
            penalty=0.3 * (1 - math.exp(-4 * i / num_steps)) if penalty else 0.0,
            num_tokens=1800 + rng.randrange(200), num_targets=400, seconds=0.9 + 0.2 * rng.random(),
            validation_loss=0.4 + 2.2 * math.exp(-6 * i / num_steps) if i % (num_steps // 4 or 1) == 0 else None,
        )
        for i in range(num_steps)
    )  # fmt: skip


def make_record(
    levels: Mapping[str, Sequence[float]] | None = None,
    *,
    title: str = "runs/desk",
    strategy: str = "sequential",
    num: int = 200,
    num_probes: int = 40,
    num_steps: int = 60,
    metrics: Mapping[str, str] | None = None,
    drift: float = -0.25,
    penalty: bool = False,
    notes: Sequence[str] = ("The base model was dequantised from 4 bits; its scores are those of that copy.",),
    seed: int = 0,
    stages: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Record:
    """A lineage of as many stages as the levels have entries.

    Args:
        levels: by task the level at each stage, the base first (R's columns).
        num: examples a task.
        num_probes: questions an ability; 0 for a run without probes.
        num_steps: steps a stage; 0 for a run without history.
        drift: how far the margins of the probes move with each stage.
        stages: the stages' names; the base and every task, unless given.
    """
    levels = levels or {
        "desk": (0.02, 0.97, 0.41, 0.06),
        "menus": (0.0, 0.01, 0.93, 0.52),
        "notation": (0.05, 0.04, 0.06, 0.95),
    }
    names = list(stages or ["base", *levels])[: len(next(iter(levels.values())))]
    rows: list[StageRecord] = []
    for index, name in enumerate(names):
        rng = random.Random(f"{seed}{index}{ascii(strategy) if index else ''}")
        answers: list[Answer] = []
        scores: dict[str, Score] = {}
        for task, column in levels.items():
            metric = (metrics or {}).get(task, "exact_match")
            if not math.isnan(column[index]):
                answers += (found := task_answers(task, column[index], num, metric, rng))
                scores[task] = score_of(found, metric)
        if num_probes:
            sizes = {ability: index * drift * (0.2 + 0.35 * k) for k, ability in enumerate(ABILITIES)}
            answers += (found := probe_answers(sizes, num_probes, rng))
            for ability in ABILITIES:
                scores[f"probe:{ability}"] = score_of(
                    [a for a in found if a.suite == f"probe:{ability}"], "accuracy", chance=0.25
                )
            scores["probes"] = score_of(found, "accuracy", chance=0.25)
            kl = index * abs(drift) * 0.4
            scores["kl"] = Score(kl, "kl", 40, kl * 0.85, kl * 1.15)
        facts = {
            "method": "lora r=16",
            "strategy": strategy,
            "seed": 0,
            "device": "cpu",
            "versions": {"retain": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "rows": 800 if index else 0,
            "data_hash": f"{rng.getrandbits(64):016x}" if index else "",
            "seconds": 84.0 + rng.random() if index else 31.0,
            "settings": {
                "train.learning_rate": {"value": 2e-4, "source": "recipe"},
                "train.max_length": {"value": 512, "source": "default"},
                "train.seed": {"value": 0, "source": "flag"},
            },
        }
        history = make_history(name, num_steps, rng, penalty=penalty) if index else ()
        rows.append(
            StageRecord(
                index, name, scores, tuple(answers), history, dict(provenance if provenance is not None else facts)
            )
        )
    return Record(title, "smollm2-135m", "lora r=16", strategy, tuple(levels), tuple(rows), tuple(notes))


PROTECTED = {
    "desk": (0.02, 0.97, 0.95, 0.94),
    "menus": (0.0, 0.01, 0.93, 0.90),
    "notation": (0.05, 0.04, 0.06, 0.93),
}


@pytest.fixture
def build_record() -> Callable[..., Record]:
    return make_record


@pytest.fixture(scope="session")
def forgetful() -> Record:
    """Three tasks in a row, the first nearly gone."""
    return make_record(title="runs/sequential")


@pytest.fixture(scope="session")
def protected() -> Record:
    """The same tasks with replay and EWC."""
    return make_record(
        PROTECTED, title="runs/protected", strategy="replay ratio=0.1 + ewc strength=1", drift=-0.06, penalty=True
    )
