"""The network of `methods.columns`: recurrent columns in the place of the parts of one recurrent language model.

The model keeps its surface: its embedding gives the embeddings of all running columns side by side, its recurrent part
runs them in order, and its head is that of the column that answers. Its state has the layers of all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from retain.errors import CompatibilityError
from retain.models.recurrent_network import RecurrentForCausalLM

__all__ = [
    "BASE",
    "ColumnCells",
    "ColumnNetwork",
    "layer_of",
    "make_switches",
    "switches",
    "widened",
]

BASE = "base"
"""The base network's own column."""

PARTS = ("embeddings", "rnn", "lm_head")
"""What a column has its own of, by the names that the model gives them."""


def widened(cell: nn.RNNBase, wider: bool) -> nn.RNNBase:
    """A copy of a one-layer network; where wider, with as many inputs again, whose weights are zero."""
    copy = new_cell(cell, cell.input_size * (1 + wider))
    values = {name: value.detach() for name, value in cell.named_parameters()}
    if wider:
        own = values["weight_ih_l0"]
        values["weight_ih_l0"] = torch.cat([own, torch.zeros_like(own)], dim=1)  # [W U]
    copy.to(values["weight_ih_l0"]).load_state_dict(values)
    return copy


class Lateral(nn.Module):
    """z = relu(V (alpha * h^(<k))).

    Args:
        num: columns that are read.
        width: of their outputs.
    """

    def __init__(self, num: int, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(0.1 * torch.rand(num))  # small, and a scale of its own for each column
        self.project = nn.Linear(num * width, width)  # V

    def forward(self, earlier: Sequence[Tensor]) -> Tensor:
        """(..., width), of the outputs of each column that is read, (..., width)."""
        scaled = [scale * hidden.to(scale.dtype) for scale, hidden in zip(self.alpha, earlier, strict=True)]
        return torch.relu(self.project(torch.cat(scaled, dim=-1)))


class ColumnNetwork(nn.Module):
    """The layers of one column.

    Args:
        cells: one-layer networks, the first one's input first.
        reads: the columns that it reads.
    """

    def __init__(self, cells: Sequence[nn.RNNBase], reads: Sequence[str]) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.cells: Any = nn.ModuleList(cells)
        width = cells[0].hidden_size
        if reads:
            like = next(cells[0].parameters())
            self.laterals = nn.ModuleList(Lateral(len(reads), width) for _ in cells).to(like)
            self.output = nn.Linear(width, width, bias=False).to(like)  # U of the output layer
            nn.init.zeros_(self.output.weight)


class Switch(nn.Module):
    """One part of every column.

    Attributes:
        columns: the part of each, oldest first, the base's before all.
        running: those that are computed; the last one answers.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.columns: Any = nn.ModuleDict({BASE: base})
        self.running: tuple[str, ...] = (BASE,)


class ColumnEmbeddings(Switch):
    """The embeddings of all running columns, side by side."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """(rows, time, columns * width)."""
        return torch.cat([self.columns[name](input_ids) for name in self.running], dim=-1)


class ColumnHead(Switch):
    """The output head of the column that answers."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., vocabulary)."""
        return self.columns[self.running[-1]](hidden)


class ColumnCells(Switch):
    """All running columns, in the place of the base's recurrent layers.

    Args:
        base: the base's.
        dropout: of the embedding, between layers and of the output, of a column while it is trained.
    """

    def __init__(self, base: nn.RNNBase, dropout: float) -> None:
        super().__init__(ColumnNetwork([layer_of(base, i) for i in range(base.num_layers)], ()))
        self.dropout = dropout

    def column(self, name: str) -> ColumnNetwork:
        """The column of that name."""
        return self.columns[name]

    def forward(self, embedded: Tensor | PackedSequence, start: Any = None) -> tuple[Any, Any]:
        """The outputs of the column that answers, and the states of all running columns.

        Args:
            embedded: (rows, time, columns * width), or the same packed.
            start: (columns * layers, rows, width), of an LSTM a pair of them; zeros where None.
        """
        packed = embedded if isinstance(embedded, PackedSequence) else None
        data = embedded.data if isinstance(embedded, PackedSequence) else embedded
        made: dict[str, list[Tensor]] = {}
        ends: list[Any] = []
        result = data
        for name, own in zip(self.running, data.chunk(len(self.running), dim=-1), strict=True):
            column = self.column(name)
            dtype = column.cells[0].weight_ih_l0.dtype
            rate = self.dropout if self.training and column.cells[0].weight_ih_l0.requires_grad else 0.0
            hidden, outputs = own.to(dtype), list[Tensor]()
            for i, cell in enumerate(column.cells):
                hidden = F.dropout(hidden, rate) if rate else hidden
                if i and column.reads:
                    z = column.laterals[i - 1]([made[other][i - 1] for other in column.reads])
                    hidden = torch.cat([hidden, z.to(dtype)], dim=-1)
                inputs = hidden if packed is None else packed._replace(data=hidden)
                read, end = run(cell, inputs, taken(start, len(ends), dtype))
                hidden = read.data if isinstance(read, PackedSequence) else read  # (..., width)
                outputs.append(hidden)
                ends.append(end)
            made[name], result = outputs, hidden
            if name == self.running[-1]:
                if column.reads:
                    z = column.laterals[-1]([made[other][-1] for other in column.reads])
                    result = hidden + column.output(z)
                result = F.dropout(result, rate) if rate else result
        return (result if packed is None else packed._replace(data=result)), joined(ends)


def run(cell: nn.RNNBase, inputs: Any, start: Any) -> tuple[Any, Any]:
    """A cell's outputs and state. Without gradients it is run as if frozen.

    The last bits of torch's GRU depend on whether its weights require gradients, and a column must answer after it is
    frozen just as it did before.
    """
    if torch.is_grad_enabled():
        return cell(inputs, start)
    weights = {name: value.detach() for name, value in cell.named_parameters()}
    return torch.func.functional_call(cell, weights, (inputs, start))


def taken(start: Any, at: int, dtype: torch.dtype) -> Any:
    """The state of one layer of one column."""
    if start is None:
        return None
    if isinstance(start, tuple):
        return tuple(part[at : at + 1].to(dtype) for part in cast("tuple[Tensor, ...]", start))
    return start[at : at + 1].to(dtype)


def joined(ends: Sequence[Any]) -> Any:
    """The states of all layers of all columns, as those of one deep network."""
    if isinstance(ends[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*ends, strict=True))
    return torch.cat(list(ends))


def new_cell(like: nn.RNNBase, inputs: int) -> nn.RNNBase:
    """One layer of the same kind and width for that many inputs."""
    kind: Any = type(like)
    with torch.random.fork_rng(devices=[]):  # its weights are replaced at once
        return kind(inputs, like.hidden_size, batch_first=True)


def layer_of(rnn: nn.RNNBase, index: int) -> nn.RNNBase:
    """One layer of a deep network, with the same parameters."""
    cell = new_cell(rnn, rnn.input_size if index == 0 else rnn.hidden_size)
    for name, parameter in rnn.named_parameters():
        if name.endswith(f"_l{index}"):
            setattr(cell, name.removesuffix(f"_l{index}") + "_l0", parameter)
    return cell


def make_switches(model: nn.Module) -> None:
    """Put switches in the place of the parts of a recurrent network; it answers as before.

    Raises:
        CompatibilityError: if it is no recurrent network.
    """
    if not isinstance(model, RecurrentForCausalLM):
        raise CompatibilityError(f"{type(model).__name__} is no recurrent network", hint="use `method: adapter`")
    parts: Mapping[str, nn.Module] = {
        "embeddings": ColumnEmbeddings(model.embeddings),
        "rnn": ColumnCells(model.rnn, model.config.dropout),
        "lm_head": ColumnHead(model.lm_head),
        "dropout": nn.Identity(),  # the columns see to it: what is frozen is read without
    }
    for name, part in parts.items():
        setattr(model, name, part)


def switches(model: nn.Module) -> tuple[ColumnEmbeddings, ColumnCells, ColumnHead]:
    """The switches of a model.

    Raises:
        CompatibilityError: if it has none.
    """
    modules = dict(model.named_modules())
    embeddings, cells, head = (modules.get(name) for name in PARTS)
    if (
        not isinstance(embeddings, ColumnEmbeddings)
        or not isinstance(cells, ColumnCells)
        or not isinstance(head, ColumnHead)
    ):
        raise CompatibilityError(f"{type(model).__name__} has no columns", hint="apply the method first")
    return embeddings, cells, head
