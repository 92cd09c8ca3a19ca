from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from retain.data.rendering import Renderer
from retain.errors import CompatibilityError
from retain.models import FAMILIES
from retain.models.family import Family, Outputs
from retain.types import Example, Message


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
        assert isinstance(made(), Family), "a class that lacks an abstract method cannot be made"


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_a_family_cannot_is_refused_in_its_name(name: str, tokenizer: Any) -> None:
    made: Callable[..., Any] = FAMILIES[name]
    family: Family = made()
    if not family.isolates_documents:
        with pytest.raises(CompatibilityError, match=f"the {name} family cannot read packed documents apart"):
            family.collate([], tokenizer, packed=True)
    if family.needs_gradients:
        with pytest.raises(CompatibilityError, match=f"the {name} family cannot be fitted by counting"):
            family.fit(nn.Identity(), [], Renderer(tokenizer))


class Scripted(FAMILIES["decoder"]):  # type: ignore[misc]
    """Says of a continuation that it costs a nat a token, and writes how many tokens it was given."""

    def loglikelihood(self, model, tokenizer, pairs) -> list[float]:
        return [-float(len(rest)) for _, rest in pairs]

    def generate(self, model, tokenizer, prompts, **options: Any) -> list[str]:
        return [f"{len(ids)} {options['max_new_tokens']}" for ids in prompts]


def test_labels_are_chosen_and_answers_written_after_the_rendered_prompt(tokenizer: Any) -> None:
    renderer, family = Renderer(tokenizer), Scripted()
    prompts = [(Message("user", "colour?"),), (Message("user", "what animal is it?"),)]
    labels = [["red", "a very long label"], ["fox"]]
    values = family.choose(nn.Identity(), renderer, list(zip(prompts, labels, strict=True)))
    for prompt, names, row in zip(prompts, labels, values, strict=True):
        whole = [Example("x", (*prompt, Message("assistant", name))) for name in names]
        lengths = [len(renderer.encode(example)[0]) - len(renderer.prompt_ids(prompt)) for example in whole]
        assert row == [-float(length) for length in lengths], "the stop token is counted"
    assert family.answer(nn.Identity(), renderer, prompts, max_new_tokens=5) == [
        f"{len(renderer.prompt_ids(prompt))} 5" for prompt in prompts
    ]
