"""A strategy's memory is taken up by name, whatever else changed between two tasks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from retain.config import load_config
from retain.data.tasks import TaskConfig
from retain.errors import CompatibilityError
from retain.inference import load_stage
from retain.lineage import Lineage
from retain.memory import take_memory
from retain.run import extend, train
from retain.storage.state import load_state
from retain.strategies.chain import Chain
from retain.strategies.ewc import EWC
from retain.strategies.replay import Replay
from retain.strategies.sequential import Sequential
from retain.strategies.strategy import Strategy

Recipe = Callable[..., Path]
FAST: dict[str, Any] = {"evaluation": {"probes": False, "kl": False}, "train": {"max_steps": 2}, "protect_rows": 4}
PLAIN = {"name": "sequential"}
REPLAY = {"name": "replay", "ratio": 0.5}


def learned(recipe: Path) -> Lineage:
    return train(load_config(recipe).config)


def taken(strategy: Strategy, lineage: Lineage) -> list[str]:
    _, new = take_memory(strategy, nn.Linear(1, 1), lineage.stage_folder(lineage.head))
    return [link.name for link in new]


def rows(strategy: Replay) -> set[str]:
    return {row.task for row in strategy.memory.rows}


@pytest.mark.parametrize("kept", [REPLAY, [REPLAY]], ids=["alone", "chain-of-one"])
def test_a_strategy_joins_and_leaves(write_recipe: Recipe, kept: Any) -> None:
    lineage = learned(write_recipe(strategy=kept, **FAST))
    same, joined, alone = Replay(), Replay(), Replay()
    assert taken(same, lineage) == []
    assert taken(Chain(EWC(), joined), lineage) == ["ewc"]
    assert taken(Chain(alone), lineage) == []
    assert rows(same) == rows(joined) == rows(alone) == {"base", "colour", "animal"}
    assert taken(EWC(), lineage) == ["ewc"]


def test_one_of_a_chain_stays(write_recipe: Recipe) -> None:
    lineage = learned(write_recipe(strategy=[{"name": "ewc", "num_samples": 2}, REPLAY], **FAST))
    alone, turned = Replay(), EWC()
    assert taken(alone, lineage) == []
    assert rows(alone) == {"base", "colour", "animal"}
    assert taken(Chain(Replay(), turned), lineage) == []
    assert turned.tasks == ["base", "colour", "animal"]
    assert taken(Sequential(), lineage) == ["sequential"]


def test_a_lineage_without_protection_is_protected_late(write_recipe: Recipe, tmp_path: Path) -> None:
    lineage = learned(write_recipe(strategy=PLAIN, **FAST))
    third = TaskConfig(name="third", train=str(tmp_path / "data" / "animal.jsonl"))
    overrides = ["strategy=[{name: ewc, strength: 10, num_samples: 2}, {name: replay, ratio: 0.5}]"]
    grown = extend(lineage.path, [third], overrides=overrides)
    assert grown.load_stage(3).history[1].penalty > 0, "it acts on the first task after it was chosen"
    memory = load_state(grown.stage_folder(3) / "memory")
    assert memory["0.ewc/tasks"] == ["base", "third"]
    assert {row.task for row in memory["1.replay/memory"]} == {"base", "third"}
    for stage in range(4):  # made by other strategies than the recipe now names
        assert isinstance(load_stage(grown, stage)[0].model, nn.Module)


def test_late_protection_can_be_turned_off(write_recipe: Recipe, tmp_path: Path) -> None:
    lineage = learned(write_recipe(strategy=PLAIN, **FAST))
    third = TaskConfig(name="third", train=str(tmp_path / "data" / "animal.jsonl"))
    grown = extend(lineage.path, [third], overrides=["strategy=replay", "protect_base=off"])
    assert {row.task for row in load_state(grown.stage_folder(3) / "memory")["memory"]} == {"third"}


def test_the_same_chain_is_restored_by_itself(write_recipe: Recipe) -> None:
    """Its own check of the state's names is not gone around."""
    lineage = learned(write_recipe(strategy=[REPLAY, {"name": "replay", "ratio": 0.1}], **FAST))
    chain = Chain(Replay(), Replay())
    assert taken(chain, lineage) == []
    assert all(rows(link) == {"base", "colour", "animal"} for link in chain.strategies if isinstance(link, Replay))
    with pytest.raises(CompatibilityError):
        chain.restore(nn.Linear(1, 1), {"0.ewc/tasks": torch.zeros(1)})
