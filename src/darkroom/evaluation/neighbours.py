"""Nearest neighbours among features, and the precision and recall that rest on them.

Distances come from matrix products, a block of both sets at a time, and every one that decides something is taken again
by subtraction. |a|² + |b|² - 2ab alone loses near copies: what is left of the difference is rounding.
"""

import torch
from torch import Tensor

QUERIES, REFERENCES = 2048, 4096  # rows of both sets that are float64 at a time
SPARE = 4  # candidates beyond the k nearest, for what rounding may have put in the wrong order


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """The Euclidean distance of each query from the nearest reference, and which that is.

    Takes features (N, F) and (M, F) of any floating dtype, memory maps included. Returns float64 (N,) and int64 (N,);
    of references that are equally near, any. Copies have a distance of exactly 0. Raises ValueError if a set is empty,
    F differs or a feature is not finite.
    """
    distances, index = _nearest(queries, references, 1, same=False)
    return distances[:, 0], index[:, 0]


class Manifold:
    """What a set of images covers: balls around their features that reach to the k-th nearest neighbour.

    Kynkäänniemi 2019, eq. 1. An image is not its own neighbour, but its copies are.
    """

    def __init__(self, features: Tensor, k: int = 3) -> None:
        """`features` are (N, F). Raises ValueError unless 1 <= k < N and all are finite."""
        if not 1 <= k < len(features):
            raise ValueError(f"expected at least k + 1 = {k + 1} images and k >= 1, got {len(features)} images")
        self.features = features
        self.k = k
        self.radii = _nearest(features, features, k, same=True)[0][:, -1]  # float64 (N,)
        self._centre = _mean(features)

    def contains(self, points: Tensor) -> Tensor:
        """Whether each of `points` (M, F) lies in one of the balls, its surface included: bool (M,)."""
        _check(points, self.features)
        return torch.cat([self._contains(points[i : i + QUERIES].double()) for i in range(0, len(points), QUERIES)])

    def _contains(self, points: Tensor) -> Tensor:
        inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
        centred = points - self._centre
        for start in range(0, len(self.features), REFERENCES):
            outside = torch.nonzero(~inside)[:, 0]
            if not len(outside):
                break
            block = self.features[start : start + REFERENCES].double()
            radii = self.radii[start : start + REFERENCES]
            margin = _squared_lower_bound(centred[outside], block - self._centre) - radii**2
            while len(outside):  # the likeliest ball of each point first; nearly always that one decides
                lowest, ball = margin.min(1)
                outside, ball, margin = (kept[lowest <= 0] for kept in (outside, ball, margin))
                found = _distance(points[outside], block[ball]) <= radii[ball]
                inside[outside[found]] = True
                margin.scatter_(1, ball[:, None], torch.inf)
                outside, margin = outside[~found], margin[~found]
        return inside


def precision_recall(real: Manifold, generated: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi 2019, eq. 2) of generated features (M, F).

    Precision is the share of generated images within the manifold of real ones, recall the share of real images within
    that of generated ones, with the same k. Raises ValueError if M <= k.
    """
    precision = real.contains(generated).double().mean().item()
    recall = Manifold(generated, real.k).contains(real.features).double().mean().item()
    return precision, recall


def _nearest(queries: Tensor, references: Tensor, k: int, *, same: bool) -> tuple[Tensor, Tensor]:
    """Distances float64 (N, k), ascending, and indices int64 (N, k). Of the `same` set, an image is not its own."""
    _check(queries, references)
    centre = _mean(references)
    candidates = min(k + SPARE, len(references) - same)
    distances, indices = [], []
    for first in range(0, len(queries), QUERIES):
        query = queries[first : first + QUERIES].double()
        centred = query - centre
        best = query.new_empty((len(query), 0))
        index = torch.empty((len(query), 0), dtype=torch.int64, device=query.device)
        for start in range(0, len(references), REFERENCES):
            squared = _squared_lower_bound(centred, references[start : start + REFERENCES].double() - centre)
            if same:
                squared.diagonal(first - start).fill_(torch.inf)
            block, column = squared.topk(min(candidates, squared.shape[1]), dim=1, largest=False, sorted=False)
            best, index = torch.cat((best, block), 1), torch.cat((index, column + start), 1)
            best, chosen = best.topk(min(candidates, best.shape[1]), dim=1, largest=False, sorted=False)
            index = index.gather(1, chosen)
        exact = torch.stack([_distance(query, references[column].double()) for column in index.unbind(1)], 1)
        exact, order = exact.sort(1)
        distances.append(exact[:, :k])
        indices.append(index.gather(1, order)[:, :k])
    return torch.cat(distances), torch.cat(indices)


def _squared_lower_bound(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (N, M) of float64 (N, F) and (M, F), too small by what rounding can make of them, never larger.

    The bound is that of an inner product of F terms, on both norms and on the product (Higham 2002, eq. 3.5).
    """
    rounding = (a.shape[1] + 8) * torch.finfo(torch.float64).eps
    of_a, of_b = ((1 - rounding) * x.square().sum(1) for x in (a, b))
    return torch.addmm(of_b, a, b.T, alpha=-2).add_(of_a[:, None])


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Of the rows of float64 (N, F) and (N, F), by subtraction."""
    return (a - b).square_().sum(1).sqrt_()


def _mean(features: Tensor) -> Tensor:
    """Float64 (F,). A block at a time: torch would make a float64 copy of all first."""
    total = torch.stack([part.double().sum(0) for part in torch.split(features, REFERENCES)]).sum(0)
    return total / len(features)


def _check(queries: Tensor, references: Tensor) -> None:
    for name, features in (("queries", queries), ("references", references)):
        if features.ndim != 2 or not len(features) or features.shape[1] != references.shape[1]:
            shapes = f"{tuple(queries.shape)} and {tuple(references.shape)}"
            raise ValueError(f"expected features (N, F) and (M, F), at least one each, got {shapes}")
        if not all(bool(torch.isfinite(part).all()) for part in torch.split(features, REFERENCES)):
            raise ValueError(f"the features of the {name} are not all finite")
