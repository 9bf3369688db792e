"""The sliced Wasserstein distance (Rabin et al. 2011; Bonneel et al. 2015): no network, so on pixels it is always at
hand. It sees colours, layout and contrast; it does not see what a picture shows."""

import torch
from torch import Tensor

from ldm import random
from ldm.metrics.rows import as_rows

NUM_PROJECTIONS = 256


def sliced_wasserstein(features: Tensor, reference: Tensor, seed: int = 0) -> float:
    """Squared 2-Wasserstein distance of rows (N, D) and rows (M, D), the mean over 256 directions that the seed gives.

    Squared units of a row's numbers: a shift of all rows by v gives |v|² / D about.
    """
    return float(sliced_wasserstein_contributions(features, reference, seed).mean())


def sliced_wasserstein_contributions(features: Tensor, reference: Tensor, seed: int = 0) -> Tensor:
    """features (N, D), reference (M, D) => float64 (N,), whose mean is the sliced Wasserstein distance.

    A row's number is the distance plus its Kantorovich potential (Santambrogio 2015, proposition 7.17: the first
    variation of the squared distance), centred.
    """
    rows, others = as_rows(features), as_rows(reference)
    if len(rows) < 2 or len(others) < 2:
        raise ValueError(f"a sliced distance needs at least 2 rows of each set, not {len(rows)} and {len(others)}")
    directions = random.normal(seed, "sliced-wasserstein", torch.arange(NUM_PROJECTIONS), 0, (rows.shape[1],)).double()
    directions = (directions / directions.norm(dim=1, keepdim=True)).T.to(rows.device)  # (D, P)
    values, order = (rows @ directions).sort(0)
    targets = _quantiles((others @ directions).sort(0).values, len(rows))
    costs = (values - targets).square().mean()
    # The potential's slope is twice the way that a value has to its target; between two rows, by the trapezoid rule.
    ways = values - targets
    steps = (values[1:] - values[:-1]) * (ways[1:] + ways[:-1])
    potential = torch.cat([torch.zeros_like(values[:1]), steps.cumsum(0)])
    potential = torch.empty_like(potential).scatter_(0, order, potential - potential.mean(0))  # back to their rows
    return costs + potential.mean(1)


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
