"""Low-rank adaptation: frozen weights, each with a trained low-rank change beside it."""

import json
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from retain.errors import CompatibilityError, ConfigError
from retain.kernels.low_rank import LowRank
from retain.models.family import Family, pretrained
from retain.parameters import trainable

__all__ = ["LoRA"]

MODULES = "modules.json"
"""The names of several pairs in their order; PEFT keeps each but the first in a folder of its name."""


@dataclass(frozen=True)
class LoRA:
    """W + (alpha / r) B A, where only A (r, in) and B (out, r) are trained; B starts at zero.

    Extended, it keeps several pairs, and adds up those that are active: W + (alpha / r) sum_j B_j A_j.

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
    can_extend: ClassVar[bool] = True

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
            CompatibilityError: if it would adapt one of two modules that share a weight.
        """
        self._refuse_shared(model)
        try:
            return get_peft_model(model, self._config())
        except ValueError as error:
            linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise ConfigError(
                f"method.target_modules: {self.target_modules!r} adapts nothing in this model",
                problems=[f"its linear layers are: {', '.join(linear) or 'none'}", str(error).splitlines()[0]],
                hint="name some of these, or `all-linear`",
            ) from error

    def _refuse_shared(self, model: nn.Module) -> None:
        """An adapter beside the embeddings changes the head too when it is merged, where they share their weight."""
        ends = [module.weight for module in (pretrained(model).get_input_embeddings(), _head(model)) if module]
        if len(ends) < 2 or ends[0] is not ends[1] or self.target_modules == "all-linear":
            return
        wanted = self.target_modules
        for name, parameter in model.named_parameters(remove_duplicate=False):
            module = name.removesuffix(".weight")
            hit = re.fullmatch(wanted, module) if isinstance(wanted, str) else module.split(".")[-1] in wanted
            if parameter is ends[0] and hit:
                raise CompatibilityError(
                    f"method.target_modules: {module!r} shares its weight with the other end of the model",
                    problems=["merged, the adapter would change both, so the merged model would answer otherwise"],
                    hint="adapt the layers in between (`all-linear`)",
                )

    def _config(self) -> LoraConfig:
        """One pair's, as PEFT says it."""
        wanted = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        settings: dict[str, Any] = {"use_rslora": self.use_rslora, "use_dora": self.use_dora}
        return LoraConfig(
            r=self.r, lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]  a float works
            lora_dropout=self.dropout, target_modules=wanted,
            task_type="CAUSAL_LM", **settings,
        )  # fmt: skip

    def save(self, model: nn.Module, folder: Path) -> None:
        """PEFT's own layout, which other tools load; further pairs in folders of their names."""
        pretrained(model).save_pretrained(folder)
        if len(names := self.modules(model)) > 1:
            (folder / MODULES).write_text(json.dumps(names), encoding="utf-8")

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The base model with the saved adapter, trainable; all of them, and all active, where there are several."""
        wrapped = PeftModel.from_pretrained(model, folder, is_trainable=True)
        if (folder / MODULES).exists():
            names: list[str] = json.loads((folder / MODULES).read_text(encoding="utf-8"))
            for name in names[1:]:
                wrapped.load_adapter(str(folder / name), name, is_trainable=True)
            tuner: Any = wrapped.base_model
            tuner.set_adapter(names)  # which makes each of them trainable
        return wrapped

    def merge(self, model: nn.Module) -> nn.Module:
        """W + (alpha / r) B A as plain weights, after a check that no product is NaN."""
        return adapted(model).merge_and_unload(safe_merge=True)

    @contextmanager
    def detached(self, model: nn.Module) -> Generator[nn.Module]:
        """The base model: the same weights with the adapter off."""
        with adapted(model).disable_adapter():
            yield model

    def modules(self, model: nn.Module) -> list[str]:
        """The names of the pairs, oldest first."""
        return list(adapted(model).peft_config)

    def extend(self, model: nn.Module, name: str) -> nn.Module:
        """Add a pair to those that are active; only it is trained, and the dropout of the others ends."""
        wrapped = adapted(model)
        tuner: Any = wrapped.base_model
        active: list[str] = [] if _layers(model)[0].disable_adapters else list(tuner.active_adapters)
        for layer in _layers(model):
            for other in layer.lora_dropout:
                layer.lora_dropout[other] = nn.Identity()
        wrapped.add_adapter(name, self._config())
        tuner.set_adapter(name)
        return self.activate(model, [*active, name])

    def activate(self, model: nn.Module, names: Sequence[str]) -> nn.Module:
        """Add up these pairs; none: the base's own weights."""
        if not names and not isinstance(model, PeftModel):
            return model  # the bare base
        tuner: Any = adapted(model).base_model
        kept = list(trainable(model).values())
        if names:
            tuner.enable_adapter_layers()
            tuner.set_adapter(list(names))
        else:
            tuner.disable_adapter_layers()
        model.requires_grad_(False)  # PEFT would train whatever is active
        for parameter in kept:
            parameter.requires_grad_(True)
        return model

    def low_rank(self, model: nn.Module) -> Sequence[LowRank]:
        """Every pair of every linear layer. DoRA's change is none: it divides by the length of the sum."""
        layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
        return [
            LowRank(
                weight=f"{name}.base_layer.weight",
                left=f"{name}.lora_B.{pair}.weight",
                right=f"{name}.lora_A.{pair}.weight",
                scale=layer.scaling[pair],
                transposed=layer.fan_in_fan_out,
            )
            for name, layer in layers
            for pair in layer.lora_A
            if not layer.use_dora.get(pair)
        ]

    @torch.no_grad()
    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """(alpha / r) B A of each adapted weight, (out, in), by the base model's names; the sum of the active pairs."""
        changes: dict[str, Tensor] = {}
        for name, module in adapted(model).get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                layer: Any = module  # each kind of layer has its own `get_delta_weight`
                parts: list[Tensor] = [layer.get_delta_weight(pair) for pair in module.active_adapters]
                changes[f"{name}.weight"] = sum(parts[1:], start=parts[0])
        return changes


def _head(model: nn.Module) -> Any:
    """The module that makes logits; None where the model has none of `transformers`'."""
    return pretrained(model).get_output_embeddings()


def _layers(model: nn.Module) -> list[LoraLayer]:
    """The adapted layers."""
    return [module for module in adapted(model).modules() if isinstance(module, LoraLayer)]


def adapted(model: nn.Module) -> PeftModel:
    """The model as PEFT wrapped it.

    Raises:
        CompatibilityError: if it has no adapter.
    """
    if not isinstance(model, PeftModel):
        raise CompatibilityError(f"{type(model).__name__} has no adapter", hint="apply the method first")
    return model
