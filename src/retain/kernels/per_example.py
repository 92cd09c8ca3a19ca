"""Squares, or absolute values, of per-example gradients, summed over the examples of a batch.

    total[name] += (d value(example) / d parameter) ** 2      for every example of the batch

The square is of one example's gradient (the sum over its tokens), never of a batch's mean, which would be noise divided
by the batch's size. Three engines give the same answer:

- `hooks`: one pass for the whole batch. A document's gradient of a weight is a product of the weight's input and its
  output's gradient over the document's positions (Goodfellow 2015, https://arxiv.org/abs/1510.01799). All uses of a
  parameter are summed before squaring, so that a head tied to the embedding counts once.
- `func`: the same pass, after which `torch.func` makes the documents' gradients of modules that hooks do not know.
- `loop`: one pass an example. Works for every network; several times slower.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from retain.errors import CompatibilityError
from retain.kernels.module_uses import ModuleUses, UnknownModuleError, owners
from retain.kernels.parameter_uses import ParameterUses, Use
from retain.kernels.use_rules import RULES
from retain.parameters import local, trainable
from retain.types import Batch

__all__ = ["Engine", "Sums", "absolute_gradients", "one_by_one", "squared_gradients", "zero_sums"]

ELEMENTS_AT_ONCE = 2**20
"""Entries of documents' gradients that exist at once: few enough to stay in the cache until they are squared."""

Engine = Literal["auto", "hooks", "func", "loop"]

WORDS = {"hooks": "hooks do not", "func": "torch.func does not"}

STRANGERS: WeakSet[nn.Module] = WeakSet()
"""Modules that hooks did not know: not tried again with every batch."""

Add = Callable[[Tensor, Tensor], None]
"""Adds documents' gradients, (documents, ...), to a total, (...). It may write over those of several documents."""


@dataclass(frozen=True)
class Sums:
    """What the examples of a batch add up to.

    Args:
        values: by parameter name, in float32 at least.
        engine: what gave them: `hooks`, `func` or `loop`.
        apart: the kinds of the modules that `torch.func` was used for.
    """

    values: dict[str, Tensor]
    engine: Engine
    apart: tuple[str, ...] = ()


