"""What soft prompts have in common: virtual tokens before the text of a frozen model, and no weight of it changed.

New heads of an encoder are trained and saved with them.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retain.errors import CompatibilityError, LineageError
from retain.kernels.low_rank import LowRank
from retain.methods.tuner import task_type
from retain.models.family import Family, pretrained
from retain.models.new_heads import let_heads_train, trained_heads, with_heads
from retain.models.virtual_tokens import attached

__all__ = ["WEIGHTS", "SoftPrompt", "load_heads", "peft_sizes", "save_prompt"]

READERS = ("decoder", "encoder", "seq2seq")
"""Families that read virtual tokens before a text."""

WEIGHTS = "adapter_model.safetensors"
"""PEFT's name for the file that holds a prompt."""

HEADS = "base_model."
"""What PEFT puts before the names of modules that are saved beside a prompt."""


class SoftPrompt(ABC):
    """Packed documents would share one prompt at the row's beginning, so rows are padded."""

    name: ClassVar[str]
    packs: ClassVar[bool] = False
    can_detach: ClassVar[bool] = True
    can_extend: ClassVar[bool] = False
    no_products: ClassVar[str] = ""

    def supports(self, family: Family) -> str | None:
        """Transformers: elsewhere virtual tokens are no part of what is read."""
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


def save_prompt(model: nn.Module, config: PeftConfig, values: Tensor, folder: Path) -> None:
    """Write a prompt as PEFT does, with the heads that are trained beside it.

    Args:
        model: what it belongs to.
        config: what PEFT says of it.
        values: (tokens, width), what PEFT looks up.
        folder: a new or empty one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with_heads(config, model).save_pretrained(str(folder))
    heads = {f"{HEADS}{k}": v for k, v in model.named_parameters() if k.startswith(trained_heads(model))}
    saved = {name: value.detach().cpu().contiguous() for name, value in {"prompt_embeddings": values, **heads}.items()}
    save_file(saved, folder / WEIGHTS, {"format": "pt"})


def load_heads(model: nn.Module, folder: Path) -> nn.Module:
    """Give a model the heads that lie beside a saved prompt, and let all train; one that later tasks need is not there.

    Raises:
        LineageError: if they are of another shape.
    """
    own = {f"{HEADS}{k}": v for k, v in model.named_parameters() if k.startswith(trained_heads(model))}
    saved = {name: value for name, value in load_file(folder / WEIGHTS).items() if name.startswith(HEADS)}
    if wrong := [name for name, value in saved.items() if name not in own or own[name].shape != value.shape]:
        raise LineageError(
            f"the heads in {folder} are not of this model",
            problems=[f"{name.removeprefix(HEADS)} does not fit" for name in sorted(wrong)[:5]],
            hint="use the base model and the labels that they were made with",
        )
    for name, value in saved.items():
        own[name].data = value.to(own[name].device).clone()  # aligned, so that sums round as ever
    return let_heads_train(model)


def peft_sizes(model: nn.Module) -> dict[str, Any]:
    """What PEFT's configuration of a prompt says of the model that it belongs to."""
    settings = pretrained(model).config.get_text_config()
    return {
        "task_type": task_type(model) or "FEATURE_EXTRACTION",  # under which PEFT reads a prompt before any other head
        "num_transformer_submodules": 1,
        "num_layers": settings.num_hidden_layers,
        "num_attention_heads": settings.num_attention_heads,
        "token_dim": settings.hidden_size,
        "base_model_name_or_path": settings.name_or_path or None,
        "inference_mode": True,
    }
