"""What moves: a tuning method says it through `requires_grad` and nothing else.

A method that can extend keeps several modules (columns, adapters, prompts) beside one frozen base: `apply` makes the
first, `extend` further ones, `activate` says which of them answer.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor, nn

from retain.kernels.low_rank import LowRank
from retain.models.family import Family

__all__ = ["Method"]


class Method(Protocol):
    """A way of tuning. A method is a dataclass; its fields are its configuration."""

    name: ClassVar[str]
    packs: ClassVar[bool]  # may packed documents share a row? (soft prompts leak between them)
    can_detach: ClassVar[bool]  # is the base's own behaviour still there, without a second model?
    can_extend: ClassVar[bool]  # may there be several modules beside the frozen base?
    no_products: ClassVar[str]  # why its changes, which seem to be products of two factors, are none; else empty

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

    def modules(self, model: nn.Module) -> list[str]:
        """The names of the modules that the method put beside the base, oldest first."""
        ...

    def extend(self, model: nn.Module, name: str) -> nn.Module:
        """Add a module that reads, or is added to, those that are active; it becomes active, and only it is trained.

        Its first weights are drawn from the global random state.
        """
        ...

    def activate(self, model: nn.Module, names: Sequence[str]) -> nn.Module:
        """Let exactly these modules take part, the last one answering; none: the base's own behaviour.

        What is trained stays as it is. Of none, the model may be a bare base that the method was not applied to.
        """
        ...

    def low_rank(self, model: nn.Module) -> Sequence[LowRank]:
        """The changes of frozen weights that are trained as products of two factors; empty where there are none."""
        ...

    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """What the method did to each weight, in weight space, by the base model's names."""
        ...
