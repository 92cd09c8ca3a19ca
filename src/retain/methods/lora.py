"""Low-rank adaptation: frozen weights, each with a trained low-rank change beside it."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from retain.errors import CompatibilityError, ConfigError
from retain.models.family import Family, pretrained

__all__ = ["LoRA"]


@dataclass(frozen=True)
class LoRA:
    """W + (alpha / r) B A, where only A (r, in) and B (out, r) are trained; B starts at zero.

    Args:
        r: the rank, above 0.
        alpha: the scale's numerator.
        dropout: of the input of A, in [0, 1).
        target_modules: names of the modules to adapt, or `all-linear` for every linear layer but the head.
        use_rslora: scale by alpha / sqrt(r) instead (Kalajdzievski 2023).
        use_dora: learn the weight's magnitude beside its direction (Liu et al. 2024).

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3. Computed by PEFT.
    """

    name: ClassVar[str] = "lora"
    packs: ClassVar[bool] = True
    can_detach: ClassVar[bool] = True

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r: expected a whole number above 0, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")

    def supports(self, family: Family) -> str | None:
        """Families made of linear layers."""
        if not family.needs_gradients:
            return f"family {family.name!r} is fitted by counting: it has no weights to adapt"
        if family.name == "recurrent" and self.target_modules == "all-linear":
            return "a recurrent cell's weights are not linear layers, so LoRA has nothing to adapt; use `full`"
        return None

    def apply(self, model: nn.Module) -> nn.Module:
        """The model wrapped by PEFT, the adapter in float32.

        Raises:
            ConfigError: if no module has one of the target names.
        """
        wanted = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        settings: dict[str, Any] = {"use_rslora": self.use_rslora, "use_dora": self.use_dora}
        config = LoraConfig(
            r=self.r, lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]  a float works
            lora_dropout=self.dropout, target_modules=wanted,
            task_type="CAUSAL_LM", **settings,
        )  # fmt: skip
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise ConfigError(
                f"method.target_modules: {self.target_modules!r} adapts nothing in this model",
                problems=[f"its linear layers are: {', '.join(linear) or 'none'}", str(error).splitlines()[0]],
                hint="name some of these, or `all-linear`",
            ) from error

    def save(self, model: nn.Module, folder: Path) -> None:
        """PEFT's own layout, which other tools load."""
        pretrained(model).save_pretrained(folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The base model with the saved adapter, trainable."""
        return PeftModel.from_pretrained(model, folder, is_trainable=True)

    def merge(self, model: nn.Module) -> nn.Module:
        """W + (alpha / r) B A as plain weights, after a check that no product is NaN."""
        return adapted(model).merge_and_unload(safe_merge=True)

    @contextmanager
    def detached(self, model: nn.Module) -> Generator[nn.Module]:
        """The base model: the same weights with the adapter off."""
        with adapted(model).disable_adapter():
            yield model

    @torch.no_grad()
    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """(alpha / r) B A of each adapted weight, (out, in), by the base model's names."""
        changes: dict[str, Tensor] = {}
        for name, module in adapted(model).get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                changes[f"{name}.weight"] = cast("Any", module).get_delta_weight(
                    "default"
                )  # each kind of layer has its own
        return changes


def adapted(model: nn.Module) -> PeftModel:
    """The model as PEFT wrapped it.

    Raises:
        CompatibilityError: if it has no adapter.
    """
    if not isinstance(model, PeftModel):
        raise CompatibilityError(f"{type(model).__name__} has no adapter", hint="apply the method first")
    return model
