from pathlib import Path
from typing import Any

import pytest

from retain import demo
from retain.config import load_config
from retain.data.rendering import Renderer
from retain.types import Message, StepInfo


def test_the_demo_on_a_tiny_model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runs take the same steps over the same tasks and share the base's scores; what is done stays done."""
    write = demo.write_demo_tasks
    short = [
        f"model.name={tiny_model}", "train.max_steps=2", "train.max_length=512", "train.precision=fp32",
        "evaluation.max_probes=11", "evaluation.max_texts=2", "protect_rows=4", "model.template=auto",
    ]  # fmt: skip
    monkeypatch.setattr(demo, "write_demo_tasks", lambda folder, **_: write(folder, num_train=12, num_test=3))
    monkeypatch.setattr(demo, "load_config", lambda path: load_config(path, short))
    steps: list[StepInfo] = []
    lineages = demo.run_demo(tmp_path, observers=[steps.append])
    assert [lineage.path.name for lineage in lineages] == list(demo.RUNS)
    records = [lineage.record() for lineage in lineages]
    assert len({record.tasks for record in records}) == 1
    assert [len(stage.history) for stage in records[0].stages] == [0, 2, 2, 2]
    assert [len(stage.history) for stage in records[1].stages] == [0, 2, 2, 2], "no run has more steps than another"
    assert len(steps) == 12
    assert records[0].stages[0].answers == records[1].stages[0].answers
    assert records[0].stages[3].answers != records[1].stages[3].answers
    assert records[0].strategy == "sequential"
    demo.run_demo(tmp_path, observers=[steps.append])
    assert len(steps) == 12


def test_the_template_is_the_models_own_without_a_system_turn(tokenizer: Any) -> None:
    text = Renderer(tokenizer, demo.TEMPLATE).text([Message("user", "hi")], add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
