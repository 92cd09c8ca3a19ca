from collections import Counter, defaultdict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from retain.models.backoff import windows
from retain.models.kneser_ney import FALLBACK, Tally, adjusted, discounts, estimate, tally

Row = list[int]


def random_rows(num: int, vocab_size: int, seed: int) -> list[Row]:
    """Skewed, so that there are many rare and some frequent n-grams."""
    generator = np.random.default_rng(seed)
    shares = 1 / np.arange(1, vocab_size + 1)
    return [
        generator.choice(vocab_size, size=generator.integers(1, 9), p=shares / shares.sum()).tolist()
        for _ in range(num)
    ]


def counted(rows: list[Row], order: int, begin: int) -> Tally:
    return tally(windows(rows, order, begin=begin))


class BruteForce:
    """Interpolated modified Kneser-Ney word by word, with dictionaries, as the equations are written."""

    def __init__(self, rows: list[Row], order: int, vocab_size: int) -> None:
        self.vocab_size, self.order = vocab_size, order
        raw: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
        for row in rows:
            text = [vocab_size, *row]
            for at in range(1, len(text)):
                for n in range(1, min(order, at + 1) + 1):
                    raw[n][tuple(text[at - n + 1 : at + 1])] += 1
        self.counts: list[dict[tuple[int, ...], int]] = [{}, *({} for _ in range(order))]
        for n in range(1, order + 1):
            left = defaultdict(set)
            if n < order:
                for gram in raw[n + 1]:
                    left[gram[1:]].add(gram[0])
            for gram, count in raw[n].items():
                whole = n == order or gram[0] == vocab_size
                self.counts[n][gram] = count if whole else len(left[gram])
        self.amounts = [(0.0, 0.0, 0.0), *(self.discounts(n) for n in range(1, order + 1))]

    def discounts(self, n: int) -> tuple[float, float, float]:
        of = Counter(self.counts[n].values())
        if not (of[1] and of[2] and of[3]):
            return FALLBACK
        y = of[1] / (of[1] + 2 * of[2])
        made = tuple(i - (i + 1) * y * of[i + 1] / of[i] for i in (1, 2, 3))
        return made if all(0 < d <= i for i, d in enumerate(made, start=1)) else FALLBACK  # type: ignore[return-value]

    def probability(self, history: tuple[int, ...], word: int) -> float:
        n = len(history) + 1
        lower = 1 / self.vocab_size if n == 1 else self.probability(history[1:], word)
        follow = {gram[-1]: count for gram, count in self.counts[n].items() if gram[:-1] == history}
        total = sum(follow.values())
        if not total:
            return lower
        d = self.amounts[n]
        gamma = sum(d[min(count, 3) - 1] for count in follow.values()) / total
        count = follow.get(word, 0)
        return (count - d[min(count, 3) - 1] if count else 0.0) / total + gamma * lower


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [random_rows(60, 6, seed=1), random_rows(5, 4, seed=2)], ids=["many", "few"])
def test_as_the_equations_say(rows: list[Row], order: int):
    vocab_size = 8  # two tokens never occur
    model = estimate(counted(rows, order, vocab_size), vocab_size=vocab_size)
    oracle = BruteForce(rows, order, vocab_size)
    seen = windows(rows, order, begin=vocab_size)[:40, :-1]
    unseen = np.random.default_rng(0).integers(0, vocab_size, (20, order - 1))
    contexts = np.concatenate([seen, unseen])
    found = np.exp(model.distribution(contexts))
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=0, atol=1e-9)
    for context, row in zip(contexts.tolist(), found, strict=True):
        history = tuple(context)
        while history[:2] == (vocab_size, vocab_size):
            history = history[1:]
        expected = [oracle.probability(history, word) for word in range(vocab_size)]
        np.testing.assert_allclose(row, expected, rtol=1e-9)


