"""Figures on sets of pictures: pure functions of features, in float64.

Rows are samples. A row is whatever the caller measures in: the features of a named network, or raw pixels
(pictures are flattened here). No figure means anything without the name of its features and its N.

    N, M  rows of a set      D  numbers in a row
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

CHUNK_ROWS = 256  # of the smaller side of a distance matrix: 256 x 50,000 float64 distances take 100 MB


def gaussian_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of the rows of features (N, D), N at least 2."""
    rows = _rows(features)
    if len(rows) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, not {len(rows)}")
    mean = rows.mean(0)
    centred = rows - mean
    return mean, centred.T @ centred / (len(rows) - 1)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to rows (N, D) and rows (M, D) (Heusel et al. 2017, eq. 6).

    Squared units of the features. It is called FID only where the features are the usual Inception's.
    """
    return frechet_distance_of_gaussians(*gaussian_statistics(features_a), *gaussian_statistics(features_b))


def frechet_distance_of_gaussians(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """|m_a - m_b|² + tr(A + B - 2 (A B)^½) for means (D,) and covariances (D, D).

    tr (A B)^½ is the sum of the singular values of A^½ B^½: real and never negative, also for singular
    covariances (fewer rows than features), where an iterative matrix square root of A B goes astray.
    """
    mean_a, covariance_a, mean_b, covariance_b = (
        x.to(torch.float64) for x in (mean_a, covariance_a, mean_b, covariance_b)
    )
    root_product = _symmetric_root(covariance_a) @ _symmetric_root(covariance_b)
    cross = torch.linalg.svdvals(root_product).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(float(distance), 0.0)  # rounding may leave -1e-13 where the distance is 0


def knn_recall(real: Tensor, generated: Tensor, k: int = 5) -> float:
    """Share of the real rows that lie inside the k-NN manifold of the generated ones.

    Kynkäänniemi et al. 2019, eq. 2: the manifold is the union of balls around its rows, each reaching to the
    k-th nearest other row of the same set. It grows with the number of rows that span it, so recalls compare
    only at equal numbers of generated rows (`equal_class_counts`).
    """
    return float(inside_manifold(real, generated, k).double().mean())


def knn_precision(real: Tensor, generated: Tensor, k: int = 5) -> float:
    """Share of the generated rows inside the k-NN manifold of the real ones (Kynkäänniemi et al. 2019)."""
    return float(inside_manifold(generated, real, k).double().mean())


def inside_manifold(points: Tensor, manifold: Tensor, k: int = 5) -> Tensor:
    """Whether each row of points (N, D) lies inside the k-NN manifold of manifold (M, D): bool (N,)."""
    points, manifold = _rows(points), _rows(manifold)
    if not 1 <= k < len(manifold):
        raise ValueError(f"k={k} neighbours need a manifold of at least {k + 1} rows, not {len(manifold)}")
    # The nearest row of a set to one of its own is itself, at distance 0: hence k + 1.
    radii = torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(manifold, manifold)])
    return torch.cat([(d <= radii).any(1) for d in _distances(points, manifold)])


def within_class_recall(
    real: Tensor, real_labels: Tensor, generated: Tensor, generated_labels: Tensor, k: int = 5
) -> Tensor:
    """`knn_recall` inside each class: float64 (classes in real_labels,), in the order of the labels.

    A model that draws one picture for each class has perfect accuracy and a recall near 0. A class with k or
    fewer generated rows spans no manifold: its recall is 0.
    """
    recalls = []
    for label in torch.unique(real_labels).tolist():
        spanning = generated[generated_labels == label]
        recalls.append(knn_recall(real[real_labels == label], spanning, k) if len(spanning) > k else 0.0)
    return torch.tensor(recalls, dtype=torch.float64)


def equal_class_counts(labels_a: Tensor, labels_b: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices into two labelled sets that keep, of each class, as many rows of one as of the other.

    The larger side of a class is thinned at random by `seed`; a class that one side lacks is dropped. Two
    manifolds over these rows have the same number of points in each class, so that their recalls compare.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    kept_a: list[Tensor] = []
    kept_b: list[Tensor] = []
    for label in torch.unique(torch.cat([labels_a, labels_b])).tolist():
        rows_a, rows_b = ((labels == label).nonzero().flatten() for labels in (labels_a, labels_b))
        count = min(len(rows_a), len(rows_b))
        for rows, kept in ((rows_a, kept_a), (rows_b, kept_b)):
            chosen = torch.from_numpy(generator.permutation(len(rows))[:count])
            kept.append(rows[chosen.to(rows.device)].sort().values)
    return torch.cat(kept_a), torch.cat(kept_b)


def nearest_distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance from each row of a (N, D) to the nearest row of b (M, D): float64 (N,).

    With a the samples and b the training set it shows memorising, read beside the same for held-out rows.
    """
    a, b = _rows(a), _rows(b)
    if len(b) == 0:
        raise ValueError("no rows to be near to: b is empty")
    return torch.cat([d.min(1).values for d in _distances(a, b)])


def bootstrap_interval(
    values: Tensor,
    statistic: Callable[[Tensor], float | Tensor] = torch.mean,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of statistic(values) over redrawn rows of values (N, ...) (Efron 1979).

    The same for the same values, in the same order, and seed. It covers the choice of rows only, not the
    randomness of training.
    """
    values = torch.as_tensor(values).to(torch.float64)
    if len(values) == 0:
        raise ValueError("a bootstrap interval needs at least one value")
    generator = np.random.Generator(np.random.Philox(seed))
    draws = np.empty(num_resamples)
    for i in range(num_resamples):
        rows = torch.from_numpy(generator.integers(0, len(values), len(values)))
        draws[i] = float(statistic(values[rows.to(values.device)]))
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _rows(features: Tensor) -> Tensor:
    """Any (N, ...) tensor => float64 (N, D)."""
    if features.ndim < 2:
        raise ValueError(f"features must be one row for each sample, (N, D), not {tuple(features.shape)}")
    return features.flatten(1).to(torch.float64)


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Euclidean distances in blocks of rows of a: yields (CHUNK_ROWS, M).

    The fast form |a|² - 2ab + |b|² leaves 1e-7 between equal rows, which a ball of radius 0 (repeated
    samples) must not lose: differences are taken directly.
    """
    for block in a.split(CHUNK_ROWS):
        yield torch.cdist(block, b, compute_mode="donot_use_mm_for_euclid_dist")


def _symmetric_root(covariance: Tensor) -> Tensor:
    """Square root of a symmetric positive semidefinite matrix (D, D), directions below rounding cut to 0."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    noise = eigenvalues[-1].clamp_min(0) * len(eigenvalues) * torch.finfo(torch.float64).eps
    return vectors * torch.where(eigenvalues > noise, eigenvalues, 0.0).sqrt() @ vectors.T
