"""BERT's masking: its rates, that it is a function of row and draw, and that everything is hidden once in turn."""

import itertools

import pytest

from retain.models.masking import hidden_in_turn, masked
from retain.types import IGNORED

IDS = [1, *range(10, 2010), 2]


def draw(ids: list[int], key: str, share: float = 0.15) -> tuple[list[int], list[int]]:
    return masked(ids, mask_id=3, vocabulary=5000, special={1, 2, 3}, share=share, draw=key)


def test_the_rates_are_berts() -> None:
    chosen = hidden = kept = 0
    for epoch in range(20):
        read, targets = draw(IDS, f"0/{epoch}")
        for before, now, target in zip(IDS, read, targets, strict=True):
            assert target in (IGNORED, before)
            if target == IGNORED:
                assert now == before
            else:
                chosen, hidden, kept = chosen + 1, hidden + (now == 3), kept + (now == before)
    assert chosen / 40_000 == pytest.approx(0.15, abs=0.006)  # 3 standard errors
    assert hidden / chosen == pytest.approx(0.8, abs=0.016)
    assert kept / chosen == pytest.approx(0.1, abs=0.012)


def test_the_same_draw_hides_the_same() -> None:
    assert draw(IDS, "0/1") == draw(IDS, "0/1")
    assert draw(IDS, "0/1") != draw(IDS, "0/2")
    assert draw(IDS, "0/1") != draw(IDS, "1/1")


def test_a_short_text_has_something_to_guess() -> None:
    for epoch in range(30):
        _, targets = draw([1, 10, 11, 2], str(epoch), share=0.01)
        assert sum(target != IGNORED for target in targets) >= 1
        assert targets[0] == targets[-1] == IGNORED
    assert draw([1, 2], "0") == ([1, 2], [IGNORED, IGNORED])


def test_each_place_is_hidden_once() -> None:
    groups = hidden_in_turn(range(3, 20), turns=7)
    assert sorted(place for group in groups for place in group) == list(range(3, 20))
    assert all(b - a == 7 for group in groups for a, b in itertools.pairwise(group))
    assert hidden_in_turn([5], turns=7) == [[5]]
