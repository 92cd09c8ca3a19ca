from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from retain.config import load_config
from retain.experiment import Experiment, open_experiment, read_distribution
from retain.inference import load_stage
from retain.lineage import Lineage
from retain.models.source import open_source
from retain.parameters import trainable
from retain.run import load_tasks, start_lineage, train
from retain.strategies.replay import Replay
from retain.types import Example

Recipe = Callable[..., Path]


def opened(recipe: Path, *overrides: str, lineage: Lineage | None = None) -> Experiment:
    config = load_config(recipe, overrides).config
    source = open_source(config.model.name)
    return open_experiment(config, lineage or start_lineage(config, source), source, load_tasks(config))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().float() for parameter in model.parameters()])


def test_a_new_lineage_begins_with_the_base(write_recipe: Recipe) -> None:
    recipe = write_recipe(method={"name": "lora", "r": 2}, strategy={"name": "replay"})
    one, two = opened(recipe), opened(recipe)
    assert torch.equal(weights(one.model), weights(two.model)), "the seed also decides a new adapter"
    assert trainable(one.model)
    assert all("lora" in name for name in trainable(one.model))
    assert not one.model.training
    assert one.strategy is not one.config.strategy, "the recipe's strategy stays without memory"
    assert one.learned == set()
    assert [task.name for task in one.tasks] == ["colour", "animal"]
    assert one.model.generation_config.eos_token_id == list(one.renderer.stop_ids)
    other = opened(recipe, "train.seed=1", lineage=one.lineage)
    assert not torch.equal(weights(one.model), weights(other.model))


def test_what_never_moves_is_small_in_bf16(write_recipe: Recipe) -> None:
    experiment = opened(write_recipe(method={"name": "lora", "r": 2}), "train.precision=bf16")
    assert experiment.precision == "bf16"
    for parameter in experiment.model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


@pytest.mark.parametrize("packing", ["auto", "never"])
def test_a_view_is_bound_to_the_choices(write_recipe: Recipe, packing: str) -> None:
    experiment = opened(write_recipe(), f"train.packing={packing}", "train.on_overflow=drop", "train.seed=7")
    rows = (Example(id="a", text="b"),)
    view = experiment.view("base", rows)
    assert (view.name, view.examples, view.seed, view.max_length) == ("base", rows, 7, 64)
    assert view.packed == (packing == "auto")
    assert view.on_overflow == "drop"
    assert view.method is experiment.config.method
    soft = replace(experiment.config, method=Unpackable())
    assert not replace(experiment, config=soft).view("base", rows).packed


class Unpackable:
    packs = False


def test_the_heads_weights_and_memory_come_back(write_recipe: Recipe) -> None:
    recipe = write_recipe(strategy={"name": "replay", "ratio": 0.2})
    lineage = train(load_config(recipe).config)
    experiment = opened(recipe)
    assert torch.equal(weights(experiment.model), weights(load_stage(lineage)[0].model))
    assert isinstance(experiment.strategy, Replay)
    kept = experiment.strategy.state_dict()["memory"]
    assert {row.task for row in kept} == {"base", "colour", "animal"}
    assert experiment.distribution is not None
    assert experiment.earlier == []
    assert experiment.learned == {"base", "colour", "animal"}
    scores = experiment.evaluate().scores
    recorded = lineage.load_stage(2).scores
    assert scores.keys() == recorded.keys()
    assert scores["kl"].value == pytest.approx(recorded["kl"].value, rel=1e-4)
    assert scores["colour"] == recorded["colour"]
    assert set(experiment.evaluate(experiment.tasks[:1], probes=False).scores) == {"colour"}


def test_new_tasks_are_scored_on_the_base_and_on_the_head(write_recipe: Recipe) -> None:
    recipe = write_recipe(evaluation={"probes": False, "kl": False})
    config = load_config(recipe).config
    lineage = train(replace(config, tasks=config.tasks[:1]))
    assert read_distribution(lineage) is None
    experiment = opened(recipe, lineage=lineage)
    assert [(record.index, record.name) for record in experiment.earlier] == [(0, "base"), (1, "colour")]
    for record in experiment.earlier:
        assert set(record.scores) == {"animal"}
        assert len(record.answers) == 6
    assert torch.equal(weights(experiment.model), weights(load_stage(lineage)[0].model))


def test_what_is_recorded_of_a_stage(write_recipe: Recipe) -> None:
    experiment = opened(write_recipe(strategy=[{"name": "replay"}, {"name": "ewc"}]))
    made: dict[str, Any] = experiment.describe(0.0, rows=experiment.tasks[0].train, accepted=True)
    assert (made["method"], made["strategy"]) == ("full", "replay + ewc")
    assert (made["precision"], made["seed"], made["rows"]) == ("fp32", 0, 18)
    assert made["accepted"] is True
    assert made["seconds"] > 0
