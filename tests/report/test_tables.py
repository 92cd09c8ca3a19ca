import io
import re

import pytest
from rich.console import Console

from retain.report.summary import Summary
from retain.report.tables import abilities_table, comparison, losses_table, matrix_table, print_summary
from retain.report.wording import plain


def printed(*renderables, width=80, **options) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()


def summary_text(records, **options) -> str:
    console = Console(file=io.StringIO(), width=80, **options)
    print_summary(console, records)
    return console.file.getvalue()


def row(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_the_matrix_has_its_numbers_and_stars(forgetful):
    text = printed(matrix_table(forgetful))
    for i, stage in enumerate(forgetful.stages):
        expected = [
            f"{100 * stage.scores[task].value:.1f}" + ("*" if task == stage.name else "") for task in forgetful.tasks
        ]
        assert row(text, f"{i} {stage.name}").split()[2:] == expected
    assert "exact match" in text


def test_losses_have_interval_and_verdict_in_words(forgetful):
    text = printed(losses_table(forgetful))
    for shift in Summary(forgetful).lost:
        low, high = (f"{100 * end:+.1f}" for end in (shift.interval.low, shift.interval.high))
        assert f"{100 * shift.value:+.1f} points" in row(text, shift.label)
        assert re.search(rf"{re.escape(low)} to {re.escape(high)}\s+worse", row(text, shift.label))


def test_noise_is_a_word(build_record):
    record = build_record({"desk": (0.0, 0.9, 0.9), "menus": (0.0, 0.0, 0.9)}, drift=0.0)
    assert "within noise" in row(printed(losses_table(record)), "desk")
    assert "within noise" in row(printed(abilities_table(record)), "all abilities")


LONG = {
    f"a task with quite a long name, number {j}": tuple(0.9 if s > j else 0.0 for s in range(13)) for j in range(12)
}


def test_twelve_long_names_fit_80_columns(build_record):
    record = build_record(LONG, num=20, num_probes=4, num_steps=0)
    text = summary_text([record])
    assert max(map(len, text.splitlines())) <= 80
    own = record.stages[12].scores[record.tasks[11]].value
    assert row(text, "12 a task").split()[-1] == f"{100 * own:.0f}*"
    header = row(text, "after stage").split()
    assert header[2:] == [str(j) for j in range(1, 13)]


def test_more_tasks_than_fit_are_put_below(build_record):
    levels = {f"t{j}": tuple(0.9 if s > j else 0.0 for s in range(15)) for j in range(14)}
    text = printed(matrix_table(build_record(levels, num=10, num_probes=0, num_steps=0)))
    assert [line.split()[2:] for line in text.splitlines() if line.startswith("after stage")] == [
        [str(j) for j in range(1, 13)],
        ["13", "14"],
    ]


def test_orientation_is_said(build_record):
    metrics = {"wiki": "perplexity"}
    few = {"wiki": (0.2, 0.8, 0.6), "desk": (0.0, 0.0, 0.9)}
    assert "lower is better" in printed(matrix_table(build_record(few, metrics=metrics, num=10, num_probes=0)))
    many = {name: tuple(0.9 if s > j else 0.1 for s in range(6)) for j, name in enumerate(["wiki", *"abcd"])}
    text = printed(matrix_table(build_record(many, metrics=metrics, num=10, num_probes=0)))
    assert "perplexity (lower is better) in column 1" in text


@pytest.mark.parametrize("colour", [None, "truecolor"])
def test_no_meaning_by_colour_alone(forgetful, protected, colour):
    options = {"force_terminal": True, "color_system": colour} if colour else {}
    text = re.sub(r"\x1b\[[\d;]*m", "", summary_text([forgetful, protected], **options))
    assert text == summary_text([forgetful, protected])
    assert "B kept more of its old tasks than A." in " ".join(text.split())


def test_a_comparison_has_every_run_and_figure(forgetful, protected):
    text = printed(comparison([forgetful, protected]))
    for label, record in zip("AB", (forgetful, protected), strict=True):
        figures = Summary(record).figures
        line = row(text, f"{label}   ")
        for key in ("average_accuracy", "learning_accuracy", "backward_transfer", "probes", "kl"):
            assert plain(figures[key].text) in line
    assert max(map(len, text.splitlines())) <= 80


def test_a_terminal_is_never_commanded(build_record):
    hostile = "\x1b[31mred\x07[bold]x[/bold]\u202e\ud800"
    record = build_record({hostile: (0.0, 0.9, 0.2), "b": (0.0, 0.0, 0.9)}, title=hostile, notes=(hostile,), num=20)
    text = summary_text([record])
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]x[/bold]" in text
    text.encode()
    assert "\x1b" not in summary_text([record, record])


@pytest.mark.parametrize(
    "levels", [{"desk": (0.0,)}, {"desk": (0.0, 0.9)}, {"desk": (0.0, 0.0, 0.0), "b": (0.0, 0.0, 0.0)}]
)
def test_edges_print(build_record, levels):
    bare = build_record(levels, num_probes=0, num_steps=0, provenance={}, notes=())
    text = summary_text([bare])
    assert "Not measured" in text
    assert summary_text([bare, bare])
