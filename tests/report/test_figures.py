import dataclasses
import math
import re
import xml.etree.ElementTree as ET

import pytest

from retain.evaluation.statistics import Interval
from retain.report.figures import NUM_DRAWN, Point, Scale, loss_curves, smoothed, trade_off, whisker


def parsed(svg) -> ET.Element:
    return ET.fromstring(str(svg))


def texts(svg) -> list[str]:
    return ["".join(node.itertext()) for node in parsed(svg).iter("text")]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (-0.95, -0.87, (-0.8, -0.6, -0.4, -0.2, 0.0)),
        (0.0, 1.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        (-2.2, 0.07, (-2.0, -1.5, -1.0, -0.5, 0.0)),
        (0.0, 0.345, (0.0, 0.1, 0.2, 0.3)),
    ],
)
def test_a_scale_holds_zero_and_has_few_round_ticks(low, high, ticks):
    scale = Scale.of([Interval((low + high) / 2, low, high, 10)])
    assert scale.ticks == pytest.approx(ticks)
    assert scale.low < min(low, 0.0)
    assert scale.high > max(high, 0.0)


def test_a_scale_of_nothing_is_a_scale():
    scale = Scale.of([Interval(0.0, 0.0, 0.0, 10)])
    assert scale.low < 0.0 < scale.high


def test_a_whisker_stands_where_its_numbers_are():
    scale = Scale(-1.0, 1.0, (0.0,))
    svg = parsed(whisker(Interval(-0.5, -0.6, -0.2, 9), scale, "lost"))
    assert svg.find("circle").get("cx") == "25.00%"
    assert {(line.get("x1"), line.get("x2")) for line in svg.findall("line")} == {
        ("50.00%", "50.00%"),
        ("20.00%", "40.00%"),
        ("20.00%", "20.00%"),
        ("40.00%", "40.00%"),
    }
    assert svg.get("class") == "whisker lost"


def test_the_running_mean_is_unbiased():
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    first, second, third = smoothed([1.0, 2.0, 4.0])
    decay = 2 / 3
    assert first == 1.0
    assert second == pytest.approx((decay * 1 + 2) / (decay + 1))
    assert third == pytest.approx((decay**2 * 1 + decay * 2 + 4) / (decay**2 + decay + 1))


def num_lines(svg) -> int:
    return sum("mark-line" in (node.get("class") or "") for node in parsed(svg).iter("g"))


def test_loss_curves_have_raw_smoothed_validation_and_penalty(forgetful, protected):
    plain = loss_curves(forgetful.stages[1].history, title="t")
    assert num_lines(plain) == 2
    assert num_lines(loss_curves(protected.stages[1].history, title="t")) == 3
    symbols = [node for node in parsed(plain).iter("g") if "mark-symbol" in (node.get("class") or "")]
    assert len(symbols[0].findall("path")) == sum(i.validation_loss is not None for i in forgetful.stages[1].history)


def test_a_long_history_is_thinned(forgetful):
    info = forgetful.stages[1].history[0]
    long = [dataclasses.replace(info, step=i + 1, loss=3.0, validation_loss=None) for i in range(5000)]
    svg = loss_curves(long, title="t")
    lines = [node for node in parsed(svg).iter("path") if (node.get("stroke") or "").startswith("var(")]
    assert all(node.get("d").count("L") < NUM_DRAWN for node in lines)
    assert len(svg) < 20_000


def test_a_diverged_history_is_drawn(forgetful):
    history = [
        dataclasses.replace(info, loss=math.nan if info.step > 3 else info.loss) for info in forgetful.stages[1].history
    ]
    assert num_lines(loss_curves(history, title="t")) == 2
    parsed(loss_curves(history[:1], title="t"))
    parsed(loss_curves([dataclasses.replace(history[0], loss=math.nan, validation_loss=None)], title="t"))


def points(*labels):
    return [
        Point(label, Interval(-70.0 + i, -75.0, -60.0, 9), Interval(90.0 + i, 88.0, 97.0, 9))
        for i, label in enumerate(labels)
    ]


def test_the_trade_off_names_its_runs_and_axes():
    svg = trade_off(
        points("A", "B", "C"), x_title="old", y_title="new", least=(20.0, 20.0), is_share=True, title="told"
    )
    assert {"A", "B", "C", "old", "new"} <= set(texts(svg))
    assert parsed(svg).find("title").text == "told"
    labels = [float(text.replace("−", "-")) for text in texts(svg) if re.fullmatch(r"−?\d+(\.\d+)?", text)]
    assert max(labels) <= 100.0


def test_a_small_difference_looks_small():
    svg = trade_off(points("A", "B"), x_title="x", y_title="y", least=(20.0, 60.0), is_share=False, title="t")
    labels = [float(text.replace("−", "-")) for text in texts(svg) if re.fullmatch(r"−?\d+(\.\d+)?", text)]
    assert max(labels) > 105.0  # beyond the data: at least 60 wide


def test_foreign_text_stays_text():
    hostile = "<script>alert(1)</script>\x00\x1b\ud800\uffff\u202e&\"'"
    svg = trade_off(points(hostile, "B"), x_title="x", y_title="y", least=(1.0, 1.0), is_share=False, title=hostile)
    assert "<script" not in svg
    assert "<script>" in parsed(svg).find("title").text
    assert any(text.startswith("<script>") for text in texts(svg))


def test_pictures_carry_the_page_colours_and_no_address(forgetful):
    svg = loss_curves(forgetful.stages[1].history, title="t")
    assert "var(--new)" in svg
    assert "http" not in svg
    assert parsed(svg).get("role") == "img"
    assert parsed(svg).get("viewBox")


def test_ids_differ_between_pictures_and_not_between_renderings(forgetful):
    first, second = (loss_curves(stage.history, title="t") for stage in forgetful.stages[1:3])
    ids = [set(re.findall(r'id="([^"]+)"', svg)) for svg in (first, second)]
    assert not ids[0] & ids[1]
    assert loss_curves(forgetful.stages[1].history, title="t") == first
