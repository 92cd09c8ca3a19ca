"""How far a model's predictions have moved from the base model's on running text: cheap, without labels, always on.

    KL(base || model) = sum_v p(v) log(p(v) / q(v)),  p the base's, q the model's next-token distribution

in nats a token, averaged over the positions of a few texts. The base's likeliest `top` tokens of every position are
kept, and the mass of all others as one more outcome. The KL over these is a lower bound of the KL over the whole
vocabulary (data processing inequality): with 64 tokens 85 % of it, for SmolLM2-135M with noise on its weights. It is
0 exactly for a model that nothing touched.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from retain.data.packing import fit_length, micro_batches, to_device
from retain.data.rendering import Renderer
from retain.errors import ModelError
from retain.kernels.coarse_kl import coarse_kl, coarsened, likeliest
from retain.models.family import Family, Outputs
from retain.parameters import device_of
from retain.types import Batch, Example

__all__ = ["Distribution", "base_distribution", "kl_to_base"]

_CHUNK = 128  # positions whose logits exist at a time: 134 MB at a vocabulary of 262 144


@dataclass(frozen=True, slots=True)
class Distribution:
    """The base model's next-token distribution at every position of some texts, coarsened to its likeliest tokens.

    Args:
        texts: the texts' ids.
        counts: how many positions each text has; the tensors hold them one text after another.
        max_length: tokens that were read of each text, at most.
        targets: (positions,), int32, the token that followed: another tokenizer is noticed.
        top_ids: (positions, top), int32, the likeliest tokens.
        top_log_probs: (positions, top), float32, their log-probabilities, nats.
        rest: (positions,), float32, the log of all other tokens' probability; -inf where there are none.
    """

    texts: tuple[str, ...]
    counts: tuple[int, ...]
    max_length: int
    targets: Tensor
    top_ids: Tensor
    top_log_probs: Tensor
    rest: Tensor

    def save(self, path: Path) -> None:
        """Write it as safetensors: about 8 bytes a token kept."""
        tensors = {
            "targets": self.targets,
            "top_ids": self.top_ids,
            "top_log_probs": self.top_log_probs,
            "rest": self.rest,
        }
        known = {"texts": self.texts, "counts": self.counts, "max_length": self.max_length}
        save_file(tensors, path, metadata={name: json.dumps(value) for name, value in known.items()})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            known = {name: json.loads(value) for name, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name) for name in ("targets", "top_ids", "top_log_probs", "rest")}
        return cls(tuple(known["texts"]), tuple(known["counts"]), known["max_length"], **tensors)


@torch.no_grad()
def base_distribution(
    model: nn.Module,
    family: Family,
    renderer: Renderer,
    texts: Sequence[Example],
    *,
    top: int = 64,
    max_length: int = 64,
    max_tokens: int = 2048,
) -> Distribution:
    """What the base model expects at every position of the texts but the first.

    Args:
        model: the base model in evaluation mode.
        family: the model's.
        renderer: with the model's tokenizer.
        texts: raw text, ids all different.
        top: how many tokens are kept at a position, 1 or more.
        max_length: how many tokens are read of each text: more texts say more than longer ones.
        max_tokens: padded tokens of one pass.
    """
    found: dict[str, tuple[Tensor, ...]] = {}
    for batch in _batches(model, family, renderer, texts, max_length, max_tokens):
        outputs = family.forward(model, batch)
        parts: list[tuple[Tensor, ...]] = []
        for chunk in _chunks(outputs):
            ids, *log_probs = likeliest(outputs.head(outputs.hidden[chunk]), top)
            parts.append((ids.int().cpu(), *(part.cpu() for part in log_probs)))
        columns = [
            batch.targets[batch.counted].int().cpu(),
            *(torch.cat(column) for column in zip(*parts, strict=True)),
        ]
        pieces = zip(*(column.split(_counts(batch)) for column in columns), strict=True)
        found |= {example.id: piece for example, piece in zip(batch.examples, pieces, strict=True)}
    ordered = [found[text.id] for text in texts]
    targets, top_ids, top_log_probs, rest = (torch.cat(column) for column in zip(*ordered, strict=True))
    counts = tuple(len(piece[0]) for piece in ordered)
    return Distribution(tuple(text.id for text in texts), counts, max_length, targets, top_ids, top_log_probs, rest)


@torch.no_grad()
def kl_to_base(
    model: nn.Module,
    family: Family,
    renderer: Renderer,
    texts: Sequence[Example],
    distribution: Distribution,
    *,
    max_tokens: int = 2048,
) -> tuple[float, dict[str, float]]:
    """The mean KL(base || model) of a position in nats, and every text's own mean by its id.

    Args:
        model: in evaluation mode.
        family, renderer, texts, max_tokens: as `distribution` was made with.
        distribution: the base model's.

    Raises:
        ModelError: the texts are other tokens now than they were to the base model.
    """
    places = dict(zip(distribution.texts, _slices(distribution.counts), strict=True))
    nats: dict[str, float] = {}
    for batch in _batches(model, family, renderer, texts, distribution.max_length, max_tokens):
        unknown = torch.empty(0, dtype=torch.long)
        where = torch.cat([places.get(example.id, unknown) for example in batch.examples])
        targets = batch.targets[batch.counted]
        if not torch.equal(targets.int().cpu(), distribution.targets[where]):
            raise ModelError(
                "the base model's distribution is over other tokens than this model's",
                problems=["the tokenizer or the texts have changed since the base model was scored"],
                hint="score the base model again",
            )
        base = [
            part[where].to(targets.device)
            for part in (distribution.top_ids, distribution.top_log_probs, distribution.rest)
        ]
        outputs = family.forward(model, batch)
        parts: list[Tensor] = []
        for chunk in _chunks(outputs):
            ids, log_p, log_p_rest = (part[chunk] for part in base)
            new = coarsened(outputs.head(outputs.hidden[chunk]), ids.long())
            parts.append(coarse_kl(log_p.double(), log_p_rest.double(), *(part.double() for part in new)).cpu())
        for example, piece in zip(batch.examples, torch.cat(parts).split(_counts(batch)), strict=True):
            nats[example.id] = max(0.0, float(piece.sum()))  # the sum is not negative but for rounding
    counts = dict(zip(distribution.texts, distribution.counts, strict=True))
    mean = sum(nats.values()) / sum(counts[text.id] for text in texts)
    return mean, {text.id: nats[text.id] / counts[text.id] for text in texts}


def _batches(
    model: nn.Module, family: Family, renderer: Renderer, texts: Sequence[Example], max_length: int, max_tokens: int
) -> Iterator[Batch]:
    """The texts on the model's device, padded: a soft prompt would leak between texts in one row."""
    device = device_of(model)
    encoded = [family.encode(text, renderer) for text in texts]
    rows, _ = fit_length(encoded, max_length=max_length, on_overflow="truncate")
    rows = [family.vary(row, renderer, draw="") for row in rows]
    for group in micro_batches(sorted(rows, key=lambda row: row.num_tokens), max_tokens=max_tokens, packed=False):
        yield to_device(family.collate(group, renderer.tokenizer, packed=False), device)


def _chunks(outputs: Outputs) -> Iterator[slice]:
    """Runs of counted positions, so that no more than `_CHUNK` positions' logits exist at a time."""
    return (slice(start, start + _CHUNK) for start in range(0, len(outputs.hidden), _CHUNK))


def _counts(batch: Batch) -> list[int]:
    """How many counted positions every example has; row-major order keeps an example's together."""
    return torch.bincount(batch.target_documents, minlength=len(batch.examples)).tolist()


def _slices(counts: Sequence[int]) -> list[Tensor]:
    """The rows of every text in the tensors of a distribution."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [torch.arange(end - count, end) for count, end in zip(counts, ends, strict=True)]
