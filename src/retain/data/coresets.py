"""Which few rows stand for many, by where a network puts them."""

import torch
from torch import Tensor

__all__ = ["central", "herding", "kmeans"]

MAX_ITERATIONS = 100
"""Of Lloyd's algorithm; it stops before where no row changes its cluster."""


def herding(features: Tensor, num: int) -> list[int]:
    """Rows one by one, so that the mean of the first k is as near as possible to the mean of all, for every k.

        k-th row = argmin over those left of  || mean - (sum of those chosen + row) / k ||

    Rows are scaled to length 1 first. The first m of the result are what a call for m gives.

    Args:
        features: (rows, width).
        num: how many, at most all.

    Source: Rebuffi et al. 2017 (iCaRL), https://arxiv.org/abs/1611.07725, algorithm 4.
    """
    rows = torch.nn.functional.normalize(features.double(), dim=-1)
    mean, total = rows.mean(dim=0), torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    squares = rows.square().sum(dim=-1)
    chosen: list[int] = []
    for k in range(1, min(num, len(rows)) + 1):
        # || mean - (total + row) / k ||^2 without what all rows share
        distances = (squares + 2 * rows @ total) / k**2 - 2 * (rows @ mean) / k
        if chosen:
            distances[chosen] = torch.inf
        chosen.append(int(distances.argmin()))
        total += rows[chosen[-1]]
    return chosen


def kmeans(features: Tensor, num_clusters: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from a k-means++ start: (clusters, width) means, and (rows,) the cluster of each row.

    Args:
        features: (rows, width).
        num_clusters: at least 1, at most the number of rows.
        seed: all that the start depends on.

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007, k-means++.
    """
    rows = features.double()
    centres = _spread(rows, num_clusters, torch.Generator().manual_seed(seed))
    nearest = torch.full((len(rows),), -1, device=rows.device)
    for _ in range(MAX_ITERATIONS):
        distances = torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist")  # (rows, clusters)
        before, nearest = nearest, distances.argmin(dim=1)
        if torch.equal(nearest, before):
            break
        counts = torch.bincount(nearest, minlength=num_clusters)[:, None]  # (clusters, 1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)  # an empty cluster stays where it was
    return centres, nearest


def central(features: Tensor, num: int, *, seed: int) -> list[int]:
    """Of `num` clusters the row that is nearest to each one's mean, largest clusters first; `num` different rows.

    Args:
        features: (rows, width).
        num: how many, at most all.
        seed: of the clusters' start.
    """
    num = min(num, len(features))
    if not num:
        return []
    centres, cluster = kmeans(features, num, seed=seed)
    distances = (features.double() - centres[cluster]).norm(dim=-1)
    sizes = torch.bincount(cluster, minlength=num)
    heads: dict[int, int] = {}  # of each cluster
    order: list[int] = torch.argsort(distances, stable=True).tolist()
    for row in order:
        heads.setdefault(int(cluster[row]), row)
    chosen = sorted(heads.values(), key=lambda row: (-int(sizes[cluster[row]]), row))
    taken = set(chosen)
    return chosen + [row for row in order if row not in taken][: num - len(chosen)]  # equal rows leave clusters empty


def _spread(rows: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """k-means++: each centre is a row, drawn in proportion to its squared distance from the nearest one so far."""
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    squares = (rows - rows[chosen[0]]).square().sum(dim=-1)
    for _ in range(num - 1):
        weights = squares.cpu()
        if not bool((weights > 0).any()):  # every row is a centre already
            weights = torch.ones_like(weights)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        squares = torch.minimum(squares, (rows - rows[chosen[-1]]).square().sum(dim=-1))
    return rows[chosen]
