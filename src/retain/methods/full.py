"""Full fine-tuning: every weight moves; of a model that counts, every count."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safetensors.torch import load_model
from torch import Tensor, nn

from retain.errors import CompatibilityError
from retain.kernels.low_rank import LowRank
from retain.models.family import Family, pretrained

__all__ = ["Full"]


@dataclass(frozen=True)
class Full:
    """Train every parameter of the model."""

    name: ClassVar[str] = "full"
    packs: ClassVar[bool] = True
    can_detach: ClassVar[bool] = False
    can_extend: ClassVar[bool] = False
    no_products: ClassVar[str] = ""

    def supports(self, family: Family) -> str | None:
        """Every family; of one that counts, all counts are learned."""
        return None

    def apply(self, model: nn.Module) -> nn.Module:
        """The model itself, all of it trainable."""
        return model.requires_grad_(True)

    def save(self, model: nn.Module, folder: Path) -> None:
        """A plain `transformers` folder: config and safetensors."""
        pretrained(model).save_pretrained(folder)

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """Put the saved weights into a model of the same shape."""
        load_model(model, folder / "model.safetensors", strict=False)
        pretrained(model).tie_weights()
        return self.apply(model)

    def merge(self, model: nn.Module) -> nn.Module:
        """The model itself: there is nothing to merge."""
        return model

    @contextmanager
    def detached(self, model: nn.Module) -> Generator[nn.Module]:
        """Refused: the base's weights are overwritten.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError(
            "full fine-tuning overwrites the base model, so it cannot be detached",
            hint="use `method: lora`, or load the base model a second time",
        )
        yield model

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

    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """Refused: the base's weights are overwritten.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError(
            "full fine-tuning keeps no base weights to compare with",
            hint="load the base model a second time and subtract",
        )


def _no_modules() -> CompatibilityError:
    return CompatibilityError(
        "full fine-tuning tunes the base model itself, so no module can be put beside it",
        hint="use `method: adapter`, `lora`, `prompt`, or `columns` for a recurrent model",
    )
