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
from typing import Any, ClassVar, Literal, cast

import torch
from peft import PromptTuningConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retain.errors import CompatibilityError, LineageError
from retain.kernels.low_rank import LowRank
from retain.models.family import Family, pretrained
from retain.parameters import freeze

__all__ = ["Prompt"]

FIRST = "default"
"""The name of the prompt that `apply` makes."""
SEQUENCE = "prompts"
"""Several prompts apart: `prompts.json` has their order, `prompts.safetensors` each of them."""


@dataclass(frozen=True)
class Prompt:
    """Train `num_tokens` virtual tokens before the text of a frozen decoder.

    Packed documents would share one prompt at the row's beginning, so rows are padded.

    Args:
        num_tokens: virtual tokens of a prompt, above 0.
        init: their first values: embeddings of tokens drawn from the `vocabulary`, or `random` ones of the same spread.
    """

    name: ClassVar[str] = "prompt"
    packs: ClassVar[bool] = False
    can_detach: ClassVar[bool] = True
    can_extend: ClassVar[bool] = True

    num_tokens: int = 20
    init: Literal["vocabulary", "random"] = "vocabulary"

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens: expected a whole number above 0, got {self.num_tokens}")

    def supports(self, family: Family) -> str | None:
        """Decoders: elsewhere virtual tokens are no part of what is read."""
        return None if family.name == "decoder" else f"virtual tokens are read by decoders, not by {family.name!r}"

    def apply(self, model: nn.Module) -> nn.Module:
        """The model, frozen, with one prompt in float32."""
        make_place(model)
        return self.extend(model, FIRST)

    def save(self, model: nn.Module, folder: Path) -> None:
        """PEFT's own layout, which other tools load: all prompts as one; several are also kept apart."""
        place = prompts(model)
        values = {name: value.detach().cpu() for name, value in place.columns.items()}
        whole = torch.cat(list(reversed(values.values())))
        settings = pretrained(model).config.get_text_config()
        folder.mkdir(parents=True, exist_ok=True)
        PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=len(whole), token_dim=whole.shape[1],
            num_transformer_submodules=1, num_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads, inference_mode=True,
            base_model_name_or_path=settings.name_or_path or None,
        ).save_pretrained(str(folder))  # fmt: skip
        save_file({"prompt_embeddings": whole.contiguous()}, folder / "adapter_model.safetensors", {"format": "pt"})
        if len(values) > 1:
            save_file(values, folder / f"{SEQUENCE}.safetensors", {"format": "pt"})
            (folder / f"{SEQUENCE}.json").write_text(json.dumps(list(values)), encoding="utf-8")

    def load(self, model: nn.Module, folder: Path) -> nn.Module:
        """The base model with the saved prompts, all trainable and active.

        Raises:
            LineageError: if they were made for a model of another width.
        """
        if (folder / f"{SEQUENCE}.json").exists():
            names: list[str] = json.loads((folder / f"{SEQUENCE}.json").read_text("utf-8"))
            saved = load_file(folder / f"{SEQUENCE}.safetensors")
        else:
            names, saved = [FIRST], {FIRST: load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]}
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
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        """Refused: a prompt is no weight.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError(
            "a soft prompt cannot be merged: it is no change of a weight",
            hint="export it as it is, or use `method: lora`",
        )

    @contextmanager
    def detached(self, model: nn.Module) -> Generator[nn.Module]:
        """The base model: no prompt is read."""
        active = prompts(model).active
        self.activate(model, ())
        try:
            yield model
        finally:
            self.activate(model, active)

    def modules(self, model: nn.Module) -> list[str]:
        """The names of the prompts, oldest first."""
        return list(prompts(model).columns)

    def extend(self, model: nn.Module, name: str) -> nn.Module:
        """Put a prompt before those that are active; only it is trained."""
        freeze(model)
        table = input_embeddings(model).weight.detach()  # (vocabulary, width)
        if self.init == "vocabulary":
            values = table[torch.randint(len(table), (self.num_tokens,)).to(table.device)]
        else:
            values = torch.randn(self.num_tokens, table.shape[1]).to(table) * table.std()
        prompts(model).add(name, values.to(torch.promote_types(table.dtype, torch.float32)))
        return model

    def activate(self, model: nn.Module, names: Sequence[str]) -> nn.Module:
        """Read these prompts, the last one first; none: the base's own behaviour."""
        if names or SEQUENCE in dict(model.named_children()):
            prompts(model).active = tuple(names)
        return model

    def weight_changes(self, model: nn.Module) -> dict[str, Tensor]:
        """Refused: a prompt is no weight.

        Raises:
            CompatibilityError: always.
        """
        raise CompatibilityError("a soft prompt changes no weight", hint="use `method: lora`")

    def low_rank(self, model: nn.Module) -> Sequence[LowRank]:
        """None: a prompt is no product."""
        return ()


