"""An encoder's forward passes: outputs at the targets of a batch, and what it says of prompts and texts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retain.data.labels import Labels
from retain.data.packing import to_device
from retain.data.rendering import Renderer
from retain.errors import DataError, ModelError
from retain.models.causal import within_budget
from retain.models.encoder_classes import classifiers, labels_in
from retain.models.encoder_heads import masked_model
from retain.models.encoder_rows import ended
from retain.models.encoder_tokenizer import bracketed, segments, words_of
from retain.models.family import Outputs, Tokenizer, pretrained
from retain.models.head import output_head
from retain.models.masking import hidden_in_turn
from retain.models.virtual_tokens import num_virtual
from retain.types import IGNORED, Batch, Encoded, Example, Message

__all__ = ["class_logits", "outputs_of", "pseudo_likelihoods", "yes_or_no"]

NEVER = -1e4
"""The logit of a class that another task's head has: its probability is 0, and it is a number in bfloat16 too."""

TURNS = 7
"""In how many passes every token of a text is hidden once: about the 15 % that a model is trained with."""

MAX_TOKENS = 8192
"""Padded tokens of one pass that only reads."""

Collate = Callable[[Sequence[Encoded]], Batch]


def outputs_of(model: nn.Module, batch: Batch) -> Outputs:
    """One pass over rows of one kind; the head waits.

    A row that is asked yes or no of several classes has its states as often, and the head picks the class of each.

    Raises:
        DataError: rows are longer than the encoder's table of positions.
    """
    length, room = batch.inputs["input_ids"].shape[1], num_positions(model)
    if position_table(model) is not None and length > room:
        raise DataError(
            f"a row has {length} tokens, and the encoder has positions for {room}",
            hint=f"set train.max_length to {room}, and train.on_overflow to truncate",
        )
    if not batch.examples[0].messages:
        language = masked_model(model)
        hidden, head = run_to(language, batch.inputs, [output_head(language)])  # (rows, length, width)
        return Outputs(hidden[:, -batch.counted.shape[1] :][batch.counted], head)
    labels = labels_in(model)
    hidden, head = run_to(model, batch.inputs, classifiers(model))  # (rows, width) or (rows, length, width)
    rows, places = batch.counted.nonzero(as_tuple=True)
    tagged = labels.kind == "tokens"
    states = hidden[:, -batch.counted.shape[1] :][batch.counted] if tagged else hidden[rows]  # (num_targets, width)
    if labels.kind == "multi":
        return Outputs(states, lambda given: yes_or_no(head(given), places), classes=places[:, None].expand(-1, 2))
    classes = torch.arange(len(labels.ids), device=states.device).expand(len(states), -1)  # (num_targets, classes)
    if not labels.per_task:
        return Outputs(states, head, classes=classes)
    others = other_classes(batch, labels)
    return Outputs(states, lambda given: head(given).masked_fill(others, NEVER), classes=classes)


def position_table(model: nn.Module) -> nn.Embedding | None:
    """The embeddings of an encoder's positions, if it has a number of them."""
    named = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    return next((module for module in named if isinstance(module, nn.Embedding)), None)


def num_positions(model: nn.Module) -> int:
    """Tokens that a row may have: the encoder's positions without those of virtual tokens."""
    table = position_table(model)
    if table is None:
        return pretrained(model).config.max_position_embeddings - num_virtual(model)
    unused = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa counts from behind its padding's
    return table.num_embeddings - unused - num_virtual(model)


def other_classes(batch: Batch, labels: Labels) -> Tensor:
    """(num_targets, classes), true for the classes that another task's head has."""
    others = torch.ones(len(batch.target_documents), len(labels.ids), dtype=torch.bool, device=batch.targets.device)
    for target, document in enumerate(batch.target_documents.tolist()):
        others[target, labels.rows(batch.examples[document].task)] = False
    return others


def yes_or_no(logits: Tensor, places: Tensor) -> Tensor:
    """(n, 2): 0, and the logit z of each target's class. softmax((0, z)) is (1 - sigmoid(z), sigmoid(z)).

    Args:
        logits: (n, classes).
        places: (num_targets,), the class that each target asks about; the first n where fewer logits come.
    """
    chosen = logits.gather(1, places[: len(logits), None])  # (n, 1)
    return torch.cat([torch.zeros_like(chosen), chosen], dim=1)


