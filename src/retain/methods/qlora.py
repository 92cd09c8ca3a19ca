"""QLoRA: LoRA beside a base whose linear layers are kept in 4 or 8 bits.

    y = dequantised(W_q) x + (alpha / r) B A x                 A, B float32; W_q never moves

Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, eq. 5. Computed by bitsandbytes and PEFT.
Differs: no paged optimizer, and the constants of NF4 blocks are themselves quantised only where `double` says so.
"""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from retain.errors import CompatibilityError, ConfigError
from retain.methods.tuner import Tuner, adapted, layers, linear_names, task_type
from retain.models.family import Family, pretrained
from retain.models.new_heads import trained_heads

__all__ = ["QLoRA"]


@dataclass(frozen=True)
class QLoRA(Tuner):
    """Quantise a frozen base, and train a low-rank change beside each of its linear layers.

    Every linear layer but the head is quantised, once, when the method is applied. What is saved is a plain LoRA; the
    base's own behaviour (detached) is that of the quantised base.

    Args:
        quantise: `nf4` (4 bits, normal quantiles), `fp4` or `int8`, which rounds what a layer reads, too, so that a
            merged model answers a little otherwise.
        double: quantise the constants of 4-bit blocks, too.
        r: the rank, above 0.
        alpha: the scale's numerator.
        dropout: of the input of A, in [0, 1).
        target_modules: names of the modules to adapt, or `all-linear` for every linear layer but the head.
        use_rslora: scale by alpha / sqrt(r) instead.
    """

    name: ClassVar[str] = "qlora"

    quantise: Literal["fp4", "int8", "nf4"] = "nf4"
    double: bool = True
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r: expected a whole number above 0, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")

    def supports(self, family: Family) -> str | None:
        """Families made of linear layers, where the quantiser is installed."""
        if reason := super().supports(family):
            return reason
        return None if installed() else "bitsandbytes is not there: `pip install 'retain[quantised]'`; or use `lora`"

    def config(self, model: nn.Module) -> LoraConfig:
        """One pair's, as PEFT says it."""
        wanted = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        return LoraConfig(
            r=self.r, lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]  a float works
            lora_dropout=self.dropout, target_modules=wanted, use_rslora=self.use_rslora,
            task_type=task_type(model),  # pyright: ignore[reportArgumentType]  None is no task of PEFT's
        )  # fmt: skip

    def apply(self, model: nn.Module) -> nn.Module:
        """The model, its linear layers quantised, wrapped by PEFT.

        Raises:
            ConfigError: if bitsandbytes is not there, or the model has no linear layer.
        """
        return super().apply(self._quantised(model))

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The base model, quantised as it was, with the saved adapter."""
        return super().load(self._quantised(model), folder)

    def merge(self, model: nn.Module) -> nn.Module:
        """A plain model in float32: the dequantised weights with the products added, so that it answers the same.

        Merged into 4 bits, the change would be rounded away.

        Raises:
            CompatibilityError: if a merged weight is not finite.
        """
        base = adapted(model).get_base_model()
        found: list[tuple[str, Any]] = list(base.named_modules())
        for name, module in found:
            if is_adapted(module) or is_quantised(module):
                parent, _, last = name.rpartition(".")
                if parent.endswith("base_layer") or last == "base_layer":
                    continue  # a part of a layer that is replaced whole
                setattr(base.get_submodule(parent), last, plain(module, name))
        vars(base)["is_loaded_in_4bit"] = vars(base)["is_loaded_in_8bit"] = False
        return base

    @torch.no_grad()
    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """(alpha / r) B A of each adapted weight, (out, in), by the base model's names."""
        return {
            f"{name}.weight": sum(map(layer.get_delta_weight, layer.active_adapters), start=torch.zeros(()))
            for name, layer in layers(model)
        }

    def _quantised(self, model: nn.Module) -> nn.Module:
        """The model with every linear layer but the head in few bits, in place."""
        if not installed():
            raise ConfigError(
                "method: qlora needs bitsandbytes, which is not installed",
                hint="`pip install 'retain[quantised]'`, or use `method: lora`",
            )
        head = pretrained(model).get_output_embeddings()
        new = trained_heads(model)  # which have nothing to keep
        found = [
            (name, module)
            for name, module in model.named_modules()
            if type(module) is nn.Linear and module is not head and not f"{name}.".startswith(new)
        ]
        if not found:
            raise ConfigError(
                f"method: qlora finds nothing to quantise in {type(model).__name__}",
                problems=[f"its linear layers are: {', '.join(linear_names(model)) or 'none'}"],
                hint="use `method: lora`",
            )
        for name, layer in found:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, self._small(layer))
        if self.quantise == "int8":  # it says so of every layer in every step
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        vars(model)["is_loaded_in_8bit" if self.quantise == "int8" else "is_loaded_in_4bit"] = True  # PEFT reads it
        return model.requires_grad_(False)

    def _small(self, layer: nn.Linear) -> nn.Module:
        """A linear layer in few bits, on the device of its own."""
        import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]

        shape, bias = (layer.in_features, layer.out_features), layer.bias is not None  # pyright: ignore[reportUnnecessaryComparison]
        values, device = layer.weight.detach().cpu(), layer.weight.device
        made: Any
        if self.quantise == "int8":
            made = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=6.0)
            made.weight = bnb.nn.Int8Params(values.to(torch.float16), requires_grad=False, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(
                *shape, bias=bias, compute_dtype=compute_type(), compress_statistics=self.double,
                quant_type=self.quantise,
            )  # fmt: skip
            made.support_avx512bf16_for_cpu = False  # it would repack, and round, frozen weights in a forward pass
            made.weight = bnb.nn.Params4bit(
                values, requires_grad=False, compress_statistics=self.double, quant_type=self.quantise, module=made
            )
        if bias:
            made.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        return made.to(device)


def installed() -> bool:
    """Is the quantiser there?"""
    return find_spec("bitsandbytes") is not None


def compute_type() -> torch.dtype:
    """What dequantised weights are multiplied in."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def is_adapted(module: object) -> bool:
    """Is it a layer with a pair of LoRA's?"""
    return isinstance(module, LoraLayer)


def is_quantised(module: nn.Module) -> bool:
    """Is it a layer of bitsandbytes'?"""
    return type(module).__module__.startswith("bitsandbytes.")


@torch.no_grad()
def plain(module: nn.Module, name: str) -> nn.Linear:
    """A layer of plain weights that computes the same.

    Raises:
        CompatibilityError: if a weight is not finite.
    """
    from peft.utils.integrations import dequantize_module_weight

    layer: Any = module
    base = layer.get_base_layer() if is_adapted(module) else layer
    weight = dequantize_module_weight(base).float()
    for pair in layer.active_adapters if is_adapted(module) else ():
        weight = weight + layer.get_delta_weight(pair)
    if not weight.isfinite().all():
        raise CompatibilityError(f"the merged weight of {name} is not finite", hint="export the adapter as it is")
    made = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device=weight.device)
    made.weight.copy_(weight)
    if base.bias is not None:
        made.bias.copy_(base.bias)
    return made.requires_grad_(False)
