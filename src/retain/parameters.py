"""The waist between methods and strategies: which parameters move is said by `requires_grad` alone."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = [
    "cast_frozen",
    "copied",
    "evaluating",
    "freeze",
    "known_rows",
    "local",
    "num_bytes",
    "put_back",
    "swapped",
    "trainable",
]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training may move, by name; tied ones once, under their first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


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
    """A copy of what moves, by name."""
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def known_rows(parameter: Tensor, earlier: Tensor) -> Tensor:
    """The part of a parameter that an earlier copy of it has values for: it may have more rows by now."""
    return parameter.detach() if parameter.shape == earlier.shape else parameter.detach()[: len(earlier)]


@torch.no_grad()
def put_back(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the model an earlier copy's values; rows that a parameter has grown since stay."""
    for name, value in values.items():
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
