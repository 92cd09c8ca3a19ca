"""Bottleneck adapters: small networks after the sublayers of a frozen transformer, or after a frozen recurrent network.

    h' = h + W_up z,      z = activation(W_down h)                                        one adapter

    z_k = activation(W_down_k h + U_k activation(V_k [alpha_kj * z_j for j < k]))         a column beside earlier ones

Extended, every adapter is a column: it reads the bottlenecks of those that were active when it was made, which no
longer move. Only the column that answers is added to h.

Source: Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, section 2.1; Pfeiffer et al. 2021,
https://arxiv.org/abs/2005.00247; laterals: Rusu et al. 2016, https://arxiv.org/abs/1606.04671, eq. 2.
Differs: a column's lateral inputs come from the same place in the network, and the earlier columns read the hidden
states of the column that answers, so that any number of columns costs one pass of the base.
"""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from retain.errors import CompatibilityError, ConfigError, LineageError
from retain.kernels.low_rank import LowRank
from retain.models.family import Family, pretrained
from retain.models.new_heads import let_heads_train, trained_heads
from retain.parameters import freeze

__all__ = ["Adapter"]

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "DenseReluDense", "fc2", "output")
ATTENTION = (
    "self_attn", "attn", "self_attention", "attention", "encoder_attn", "SelfAttention", "EncDecAttention",
)  # fmt: skip
FIRST = "default"
"""The name of the adapter that `apply` makes."""


