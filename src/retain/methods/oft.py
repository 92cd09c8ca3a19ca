"""Orthogonal fine-tuning: rotate what frozen weights read, so that the angles between their neurons stay.

    W' = W R,      R = diag(R_1 ... R_b) orthogonal,      R_i = (I + Q_i) (I - Q_i)^-1,      Q_i = -Q_i^T trained

Source: Qiu et al. 2023, https://arxiv.org/abs/2306.07280, section 3.2; the input side: Qiu et al. 2025,
https://arxiv.org/abs/2506.19847. Computed by PEFT.
"""

from dataclasses import dataclass
from typing import ClassVar

from peft import OFTConfig, PeftConfig
from torch import nn

from retain.methods.tuner import Tuner, has_conv1d, task_type

__all__ = ["OFT"]


@dataclass(frozen=True)
class OFT(Tuner):
    """Train a block-diagonal rotation before each adapted layer; it starts as the identity.

    Args:
        block_size: width of a block, at least 2; where it does not divide a layer's, PEFT takes the nearest that does.
        dropout: share of blocks that are left out in a step, in [0, 1).
        target_modules: names of the modules to adapt, or `all-linear` for every linear layer but the head.
        exact: invert I - Q exactly; else by the first five terms of its series, which is quicker and orthogonal only
            while the rotation is small.
    """

    name: ClassVar[str] = "oft"

    block_size: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    exact: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(f"block_size: expected a whole number of at least 2, got {self.block_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")

    def config(self, model: nn.Module) -> PeftConfig:
        """A rotation of the input of each target."""
        wanted = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        return OFTConfig(
            task_type=task_type(model),  # pyright: ignore[reportArgumentType]  None is no task of PEFT's
            r=0, oft_block_size=self.block_size, module_dropout=self.dropout, target_modules=wanted,
            use_cayley_neumann=not self.exact, fan_in_fan_out=has_conv1d(model),
        )  # fmt: skip
