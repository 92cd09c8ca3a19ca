"""IA3: trained factors on keys, values and the feed-forward part's inner states, and nothing else.

    k' = l_k * (W_k x),      v' = l_v * (W_v x),      h' = W_2 (l_ff * activation(W_1 x))

Source: Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.3. Computed by PEFT.
"""

from dataclasses import dataclass
from typing import ClassVar

from peft import IA3Config, PeftConfig
from torch import nn

from retain.errors import ConfigError
from retain.methods.tuner import Tuner, has_conv1d, linear_names, task_type
from retain.models.family import pretrained

__all__ = ["IA3"]


@dataclass(frozen=True)
class IA3(Tuner):
    """Train a factor for every key, value and inner feed-forward unit; they start at 1.

    Args:
        target_modules: names of the linear layers to scale; empty takes PEFT's for the model's type.
        feedforward_modules: those of them whose input is scaled, not their output; empty takes PEFT's.
    """

    name: ClassVar[str] = "ia3"

    target_modules: tuple[str, ...] = ()
    feedforward_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.feedforward_modules) - set(self.target_modules)):
            raise ValueError(f"feedforward_modules: expected names among target_modules, got {', '.join(unknown)}")

    def config(self, model: nn.Module) -> PeftConfig:
        """The layers by name, or PEFT's own for this type of model.

        Raises:
            ConfigError: if PEFT knows none for this type.
        """
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

        kind: str = pretrained(model).config.model_type
        if not self.target_modules and kind not in KNOWN:
            raise ConfigError(
                f"method.target_modules: PEFT does not know which layers IA3 scales in a model of type {kind!r}",
                problems=[f"its linear layers are: {', '.join(linear_names(model)) or 'none'}"],
                hint="name its keys, values and second feed-forward layer, and the last in `feedforward_modules`, too",
            )
        return IA3Config(
            task_type=task_type(model),  # pyright: ignore[reportArgumentType]  None is no task of PEFT's
            target_modules=list(self.target_modules) or None,
            feedforward_modules=list(self.feedforward_modules) or ([] if self.target_modules else None),
            fan_in_fan_out=has_conv1d(model),
        )
