import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from retain import run as run_module
from retain import trainer
from retain.cli.training import show_settings
from retain.inference import load_stage
from retain.lineage import Lineage

Retain = Callable[..., Any]
Recipe = Callable[..., Path]

QUICK: dict[str, Any] = {"evaluation": {"probes": False, "kl": False}}


def data(tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(num: int = 12, **changed: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"prompt": f"ask {i}", "completion": ["yes", "no"][i % 2]} for i in range(num)]
    rows[4] |= changed
    return rows


def test_train_prints_tables_and_writes_the_report(retain: Retain, write_recipe: Recipe, tmp_path: Path) -> None:
    result = retain("train", write_recipe(**QUICK), "train.seed=3")
    assert result.code == 0
    assert "Score matrix" in result.out
    assert f"lineage: {tmp_path / 'out'}\nreport:  {tmp_path / 'out' / 'report.html'}\n" in result.out
    assert (tmp_path / "out" / "report.html").exists()
    assert "learning animal" in result.err
    settings = [line.split() for line in result.err.splitlines()]
    assert ["flag", "train", "seed=3"] in settings
    assert ["recipe", "tasks", "colour", "animal"] in settings
    assert "learning" not in result.out


def test_train_as_json(retain: Retain, write_recipe: Recipe, tmp_path: Path) -> None:
    recipe = write_recipe(**QUICK, train={"lr": 1e-2, "max_length": 64, "precision": "fp32"})  # another tool's spelling
    result = retain("train", recipe, "--json")
    assert result.code == 0
    told = json.loads(result.out)
    assert told["lineage"] == str(tmp_path / "out")
    assert [stage["name"] for stage in told["stages"]] == ["base", "colour", "animal"]
    assert told["stages"][2]["scores"]["colour"]["num"] == 6
    assert "learning_rate" in result.err


def test_the_settings_are_a_line_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    tree = {"model": {"name": "[red]"}, "strategy": [{"name": "ewc", "strength": 2.0}], "train": {"seed": 1, "lr": 0.1}}
    sources = {
        "model.name": "recipe", "strategy.0.name": "recipe", "strategy.0.strength": "flag",
        "train.seed": "default", "train.lr": "recipe",
    }  # fmt: skip
    show_settings(tree, sources)
    assert [line.split() for line in capsys.readouterr().err.splitlines()] == [
        ["recipe", "model", "[red]"],
        ["recipe", "strategy", "0.name=ewc"],
        ["recipe", "train", "lr=0.1"],
        ["flag", "strategy", "0.strength=2.0"],
    ]


def test_a_recipe_that_does_not_exist(retain: Retain, tmp_path: Path) -> None:
    retain("train", tmp_path / "no.yaml").refused("no recipe", "retain init")


def test_typing_errors_are_told_all_at_once(retain: Retain, write_recipe: Recipe, tmp_path: Path) -> None:
    recipe = write_recipe(strategy={"name": "ewc", "strenght": 1.0}, method={"name": "lora", "r": "eight"})
    retain("train", recipe).refused(
        "recipe.yaml has 2 problems",
        "Did you mean `strength`?",
        '$.method.r: expected a whole number above 0, got "eight"',
    )
    assert not (tmp_path / "out").exists()


def test_a_typing_error_on_the_command_line(retain: Retain, write_recipe: Recipe) -> None:
    retain("train", write_recipe(), "train.learning_rat=1").refused("Did you mean `learning_rate`?")


def test_a_file_that_does_not_exist(retain: Retain, write_recipe: Recipe, tmp_path: Path) -> None:
    near = data(tmp_path, "banking", pairs())
    recipe = write_recipe(tasks=[{"name": "a", "train": near.replace("banking", "bankin")}])
    retain("train", recipe).refused("$.tasks[0].train: no file", "Did you mean `banking.jsonl`?")


