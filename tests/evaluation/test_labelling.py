"""F1 of classes, sets and spans, by hand."""

import pytest

from retain.evaluation.labelling import corpus_tag_f1, label_f1, labels_flaw, macro_f1, spans, tag_accuracy, tag_f1


def test_the_f1_of_a_set() -> None:
    assert label_f1('["a", "b"]', ['["b", "c", "d"]']) == pytest.approx(2 * 1 / (2 + 3))
    assert label_f1("[]", ["[]"]) == 1.0
    assert label_f1('["a"]', ["[]"]) == 0.0
    assert label_f1("a", ['["a"]']) == 0.0
    assert label_f1('["a"]', ['["b"]', '["a"]']) == 1.0
    assert labels_flaw('["a"]') is None
    assert "no list" in (labels_flaw("a") or "")


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-x I-x O B-y", {("x", 0, 2), ("y", 3, 4)}),
        ("B-x B-x", {("x", 0, 1), ("x", 1, 2)}),
        ("I-x I-x O", {("x", 0, 2)}),
        ("B-x I-y", {("x", 0, 1), ("y", 1, 2)}),
        ("NOUN NOUN O", {("NOUN", 0, 1), ("NOUN", 1, 2)}),
        ("O O", set()),
        ("B-a-b I-a-b", {("a-b", 0, 2)}),
    ],
)
def test_spans_of_iob2(tags: str, expected: set[tuple[str, int, int]]) -> None:
    assert spans(tags.split()) == expected


def test_tags() -> None:
    assert tag_accuracy("O B-x O", ["O O O"]) == pytest.approx(2 / 3)
    assert tag_accuracy("O", ["O O"]) == 0.5
    assert tag_f1("B-x O B-x", ["B-x O O"]) == pytest.approx(2 / 3)
    found = corpus_tag_f1(["B-x O", "O O", "B-x I-x"], [["B-x O"], ["B-x O"], ["B-x O"]])
    assert found.mean == pytest.approx(2 * 1 / (2 + 3))
    assert found.num == 3
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_macro_f1_counts_every_class_alike() -> None:
    answers, right = ["a", "a", "a", "b", "c"], [["a"], ["a"], ["b"], ["b"], ["b"]]
    # a: 2 of 3 given and 2 wanted; b: 1 of 1 given and 3 wanted; c is wanted nowhere
    assert macro_f1(answers, right).mean == pytest.approx((2 * 2 / 5 + 2 * 1 / 4) / 2)
    assert macro_f1(["x"], [["y", "x"]]).mean == 1.0