class Prompts(nn.Module):
    """The soft prompts of a model, and how they come before its input."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.columns: Any = nn.ParameterDict()
        self.active: tuple[str, ...] = ()
        self.embed = (embed,)  # in a tuple: it is the model's own

    def add(self, name: str, values: Tensor) -> None:
        """Put a trainable prompt, (tokens, width), before the active ones."""
        self.columns[name] = nn.Parameter(values)
        self.active = (*self.active, name)

    def prepend(self, _: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """As a forward pre-hook of the model: its input with the active prompts before it, at positions from 0.

        The model's outputs are longer by the prompts. Once they lie in the cache, only masks and positions change.
        """
        if not self.active:
            return arguments, inputs
        prompt = torch.cat([self.columns[name] for name in reversed(self.active)])  # (n, width)
        num, cache = len(prompt), inputs.get("past_key_values")
        first = cache is None or cache.get_seq_length() == 0
        changed = dict(inputs)
        if (mask := inputs.get("attention_mask")) is not None:
            changed["attention_mask"] = seen(mask, num, first=first)
        for name in ("position_ids", "cache_position"):
            if (positions := inputs.get(name)) is not None:
                own = torch.arange(num, device=positions.device).expand(*positions.shape[:-1], num)
                changed[name] = torch.cat([own, positions + num], dim=-1) if first else positions + num
        if first:
            text = inputs.get("inputs_embeds")
            if text is None:
                text = self.embed[0](changed.pop("input_ids"))  # (rows, time, width)
            before = prompt.to(text.dtype).expand(len(text), -1, -1)
            changed["inputs_embeds"] = torch.cat([before, text], dim=1)
        return arguments, changed


def seen(mask: Tensor, num: int, *, first: bool) -> Tensor:
    """A mask with prompts before the text, which everything after them sees.

    Args:
        mask: (rows, time), or (rows, 1, query, key), bool.
        num: virtual tokens.
        first: are they among the queries?
    """
    if mask.dim() == 2:
        return torch.cat([mask.new_ones(len(mask), num), mask], dim=1)
    wider = torch.cat([mask.new_ones(*mask.shape[:3], num), mask], dim=3)
    own = mask.new_ones(num, wider.shape[3]).tril().expand(len(mask), mask.shape[1], -1, -1)
    return torch.cat([own, wider], dim=2) if first else wider


def input_embeddings(model: nn.Module) -> nn.Embedding:
    """The model's embedding of tokens."""
    return cast("nn.Embedding", pretrained(model).get_input_embeddings())


def make_place(model: nn.Module) -> Prompts:
    """Let the model read prompts, of which there are none yet."""
    place = Prompts(input_embeddings(model))
    model.add_module(SEQUENCE, place)
    model.register_forward_pre_hook(place.prepend, with_kwargs=True)
    return place


def prompts(model: nn.Module) -> Prompts:
    """The prompts of a model.

    Raises:
        CompatibilityError: if it has none.
    """
    place = dict(model.named_children()).get(SEQUENCE)
    if not isinstance(place, Prompts):
        raise CompatibilityError(f"{type(model).__name__} has no prompt", hint="apply the method first")
    return place
