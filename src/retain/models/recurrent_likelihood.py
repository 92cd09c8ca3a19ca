"""Likelihoods of many continuations of one context: the context is read once, and each continuation from its state."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retain.kernels.cross_entropy import target_nats
from retain.models.causal import padded, within_budget
from retain.models.head import run_to_head
from retain.models.recurrent_network import RecurrentState

__all__ = ["state_likelihoods"]


@torch.no_grad()
def state_likelihoods(
    model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]], *, pad_id: int, max_tokens: int = 4096
) -> list[float]:
    """log p(continuation | context) in nats.

    Args:
        model: a recurrent language model in evaluation mode.
        pairs: token ids of context (at least two) and continuation (at least one).
        pad_id: fills the rows on the right.
        max_tokens: padded tokens of one pass.
    """
    # The last token of the context is read with the continuation: its output predicts the continuation's first token.
    states = _states_after({tuple(context[:-1]) for context, _ in pairs}, model, pad_id, max_tokens)
    result = [0.0] * len(pairs)
    for group in within_budget([1 + len(rest) for _, rest in pairs], max_tokens):
        rows = [[pairs[i][0][-1], *pairs[i][1]] for i in group]
        ids, mask = padded(rows, pad_id, next(model.parameters()).device)
        counted = torch.zeros_like(mask, dtype=torch.bool)
        counted[:, :-1] = mask[:, 1:].bool()
        starts = [states[tuple(pairs[i][0][:-1])] for i in group]
        state = RecurrentState(tuple(torch.stack(part, dim=1) for part in zip(*starts, strict=True)))
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": state}
        outputs = run_to_head(model, inputs, counted)
        nats = target_nats(outputs.hidden, ids[:, 1:][counted[:, :-1]], outputs.head)
        sums = torch.zeros_like(counted, dtype=torch.float64).masked_scatter_(counted, nats.double()).sum(1)
        for row, i in enumerate(group):
            result[i] = -float(sums[row])
    return result


def _states_after(
    starts: set[tuple[int, ...]], model: nn.Module, pad_id: int, max_tokens: int
) -> dict[tuple[int, ...], tuple[Tensor, ...]]:
    """The state after each start, (layers, width) each part."""
    ordered = sorted(starts)
    states: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
    for group in within_budget([len(start) for start in ordered], max_tokens):
        ids, mask = padded([ordered[i] for i in group], pad_id, next(model.parameters()).device)
        made = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values
        for row, i in enumerate(group):
            states[ordered[i]] = tuple(part[:, row] for part in made.tensors)
    return states
