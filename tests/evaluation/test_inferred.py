"""Rows answered by the model of the task that they seem to be of: the score is that of the answers, in order."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from retain.data.rendering import Renderer
from retain.evaluation.evaluate import EvaluationConfig, evaluate
from retain.evaluation.inferred import can_infer, inferred_notes, score_inferred
from retain.evaluation.scoring import score_task
from retain.models.decoder import DecoderFamily
from retain.types import Example, Message, Score, Task

CHOICES = ("red", "green", "blue")
ROWS = tuple(
    Example(id=str(i), messages=(Message("user", f"name {i}"), Message("assistant", CHOICES[i % 3]))) for i in range(7)
)
TASK = Task("colour", train=(), test=ROWS, metric="accuracy", choices=CHOICES)


@pytest.fixture
def options(tokenizer: Any) -> dict[str, Any]:
    return {"family": DecoderFamily(), "renderer": Renderer(tokenizer)}


@pytest.mark.parametrize("metric", ["accuracy", "exact_match", "bleu"])
def test_each_row_is_answered_by_the_model_of_its_name(
    build_llama: Callable[..., nn.Module], options: dict[str, Any], metric: str
) -> None:
    models = {"even": build_llama(seed=1), "odd": build_llama(seed=2)}
    task = replace(TASK, metric=metric, max_new_tokens=3)

    def infer(rows: Sequence[Example]) -> list[str]:
        return ["odd" if int(row.id) % 2 else "even" for row in rows]

    score, answers = score_inferred(task, infer, models.__getitem__, **options)
    whole = {name: score_task(model, task, **options)[1] for name, model in models.items()}
    expected = [whole["odd" if i % 2 else "even"][i] for i in range(7)]
    assert [replace(answer, margin=None) for answer in answers] == [
        replace(answer, suite="inferred:colour", margin=None) for answer in expected
    ]
    if metric == "accuracy":
        assert [a.margin for a in answers] == pytest.approx([a.margin for a in expected], abs=1e-4)
        assert [a.margin for a in answers] not in [[a.margin for a in other] for other in whole.values()]
    if metric != "bleu":
        assert score.value == pytest.approx(sum(answer.score for answer in expected) / 7)
    assert score.num == 7
    assert score.chance == (pytest.approx(1 / 3) if metric == "accuracy" else None)


def test_evaluate_states_both(build_llama: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    models = {"colour": build_llama(seed=1), "other": build_llama(seed=2)}
    found = evaluate(
        models["other"], [TASK, replace(TASK, name="other")], **options, select=models.__getitem__,
        infer=lambda rows: ["other"] * len(rows), unnamed=["colour"],
        config=EvaluationConfig(probes=False, kl=False),
    )  # fmt: skip
    assert list(found.scores) == ["colour", "inferred:colour", "other"]
    assert found.scores["inferred:colour"] == found.scores["other"], "always answered by the other's model"


def test_what_has_no_prompt_cannot_be_inferred() -> None:
    assert can_infer(TASK)
    assert not can_infer(replace(TASK, metric="perplexity"))
    assert not can_infer(replace(TASK, metric="exact_match", test=(Example(id="1", text="raw"),)))


def test_a_stage_says_both_figures() -> None:
    named, inferred = (Score(value, "accuracy", 4, 0.0, 1.0) for value in (0.75, 0.5))
    scores = {"colour": named, "inferred:colour": inferred, "probes": named}
    assert inferred_notes("animal", scores) == [
        "after animal, with the task of each prompt inferred: colour 0.500 (0.750 when named)"
    ]
    assert inferred_notes("animal", {"colour": named}) == []
