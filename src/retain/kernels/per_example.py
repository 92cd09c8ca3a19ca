"""Squares, or absolute values, of per-example gradients, summed over the examples of a batch.

    total[name] += (d value(example) / d parameter) ** 2      for every example of the batch

The square is of one example's gradient (the sum over its tokens), never of a batch's mean, which would be noise divided
by the batch's size. Two engines give the same answer:

- `hooks`: one pass for the whole batch. A document's gradient of a weight is a product of the weight's input and its
  output's gradient over the document's positions (Goodfellow 2015, https://arxiv.org/abs/1510.01799). All uses of a
  parameter are summed before squaring, so that a head tied to the embedding counts once.
- `loop`: one pass an example. Works for every network; several times slower.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from retain.errors import CompatibilityError
from retain.kernels.parameter_uses import ParameterUses, Use
from retain.parameters import local, trainable
from retain.types import Batch

__all__ = ["absolute_gradients", "one_by_one", "squared_gradients", "zero_sums"]

ELEMENTS_AT_ONCE = 2**20
"""Entries of documents' gradients that exist at once: few enough to stay in the cache until they are squared."""

Engine = Literal["auto", "hooks", "loop"]

Add = Callable[[Tensor, Tensor], None]
"""Adds documents' gradients, (documents, ...), to a total, (...). It may write over those of several documents."""


