"""P-tuning: virtual tokens before the text that a small trained network makes, and nothing else.

    p_i = MLP(BiLSTM(e_1 ... e_n)_i),   or MLP(e_i)            e (n, width) and the network are trained
    logits(x) = model([p_1 ... p_n ; embedding(x)])

Source: Liu et al. 2021, https://arxiv.org/abs/2103.10385, eq. 5-6. The network is PEFT's.
Differs: all virtual tokens are before the text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import PromptEncoder, PromptEncoderConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retain.errors import CompatibilityError, LineageError
from retain.methods.soft_prompt import SoftPrompt, load_heads, peft_sizes, save_prompt
from retain.models.new_heads import let_heads_train
from retain.models.virtual_tokens import VirtualTokens, attach, attached, input_embeddings
from retain.parameters import freeze

__all__ = ["Ptuning"]

ENCODER = "prompt_encoder.safetensors"
"""The network, by which the prompt can be trained further; PEFT keeps only what it makes."""


@dataclass(frozen=True)
class Ptuning(SoftPrompt):
    """Train a network that makes `num_tokens` virtual tokens before the text of a frozen model.

    An encoder's new heads are trained with it; a classifier of rows reads the state of the first virtual token.

    Args:
        num_tokens: virtual tokens, above 0.
        encoder: the network: `mlp` or `lstm` (bidirectional, before an MLP).
        hidden_size: its inner width, above 0.
    """

    name: ClassVar[str] = "p_tuning"

    num_tokens: int = 20
    encoder: Literal["lstm", "mlp"] = "mlp"
    hidden_size: int = 128

    def __post_init__(self) -> None:
        for name, value in (("num_tokens", self.num_tokens), ("hidden_size", self.hidden_size)):
            if value < 1:
                raise ValueError(f"{name}: expected a whole number above 0, got {value}")

    def apply(self, model: nn.Module) -> nn.Module:
        """The model, frozen, with the network in float32."""
        table = input_embeddings(freeze(model)).weight
        network = PromptEncoder(self._config(model, inference=False))
        place = MadeTokens(input_embeddings(model), network, self.num_tokens)
        attach(model, place.to(table.device, torch.promote_types(table.dtype, torch.float32)))
        return let_heads_train(model)

    def save(self, model: nn.Module, folder: Path) -> None:
        """PEFT's own layout, which other tools load, and beside it the network."""
        place = self.place(model)
        save_prompt(model, self._config(model, inference=True), place.made(), folder)
        save_file({k: v.cpu() for k, v in place.network.state_dict().items()}, folder / ENCODER, {"format": "pt"})

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The base model with the saved network, trainable.

        Raises:
            LineageError: if it was made for a model of another width, or by other settings.
        """
        with torch.random.fork_rng():
            self.apply(model)
        saved, own = load_file(folder / ENCODER), self.place(model).network.state_dict()
        if wrong := [k for k in {*saved, *own} if k not in saved or k not in own or saved[k].shape != own[k].shape]:
            raise LineageError(
                f"the prompt in {folder} is not of this model and method",
                problems=[f"{name} does not fit" for name in sorted(wrong)[:5]],
                hint="use the base model and the settings that it was made with",
            )
        self.place(model).network.load_state_dict(saved)
        return load_heads(model, folder)

    def place(self, model: nn.Module) -> "MadeTokens":
        """The model's prompt and the network that makes it.

        Raises:
            CompatibilityError: if it has none.
        """
        place = attached(model)
        if not isinstance(place, MadeTokens):
            raise CompatibilityError(f"{type(model).__name__} has no prompt", hint="apply the method first")
        return place

    def _config(self, model: nn.Module, *, inference: bool) -> PromptEncoderConfig:
        sizes: dict[str, Any] = peft_sizes(model) | {"token_dim": input_embeddings(model).weight.shape[1]}
        sizes["inference_mode"] = inference
        return PromptEncoderConfig(
            num_virtual_tokens=self.num_tokens, encoder_hidden_size=self.hidden_size,
            encoder_reparameterization_type=self.encoder.upper(), **sizes,
        )  # fmt: skip


class MadeTokens(VirtualTokens):
    """Virtual tokens as a network makes them.

    Args:
        embed: the model's embedding of tokens.
        network: from their numbers to their embeddings.
        tokens: how many.
    """

    def __init__(self, embed: nn.Module, network: nn.Module, tokens: int) -> None:
        super().__init__(embed)
        self.network = network
        self.tokens = tokens
        self.active = True

    def made(self) -> Tensor:
        """(tokens, width)."""
        device = next(self.network.parameters()).device
        return self.network(torch.arange(self.tokens, device=device)[None])[0]

    def values(self) -> Tensor | None:
        """What the network makes, while the prompt is on."""
        return self.made() if self.active else None
