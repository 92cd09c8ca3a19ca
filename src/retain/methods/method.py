"""What moves: a tuning method says it through `requires_grad` and nothing else."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor, nn

from retain.models.family import Family

__all__ = ["Method"]


class Method(Protocol):
    """A way of tuning. A method is a dataclass; its fields are its configuration."""

    name: ClassVar[str]
    packs: ClassVar[bool]  # may packed documents share a row? (soft prompts leak between them)
    can_detach: ClassVar[bool]  # is the base's own behaviour still there, without a second model?

    def supports(self, family: Family) -> str | None:
        """Why this method cannot tune the family, or None."""
        ...

    def apply(self, model: nn.Module) -> nn.Module:
        """The model with what training moves; afterwards `requires_grad` is the whole truth."""
        ...

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what the method changed, in the layout that other tools load."""
        ...

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The base model with what `save` wrote, ready to be trained further."""
        ...

    def merge(self, model: nn.Module) -> nn.Module:
        """A plain model that answers the same."""
        ...

    def detached(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The base model's own behaviour while inside."""
        ...

    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """What the method did to each weight, in weight space, by the base model's names."""
        ...
