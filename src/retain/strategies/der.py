"""Dark experience replay: old rows come back with what the model thought of them when they came into the memory.

    loss = loss(new rows) + sum over the trained tokens of replayed rows of
           beta * cross-entropy + alpha * mean over k of (stored logit_k - logit_k)^2

Source: Buzzega et al. 2020, https://arxiv.org/abs/2004.07211: DER++, and with `beta=0` DER.
Differs: of each token's logits the `top_k` largest are stored, as a vocabulary of 50,000 would cost 100 kB a token. The
square is a mean over them, so that alpha does not depend on how many they are. The logits are those at the end of the
row's task. The paper draws from the memory twice, once for each term; here one draw serves both, and one forward pass.
The expectation of a sum is the sum of the expectations whether or not the draws are independent, so the gradient is
the same on average. Old rows are mixed into the epoch, as in `Replay`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain import distributed
from retain.data.memory import Reservoir, Selection
from retain.data.mixing import Mixture
from retain.kernels.chunks import rows_at_once, slices, summed_in_chunks
from retain.parameters import evaluating, trainable
from retain.strategies.strategy import ModelOutputs, State, Strategy, TaskView
from retain.types import Batch, Example

__all__ = ["DER"]


@dataclass
class DER(Strategy):
    """Mix rows of old tasks into the new one, and hold the model to its old logits on them.

    Args:
        alpha: weight of the squared distance from the stored logits, at least 0.
        beta: weight of the replayed rows' own loss, at least 0.
        top_k: logits stored of each trained token, above 0.
        capacity: rows in the memory, above 0.
        capacity_bytes: bytes of text in the memory; None sets no limit. Logits are not counted.
        ratio: the share of an epoch's tokens that are old, in [0, 1); every old task gives as many.
        selection: which rows are kept; see `Replay`.

    Memory: the rows' text, and 6 bytes for each stored logit (float16, with its token as int32): 192 bytes a trained
    token at 32, so 1000 rows of 100 trained tokens take 19 MB. The logits of a pass exist for some targets at a time.
    """

    name: ClassVar[str] = "der"
    reference: ClassVar[str] = "https://arxiv.org/abs/2004.07211"

    alpha: float = 0.1
    beta: float = 1.0
    top_k: int = 32
    capacity: int = 1000
    capacity_bytes: int | None = None
    ratio: float = 0.1
    selection: Selection = "reservoir"

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not value >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {value}")
        if self.top_k < 1:
            raise ValueError(f"top_k: expected a whole number above 0, got {self.top_k}")
        self.memory = Reservoir(self.capacity, self.capacity_bytes, self.selection)
        self.mixture = Mixture(self.ratio)
        self.logits: dict[str, tuple[Tensor, Tensor]] = {}  # by row: (targets, top_k) float16, and their tokens, int32

    def mix_examples(self, task: TaskView, epoch: int) -> Sequence[Example]:
        """The new rows and the old ones of an epoch, old ones last; the same call gives the same rows."""
        return self.mixture.mix(
            task.examples, self.memory.rows,
            num_tokens=task.num_tokens, key=f"{self.memory.seed}/{task.name}", epoch=epoch,
        )  # fmt: skip

    def loss_term(self, model: nn.Module, batch: Batch, outputs: ModelOutputs) -> Tensor | None:
        """alpha * the squared distances, and of the cross-entropy what the loss does not count already: beta - 1."""
        rows = [i for i, row in enumerate(batch.examples) if row.source == "replay" and row.id in self.logits]
        if not rows or (not self.alpha and self.beta == 1):
            return None
        places, stored, tokens = self._lined_up(batch, rows)
        weights, targets = batch.weights[places], batch.targets[batch.counted][places]

        def term(logits: Tensor, part: slice) -> Tensor:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            known = len(stored[part])  # those come first
            squares = (logits[:known].gather(1, tokens[part]) - stored[part]).square().mean(dim=1)
            value = self.alpha * (weights[part][:known] * squares).sum()
            if self.beta == 1:
                return value
            nats = F.cross_entropy(logits, targets[part], reduction="none")
            return value + (self.beta - 1) * (weights[part] * nats).sum()

        if outputs.classes is not None:
            return term(outputs.logits()[places], slice(None))
        hidden = outputs.hidden[places]  # (old targets, width)
        size = rows_at_once(hidden, outputs.head)
        return summed_in_chunks(
            lambda rows, part: term(outputs.head(rows), part), hidden, list(trainable(model).values()), chunk=size
        )

    def after_task(self, model: nn.Module, task: TaskView) -> None:
        """Offer the task's rows to the memory, and store the logits of those that came in."""
        self.memory.offer(task.examples, seed=task.seed, embed=lambda rows: task.embed(model, rows))
        new = [row for row in self.memory.rows if row.id not in self.logits]
        found = self.logits | self._logits_of(model, task, new)
        self.logits = {row.id: found[row.id] for row in self.memory.rows if row.id in found}

    def state_dict(self) -> State:
        """The memory, and the stored logits of all rows one after another."""
        state: State = {**self.memory.state_dict(), "rows": list(self.logits)}
        state["counts"] = [len(values) for values, _ in self.logits.values()]
        if self.logits:
            values, tokens = zip(*self.logits.values(), strict=True)
            state |= {"logits": torch.cat(values), "tokens": torch.cat(tokens)}
        return state

    def restore(self, model: nn.Module, state: State) -> nn.Module:
        """Take them back."""
        self.memory.restore(state)
        self.logits = {}
        if counts := state["counts"]:
            values, tokens = (state[name][:, : self.top_k].cpu().split(counts) for name in ("logits", "tokens"))
            self.logits = dict(zip(state["rows"], zip(values, tokens, strict=True), strict=True))
        return model

    def _lined_up(self, batch: Batch, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The places of the rows' counted targets, those with stored logits first; their logits and tokens.

        A row is cut at its end, so its n-th counted target is the n-th stored one, also where `max_length` changed.
        """
        owners = batch.target_documents  # (num_targets,)
        places = [(owners == row).nonzero()[:, 0] for row in rows]
        stored = [self.logits[batch.examples[row].id] for row in rows]
        known = [min(len(at), len(values)) for at, (values, _) in zip(places, stored, strict=True)]
        first = [at[:num] for at, num in zip(places, known, strict=True)]
        rest = [at[num:] for at, num in zip(places, known, strict=True)]
        # In float32 before they are joined: bf16 autocast joins no float16.
        values = torch.cat([values[:num].float() for (values, _), num in zip(stored, known, strict=True)])
        tokens = torch.cat([tokens[:num] for (_, tokens), num in zip(stored, known, strict=True)])
        return torch.cat([*first, *rest]), values.to(owners.device), tokens.to(owners.device).long()

    @torch.no_grad()
    def _logits_of(
        self, model: nn.Module, task: TaskView, examples: Sequence[Example]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The largest logits of each example's counted targets, and their tokens; of all examples, on every process."""
        widest = min([self.top_k, *(values.shape[1] for values, _ in self.logits.values())])  # one for all rows
        mine: dict[str, tuple[Tensor, Tensor]] = {}
        with evaluating(model):
            for batch in task.batches(examples):
                values, tokens = largest(task.forward(model, batch), widest)
                mine |= dict(_by_row(batch, values.half().cpu(), tokens.int().cpu()))
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for part in distributed.gather_objects(mine):
            found |= part
        return found


def largest(outputs: ModelOutputs, num: int) -> tuple[Tensor, Tensor]:
    """(num_targets, num), the largest logits of each target and their tokens, some targets at a time."""
    hidden = outputs.hidden
    if outputs.classes is not None:
        logits = outputs.logits()
        values, tokens = logits.topk(min(num, logits.shape[1]))
        return values, tokens
    if not len(hidden):
        return hidden.new_empty(0, num), torch.empty(0, num, dtype=torch.long, device=hidden.device)
    found: list[tuple[Tensor, Tensor]] = []
    for part in slices(len(hidden), rows_at_once(hidden, outputs.head)):
        logits = outputs.head(hidden[part])  # (rows, vocabulary)
        values, tokens = logits.topk(min(num, logits.shape[1]))
        found.append((values, tokens))
    values, tokens = zip(*found, strict=True)
    return torch.cat(values), torch.cat(tokens)


def _by_row(batch: Batch, values: Tensor, tokens: Tensor) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    owners = batch.target_documents.cpu()
    for index, row in enumerate(batch.examples):
        yield row.id, (values[owners == index], tokens[owners == index])
