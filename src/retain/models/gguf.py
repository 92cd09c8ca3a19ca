"""A GGUF file turned once into a plain `transformers` folder that can be tuned.

Weights stored in blocks of a few bits can neither be trained nor saved by `transformers`. They are unpacked to bf16,
whose rounding (1 part in 512) is far below that of a 4-bit block.
"""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retain.errors import ModelError
from retain.models.cache import write_once

__all__ = ["RECORD", "conversion_notes", "converted", "is_converted"]

log = logging.getLogger("retain")

VERSION = "1"
"""Of the conversion. Another one gets a folder of its own, so that an old lineage keeps its base."""

RECORD = "retain.json"
"""Beside a converted model: the file's hash, and the notes on it."""

DIGIT_SPLITTERS = frozenset({"codeshell", "command-r", "exaone", "refact", "smollm", "starcoder"})
"""Vocabularies (`tokenizer.ggml.pre`) whose merges were learned on text that is cut around every digit."""


def converted(label: str, files: Sequence[Path], sha256: str, cache: Path) -> Path:
    """The folder of the model that the files, joined, hold; converted where it is not in the cache.

    Args:
        label: a name for people to find the folder by.
        files: one GGUF file, or its parts in order.
        sha256: of the files joined.
        cache: where conversions are kept.

    Raises:
        ModelError: `transformers` cannot read this architecture or this kind of block.
    """

    def write(folder: Path) -> None:
        log.info("converting %s to bf16 safetensors in %s: once, under a minute", label, cache)
        path = files[0]
        if len(files) > 1:
            path = folder / "joined.gguf"
            with path.open("wb") as whole:
                for file in files:
                    with file.open("rb") as part:
                        shutil.copyfileobj(part, whole)
        _convert(path, folder)
        record = {"sha256": sha256, "notes": [_describe(path)]}
        (folder / "joined.gguf").unlink(missing_ok=True)
        (folder / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")

    return write_once(_folder(label, sha256, cache), write)


def is_converted(label: str, sha256: str, cache: Path) -> bool:
    """Is the model in the cache, so that its files are no longer needed?"""
    return _folder(label, sha256, cache).is_dir()


def conversion_notes(folder: Path) -> tuple[str, ...]:
    """What a reader of a converted model's scores must know."""
    return tuple(json.loads((folder / RECORD).read_text(encoding="utf-8"))["notes"])


def _folder(label: str, sha256: str, cache: Path) -> Path:
    return cache / "models" / f"{label}-{sha256[:12]}-v{VERSION}"


def _convert(path: Path, folder: Path) -> None:
    """Write config, bf16 safetensors, generation config, tokenizer and chat template."""
    from transformers import AutoConfig, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        config = AutoConfig.from_pretrained(**source)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = _dequantised(source, config)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"{path.name} cannot be read as a language model",
            problems=[f"{type(error).__name__}: {str(error).splitlines()[0]}"],
            hint="name a folder or a hub id that has the same model as safetensors",
        ) from error
    _repair(tokenizer, _metadata(path), config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _dequantised(source: dict[str, str], config: Any) -> Any:
    """The model in bf16, without the mark of quantisation, with which it would refuse to be saved."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        **source, config=config, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model


def _repair(tokenizer: Any, metadata: dict[str, Any], config: Any) -> None:
    """Set what the file says and `transformers` leaves unread."""
    from tokenizers import pre_tokenizers

    if metadata.get("tokenizer.ggml.pre") in DIGIT_SPLITTERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = config.max_position_embeddings


def _describe(path: Path) -> str:
    """How many bits the weights had: `dequantised from 4 bits (Q4_1 GGUF)`."""
    from gguf import LlamaFileType

    names = {kind.value: re.sub("^(MOSTLY|ALL)_", "", kind.name) for kind in LlamaFileType}
    name = names.get(_metadata(path).get("general.file_type", -1), "unnamed kind of")
    bits = re.match(r"I?T?Q(\d)", name)
    return f"dequantised from {bits[1]} bits ({name} GGUF)" if bits else f"converted from {name} GGUF"


def _metadata(path: Path) -> dict[str, Any]:
    """The file's keys; of an array of strings, its length."""
    from transformers.integrations.gguf.reader import read_gguf_metadata

    return read_gguf_metadata(str(path))[0]
