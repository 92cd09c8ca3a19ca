"""Encoded rows into steps, micro-batches and tensors; rows that are too long.

Packed: the documents of a micro-batch lie one after another in a single row, without padding. `position_ids` restart at
0 with each document and no `attention_mask` is given; `transformers` then builds a block-diagonal causal mask, so that
no document sees another. It does so only where `use_cache=False` and no `past_key_values` are in play.

Padded: one document a row, padding on the right, `attention_mask` 0 there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, get_args

import torch

from retain.errors import DataError
from retain.types import IGNORED, Batch, Encoded, Example

__all__ = [
    "Overflow",
    "OverflowCounts",
    "fit_length",
    "micro_batches",
    "pack",
    "pad",
    "schedule",
    "shifted",
    "to_device",
]

Overflow = Literal["error", "drop", "truncate", "split"]

_WINDOW = 16  # steps whose rows are sorted by length together: enough that padding falls, few enough to stay shuffled


@dataclass(frozen=True, slots=True)
class OverflowCounts:
    """What `fit_length` did.

    Args:
        kept: rows that will be trained on; every piece of a split row is one.
        over_length: rows that were longer than `max_length`.
        dropped: rows of those that were left out.
        truncated: rows of those whose end was cut off, and with it the trained stop token.
        split: rows of those that were cut into pieces.
        untrained: rows left out because no token of them is trained (any more).
        tokens_cut: tokens that truncation cut off.
    """

    kept: int = 0
    over_length: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    untrained: int = 0
    tokens_cut: int = 0


def shifted(example: Example, ids: Sequence[int], weights: Sequence[float]) -> Encoded:
    """A row for a model that predicts the next token.

        targets[t] = ids[t + 1]  where  weights[t + 1] * example.weight > 0, else IGNORED; the last is IGNORED

    Args:
        example: where the ids came from.
        ids: (length,), of `Renderer.encode`.
        weights: (length,), the loss weight of every token, 0 or more.
    """
    scaled = [weight * example.weight for weight in weights[1:]] + [0.0]
    following = [*ids[1:], IGNORED]
    targets = [token if weight > 0 else IGNORED for token, weight in zip(following, scaled, strict=True)]
    return Encoded(example, {"input_ids": list(ids)}, targets, scaled)


def pack(rows: Sequence[Encoded]) -> Batch:
    """All rows in one row of length T, without padding: `input_ids` and `position_ids`, both (1, T)."""
    lengths = [len(row.inputs["input_ids"]) for row in rows]
    positions = [torch.arange(length) for length in lengths]
    documents = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
    return Batch(
        inputs={
            "input_ids": torch.tensor([[token for row in rows for token in row.inputs["input_ids"]]]),  # (1, T)
            "position_ids": torch.cat(positions)[None],  # (1, T)
        },
        targets=torch.tensor([[target for row in rows for target in row.targets]]),  # (1, T)
        documents=documents[None],  # (1, T)
        weights=_counted_weights(rows),
        examples=tuple(row.example for row in rows),
    )


def pad(rows: Sequence[Encoded], *, pad_id: int) -> Batch:
    """One row each, padded on the right: `input_ids` and `attention_mask`, both (rows, longest)."""
    lengths = torch.tensor([len(row.inputs["input_ids"]) for row in rows])
    num_outputs = torch.tensor([len(row.targets) for row in rows])
    inputs = {name: _padded([row.inputs[name] for row in rows], pad_id) for name in rows[0].inputs}
    inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()  # (rows, longest)
    inside = torch.arange(int(num_outputs.max())) < num_outputs[:, None]  # (rows, longest target)
    return Batch(
        inputs=inputs,
        targets=_padded([row.targets for row in rows], IGNORED),  # (rows, longest target)
        documents=torch.where(inside, torch.arange(len(rows))[:, None], -1),  # (rows, longest target)
        weights=_counted_weights(rows),
        examples=tuple(row.example for row in rows),
    )


def micro_batches(rows: Sequence[Encoded], *, max_tokens: int, packed: bool) -> list[list[Encoded]]:
    """The rows in their order, cut into runs that fit one forward pass, each of rows with the same inputs.

    Args:
        rows: the rows of one optimizer step (or of an evaluation).
        max_tokens: what a run may hold, padding included; a single row that is longer stands alone.
        packed: the run costs the sum of its rows, else its longest row times their number.
    """
    runs: list[list[Encoded]] = []
    total = longest = 0
    for row in rows:
        total, longest = total + row.num_tokens, max(longest, row.num_tokens)
        cost = total if packed or not runs else longest * (len(runs[-1]) + 1)
        if runs and cost <= max_tokens and runs[-1][0].inputs.keys() == row.inputs.keys():
            runs[-1].append(row)
        else:
            runs.append([row])
            total = longest = row.num_tokens
    return runs


def schedule(
    num_rows: int, *, rows_per_step: int, seed: int, epoch: int, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """The row numbers of every optimizer step of an epoch: a seeded permutation, cut into steps.

    It depends on nothing but its arguments, so a place in training is a number: resuming is asking again and skipping.
    Every row appears once; the step that gets what is left over is shorter.

    Args:
        num_rows: rows of the data set.
        rows_per_step: rows of one optimizer step.
        seed: the run's seed.
        epoch: which pass over the data, from 0.
        lengths: tokens of every row. Given, rows of like length come into the same step (within windows of 16 steps,
            whose order is then shuffled), so that little padding is needed.
    """
    random = Random(f"{seed}/{epoch}")
    order = list(range(num_rows))
    random.shuffle(order)
    if lengths is None:
        return [order[start : start + rows_per_step] for start in range(0, num_rows, rows_per_step)]
    steps: list[list[int]] = []
    for start in range(0, num_rows, _WINDOW * rows_per_step):
        window = sorted(order[start : start + _WINDOW * rows_per_step], key=lengths.__getitem__)
        cut = [window[first : first + rows_per_step] for first in range(0, len(window), rows_per_step)]
        random.shuffle(cut)
        steps += cut
    return steps


def fit_length(
    rows: Sequence[Encoded], *, max_length: int, on_overflow: Overflow = "error", threshold: float = 0.0
) -> tuple[list[Encoded], OverflowCounts]:
    """The rows that can be trained on within `max_length` tokens, and what was done about the others.

    Args:
        rows: encoded rows.
        max_length: tokens a row may have, 1 or more.
        on_overflow: `error`: refuse where the share of rows that are too long is above `threshold`, else drop them;
            `drop`: leave them out; `truncate`: keep their first `max_length` tokens, as TRL does, which loses the
            answer's end with its stop token; `split`: cut raw text into consecutive pieces, of which no target is lost.
        threshold: the share of rows, 0 to 1, that `error` lets pass.

    Raises:
        DataError: too many rows are too long, or `split` meets a conversation.
    """
    if on_overflow not in get_args(Overflow):
        raise DataError(f"on_overflow: {on_overflow!r} is none of {', '.join(get_args(Overflow))}")
    long = [row for row in rows if _length(row) > max_length]
    if on_overflow == "error" and len(long) > threshold * len(rows):
        raise _too_long(rows, long, max_length, threshold)
    if on_overflow == "split" and (refused := [row for row in long if row.example.messages]):
        raise DataError(
            f"{len(refused)} conversations are longer than max_length={max_length} and cannot be split",
            problems=["a later piece would be an answer without its question; only raw `text` rows split"],
            hint="set on_overflow to drop or truncate, or raise max_length",
        )
    fitted: list[Encoded] = []
    for row in rows:
        if _length(row) <= max_length:
            fitted.append(row)
        elif on_overflow == "truncate":
            fitted.append(_slice(row, 0, max_length, num_truncated=_length(row) - max_length))
        elif on_overflow == "split":
            fitted += [_slice(row, start, start + max_length) for start in range(0, _length(row), max_length)]
    kept = [row for row in fitted if row.num_targets]
    counts = OverflowCounts(
        kept=len(kept),
        over_length=len(long),
        dropped=len(long) if on_overflow in ("error", "drop") else 0,
        truncated=len(long) if on_overflow == "truncate" else 0,
        split=len(long) if on_overflow == "split" else 0,
        untrained=len(fitted) - len(kept),
        tokens_cut=sum(row.num_truncated for row in fitted),
    )
    return kept, counts


def _too_long(rows: Sequence[Encoded], long: Sequence[Encoded], max_length: int, threshold: float) -> DataError:
    longest = max(long, key=_length)
    start = longest.example.messages[0].content if longest.example.messages else longest.example.text
    share = f"{len(long)} of {len(rows)} rows ({len(long) / len(rows):.1%})"
    allowed = f"at most {threshold:.1%} may be" if threshold else "none may be"
    return DataError(
        f"{share} are longer than max_length={max_length}; {allowed}",
        problems=[f"the longest has {_length(longest)} tokens and begins {start[:60]!r}"],
        hint=f"set max_length to {_length(longest)}, or on_overflow to drop, truncate or split (raw text only)",
    )


def _length(row: Encoded) -> int:
    """The longest sequence that the model reads of the row."""
    return max(len(ids) for ids in row.inputs.values())


def _slice(row: Encoded, start: int, stop: int, *, num_truncated: int = 0) -> Encoded:
    """A part of the row; targets are shifted already, so its last position still predicts the next part's first.

    Targets that are not those of positions (a class of the whole text) stay.
    """
    inputs = {name: ids[start:stop] for name, ids in row.inputs.items()}
    if all(len(ids) != len(row.targets) for ids in row.inputs.values()):
        return Encoded(row.example, inputs, row.targets, row.weights, num_truncated)
    return Encoded(row.example, inputs, row.targets[start:stop], row.weights[start:stop], num_truncated)


def _padded(sequences: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[fill] * (longest - len(sequence))] for sequence in sequences])


def _counted_weights(rows: Sequence[Encoded]) -> torch.Tensor:
    """(num_targets,), in row-major order."""
    counted = [w for row in rows for w, target in zip(row.weights, row.targets, strict=True) if target != IGNORED]
    return torch.tensor(counted, dtype=torch.float32)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device."""
    return replace(
        batch,
        inputs={name: value.to(device) for name, value in batch.inputs.items()},
        targets=batch.targets.to(device),
        documents=batch.documents.to(device),
        weights=batch.weights.to(device),
    )
