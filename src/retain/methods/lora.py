"""Low-rank adaptation: frozen weights, each with a trained low-rank change beside it.

    W' = W + s B A,   s = alpha / r                                        LoRA; B starts at 0
    W' = W + s (B A - B_0 A_0),   s B_0 A_0 the first r terms of W's SVD     PiSSA; B, A start at B_0, A_0

PiSSA's authors take s B_0 A_0 out of W. Here W stays as it is and a second, frozen pair takes it out, which is the same
model: the base can be detached, and what is saved is a LoRA of rank 2 r that any tool puts beside the original base.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3; Meng et al. 2024, https://arxiv.org/abs/2404.02948,
eq. 2-4. Computed by PEFT; the weights of a recurrent network through its `target_parameters`.
"""

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retain.errors import CompatibilityError
from retain.kernels.low_rank import LowRank
from retain.methods.tuner import Tuner, adapted, has_conv1d, layers, task_type, wrapped
from retain.models.family import Family, pretrained
from retain.parameters import trainable

__all__ = ["LoRA"]

FIRST = "default"
"""The name of the pair that `apply` makes."""
START = "start"
"""PiSSA's frozen pair, (-B_0, A_0)."""
MODULES = "modules.json"
"""The names of several pairs in their order; PEFT keeps each but the first in a folder of its name."""


DORA = "DoRA divides the sum of weight and product by its length"


