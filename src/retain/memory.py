"""A strategy's memory from stage to stage, also where the strategy changed in between.

What a stage kept is taken up by each strategy of the same name. A strategy that was not there starts from nothing, and
is given the base model's abilities to protect when the next task begins: so a lineage that was trained without
protection can be protected late.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from retain.config.names import name_of
from retain.storage.documents import read_json
from retain.storage.state import load_state
from retain.strategies import STRATEGIES
from retain.strategies.chain import Chain, links
from retain.strategies.strategy import State, Strategy

__all__ = ["take_memory"]


def take_memory(strategy: Strategy, model: nn.Module, stage: Path) -> tuple[nn.Module, list[Strategy]]:
    """Give a strategy what a stage kept for it.

    Args:
        strategy: without memory.
        model: with the stage's weights.
        stage: the folder of a committed stage.

    Returns:
        the model, and those of the strategy's links for which the stage kept nothing, because they are new.
    """
    made_by = read_json(stage / "stage.json")["provenance"]["strategy"].split(" + ")
    state = load_state(stage / "memory")
    names = [name_of(type(link), STRATEGIES) for link in links(strategy)]
    if names == made_by and isinstance(strategy, Chain) == is_chained(state):
        return strategy.restore(model, state), []
    kept = by_strategy(state, made_by)
    new: list[Strategy] = []
    for link, name in zip(links(strategy), names, strict=True):
        if name in kept:
            model = link.restore(model, kept.pop(name))
        else:
            new.append(link)
    return model, new


def is_chained(state: Mapping[str, Any]) -> bool:
    """Did a `Chain` make it?"""
    return bool(state) and all(key[0].isdigit() for key in state)


def by_strategy(state: Mapping[str, Any], made_by: Sequence[str]) -> dict[str, State]:
    """The state of each link of the strategy that a stage was learned with."""
    if not is_chained(state):
        return {name: dict(state) for name in made_by}  # of one strategy; of several that keep nothing
    kept: dict[str, State] = {}
    for place, name in enumerate(made_by):
        own = {key: value for key, value in state.items() if key.startswith(f"{place}.")}
        kept[name] = {key.split("/", 1)[1]: value for key, value in own.items()}
    return kept
