"""What is hidden from the encoder: the texts come back, the rates are the papers', and draws depend on nothing else."""

from collections import Counter
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from transformers import T5Tokenizer

from retain.models.denoising import Markers, denoised, infilled, poisson, segments, span_corrupted
from retain.models.seq2seq import Seq2SeqFamily
from retain.types import Example

MASK, SENTINELS = 5, tuple(range(900, 1000))
T5 = Markers(begin=(), end=(1,), stop=(1,), sentinels=SENTINELS)
BART = Markers(begin=(0,), end=(2,), stop=(2,), mask=MASK)
PLAIN = Markers(begin=(), end=(2,), stop=(2,))


def text(length: int, seed: int = 0) -> list[int]:
    return [Random(f"{seed}/{length}").randrange(10, 800) for _ in range(length)]


def rebuilt(source: list[int], target: list[int]) -> list[int]:
    """The text that a corrupted source and its target stand for: Raffel et al., figure 2, backwards."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    shown = [token for token in source if token in SENTINELS]
    assert shown == list(spans)[: len(shown)] == list(SENTINELS[: len(shown)])
    assert all(not spans[name] for name in list(spans)[len(shown) :])
    return [token for part in source for token in (spans[part] if part in SENTINELS else [part])]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 20, 100, 512, 3000])
def test_span_corruption_gives_the_text_back_and_hides_fifteen_per_cent(length: int) -> None:
    ids = text(length)
    source, target = span_corrupted(ids, SENTINELS, Random(1))
    assert rebuilt(source, target) == ids
    num = len(source) - sum(token not in SENTINELS for token in source)
    closed = target[-1] in SENTINELS  # figure 2: what ends in a kept span has a last sentinel for it
    assert closed == (source[-1] not in SENTINELS and num < 100)
    hidden = len(target) - num - closed
    assert hidden == (1 if length <= 9 else round(0.15 * length))
    assert num == min(max(round(hidden / 3), 1), 100)


def test_segments_are_drawn_evenly() -> None:
    """All ten ways to write 6 as a sum of three; chi-square of 9 degrees, 0.999 quantile 27.9."""
    random = Random(0)
    counts = Counter(tuple(segments(6, 3, random)) for _ in range(5000))
    assert len(counts) == 10
    assert all(sum(parts) == 6 and min(parts) >= 1 for parts in counts)
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 27.9


def test_every_place_is_hidden_as_often_as_any_other() -> None:
    """One token of five; chi-square of 4 degrees, 0.999 quantile 18.5."""
    random = Random(0)
    counts = Counter(span_corrupted(range(5), SENTINELS, random)[1][1] for _ in range(5000))
    assert sum((counts[place] - 1000) ** 2 / 1000 for place in range(5)) < 18.5


@pytest.mark.parametrize("length", [2, 3, 8, 50, 511])
def test_infilling_hides_thirty_per_cent_and_keeps_the_rest_in_order(length: int) -> None:
    for seed in range(20):
        ids = text(length, seed)
        source = infilled(ids, MASK, Random(seed))
        kept = [token for token in source if token != MASK]
        assert len(ids) - len(kept) == min(max(round(0.3 * length), 1), length - 1)
        assert all((one, other) != (MASK, MASK) for one, other in pairwise(source))
        at = iter(ids)
        assert all(token in at for token in kept)  # a subsequence


def test_infilled_spans_have_poisson_lengths_and_masks_are_put_in() -> None:
    """Distinct tokens, so that what each mask stands for can be read off: 3 on average, and nothing for e^-3."""
    lengths: list[int] = []
    ids = list(range(10, 1010))
    for seed in range(60):
        before = -1
        spans: list[int] = []
        for token in [*infilled(ids, MASK, Random(seed)), 1010]:
            if token == MASK:
                spans.append(-1)
            else:
                if spans and spans[-1] == -1:
                    spans[-1] = token - 10 - before - 1
                before = token - 10
        assert sum(spans) == 300
        lengths += spans
    mean = sum(lengths) / len(lengths)
    assert mean == pytest.approx(3.0, abs=0.1)
    assert lengths.count(0) / len(lengths) == pytest.approx(0.0498, abs=0.015)


def test_poisson() -> None:
    random = Random(0)
    draws = [poisson(3.0, random) for _ in range(20_000)]
    mean = sum(draws) / len(draws)
    assert mean == pytest.approx(3.0, abs=0.06)
    assert sum((draw - mean) ** 2 for draw in draws) / len(draws) == pytest.approx(3.0, abs=0.15)
    assert draws.count(0) / len(draws) == pytest.approx(0.0498, abs=0.005)


@pytest.mark.parametrize("markers", [T5, BART, PLAIN], ids=["t5", "bart", "prefix"])
@pytest.mark.parametrize("length", [0, 1, 2, 40])
def test_both_sides_are_whole_texts_and_depend_on_seed_and_text_alone(markers: Markers, length: int) -> None:
    ids = text(length)
    source, target = denoised(ids, markers, seed="a/0")
    assert source[: len(markers.begin)] == list(markers.begin)
    assert source[-1:] == list(markers.end)
    assert target[-1:] == list(markers.stop)
    assert denoised(markers.source(ids), markers, seed="a/0") == (source, target)
    if length == 40:
        assert len({str(denoised(ids, markers, seed=f"a/{epoch}")) for epoch in range(8)}) > 4
    if markers is T5 and length:
        assert rebuilt(source[:-1], target[:-1]) == ids
    if markers is BART:
        assert target == [0, *ids, 2]
    if markers is PLAIN and length > 1:
        assert source[:-1] + target[:-1] == ids


def test_requests_end_or_go_on() -> None:
    assert T5.request([7, 8, 1]) == ([7, 8, 1], [])
    assert T5.request([7, 8]) == ([7, 8, 900, 1], [900])
    assert BART.request([0, 7, 8, 2]) == ([0, 7, 8, 2], [])
    assert BART.request([0, 7, 8]) == ([0, 7, 8, MASK, 2], [0, 7, 8])
    assert PLAIN.request([7, 8]) == ([7, 8, 2], [])
    assert BART.whole([7]) == BART.whole([0, 7, 2]) == [0, 7, 2]
    assert BART.target([7, 2]) == BART.target([0, 7, 2]) == [0, 7, 2]


def tokenizers() -> list[Any]:
    rows = [Example("0", text="the quick brown fox jumps over the lazy dog")]
    made = [Seq2SeqFamily(architecture=kind, vocab_size=400)._tokenizer(rows) for kind in ("t5", "bart")]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("a", -3.0)]
    return [*made, T5Tokenizer(vocab=pieces, extra_ids=3)]


@pytest.mark.parametrize("place", range(3))
def test_markers_are_the_tokenizers_own(place: int) -> None:
    tokenizer = tokenizers()[place]
    markers = Markers.of(tokenizer)
    ids = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert markers.source(ids) == tokenizer("the")["input_ids"]
    assert markers.source(markers.source(ids)) == markers.source(ids)
    assert markers.bare(tokenizer("the")["input_ids"]) == ids
    assert len(markers.sentinels) == (100, 0, 3)[place]
    assert [tokenizer.decode(token) for token in markers.sentinels[:2]] == ["<extra_id_0>", "<extra_id_1>"][
        : len(markers.sentinels[:2])
    ]
    assert (markers.mask is not None) == (place == 1)
