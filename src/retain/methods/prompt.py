"""Prompt tuning: a few trained embeddings before the text, and nothing else.

    logits(x) = model([p_1 ... p_n ; embedding(x)])                 p is trained

Extended, a new prompt goes before those that are active, which no longer move: [P_k ; ... ; P_1 ; embedding(x)].

Source: Lester et al. 2021, https://arxiv.org/abs/2104.08691, section 2, as PEFT computes it; several: Razdaibiedina et
al. 2023, https://arxiv.org/abs/2301.12314, section 3.
Differs: no residual MLP before the prompts.
"""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import PromptTuningConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retain.errors import CompatibilityError, LineageError
from retain.methods.soft_prompt import WEIGHTS, SoftPrompt, load_heads, peft_sizes, save_prompt
from retain.models.encoder_classes import pooled_token
from retain.models.new_heads import let_heads_train
from retain.models.virtual_tokens import VirtualTokens, attach, attached, input_embeddings
from retain.parameters import freeze

__all__ = ["Prompt"]

FIRST = "default"
"""The name of the prompt that `apply` makes."""
SEQUENCE = "prompts"
"""Several prompts apart: `prompts.json` has their order, `prompts.safetensors` each of them."""


@dataclass(frozen=True)
class Prompt(SoftPrompt):
    """Train `num_tokens` virtual tokens before the text of a frozen model; of an encoder, also its new heads.

    Args:
        num_tokens: virtual tokens of a prompt, above 0.
        init: their first values: embeddings of tokens drawn from the `vocabulary`, or `random` ones of the same spread.
            A classifier reads a row's first token, which is then a virtual one; drawn from the vocabulary, it is [CLS].
    """

    name: ClassVar[str] = "prompt"
    can_extend: ClassVar[bool] = True

    num_tokens: int = 20
    init: Literal["vocabulary", "random"] = "vocabulary"

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens: expected a whole number above 0, got {self.num_tokens}")

    def apply(self, model: nn.Module) -> nn.Module:
        """The model, frozen, with one prompt in float32."""
        make_place(model)
        return let_heads_train(self.extend(model, FIRST))

    def save(self, model: nn.Module, folder: Path) -> None:
        """PEFT's own layout, which other tools load: all prompts as one; several are also kept apart."""
        place = prompts(model)
        values = {name: value.detach().cpu() for name, value in place.columns.items()}
        whole = torch.cat(list(reversed(values.values())))
        sizes: dict[str, Any] = peft_sizes(model) | {"token_dim": whole.shape[1]}
        save_prompt(model, PromptTuningConfig(num_virtual_tokens=len(whole), **sizes), whole, folder)
        if len(values) > 1:
            save_file(values, folder / f"{SEQUENCE}.safetensors", {"format": "pt"})
            (folder / f"{SEQUENCE}.json").write_text(json.dumps(list(values)), encoding="utf-8")

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The base model with the saved prompts, all trainable and active.

        Raises:
            LineageError: if they were made for a model of another width, or with other heads.
        """
        if (folder / f"{SEQUENCE}.json").exists():
            names: list[str] = json.loads((folder / f"{SEQUENCE}.json").read_text("utf-8"))
            saved = load_file(folder / f"{SEQUENCE}.safetensors")
        else:
            names, saved = [FIRST], {FIRST: load_file(folder / WEIGHTS)["prompt_embeddings"]}
        embeddings = input_embeddings(freeze(model))
        width = embeddings.weight.shape[1]
        if wrong := [name for name in names if saved[name].shape[1] != width]:
            raise LineageError(
                f"the prompts in {folder} are not of this model",
                problems=[f"{name}: {saved[name].shape[1]} wide, and the model's embeddings {width}" for name in wrong],
                hint="use the base model that they were made with",
            )
        place = make_place(model)
        for name in names:
            place.add(name, saved[name].to(embeddings.weight.device).clone())  # aligned, so that sums round as ever
        return load_heads(model, folder)

    @contextmanager
    def detached(self, model: nn.Module) -> Generator[nn.Module]:
        """The base model: no prompt is read."""
        active = prompts(model).active
        self.activate(model, ())
        try:
            yield model
        finally:
            self.activate(model, active)

    def place(self, model: nn.Module) -> "Prompts":
        """The prompts of a model.

        Raises:
            CompatibilityError: if it has none.
        """
        return prompts(model)

    def modules(self, model: nn.Module) -> list[str]:
        """The names of the prompts, oldest first."""
        return list(prompts(model).columns)

    def extend(self, model: nn.Module, name: str) -> nn.Module:
        """Put a prompt before those that are active; only it is trained."""
        freeze(model)
        table = input_embeddings(model).weight.detach()  # (vocabulary, width)
        if self.init == "vocabulary":
            drawn = torch.randint(len(table), (self.num_tokens,))
            if (begin := pooled_token(model)) is not None:
                drawn[0] = begin
            values = table[drawn.to(table.device)]
        else:
            values = torch.randn(self.num_tokens, table.shape[1]).to(table) * table.std()
        prompts(model).add(name, values.to(torch.promote_types(table.dtype, torch.float32)))
        return model

    def activate(self, model: nn.Module, names: Sequence[str]) -> nn.Module:
        """Read these prompts, the last one first; none: the base's own behaviour."""
        if names or attached(model) is not None:
            prompts(model).active = tuple(names)
        return model


class Prompts(VirtualTokens):
    """The soft prompts of a model, by name."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__(embed)
        self.columns: Any = nn.ParameterDict()
        self.active: tuple[str, ...] = ()

    def add(self, name: str, values: Tensor) -> None:
        """Put a trainable prompt, (tokens, width), before the active ones."""
        self.columns[name] = nn.Parameter(values)
        self.active = (*self.active, name)

    def values(self) -> Tensor | None:
        """The active prompts, the last one first."""
        return torch.cat([self.columns[name] for name in reversed(self.active)]) if self.active else None


def make_place(model: nn.Module) -> Prompts:
    """Let the model read prompts, of which there are none yet."""
    place = Prompts(input_embeddings(model))
    attach(model, place)
    return place


def prompts(model: nn.Module) -> Prompts:
    """The prompts of a model.

    Raises:
        CompatibilityError: if it has none.
    """
    place = attached(model)
    if not isinstance(place, Prompts):
        raise CompatibilityError(f"{type(model).__name__} has no prompt", hint="apply the method first")
    return place
