"""The output head, intercepted: it runs at counted targets only, after the one forward pass that stops before it."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retain.errors import ModelError
from retain.models.family import Outputs, pretrained

__all__ = ["check_head", "contiguous_input", "output_head", "run_to_head"]


def output_head(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits.

    Raises:
        ModelError: if the model has none that it names.
    """
    head = pretrained(model).get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ModelError(
            f"{type(model).__name__} names no output head, so its loss cannot be read at targets only",
            hint="load a model whose `get_output_embeddings()` returns its head",
        )
    return head


def after_head(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What the model does to its logits after the head, read from its configuration and buffers; None if nothing."""
    config = pretrained(model).config
    settings = config.get_text_config().to_dict()
    cap, scale, divisor = (settings.get(key) for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"))
    names = (name for name, _ in model.named_buffers() if name.split(".")[-1] == "final_logits_bias")
    bias = next((model.get_buffer(name) for name in names), None) if config.is_encoder_decoder else None  # BART
    if not cap and scale is None and divisor is None and (bias is None or not bias.any()):
        return None

    def change(logits: Tensor) -> Tensor:
        logits = logits + bias.flatten() if bias is not None else logits
        logits = logits * scale if scale is not None else logits  # Cohere
        logits = logits / divisor if divisor is not None else logits  # Granite
        return torch.tanh(logits / cap) * cap if cap else logits  # Gemma

    return change


def run_to_head(model: nn.Module, inputs: Mapping[str, Any], counted: Tensor) -> Outputs:
    """One forward pass through the outermost module that stops before the output head.

    The head's input is taken at counted positions and the head itself is given an empty sequence, so that what the
    model does after it costs nothing. Virtual tokens that a soft prompt puts in front are skipped.

    Args:
        model: a `transformers` model, or one wrapped by PEFT.
        inputs: the model's keyword arguments.
        counted: (rows, length), bool, the positions whose outputs are wanted; of a decoder where there are two halves.
    """
    head = output_head(model)
    taken: list[Tensor] = []

    def intercept(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = arguments[0]  # (rows, length, width)
        taken.append(hidden[:, -counted.shape[1] :][counted])  # (num_targets, width)
        return (hidden[:, :0],)

    handle = head.register_forward_pre_hook(intercept)
    try:
        model(**inputs, use_cache=False)  # a cache would let packed documents see one another
    finally:
        handle.remove()
    change = after_head(model)
    own = dict(head.named_parameters(recurse=False))
    plain = type(head) is nn.Linear and own.keys() == {"weight"} and change is None
    return Outputs(
        hidden=taken[0],
        head=head if change is None else lambda hidden: change(head(hidden)),
        weight=own["weight"] if plain else None,
    )


@contextmanager
def contiguous_input(model: nn.Module) -> Generator[None]:
    """While inside, the head reads a copy of what it is given: the same logits, often in a fraction of the time.

    Generation gives it the last position of every row, a view. A product of a batch that is no plain matrix repeats the
    other factor for each row, and on a CPU torch then copies the head's weight once a row.
    """
    head = pretrained(model).get_output_embeddings()
    if not isinstance(head, nn.Module):  # an n-gram model looks its answers up
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, arguments: (arguments[0].contiguous(),))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def check_head(model: nn.Module, *, tolerance: float = 1e-4) -> None:
    """Compare the intercepted logits with the model's own on a few tokens.

    Raises:
        ModelError: if the model changes its logits in a way that `after_head` does not know.
    """
    head_device = next(model.parameters()).device
    ids = torch.arange(4, 12, device=head_device)[None] % pretrained(model).config.get_text_config().vocab_size
    inputs = {"input_ids": ids}
    if pretrained(model).config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    own = model(**inputs, use_cache=False).logits[0].float()
    ours = run_to_head(model, inputs, torch.ones_like(ids, dtype=torch.bool)).logits().float()
    difference = float((own - ours).abs().max() / own.abs().max().clamp_min(1e-9))
    if not difference <= tolerance:
        raise ModelError(
            f"{type(model).__name__} changes its logits after the output head in an unknown way",
            problems=[f"relative difference {difference:.2g}, at most {tolerance:g} is allowed"],
            hint="report the model's name to the project: its output scaling has to be added to models/head.py",
        )
