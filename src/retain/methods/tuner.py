"""A tuner of PEFT's as a method: modules beside frozen weights, made from a configuration, in PEFT's own layout."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from retain.errors import CompatibilityError, ConfigError
from retain.kernels.low_rank import LowRank
from retain.models.family import Family, pretrained
from retain.models.new_heads import with_heads
from retain.parameters import trainable

__all__ = ["Tuner", "adapted", "has_conv1d", "layers", "linear_names", "task_type", "wrapped"]

TASK_TYPES: dict[str, str] = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
"""PEFT's name for what a model does, by the end of its class's name."""


class Tuner(ABC):
    """What the methods that PEFT computes have in common; a subclass is a dataclass and says the configuration."""

    name: ClassVar[str]
    packs: ClassVar[bool] = True
    can_detach: ClassVar[bool] = True
    can_extend: ClassVar[bool] = False
    no_products: ClassVar[str] = ""

    @abstractmethod
    def config(self, model: nn.Module) -> PeftConfig:
        """What PEFT is to do to the model."""

    def supports(self, family: Family) -> str | None:
        """Families made of linear layers."""
        if not family.needs_gradients:
            return f"family {family.name!r} is fitted by counting: it has no weights to adapt"
        if family.name == "recurrent":
            return "it changes linear layers, and a recurrent cell's weights are none; use `lora` or `adapter`"
        return None

    def apply(self, model: nn.Module) -> nn.Module:
        """The model wrapped by PEFT, what is trained in float32.

        Raises:
            ConfigError: if that leaves nothing to train.
        """
        return wrapped(model, self.config(model))

    def save(self, model: nn.Module, folder: Path) -> None:
        """PEFT's own layout, which other tools load."""
        pretrained(adapted(model)).save_pretrained(folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The base model with what was saved, trainable."""
        with torch.random.fork_rng(), block_sizes_adjusted():
            return PeftModel.from_pretrained(model, folder, is_trainable=True)

    def merge(self, model: nn.Module) -> nn.Module:
        """A plain model with the changed weights, after a check that none is NaN.

        Raises:
            CompatibilityError: if what the tuner does is no change of a weight.
        """
        tuner: Any = adapted(model)
        try:
            return tuner.merge_and_unload(safe_merge=True)
        except (AttributeError, NotImplementedError, TypeError) as error:
            raise CompatibilityError(
                f"method {self.name!r} cannot be merged: what it does is no change of a weight",
                problems=[str(error).splitlines()[0]] if str(error) else [],
                hint="export it as it is, or use `method: lora`",
            ) from error

    @contextmanager
    def detached(self, model: nn.Module) -> Generator[nn.Module]:
        """The base model: the same weights with the tuner off."""
        tuner: Any = adapted(model).base_model
        on = not any(layer.disable_adapters for _, layer in layers(model))
        active: list[str] = list(tuner.active_adapters) if on else []
        self.activate(model, [])  # not `disable_adapter`, which trains whatever was active from then on
        try:
            yield model
        finally:
            self.activate(model, active)

    def modules(self, model: nn.Module) -> list[str]:
        """The one module that was put beside the base."""
        return list(adapted(model).peft_config)

    def extend(self, model: nn.Module, name: str) -> nn.Module:
        """Refused: there is one module.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError(
            f"method {self.name!r} keeps one module beside the base",
            hint="use `method: adapter`, `lora`, `prompt`, or `columns` for a recurrent model",
        )

    def activate(self, model: nn.Module, names: Sequence[str]) -> nn.Module:
        """Turn the module on, or off where none is named; what is trained stays as it is."""
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
        """None: the change is no product of two factors."""
        return ()

    @torch.no_grad()
    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """What merging would add to each weight, as the base stores it, by the base model's names."""
        changes: dict[str, Tensor] = {}
        for name, layer in layers(model):
            place = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
            copy: Any = deepcopy(layer)
            if not layer.disable_adapters:
                copy.merge()
            before, after = (getattr(one.get_base_layer(), place) for one in (layer, copy))
            changes[f"{name}.{place}"] = after.detach() - before.detach()
        return changes


def layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The adapted layers by the base model's names; several weights of one module are layers of one name."""
    return [
        (name.replace(".base_layer", ""), module)
        for name, module in adapted(model).get_base_model().named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


def adapted(model: nn.Module) -> PeftModel:
    """The model as PEFT wrapped it.

    Raises:
        CompatibilityError: if it has no adapter.
    """
    if not isinstance(model, PeftModel):
        raise CompatibilityError(f"{type(model).__name__} has no adapter", hint="apply the method first")
    return model


def wrapped(model: nn.Module, config: PeftConfig) -> PeftModel:
    """The model as PEFT wraps it, something of it trainable.

    Raises:
        ConfigError: if PEFT finds nothing to change.
    """
    problem = "no parameter is left to train"
    try:
        with block_sizes_adjusted():
            made: Any = get_peft_model(model, with_heads(config, model))  # pyright: ignore[reportArgumentType]  any transformers model
        if trainable(made):
            return made
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        problem = f"PEFT: {error}".splitlines()[0]
    targets: Any = vars(config).get("target_modules")
    shown = sorted(targets) if isinstance(targets, set) else targets
    raise ConfigError(
        f"method.target_modules: {shown!r} adapts nothing in this model",
        problems=[f"its linear layers are: {', '.join(linear_names(model)) or 'none'}", problem],
        hint="name some of these, or `all-linear`",
    )


@contextmanager
def block_sizes_adjusted() -> Generator[None]:
    """Let PEFT take the nearest block size that divides a layer's width, as it does anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Invalid `.*`.*Adjusted")
        yield


def linear_names(model: nn.Module) -> list[str]:
    """The last names of the model's linear layers, each once."""
    return sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})


def has_conv1d(model: nn.Module) -> bool:
    """Are its linear layers stored as (in, out), as GPT-2's are?"""
    return any(isinstance(module, Conv1D) for module in model.modules())


def task_type(model: nn.Module) -> str | None:
    """What PEFT calls the model's work; None where it has no name for it."""
    if pretrained(model).config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    found = [kind for ending, kind in TASK_TYPES.items() if type(model).__name__.endswith(ending)]
    return found[0] if found else None
