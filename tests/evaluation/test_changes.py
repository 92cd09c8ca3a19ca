"""What is called lost, gained and noise, on answers written by hand."""

import numpy as np
import pytest

from retain.evaluation.changes import RIGHT_FROM, changes
from retain.evaluation.scoring import METRICS
from retain.evaluation.statistics import paired_interval
from retain.types import Answer


def answer(suite: str, i: str, score: float, margin: float | None = None, text: str = "") -> Answer:
    return Answer(suite, i, f"question {i}", "right", text, score, margin)


def test_lost_and_gained_are_the_concrete_answers():
    before = [
        answer("t", "a", 1, 2.0, "x"),
        answer("t", "b", 0, -1.0),
        answer("t", "c", 1, 0.5),
        answer("t", "d", 0, -3.0),
    ]
    after = [
        answer("t", "d", 0, -2.0),
        answer("t", "c", 1, 0.25),
        answer("t", "b", 1, 1.0),
        answer("t", "a", 0, -2.0, "y"),
    ]
    change = changes(before, after, metrics={"t": "accuracy"})["t"]
    assert (change.before, change.after) == (0.5, 0.5)
    assert change.lost == ((before[0], after[3]),)
    assert change.gained == ((before[1], after[2]),)
    assert change.difference.mean == 0
    assert change.noise
    assert change.margin is not None
    assert change.margin.mean == pytest.approx((-4 + 2 - 0.25 + 1) / 4)


def test_a_clear_loss_is_no_noise_and_its_interval_is_the_paired_one():
    before = [answer("t", str(i), 1.0) for i in range(40)]
    after = [answer("t", str(i), float(i >= 12)) for i in range(40)]
    change = changes(before, after)["t"]
    assert not change.noise
    assert change.difference.mean == pytest.approx(-0.3)
    assert change.difference == paired_interval({a.id: a.score for a in before}, {a.id: a.score for a in after})
    assert len(change.lost) == 12
    assert change.margin is None


def test_only_examples_that_both_answered_are_compared():
    before = [answer("t", "a", 1), answer("t", "only before", 0), answer("gone", "x", 1), answer("apart", "1", 1)]
    after = [answer("t", "a", 1), answer("t", "only after", 0), answer("new", "x", 1), answer("apart", "2", 1)]
    found = changes(before, after)
    assert found.keys() == {"t"}
    assert (found["t"].before, found["t"].after, found["t"].difference.num) == (1, 1, 1)


def test_probes_are_all_probe_suites():
    before = [answer("probe:code", "1", 1, 1.0), answer("probe:grammar", "2", 1, 1.0), answer("t", "1", 1)]
    after = [answer("probe:code", "1", 0, -1.0), answer("probe:grammar", "2", 1, 0.5), answer("t", "1", 1)]
    found = changes(before, after)
    assert found.keys() == {"probe:code", "probe:grammar", "probes", "t"}
    assert (found["probes"].before, found["probes"].after) == (1, 0.5)
    assert found["probes"].lost == ((before[0], after[0]),)


def test_the_worst_losses_come_first():
    before = [answer("t", "a", 0.6), answer("t", "b", 1.0), answer("t", "c", 0.8)]
    after = [answer("t", "a", 0.4), answer("t", "b", 0.1), answer("t", "c", 0.4)]
    assert [old.id for old, _ in changes(before, after, metrics={"t": "token_f1"})["t"].lost] == ["b", "c", "a"]
    sure = [answer("t", "a", 1, 0.1), answer("t", "b", 1, 3.0)]
    wrong = [answer("t", "a", 0, -0.1), answer("t", "b", 0, -5.0)]
    assert [old.id for old, _ in changes(sure, wrong)["t"].lost] == ["b", "a"]
    assert [old.id for old, _ in changes(wrong, sure)["t"].gained] == ["b", "a"]


@pytest.mark.parametrize(("metric", "threshold"), [*RIGHT_FROM.items(), ("exact_match", 0.5)])
def test_a_graded_answer_is_right_from_its_metrics_threshold(metric: str, threshold: float):
    assert metric in METRICS
    before = [answer("t", "falls", threshold), answer("t", "stays", 1.0), answer("t", "rises", threshold - 0.01)]
    after = [answer("t", "falls", threshold - 0.01), answer("t", "stays", threshold), answer("t", "rises", threshold)]
    change = changes(before, after, metrics={"t": metric})["t"]
    assert [old.id for old, _ in change.lost] == ["falls"]
    assert [old.id for old, _ in change.gained] == ["rises"]


def test_more_nats_are_a_loss_and_no_answer_is_wrong():
    generator = np.random.default_rng(0)
    nats = generator.random(30) + 1
    before = [answer("text", str(i), value) for i, value in enumerate(nats)]
    after = [answer("text", str(i), value + 0.5 + 0.01 * i) for i, value in enumerate(nats)]
    change = changes(before, after, metrics={"text": "perplexity"})["text"]
    assert change.after > change.before
    assert change.difference.mean < 0
    assert change.difference.high < 0
    assert not change.noise
    assert change.lost == change.gained == ()


def test_kl_of_an_untouched_model_did_not_change_at_all():
    zero = [answer("kl", str(i), 0.0) for i in range(5)]
    change = changes(zero, zero)["kl"]
    assert (change.difference.low, change.difference.high) == (0, 0)
    assert change.noise
    moved = [answer("kl", str(i), 0.1 + i / 100) for i in range(5)]
    assert changes(zero, moved)["kl"].difference.mean == pytest.approx(-0.12)
    assert not changes(zero, moved)["kl"].noise


def test_nothing_in_common():
    assert changes([], [answer("t", "a", 1)]) == {}
