"""The kernel distance (KID): unbiased squared maximum mean discrepancy with the cubic kernel (Bińkowski et al. 2018).

Unlike the Fréchet distance its expectation does not depend on N: it may be negative, and is 0 on average between two
halves of one set. It is called KID only where the features are the usual Inception's.
"""

import numpy as np
import torch
from torch import Tensor

from ldm.metrics.rows import as_rows

SUBSET_SIZE, MAX_SUBSETS = 1000, 50


def kernel_distance(features: Tensor, reference: Tensor, subset_size: int = SUBSET_SIZE, seed: int = 0) -> float:
    """MMD² of rows (N, D) and rows (M, D): the mean over subsets of `subset_size` rows of each, fewer where N or M is.

    The subsets of a set are cut, by the seed, from a permutation of it, and are as many as the larger set has, at most
    50: those of the smaller one come again. A rest that fills no subset is left out.
    """
    return float(kernel_contributions(features, reference, subset_size, seed).mean())


def kernel_contributions(features: Tensor, reference: Tensor, subset_size: int = SUBSET_SIZE, seed: int = 0) -> Tensor:
    """=> float64 (n,), whose mean is the kernel distance: of the rows of features that are in a subset, in order.

    A row's number is the distance of its subset plus the row's influence on it, the mean where that comes again.
    """
    a, b = as_rows(features), as_rows(reference)
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise ValueError(f"an unbiased kernel distance needs at least 2 rows of each set, not {size}")
    of_a, of_b = (_subsets(len(rows), size, seed + side) for side, rows in enumerate((a, b)))
    rounds = max(1, min(MAX_SUBSETS, len(of_b)) // len(of_a))  # each row of a as often as any other
    found = torch.zeros(len(a), dtype=torch.float64)
    for number in range(rounds * len(of_a)):
        rows = of_a[number % len(of_a)]
        found[rows] += _influence(a[rows], b[of_b[number % len(of_b)]]) / rounds
    return found[torch.cat(of_a).sort().values]


def _influence(a: Tensor, b: Tensor) -> Tensor:
    """Rows (n, D) of each => (n,), whose mean is the unbiased MMD² of the two."""
    n = len(a)
    own_a, own_b, between = _kernel(a, a), _kernel(b, b), _kernel(a, b)
    near_own = (own_a.sum(1) - own_a.diag()) / (n - 1)
    near_other = between.mean(1)
    within_b = (own_b.sum() - own_b.trace()) / (n * (n - 1))
    distance = near_own.mean() + within_b - 2 * near_other.mean()
    influence = 2 * (near_own - near_other)
    return distance + influence - influence.mean()


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """(a·b / D + 1)³ of rows (n, D) and (m, D): (n, m)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _subsets(count: int, size: int, seed: int) -> tuple[Tensor, ...]:
    """Disjoint sets of `size` of the numbers 0 to count - 1, the rest left out."""
    if count == size:
        return (torch.arange(count),)
    order = torch.from_numpy(np.random.Generator(np.random.Philox(seed)).permutation(count))
    return order[: count // size * size].split(size)
