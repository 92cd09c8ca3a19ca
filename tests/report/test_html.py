import dataclasses
import itertools
import math
import re
from html.parser import HTMLParser

import pytest

from retain.errors import UserError
from retain.report.html import MAX_EXAMPLES, render_html, write_report
from retain.report.summary import Summary

VOID = {"meta", "br", "hr", "img", "input", "link", "line", "circle", "path", "rect"}


class Page(HTMLParser):
    """Parses a page, keeps its elements and texts, and fails on a tag that does not close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[\s\u202f\u00a0]+", " ", " ".join(self.texts))

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.elements if attrs.get("id")]


def number(value: float, digits: int, *, signed: bool = False) -> str:
    text = f"{value:+.{digits}f}" if signed and value else f"{value:.{digits}f}"
    return text.replace("-", "−")


@pytest.fixture(scope="module")
def single(forgetful) -> Page:
    return Page(render_html([forgetful]))


@pytest.fixture(scope="module")
def double(forgetful, protected) -> Page:
    return Page(render_html([forgetful, protected]))


def test_it_is_a_small_file_that_loads_nothing(forgetful, protected, tmp_path):
    path = write_report([forgetful], tmp_path / "deep" / "er" / "report.html")
    assert path.stat().st_size < 400_000
    assert write_report([forgetful, protected, protected], tmp_path).stat().st_size < 1_000_000
    assert (tmp_path / "report.html").exists()
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert not re.search(r"\b(?:src|href|srcset|action|data|poster)\s*=\s*[\"']?[^#\"'\s]", page)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<iframe|<img|\son\w+=", page)
    assert "http" not in page.replace("http-equiv", "")
    policy = next(attrs for tag, attrs in Page(page).elements if tag == "meta" and attrs.get("http-equiv"))
    assert "default-src 'none'" in policy["content"]


def test_the_same_records_make_the_same_page(forgetful):
    assert render_html([forgetful]) == render_html([forgetful])


def test_links_and_ids_hold(double):
    ids = double.ids()
    assert len(ids) == len(set(ids))
    targets = {attrs["href"].removeprefix("#") for tag, attrs in double.elements if tag == "a"}
    assert targets
    assert targets <= set(ids)


def test_sections_in_order(single):
    ids = [name.removeprefix("run0-") for name in single.ids() if name.startswith("run0-")]
    assert ids == ["matrix", "lost", "learned", "abilities", "examples", "loss", "speed", "provenance"]


def test_headings_step_down_by_one(single, double):
    for page in (single, double):
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_every_score_is_on_the_page(single, forgetful):
    for stage in forgetful.stages:
        for task in forgetful.tasks:
            score = stage.scores[task]
            cell = f"{number(100 * score.value, 1)} {number(100 * score.low, 1)}–{number(100 * score.high, 1)}"
            assert cell in single.text


def test_key_figures_and_their_intervals_are_those_computed(single, forgetful):
    figures = Summary(forgetful).figures
    for key in ("average_accuracy", "backward_transfer", "forgetting", "probes", "kl"):
        figure = figures[key]
        scale, digits = (1, 3 if key == "kl" else 2) if figure.unit == "nats" else (100, 1)
        signed = key not in ("average_accuracy", "kl")
        ends = (figure.value, figure.interval.low, figure.interval.high)
        value, low, high = (number(scale * end, digits, signed=signed) for end in ends)
        joint = " to " if signed else "–"
        assert f"{value} {figure.unit} {low}{joint}{high}" in single.text


def test_losses_and_abilities_are_those_computed(single, forgetful):
    summary = Summary(forgetful)
    for shift in (*summary.lost, *summary.learned, *summary.abilities, summary.probes):
        scale, digits = (1, 2) if shift.unit == "nats" else (100, 1)
        ends = (shift.value, shift.interval.low, shift.interval.high)
        value, low, high = (number(scale * end, digits, signed=True) for end in ends)
        assert f"{value} {shift.unit} {low} to {high}" in single.text
    assert "within noise" in single.text
    assert "worse" in single.text


def test_examples_are_capped_and_counted(single, forgetful):
    change = Summary(forgetful).lost[0].change
    assert len(change.lost) > MAX_EXAMPLES["lost"]
    assert f"{len(change.lost)} of 200: right when it was learned, wrong now" in single.text
    assert f"{len(change.lost) - MAX_EXAMPLES['lost']} more in answers.jsonl." in single.text
    old, new = change.lost[0]
    for text in (old.prompt, new.expected, old.answer, new.answer):
        assert text in single.text


def test_provenance_speed_and_settings(single, forgetful):
    history = forgetful.stages[1].history
    tokens = sum(info.num_tokens for info in history)
    assert f"{tokens:,}".replace(",", " ") in single.text
    assert f"{tokens / sum(info.seconds for info in history):,.0f}".replace(",", " ") in single.text
    for text in (
        "smollm2-135m",
        "versions.torch 2.13.0",
        "train.learning_rate 0.0002 recipe",
        "dequantised from 4 bits",
    ):
        assert text in single.text
    assert str(forgetful.stages[1].provenance["data_hash"]) in single.text


def test_pictures_have_names(single, double):
    for page, least in ((single, 3), (double, 8)):
        pictures = [attrs for tag, attrs in page.elements if tag == "svg"]
        named = [attrs for attrs in pictures if attrs.get("role") == "img"]
        assert len(named) >= least
        assert all(attrs.get("role") == "img" or attrs.get("aria-hidden") == "true" for attrs in pictures)
        assert sum(tag == "title" for tag, _ in page.elements) == len(named) + 1


def test_a_comparison_shows_both_and_folds_the_rest(double, forgetful, protected):
    assert "2 runs compared" in double.text
    for record in (forgetful, protected):
        for figure in Summary(record).figures.values():
            if figure.key in ("average_accuracy", "learning_accuracy", "backward_transfer", "probes"):
                assert re.sub(r"[\s\u202f]+", " ", f"{figure.text} {figure.range}") in double.text
    assert "B kept more of its old tasks than A." in double.text
    assert sum(tag == "details" and attrs.get("class") == "run" for tag, attrs in double.elements) == 2
    assert "Old tasks kept" in double.text
    assert "General abilities kept" in double.text


def test_many_runs_make_a_table(build_record):
    lost, kept = (build_record({"a": (0.0, 0.9, now), "b": (0.0, 0.0, 0.9)}, num=40, num_steps=0) for now in (0.1, 0.9))
    page = Page(render_html([lost, kept, kept, kept]))
    assert "4 runs compared" in page.text
    assert "D kept more of its old tasks than A." in page.text


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b[31m\x07\u202egnp.exe\ud800&\"' {{ 7*7 }} http://x.example"


@pytest.fixture(scope="module")
def hostile_record(forgetful):
    stages = tuple(
        dataclasses.replace(
            stage,
            name=f"{HOSTILE}{stage.name}" if stage.index else "base",
            scores={f"{HOSTILE}{k}" if k in forgetful.tasks else k: v for k, v in stage.scores.items()},
            answers=tuple(
                dataclasses.replace(
                    answer,
                    suite=f"{HOSTILE}{answer.suite}" if answer.suite in forgetful.tasks else answer.suite,
                    prompt=HOSTILE,
                    expected=" ",
                    answer="" if i % 2 else HOSTILE + "A" * 50_000,
                )
                for i, answer in enumerate(stage.answers)
            ),
            provenance={
                HOSTILE: HOSTILE,
                "list": [HOSTILE],
                "settings": {HOSTILE: {"value": HOSTILE, "source": HOSTILE}},
            },
        )
        for stage in forgetful.stages
    )
    tasks = tuple(f"{HOSTILE}{task}" for task in forgetful.tasks)
    return dataclasses.replace(
        forgetful,
        title=HOSTILE,
        model=HOSTILE,
        method=HOSTILE,
        strategy=HOSTILE,
        tasks=tasks,
        stages=stages,
        notes=(HOSTILE,),
    )


@pytest.mark.parametrize("num", [1, 2])
def test_foreign_text_is_text(hostile_record, num):
    page = render_html([hostile_record] * num)
    page.encode("utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]", page)
    parsed = Page(page)
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>␀␛[31m" in parsed.text
    assert "{{ 7*7 }}" in parsed.text
    assert not any(name.startswith("on") for _, attrs in parsed.elements for name in attrs)
    assert all(
        value.startswith("#")
        for _, attrs in parsed.elements
        for name, value in attrs.items()
        if name in ("src", "href")
    )
    assert "empty" in parsed.text
    assert "more characters)" in parsed.text
    assert len(page) < num * 600_000


def test_right_to_left_names_are_isolated(build_record):
    page = render_html([build_record({"مهمة": (0.0, 0.9, 0.2), "b": (0.0, 0.0, 0.9)}, num=20)])
    assert "<bdi>مهمة</bdi>" in page
    assert (
        len(re.findall("<bdi>[^<]*مهمة", page))
        + len(re.findall('title="مهمة"', page))
        + len(re.findall("<dd[^>]*>مهمة|⟦مهمة", page))
        > 3
    )
    assert 'dir="auto"' in page


NAN = math.nan
EDGES = {
    "one task": {"levels": {"desk": (0.0, 0.9)}},
    "base only": {"levels": {"desk": (0.0,)}},
    "nothing learned": {"levels": {"desk": (0.0, 0.0, 0.0), "menus": (0.0, 0.0, 0.0)}},
    "no probes": {"num_probes": 0},
    "short history": {"num_steps": 5},
    "bare": {"levels": {"desk": (0.0, 0.9)}, "num_probes": 0, "num_steps": 0, "notes": (), "provenance": {}},
    "one step": {"num_steps": 1},
    "continued": {"levels": {"desk": (0.0, 0.9, 0.7), "late": (NAN, NAN, 0.9)}},
    "joint": {"levels": {"desk": (0.0, 0.9), "menus": (0.0, 0.9)}, "stages": ["base", "joint"]},
    "perplexity": {
        "levels": {"wiki": (0.2, 0.8, 0.6), "b": (0.1, 0.1, 0.9)},
        "metrics": {"wiki": "perplexity", "b": "perplexity"},
    },
    "mixed": {"levels": {"desk": (0.0, 0.9, 0.7), "wiki": (0.2, 0.2, 0.8)}, "metrics": {"wiki": "perplexity"}},
    "unicode": {"levels": {"Đặt bàn 🍜": (0.0, 0.9, 0.7), "東京": (0.0, 0.0, 0.9)}, "title": "Hà Nội"},
    "twelve": {"levels": {f"t{j}": tuple(0.9 if s > j else 0.0 for s in range(13)) for j in range(12)}, "num": 10},
    "one example": {"num": 1, "num_probes": 1},
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_render(build_record, name):
    record = build_record(**({"num": 20, "num_probes": 6, "num_steps": 0} | EDGES[name]))
    alone, beside = Page(render_html([record])), Page(render_html([record, record]))
    for page in (alone, beside):
        assert "None" not in page.text
        assert not re.search(r"\bnan\b", page.text)
        assert "not a number" not in page.text


def test_lower_is_better_is_said_and_a_rise_is_worse(build_record):
    record = build_record(num=40, num_probes=0, **EDGES["perplexity"])
    text = Page(render_html([record])).text
    assert "perplexity, lower is better" in text
    shift = Summary(record).lost[0]
    assert shift.after.value > shift.before.value
    assert f"{number(shift.value, 2, signed=True)} nats" in text
    assert "worse" in text


def test_a_corpus_figure_that_is_no_mean_is_marked(forgetful):
    stages = tuple(
        dataclasses.replace(
            s, scores={**s.scores, "desk": dataclasses.replace(s.scores["desk"], value=s.scores["desk"].value * 0.5)}
        )
        for s in forgetful.stages
    )
    page = Page(render_html([dataclasses.replace(forgetful, stages=stages)]))
    assert "of the mean over examples" in page.text
    assert "a mean over examples: some metric here is another over the whole set" in page.text


def test_nothing_to_report_is_an_error(forgetful, tmp_path):
    for records in ([], [dataclasses.replace(forgetful, stages=())]):
        with pytest.raises(UserError, match="no finished stage"):
            write_report(records, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
