import io
from dataclasses import replace
from typing import Any

from rich.console import Console

from retain.report.distances import distances
from retain.report.html import render_html
from retain.report.tables import distances_table, print_summary
from retain.types import Record, StageRecord


def stage(index: int, *pairs: tuple[str, str, float]) -> StageRecord:
    entries: list[dict[str, Any]] = [
        {"tasks": [one, other], "nats": value, "low": value - 0.1, "high": value + 0.1, "rows": 9}
        for one, other, value in pairs
    ]
    return StageRecord(index, str(index), {}, provenance={"task_distances": entries} if entries else {})


def test_pairs_of_all_stages():
    found = distances([stage(0, ("a", "b", 0.5)), stage(1), stage(2, ("a", "c", 2.0), ("b", "c", 1.0))])
    assert found.tasks == ("a", "b", "c")
    assert found.between("c", "b") == found.between("b", "c")
    between = found.between("a", "b")
    assert between is not None
    assert (between.mean, between.low, between.high, between.num) == (0.5, 0.4, 0.6, 9)
    assert found.between("a", "a") is None
    assert [pair for pair, _ in found.farthest_first] == [("a", "c"), ("b", "c"), ("a", "b")]


def test_nothing_recorded():
    found = distances([stage(0)])
    assert (found.tasks, found.pairs) == ((), {})


def printed(record: Record) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_summary(console, [record])
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_page_and_terminal_show_them(forgetful: Record):
    title = "How far apart the tasks are"
    assert distances_table(forgetful) is None
    assert title not in printed(forgetful)
    assert title not in render_html([forgetful])
    first, *rest = forgetful.stages
    measured = {**first.provenance, **stage(0, ("desk", "menus", 1.25), ("desk", "<b>", 0.5)).provenance}
    record = replace(forgetful, stages=(replace(first, provenance=measured), *rest))
    text, page = printed(record), render_html([record])
    line = next(line for line in text.splitlines() if "1.250" in line)
    assert line.split()[:4] == ["desk", "menus", "1.250", "1.150-1.350"]
    assert page.count("1.250") == 2  # a matrix has each pair twice
    assert "&lt;b&gt;" in page
    assert title in page
    assert "task_distances" not in page
