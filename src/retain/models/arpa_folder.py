"""An ARPA file turned once into a plain `transformers` folder: an n-gram model whose probabilities are the file's.

Text is cut as the file's maker cut it: at white space, or, where the tokens of the tokenizer that lies beside the file
are the file's words, as `retain export` leaves them, by that tokenizer.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retain.errors import ModelError
from retain.models.arpa import END, NEVER, UNKNOWN, as_words, read_arpa, read_words
from retain.models.cache import write_once
from retain.models.gguf import RECORD

__all__ = ["arpa_files", "from_arpa"]

log = logging.getLogger("retain")

VERSION = "1"
"""Of the conversion; see `gguf.VERSION`."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

PIECES = frozenset({"Ċ", "<0x0A>"})
"""A line break among the pieces of byte-level tokenizers; no word of text that is cut at white space."""


def arpa_files(path: Path) -> list[Path]:
    """The files that the model comes from: the ARPA file, and those of a tokenizer beside it."""
    return [path, *(file for name in TOKENIZER_FILES if (file := path.with_name(name)).is_file())]


def from_arpa(path: Path, sha256: str, cache: Path) -> Path:
    """The folder of the file's model; converted where it is not in the cache.

    Args:
        path: the ARPA file.
        sha256: of `arpa_files` joined.
        cache: where conversions are kept.

    Raises:
        ModelError: the file is damaged, or says nothing of how its texts are cut or end.
    """

    def write(folder: Path) -> None:
        from retain.models.ngram_network import GivenProbabilities, NGramConfig, NGramForCausalLM

        log.info("reading %s into %s: once", path, cache)
        words = read_words(path)
        tokenizer = _beside(path, words)
        notes = ["its probabilities are those of an ARPA file"]
        if tokenizer is None:
            _check_words(words, path)
            notes[0] += ", and text is cut into its words at white space"
            if UNKNOWN not in words:
                notes.append(f"the ARPA file has no {UNKNOWN}: a word that it does not know has log10 p = {NEVER:g}")
        model, words = read_arpa(path, unknown=tokenizer is None)
        tokenizer = tokenizer or _cut_at_spaces(words)
        config = NGramConfig(model.vocab_size, model.order, given=True, eos_token_id=tokenizer.eos_token_id)
        network, given = NGramForCausalLM(config), GivenProbabilities(model.vocab_size)
        given.take(model)
        network.words = given
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps({"sha256": sha256, "notes": notes}, indent=2), encoding="utf-8")

    return write_once(cache / "models" / f"{path.stem}-{sha256[:12]}-v{VERSION}", write)


def _beside(path: Path, words: Sequence[str]) -> Any:
    """The tokenizer that lies beside the file, if its tokens are the file's words; else None."""
    from transformers import AutoTokenizer

    if len(arpa_files(path)) == 1:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the tokenizer beside {path} cannot be read",
            problems=[f"{type(error).__name__}: {str(error).splitlines()[0]}"],
            hint="move the ARPA file to a folder of its own if it has nothing to do with that tokenizer",
        ) from error
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return tokenizer if as_words(tokens, end=tokenizer.eos_token) == words else None


def _check_words(words: Sequence[str], path: Path) -> None:
    """Refuse what no text can be cut into at white space.

    Raises:
        ModelError: the words are a tokenizer's pieces, or none ends a text.
    """
    if not PIECES.isdisjoint(words):
        raise ModelError(
            f"the words of {path} are the pieces of a tokenizer, which does not lie beside it",
            hint="put the tokenizer.json and tokenizer_config.json there that `retain export` wrote with it",
        )
    if END not in words:
        raise ModelError(
            f"{path} does not say how likely it is that a text ends", problems=[f"{END} is not among its 1-grams"]
        )


def _cut_at_spaces(words: Sequence[str]) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    cut = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    cut.pre_tokenizer = pre_tokenizers.Split(Regex(r"[ \t\r\n\f\v]+"), behavior="removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=cut, eos_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