@dataclass(frozen=True)
class LoRA(Tuner):
    """W + (alpha / r) B A, where only A (r, in) and B (out, r) are trained; B starts at zero.

    Extended, it keeps several pairs, and adds up those that are active: W + (alpha / r) sum_j B_j A_j.

    Args:
        r: the rank, above 0.
        alpha: the scale's numerator.
        dropout: of the input of A, in [0, 1).
        target_modules: names of the modules to adapt, or `all-linear` for every linear layer but the head; of a
            recurrent network, names of its weights (`weight_hh_l0`), or `all-linear` for all of its matrices.
        init: B at `zero`, or both factors from the weight's largest singular values (`pissa`, Meng et al. 2024).
        use_rslora: scale by alpha / sqrt(r) instead (Kalajdzievski 2023).
        use_dora: learn the weight's magnitude beside its direction (Liu et al. 2024).
    """

    name: ClassVar[str] = "lora"
    can_extend: ClassVar[bool] = True

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    init: Literal["zero", "pissa"] = "zero"
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r: expected a whole number above 0, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")
        if self.init == "pissa" and self.use_dora:
            raise ValueError('init: "pissa" takes a part out of the weight whose magnitude DoRA learns; use "zero"')
        if self.init == "pissa":  # its pair starts as a part of the base: no further one could
            object.__setattr__(self, "can_extend", False)
        if self.use_dora:
            object.__setattr__(self, "no_products", DORA)

    def supports(self, family: Family) -> str | None:
        """Every family that learns by gradients."""
        if not family.needs_gradients:
            return f"family {family.name!r} is fitted by counting: it has no weights to adapt"
        if family.name == "recurrent" and (self.dropout or self.use_dora):
            given = "dropout" if self.dropout else "use_dora"
            return f"`{given}` acts on what a linear layer reads, and a recurrent cell's weights are none; leave it out"
        return None

    def config(self, model: nn.Module) -> LoraConfig:
        """One pair's, as PEFT says it."""
        modules = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        parameters = self._recurrent(model)
        if parameters:
            ends = {name.rsplit(".", 1)[-1] for name in parameters}
            modules = [] if isinstance(modules, str) else [name for name in modules if name not in ends]
        settings: dict[str, Any] = {"use_rslora": self.use_rslora, "use_dora": self.use_dora}
        return LoraConfig(
            r=self.r, lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]  a float works
            lora_dropout=self.dropout, target_modules=modules, target_parameters=parameters or None,
            task_type=task_type(model),  # pyright: ignore[reportArgumentType]  None is no task of PEFT's
            fan_in_fan_out=has_conv1d(model), **settings,
        )  # fmt: skip

    def apply(self, model: nn.Module) -> nn.Module:
        """The model wrapped by PEFT, the adapter in float32.

        Raises:
            ConfigError: if no module has one of the target names.
            CompatibilityError: if it would adapt one of two modules that share a weight.
        """
        self._refuse_shared(model)
        made = wrapped(model, self.config(model))
        if self.init == "pissa":
            self._add_start(made)
            take_largest(made)
        return made

    def save(self, model: nn.Module, folder: Path) -> None:
        """PEFT's own layout, which other tools load; further pairs in folders of their names."""
        if self.init == "pissa":
            self._save_both(adapted(model), folder)
            return
        super().save(model, folder)
        if len(names := self.modules(model)) > 1:
            (folder / MODULES).write_text(json.dumps(names), encoding="utf-8")

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The base model with the saved adapter, trainable; all of them, and all active, where there are several."""
        if self.init == "pissa":
            return self._load_both(model, folder)
        made: Any = super().load(model, folder)
        if (folder / MODULES).exists():
            names: list[str] = json.loads((folder / MODULES).read_text(encoding="utf-8"))
            for name in names[1:]:
                made.load_adapter(str(folder / name), name, is_trainable=True)
            made.base_model.set_adapter(names)  # which makes each of them trainable
        return made

    def modules(self, model: nn.Module) -> list[str]:
        """The names of the pairs, oldest first."""
        return [name for name in adapted(model).peft_config if name != START]

    def extend(self, model: nn.Module, name: str) -> nn.Module:
        """Add a pair to those that are active; only it is trained, and the dropout of the others ends.

        Raises:
            CompatibilityError: beside PiSSA's.
        """
        if not self.can_extend:
            raise CompatibilityError("PiSSA keeps one pair beside the base", hint="use `init: zero`")
        made = adapted(model)
        tuner: Any = made.base_model
        active: list[str] = [] if layers(model)[0][1].disable_adapters else list(tuner.active_adapters)
        for _, layer in layers(model):
            for other in layer.lora_dropout:
                layer.lora_dropout[other] = nn.Identity()
        PeftModel.add_adapter(made, name, self._further(made))  # a classifier's own would copy its head
        tuner.set_adapter(name)
        return self.activate(model, [*active, name])

    def activate(self, model: nn.Module, names: Sequence[str]) -> nn.Module:
        """Add up these pairs; none: the base's own weights."""
        if names and START in adapted(model).peft_config:
            names = [*(name for name in names if name != START), START]
        return super().activate(model, names)

    def low_rank(self, model: nn.Module) -> Sequence[LowRank]:
        """Every pair of every adapted weight.

        Raises:
            CompatibilityError: of DoRA, whose change is no product.
        """
        found = places(model)
        if any(any(layer.use_dora.values()) for _, _, layer in found):
            raise CompatibilityError(
                f"a change of a weight is no product of two factors: {DORA}",
                hint="use `space: parameters` with EWC, or set `method.use_dora: false`",
            )
        return [
            LowRank(
                weight=f"{base}.{layer.parameter_name if isinstance(layer, ParamWrapper) else 'weight'}",
                left=f"{name}.lora_B.{pair}.weight",
                right=f"{name}.lora_A.{pair}.weight",
                scale=layer.scaling[pair],
                transposed=layer.fan_in_fan_out,
            )
            for name, base, layer in found
            for pair in layer.lora_A
        ]

    def _further(self, model: PeftModel) -> LoraConfig:
        """Another pair's, of the very layers that have one: by the same words PEFT might find a new head, too."""
        config: Any = self.config(model.get_base_model())
        config.target_modules = {name for name, layer in layers(model) if not isinstance(layer, ParamWrapper)}
        return config

    def _recurrent(self, model: nn.Module) -> list[str]:
        """The names of a recurrent network's matrices that are targets; none where it is no such network."""
        wanted = self.target_modules
        return [
            f"{path.replace('.base_layer', '')}.{name}"  # as the base calls it, whatever wraps it by now
            for path, module in model.named_modules()
            if isinstance(module, nn.RNNBase)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 2 and (wanted == "all-linear" or name in wanted)
        ]

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

    def _add_start(self, model: PeftModel) -> None:
        """PiSSA's frozen pair beside the trained one, without dropout, as the authors' residual weight has none."""
        names = list(trainable(model))
        config = self._further(model)
        config.lora_dropout = 0.0
        PeftModel.add_adapter(model, START, config)  # a classifier's own would copy its head
        model.base_model.set_adapter([FIRST, START])  # pyright: ignore[reportCallIssue]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)

    def _save_both(self, model: PeftModel, folder: Path) -> None:
        """Both pairs as one of twice the rank: [B, -B_0] [A; A_0]."""
        trained, start = (get_peft_model_state_dict(model, adapter_name=name) for name in (FIRST, START))
        values = {
            name: torch.cat([value, start[name]], dim=1 if "lora_B" in name else 0) if name in start else value
            for name, value in trained.items()
        }
        values = {name: value.detach().cpu().contiguous() for name, value in values.items()}
        config: Any = deepcopy(model.peft_config[FIRST])
        config.r, config.inference_mode = 2 * self.r, True
        config.lora_alpha = self.alpha * (2**0.5 if self.use_rslora else 2)  # the same scale
        config.base_model_name_or_path = pretrained(model.get_base_model()).config.name_or_path or None
        config.save_pretrained(folder)
        save_file(values, folder / "adapter_model.safetensors", {"format": "pt"})

    def _load_both(self, model: nn.Module, folder: Path) -> nn.Module:
        """The trained half and the frozen half of what `_save_both` wrote."""
        with torch.random.fork_rng():
            made = wrapped(model, self.config(model))
            self._add_start(made)
        saved = load_file(folder / "adapter_model.safetensors")
        factors = {name: v.chunk(2, dim=1 if "lora_B" in name else 0) for name, v in saved.items() if ".lora_" in name}
        trained = saved | {name: halves[0].contiguous() for name, halves in factors.items()}  # and a head
        set_peft_model_state_dict(made, trained, adapter_name=FIRST)
        start = {name: halves[1].contiguous() for name, halves in factors.items()}
        set_peft_model_state_dict(made, start, adapter_name=START)
        return made


