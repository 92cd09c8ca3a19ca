"""Freeze: only named parts of the model move, or all but the bottom layers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from retain.errors import CompatibilityError, ConfigError
from retain.kernels.low_rank import LowRank
from retain.models.family import Family, pretrained
from retain.models.new_heads import let_heads_train
from retain.parameters import freeze, is_embedding, known_rows, layer_number, modules_of, swapped, trainable

__all__ = ["Freeze"]

PLACE = "frozen_base"
"""The name of the module that keeps the base's values of what moves."""


@dataclass(frozen=True)
class Freeze:
    """Train a part of the model's own weights, and keep a copy of what they were.

    Args:
        train: patterns of the parameters that move (`*` and `?`, as in file names), each also as the name of a module:
            `lm_head`, `model.layers.11`, `*.mlp.*`, `*norm*`.
        num_layers: how many layers from the bottom are frozen, with the embeddings, where no pattern is given; at
            least 0 and fewer than there are. With 0 the embeddings alone are.

    An output head that is tied to frozen embeddings is frozen with them. Memory: a copy of what moves.
    """

    name: ClassVar[str] = "freeze"
    packs: ClassVar[bool] = True
    can_detach: ClassVar[bool] = True
    can_extend: ClassVar[bool] = False
    no_products: ClassVar[str] = ""

    train: tuple[str, ...] = ()
    num_layers: int = 0

    def __post_init__(self) -> None:
        if self.num_layers < 0:
            raise ValueError(f"num_layers: expected a whole number of at least 0, got {self.num_layers}")
        if self.num_layers and self.train:
            raise ValueError("num_layers: has no effect beside `train`, which names all that moves; leave one out")

    def supports(self, family: Family) -> str | None:
        """Every family that learns by gradients."""
        return None if family.needs_gradients else f"family {family.name!r} is fitted by counting: it has no weights"

    def apply(self, model: nn.Module) -> nn.Module:
        """The model, of which only the chosen part moves.

        Raises:
            ConfigError: if a pattern names nothing, or nothing is left to train.
        """
        names = [name for name, _ in model.named_parameters()]
        chosen = self._named(names, model) if self.train else self._above(names)
        freeze(model)
        for name in chosen:
            model.get_parameter(name).requires_grad_(True)
        let_heads_train(model)
        model.add_module(PLACE, Kept({name: p.detach().clone() for name, p in trainable(model).items()}))
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """A plain `transformers` folder: config and safetensors."""
        pretrained(model).save_pretrained(folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """Put the saved weights into the base model, whose own are kept."""
        self.apply(model)
        load_model(model, folder / "model.safetensors", strict=False)
        pretrained(model).tie_weights()
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        """The model itself, without the copy of the base's values."""
        kept(model)
        delattr(model, PLACE)
        return model

    def detached(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The base model: its own values, and no gradients, while inside."""
        return swapped(model, kept(model).base())

    def modules(self, model: nn.Module) -> list[str]:
        """None: the base itself is tuned."""
        return []

    def extend(self, model: nn.Module, name: str) -> nn.Module:
        """Refused: there is no module beside the base.

        Raises:
            CompatibilityError: always.
        """
        raise _no_modules()

    def activate(self, model: nn.Module, names: Sequence[str]) -> nn.Module:
        """Refused: there is no module beside the base.

        Raises:
            CompatibilityError: always.
        """
        raise _no_modules()

    def low_rank(self, model: nn.Module) -> Sequence[LowRank]:
        """None: the weights themselves move."""
        return ()

    @torch.no_grad()
    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """Of each weight that moves, what it is now less what it was."""
        base = kept(model).base()
        return {name: known_rows(model.get_parameter(name), before) - before for name, before in base.items()}

    def _named(self, names: Sequence[str], model: nn.Module) -> list[str]:
        """Parameters that a pattern names, or whose module it names."""
        places = [name for name, _ in model.named_modules() if name]
        first = {id(p): name for name, p in model.named_parameters()}
        tied = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if n != first[id(p)]}
        found = {pattern: [name for name in names if matches(pattern, name)] for pattern in self.train}
        problems: list[str] = []
        for pattern in (pattern for pattern, matched in found.items() if not matched):
            if shared := [own for name, own in tied.items() if matches(pattern, name)]:
                problems.append(f"{pattern!r} shares its weight with {shared[0]}: name that, and both move")
                continue
            near = get_close_matches(pattern.strip("*."), [*names, *places, *ends([*names, *places])], n=3, cutoff=0.5)
            problems.append(f"{pattern!r} names no parameter" + (f"; near it are {', '.join(near)}" if near else ""))
        if problems:
            raise ConfigError(
                "method.train: nothing of this model has such a name",
                problems=[*problems, f"its parameters are in {', '.join(modules_of(names))}"],
                hint="patterns are like those of file names: `*.mlp.*`, `lm_head`, `model.layers.1?.*`",
            )
        return sorted({name for matched in found.values() for name in matched})

    def _above(self, names: Sequence[str]) -> list[str]:
        """All but the embeddings and the bottom layers."""
        layers = {name: layer_number(name) for name in names}
        count = len({number for number in layers.values() if number is not None})
        if self.num_layers >= max(count, 1):
            raise ConfigError(
                f"method.num_layers: {self.num_layers} layers cannot be frozen, as the model has {count}",
                problems=[f"its parameters are in {', '.join(modules_of(names))}"],
                hint="freeze fewer, or name what moves with `train`",
            )
        return [
            name
            for name, number in layers.items()
            if (number is None and not is_embedding(name)) or (number is not None and number >= self.num_layers)
        ]


class Kept(nn.Module):
    """The base's values of what moves: buffers, which are saved nowhere.

    Args:
        values: by parameter name.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = list(values)
        for index, value in enumerate(values.values()):
            self.register_buffer(str(index), value, persistent=False)

    def base(self) -> dict[str, Tensor]:
        """By parameter name."""
        return dict(zip(self.names, self.buffers(), strict=True))


def kept(model: nn.Module) -> Kept:
    """The base's values.

    Raises:
        CompatibilityError: if the method was not applied.
    """
    place = dict(model.named_children()).get(PLACE)
    if not isinstance(place, Kept):
        raise CompatibilityError(f"{type(model).__name__} keeps no values of its base", hint="apply the method first")
    return place


def matches(pattern: str, name: str) -> bool:
    """Does the pattern name the parameter, or a module that it lies in?"""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def ends(names: Sequence[str]) -> list[str]:
    """The last parts of the names, each once."""
    return sorted({name.rpartition(".")[2] for name in names})


def _no_modules() -> CompatibilityError:
    return CompatibilityError(
        "freezing tunes the base model itself, so no module can be put beside it",
        hint="use `method: adapter`, `lora`, `prompt`, or `columns` for a recurrent model",
    )
