"""Labels by name: what a task may be answered with, and lists of labels as one answer."""

import pytest

from retain.data.labels import Labels, read_labels, write_labels

IDS = {"blue": 0, "green": 1, "dog": 2}


def test_where_labels_are_text_there_are_no_others() -> None:
    assert Labels().options("any", ["a", "b"]) == ["a", "b"]


def test_a_shared_head_may_answer_with_any_class() -> None:
    labels = Labels("single", IDS, {"colours": ("blue", "green"), "animals": ("dog",)})
    assert labels.options("colours", ["green", "blue"]) == ["green", "blue", "dog"]
    assert labels.options("new", ["cat"]) == ["cat", "blue", "green", "dog"]
    assert labels.rows("animals") == [2]
    assert labels.rows("unknown") == [0, 1, 2]


def test_a_tasks_own_head_answers_with_its_classes_only() -> None:
    labels = Labels("single", {"a/yes": 0, "a/no": 1, "b/no": 2}, {"a": ("yes", "no"), "b": ("no",)}, per_task=True)
    assert labels.options("b", ["no", "yes"]) == ["b/no", "b/yes"]
    assert labels.rows("b") == [2]


def test_a_list_of_labels_comes_back() -> None:
    assert read_labels(write_labels(["b", "a", "b"])) == ("a", "b")
    assert read_labels(write_labels([])) == ()
    assert write_labels(["màu"]) == '["màu"]'
    for wrong in ("a, b", '{"a": 1}', "[1]"):
        with pytest.raises(ValueError, match="label"):
            read_labels(wrong)
