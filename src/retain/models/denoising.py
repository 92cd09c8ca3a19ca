"""How an encoder-decoder model learns from raw text: parts are hidden from the encoder, and the decoder writes them.

    span corruption    a b <X> e f <Y>   ->  <X> c d <Y> g h i       tokenizers with sentinels: T5
    text infilling     a b <mask> e f    ->  a b c d e f             tokenizers with a mask: BART
    prefix             a b               ->  c d e f                 any other

What is hidden is drawn from the row and the epoch, and from nothing else: the same call hides the same tokens.

Source: Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.3.4 and figure 2, and the authors'
`random_spans_noise_mask`; Lewis et al. 2020, https://arxiv.org/abs/1910.13461, section 2.2.
Differs: hidden spans lie anywhere, as with the authors' `random_roll`: by their default a text always ends in one,
which in a short text would hide the same tokens again and again. Infilling hides tokens, not whole words, and neither
permutes sentences nor puts random tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from random import Random
from typing import Self

from retain.models.family import Tokenizer

__all__ = ["FILLED_AT_ONCE", "SENTINELS", "Markers", "denoised", "infilled", "span_corrupted"]

SENTINELS = 100
"""How many sentinels T5 has: `<extra_id_0>` to `<extra_id_99>`."""

SPAN_SHARE = 0.15
SPAN_LENGTH = 3.0
"""T5 hides 15 % of the tokens, in spans of 3 on average."""

INFILLED_SHARE = 0.3
INFILLED_LENGTH = 3.0
"""BART hides 30 % of the tokens, in spans whose lengths are drawn from Poisson(3)."""

FILLED_AT_ONCE = 3
"""Tokens of a text that a denoiser is asked for at once: as many as a hidden span has on average."""

Pair = tuple[list[int], list[int]]
"""What the encoder reads, and what the decoder writes."""


@dataclass(frozen=True)
class Markers:
    """What a tokenizer puts around a text, and what may stand for a hidden part of one.

    Args:
        begin: before a text: BOS or nothing.
        end: after a text; EOS, or nothing where the tokenizer ends no text.
        stop: ends what the decoder writes: `end`, else EOS.
        sentinels: `<extra_id_0>`, `<extra_id_1>`, ...; empty where the tokenizer has none.
        mask: the mask token; None where there is none.
    """

    begin: tuple[int, ...]
    end: tuple[int, ...]
    stop: tuple[int, ...]
    sentinels: tuple[int, ...] = ()
    mask: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """A tokenizer's."""
        whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
        bare: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        begin, end = tuple(whole[:at]), tuple(whole[at + len(bare) :])
        found = (token_id(tokenizer, f"<extra_id_{place}>") for place in range(SENTINELS))
        sentinels = tuple(token for token in takewhile(lambda token: token is not None, found) if token is not None)
        # Where texts have no end (Gemma), a mask token is a leftover of the vocabulary that no model was trained with.
        return cls(begin, end, end or (tokenizer.eos_token_id,), sentinels, tokenizer.mask_token_id if end else None)

    def bare(self, ids: Sequence[int]) -> list[int]:
        """A text without what is around it."""
        start = len(self.begin) if starts(ids, self.begin) else 0
        return list(ids[start : len(ids) - len(self.stop) if self.finished(ids) else len(ids)])

    def finished(self, ids: Sequence[int]) -> bool:
        """Does the text end as a whole one does?"""
        return tuple(ids[len(ids) - len(self.stop) :]) == self.stop

    def source(self, ids: Sequence[int]) -> list[int]:
        """A text as the encoder reads it."""
        return [*self.begin, *self.bare(ids), *self.end]

    def whole(self, ids: Sequence[int]) -> list[int]:
        """A text that ends."""
        return [*self.begin, *self.bare(ids), *self.stop]

    def target(self, ids: Sequence[int]) -> list[int]:
        """A text as the decoder writes it: with what comes before it; its end is as given."""
        return list(ids) if starts(ids, self.begin) else [*self.begin, *ids]

    def request(self, ids: Sequence[int]) -> Pair:
        """What the encoder reads to answer or continue a text, and what the decoder is given as written.

        A finished text is answered. Of one that is not, the next part is hidden, and the model fills it in.
        """
        if self.finished(ids):
            return self.source(ids), []
        text = self.bare(ids)
        if self.sentinels:
            return self.source([*text, self.sentinels[0]]), [self.sentinels[0]]
        if self.mask is not None:
            return self.source([*text, self.mask]), [*self.begin, *text]
        return self.source(text), list(self.begin)


