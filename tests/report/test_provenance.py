from retain.report.provenance import facts, settings, speed
from retain.types import StageRecord


def stages(*provenances, history=()):
    return [StageRecord(i, ["base", "desk", "menus"][i], {}, (), history, facts) for i, facts in enumerate(provenances)]


def test_what_all_stages_share_comes_once_and_first():
    rows = facts(
        stages(
            {"seed": 0, "hash": "a"}, {"seed": 0, "hash": "b", "versions": {"torch": "2.13"}}, {"seed": 0, "hash": "c"}
        )
    )
    assert [(row.name, row.value, row.stages) for row in rows] == [
        ("seed", "0", ()),
        ("hash", "a", ("base",)),
        ("hash", "b", ("desk",)),
        ("versions.torch", "2.13", ("desk",)),
        ("hash", "c", ("menus",)),
    ]


def test_what_every_trained_stage_has_is_shared_and_the_empty_is_left_out():
    rows = facts(stages({"data_hash": "", "extra": {}}, {"data_hash": "x"}, {"data_hash": "x"}))
    assert [(row.name, row.value, row.stages) for row in rows] == [("data_hash", "x", ())]


def test_what_is_said_elsewhere_is_not_repeated():
    assert (
        facts(stages({"seconds": 1.0, "tokens": 5, "notes": ["n"], "settings": {}, "sources": {}, "strategy": "ewc"}))
        == []
    )


def test_values_are_text():
    (row,) = facts(stages({"tags": ["á", 1, True]}))
    assert row.value == '["á", 1, true]'


def test_settings_say_where_they_come_from():
    given = {
        "settings": {"train.lr": {"value": 2e-4, "source": "recipe"}, "train.a": {"value": 1, "source": "default"}}
    }
    rows = settings(stages({}, given, given))
    assert [(row.name, row.value, row.source, row.stages) for row in rows] == [
        ("train.lr", "0.0002", "recipe", ()),
        ("train.a", "1", "default", ()),
    ]
    (row,) = settings(stages({"sources": {"train.lr": "flag"}}))
    assert (row.name, row.value, row.source) == ("train.lr", "", "flag")


def test_a_setting_that_changed_is_told_by_stage():
    rows = settings(stages({"sources": {"lr": "default"}}, {"sources": {"lr": "default"}}, {"sources": {"lr": "flag"}}))
    assert [(row.source, row.stages) for row in rows] == [("flag", ("menus",)), ("default", ("base", "desk"))]


def test_speed(forgetful):
    base, *trained = speed(forgetful.stages)
    assert (base.num_steps, base.rate, base.total) == (0, None, 31.0)
    for row, stage in zip(trained, forgetful.stages[1:], strict=True):
        assert row.num_tokens == sum(info.num_tokens for info in stage.history)
        assert row.rate == row.num_tokens / sum(info.seconds for info in stage.history)
    assert speed(stages({})) == []
