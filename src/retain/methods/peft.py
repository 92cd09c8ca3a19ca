"""Any tuner that PEFT has, by its type's name, with its own options."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from retain.errors import ConfigError
from retain.methods.tuner import Tuner, has_conv1d, task_type, wrapped

__all__ = ["Peft"]

KEPT = {field.name for field in fields(PeftConfig)} | {"fan_in_fan_out"}
"""What the model says, not the recipe."""

UNFIT = {
    "ADAPTION_PROMPT": "it changes the attention of a few old architectures only",
    "CARTRIDGE": "it is a prefix that is distilled from a text; use `method: prefix`",
    "CPT": "it has a loss of its own; use `method: prompt`",
    "MULTITASK_PROMPT_TUNING": "it wants the task of every row; use `method: prompt`",
    "OSF": "it overwrites the base; use `strategy: osf` with `method: full`",
    "POLY": "it wants the task of every row",
    "PREFIX_TUNING": "use `method: prefix`",
    "PROMPT_TUNING": "use `method: prompt`",
    "P_TUNING": "use `method: p_tuning`",
    "SHADOW": "it runs a second network with outputs of its own",
    "XLORA": "it mixes adapters that exist already",
}
"""Types that are no change beside frozen weights, and what to do instead."""


def types() -> list[str]:
    """The types that can be named."""
    return sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - set(UNFIT))


def config_class(kind: str) -> type[Any]:
    """PEFT's configuration of a type."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]


@dataclass(frozen=True)
class Peft(Tuner):
    """Train what a tuner of PEFT's trains.

    Args:
        type: its name in `peft.PeftType`: VERA, LOHA, BOFT, FOURIERFT, LN_TUNING, and so on.
        options: fields of its configuration, as PEFT spells them; targets that PEFT does not know are `all-linear`.
    """

    name: ClassVar[str] = "peft"

    type: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.type in UNFIT:
            raise ValueError(f"type: {self.type} cannot be used so: {UNFIT[self.type]}")
        if self.type not in types():
            near = get_close_matches(self.type.upper(), types(), n=1)
            raise ValueError(f"type: expected one of {', '.join(near or types())}, got {self.type!r}")
        known = sorted({field.name for field in fields(config_class(self.type))} - KEPT)
        if unknown := [name for name in self.options if name not in known]:
            near = get_close_matches(unknown[0], known, n=1)
            said = f"Did you mean `{near[0]}`?" if near else f"Allowed: {', '.join(known)}"
            raise ValueError(f"options: {self.type} has no option `{unknown[0]}`. {said}")
        try:
            self._made({})
        except (TypeError, ValueError) as error:
            raise ValueError(f"options: {str(error).splitlines()[0]}") from error

    def config(self, model: nn.Module) -> PeftConfig:
        """The type's own, with these options."""
        more: dict[str, Any] = {"task_type": task_type(model)}
        if has_conv1d(model) and "fan_in_fan_out" in {field.name for field in fields(config_class(self.type))}:
            more["fan_in_fan_out"] = True
        return self._made(more)

    def apply(self, model: nn.Module) -> nn.Module:
        """The model wrapped by PEFT.

        Raises:
            ConfigError: if that leaves nothing to train, or PEFT cannot do it.
        """
        try:
            return wrapped(model, self.config(model))
        except ConfigError as error:
            config: Any = self.config(model)
            unknown = any("target_modules" in problem for problem in error.problems)
            if "target_modules" in self.options or "target_modules" not in vars(config) or not unknown:
                raise
            config.target_modules = "all-linear"
            return wrapped(model, config)

    def _made(self, more: Mapping[str, Any]) -> PeftConfig:
        return config_class(self.type)(**self.options, **more)
