"""The waist between methods and strategies: which parameters move is said by `requires_grad` alone."""

import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Counts",
    "cast_frozen",
    "copied",
    "device_of",
    "differentiating",
    "evaluating",
    "freeze",
    "is_embedding",
    "known_rows",
    "layer_number",
    "local",
    "modules_of",
    "num_bytes",
    "put_back",
    "swapped",
    "trainable",
]


class Counts(nn.Module):
    """What a model learns by counting: buffers that take any size, instead of parameters that move."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Take the buffers as they come: other data are other sizes."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            if prefix + name in state_dict:
                setattr(self, name, state_dict[prefix + name].to(buffer.device))
            else:
                missing_keys.append(prefix + name)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is, or its first buffer where it has only counts."""
    return next(chain(model.parameters(), model.buffers())).device


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training may move, by name; tied ones once, under their first name.

    As `model.named_parameters()` gives them, in a third of its time: strategies ask several times a step.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        for name, parameter in module._parameters.items():  # pyright: ignore[reportPrivateUsage]
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[prefix + name] = parameter
        for name, child in module._modules.items():  # pyright: ignore[reportPrivateUsage]
            if child is not None:
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return found


def freeze(model: nn.Module) -> nn.Module:
    """Let nothing of the model move any more."""
    return model.requires_grad_(False)


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Keep what never moves in a smaller type; what moves stays at master precision."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: the shard of a DTensor, else the tensor itself.

    Elementwise work (a quadratic penalty, an optimizer's step) is exact on shards and needs no communication.
    """
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that the tensors hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def copied(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what moves, or is counted, by name."""
    counts = {
        f"{name}.{key}".lstrip("."): buffer
        for name, module in model.named_modules()
        if isinstance(module, Counts)
        for key, buffer in module.named_buffers(recurse=False)
    }
    return {name: tensor.detach().clone() for name, tensor in (trainable(model) | counts).items()}


def known_rows(parameter: Tensor, earlier: Tensor) -> Tensor:
    """The part of a parameter that an earlier copy of it has values for: it may have more rows by now."""
    return parameter.detach() if parameter.shape == earlier.shape else parameter.detach()[: len(earlier)]


@torch.no_grad()
def put_back(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the model an earlier copy's values; rows that a parameter has grown since stay."""
    for name, value in values.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, Counts):
            setattr(module, key, value.clone())
        else:
            known_rows(model.get_parameter(name), value).copy_(value)


@contextmanager
def swapped(model: nn.Module, values: Mapping[str, Tensor]) -> Generator[nn.Module]:
    """The model with other values of some parameters, and no gradients, while inside.

    An earlier model is then the same network and a copy of what has moved since: cheap where little moves.

    Args:
        values: by parameter name; a value that has fewer rows than the parameter, because it has grown, fills the
            first ones.
    """
    parameters = dict(model.named_parameters())
    kept: list[tuple[nn.Parameter, Tensor]] = []
    torch.clear_autocast_cache()  # it knows a weight's bf16 copy by the weight, not by its values
    try:
        for name, value in values.items():
            parameter = parameters[name]
            kept.append((parameter, parameter.data))
            if value.shape != parameter.shape:
                value = torch.cat([value.to(parameter.device), parameter.data[len(value) :]])
            parameter.data = value.to(parameter.device)
        with torch.no_grad():
            yield model
    finally:
        for parameter, data in kept:
            parameter.data = data
        torch.clear_autocast_cache()


@contextmanager
def evaluating(model: nn.Module) -> Generator[nn.Module]:
    """Evaluation mode (no dropout), with every module's mode and the random state restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode
        torch.set_rng_state(state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def differentiating(model: nn.Module) -> Generator[nn.Module]:
    """Evaluation mode for passes whose gradients are taken.

    cuDNN gives recurrent layers no gradient in evaluation mode; torch's own kernels, which run in its place, do.
    """
    enabled: bool = torch.backends.cudnn.enabled
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with evaluating(model), torch.enable_grad():
        torch.backends.cudnn.enabled = enabled and not recurrent
        try:
            yield model
        finally:
            torch.backends.cudnn.enabled = enabled


LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.|_l(\d+)(?:_reverse)?$")
"""A layer's number in a parameter's name: `model.layers.3.`, `transformer.h.3.`, `encoder.layer.3.`, `bias_hh_l3`."""

EMBEDDING = re.compile(r"(?:^|\.)(?:embed_\w+|\w*embeddings?|wte|wpe|shared)\.")
"""A parameter of the embeddings: `model.embed_tokens.`, `transformer.wte.`, `embeddings.`, `shared.`"""


def layer_number(name: str) -> int | None:
    """The layer that a parameter of this name lies in, from 0; None where it lies in none."""
    found = LAYER.search(name)
    return int(found[1] or found[2]) if found else None


def is_embedding(name: str) -> bool:
    """Is the parameter of this name one of the embeddings?"""
    return bool(EMBEDDING.search(name))


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules that the parameters lie in, each once, with `*` for a layer's number."""
    return sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name.rpartition(".")[0] or name) for name in names})
