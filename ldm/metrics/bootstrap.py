"""Intervals by redrawing rows (Efron 1979)."""

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_AT_ONCE = 1 << 22
"""Redrawn numbers in memory at a time."""


def mean_interval(
    values: Tensor, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of values (N,) over redrawn values.

    The same for the same values, in the same order, and seed. It covers the choice of the rows that the values belong
    to, at this N, and nothing else: not the reference, not the training, not what a distance loses to a small N.
    """
    numbers = torch.as_tensor(values).to("cpu", torch.float64).numpy()
    if numbers.ndim != 1 or len(numbers) == 0:
        raise ValueError(f"an interval of a mean needs at least one value, (N,), not {tuple(numbers.shape)}")
    counts, rounds = _counts(len(numbers), num_resamples, seed), max(1, _AT_ONCE // len(numbers))
    sums = [counts[first : first + rounds].astype(np.float64) @ numbers for first in range(0, num_resamples, rounds)]
    return _percentiles(np.concatenate(sums) / len(numbers), confidence)


@functools.lru_cache(maxsize=4)
def _counts(count: int, num_resamples: int, seed: int) -> npt.NDArray[np.uint8]:
    """How often each of `count` values is drawn in each resample: (num_resamples, count).

    Kept, for all figures of as many rows have the same. More than 255 times never happens.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    drawn = np.empty((num_resamples, count), np.uint8)
    for row in drawn:
        row[:] = np.bincount(generator.integers(0, count, count), minlength=count)
    return drawn


def bootstrap_interval(
    values: Tensor,
    statistic: Callable[[Tensor], float | Tensor] = torch.mean,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of statistic(values) over redrawn rows of values (N, ...).

    The same for the same values, in the same order, and seed. It covers the choice of rows only, not the randomness of
    training. A distance rises when rows are repeated: for one `mean_interval` of its contributions is the better one.
    """
    values = torch.as_tensor(values).to(torch.float64)
    if len(values) == 0:
        raise ValueError("a bootstrap interval needs at least one value")
    generator = np.random.Generator(np.random.Philox(seed))
    draws = np.empty(num_resamples)
    for i in range(num_resamples):
        rows = torch.from_numpy(generator.integers(0, len(values), len(values)))
        draws[i] = float(statistic(values[rows.to(values.device)]))
    return _percentiles(draws, confidence)


def _percentiles(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
