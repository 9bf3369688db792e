"""The sliced Wasserstein distance (Rabin et al. 2011; Bonneel et al. 2015): no network, so on pixels it is always at
hand. It sees colours, layout and contrast; it does not see what a picture shows."""

import torch
from torch import Tensor

from ldm import random
from ldm.metrics.rows import as_rows

NUM_PROJECTIONS = 256


class SlicedReference:
    """Rows (M, D), M at least 2, along 256 directions that the seed gives: what sets of rows are compared with."""

    def __init__(self, reference: Tensor, seed: int = 0) -> None:
        others = _rows(reference)
        directions = random.normal(seed, "sliced-wasserstein", torch.arange(NUM_PROJECTIONS), 0, (others.shape[1],))
        directions = directions.double()
        self.directions = (directions / directions.norm(dim=1, keepdim=True)).T.to(others.device)  # (D, P)
        self.ordered = (others @ self.directions).sort(0).values  # (M, P)

    def contributions(self, features: Tensor) -> Tensor:
        """features (N, D) => float64 (N,), whose mean is the sliced Wasserstein distance.

        A row's number is the distance plus its Kantorovich potential (Santambrogio 2015, proposition 7.17: the first
        variation of the squared distance), centred.
        """
        values, order = (_rows(features) @ self.directions).sort(0)
        # The potential's slope is twice the way of a value to its target; between two rows, by the trapezoid rule.
        ways = values - _quantiles(self.ordered, len(values))
        steps = (values[1:] - values[:-1]) * (ways[1:] + ways[:-1])
        potential = torch.cat([torch.zeros_like(values[:1]), steps.cumsum(0)])
        potential = torch.empty_like(potential).scatter_(0, order, potential - potential.mean(0))  # back to their rows
        return ways.square().mean() + potential.mean(1)


def sliced_wasserstein(features: Tensor, reference: Tensor, seed: int = 0) -> float:
    """Squared 2-Wasserstein distance of rows (N, D) and rows (M, D), the mean over 256 directions that the seed gives.

    Squared units of a row's numbers: a shift of all rows by v gives |v|² / D about.
    """
    return float(SlicedReference(reference, seed).contributions(features).mean())


def _rows(features: Tensor) -> Tensor:
    rows = as_rows(features)
    if len(rows) < 2:
        raise ValueError(f"a sliced distance needs at least 2 rows of each set, not {len(rows)}")
    return rows


def _quantiles(ordered: Tensor, count: int) -> Tensor:
    """Sorted columns (M, P) => their quantiles at (i + ½) / count, linear between neighbours: (count, P).

    For count = M the very values.
    """
    last = len(ordered) - 1
    at = ((torch.arange(count, dtype=torch.float64, device=ordered.device) + 0.5) * len(ordered) / count - 0.5).clamp(
        0, last
    )
    low = at.floor().long()
    share = (at - low)[:, None]
    return ordered[low] * (1 - share) + ordered[(low + 1).clamp_max(last)] * share
