"""What an encoder-decoder model says of texts: likelihoods of answers, each context encoded once, and answers."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from retain.kernels.cross_entropy import target_nats
from retain.models.causal import padded, stop_ids, within_budget
from retain.models.denoising import FILLED_AT_ONCE, Markers
from retain.models.family import Tokenizer, pretrained
from retain.models.head import run_to_head
from retain.types import Sampling

__all__ = ["answer_likelihoods", "generate_answers", "start_id"]

ROUNDS = 8
"""How often a text is continued: a denoiser fills in a few tokens at a time."""

OWN_SEARCH = {
    "num_beams": 1, "num_return_sequences": 1, "min_length": 0, "no_repeat_ngram_size": 0, "length_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0, "early_stopping": False,
}  # fmt: skip
"""Set so that a model's own search (BART for summaries has four beams) does not take the place of what was asked."""


def start_id(model: nn.Module) -> int:
    """The token that the decoder reads before the first one that it writes: T5's padding, BART's EOS."""
    return cast("int", pretrained(model).config.decoder_start_token_id)


@torch.no_grad()
def answer_likelihoods(
    model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[tuple[list[int], list[int]]], *, max_tokens: int = 4096
) -> list[float]:
    """log p(continuation | context) in nats; every distinct context passes through the encoder once.

    Args:
        model: an encoder-decoder model in evaluation mode.
        tokenizer: its own.
        pairs: token ids of context and continuation. One of them ends in EOS: the continuation is the answer. Neither
            does: it is how the text goes on, which the model fills in, few tokens at a time, as it writes.
        max_tokens: padded tokens of one pass of either half.
    """
    parts = asked(Markers.of(tokenizer), pairs)
    requests, rests = [(source, given) for _, source, given, _ in parts], [rest for *_, rest in parts]
    owners: dict[tuple[int, ...], list[int]] = {}
    for i, (source, _) in enumerate(requests):
        owners.setdefault(tuple(source), []).append(i)
    contexts = list(owners)
    device = next(model.parameters()).device
    pad_id: int = tokenizer.pad_token_id or 0
    result = [0.0] * len(pairs)
    for group in within_budget([len(context) for context in contexts], max_tokens):
        ids, mask = padded([contexts[c] for c in group], pad_id, device)
        states = encoded(model, ids, mask)  # (contexts, longest, width)
        at = {i: row for row, c in enumerate(group) for i in owners[contexts[c]]}
        members = list(at)
        rows = [[start_id(model), *requests[i][1], *rests[i]] for i in members]
        for part in within_budget([len(row) for row in rows], max_tokens):
            place = torch.tensor([at[members[k]] for k in part], device=device)
            written, inside = padded([rows[k] for k in part], pad_id, device)
            counted = torch.zeros_like(written, dtype=torch.bool)
            for row, k in enumerate(part):
                counted[row, len(rows[k]) - len(rests[members[k]]) - 1 : len(rows[k]) - 1] = True
            inputs = {
                "encoder_outputs": BaseModelOutput(last_hidden_state=cast("Any", states[place])),
                "attention_mask": mask[place], "decoder_input_ids": written,
            }  # fmt: skip
            outputs = run_to_head(model, inputs, counted)
            nats = target_nats(outputs.hidden, torch.roll(written, -1, dims=1)[counted], outputs.head)
            owner = torch.arange(len(part), device=device)[:, None].expand_as(inside)[counted]
            sums = torch.zeros(len(part), dtype=torch.float64, device=device).index_add_(0, owner, nats.double())
            for row, k in enumerate(part):
                result[parts[members[k]][0]] -= float(sums[row])
    return result


def asked(
    markers: Markers, pairs: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[int, list[int], list[int], list[int]]]:
    """(pair, what the encoder reads, what the decoder is given, what is counted), one or more of each pair.

    An answer is one; of a text that goes on, a few tokens are hidden at a time, and those before them are read.
    """
    found: list[tuple[int, list[int], list[int], list[int]]] = []
    for i, (context, rest) in enumerate(pairs):
        if markers.finished(context) or markers.finished(rest):
            found.append((i, markers.source(context), [], markers.target(rest)))
            continue
        for start in range(0, len(rest), FILLED_AT_ONCE):
            source, given = markers.request([*context, *rest[:start]])
            found.append((i, source, given, rest[start : start + FILLED_AT_ONCE]))
    return found