def places(model: nn.Module) -> list[tuple[str, str, Any]]:
    """The adapted layers: their names in the model as it is, those of the modules that they wrap, and themselves."""
    return [
        (name, name + depth(module) * ".base_layer", module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def depth(module: Any) -> int:
    """How many wrappers lie around the base layer: those of several weights of one module lie around one another."""
    count = 0
    while isinstance(module, LoraLayer):
        module, count = module.base_layer, count + 1
    return count


@torch.no_grad()
def take_largest(model: PeftModel) -> None:
    """Give both pairs of every weight its largest singular values and vectors, the frozen pair with the other sign."""
    found: list[tuple[str, Any]] = layers(model)
    for _, layer in found:
        place: str = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        weight: Tensor = layer.get_base_layer().get_parameter(place)
        weight = weight.T if layer.fan_in_fan_out else weight  # (out, in)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        left, sizes, right = torch.linalg.svd(wide, full_matrices=False)
        rank = min(layer.r[FIRST], len(sizes))
        root = (sizes[:rank] / layer.scaling[FIRST]).sqrt()
        for pair, sign in ((FIRST, 1), (START, -1)):
            A, B = (cast("Tensor", factors[pair].weight) for factors in (layer.lora_A, layer.lora_B))
            A.fill_(0)[:rank] = root[:, None] * right[:rank]
            B.fill_(0)[:, :rank] = sign * left[:, :rank] * root


def _head(model: nn.Module) -> Any:
    """The module that makes logits; None where the model has none of `transformers`'."""
    return pretrained(model).get_output_embeddings()