@dataclass(frozen=True)
class Adapter:
    """A trained bottleneck after the feed-forward part of every block, and after attention too where `houlsby`.

    Args:
        size: width of the bottleneck, above 0.
        placement: `pfeiffer` (after the feed-forward part) or `houlsby` (after attention, too). A recurrent network has
            one place, after its last layer.
        activation: `relu`, `gelu` or `silu`.
        dropout: of the bottleneck, in [0, 1).

    W_up starts at zero, so that the model starts as it was.
    """

    name: ClassVar[str] = "adapter"
    packs: ClassVar[bool] = True
    can_detach: ClassVar[bool] = True
    can_extend: ClassVar[bool] = True
    no_products: ClassVar[str] = ""

    size: int = 64
    placement: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    activation: Literal["relu", "gelu", "silu"] = "relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: expected a whole number above 0, got {self.size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")

    def supports(self, family: Family) -> str | None:
        """Every family that learns by gradients."""
        return None if family.needs_gradients else f"family {family.name!r} is fitted by counting: it has no layers"

    def apply(self, model: nn.Module) -> nn.Module:
        """The model, frozen, with an adapter at every place, in float32.

        Raises:
            ConfigError: if the model has no such place.
        """
        self._make_places(model)
        return let_heads_train(self.extend(model, FIRST))

    def save(self, model: nn.Module, folder: Path) -> None:
        """All adapters as safetensors, and what they are as `adapter_config.json`."""
        place = places(model)[0]
        columns = {name: place.column(name).reads for name in place.columns}
        prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Place))
        prefixes += trained_heads(model)
        values = {k: v.detach().cpu() for k, v in model.named_parameters() if k.startswith(prefixes)}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(values, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"method": "retain-adapter", **asdict(self), "columns": columns}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The base model with the saved adapters, all trainable; the last one answers.

        Raises:
            LineageError: if the adapters were made for another model, or by other settings.
        """
        columns: dict[str, list[str]] = json.loads((folder / "adapter_config.json").read_text("utf-8"))["columns"]
        self._make_places(model)
        with torch.random.fork_rng():
            for name, reads in columns.items():
                self.activate(model, reads)
                self.extend(model, name)
        for place in places(model):
            place.requires_grad_(True)
        let_heads_train(model)
        saved = load_file(folder / "adapter_model.safetensors")
        present = dict(model.named_parameters())
        wrong = [name for name, value in saved.items() if name not in present or present[name].shape != value.shape]
        if wrong:
            raise LineageError(
                f"the adapters in {folder} are not of this model and method",
                problems=[f"{name} does not fit" for name in wrong[:5]],
                hint="use the base model and the settings that they were made with",
            )
        with torch.no_grad():
            for name, value in saved.items():
                present[name].data = value.to(present[name].device).clone()  # aligned, so that sums round as ever
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        """Refused: an adapter is not linear.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError(
            "a bottleneck adapter cannot be merged: it is no change of a weight",
            hint="export it as it is, or use `method: lora`",
        )

    @contextmanager
    def detached(self, model: nn.Module) -> Generator[nn.Module]:
        """The base model: no adapter answers."""
        active = places(model)[0].active
        self.activate(model, ())
        try:
            yield model
        finally:
            self.activate(model, active)

    def modules(self, model: nn.Module) -> list[str]:
        """The names of the adapters, oldest first."""
        return list(places(model)[0].columns)

    def extend(self, model: nn.Module, name: str) -> nn.Module:
        """Add an adapter that reads the bottlenecks of those that are active; only it is trained."""
        first = next(model.parameters())
        like = torch.empty(0, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
        freeze(model)
        for place in places(model):
            place.add(name, like)
        return model

    def activate(self, model: nn.Module, names: Sequence[str]) -> nn.Module:
        """Let the last of these adapters answer, with those that it reads; none: the base's own behaviour."""
        for place in places(model) if names else find_places(model):
            place.active = tuple(names)
        return model

    def low_rank(self, model: nn.Module) -> Sequence[LowRank]:
        """None: an adapter is not linear."""
        return ()

    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """Refused: an adapter is not linear.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError("a bottleneck adapter changes no weight", hint="use `method: lora`")

    def _make_places(self, model: nn.Module) -> None:
        """Put an empty place after every sublayer that an adapter belongs to."""
        wanted = FEED_FORWARD if self.placement == "pfeiffer" else FEED_FORWARD + ATTENTION
        found = [
            module
            for path, module in model.named_modules()
            if isinstance(module, nn.RNNBase) or (path.split(".")[-1] in wanted and path.split(".")[-2:-1][0].isdigit())
        ]
        if not found:
            inside = sorted({path.split(".")[-1] for path, _ in model.named_modules() if path.split(".")[-2:-1]})
            raise ConfigError(
                f"{type(model).__name__} has no part that an adapter goes after",
                problems=[f"looked for {', '.join(wanted)} in its blocks, found {', '.join(inside[:12])}"],
                hint="use `method: lora` with `target_modules`",
            )
        width: int = pretrained(model).config.get_text_config().hidden_size
        for module in found:
            place = Place(width, self)
            module.add_module("adapters", place)
            module.register_forward_hook(place.change)


Activation = Callable[[Tensor], Tensor]


class Column(nn.Module):
    """One adapter at one place, and how it reads the bottlenecks of earlier ones.

    Args:
        width: of the hidden states.
        size: of the bottleneck.
        reads: the adapters that it reads.
    """

    def __init__(self, width: int, size: int, reads: Sequence[str]) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        if reads:
            self.alpha = nn.Parameter(0.1 * torch.rand(len(reads)))  # small, and a scale of its own for each column
            self.lateral_in = nn.Linear(size * len(reads), size)  # V
            self.lateral_out = nn.Linear(size, size, bias=False)  # U

    def forward(self, hidden: Tensor, earlier: Sequence[Tensor], activation: Activation) -> Tensor:
        """The bottleneck z, (..., size), of hidden states, (..., width), and of the bottlenecks that this one reads."""
        inner = self.down(hidden)
        if earlier:
            scaled = torch.cat([scale * z for scale, z in zip(self.alpha, earlier, strict=True)], dim=-1)
            inner = inner + self.lateral_out(activation(self.lateral_in(scaled)))
        return activation(inner)


class Place(nn.Module):
    """All adapters that stand at one place of the network.

    Args:
        width: of the hidden states.
        method: how adapters are made.
    """

    def __init__(self, width: int, method: Adapter) -> None:
        super().__init__()
        self.width, self.method = width, method
        self.columns = nn.ModuleDict()
        self.active: tuple[str, ...] = ()

    def column(self, name: str) -> Column:
        """The adapter of that name."""
        return cast("Column", self.columns[name])

    def add(self, name: str, like: Tensor) -> None:
        """Make an adapter that reads the active ones; it becomes active. Its type and device are those of `like`."""
        self.columns[name] = Column(self.width, self.method.size, self.active).to(like)
        self.active = (*self.active, name)

    def forward(self, hidden: Tensor) -> Tensor:
        """The hidden states with the answering adapter's part added, (..., width)."""
        if not self.active:
            return hidden
        activation = ACTIVATIONS[self.method.activation]
        made: dict[str, Tensor] = {}

        def read(name: str) -> Tensor:
            if name not in made:
                column = self.column(name)
                made[name] = column(hidden, [read(other) for other in column.reads], activation)
            return made[name]

        answering = self.column(self.active[-1])
        learns = self.training and answering.up.weight.requires_grad  # what is frozen answers without dropout
        return hidden + answering.up(F.dropout(read(self.active[-1]), self.method.dropout, learns))

    def change(self, _: nn.Module, __: Any, output: Any) -> Any:
        """As a forward hook of the sublayer, whose first output is the hidden states."""
        if isinstance(output, PackedSequence):
            return output._replace(data=self(output.data))
        if isinstance(output, tuple):
            first, *others = cast("tuple[Any, ...]", output)
            return (self.change(self, None, first), *others)
        return self(output)


def places(model: nn.Module) -> list[Place]:
    """Every place of the model that adapters stand at.

    Raises:
        CompatibilityError: if it has none.
    """
    if not (found := find_places(model)):
        raise CompatibilityError(f"{type(model).__name__} has no adapter", hint="apply the method first")
    return found


def find_places(model: nn.Module) -> list[Place]:
    """Every place of the model that adapters stand at, if any."""
    return [module for module in model.modules() if isinstance(module, Place)]
