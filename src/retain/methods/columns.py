"""Columns of progressive networks for recurrent language models: every column a whole network that reads earlier ones.

    h_i^(k) = cell(W_i^(k) h_{i-1}^(k) + U_i^(k) z_i^(k)),   i >= 2
    z_i^(k) = relu(V_i^(k) (alpha_i^(k) * h_{i-1}^(<k)))

h^(<k) are the outputs of all columns that column k reads, side by side, and alpha is a learned scalar for each of them.
The first layer reads the column's own embedding alone. The input weight of a cell that reads others is [W U].

Source: Rusu et al. 2016, https://arxiv.org/abs/1606.04671, eq. 2.
Differs: the output layer's lateral is added to its input (h_L + U z), which spares a second matrix as large as the
vocabulary; U starts at zero, so that a column starts as the network that it is a copy of.
"""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retain.errors import CompatibilityError, LineageError
from retain.kernels.low_rank import LowRank
from retain.models.family import Family, pretrained
from retain.models.recurrent_columns import (
    BASE,
    ColumnCells,
    ColumnNetwork,
    layer_of,
    make_switches,
    switches,
    widened,
)
from retain.models.recurrent_network import RecurrentConfig, RecurrentForCausalLM
from retain.parameters import freeze

__all__ = ["Columns"]

FIRST = "default"
"""The name of the column that `apply` makes."""


@dataclass(frozen=True)
class Columns:
    """A whole recurrent network beside the frozen base for every task; extended, it reads those before it.

    Args:
        start: a column's first weights: those of the `base`, or `random` ones.
        reads_base: let columns read the base network, too; pointless where the base starts from nothing.

    A column costs as much as the base; its laterals hidden_size^2 weights a layer for each column that it reads.
    """

    name: ClassVar[str] = "columns"
    packs: ClassVar[bool] = True
    can_detach: ClassVar[bool] = True
    can_extend: ClassVar[bool] = True
    no_products: ClassVar[str] = ""

    start: Literal["base", "random"] = "base"
    reads_base: bool = True

    def supports(self, family: Family) -> str | None:
        """Recurrent networks alone: a column of a transformer is an adapter stack."""
        return None if family.name == "recurrent" else "columns are whole recurrent networks; use `adapter`"

    def apply(self, model: nn.Module) -> nn.Module:
        """The model, frozen, with a first column beside it.

        Raises:
            CompatibilityError: if it is no recurrent network.
        """
        make_switches(model)
        return self.extend(model, FIRST)

    def save(self, model: nn.Module, folder: Path) -> None:
        """All columns but the base's as safetensors, and what they read as `columns.json`."""
        _, cells, _ = switches(model)
        own = {k: v.detach().cpu() for k, v in model.named_parameters() if f".columns.{BASE}." not in k}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(own, folder / "columns.safetensors", metadata={"format": "pt"})
        columns = {name: cells.column(name).reads for name in self.modules(model)}
        text = json.dumps({"method": "retain-columns", **asdict(self), "columns": columns}, indent=2)
        (folder / "columns.json").write_text(text, encoding="utf-8")

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The base model with the saved columns, all trainable; the last one answers.

        Raises:
            LineageError: if the columns were made for another model.
        """
        columns: dict[str, list[str]] = json.loads((folder / "columns.json").read_text("utf-8"))["columns"]
        make_switches(freeze(model))
        with torch.random.fork_rng():
            for name, reads in columns.items():
                self._add(model, name, reads)
        saved = load_file(folder / "columns.safetensors")
        present = dict(model.named_parameters())
        wrong = [name for name, value in saved.items() if name not in present or present[name].shape != value.shape]
        if wrong:
            raise LineageError(
                f"the columns in {folder} are not of this model",
                problems=[f"{name} does not fit" for name in wrong[:5]],
                hint="use the base model that they were made beside",
            )
        for name, value in saved.items():
            present[name].data = value.to(present[name].device).clone()  # aligned, so that sums round as ever
            present[name].requires_grad_(True)
        return self.activate(model, list(columns))

    def merge(self, model: nn.Module) -> nn.Module:
        """Refused: several networks cannot be one.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError("columns cannot be merged into one network", hint="export them as they are")

    @contextmanager
    def detached(self, model: nn.Module) -> Generator[nn.Module]:
        """The base network: no column answers."""
        parts = switches(model)
        before = [part.running for part in parts]
        self.activate(model, ())
        try:
            yield model
        finally:
            for part, running in zip(parts, before, strict=True):
                part.running = running

    def modules(self, model: nn.Module) -> list[str]:
        """The names of the columns beside the base, oldest first."""
        return [name for name in switches(model)[1].columns if name != BASE]

    def extend(self, model: nn.Module, name: str) -> nn.Module:
        """Add a column that reads those that are active; only it is trained."""
        _, cells, _ = switches(model)
        active = [other for other in cells.running if other != BASE]
        freeze(model)
        self._add(model, name, [*([BASE] if self.reads_base else []), *active])
        return self.activate(model, [name])

    def activate(self, model: nn.Module, names: Sequence[str]) -> nn.Module:
        """Let the last of these columns answer, with those that it reads; none: the base's own behaviour."""
        if not names and not isinstance(model.get_submodule("rnn"), ColumnCells):
            return model  # the bare base
        parts = switches(model)
        needed = {names[-1] if names else BASE}
        order = list(parts[1].columns)
        for name in reversed(order):  # a column reads earlier ones only
            if name in needed:
                needed |= set(parts[1].column(name).reads)
        for part in parts:
            part.running = tuple(name for name in order if name in needed)
        return model

    def low_rank(self, model: nn.Module) -> Sequence[LowRank]:
        """None: a column changes no weight."""
        return ()

    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """Refused: the base is not changed.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError("a column stands beside the base and changes no weight of it", hint="use `lora`")

    def _add(self, model: nn.Module, name: str, reads: Sequence[str]) -> None:
        """Make a column, trainable, at master precision."""
        embeddings, cells, heads = switches(model)
        dtype = torch.promote_types(next(embeddings.columns[BASE].parameters()).dtype, torch.float32)
        if self.start == "random":
            network = RecurrentForCausalLM(cast("RecurrentConfig", pretrained(model).config))
            embedding, head = network.embeddings, network.lm_head
            layers = [layer_of(network.rnn, i) for i in range(network.rnn.num_layers)]
        else:
            embedding, head = deepcopy(embeddings.columns[BASE]), deepcopy(heads.columns[BASE])
            if heads.columns[BASE].weight is embeddings.columns[BASE].weight:
                head.weight = embedding.weight
            layers = list(cells.column(BASE).cells)
        column = ColumnNetwork([widened(cell, bool(i and reads)) for i, cell in enumerate(layers)], reads)
        for switch, module in zip((embeddings, cells, heads), (embedding, column, head), strict=True):
            switch.columns[name] = module.to(dtype).requires_grad_(True)
