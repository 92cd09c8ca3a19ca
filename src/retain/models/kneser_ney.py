"""Counting n-grams, and interpolated modified Kneser-Ney probabilities from the counts.

    p(w | h) = max(a(h w) - D(a(h w)), 0) / a(h .) + gamma(h) p(w | h without its first word)

    a(g)     how often g occurs, for n-grams of the highest order and for those that begin a text;
             in how many words' company to the left it occurs, N1+(. g), for all others
    gamma(h) (D1 N1(h .) + D2 N2(h .) + D3 N3+(h .)) / a(h .): what the discounts took away
    D1 = 1 - 2 Y n2 / n1,  D2 = 2 - 3 Y n3 / n2,  D3 = 3 - 4 Y n4 / n3,  Y = n1 / (n1 + 2 n2)

with n_i the number of n-grams whose a is i, for each order. Below single words lies the uniform distribution, so that
every token of the vocabulary has a probability and all of them sum to one.

Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", eq. 18 to 20 and 26
(https://doi.org/10.1006/csla.1999.0128). That n-grams which begin a text keep their counts, and what stands in for
discounts that cannot be computed, is as in KenLM's `lmplz` (Heafield et al. 2013, https://aclanthology.org/P13-2121).
"""

from dataclasses import dataclass

import numpy as np

from retain.models.backoff import BackoffModel, Floats, Ids, Level, find_grams

__all__ = ["Tally", "discounts", "estimate", "tally"]

FALLBACK = (0.5, 1.0, 1.5)
"""Discounts of an order whose counts of counts give none (few or no n-grams that occur once, twice, ...)."""


@dataclass(frozen=True, slots=True)
class Tally:
    """How often each token followed each context: all that an n-gram model learns.

    Args:
        grams: (n, order), all different, in lexicographic order; a token and the order - 1 symbols before it.
        counts: (n,), above 0.
    """

    grams: Ids
    counts: Ids

    def __add__(self, other: "Tally") -> "Tally":
        """The tally of both data sets: the same, bit for bit, as counting them at once."""
        return tally(np.concatenate([self.grams, other.grams]), np.concatenate([self.counts, other.counts]))


def tally(grams: Ids, counts: Ids | None = None) -> Tally:
    """Count equal rows.

    Args:
        grams: (n, order), of `backoff.windows`.
        counts: (n,), how often each is counted; once where None.
    """
    counts = np.ones(len(grams), dtype=np.int64) if counts is None else counts
    if not len(grams):
        return Tally(grams, counts)
    order = np.lexsort(grams.T[::-1])
    ordered = grams[order]
    starts = np.flatnonzero(np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)]))
    return Tally(np.ascontiguousarray(ordered[starts]), np.add.reduceat(counts[order], starts))


def discounts(counts: Ids) -> tuple[float, float, float]:
    """D1, D2 and D3+ from the counts of all n-grams of an order; `FALLBACK` where one is 0, or above 1, 2, 3.

    Args:
        counts: (n,), adjusted; zeros do not count.
    """
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == count)) for count in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return FALLBACK
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return found if all(0 < amount <= most for amount, most in zip(found, (1, 2, 3), strict=True)) else FALLBACK


def estimate(counted: Tally, *, vocab_size: int, num_symbols: int | None = None) -> BackoffModel:
    """The model that the counts make.

    Args:
        counted: of tokens below `vocab_size`; the symbol `vocab_size` fills what lies before a text.
        vocab_size: tokens that can be predicted.
        num_symbols: all symbols, where there are more than the tokens and the beginning.
    """
    num_symbols = num_symbols or vocab_size + 1
    levels = adjusted(counted, begin=vocab_size)
    levels = levels[: max(1, sum(len(level.counts) > 0 for level in levels))]  # no text may be as long as the order
    nodes: list[Tally] = []  # from the highest order down: also n-grams that only longer ones begin with
    for level in reversed(levels):
        nodes.append(level if not nodes else _with_prefixes(level, nodes[-1].grams))
    nodes.reverse()
    made = [_words(levels[0], vocab_size, num_symbols)]
    for counted_level, node in zip(levels[1:], nodes[1:], strict=True):
        amounts = np.array([0.0, *discounts(counted_level.counts)])
        parents, shorter = find_grams(made, node.grams[:, :-1]), find_grams(made, node.grams[:, 1:])
        backoffs, own = _discounted(node.counts, parents, amounts, num_parents=len(made[-1].keys))
        with np.errstate(divide="ignore"):  # what can only be a context has probability 0
            log_probs = np.log(own + np.exp(backoffs[parents] + made[-1].log_probs[shorter]))
        lower = made[-1]
        made[-1] = Level(lower.keys, lower.log_probs, backoffs)
        made.append(Level(parents * num_symbols + node.grams[:, -1], log_probs, np.zeros(len(log_probs))))
    return BackoffModel(vocab_size, tuple(made))


def adjusted(counted: Tally, *, begin: int) -> list[Tally]:
    """The n-grams of every length with their adjusted counts a(g), shortest first."""
    order = counted.grams.shape[1]
    levels: list[Tally] = []
    for length in range(order, 0, -1):
        tails = counted.grams[:, order - length :]
        opens = tails[:, 0] == begin  # begins a text: nothing lies to its left
        whole = np.ones(len(tails), dtype=bool) if length == order else opens
        if length > 1:
            whole &= tails[:, 1] != begin
        own = Tally(tails[whole], counted.counts[whole])
        if not levels:
            levels.append(tally(own.grams, own.counts))
        else:
            followed = tally(levels[-1].grams[:, 1:])  # one for every different word to the left
            levels.append(own + followed)
    return levels[::-1]


def _with_prefixes(level: Tally, longer: Ids) -> Tally:
    """The n-grams of a level and, with the count 0, what longer ones begin with."""
    return level + tally(longer[:, :-1], np.zeros(len(longer), dtype=np.int64))


def _words(level: Tally, vocab_size: int, num_symbols: int) -> Level:
    """Single words, interpolated with the uniform distribution."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    counts[level.grams[:, 0]] = level.counts
    log_probs = np.full(num_symbols, -np.inf)
    root = np.zeros(vocab_size, dtype=np.int64)
    amounts = np.array([0.0, *discounts(level.counts)])
    backoffs, own = _discounted(counts, root, amounts, num_parents=1)
    log_probs[:vocab_size] = np.log(own + np.exp(backoffs[0]) / vocab_size)
    return Level(np.arange(num_symbols), log_probs, np.zeros(num_symbols))


def _discounted(counts: Ids, parents: Ids, amounts: Floats, *, num_parents: int) -> tuple[Floats, Floats]:
    """log gamma of every parent, (num_parents,), and what is left of every child's share, (n,)."""
    kind = np.minimum(counts, 3)
    totals = np.bincount(parents, counts, minlength=num_parents)
    taken = np.bincount(parents, amounts[kind], minlength=num_parents)
    seen = totals > 0
    divisors = np.where(seen, totals, 1.0)
    gammas = np.where(seen, taken / divisors, 1.0)
    return np.log(gammas), (counts - amounts[kind]) / divisors[parents]