def encoded(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The encoder's output, (rows, length, width)."""
    return cast("Any", pretrained(model)).get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    max_tokens: int = 8192,
) -> list[str]:
    """The answer to every prompt that ends in EOS, and the continuation of every other.

    Args:
        model: an encoder-decoder model in evaluation mode.
        tokenizer: its own.
        prompts: token ids.
        max_new_tokens: tokens of an answer or a continuation.
        sampling: how tokens are drawn.
        max_tokens: padded tokens, new ones counted, of one pass.
    """
    markers = Markers.of(tokenizer)
    answers = [""] * len(prompts)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)

        def write(chosen: Sequence[int], texts: Sequence[list[int]], most: int) -> list[list[int]]:
            requests = [markers.request(text) for text in texts]
            return decoded(model, tokenizer, requests, markers, most, sampling, max_tokens) if chosen else []

        asked = [i for i, prompt in enumerate(prompts) if markers.finished(prompt)]
        for i, ids in zip(asked, write(asked, [prompts[i] for i in asked], max_new_tokens), strict=True):
            answers[i] = tokenizer.decode(ids, skip_special_tokens=True)
        texts = {i: markers.bare(prompt) for i, prompt in enumerate(prompts) if not markers.finished(prompt)}
        lengths = {i: len(text) for i, text in texts.items()}
        open_texts = list(texts)
        for _ in range(ROUNDS):
            left = max_new_tokens - min((len(texts[i]) - lengths[i] for i in open_texts), default=max_new_tokens)
            if left <= 0:
                break
            made = write(open_texts, [texts[i] for i in open_texts], left)
            for i, ids in zip(open_texts, made, strict=True):
                texts[i] = (texts[i] + ids)[: lengths[i] + max_new_tokens]
            open_texts = [i for i, ids in zip(open_texts, made, strict=True) if ids]
    for i, text in texts.items():
        before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (text[: lengths[i]], text))
        answers[i] = whole.removeprefix(before)
    return answers


def decoded(
    model: nn.Module,
    tokenizer: Tokenizer,
    requests: Sequence[tuple[list[int], list[int]]],
    markers: Markers,
    max_new_tokens: int,
    sampling: Sampling,
    max_tokens: int,
) -> list[list[int]]:
    """What the decoder writes after what it is given, without the token that stops it.

    Args:
        requests: what the encoder reads, and what the decoder is given as written.
    """
    device = next(model.parameters()).device
    pad_id: int = tokenizer.pad_token_id or 0
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    by_given: dict[int, list[int]] = {}  # rows that are given as many tokens need no padding between these and the new
    for i, (_, given) in enumerate(requests):
        by_given.setdefault(len(given), []).append(i)
    made: list[list[int]] = [[] for _ in requests]
    for num, members in by_given.items():
        stops = [*stop_ids(model, tokenizer), *(markers.sentinels if num else ())]  # the next hidden part's begins
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=sampling.temperature > 0,
            repetition_penalty=sampling.repetition_penalty,
            decoder_start_token_id=start_id(model),
            eos_token_id=stops,
            pad_token_id=pad_id,
            **OWN_SEARCH,
            **(drawn if sampling.temperature > 0 else {}),
        )
        lengths = [len(requests[i][0]) + num + max_new_tokens for i in members]
        for part in within_budget(lengths, max_tokens):
            group = [members[k] for k in part]
            ids, mask = padded([requests[i][0] for i in group], pad_id, device)
            given = torch.tensor([[start_id(model), *requests[i][1]] for i in group], device=device)
            rows = cast("Any", model).generate(
                input_ids=ids, attention_mask=mask, decoder_input_ids=given, generation_config=settings
            )
            for i, row in zip(group, rows[:, given.shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in stops), len(row))
                made[i] = row[:end]
    return made