def test_by_hand():
    """Two texts, `a b` and `a c`, order 2; with so few n-grams every discount is the fallback's.

    a(a) = 1 (after the beginning), a(b) = a(c) = 1 (after a): p(w) = (1 - 0.5) / 3 + 0.5 / 4 for a, b and c.
    After a: b and c once each: p(b | a) = (1 - 0.5) / 2 + 0.5 p(b).   At the beginning: a twice, D2 = 1:
    p(a | <s>) = (2 - 1) / 2 + 1 / 2 p(a).
    """
    a, b, c, d = range(4)
    half = Fraction(1, 2)
    word = half / 3 + half / 4
    model = estimate(counted([[a, b], [a, c]], 2, begin=4), vocab_size=4)
    expected = {
        (a, b): half / 2 + half * word,
        (a, a): half * word,
        (a, d): half * half / 4,
        (4, a): half + half * word,
        (4, d): half * half / 4,
        (b, a): word,  # nothing follows b
        (d, d): half / 4,
    }
    found = np.exp(model.score(np.array(list(expected))))
    np.testing.assert_allclose(found, [float(value) for value in expected.values()], rtol=1e-12)


def test_discounts_in_closed_form():
    counts = np.repeat([1, 2, 3, 4, 9, 0], [40, 20, 10, 5, 7, 3])
    y = 40 / 80
    assert discounts(counts) == pytest.approx((1 - 2 * y * 20 / 40, 2 - 3 * y * 10 / 20, 3 - 4 * y * 5 / 10))


@pytest.mark.parametrize("counts", [[], [1, 1], [2, 2, 3], [1, 1, 2], [1, 2, *[3] * 30], [5] * 9])
def test_degenerate_counts_of_counts_fall_back(counts: list[int]):
    assert discounts(np.array(counts, dtype=np.int64)) == FALLBACK


def test_adjusted_counts():
    """`a b a b c`: b follows a twice, but only one word; what begins a text keeps its count."""
    a, b, c, begin = range(4)
    levels = adjusted(counted([[a, b, a, b, c], [a]], 3, begin=begin), begin=begin)
    as_dicts: list[dict[tuple[int, ...], Any]] = [
        dict(zip(map(tuple, level.grams.tolist()), level.counts.tolist(), strict=True)) for level in levels
    ]
    assert as_dicts[0] == {(a,): 2, (b,): 1, (c,): 1}
    assert as_dicts[1] == {(a, b): 2, (b, a): 1, (b, c): 1, (begin, a): 2}
    assert as_dicts[2] == {(begin, a, b): 1, (a, b, a): 1, (b, a, b): 1, (a, b, c): 1}


def test_counting_in_parts_is_counting_at_once():
    rows = random_rows(50, 6, seed=3)
    whole = counted(rows, 3, begin=6)
    parts = counted(rows[:13], 3, begin=6) + counted(rows[13:20], 3, begin=6) + counted(rows[20:], 3, begin=6)
    np.testing.assert_array_equal(parts.grams, whole.grams)
    np.testing.assert_array_equal(parts.counts, whole.counts)
    assert whole.counts.sum() == sum(map(len, rows))


def test_nothing_counted_is_uniform():
    model = estimate(counted([], 3, begin=5), vocab_size=5)
    np.testing.assert_allclose(np.exp(model.distribution(np.array([[5, 5], [0, 1]]))), 0.2)


def test_contexts_that_are_not_counted_themselves():
    """Only the last token of `a b c` is counted, as where a prompt is not trained; all sums stay one."""
    grams = windows([[0, 1, 2]], 3, begin=4)[-1:]
    model = estimate(tally(grams), vocab_size=4)
    contexts = np.array([[0, 1], [1, 1], [4, 0], [4, 4]])
    np.testing.assert_allclose(np.exp(model.distribution(contexts)).sum(axis=1), 1, atol=1e-12)
    assert model.distribution(contexts)[0].argmax() == 2