def squared_gradients(
    model: nn.Module,
    batch: Batch,
    nll: Callable[[Batch], Tensor],
    *,
    engine: Engine = "auto",
    into: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The sum over a batch's examples of each trained parameter's squared gradient.

    Equivalent to

        for example in one_by_one(batch):
            for name, gradient in gradients_of(nll(example).sum()):
                total[name] += gradient ** 2

    Examples must not see one another: no batch statistics, and packed documents isolated.

    Args:
        model: in evaluation mode.
        batch: padded or packed.
        nll: from a batch to nats, (num_targets,) or already summed, by one forward pass of `model`.
        engine: `auto` takes hooks where they see every use of every trained parameter in this batch, else the loop.
        into: sums to add to, as an earlier call returned them.

    Returns:
        by parameter name, in float32 at least. No `.grad` is touched.

    Raises:
        CompatibilityError: if the engine is `hooks` and a parameter is used in a way that they do not know, or if
            parameters are sharded over processes.
    """
    return _summed(model, batch, nll, engine, into, add_squares)


def absolute_gradients(
    model: nn.Module,
    batch: Batch,
    value: Callable[[Batch], Tensor],
    *,
    engine: Engine = "auto",
    into: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The sum over a batch's examples of each trained parameter's absolute gradient: `squared_gradients` with |g|.

    Args:
        model: in evaluation mode.
        batch: padded or packed.
        value: from a batch to (num_targets,) or its sum, by one forward pass of `model`.
        engine: as there.
        into: as there.
    """
    return _summed(model, batch, value, engine, into, add_magnitudes)


def add_squares(total: Tensor, gradients: Tensor) -> None:
    """Add the sum of their squares."""
    if len(gradients) == 1:
        total.addcmul_(gradients[0], gradients[0])
    else:
        total += gradients.square_().sum(dim=0)


def add_magnitudes(total: Tensor, gradients: Tensor) -> None:
    """Add the sum of their absolute values."""
    total += gradients[0].abs() if len(gradients) == 1 else gradients.abs_().sum(dim=0)


def _summed(
    model: nn.Module,
    batch: Batch,
    value: Callable[[Batch], Tensor],
    engine: Engine,
    into: dict[str, Tensor] | None,
    add: Add,
) -> dict[str, Tensor]:
    parameters = trainable(model)
    if any(local(parameter) is not parameter for parameter in parameters.values()):
        raise CompatibilityError(
            "per-example gradients need whole parameters, but these are sharded over processes",
            hint="consolidate before the model is sharded",
        )
    totals = into if into is not None else zero_sums(model)
    with torch.enable_grad():
        if engine != "loop":
            missed = add_hooked(parameters, batch, value, totals, add)
            if missed and engine == "hooks":
                raise CompatibilityError(
                    "hooks do not see every use of these parameters",
                    problems=sorted(missed), hint='use engine="auto" or engine="loop"',
                )  # fmt: skip
            if not missed:
                return totals
        add_looped(parameters, batch, value, totals, add)
    return totals


def zero_sums(model: nn.Module) -> dict[str, Tensor]:
    """Zeros to add to, one for each trained parameter, in float32 at least."""
    return {
        name: torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        for name, parameter in trainable(model).items()
    }


def one_by_one(batch: Batch) -> Iterator[Batch]:
    """Every example of the batch alone, without padding."""
    for index, example in enumerate(batch.examples):
        rows, columns = (batch.documents == index).nonzero(as_tuple=True)
        if not len(rows):
            continue
        row, place = int(rows[0]), slice(int(columns[0]), int(columns[-1]) + 1)
        # An input of another length (an encoder's) cannot be cut; its row then holds one example.
        yield Batch(
            inputs={
                name: value[row : row + 1, place] if value.shape[:2] == batch.documents.shape else value[row : row + 1]
                for name, value in batch.inputs.items()
            },
            targets=batch.targets[row : row + 1, place],
            documents=torch.zeros_like(batch.documents[row : row + 1, place]),
            weights=batch.weights[batch.target_documents == index],
            examples=(example,),
        )


def add_looped(
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    value: Callable[[Batch], Tensor],
    totals: dict[str, Tensor],
    add: Add,
) -> None:
    """Add the gradients, one example after another."""
    for example in one_by_one(batch):
        total = value(example).sum()
        if not total.requires_grad:
            continue
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:  # pyright: ignore[reportUnnecessaryComparison] (its stub forgets `allow_unused`)
                add(totals[name], gradient[None])


def add_hooked(
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    value: Callable[[Batch], Tensor],
    totals: dict[str, Tensor],
    add: Add,
) -> set[str]:
    """Add the gradients from one pass; if uses of some parameters were missed, add nothing and return their names."""
    uses = ParameterUses(parameters, batch, lambda complete: add_uses(complete, totals[complete[0].source.name], add))
    with uses:
        total = value(batch).sum()
    missed = uses.missed(total)
    if not missed and total.requires_grad:
        total.backward()
        uses.finish()
    return missed


def add_uses(uses: Sequence[Use], total: Tensor, add: Add) -> None:
    """Add each document's gradient of one parameter, all its uses summed."""
    if total.dim() <= 1:
        for document in range(len(uses[0].right)):
            with torch.enable_grad():  # a source goes back through what was made from the parameter
                parts = [use.source.back(use.right[document].to(total.dtype).sum(dim=0)) for use in uses]
            add(total, torch.stack(parts).sum(dim=0).to(total.dtype).reshape(1, *total.shape))
    elif all(use.is_lookup for use in uses):
        rows = torch.cat([ids for use in uses for ids in use.left]).unique()  # no other row has a gradient
        for use in uses:
            use.left = [torch.searchsorted(rows, ids) for ids in use.left]
        compact = total[rows]
        add_products(uses, compact, add)
        total[rows] = compact
    else:
        add_products(uses, total, add)


def add_products(uses: Sequence[Use], total: Tensor, add: Add) -> None:
    """Add to `total` (rows, columns) each document's gradient: some rows of some documents at a time."""
    num = len(uses[0].right)
    step = max(1, ELEMENTS_AT_ONCE // total.shape[1])
    for start in range(0, len(total), step):
        block = total[start : start + step]
        group = max(1, ELEMENTS_AT_ONCE // block.numel())
        for first in range(0, num, group):
            add(block, documents_gradients(uses, range(first, min(first + group, num)), block, start))


def documents_gradients(uses: Sequence[Use], documents: range, block: Tensor, start: int) -> Tensor:
    """(documents, rows, columns), the gradient of the rows from `start` that the block stands for, all uses summed."""
    gradients: Tensor | None = None
    for use in uses:
        if not use.is_lookup:
            left = stacked(use.left, documents)[:, :, start : start + len(block)]  # (documents, positions, rows)
            product = (left.mT @ stacked(use.right, documents)).to(block.dtype)
            gradients = product if gradients is None else gradients.add_(product)
    if gradients is None:
        gradients = block.new_zeros(len(documents), *block.shape)
    for use in uses:
        if use.is_lookup:
            for gradient, document in zip(gradients, documents, strict=True):
                ids, right = use.left[document].flatten(), use.right[document]  # (positions,), (positions, columns)
                inside = (ids >= start) & (ids < start + len(block))
                gradient.index_add_(0, ids[inside] - start, right[inside].to(gradient.dtype))
    return gradients


def stacked(pieces: Sequence[Tensor], documents: range) -> Tensor:
    """(documents, positions, n), the shorter documents padded with zeros, which add nothing to a product."""
    if len(documents) == 1:
        return pieces[documents[0]][None]
    return pad_sequence([pieces[document] for document in documents], batch_first=True)
