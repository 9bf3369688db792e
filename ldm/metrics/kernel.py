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
    return float(KernelReference(reference, seed).contributions(features, subset_size).mean())


class KernelReference:
    """Rows (M, D), M at least 2: what sets of rows are compared with. The seed cuts the subsets of both."""

    def __init__(self, reference: Tensor, seed: int = 0) -> None:
        self.rows, self.seed = as_rows(reference), seed
        self._within: dict[tuple[int, int], Tensor] = {}  # by the size of a subset and its number

    def contributions(self, features: Tensor, subset_size: int = SUBSET_SIZE) -> Tensor:
        """features (N, D) => float64 (n,), whose mean is the kernel distance: of the rows in a subset, in their order.

        A row's number is the distance of its subset plus the row's influence on it, the mean where that comes again.
        """
        a, b = as_rows(features), self.rows
        size = min(subset_size, len(a), len(b))
        if size < 2:
            raise ValueError(f"an unbiased kernel distance needs at least 2 rows of each set, not {size}")
        of_a, of_b = _subsets(len(a), size, self.seed), _subsets(len(b), size, self.seed + 1)
        near_own = [_near_own(a[rows]) for rows in of_a]
        rounds = max(1, min(MAX_SUBSETS, len(of_b)) // len(of_a))  # each row of a as often as any other
        found = torch.zeros(len(a), dtype=torch.float64)
        for number in range(rounds * len(of_a)):
            mine, other = number % len(of_a), number % len(of_b)
            near_other = _kernel(a[of_a[mine]], b[of_b[other]]).mean(1)
            found[of_a[mine]] += _influence(near_own[mine], near_other, self._own(of_b[other], other)) / rounds
        return found[torch.cat(of_a).sort().values]

    def _own(self, subset: Tensor, number: int) -> Tensor:
        """The mean kernel between two rows of the subset, kept: all sets of one size meet the same subsets."""
        key = len(subset), number
        if key not in self._within:
            self._within[key] = _near_own(self.rows[subset]).mean()
        return self._within[key]


def _influence(near_own: Tensor, near_other: Tensor, within_other: Tensor) -> Tensor:
    """=> (n,), whose mean is the unbiased MMD² of two subsets of n rows.

    Given means of the kernel: of each row with the others of its own subset (n,), with those of the other subset (n,);
    and of that one within itself.
    """
    distance = near_own.mean() + within_other - 2 * near_other.mean()
    influence = 2 * (near_own - near_other)
    return distance + influence - influence.mean()


def _near_own(rows: Tensor) -> Tensor:
    """Rows (n, D) => (n,), the mean kernel of each with the others."""
    own = _kernel(rows, rows)
    return (own.sum(1) - own.diag()) / (len(rows) - 1)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """(a·b / D + 1)³ of rows (n, D) and (m, D): (n, m)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _subsets(count: int, size: int, seed: int) -> tuple[Tensor, ...]:
    """Disjoint sets of `size` of the numbers 0 to count - 1, the rest left out."""
    if count == size:
        return (torch.arange(count),)
    order = torch.from_numpy(np.random.Generator(np.random.Philox(seed)).permutation(count))
    return order[: count // size * size].split(size)
