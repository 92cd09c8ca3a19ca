from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from retain.models import FAMILIES
from retain.models.family import Family, Outputs


def test_logits_are_made_when_asked_and_of_the_same_pass() -> None:
    calls: list[int] = []
    layer = nn.Linear(4, 7, bias=False)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden))
        return torch.tanh(layer(hidden))

    hidden = torch.randn(3, 4, requires_grad=True)
    outputs = Outputs(hidden, head)
    assert calls == []
    assert torch.equal(outputs.logits(), torch.tanh(hidden @ layer.weight.T))
    assert calls == [3]
    outputs.logits().sum().backward()
    assert hidden.grad is not None, "logits carry the graph of the pass"
    assert outputs.weight is None


def test_every_family_answers_the_protocol() -> None:
    asked = {name for name, value in vars(Family).items() if callable(value) and not name.startswith("_")}
    assert {"load", "encode", "collate", "forward", "loss", "loglikelihood", "generate", "fit"} <= asked
    for name, family in FAMILIES.items():
        assert family.name == name
        made: Callable[..., Any] = family
        for method in asked:
            assert callable(getattr(made(), method))
