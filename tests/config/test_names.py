import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import pytest

from retain.config.names import find, make, name_of, named


class Shape(Protocol):
    """What is asked for."""

    sides: ClassVar[int]

    def area(self) -> float:
        """Of the shape."""
        ...


@dataclass(frozen=True)
class Square:
    sides: ClassVar[int] = 4
    width: float = 1.0

    def area(self) -> float:
        return self.width**2


KNOWN = {"square": Square}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine_for_names.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Circle:\n    sides = 0\n    radius: float = 1.0\n    def area(self): return 3.14\n"
        "class Bare:\n    sides = 0\n    def area(self): return 0\n"
        "@dataclass\nclass Half:\n    sides = 0\n"
        "from abc import ABC, abstractmethod\n"
        "@dataclass\nclass Open(ABC):\n    sides = 0\n    @abstractmethod\n    def area(self): ...\n"
        "value = 3\n"
    )
    (tmp_path / "broken_for_names.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("mine_for_names", None)


def test_a_known_name_and_its_fields():
    problems: list[str] = []
    assert make({"name": "square", "width": 2}, KNOWN, Shape, "$.shape", problems) == Square(2.0)
    assert problems == []


@pytest.mark.usefixtures("mine")
def test_a_class_of_the_users_own():
    problems: list[str] = []
    circle = make({"name": "mine_for_names:Circle", "radius": 2}, KNOWN, Shape, "$.shape", problems)
    assert problems == []
    assert circle.radius == 2.0
    assert named(circle, KNOWN) == {"name": "mine_for_names:Circle", "radius": 2.0}
    assert name_of(Square, KNOWN) == "square"


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sqare", "$.shape: no shape `sqare`. Did you mean `square`?"),
        ("circle", "$.shape: no shape `circle`. Allowed: square"),
        ("nowhere_at_all:X", "$.shape: `nowhere_at_all` cannot be imported: ModuleNotFoundError"),
        ("broken_for_names:X", "$.shape: `broken_for_names` cannot be imported: ZeroDivisionError: division by zero"),
        ("mine_for_names:Nothing", "$.shape: `mine_for_names` has no class `Nothing`"),
        ("mine_for_names:value", "$.shape: `mine_for_names` has no class `value`"),
        ("mine_for_names:Bare", "$.shape: `mine_for_names:Bare` is no shape: it is not a dataclass"),
        ("mine_for_names:Half", "$.shape: `mine_for_names:Half` is no shape: it lacks area"),
        ("mine_for_names:Open", "$.shape: `mine_for_names:Open` is no shape: it lacks area"),
    ],
)
def test_what_cannot_be_found_is_said(name: str, says: str):
    problems: list[str] = []
    assert find(name, KNOWN, Shape, "$.shape", problems) is None
    assert len(problems) == 1
    assert problems[0].startswith(says)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (3, "$.shape: expected the name of a shape, or its name and fields, got 3"),
        ({"width": 1}, "$.shape.name: expected the name of a shape, got null. Allowed: square"),
        ({"name": "square", "widht": 1}, "$.shape.widht: unknown key. Did you mean `width`?"),
    ],
)
def test_what_is_no_choice_is_said(given: object, says: str):
    problems: list[str] = []
    make(given, KNOWN, Shape, "$.shape", problems)
    assert problems == [says]
