import inspect

import pytest

from retain import errors
from retain.errors import BudgetExceeded, ConfigError, DataError, LineageError, RetainError, UserError

CLASSES = [getattr(errors, name) for name in errors.__all__]


def test_an_error_reads_as_three_parts() -> None:
    error = DataError("a.jsonl has 2 problems", problems=["row 1: empty", "row 3: no label"], hint="mend them")
    assert str(error) == "a.jsonl has 2 problems\n  row 1: empty\n  row 3: no label\nhint: mend them"
    assert (error.message, error.problems, error.hint) == (
        "a.jsonl has 2 problems",
        ("row 1: empty", "row 3: no label"),
        "mend them",
    )


def test_parts_that_are_not_there_leave_no_trace() -> None:
    assert str(LineageError("no")) == "no"
    assert str(LineageError("no", hint="look")) == "no\nhint: look"


@pytest.mark.parametrize("cls", CLASSES)
def test_exit_codes(cls: type[RetainError]) -> None:
    expected = 3 if cls is BudgetExceeded else 2 if issubclass(cls, UserError) else 1
    assert cls("x").exit_code == expected


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert not issubclass(BudgetExceeded, UserError)
    for cls in CLASSES:
        assert issubclass(cls, RetainError)
        assert cls.__name__ in (inspect.getdoc(errors) or "")


def test_one_clause_catches_all_of_a_user() -> None:
    with pytest.raises(UserError):
        raise ConfigError("x")
