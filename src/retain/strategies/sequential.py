"""Plain sequential fine-tuning: nothing is protected. What every strategy is compared with."""

from dataclasses import dataclass
from typing import ClassVar

from retain.strategies.strategy import Strategy

__all__ = ["Sequential"]


@dataclass
class Sequential(Strategy):
    """Train on each task in turn."""

    name: ClassVar[str] = "sequential"
    needs_gradients: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