@pytest.mark.parametrize(
    ("task", "rows", "said"),
    [
        ({"columns": {"prompt": "question"}}, pairs(), "question"),
        ({"choices": ["yes", "no"]}, pairs(completion="maybe"), "maybe"),
        ({}, pairs(completion=""), "empty"),
    ],
    ids=["wrong column", "label outside the set", "empty completion"],
)
def test_rows_that_cannot_be_used(
    retain: Retain, write_recipe: Recipe, tmp_path: Path, task: dict[str, Any], rows: list[dict[str, Any]], said: str
) -> None:
    recipe = write_recipe(tasks=[{"name": "a", "train": data(tmp_path, "a", rows), **task}])
    retain("train", recipe).refused(said, "a.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_row_that_is_too_long(retain: Retain, write_recipe: Recipe) -> None:
    retain("train", write_recipe(protect_base="off", **QUICK), "train.max_length=8").refused(
        "longer than max_length=8", "set max_length to"
    )


def test_a_model_that_does_not_exist(retain: Retain, write_recipe: Recipe, tmp_path: Path) -> None:
    retain("train", write_recipe(model="smollm2-135")).refused("no model 'smollm2-135'", "did you mean `smollm2-135m`?")
    retain("train", write_recipe(model=str(tmp_path / "data"))).refused("no config.json")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_lineage_whole(
    retain: Retain, write_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recipe = write_recipe(protect_base="off", **QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", refuse)
        retain("train", recipe).refused("disk full", "No space left on device", "run the same command again")
    assert [stage.name for stage in Lineage.open(tmp_path / "out").log()] == ["base"]
    assert retain("train", recipe).code == 0
    assert [stage.name for stage in Lineage.open(tmp_path / "out").log()] == ["base", "colour", "animal"]


def test_an_interrupt_can_be_gone_on_from(
    retain: Retain, write_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(protect_base="off", **QUICK)
    assert retain("train", recipe, f"output_dir={tmp_path / 'whole'}").code == 0
    rate = trainer.learning_rate

    def interrupted(config: Any, step: int, num_steps: int) -> float:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(config, step, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learning_rate", interrupted)
        retain("train", recipe).refused("interrupted", "the same command goes on", code=130)
    partial = Lineage.open(tmp_path / "out").partial()
    assert partial is not None
    assert list((partial / "checkpoints").iterdir())
    assert retain("train", recipe).code == 0
    one, two = (load_stage(Lineage.open(tmp_path / name))[0].model.state_dict() for name in ("out", "whole"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_interrupted_continue_goes_on_when_it_is_called_again(
    retain: Retain, lineage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["continue", lineage, "train.max_steps=3", "--data", data(tmp_path, "third", pairs(30))]

    def interrupted(*arguments: Any) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return 1e-3

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learning_rate", interrupted)
        retain(*command).refused("interrupted", code=130)
    assert retain(*command).code == 0
    assert [stage.name for stage in Lineage.open(lineage).log()] == ["base", "colour", "animal", "third"]
    assert len(Lineage.open(lineage).load_stage(3).history) == 3
    assert retain("continue", lineage).code == 0, "its recipe can still be read"


def test_over_the_budget(retain: Retain, write_recipe: Recipe) -> None:
    recipe = write_recipe(protect_base="off", budget={"forgetting": 0.0}, **QUICK)
    retain("train", recipe).refused("over the forgetting budget", "--accept", code=3)
    assert retain("train", recipe, "--accept").code == 0


def test_a_bug_of_ours(retain: Retain, write_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(run_module, "train", broken)
    result = retain("train", write_recipe())
    assert result.code == 1
    assert "a bug in retain" in result.err
    assert "ZeroDivisionError: oh" in result.err


def test_continue_adds_a_task(retain: Retain, lineage: Path, tmp_path: Path) -> None:
    file = data(tmp_path, "third", pairs(30))
    result = retain("continue", lineage, "train.max_steps=2", "--data", file, "--json")
    assert result.code == 0
    told = json.loads(result.out)
    assert [stage["name"] for stage in told["stages"]] == ["base", "colour", "animal", "third"]
    assert "third" in told["stages"][0]["scores"]
    retain("continue", lineage, "--data", file).refused("'third' is a stage of", "--name")


def test_continue_takes_a_sample_of_the_rows(retain: Retain, lineage: Path, tmp_path: Path) -> None:
    file, test = data(tmp_path, "third", pairs(60)), data(tmp_path, "third.test", pairs(20))
    options = ("--test", test, "--max-test-rows", 5, "--max-train-rows", 8)
    told = json.loads(retain("continue", lineage, "train.max_steps=1", "--data", file, *options, "--json").out)
    assert {stage["scores"]["third"]["num"] for stage in told["stages"] if "third" in stage["scores"]} == {5}


def test_continue_says_what_it_cannot_do(retain: Retain, lineage: Path, tmp_path: Path) -> None:
    retain("continue", lineage, "--name", "third").refused("--data FILE")
    retain("continue", lineage, "--max-test-rows", 5).refused("--data FILE")
    retain("continue", tmp_path).refused("is not a lineage")
    retain("continue", lineage, "--data", tmp_path / "no.jsonl").refused("no.jsonl")
    assert Lineage.open(lineage).partial() is None


def test_demo_shows_both_runs(retain: Retain, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retain import demo

    def run_demo(folder: Path, **options: Any) -> list[Lineage]:
        folder.mkdir(parents=True, exist_ok=True)
        return [Lineage.open(trained / "out"), Lineage.open(trained / "out")]

    monkeypatch.setattr(demo, "run_demo", run_demo)
    result = retain("demo", "--output-dir", tmp_path / "demo")
    assert result.code == 0
    assert f"report: {tmp_path / 'demo' / 'report.html'}\n" in result.out
    assert "B  " in result.out
    assert json.loads(retain("demo", "--output-dir", tmp_path / "demo", "--json").out)


def test_two_processes_speak_once(write_recipe: Recipe) -> None:
    recipe = write_recipe(protect_base="off", **QUICK)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "retain",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "train", str(recipe)],
        check=True, capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.stdout.count("Score matrix") == 1
    assert done.stdout.count("report: ") == 1
    assert done.stderr.count("learning animal") == 1
    assert done.stderr.count("learning_rate=0.01") == 1
