"""What every causal language model does alike: rows, likelihoods and answers from left to right."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from retain.data.packing import shifted
from retain.data.rendering import Renderer
from retain.kernels.cross_entropy import target_nats
from retain.models.family import Family, Outputs, Tokenizer, pretrained
from retain.models.head import contiguous_input, run_to_head
from retain.parameters import device_of
from retain.types import GREEDY, Batch, Encoded, Example, Sampling

__all__ = ["CausalFamily", "generate_causal", "likelihoods", "padded", "stop_ids", "within_budget"]


class CausalFamily(Family):
    """What reads from left to right: each position predicts the token after it."""

    def encode(self, example: Example, renderer: Renderer) -> Encoded:
        """Ids, and as the target of each position the token after it."""
        return shifted(example, *renderer.encode(example))

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """One pass; the head waits for `Outputs`."""
        return run_to_head(model, batch.inputs, batch.counted)

    def generate(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The continuation of every prompt, without the stop token."""
        return generate_causal(model, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling)


def within_budget(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in groups of like length, so that a group padded to its longest holds at most `max_tokens`."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        if group and lengths[group[0]] * (len(group) + 1) > max_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def padded(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Ids and their mask, (rows, longest) each."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def likelihoods(
    model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]], *, pad_id: int, max_tokens: int = 4096
) -> list[float]:
    """log p(continuation | context) in nats, one row a pair.

    Args:
        model: a causal language model in evaluation mode.
        pairs: token ids of context (at least one) and continuation (at least one).
        pad_id: fills the rows on the right, where nothing before them can see it.
        max_tokens: padded tokens of one pass.
    """
    device = device_of(model)
    result = [0.0] * len(pairs)
    for group in within_budget([len(context) + len(rest) for context, rest in pairs], max_tokens):
        rows = [pairs[i][0] + pairs[i][1] for i in group]
        ids, mask = padded(rows, pad_id, device)
        counted = torch.zeros_like(ids, dtype=torch.bool)
        owner = torch.full_like(ids, -1)
        for row, i in enumerate(group):
            start, end = len(pairs[i][0]) - 1, len(rows[row]) - 1
            counted[row, start:end] = True
            owner[row, start:end] = row
        outputs = run_to_head(model, {"input_ids": ids, "attention_mask": mask}, counted)
        targets = torch.roll(ids, -1, dims=1)[counted]
        nats = target_nats(outputs.hidden, targets, outputs.head)
        sums = torch.zeros(len(group), dtype=torch.float64, device=device).index_add_(0, owner[counted], nats.double())
        for row, i in enumerate(group):
            result[i] = -float(sums[row])
    return result


def stop_ids(model: nn.Module, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer: the model's own generation settings, else the tokenizer's end of sequence."""
    stop = pretrained(model).generation_config.eos_token_id
    if stop is None:
        stop = tokenizer.eos_token_id
    return [stop] if isinstance(stop, int) else list(stop or [])


@torch.no_grad()
def generate_causal(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    max_tokens: int = 8192,
) -> list[str]:
    """Continue every prompt until a stop token.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids, at least one each.
        max_new_tokens: tokens that an answer may have.
        sampling: how tokens are drawn.
        max_tokens: padded tokens, new ones counted, of one pass.
    """
    device = device_of(model)
    stops = stop_ids(model, tokenizer)
    pad_id = stops[0] if stops else 0
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling.temperature > 0,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=stops or None,
        pad_token_id=pad_id,
        **(drawn if sampling.temperature > 0 else {}),
    )
    answers = [""] * len(prompts)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), contiguous_input(model):
        torch.manual_seed(sampling.seed)
        for group in within_budget([len(prompt) + max_new_tokens for prompt in prompts], max_tokens):
            ids, mask = padded([prompts[i] for i in group], pad_id, device, left=True)
            made = cast("Any", model).generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            for i, row in zip(group, made[:, ids.shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in stops), len(row))
                answers[i] = tokenizer.decode(row[:end], skip_special_tokens=True)
    return answers
