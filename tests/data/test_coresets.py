"""Herding against brute force, Lloyd's algorithm against clusters that are plain to see."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from retain.data.coresets import central, herding, kmeans


def draw(num: int, width: int = 3, *, seed: int = 0) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def by_hand(features: Tensor, num: int) -> list[int]:
    """iCaRL's algorithm 4, word for word."""
    rows = (features.double().T / features.double().norm(dim=-1)).T
    mean = sum(rows) / len(rows)
    chosen: list[int] = []
    for k in range(1, num + 1):
        left = [i for i in range(len(rows)) if i not in chosen]
        errors = {i: float((mean - sum(rows[j] for j in [*chosen, i]) / k).norm()) for i in left}
        chosen.append(min(left, key=errors.__getitem__))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_herding_is_the_papers_algorithm(seed: int) -> None:
    features = draw(17, seed=seed)
    assert herding(features, 17) == by_hand(features, 17)
    assert herding(features, 6) == herding(features, 17)[:6]


def test_the_mean_of_a_few_is_near_the_mean_of_all() -> None:
    rows = torch.nn.functional.normalize(draw(200, 8), dim=-1)
    herded = float((rows[herding(rows, 10)].mean(0) - rows.mean(0)).norm())
    draws = [torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:10] for seed in range(50)]
    random = [float((rows[chosen].mean(0) - rows.mean(0)).norm()) for chosen in draws]
    assert herded < 0.7 * min(random)


def test_herding_of_more_than_there_are() -> None:
    assert sorted(herding(draw(4), 9)) == [0, 1, 2, 3]
    assert herding(draw(4), 0) == []


def blobs(sizes: list[int]) -> Tensor:
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    return torch.cat([corners[i] + 0.1 * draw(size, 2, seed=i) for i, size in enumerate(sizes)])


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_clusters_that_are_plain_to_see(seed: int) -> None:
    rows = blobs([5, 20, 10, 8])
    centres, cluster = kmeans(rows, 4, seed=seed)
    parts = rows.double().split([5, 20, 10, 8])
    means = torch.stack([part.mean(0) for part in parts])
    assert any(torch.allclose(centres[list(order)], means) for order in permutations(range(4)))
    assert [len(set(part.tolist())) for part in cluster.split([5, 20, 10, 8])] == [1, 1, 1, 1]


def test_kmeans_ends_where_every_row_has_its_nearest_mean() -> None:
    rows = draw(100)
    centres, cluster = kmeans(rows, 7, seed=0)
    assert torch.equal(cluster, torch.cdist(rows.double(), centres).argmin(1))
    for i in range(7):
        torch.testing.assert_close(centres[i], rows.double()[cluster == i].mean(0))


def test_kmeans_depends_on_its_seed_alone() -> None:
    state = torch.get_rng_state()
    one, other = kmeans(draw(50), 5, seed=3), kmeans(draw(50), 5, seed=3)
    assert torch.equal(one[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_central_rows_are_nearest_to_the_means_of_the_largest_clusters_first() -> None:
    sizes = [5, 20, 10, 8]
    rows = blobs(sizes)
    nearest = [
        sum(sizes[:i]) + int((part - part.mean(0)).norm(dim=-1).argmin())
        for i, part in enumerate(rows.double().split(sizes))
    ]
    assert central(rows, 4, seed=0) == [nearest[1], nearest[2], nearest[3], nearest[0]]


def test_equal_rows_do_not_leave_places_empty() -> None:
    rows = torch.ones(6, 3)
    assert len(set(central(rows, 4, seed=0))) == 4
    assert central(rows, 0, seed=0) == []
    assert sorted(central(rows, 9, seed=0)) == list(range(6))
