"""How good a written answer is: pure functions of its text and the right ones, 0 to 1, the best over the right ones.

BLEU and chrF are sacrebleu's figures / 100. Text is compared in Unicode's composed form (NFC) without white space
around it: an accent typed in two ways is one accent.
"""

import json
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from retain.evaluation.statistics import Interval, interval

__all__ = [
    "bleu",
    "chrf",
    "contains",
    "corpus_bleu",
    "corpus_chrf",
    "exact_match",
    "json_equality",
    "json_flaw",
    "rouge_l",
    "token_f1",
]


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer, white space around it stripped, is one of the references."""
    return float(_composed(answer) in map(_composed, references))


def contains(answer: str, references: Sequence[str]) -> float:
    """1 if a reference stands in the answer as whole words, in any case: 5 is not in 15, nor An in And."""
    text = _composed(answer).casefold()
    return float(any(_stands_in(_composed(reference).casefold(), text) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """The F1 of the answer's words against a reference's as bags, the best over references.

    Source: Rajpurkar et al. 2016 (SQuAD): lower case, without punctuation and the articles a, an, the.
    Differs: punctuation is Unicode's, not only ASCII's.
    """

    def words(text: str) -> Counter[str]:
        plain = "".join(c for c in _composed(text).lower() if not _is_punctuation(c))
        return Counter(word for word in plain.split() if word not in ("a", "an", "the"))

    def f1(mine: Counter[str], right: Counter[str]) -> float:
        if not mine or not right:
            return float(mine == right)
        return 2 * (mine & right).total() / (mine.total() + right.total())

    return max(f1(words(answer), words(reference)) for reference in references)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """The F-measure of the longest common subsequence of words, the best over references.

    Source: Lin 2004, through rouge-score without its stemmer.
    Differs: words are runs of letters, marks and digits of any script; rouge-score's own tokenizer keeps only ASCII's.
    """
    composed = [_composed(reference) for reference in references]
    return float(_rouge().score_multi(composed, _composed(answer))["rougeL"].fmeasure)


def bleu(answer: str, references: Sequence[str]) -> float:
    """Sentence BLEU / 100 by sacrebleu, on the n-gram orders that the answer is long enough for."""
    found = BLEU(effective_order=True).sentence_score(_composed(answer), list(map(_composed, references)))
    return min(1.0, found.score / 100)  # a perfect one is 100.00000000000004


def chrf(answer: str, references: Sequence[str]) -> float:
    """Sentence chrF / 100 by sacrebleu: character n-grams up to 6, recall counted twice."""
    found = CHRF().sentence_score(_composed(answer), list(map(_composed, references)))
    return min(1.0, found.score / 100)


def json_equality(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is JSON and its value is a reference's: order of keys and white space do not matter."""
    try:
        value = _parse(answer)
    except (ValueError, RecursionError):
        return 0.0
    return float(any(_same(value, _parse(reference)) for reference in references))


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Interval:
    """Corpus BLEU / 100: n-gram counts summed over sentences, not a mean of sentence scores."""
    return _corpus(BLEU(), answers, references)


def corpus_chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Interval:
    """Corpus chrF / 100: n-gram counts summed over sentences, not a mean of sentence scores."""
    return _corpus(CHRF(), answers, references)


def json_flaw(text: str) -> str | None:
    """Why a right answer is no JSON, or None."""
    try:
        _parse(text)
    except ValueError as error:
        return f"is not JSON ({error})"
    return None


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _stands_in(part: str, text: str) -> bool:
    """Is `part` somewhere in `text` with no letter or digit going on at either end?

    Only scripts with two cases are known to put spaces between words; in others a letter may follow a word.
    """

    def goes_on(inside: str, outside: str) -> bool:
        return all(c.isdigit() or c.lower() != c.upper() for c in (inside, outside))

    start = text.find(part)
    while start >= 0:
        end = start + len(part)
        before = start > 0 and goes_on(part[0], text[start - 1])
        after = end < len(text) and goes_on(part[-1], text[end])
        if not before and not after:
            return True
        start = text.find(part, start + 1)
    return False


@dataclass(frozen=True, slots=True)
class _Words:
    """A tokenizer for rouge-score that knows every script."""

    def tokenize(self, text: str) -> list[str]:
        return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower()).split()


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk along, a second that other metrics need not wait

    return RougeScorer(["rougeL"], tokenizer=_Words())


def _corpus(scorer: BLEU | CHRF, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Interval:
    """A corpus figure / 100, with sacrebleu's bootstrap over its sentences."""
    most = max(map(len, references))
    streams = [[_composed(row[k]) if k < len(row) else None for row in references] for k in range(most)]
    found = scorer.corpus_score(list(map(_composed, answers)), streams, n_bootstrap=1000)  # type: ignore[arg-type]
    half = float(found._ci) / 100  # pyright: ignore[reportPrivateUsage]  numpy's float32, which JSON cannot hold
    value = min(1.0, float(found.score) / 100)
    if half < 1e-9:  # no resample differed: what the number of sentences leaves open
        same = interval([value] * len(answers))
        return Interval(value, same.low, same.high, len(answers))
    return Interval(value, max(0.0, value - half), min(1.0, value + half), len(answers))


def _parse(text: str) -> Any:
    """Strict JSON: no NaN, no infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(_composed(text), parse_constant=refuse)


def _same(left: Any, right: Any) -> bool:
    """Equality of JSON values: 1 is 1.0, but not true."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and left == right