def run_to(
    model: nn.Module, inputs: Mapping[str, Tensor], heads: Sequence[nn.Module]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """One forward pass that stops before the head: what the head reads, and the head.

    Args:
        model: the outermost module.
        inputs: its keyword arguments.
        heads: the head, and copies of it of which one is in use.

    Raises:
        ModelError: none of them is run.
    """
    taken: list[tuple[Tensor, nn.Module]] = []

    def intercept(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.append((arguments[0], head))
        return (arguments[0][:0],)

    handles = [head.register_forward_pre_hook(intercept) for head in heads]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not taken:
        raise ModelError(f"{type(model).__name__} does not run its head", hint="use another encoder")
    return taken[-1]


def batched(model: nn.Module, rows: Sequence[Encoded], collate: Collate) -> Iterator[tuple[list[int], Batch]]:
    """The rows in batches of like length, with their numbers, on the model's device."""
    device = next(model.parameters()).device
    for group in within_budget([row.num_tokens for row in rows], MAX_TOKENS):
        yield group, to_device(collate([rows[i] for i in group]), device)


@torch.no_grad()
def class_logits(
    model: nn.Module, renderer: Renderer, prompts: Sequence[Sequence[Message]], collate: Collate
) -> list[Tensor]:
    """The logits of all classes, (1, classes) a prompt; where words have one each, (words, classes).

    A prompt is read as far as the model has positions; words beyond are read at the first token.

    Args:
        model: in evaluation mode.
        renderer: with the labels.
        prompts: conversations without the answer.
        collate: makes a batch.
    """
    tokenizer, tagged = renderer.tokenizer, renderer.labels.kind == "tokens"
    longest = num_positions(model)
    rows: list[Encoded] = []
    words: list[list[int]] = []  # the place of each word's first token
    for prompt in prompts:
        ids, places = words_of(tokenizer, prompt[-1].content.split()) if tagged else ([], [])
        types = [0] * len(ids)
        if not tagged:
            ids, types = segments(tokenizer, prompt)
        example = Example(id="", messages=(*prompt, Message("assistant", "")))
        inputs = {"input_ids": ids[:longest], "token_type_ids": types[:longest]}
        row = Encoded(example, inputs, [0], [1.0], max(0, len(ids) - longest))
        rows.append(replace(ended(row, renderer), targets=[0]))
        words.append(places)
    found: dict[int, Tensor] = {}
    for group, batch in batched(model, rows, collate):
        hidden, head = run_to(model, batch.inputs, classifiers(model))
        logits = head(hidden).float().cpu()
        for i, row in zip(group, logits, strict=True):
            own = row[-batch.inputs["input_ids"].shape[1] :]  # virtual tokens come before the text's
            found[i] = own[[at if 0 <= at < len(own) else 0 for at in words[i]]] if tagged else row[None]
    return [found[i] for i in range(len(prompts))]


@torch.no_grad()
def pseudo_likelihoods(
    model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[tuple[list[int], list[int]]], collate: Collate
) -> list[float]:
    """Log p of each continuation's tokens given the rest of the text, on both sides of it, nats.

    Every seventh token is hidden at a time, so that seven passes read a text.

    Source: Salazar et al. 2020, https://arxiv.org/abs/1910.14659, eq. 1.
    Differs: they hide one token at a time.
    """
    rows: list[Encoded] = []
    owners: list[int] = []
    special = set(tokenizer.all_special_ids)
    for owner, (context, rest) in enumerate(pairs):
        whole = bracketed(tokenizer, [*context, *rest])
        end = len(whole) - 1
        wanted = [place for place in range(max(1, end - len(rest)), end) if whole[place] not in special]
        for hidden in hidden_in_turn(wanted, turns=TURNS):
            ids = [tokenizer.mask_token_id if place in hidden else token for place, token in enumerate(whole)]
            targets = [token if place in hidden else IGNORED for place, token in enumerate(whole)]
            rows.append(Encoded(Example(id="", text="-"), {"input_ids": ids}, targets, [1.0] * len(ids)))
            owners.append(owner)
    result = [0.0] * len(pairs)
    for group, batch in batched(model, rows, collate):
        logits = outputs_of(model, batch).logits()
        nats = F.cross_entropy(logits.double(), batch.targets[batch.counted], reduction="none")
        for value, document in zip(nats.tolist(), batch.target_documents.tolist(), strict=True):
            result[owners[group[document]]] -= value
    return result
