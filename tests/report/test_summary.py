import dataclasses
import math

import pytest

from retain.evaluation.changes import changes
from retain.evaluation.forgetting import measures, score_matrix
from retain.evaluation.statistics import is_noise, item_scores, matrix_intervals
from retain.report.definitions import DEFINITIONS
from retain.report.summary import Summary, paired_differences
from retain.types import Answer, Record, Score, StageRecord


def exact_record(columns: dict[str, list[list[int]]], **more) -> Record:
    """A record whose scores are counted by hand: by task, by stage, right (1) or wrong (0) for each example."""
    num_stages = len(next(iter(columns.values())))
    stages = []
    for index in range(num_stages):
        answers = [
            Answer(task, str(i), "q", "a", "a" if right else "b", float(right))
            for task, rows in columns.items()
            for i, right in enumerate(rows[index])
        ]
        scores = {
            task: Score(sum(rows[index]) / len(rows[index]), "exact_match", len(rows[index]), 0.0, 1.0)
            for task, rows in columns.items()
        }
        stages.append(StageRecord(index, ["base", *columns][index], scores, tuple(answers)))
    return Record("t", "m", "full", "sequential", tuple(columns), tuple(stages), **more)


BY_HAND = {
    "first": [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]],  # 0, 1, 1/2, 1/4
    "second": [[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],  # 0, 1/4, 3/4, 1
    "third": [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]],  # 1/4, 1/4, 0, 1/2
}


def test_figures_by_hand():
    figures = Summary(exact_record(BY_HAND)).figures
    assert figures["average_accuracy"].value == pytest.approx((1 / 4 + 1 + 1 / 2) / 3)
    assert figures["backward_transfer"].value == pytest.approx((-3 / 4 + 1 / 4) / 2)
    assert figures["forgetting"].value == pytest.approx((3 / 4 - 1 / 4) / 2)
    assert figures["learning_accuracy"].value == pytest.approx((1 + 3 / 4 + 1 / 2) / 3)
    assert figures["forward_transfer"].value == pytest.approx((1 / 4 - 1 / 4) / 2)
    assert [figures[key].unit for key in ("average_accuracy", "backward_transfer")] == ["%", "points"]
    assert figures["probes"].value is None
    assert figures["kl"].value is None
    assert "no probes" in figures["probes"].reason


def test_what_was_lost_by_hand():
    summary = Summary(exact_record(BY_HAND))
    first, second = summary.lost
    assert (first.since, first.until) == ("first", "third")
    assert first.value == -3 / 4
    assert [old.id for old, _ in first.change.lost] == ["1", "2", "3"]
    assert second.value == 1 / 4
    assert second.verdict == "noise"
    assert [shift.value for shift in summary.learned] == pytest.approx([1, 3 / 4, 1 / 4])


def test_cells_say_where_they_stand():
    cells = Summary(exact_record(BY_HAND)).cells
    assert [[cell.place[0] for cell in row] for row in cells] == [list("bbb"), list("obb"), list("aob"), list("aao")]
    assert cells[2][0].heat == 1 / 2


def test_intervals_are_those_of_the_statistics(forgetful):
    summary = Summary(forgetful)
    metrics = dict.fromkeys(forgetful.tasks, "exact_match")
    expected = matrix_intervals(item_scores([s.answers for s in forgetful.stages], forgetful.tasks, metrics=metrics))
    for key, interval in expected.items():
        assert summary.figures[key].interval == interval
    told = changes(forgetful.stages[1].answers, forgetful.stages[3].answers, metrics=summary.metrics)
    assert summary.lost[0].change == told["desk"]
    general = changes(forgetful.stages[0].answers, forgetful.stages[3].answers, metrics=summary.metrics)
    assert summary.probes.interval == general["probes"].margin
    assert [shift.interval for shift in summary.abilities] == [
        general[shift.suite].margin for shift in summary.abilities
    ]
    assert set(summary.figures) == set(DEFINITIONS)


def test_figures_are_those_of_the_matrix(forgetful):
    expected = measures(score_matrix([stage.scores for stage in forgetful.stages], forgetful.tasks))
    for key, found in expected.items():
        assert Summary(forgetful).figures[key].value == pytest.approx(found.value)


def test_perplexity_turns_to_nats_and_a_rise_is_a_loss(build_record):
    record = build_record(
        {"wiki": (0.2, 0.8, 0.6), "law": (0.1, 0.1, 0.9)}, metrics={"wiki": "perplexity", "law": "perplexity"}
    )
    summary = Summary(record)
    (lost,) = summary.lost
    assert lost.after.value > lost.before.value
    assert lost.value < 0
    assert (lost.verdict, lost.unit) == ("lost", "nats")
    assert summary.figures["backward_transfer"].unit == "nats"
    assert summary.figures["backward_transfer"].value < 0
    assert summary.cells[1][0].heat == 1.0  # the column's lowest perplexity
    assert summary.cells[0][0].heat == 0.0


def test_units_are_never_averaged(build_record):
    record = build_record({"desk": (0.0, 0.9, 0.7), "wiki": (0.2, 0.25, 0.8)}, metrics={"wiki": "perplexity"})
    figures = Summary(record).figures
    assert figures["average_accuracy"].value is None
    assert "different units" in figures["average_accuracy"].reason
    assert "average_accuracy" not in paired_differences(Summary(record), Summary(record))


def test_without_answers_there_is_a_value_but_no_verdict(forgetful):
    stages = tuple(dataclasses.replace(stage, answers=()) for stage in forgetful.stages)
    summary = Summary(dataclasses.replace(forgetful, stages=stages))
    assert summary.lost[0].verdict == "unknown"
    assert summary.lost[0].value == pytest.approx(
        forgetful.stages[3].scores["desk"].value - forgetful.stages[1].scores["desk"].value
    )
    assert summary.figures["backward_transfer"].interval is None
    assert summary.figures["backward_transfer"].value < 0


def test_a_task_that_came_later_has_no_earlier_scores(build_record):
    record = build_record({"desk": (0.0, 0.9, 0.7), "late": (math.nan, math.nan, 0.9)})
    summary = Summary(record)
    assert summary.cells[0][1].score is None
    assert [shift.suite for shift in summary.learned] == ["desk"]
    assert summary.figures["backward_transfer"].value < 0


def test_tasks_that_were_learned_together(build_record):
    summary = Summary(build_record({"desk": (0.0, 0.9), "menus": (0.0, 0.9)}, stages=["base", "joint"]))
    assert summary.lost == ()
    assert summary.figures["average_accuracy"].value == pytest.approx(sum(c.score.value for c in summary.cells[1]) / 2)
    assert summary.figures["backward_transfer"].value is None


def test_one_run_against_another_is_paired(forgetful, protected):
    first, other = Summary(forgetful), Summary(protected)
    found = paired_differences(first, other)
    for key in ("average_accuracy", "backward_transfer", "learning_accuracy", "probes"):
        assert found[key].mean == pytest.approx(other.figures[key].value - first.figures[key].value)
    assert found["backward_transfer"].low > 0
    assert is_noise(paired_differences(first, first)["backward_transfer"])
    pairs = zip(first.items, other.items, strict=True)
    assert found["backward_transfer"] == matrix_intervals([new - old for old, new in pairs])["backward_transfer"]


def test_other_examples_are_not_compared(forgetful, build_record):
    other = build_record(
        {"desk": (0.02, 0.9, 0.8, 0.7), "x": (0.0, 0.0, 0.9, 0.8), "y": (0.0, 0.0, 0.0, 0.9)}, num_probes=0
    )
    assert paired_differences(Summary(forgetful), Summary(other)) == {}
