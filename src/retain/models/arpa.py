r"""Back-off n-gram models as ARPA files, which KenLM, SRILM and others read and write.

    \data\
    ngram 1=4099
    ngram 2=91571

    \1-grams:
    -2.2140	the	-0.3010       log10 p, the n-gram, log10 of the back-off weight (0 where there is none)

The beginning of a text is `<s>`, its end `</s>`. Words are separated by white space, so white space in a token is
written as `%20`, `%0A` and so on, and `%` as `%25`; so is the first sign of a token that would be read as one of ARPA's
own.

Source: Doug Paul's format for the ARPA community, as in `ngram-format(5)` of SRILM, http://www.speech.sri.com/projects/srilm/
"""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from retain.errors import ModelError
from retain.models.backoff import BackoffModel, Floats, Ids, Level, find_grams

__all__ = ["END", "NEVER", "UNKNOWN", "as_words", "read_arpa", "read_words", "write_arpa"]

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"

NEVER = -99.0
"""The log10 of the probability of what is never predicted (SRILM)."""

Section = list[tuple[tuple[str, ...], float, float]]
"""Of every n-gram its words, log10 p and log10 of its back-off weight."""


def write_arpa(model: BackoffModel, tokens: Sequence[str], path: Path, *, end: str) -> None:
    """Write a model.

    Args:
        model: over `len(tokens)` tokens.
        tokens: the text of every token.
        path: the file.
        end: the token that ends a text; `</s>` in the file.
    """
    words = [*as_words(tokens, end=end), BEGIN]
    sizes = [len(words) + 1, *(len(level.keys) for level in model.levels[1:])]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\\data\\\n" + "".join(f"ngram {n}={size}\n" for n, size in enumerate(sizes, start=1)))
        grams = np.arange(len(words))[:, None]
        for n, level in enumerate(model.levels, start=1):
            if n > 1:
                parents, last = np.divmod(level.keys, model.num_symbols)
                grams = np.concatenate([grams[parents], last[:, None]], axis=1)
            file.write(f"\n\\{n}-grams:\n")
            if n == 1:
                file.write(f"{NEVER:g}\t{UNKNOWN}\n")
            file.writelines(_lines(level, grams, words, last=n == model.order))
        file.write("\n\\end\\\n")


def as_words(tokens: Sequence[str], *, end: str) -> list[str]:
    """The tokens as an ARPA file spells them."""
    return [END if token == end else _escaped(token) for token in tokens]


def read_words(path: Path) -> list[str]:
    """The words that a file's model can predict: all but `<s>`, and `<unk>` only where it has a probability.

    Raises:
        ModelError: the file is not as the format wants it, with the line.
    """
    return _predicted(next(_sections(path)))


def read_arpa(path: Path, *, unknown: bool = False) -> tuple[BackoffModel, list[str]]:
    """Read a model, and the words that it can predict, spelled as in the file: those of `read_words`.

    Args:
        path: the file.
        unknown: keep `<unk>` in any case; where the file does not have it, as the last word, with `NEVER` as log10 p.

    Raises:
        ModelError: the file is not as the format wants it, with the line.
    """
    first, *longer = _sections(path)
    words = _predicted(first)
    if unknown and UNKNOWN not in words:
        words.append(UNKNOWN)
    symbols = {word: number for number, word in enumerate([*words, BEGIN])}
    if len(symbols) <= len(words):
        raise ModelError(f"{path}: {len(words) + 1 - len(symbols)} words are among the 1-grams twice")
    levels = [_words(first, symbols)]
    for n, section in enumerate(longer, start=2):
        if section:
            levels.append(_level(section, symbols, levels, path, n))
    return BackoffModel(len(words), tuple(levels)), words


def _lines(level: Level, grams: Ids, words: Sequence[str], *, last: bool) -> Iterator[str]:
    """The lines of one length's n-grams."""
    with np.errstate(divide="ignore"):
        log_probs = np.where(np.isfinite(level.log_probs), level.log_probs / math.log(10), NEVER)
    backoffs = (level.backoffs / math.log(10)).tolist()
    symbols: list[list[int]] = grams.tolist()
    for gram, log_p, backoff in zip(symbols, np.minimum(log_probs, 0).tolist(), backoffs, strict=False):
        text = " ".join(words[symbol] for symbol in gram)
        yield f"{log_p:.9g}\t{text}\n" if last else f"{log_p:.9g}\t{text}\t{backoff:.9g}\n"


