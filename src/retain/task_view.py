"""A task bound to its family, tokenizer and method: how rows become batches, and what a strategy sees of a task."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from retain import distributed
from retain.data.packing import Overflow, OverflowCounts, fit_length, micro_batches, to_device
from retain.data.rendering import Renderer
from retain.errors import CompatibilityError
from retain.kernels.cross_entropy import target_nats
from retain.methods.method import Method
from retain.models.family import Family, Outputs
from retain.parameters import evaluating
from retain.strategies.strategy import ModelOutputs
from retain.types import Batch, Encoded, Example, Sampling

__all__ = ["BoundTask", "overflow_notes"]


def overflow_notes(counts: OverflowCounts) -> list[str]:
    """What became of rows that could not be trained on whole, one sentence each; empty where nothing did."""
    said = {
        "rows longer than max_length were dropped": counts.dropped,
        "rows longer than max_length were cut, and lost their stop token": counts.truncated,
        "rows longer than max_length were split into pieces": counts.split,
        "rows had no trained token and were dropped": counts.untrained,
    }
    return [f"{count} {what}" for what, count in said.items() if count]


@dataclass(frozen=True)
class BoundTask:
    """The one implementation of `strategies.TaskView`.

    Args:
        name: the task's name; `base` for stage 0.
        examples: its rows.
        family, renderer, method: the run's choices.
        max_length: tokens that a row may have.
        on_overflow, overflow_threshold: what happens to longer rows; see `data.packing.fit_length`.
        max_tokens: tokens of one micro-batch.
        packed: may documents share a row?
        precision: `bf16` or `fp32`.
        seed: the run's seed.
        learn: trains a helper network on the rows of a view, and returns it.
    """

    name: str
    examples: Sequence[Example]
    family: Family
    renderer: Renderer
    method: Method
    max_length: int
    max_tokens: int
    packed: bool
    precision: str
    seed: int = 0
    on_overflow: Overflow = "error"
    overflow_threshold: float = 0.0
    learn: "Callable[[nn.Module, BoundTask], nn.Module] | None" = None
    encoded: dict[tuple[str, float], Encoded] = field(default_factory=dict[tuple[str, float], Encoded], repr=False)

    @cached_property
    def device(self) -> torch.device:
        """Where this process computes."""
        return distributed.device()

    def encode(self, example: Example) -> Encoded:
        """The example as the model sees it, made once."""
        key = (example.id, example.weight)
        if key not in self.encoded:
            self.encoded[key] = self.family.encode(example, self.renderer)
        return replace(self.encoded[key], example=example)

    def rows(self, examples: Sequence[Example], epoch: int = 0) -> tuple[list[Encoded], OverflowCounts]:
        """The examples encoded and within `max_length`, and what that cost the task's own.

        Rows from a memory were taken once already, or written by a model: where they are too long, they are cut, and
        what is hidden of a text stays the same in every epoch, as what a strategy kept of it belongs to its targets.
        """
        own = [self.encode(example) for example in examples if example.source == "task"]
        others = [self.encode(example) for example in examples if example.source != "task"]
        kept, counts = fit_length(
            own, max_length=self.max_length, on_overflow=self.on_overflow, threshold=self.overflow_threshold
        )
        cut = fit_length(others, max_length=self.max_length, on_overflow="truncate")[0]
        return [*self.varied(kept, epoch), *self.varied(cut)], counts

    def varied(self, rows: Sequence[Encoded], epoch: int = 0) -> list[Encoded]:
        """The rows, fitted to their length, as an epoch reads them; outside training as epoch 0 does."""
        return [self.family.vary(row, self.renderer, draw=f"{self.seed}/{epoch}") for row in rows]

    def collate(self, rows: Sequence[Encoded]) -> list[Batch]:
        """The rows, in order, as micro-batches within the token budget, on the device."""
        groups = micro_batches(rows, max_tokens=self.max_tokens, packed=self.packed)
        tokenizer = self.renderer.tokenizer
        return [to_device(self.family.collate(g, tokenizer, packed=self.packed), self.device) for g in groups]

    def num_tokens(self, example: Example) -> int:
        """Tokens of the example as the model sees it, at most `max_length`."""
        return min(self.encode(example).num_tokens, self.max_length)

    def batches(self, examples: Sequence[Example], *, max_tokens: int | None = None) -> Iterator[Batch]:
        """This process's share of the examples, in order, as micro-batches on the device."""
        mine = list(examples)[distributed.rank() :: distributed.world_size()]
        view = self if max_tokens is None else replace(self, max_tokens=max_tokens)
        rows, _ = fit_length([self.encode(e) for e in mine], max_length=self.max_length, on_overflow="truncate")
        yield from view.collate(self.varied(rows))

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """One pass, in the run's precision; so is its head, whenever logits are asked for."""
        with distributed.autocast(self.precision):
            outputs = self.family.forward(model, batch)

        def head(hidden: Tensor) -> Tensor:
            with distributed.autocast(self.precision):
                return outputs.head(hidden)

        return outputs if self.precision == "fp32" else replace(outputs, head=head)

    def loss(self, outputs: ModelOutputs, batch: Batch) -> Tensor:
        """Nats, weighted and summed over counted targets."""
        with distributed.autocast(self.precision):
            return self.family.loss(cast("Outputs", outputs), batch)  # of our own `forward`

    @torch.no_grad()
    def mean_loss(self, model: nn.Module, examples: Sequence[Example]) -> float:
        """Nats a target over the examples of all processes, in evaluation mode."""
        total, count = 0.0, 0
        with evaluating(model):
            for batch in self.batches(examples):
                total += float(self.loss(self.forward(model, batch), batch))
                count += int(batch.counted.sum())
        return distributed.sum_number(total) / max(distributed.sum_number(count), 1)

    def loglikelihood(self, model: nn.Module, examples: Sequence[Example]) -> list[float]:
        """Log p of each example's trained tokens given the others, nats; of all examples, on every process."""

        def nats(outputs: Outputs, batch: Batch) -> Tensor:
            return target_nats(outputs.hidden, batch.targets[batch.counted], outputs.head)[:, None]

        return [-float(total) for total in self._sums(model, examples, nats)]

    def embed(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """(examples, width), float32 on the CPU: what the head reads, averaged over each example's trained tokens."""

        def states(outputs: Outputs, batch: Batch) -> Tensor:
            return torch.cat([outputs.hidden, torch.ones_like(outputs.hidden[:, :1])], dim=1)  # and how many they are

        sums = torch.stack(self._sums(model, examples, states))  # (examples, width + 1)
        return (sums[:, :-1] / sums[:, -1:].clamp(min=1)).float()

    @torch.no_grad()
    def _sums(
        self, model: nn.Module, examples: Sequence[Example], values: Callable[[Outputs, Batch], Tensor]
    ) -> list[Tensor]:
        """For each example the sum of `values`, (num_targets, n), over its trained tokens: (n,), float64 on the CPU."""
        found: dict[int, Tensor] = {}
        width = 1
        with evaluating(model):
            for batch in self.batches(examples):
                with distributed.autocast(self.precision):
                    rows = values(self.family.forward(model, batch), batch).double()
                width = rows.shape[1]
                sums = rows.new_zeros(len(batch.examples), width).index_add_(0, batch.target_documents, rows).cpu()
                found |= {id(example): total for example, total in zip(batch.examples, sums, strict=True)}
        whole: dict[int, Tensor] = {}
        mine = range(distributed.rank(), len(examples), distributed.world_size())
        for part in distributed.gather_objects({i: found[id(examples[i])] for i in mine if id(examples[i]) in found}):
            whole |= part
        nothing = torch.zeros(width, dtype=torch.float64)  # no token of it is trained
        return [whole.get(i, nothing) for i in range(len(examples))]

    def fit(self, model: nn.Module, examples: Sequence[Example]) -> nn.Module:
        """Train a helper network of the same family on other rows; the random state is left as it was.

        Raises:
            CompatibilityError: if the view was made outside a run, without a loop.
        """
        if self.learn is None:
            raise CompatibilityError(
                "this task view has no loop to train a helper network with",
                hint="use the strategy through `retain train`, or give the view `learn`",
            )
        with torch.random.fork_rng():
            return self.learn(model, replace(self, examples=examples))

    def generate(
        self, model: nn.Module, prompts: Sequence[Example], *, max_new_tokens: int, sampling: Sampling
    ) -> list[str]:
        """Answers to the examples' prompts, or continuations of their texts."""
        ids = [
            self.renderer.prompt_ids(prompt.prompt) if prompt.messages else self.renderer.text_ids(prompt.text)
            for prompt in prompts
        ]
        with evaluating(model), distributed.autocast(self.precision):
            return self.family.generate(
                model, self.renderer.tokenizer, ids, max_new_tokens=max_new_tokens, sampling=sampling
            )
