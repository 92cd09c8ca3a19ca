"""How good labels are: macro F1 of classes, F1 of sets of labels, and tags of words, alone and as spans.

F1 = 2 * right / (given + wanted), and 1 where both are empty.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from retain.data.labels import read_labels
from retain.evaluation.statistics import Interval

__all__ = ["corpus_tag_f1", "label_f1", "labels_flaw", "macro_f1", "spans", "tag_accuracy", "tag_f1"]

RESAMPLES = 1000

Span = tuple[str, int, int]
"""A class, and the words from its first to before its last."""


def label_f1(answer: str, references: Sequence[str]) -> float:
    """The F1 of a set of labels against the right one, the best over references; 0 for what is no list."""
    try:
        given = set(read_labels(answer))
    except ValueError:
        return 0.0
    return max(_f1(len(given & wanted), len(given), len(wanted)) for wanted in map(set, map(read_labels, references)))


def labels_flaw(text: str) -> str | None:
    """Why a right answer is no list of labels, or None."""
    try:
        read_labels(text)
    except ValueError as error:
        return f"is no list of labels ({error})"
    return None


def tag_accuracy(answer: str, references: Sequence[str]) -> float:
    """The share of words with the right tag, the best over references; a word without a tag is wrong."""
    given = answer.split()
    return max(
        sum(one == other for one, other in zip(given, wanted, strict=False)) / max(len(wanted), 1)
        for wanted in map(str.split, references)
    )


def tag_f1(answer: str, references: Sequence[str]) -> float:
    """The F1 of one row's spans, the best over references."""
    given = spans(answer.split())
    return max(_f1(len(given & wanted), len(given), len(wanted)) for wanted in map(spans, map(str.split, references)))


def spans(tags: Sequence[str]) -> set[Span]:
    """The spans that tags of IOB2 spell: `B-x` begins one, `I-x` goes on with one of its class, else begins one.

    A tag without `B-` or `I-` that is not `O` is a span of one word. Source: conlleval (Tjong Kim Sang 2000), as
    seqeval counts by default.
    """
    found: set[Span] = set()
    start, current = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-") if tag[:2] in ("B-", "I-") else ("", "", "" if tag == "O" else tag)
        if current and not (mark == "I" and name == current):
            found.add((current, start, place))
            current = ""
        if name and not current:
            start, current = place, name
    return found


def corpus_tag_f1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Interval:
    """The F1 of all spans of all rows (micro F1), against the first reference of each; bootstrapped over rows."""
    both = zip(map(str.split, answers), (wanted[0].split() for wanted in references), strict=True)
    pairs = [(spans(given), spans(wanted)) for given, wanted in both]
    counts = np.array([(len(given & wanted), len(given), len(wanted)) for given, wanted in pairs], dtype=float)

    def value(chosen: NDArray[np.intp]) -> float:
        right, given, wanted = counts[chosen].sum(axis=0)
        return _f1(right, given, wanted)

    return _bootstrapped(value, len(counts))


def macro_f1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Interval:
    """The mean over the classes that are right somewhere of a class's F1; bootstrapped over rows.

    An answer that is one of its row's right ones counts for its class; else the first right one is missed.
    """
    wanted = [answer if answer in right else right[0] for answer, right in zip(answers, references, strict=True)]
    names = {name: place for place, name in enumerate(sorted({*wanted, *answers}))}
    said, true = (np.array([names[name] for name in column]) for column in (answers, wanted))
    counted = np.unique(true)

    def value(chosen: NDArray[np.intp]) -> float:
        given = np.bincount(said[chosen], minlength=len(names))[counted]
        asked = np.bincount(true[chosen], minlength=len(names))[counted]
        right = np.bincount(true[chosen][said[chosen] == true[chosen]], minlength=len(names))[counted]
        return float(np.mean(2 * right / np.maximum(given + asked, 1)))

    return _bootstrapped(value, len(said))


def _f1(right: float, given: float, wanted: float) -> float:
    return 2 * right / (given + wanted) if given + wanted else 1.0


def _bootstrapped(value: Callable[[NDArray[np.intp]], float], num: int) -> Interval:
    """The figure of all rows, and the 95 % interval of its resamples."""
    generator = np.random.default_rng(0)
    whole = value(np.arange(num))
    drawn = [value(generator.integers(0, num, num)) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(whole), float(min(low, whole)), float(max(high, whole)), num)
