from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from retain.config.fields import build, expected, plain, shown, suggestion
from retain.errors import ConfigError


@dataclass(frozen=True)
class Net:
    """A class with one field of each kind."""

    kind: ClassVar[str] = "net"

    width: int = 4
    rate: float = 0.5
    mode: Literal["fast", "slow"] = "fast"
    deep: bool = False
    limit: int | None = None
    labels: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict[str, str])
    folder: Path = Path("here")
    made: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width: expected a whole number above 0, got {self.width}")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate: expected a share between 0 and 1, got {self.rate}")
        if self.deep and self.mode == "fast":
            raise ValueError("a deep net is slow")


@dataclass(frozen=True)
class Named:
    name: str
    size: int = 1


def problems_of(cls: type, **given: object) -> list[str]:
    problems: list[str] = []
    build(cls, given, "$.net", problems)
    return problems


def test_given_fields_and_defaults():
    problems: list[str] = []
    given = {"width": 8, "rate": 1, "labels": ["a", "b"], "columns": {"x": "y"}, "folder": "there", "limit": None}
    assert build(Net, given, "$", problems) == Net(
        width=8, rate=1.0, labels=("a", "b"), columns={"x": "y"}, folder=Path("there")
    )
    assert problems == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"width": "eight"}, '$.net.width: expected a whole number above 0, got "eight"'),
        ({"width": 1.0}, "$.net.width: expected a whole number above 0, got 1.0"),
        ({"width": True}, "$.net.width: expected a whole number above 0, got true"),
        ({"width": -3}, "$.net.width: expected a whole number above 0, got -3"),
        ({"rate": "1e-4x"}, '$.net.rate: expected a share between 0 and 1, got "1e-4x"'),
        ({"mode": "quick"}, '$.net.mode: expected one of fast, slow, got "quick"'),
        ({"deep": "yes"}, '$.net.deep: expected true or false, got "yes"'),
        ({"deep": 1}, "$.net.deep: expected true or false, got 1"),
        ({"limit": "no"}, '$.net.limit: expected a whole number or null, got "no"'),
        ({"labels": "a"}, '$.net.labels: expected a list of text, got "a"'),
        ({"labels": [1]}, "$.net.labels: expected a list of text, got [1]"),
        ({"columns": []}, "$.net.columns: expected keys with values, got []"),
        ({"wdith": 3}, "$.net.wdith: unknown key. Did you mean `width`?"),
        (
            {"zzz": 3},
            "$.net.zzz: unknown key. Allowed: columns, deep, folder, labels, limit, mode, rate, width",
        ),
        ({"made": 3}, "$.net.made: unknown key. Did you mean `mode`?"),
        ({"kind": "x"}, "$.net.kind: unknown key. Allowed: columns, deep, folder, labels, limit, mode, rate, width"),
    ],
)  # fmt: skip
def test_a_problem_says_the_path_the_allowed_and_the_value(given: dict[str, object], says: str):
    assert problems_of(Net, **given) == [says]


def test_all_problems_are_found_at_once_those_of_the_class_too():
    assert problems_of(Net, width=0, rate=7, mode=3, depe=True) == [
        "$.net.depe: unknown key. Did you mean `deep`?",
        "$.net.mode: expected one of fast, slow, got 3",
        "$.net.width: expected a whole number above 0, got 0",
        "$.net.rate: expected a share between 0 and 1, got 7.0",
    ]


def test_fields_that_do_not_go_together():
    assert problems_of(Net, deep=True) == ["$.net: a deep net is slow"]


def test_a_missing_field():
    assert problems_of(Named, size="x") == [
        "$.net.name: missing; expected text",
        '$.net.size: expected a whole number, got "x"',
    ]


def test_an_error_of_ours_gives_all_its_lines():
    @dataclass(frozen=True)
    class Ours:
        """Collects its own problems."""

        a: int = 1
        b: int = 1

        def __post_init__(self) -> None:
            bad = [f"{n}: expected a whole number above 0, got {v}" for n, v in vars(self).items() if v < 1]
            if bad:
                raise ConfigError("cannot be", problems=bad)

    assert problems_of(Ours, a=0, b=-1) == [
        "$.net.a: expected a whole number above 0, got 0",
        "$.net.b: expected a whole number above 0, got -1",
    ]
    assert problems_of(Ours, b="x") == ['$.net.b: expected a whole number above 0, got "x"']


def test_types_in_words():
    assert expected(tuple[int, ...]) == "a list of a whole number"
    assert expected(str | None) == "text or null"
    assert expected(Path) == "a path"


def test_values_as_the_user_wrote_them():
    assert shown("Việt") == '"Việt"'
    assert len(shown(list(range(100)))) == 60
    assert suggestion("strenght", ["ratio", "strength"]) == "Did you mean `strength`?"
    assert suggestion("x", []) == "Allowed: none"


def test_plain_is_what_build_takes():
    net = Net(labels=("a",), columns={"x": "y"}, limit=3)
    written = plain(net)
    assert written["labels"] == ["a"]
    assert written["folder"] == "here"
    assert "made" not in written
    assert build(Net, written, "$", []) == net
