"""A back-off n-gram model: tables of log-probabilities, looked up for many tokens at once.

    log p(w | h) = stored(h w)                            where the n-gram h w is stored
                   backoff(h) + log p(w | h without its first word)    else; backoff(h) = 0 where h is not stored

It is what an ARPA file holds. The n-grams form a trie in sorted arrays: the key of an n-gram is the place of its first
n - 1 words among the stored (n-1)-grams, times the number of symbols, plus its last word. So any order and any
vocabulary fit into 64 bits, and looking up is a binary search.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BackoffModel", "Floats", "Ids", "Level", "find_grams", "windows"]

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Level:
    """All stored n-grams of one length.

    Args:
        keys: (n,), rising; of single words, where every symbol is stored, simply 0 to the number of symbols.
        log_probs: (n,), nats.
        backoffs: (n,), nats; zeros at the model's order.
    """

    keys: Ids
    log_probs: Floats
    backoffs: Floats


@dataclass(frozen=True, slots=True)
class BackoffModel:
    """A back-off model over token ids.

    Args:
        vocab_size: tokens that can be predicted; the symbol `vocab_size` stands before every text, and further ones can
            only be contexts.
        levels: of 1-grams, 2-grams, ..., none empty. Every n-gram's first and last n - 1 words are stored, too.
    """

    vocab_size: int
    levels: tuple[Level, ...]

    @property
    def order(self) -> int:
        """The longest n-gram's length."""
        return len(self.levels)

    @property
    def num_symbols(self) -> int:
        """Tokens, the beginning, and what else can only be a context."""
        return len(self.levels[0].keys)

    def nodes(self, contexts: Ids) -> list[Ids]:
        """For the last 1, 2, ... words of each context, (rows, n): their place in the level, or -1."""
        longest = min(contexts.shape[1], self.order - 1)
        return [find_grams(self.levels, contexts[:, -length:]) for length in range(1, longest + 1)]

    def score(self, grams: Ids) -> Floats:
        """Log p of each row's last token after the tokens before it, nats.

        Args:
            grams: (rows, n), of `windows`; what is longer than the order is not looked at.
        """
        targets = grams[:, -1]
        log_p = self.levels[0].log_probs[targets]  # (rows,)
        for lower, upper, node in zip(self.levels, self.levels[1:], self.nodes(grams[:, :-1]), strict=False):
            place = _find(upper.keys, node, targets, self.num_symbols)
            backed = log_p + np.where(node >= 0, lower.backoffs[node], 0.0)
            log_p = np.where(place >= 0, upper.log_probs[place], backed)
        return log_p

    def distribution(self, contexts: Ids) -> Floats:
        """(rows, vocab_size): log p of every token after each context, nats; `score` of all tokens.

        Args:
            contexts: (rows, n), as far back as the order, or further.
        """
        log_p = np.tile(self.levels[0].log_probs[: self.vocab_size], (len(contexts), 1))
        for lower, upper, node in zip(self.levels, self.levels[1:], self.nodes(contexts), strict=False):
            rows = np.flatnonzero(node >= 0)
            log_p[rows] += lower.backoffs[node[rows], None]
            first = np.searchsorted(upper.keys, node[rows] * self.num_symbols)
            last = np.searchsorted(upper.keys, (node[rows] + 1) * self.num_symbols)
            places = _ranges(first, last)
            log_p[np.repeat(rows, last - first), upper.keys[places] % self.num_symbols] = upper.log_probs[places]
        return log_p


def windows(rows: Sequence[Sequence[int]], order: int, *, begin: int) -> Ids:
    """(tokens of all rows, order): every token with the order - 1 before it; `begin` fills what lies before a text."""
    padding = [begin] * (order - 1)
    flat = np.array([token for row in rows for token in (*padding, *row)], dtype=np.int64)
    if not any(rows):
        return np.empty((0, order), dtype=np.int64)
    lengths = np.array([len(row) for row in rows])
    starts = np.cumsum(lengths + order - 1) - lengths - (order - 1)  # of the windows of each row in the flat sequence
    return np.lib.stride_tricks.sliding_window_view(flat, order)[_ranges(starts, starts + lengths)]


def find_grams(levels: Sequence[Level], grams: Ids) -> Ids:
    """The place of each n-gram, (rows, n), in its level; -1 where it is not stored."""
    place = grams[:, 0]
    for depth in range(1, grams.shape[1]):
        place = _find(levels[depth].keys, place, grams[:, depth], len(levels[0].keys))
    return place


def _find(keys: Ids, parents: Ids, symbols: Ids, num_symbols: int) -> Ids:
    """The place of each child among the keys; -1 where there is none, or no parent."""
    wanted = parents * num_symbols + symbols
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((keys[places] == wanted) & (parents >= 0), places, -1)


def _ranges(first: Ids, last: Ids) -> Ids:
    """first[0] .. last[0] - 1, first[1] .. last[1] - 1, ..., one after another."""
    lengths = last - first
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(first - ends + lengths, lengths)
