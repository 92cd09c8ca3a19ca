"""From what a recipe says of a model to its family, its identity and, when it is time, its weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from retain.errors import CompatibilityError, ModelError
from retain.models import FAMILIES
from retain.models.decoder import DecoderFamily
from retain.models.encoder import EncoderFamily, is_encoder
from retain.models.family import Family, Tokenizer
from retain.models.hub import fingerprint, resolve
from retain.models.ngram import NGramFamily
from retain.models.ngram_network import NGramConfig
from retain.models.recurrent import RecurrentFamily
from retain.models.recurrent_network import RecurrentConfig
from retain.models.seq2seq import SEQ2SEQ_MODELS, Seq2SeqFamily
from retain.types import Example

__all__ = ["Source", "open_source"]


@dataclass(frozen=True)
class Source:
    """A model that can be loaded.

    Args:
        family: what network it is.
        name: as the recipe names it.
        folder: where its weights are; None where it starts from nothing, on the first data that it is given.
        revision: the hub's commit or the conversion's checksum.
        notes: what a reader of its scores must know.
        notice: what its licence asks to be shown beside it and what is tuned from it.
        trust_remote_code: may its own Python code be run?
        learns: False where an ARPA file gives its probabilities, on top of which nothing can be counted.
    """

    family: Family
    name: str
    folder: Path | None
    revision: str = ""
    notes: tuple[str, ...] = ()
    notice: str = ""
    trust_remote_code: bool = False
    learns: bool = True

    def check_learns(self) -> None:
        """Refuse to train a model that only answers.

        Raises:
            CompatibilityError: the model does not learn.
        """
        if not self.learns:
            raise CompatibilityError(
                f"model {self.name!r} cannot learn a task",
                problems=["it has an ARPA file's probabilities, and an n-gram model learns by adding to its counts"],
                hint="`retain evaluate` and `retain chat` take it as it is; to learn, start from the rows that it was "
                "made of: `model: {family: ngram}`, those rows as the first task",
            )

    @property
    def hash(self) -> str:
        """Of config and weights; empty where there are none yet."""
        return fingerprint(self.folder) if self.folder else ""

    def load(self, examples: Sequence[Example], *, seed: int) -> tuple[nn.Module, Tokenizer]:
        """The model in float32 and its tokenizer.

        Args:
            examples: rows to make a tokenizer from, where the model starts from nothing.
            seed: of its first weights then.
        """
        if self.folder is not None:
            options: dict[str, Any] = {"trust_remote_code": True} if self.trust_remote_code else {}
            return self.family.load(self.folder, **options)
        return self.family.create(examples, seed=seed)


def open_source(
    name: str, family: Family | None = None, *, folder: Path | None = None, trust_remote_code: bool = False
) -> Source:
    """Find a model without loading it.

    Args:
        name: as `models.hub.resolve` takes it; empty where the family starts from nothing.
        family: what network it is; None finds out.
        folder: where a model that started from nothing was kept.

    Raises:
        ModelError: if it is not found, or its network is none that is known.
    """
    if not name:
        if family is None or not family.starts_as:
            raise ModelError(
                "model: neither a name is given nor what starts from nothing",
                hint="`model: smollm2-135m`, or `model: {family: recurrent, cell: lstm}`, or "
                "`model: {family: decoder, architecture: llama}`, or `model: {family: seq2seq, architecture: t5}`, "
                "or `model: {family: encoder, architecture: bert}`, or `model: {family: ngram}`",
            )
        return Source(family, family.starts_as, folder)
    resolved = resolve(name, trust_remote_code=trust_remote_code)
    config = json.loads((resolved.folder / "config.json").read_text(encoding="utf-8"))
    found = type(family) if family else family_of(config)
    if found is None:
        architectures = ", ".join(config.get("architectures") or ["not said"])
        raise ModelError(
            f"model {name!r} is no language model of a known family: its architecture is {architectures}",
            problems=[f"families: {', '.join(FAMILIES)}"],
            hint="name the family in the recipe if you know better: `model: {name: ..., family: decoder}`",
        )
    return Source(
        family or found(), name, resolved.folder, resolved.revision, resolved.notes, resolved.notice, trust_remote_code,
        learns=not config.get("given", False),
    )  # fmt: skip


def family_of(config: Mapping[str, Any]) -> type[Family] | None:
    """The family of a model by its `config.json`; None where none is known."""
    architectures: list[str] = config.get("architectures") or []
    if config.get("model_type") == RecurrentConfig.model_type:
        return RecurrentFamily
    if config.get("model_type") == NGramConfig.model_type:
        return NGramFamily
    if SEQ2SEQ_MODELS.intersection(architectures):
        return Seq2SeqFamily
    if is_encoder(config):
        return EncoderFamily
    return DecoderFamily if any("CausalLM" in name or "LMHead" in name for name in architectures) else None