def squared_gradients(
    model: nn.Module,
    batch: Batch,
    nll: Callable[[Batch], Tensor],
    *,
    engine: Engine = "auto",
    into: dict[str, Tensor] | None = None,
) -> Sums:
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
        engine: `auto` takes hooks, for modules with a use that they do not know `torch.func`, and where that fails,
            too, the loop. `func` leaves nothing to hooks.
        into: sums to add to, as an earlier call returned them.

    Returns:
        the sums, and which engine gave them. No `.grad` is touched.

    Raises:
        CompatibilityError: if the named engine cannot do it, or if parameters are sharded over processes.
    """
    return _summed(model, batch, nll, engine, into, add_squares)


def absolute_gradients(
    model: nn.Module,
    batch: Batch,
    value: Callable[[Batch], Tensor],
    *,
    engine: Engine = "auto",
    into: dict[str, Tensor] | None = None,
) -> Sums:
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
) -> Sums:
    parameters = trainable(model)
    if any(local(parameter) is not parameter for parameter in parameters.values()):
        raise CompatibilityError(
            "per-example gradients need whole parameters, but these are sharded over processes",
            hint="consolidate before the model is sharded",
        )
    totals = into if into is not None else zero_sums(model)
    apart: set[nn.Module] = set(owners(model, parameters)) if engine == "func" else set()
    with torch.enable_grad():
        while engine != "loop":
            if engine == "auto":
                apart = {module for module in model.modules() if module in STRANGERS}
            missed, strangers = add_in_one_pass(parameters, batch, value, totals, add, apart)
            if not missed:
                kinds = tuple(sorted({type(module).__name__ for module in apart}))
                return Sums(totals, "func" if apart else "hooks", kinds)
            if engine != "auto":
                raise CompatibilityError(
                    f"{WORDS[engine]} see every use of these parameters",
                    problems=sorted(missed), hint='use engine="auto" or engine="loop"',
                )  # fmt: skip
            strangers &= set(model.modules())
            if strangers <= apart:
                break
            STRANGERS.update(strangers)
        add_looped(parameters, batch, value, totals, add)
    return Sums(totals, "loop")


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
        # An encoder's inputs cannot be cut at the decoder's places; their row then holds one example.
        cut = {
            name
            for name, value in batch.inputs.items()
            if value.shape[:2] == batch.documents.shape
            and (name.startswith("decoder_") or "decoder_input_ids" not in batch.inputs)
        }
        yield Batch(
            inputs={
                name: value[row : row + 1, place] if name in cut else value[row : row + 1]
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


def add_in_one_pass(
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    value: Callable[[Batch], Tensor],
    totals: dict[str, Tensor],
    add: Add,
    apart: Collection[nn.Module],
) -> tuple[set[str], set[nn.Module]]:
    """Add the gradients from one pass.

    Args:
        parameters: the trained ones.
        batch, value: as in `squared_gradients`.
        totals: what is added to.
        add: how.
        apart: modules for `torch.func`; hooks see the others.

    Returns:
        the parameters of which some use was missed (then nothing was added), and the modules where that was.
    """
    # With modules apart it may turn out only at the end that a gradient cannot be told.
    sums = {name: torch.zeros_like(total) for name, total in totals.items()} if apart else totals

    def complete(uses: Sequence[Use]) -> None:
        add_uses(uses, sums[uses[0].source.name], add, len(batch.examples))

    uses = ParameterUses(parameters, batch, complete, RULES)
    modules = ModuleUses(uses, apart)
    try:
        with modules.active(), uses:
            total = value(batch).sum()
        if missed := uses.missed(total):
            return missed, {module for name in missed for module in uses.strangers[name]}
        if total.requires_grad:
            total.backward()
            modules.finish()
            uses.finish()
    except UnknownModuleError as error:
        return {str(error)}, set()
    finally:
        uses.forget()
        modules.forget()
    if apart:
        for name, value_of_pass in sums.items():
            totals[name] += value_of_pass
    return set(), set()


def add_uses(uses: Sequence[Use], total: Tensor, add: Add, num: int) -> None:
    """Add each of `num` documents' gradient of one parameter, all its uses summed."""
    if total.dim() <= 1 or not any(use.left or use.whole for use in uses):  # IA3's vectors have a second dimension of 1
        for document in range(num):
            with torch.enable_grad():  # a source goes back through what was made from the parameter
                parts = [vector_gradient(use, document, total.dtype) for use in uses]
            add(total, torch.stack(parts).sum(dim=0).to(total.dtype).reshape(1, *total.shape))
    elif total.dim() > 2:  # only of modules that were run apart
        group = max(1, ELEMENTS_AT_ONCE // total.numel())
        for first in range(0, num, group):
            documents = range(first, min(first + group, num))
            parts = [use.whole(documents) for use in uses if use.whole]
            add(total, torch.stack(parts).sum(dim=0).to(total.dtype))
    elif all(use.is_lookup for use in uses):
        rows = torch.cat([ids for use in uses for ids in use.left]).unique()  # no other row has a gradient
        for use in uses:
            use.left = [torch.searchsorted(rows, ids) for ids in use.left]
        compact = total[rows]
        add_products(uses, compact, add, num)
        total[rows] = compact
    else:
        add_products(uses, total, add, num)


def vector_gradient(use: Use, document: int, dtype: torch.dtype) -> Tensor:
    """The flat gradient of a vector, or a number, from one use."""
    if use.whole:
        return use.whole(range(document, document + 1)).flatten()
    return use.source.back(use.right[document].to(dtype).sum(dim=0))


def add_products(uses: Sequence[Use], total: Tensor, add: Add, num: int) -> None:
    """Add to `total` (rows, columns) each document's gradient: some rows of some documents at a time."""
    apart = any(use.whole for use in uses)
    step = len(total) if apart else max(1, ELEMENTS_AT_ONCE // total.shape[1])
    for start in range(0, len(total), step):
        block = total[start : start + step]
        # A CPU is faster with one product after another, an accelerator with many at once.
        group = 1 if total.device.type == "cpu" and not apart else max(1, ELEMENTS_AT_ONCE // block.numel())
        for first in range(0, num, group):
            add(block, documents_gradients(uses, range(first, min(first + group, num)), block, start))


def documents_gradients(uses: Sequence[Use], documents: range, block: Tensor, start: int) -> Tensor:
    """(documents, rows, columns), the gradient of the rows from `start` that the block stands for, all uses summed."""
    gradients: Tensor | None = None
    for use in uses:
        if not use.is_lookup:
            product = use.whole(documents) if use.whole else products(use, documents, start, len(block))
            product = product.to(block.dtype)
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


def products(use: Use, documents: range, start: int, rows: int) -> Tensor:
    """(documents, rows, columns), the sum over each document's positions of left outer right."""
    if len(documents) == 1:
        left, right = use.left[documents[0]], use.right[documents[0]]
        return (left[:, start : start + rows].T @ right)[None]
    # Shorter documents are padded with zeros, which add nothing.
    left, right = (
        pad_sequence([pieces[document] for document in documents], batch_first=True) for pieces in (use.left, use.right)
    )
    return left[:, :, start : start + rows].mT @ right  # (documents, rows, positions) @ (documents, positions, columns)
