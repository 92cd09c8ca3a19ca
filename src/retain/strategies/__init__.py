"""What is done so that old abilities survive: one paper a file."""

from retain.strategies.ewc import EWC
from retain.strategies.joint import Joint
from retain.strategies.replay import Replay
from retain.strategies.sequential import Sequential
from retain.strategies.strategy import Strategy

__all__ = ["STRATEGIES", "Strategy"]

STRATEGIES: dict[str, type[Strategy]] = {
    "ewc": EWC,
    "joint": Joint,
    "replay": Replay,
    "sequential": Sequential,
}
"""Every strategy by its name in a recipe. A list of them in a recipe is a `Chain`."""
