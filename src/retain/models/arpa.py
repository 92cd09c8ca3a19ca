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

__all__ = ["read_arpa", "write_arpa"]

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"

NEVER = -99.0
"""The log10 of the probability of what is never predicted (SRILM)."""


def write_arpa(model: BackoffModel, tokens: Sequence[str], path: Path, *, end: str) -> None:
    """Write a model.

    Args:
        model: over `len(tokens)` tokens.
        tokens: the text of every token.
        path: the file.
        end: the token that ends a text; `</s>` in the file.
    """
    words = [END if token == end else _escaped(token) for token in tokens]
    words += [BEGIN]
    sizes = [len(words) + (UNKNOWN not in words), *(len(level.keys) for level in model.levels[1:])]
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


def read_arpa(path: Path) -> tuple[BackoffModel, list[str]]:
    """Read a model, and the text of its tokens: all words but `<s>`, and `<unk>` only where it has a probability.

    Raises:
        ModelError: the file is not as the format wants it, with the line.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        sections = list(_sections(file, path))
    if not sections:
        raise ModelError(f"{path} is no ARPA file", problems=["it has no n-grams"], hint="it begins with `\\data\\`")
    tokens = [word for (word,), log_p, _ in sections[0] if word != BEGIN and not (word == UNKNOWN and log_p <= NEVER)]
    symbols = {word: number for number, word in enumerate([*tokens, BEGIN])}
    levels = [_words(sections[0], symbols)]
    for n, section in enumerate(sections[1:], start=2):
        levels.append(_level(section, symbols, levels, path, n))
    return BackoffModel(len(tokens), tuple(levels)), [word if word == END else _read(word) for word in tokens]


Section = list[tuple[tuple[str, ...], float, float]]
"""Of every n-gram its words, log10 p and log10 of its back-off weight."""


def _lines(level: Level, grams: Ids, words: Sequence[str], *, last: bool) -> Iterator[str]:
    """The lines of one length's n-grams."""
    with np.errstate(divide="ignore"):
        log_probs = np.where(np.isfinite(level.log_probs), level.log_probs / math.log(10), NEVER).tolist()
    backoffs = (level.backoffs / math.log(10)).tolist()
    symbols: list[list[int]] = grams.tolist()
    for gram, log_p, backoff in zip(symbols, log_probs, backoffs, strict=False):
        text = " ".join(words[symbol] for symbol in gram)
        yield f"{log_p:.9g}\t{text}\n" if last else f"{log_p:.9g}\t{text}\t{backoff:.9g}\n"


def _sections(lines: Iterator[str], path: Path) -> Iterator[Section]:
    """The n-grams of every length, shortest first."""
    section: Section | None = None
    length = 0
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r\n")
        if heading := re.fullmatch(r"\\(\d+)-grams:\s*", line):
            if section is not None:
                yield section
            section, length = [], int(heading[1])
        elif line.startswith("\\end\\"):
            break
        elif section is not None and line.strip(" \t"):
            parts = re.split(r"[ \t]+", line.strip(" \t"))
            try:
                if len(parts) not in (length + 1, length + 2):
                    raise ValueError(f"expected {length + 1} or {length + 2} fields, got {len(parts)}")
                backoff = float(parts[length + 1]) if len(parts) == length + 2 else 0.0
                section.append((tuple(parts[1 : length + 1]), float(parts[0]), backoff))
            except ValueError as error:
                raise ModelError(f"{path}, line {number}: not an n-gram", problems=[str(error)]) from error
    if section is not None:
        yield section


def _words(section: Section, symbols: dict[str, int]) -> Level:
    log_probs, backoffs = np.full(len(symbols), -np.inf), np.zeros(len(symbols))
    for (word,), log_p, backoff in section:
        if word in symbols:
            backoffs[symbols[word]] = backoff * math.log(10)
            if word != BEGIN:
                log_probs[symbols[word]] = log_p * math.log(10)
    return Level(np.arange(len(symbols)), log_probs, backoffs)


def _level(section: Section, symbols: dict[str, int], levels: list[Level], path: Path, n: int) -> Level:
    try:
        grams = np.array([[symbols[word] for word in words] for words, _, _ in section], dtype=np.int64).reshape(-1, n)
    except KeyError as error:
        raise ModelError(f"{path}: the word {error} of a {n}-gram is not among the 1-grams") from error
    parents = find_grams(levels, grams[:, :-1])
    if len(missing := np.flatnonzero(parents < 0)):
        raise ModelError(
            f"{path}: {len(missing)} {n}-grams begin with words that are no {n - 1}-gram",
            problems=[" ".join(section[missing[0]][0])],
        )
    keys = parents * len(symbols) + grams[:, -1]
    order = np.argsort(keys)
    values: Floats = np.array([(log_p, backoff) for _, log_p, backoff in section]).reshape(-1, 2)[order]
    return Level(keys[order], values[:, 0] * math.log(10), values[:, 1] * math.log(10))


def _escaped(token: str) -> str:
    """The token as one word that is none of ARPA's own."""
    word = re.sub(r"[%\x00-\x20]", lambda sign: f"%{ord(sign[0]):02X}", token)
    return f"%{ord(word[0]):02X}{word[1:]}" if word in (BEGIN, END, UNKNOWN) else word


def _read(word: str) -> str:
    """The token that `_escaped` was given."""
    return re.sub(r"%([0-9A-F]{2})", lambda code: chr(int(code[1], 16)), word)
