import json
import platform

import torch

from retain.provenance import data_hash, provenance
from retain.types import Example, StepInfo


def info(step: int, *, tokens: int, seconds: float) -> StepInfo:
    return StepInfo(
        task="a", step=step, num_steps=2, epoch=0.0, loss=1.0, penalty=0.0, learning_rate=0.1, gradient_norm=1.0,
        num_tokens=tokens, num_targets=tokens // 2, seconds=seconds,
    )  # fmt: skip


ROWS = [Example(id=name, text=name) for name in ("x", "y", "z")]


def test_the_data_hash_is_of_the_rows_in_their_order() -> None:
    assert data_hash(ROWS) == data_hash(list(ROWS))
    assert len({data_hash(ROWS), data_hash(ROWS[::-1]), data_hash(ROWS[:2]), data_hash([])}) == 4
    assert data_hash([Example(id="xy")]) != data_hash([Example(id="x"), Example(id="y")])


def test_figures_are_sums_over_the_steps() -> None:
    made = provenance(
        method="lora", strategy="ewc", seed=3, precision="fp32", examples=ROWS, seconds=9.87654,
        history=[info(1, tokens=100, seconds=0.5), info(2, tokens=60, seconds=1.5)],
        notes=["a note"], sources={"train.seed": "flag"}, accepted=True,
    )  # fmt: skip
    expected = {
        "method": "lora", "strategy": "ewc", "seed": 3, "precision": "fp32", "rows": 3, "steps": 2, "tokens": 160,
        "targets": 80, "training_seconds": 2.0, "tokens_per_second": 80.0, "seconds": 9.877, "processes": 1,
        "notes": ["a note"], "sources": {"train.seed": "flag"}, "accepted": True, "data_hash": data_hash(ROWS),
        "python": platform.python_version(),
    }  # fmt: skip
    assert {key: made[key] for key in expected} == expected
    assert made["versions"]["torch"] == torch.__version__
    assert {"retain", "transformers", "peft", "datasets", "tokenizers"} <= made["versions"].keys()


def test_a_stage_without_training_divides_by_nothing() -> None:
    made = provenance(method="full", strategy="sequential", seed=0, precision="fp32")
    assert (made["steps"], made["tokens_per_second"], made["data_hash"], made["notes"]) == (0, 0.0, "", [])


def test_json_can_hold_it() -> None:
    made = provenance(method="full", strategy="sequential", seed=0, precision="fp32", examples=ROWS)
    assert json.loads(json.dumps(made)) == made