def token_id(tokenizer: Tokenizer, name: str) -> int | None:
    """The id of a token, or None; mT5 spells its sentinels with a space before them."""
    ids = (tokenizer.convert_tokens_to_ids(spelled) for spelled in (name, f"▁{name}"))
    return next((found for found in ids if found is not None and found != tokenizer.unk_token_id), None)


def starts(ids: Sequence[int], begin: Sequence[int]) -> bool:
    """Are these its first tokens?"""
    return tuple(ids[: len(begin)]) == tuple(begin)


def denoised(ids: Sequence[int], markers: Markers, *, seed: str) -> Pair:
    """What the encoder reads of a text and what the decoder writes, by the objective of the tokenizer's model.

    Args:
        ids: the text's, with or without what the tokenizer puts around it.
        markers: of the tokenizer.
        seed: all that the draws depend on, beside the text.
    """
    text = markers.bare(ids)
    random = Random(f"{seed}/{text}")
    if not text or (len(text) == 1 and not markers.sentinels):
        return markers.source(text), [*markers.target(text), *markers.stop]
    if markers.sentinels:
        source, target = span_corrupted(text, markers.sentinels, random)
        return markers.source(source), [*target, *markers.stop]
    if markers.mask is not None:
        return markers.source(infilled(text, markers.mask, random)), [*markers.target(text), *markers.stop]
    cut = random.randrange(1, len(text))
    return markers.source(text[:cut]), [*markers.target(text[cut:]), *markers.stop]


def span_corrupted(text: Sequence[int], sentinels: Sequence[int], random: Random) -> Pair:
    """Spans replaced by a sentinel each, and every sentinel with what it stands for.

    Between two hidden spans lies a kept one; lengths and places are drawn evenly from all that add up. A text that ends
    in a kept span has one more sentinel for it, which closes the target.

    Args:
        text: token ids, at least one.
        sentinels: one a span, in order.
        random: of the lengths.
    """
    hidden = min(max(round(len(text) * SPAN_SHARE), 1), max(len(text) - 1, 1))
    kept = len(text) - hidden
    num = min(max(round(hidden / SPAN_LENGTH), 1), kept + 1, len(sentinels))
    first, *between, last = segments(kept + 2, num + 1, random)  # the outer two may be empty
    source: list[int] = []
    target: list[int] = []
    at = 0
    befores = [first - 1, *between]
    for sentinel, before, length in zip(sentinels, befores, segments(hidden, num, random), strict=False):
        source += [*text[at : at + before], sentinel]
        target += [sentinel, *text[at + before : at + before + length]]
        at += before + length
    return [*source, *text[at:]], [*target, *(sentinels[num : num + 1] if last > 1 else ())]


def segments(total: int, num: int, random: Random) -> list[int]:
    """`num` lengths of 1 or more that add up to the total, every such list as likely as any other."""
    cuts = [0, *sorted(random.sample(range(1, total), num - 1)), total]
    return [after - before for before, after in pairwise(cuts)]


def infilled(text: Sequence[int], mask: int, random: Random) -> list[int]:
    """Spans replaced by one mask each; a span of length 0 is a mask put in. No two masks stand side by side.

    Args:
        text: token ids, at least two.
        mask: the mask token.
        random: of the lengths and places.
    """
    hidden = min(max(round(len(text) * INFILLED_SHARE), 1), len(text) - 1)
    kept = len(text) - hidden
    lengths: list[int] = []
    while sum(lengths) < hidden:
        lengths.append(min(poisson(INFILLED_LENGTH, random), hidden - sum(lengths)))
    while len(lengths) > kept + 1:  # a mask too many: two spans become one
        lengths.append(lengths.pop() + lengths.pop())
    random.shuffle(lengths)
    places = sorted(random.sample(range(kept + 1), len(lengths)))  # how many kept tokens come before each mask
    source: list[int] = []
    at = before = 0
    for place, length in zip(places, lengths, strict=True):
        source += [*text[at : at + place - before], mask]
        at += place - before + length
        before = place
    return [*source, *text[at:]]


def poisson(mean: float, random: Random) -> int:
    """A draw from the Poisson distribution: how many uniform numbers have a product of e^-mean or more."""
    count, product = 0, random.random()
    while product > math.exp(-mean):
        count += 1
        product *= random.random()
    return count
