"""The experiment end to end on a model of 31,000 weights."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from retain.config import load_config
from retain.data.tasks import TaskConfig
from retain.errors import BudgetExceeded, CompatibilityError, ConfigError, LineageError
from retain.inference import answer, load_stage
from retain.lineage import Lineage
from retain.run import extend, train
from retain.storage.state import load_state
from retain.types import Example, Message, StepInfo

Recipe = Callable[..., Path]


def run(recipe: Path, *overrides: str, **options: Any) -> Lineage:
    return train(load_config(recipe, overrides).config, **options)


def weights(lineage: Lineage, stage: int | None = None) -> torch.Tensor:
    model = load_stage(lineage, stage)[0].model
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def memory(lineage: Lineage) -> dict[str, Any]:
    return load_state(lineage.stage_folder(lineage.head) / "memory")


def test_a_recipe_becomes_a_lineage(write_recipe: Recipe) -> None:
    lineage = run(write_recipe(strategy={"name": "replay", "ratio": 0.2}))
    record = lineage.record()
    assert [stage.name for stage in record.stages] == ["base", "colour", "animal"]
    assert record.tasks == ("colour", "animal")
    for stage in record.stages:
        assert {"colour", "animal", "probes", "kl"} <= stage.scores.keys()
        assert stage.scores["colour"].metric == "accuracy"
        assert stage.scores["animal"].metric == "exact_match"
        assert stage.scores["colour"].num == 6
    assert record.stages[0].scores["kl"].value == 0.0
    assert record.stages[1].scores["kl"].value > 0.0
    first, last = record.stages[1].history, record.stages[2].history
    assert [info.step for info in first] == list(range(1, len(first) + 1))
    assert first[-1].loss < first[0].loss
    assert last[-1].num_steps == len(last)
    provenance = record.stages[1].provenance
    assert provenance["rows"] == 18
    assert provenance["tokens"] == sum(info.num_tokens for info in first)
    kept = memory(lineage)["memory"]
    assert {row.task for row in kept} == {"base", "colour", "animal"}
    assert {row.source for row in kept if row.task == "base"} == {"generated"}
    assert lineage.verify() == []


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [("full", ["abc", "abc", "abc", "abc"]), ("lower", ["abc", "a", "ab", "abc"]), ("ends", ["abc", "a", "b", "abc"])],
)
def test_the_matrix_says_what_is_scored(write_recipe: Recipe, matrix: str, expected: list[str]) -> None:
    recipe = write_recipe(evaluation={"probes": False, "kl": False, "matrix": matrix}, protect_base="off")
    colour, animal = load_config(recipe).config.tasks
    config = load_config(recipe).config
    tasks = (replace(colour, name="a"), replace(animal, name="b"), replace(colour, name="c"))
    lineage = train(replace(config, tasks=tasks, train=replace(config.train, max_steps=1)))
    assert ["".join(sorted(stage.scores)) for stage in lineage.record().stages] == expected


def test_a_budget_needs_the_scores_between(write_recipe: Recipe) -> None:
    recipe = write_recipe(evaluation={"matrix": "ends"}, budget={"forgetting": 0.1})
    with pytest.raises(CompatibilityError) as caught:
        run(recipe)
    assert "matrix: ends" in caught.value.problems[0]


def test_the_stages_weights_load_in_transformers(write_recipe: Recipe) -> None:
    lineage = run(write_recipe(protect_base="off", evaluation={"probes": False, "kl": False}))
    ours = load_stage(lineage, 1)[0]
    theirs = AutoModelForCausalLM.from_pretrained(lineage.stage_folder(1) / "weights").eval()
    ids = torch.tensor([ours.renderer.text_ids("name 3")])
    with torch.no_grad():
        assert torch.equal(ours.model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert theirs.generation_config.eos_token_id == list(ours.renderer.stop_ids)


def test_the_same_recipe_gives_the_same_weights(write_recipe: Recipe, tmp_path: Path) -> None:
    options: dict[str, Any] = {"strategy": [{"name": "replay"}, {"name": "ewc", "num_samples": 8}]}
    one = run(write_recipe(**options))
    two = run(write_recipe(**options, output_dir=str(tmp_path / "again")))
    assert torch.equal(weights(one), weights(two))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("strategy", ["replay", "ewc", "joint"])
def test_continuing_in_a_new_process_equals_one_run(
    write_recipe: Recipe, tmp_path: Path, method: str, strategy: str
) -> None:
    sections: dict[str, Any] = {"method": {"name": method}, "strategy": {"name": strategy}}
    sections["evaluation"] = {"probes": False, "kl": False}
    whole = run(write_recipe(**sections))
    config = load_config(write_recipe("part.yaml", **sections, output_dir=str(tmp_path / "part"))).config
    first, second = config.tasks
    train(replace(config, tasks=(first,)))
    code = (
        "import sys; from pathlib import Path; from retain import TaskConfig, extend; "
        "extend(Path(sys.argv[1]), [TaskConfig(name='animal', train=sys.argv[2], test=sys.argv[3], max_new_tokens=4)])"
    )
    assert second.test is not None
    arguments = [sys.executable, "-c", code, str(tmp_path / "part"), second.train, second.test]
    subprocess.run(arguments, check=True, capture_output=True, timeout=120)
    parts = Lineage.open(tmp_path / "part")
    assert torch.equal(weights(parts), weights(whole))
    base, after_first, _ = parts.record().stages
    expected = whole.record().stages
    assert base.scores["animal"] == expected[0].scores["animal"], "the base is scored on a task that came later"
    assert after_first.scores["animal"] == expected[1].scores["animal"]


def test_an_interrupted_run_goes_on_where_it_stopped(write_recipe: Recipe, tmp_path: Path) -> None:
    whole = run(write_recipe(strategy={"name": "replay"}))
    recipe = write_recipe("cut.yaml", strategy={"name": "replay"}, output_dir=str(tmp_path / "cut"))

    def interrupt(info: StepInfo) -> None:
        if (info.task, info.step) == ("animal", 2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(recipe, observers=[interrupt])
    cut = Lineage.open(tmp_path / "cut")
    assert [stage.name for stage in cut.log()] == ["base", "colour"]
    steps: list[int] = []
    cut = run(recipe, observers=[lambda info: steps.append(info.step)])
    assert steps[0] == 3
    assert torch.equal(weights(cut), weights(whole))


def test_another_recipe_does_not_take_over_a_lineage(write_recipe: Recipe) -> None:
    run(write_recipe(evaluation={"probes": False, "kl": False}))
    with pytest.raises(ConfigError, match="another recipe") as caught:
        run(write_recipe(evaluation={"probes": False, "kl": False}), "train.seed=3")
    assert "+  seed: 3" in caught.value.problems


def test_rolling_back_and_learning_something_else(write_recipe: Recipe, tmp_path: Path) -> None:
    lineage = run(write_recipe(strategy={"name": "replay"}, evaluation={"probes": False, "kl": False}))
    after_first = weights(lineage, 1)
    lineage.rollback(1)
    assert torch.equal(weights(lineage), after_first)
    grown = extend(lineage.path, [TaskConfig(name="other", train=str(tmp_path / "data" / "animal.jsonl"))])
    assert [(s.index, s.name, s.parent) for s in grown.log()] == [(0, "base", -1), (1, "colour", 0), (3, "other", 1)]
    assert {row.task for row in memory(grown)["memory"]} == {"base", "colour", "other"}


def test_the_budget_refuses_and_accepting_is_on_the_record(write_recipe: Recipe) -> None:
    recipe = write_recipe(budget={"forgetting": 0.0}, evaluation={"probes": False, "kl": False})
    with pytest.raises(BudgetExceeded, match="animal") as caught:
        run(recipe)
    assert caught.value.exit_code == 3
    lineage = Lineage.open(load_config(recipe).config.output_dir)
    assert [stage.name for stage in lineage.log()] == ["base", "colour"]
    assert lineage.partial() is not None
    lineage = run(recipe, accept=True)
    assert lineage.load_stage(2).provenance["accepted"] is True


def test_protecting_the_base_with_a_file(write_recipe: Recipe, tmp_path: Path) -> None:
    rows = [{"text": f"The lazy dog number {i} jumps over the fox."} for i in range(9)]
    file = tmp_path / "general.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lineage = run(write_recipe(strategy={"name": "replay"}, protect_base=str(file), protect_rows=5))
    kept = [row for row in memory(lineage)["memory"] if row.task == "base"]
    assert len(kept) == 5
    assert all(row.text.startswith("The lazy dog") for row in kept)


def test_two_runs_share_the_bases_scores(write_recipe: Recipe, tmp_path: Path) -> None:
    one = run(write_recipe())
    two = run(write_recipe("two.yaml", strategy={"name": "replay"}, output_dir=str(tmp_path / "two")), base=one)
    assert two.load_stage(0).answers == one.load_stage(0).answers
    assert two.load_stage(1).scores["kl"].value > 0


def test_a_damaged_stage_is_not_continued(write_recipe: Recipe) -> None:
    lineage = run(write_recipe(evaluation={"probes": False, "kl": False}))
    file = lineage.stage_folder(2) / "weights" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(LineageError, match="damaged"):
        load_stage(lineage)


@pytest.mark.parametrize("processes", [2])
def test_two_processes_equal_one(write_recipe: Recipe, tmp_path: Path, processes: int) -> None:
    sections: dict[str, Any] = {
        "strategy": [{"name": "replay"}, {"name": "ewc", "num_samples": 8}],
        "evaluation": {"probes": False, "kl": False},
    }
    one = run(write_recipe(**sections))
    recipe = write_recipe("two.yaml", **sections, output_dir=str(tmp_path / "two"))
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone",
        "-m", "retain", "train", str(recipe), "train.per_device_train_batch_size=4",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    torch.testing.assert_close(weights(Lineage.open(tmp_path / "two")), weights(one), rtol=0, atol=2e-3)


COLUMNS: dict[str, Any] = {
    "method": {"name": "adapter", "size": 8},
    "strategy": {"name": "progressive"},
    "evaluation": {"max_probes": 11, "max_texts": 3},
}


def test_columns_forget_exactly_nothing(write_recipe: Recipe, tmp_path: Path) -> None:
    """Train, resume, continue in a new process, roll back: every old answer and weight stays what it was."""
    recipe = write_recipe(**COLUMNS)

    def interrupt(info: StepInfo) -> None:
        if (info.task, info.step) == ("animal", 2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(recipe, observers=[interrupt])
    lineage = run(recipe)
    whole = run(write_recipe("whole.yaml", **COLUMNS, output_dir=str(tmp_path / "whole")))
    assert torch.equal(weights(lineage), weights(whole)), "going on in the middle of a column is exact"

    entry = TaskConfig(name="third", train=str(tmp_path / "data" / "animal.jsonl"), max_new_tokens=4)
    lineage = extend(lineage.path, [entry])
    base, first, second, third = lineage.record().stages
    assert first.scores["colour"] == second.scores["colour"] == third.scores["colour"]
    assert second.scores["animal"] == third.scores["animal"]
    for stage in (first, second, third):
        assert stage.scores["probes"] == base.scores["probes"], "probes are of the base, with no column"
        assert stage.scores["kl"].value == 0.0
    assert first.scores["animal"] == base.scores["animal"], "so is a task that was never learned"
    assert {"inferred:colour", "inferred:animal"} <= second.scores.keys()
    assert "inferred:animal" not in first.scores
    assert any("when named" in note for note in lineage.record().notes), "the report states both"

    one, two, three = (load_stage(lineage, stage)[0] for stage in (1, 2, 3))
    ids = torch.tensor([one.renderer.text_ids("name 3")])
    with torch.no_grad():
        colour = one.for_task("colour")(input_ids=ids).logits
        animal = two.for_task("animal")(input_ids=ids).logits
        assert not torch.equal(colour, animal)
        for later in (two, three):
            assert torch.equal(later.for_task("colour")(input_ids=ids).logits, colour)
            assert torch.equal(later.for_task("animal")(input_ids=ids).logits, animal)
    old = {name: value for name, value in one.model.state_dict().items() if "adapters" in name}
    assert old
    assert all(torch.equal(three.model.state_dict()[name], value) for name, value in old.items())

    lineage.rollback(1)
    head = load_stage(lineage)[0]
    with torch.no_grad():
        assert torch.equal(head.for_task("colour")(input_ids=ids).logits, colour)
    asked = Example(id="1", messages=(Message("user", "name 3"), Message("assistant", "")))
    assert head.infer_tasks([asked]) == ["colour"]
    assert isinstance(answer(three, [Message("user", "what 3?")], max_new_tokens=3), str)


@pytest.mark.parametrize("reads_base", [True, False])
def test_whole_networks_as_columns(write_recipe: Recipe, tmp_path: Path, reads_base: bool) -> None:
    family = {"family": "recurrent", "hidden_size": 16, "cell": "gru", "vocab_size": 300, "num_layers": 2}
    method = {"name": "columns", "reads_base": reads_base}
    lineage = run(write_recipe(model=family, method=method, strategy="progressive"))
    entry = TaskConfig(name="third", train=str(tmp_path / "data" / "animal.jsonl"), max_new_tokens=4)
    lineage = extend(lineage.path, [entry])
    base, first, second, third = lineage.record().stages
    assert first.scores["colour"] == second.scores["colour"] == third.scores["colour"]
    assert second.scores["animal"] == third.scores["animal"]
    assert third.scores["probes"] == base.scores["probes"]
    assert third.scores["kl"].value == 0.0
    one, three = (load_stage(lineage, stage)[0] for stage in (1, 3))
    ids = torch.tensor([one.renderer.text_ids("name 3")])
    with torch.no_grad():
        answers = [target.for_task("colour")(input_ids=ids).logits for target in (one, three)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("method", ["adapter", "lora", "prompt"])
def test_columns_continue_in_a_new_process(write_recipe: Recipe, tmp_path: Path, method: str) -> None:
    test_continuing_in_a_new_process_equals_one_run(write_recipe, tmp_path, method, "progressive")


def test_pairs_continue_in_a_new_process(write_recipe: Recipe, tmp_path: Path) -> None:
    test_continuing_in_a_new_process_equals_one_run(write_recipe, tmp_path, "lora", "olora")


def test_subspaces_continue_in_a_new_process(write_recipe: Recipe, tmp_path: Path) -> None:
    test_continuing_in_a_new_process_equals_one_run(write_recipe, tmp_path, "full", "osf")


def test_columns_join_a_lineage_late(write_recipe: Recipe, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"method": {"name": "lora", "r": 4}, "evaluation": {"probes": False, "kl": False}}
    lineage = run(write_recipe(**sections))
    before = lineage.record().stages[-1].scores
    entry = TaskConfig(name="third", train=str(tmp_path / "data" / "animal.jsonl"), max_new_tokens=4)
    lineage = extend(lineage.path, [entry], overrides=["strategy=progressive"])
    after = lineage.record().stages[-1].scores
    assert all(after[task] == before[task] for task in ("colour", "animal"))


def test_columns_need_a_method_that_can_extend(write_recipe: Recipe) -> None:
    with pytest.raises(CompatibilityError) as caught:
        run(write_recipe(strategy={"name": "progressive"}))
    assert "progressive: method 'full' cannot put a new column" in caught.value.problems[0]
