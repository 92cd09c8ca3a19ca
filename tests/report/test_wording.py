import pytest

from retain.evaluation.statistics import Interval
from retain.report import wording

NARROW = "\u202f"


@pytest.mark.parametrize(
    ("value", "metric", "expected"),
    [
        (0.975, "exact_match", f"97.5{NARROW}%"),
        (0.0, "accuracy", f"0.0{NARROW}%"),
        (1.0, "rouge_l", f"100.0{NARROW}%"),
        (8.694, "perplexity", "8.69"),
        (37.26, "perplexity", "37.3"),
        (12345.6, "perplexity", f"12{NARROW}346"),
        (0.07245, "kl", "0.072 nats"),
    ],
)
def test_a_level_has_the_digits_and_unit_of_its_metric(value, metric, expected):
    assert wording.level(value, metric) == expected


def test_ranges_are_spelled_like_their_levels():
    assert wording.level_range(0.943, 0.99, "accuracy") == "94.3–99.0"
    assert wording.level_range(0.061, 0.083, "kl") == "0.061–0.083"


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (-0.45, "points", "−45.0 points"),
        (0.015, "points", "+1.5 points"),
        (-0.0001, "points", "−0.0 points"),
        (0.0001, "points", "+0.0 points"),
        (0.0, "nats", "0.00 nats"),
        (-1.0349, "nats", "−1.03 nats"),
        (float("-inf"), "nats", "−∞ nats"),
    ],
)
def test_a_difference_has_a_sign_and_only_zero_has_none(value, unit, expected):
    assert wording.difference(value, unit) == expected


def test_a_range_has_the_digits_of_its_difference():
    assert wording.range_text(Interval(-0.45, -0.512, -0.386, 200), "points") == "−51.2 to −38.6"
    assert wording.range_text(Interval(-0.1, -0.231, 0.07, 40), "nats") == "−0.23 to +0.07"


def test_nothing_that_a_terminal_obeys_is_left():
    hostile = "a\x00b\x1b[31mc\x07\x7f\x9b\u202ed\u2066e\ud800f\uffff\r\ng\th"
    cleaned = wording.clean(hostile)
    assert cleaned == "a␀b␛[31mc␇␡\ufffd\ufffdd\ufffde\ufffdf\ufffd\ng\th"
    cleaned.encode()
    assert wording.clean("Hà Nội 東京 مرحبا 🙂 a‌b") == "Hà Nội 東京 مرحبا 🙂 a‌b"


def test_a_cut_text_says_what_is_missing():
    assert wording.clip("abcdef", 6) == "abcdef"
    assert wording.clip("abcdef", 4) == "abcd … (2 more characters)"
    assert wording.short("abcdef", 4) == "abc…"
    assert len(wording.short("abcdef", 4)) == 4


def test_plain_text_is_ascii():
    assert wording.plain(wording.difference(-0.45, "points")).isascii()
    assert wording.plain(
        f"{wording.percent(0.1)} → {wording.level_range(0.1, 0.2, 'kl')}, {wording.CONFIDENCE}"
    ).isascii()


def test_orientation_is_said():
    assert wording.column_title("exact_match") == "exact match, %"
    assert wording.column_title("perplexity") == "perplexity, lower is better"
    assert wording.unit_of("perplexity") == "nats"
    assert wording.unit_of("accuracy") == "points"


def test_small_words():
    assert [wording.duration(seconds) for seconds in (0.84, 42.2, 185, 7810)] == [
        "0.8 s",
        "42 s",
        "3 min 5 s",
        "2 h 10 min",
    ]
    assert wording.joined(["a"]) == "a"
    assert wording.joined("abc") == "a, b and c"
    assert [wording.letter(i) for i in (0, 25, 26)] == ["A", "Z", "A2"]
    assert wording.plural(1, "step") == "1 step"
    assert wording.plural(1200, "step") == f"1{NARROW}200 steps"
    assert [wording.tick(value, "points") for value in (-0.5, 0.0, 0.25)] == ["−50", "0", "25"]
    assert wording.tick(0.1 + 0.2, "nats") == "0.3"
