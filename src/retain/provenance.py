"""Where a stage came from: versions, data, seed, machine, time."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from retain import distributed
from retain.types import Example, StepInfo

__all__ = ["data_hash", "provenance"]

PACKAGES = ("retain", "torch", "transformers", "peft", "datasets", "tokenizers")


def data_hash(examples: Sequence[Example]) -> str:
    """The same for the same rows in the same order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.id}\n".encode())
    return digest.hexdigest()[:16]


def provenance(
    *, method: str, strategy: str, seed: int, precision: str, examples: Sequence[Example] = (),
    history: Sequence[StepInfo] = (), seconds: float = 0.0, notes: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """What `stage.json` says of a stage besides its files.

    Args:
        method, strategy: how each is called.
        seed, precision: the run's.
        examples: the rows that were trained on.
        history: the steps.
        seconds: of the whole stage: training, consolidation and scoring.
        notes: what a reader should know, as sentences.
        settings: by dotted key, `{value, source}`.
        more: anything else that JSON can hold.
    """
    training = sum(info.seconds for info in history)
    tokens = sum(info.num_tokens for info in history)
    return {
        "method": method,
        "strategy": strategy,
        "seed": seed,
        "precision": precision,
        "device": str(distributed.device()),
        "processes": distributed.world_size(),
        "machine": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "rows": len(examples),
        "data_hash": data_hash(examples) if examples else "",
        "steps": len(history),
        "tokens": tokens,
        "targets": sum(info.num_targets for info in history),
        "training_seconds": round(training, 3),
        "tokens_per_second": round(tokens / training, 1) if training else 0.0,
        "seconds": round(seconds, 3),
        "notes": list(notes),
        "settings": dict(settings or {}),
        **more,
    }
