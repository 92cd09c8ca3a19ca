"""Which rows an epoch leaves out. The mixture itself is held to its ratio in `tests/strategies/test_replay.py`."""

import random

import pytest

from retain.data.mixing import Mixture, left_out
from retain.types import Example


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_long_rows_are_left_out_as_often_as_short_ones(share: float) -> None:
    sizes = [1] * 500 + [20] * 25
    times = [0] * len(sizes)
    for seed in range(200):
        for index, out in enumerate(left_out(sizes, share=share, epoch=seed, generator=random.Random(seed))):
            times[index] += out
    assert sum(times[:500]) / 500 / 200 == pytest.approx(share, abs=0.02)
    assert sum(times[500:]) / 25 / 200 == pytest.approx(share, abs=0.03)


def test_the_draws_depend_on_the_key_and_the_epoch_alone() -> None:
    new, old = ([Example(id=f"{name} {i}", task=name) for i in range(30)] for name in ("new", "old"))
    mixture = Mixture(ratio=0.3)

    def mix(key: str, epoch: int) -> list[str]:
        return [row.id for row in mixture.mix(new, old, num_tokens=lambda _: 5, key=key, epoch=epoch)]

    assert mix("0/new", 0) == mix("0/new", 0)
    assert mix("0/new", 0) != mix("0/new", 1)
    assert mix("0/new", 0) != mix("1/new", 0)


def test_draws_are_those_of_earlier_versions() -> None:
    """A lineage goes on with the rows that it would have had."""
    new, old = ([Example(id=f"{name}{i}", task=name) for i in range(10)] for name in ("n", "o"))
    mixed = Mixture(ratio=0.2, budget="replace").mix(new, old, num_tokens=lambda _: 5, key="0/n", epoch=1)
    assert [row.id for row in mixed] == ["n0", "n2", "n3", "n5", "n6", "n7", "n8", "n9", "o3", "o0"]
