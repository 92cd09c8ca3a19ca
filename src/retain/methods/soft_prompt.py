"""What soft prompts have in common: virtual tokens before the text of a frozen model, and no weight of it changed."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from retain.errors import CompatibilityError
from retain.kernels.low_rank import LowRank
from retain.methods.tuner import task_type
from retain.models.family import Family, pretrained
from retain.models.virtual_tokens import attached

__all__ = ["SoftPrompt", "peft_sizes"]

READERS = ("decoder", "seq2seq")
"""Families that read virtual tokens before a text."""


class SoftPrompt(ABC):
    """Packed documents would share one prompt at the row's beginning, so rows are padded."""

    name: ClassVar[str]
    packs: ClassVar[bool] = False
    can_detach: ClassVar[bool] = True
    can_extend: ClassVar[bool] = False

    def supports(self, family: Family) -> str | None:
        """Transformers that read text left to right, or encode it: elsewhere virtual tokens are no part of it."""
        return None if family.name in READERS else f"virtual tokens are no part of what {family.name!r} reads"

    def merge(self, model: nn.Module) -> nn.Module:
        """Refused: virtual tokens are no weight.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError(
            "a soft prompt cannot be merged: it is no change of a weight",
            hint="export it as it is, or use `method: lora`",
        )

    def modules(self, model: nn.Module) -> list[str]:
        """The one prompt."""
        return ["default"]

    def extend(self, model: nn.Module, name: str) -> nn.Module:
        """Refused: there is one.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError(f"method {self.name!r} keeps one prompt", hint="use `method: prompt`, or `adapter`")

    def activate(self, model: nn.Module, names: Sequence[str]) -> nn.Module:
        """Read the prompt, or nothing where none is named; of none, the model may be a bare base."""
        if names or attached(model) is not None:
            self.place(model).active = bool(names)
        return model

    @contextmanager
    def detached(self, model: nn.Module) -> Generator[nn.Module]:
        """The base model: nothing is read before the text."""
        place = self.place(model)
        before, place.active = place.active, False
        try:
            yield model
        finally:
            place.active = before

    @abstractmethod
    def place(self, model: nn.Module) -> Any:
        """The module of the virtual tokens, which is `active` or not.

        Raises:
            CompatibilityError: if the model has none.
        """

    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """Refused: virtual tokens are no weight.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError("a soft prompt changes no weight", hint="use `method: lora`")

    def low_rank(self, model: nn.Module) -> Sequence[LowRank]:
        """None: virtual tokens are no product."""
        return ()


def peft_sizes(model: nn.Module) -> dict[str, Any]:
    """What PEFT's configuration of a prompt says of the model that it belongs to."""
    settings = pretrained(model).config.get_text_config()
    return {
        "task_type": task_type(model),
        "num_transformer_submodules": 1,
        "num_layers": settings.num_hidden_layers,
        "num_attention_heads": settings.num_attention_heads,
        "token_dim": settings.hidden_size,
        "base_model_name_or_path": settings.name_or_path or None,
        "inference_mode": True,
    }