def _sections(path: Path) -> Iterator[Section]:
    """The n-grams of every length, shortest first, as many as the file says that there are."""
    sizes: list[int] | None = None  # None until `\\data\\`, before which anything may stand
    section: Section = []
    length = number = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                number += 1
                line = line.strip(" \t\r\n")
                if sizes is None:
                    sizes = [] if line == "\\data\\" else None
                elif line == "\\end\\" or re.fullmatch(r"\\\d+-grams:", line):
                    if length and len(section) != sizes[length - 1]:
                        raise ValueError(
                            f"{len(section)} {length}-grams end here, and {sizes[length - 1]} are announced"
                        )
                    if line != ("\\end\\" if sizes and length == len(sizes) else f"\\{length + 1}-grams:"):
                        raise ValueError(f"{line} stands here, and 1- to {len(sizes)}-grams are announced")
                    if length:
                        yield section
                    if line == "\\end\\":
                        return
                    section, length = [], length + 1
                elif line and not length:
                    sizes.append(_announced(line, len(sizes) + 1))
                elif line:
                    section.append(_gram(line, length))
        raise ValueError("the file ends" + (", and has no `\\data\\`" if sizes is None else " before `\\end\\`"))
    except ValueError as error:
        raise ModelError(f"{path} cannot be read as an ARPA file", problems=[f"line {number}: {error}"]) from error


def _announced(line: str, length: int) -> int:
    """How many n-grams of a length there are."""
    size = re.fullmatch(rf"ngram\s+{length}\s*=\s*(\d+)", line)
    if not size:
        raise ValueError(f"expected the number of {length}-grams, as `ngram {length}=99`, got {line[:80]!r}")
    return int(size[1])


def _gram(line: str, length: int) -> tuple[tuple[str, ...], float, float]:
    """An n-gram's words, log10 p and log10 of its back-off weight."""
    parts = re.split(r"[ \t]+", line)
    if len(parts) not in (length + 1, length + 2):
        raise ValueError(f"expected {length + 1} or {length + 2} fields, got {len(parts)}")
    log_p, backoff = float(parts[0]), float(parts[length + 1]) if len(parts) == length + 2 else 0.0
    if not (log_p <= 0 and backoff < math.inf):  # nor a number that is none
        raise ValueError(f"expected the logarithms of a probability and a weight, got {log_p} and {backoff}")
    return tuple(parts[1 : length + 1]), log_p, backoff


def _predicted(section: Section) -> list[str]:
    """The words of the 1-grams that can be predicted."""
    return [word for (word,), log_p, _ in section if word != BEGIN and not (word == UNKNOWN and log_p <= NEVER)]


def _words(section: Section, symbols: dict[str, int]) -> Level:
    log_probs, backoffs = np.full(len(symbols), NEVER * math.log(10)), np.zeros(len(symbols))
    for (word,), log_p, backoff in section:
        if word in symbols:
            backoffs[symbols[word]] = backoff * math.log(10)
            log_probs[symbols[word]] = log_p * math.log(10)
    log_probs[symbols[BEGIN]] = -np.inf
    return Level(np.arange(len(symbols)), log_probs, backoffs)


def _level(section: Section, symbols: dict[str, int], levels: list[Level], path: Path, n: int) -> Level:
    try:
        grams = np.array([[symbols[word] for word in words] for words, _, _ in section], dtype=np.int64).reshape(-1, n)
    except KeyError as error:
        raise ModelError(f"{path}: the word {error} of a {n}-gram is not among the 1-grams") from error
    parents = find_grams(levels, grams[:, :-1]) if len(levels) == n - 1 else np.full(len(grams), -1)
    if len(missing := np.flatnonzero(parents < 0)):
        raise ModelError(
            f"{path}: {len(missing)} {n}-grams begin with words that are no {n - 1}-gram",
            problems=[" ".join(section[missing[0]][0])],
        )
    if (grams[:, -1] == symbols[BEGIN]).any():
        raise ModelError(f"{path}: {n}-grams end with {BEGIN}, which no word comes before")
    keys = parents * len(symbols) + grams[:, -1]
    order = np.argsort(keys)
    if len(twice := np.flatnonzero(np.diff(keys[order]) == 0)):
        raise ModelError(
            f"{path}: {len(twice)} {n}-grams are there twice", problems=[" ".join(section[order[twice[0]]][0])]
        )
    values: Floats = np.array([(log_p, backoff) for _, log_p, backoff in section]).reshape(-1, 2)[order]
    return Level(keys[order], values[:, 0] * math.log(10), values[:, 1] * math.log(10))


def _escaped(token: str) -> str:
    """The token as one word that is none of ARPA's own."""
    word = re.sub(r"[%\x00-\x20]", lambda sign: f"%{ord(sign[0]):02X}", token)
    return f"%{ord(word[0]):02X}{word[1:]}" if word in (BEGIN, END, UNKNOWN) else word
