"""The Fréchet distance of fitted Gaussians (Heusel et al. 2017, eq. 6; Dowson and Landau 1982)."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ldm.metrics.rows import as_rows


@dataclass(frozen=True)
class Gaussian:
    """mean (D,) and covariance (D, D), float64, fitted to `count` rows."""

    mean: Tensor
    covariance: Tensor
    count: int

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance, directions below rounding cut to 0."""
        eigenvalues, vectors = torch.linalg.eigh(self.covariance)
        noise = eigenvalues[-1].clamp_min(0) * len(eigenvalues) * torch.finfo(torch.float64).eps
        return vectors * torch.where(eigenvalues > noise, eigenvalues, 0.0).sqrt() @ vectors.T


def fit_gaussian(features: Tensor) -> Gaussian:
    """Mean and unbiased covariance of the rows of features (N, D), N at least 2."""
    rows = as_rows(features)
    if len(rows) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, not {len(rows)}")
    mean = rows.mean(0)
    centred = rows - mean
    return Gaussian(mean, centred.T @ centred / (len(rows) - 1), len(rows))


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to rows (N, D) and rows (M, D).

    Squared units of the features. It is called FID only where the features are the usual Inception's.
    """
    return float(frechet_contributions(features_a, fit_gaussian(features_b)).mean())


def frechet_distance_of_gaussians(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """|m_a - m_b|² + tr(A + B - 2 (A B)^½) for means (D,) and covariances (D, D).

    tr (A B)^½ is the sum of the singular values of A^½ B^½: real and never negative, also for singular
    covariances (fewer rows than features), where an iterative matrix square root of A B goes astray.
    """
    a, b = (
        Gaussian(mean.double(), covariance.double(), 0)
        for mean, covariance in ((mean_a, covariance_a), (mean_b, covariance_b))
    )
    cross = torch.linalg.svdvals(a.root @ b.root).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)  # rounding may leave -1e-13 where the distance is 0


def frechet_contributions(features: Tensor, reference: Gaussian) -> Tensor:
    """features (N, D) => float64 (N,), whose mean is the Fréchet distance of the rows to the reference.

    A row's number is the distance plus the row's influence on it. With x the centred rows, B^½ the reference's root and
    x B^½ = U S Vᵀ / its scale, the derivative of -2 tr(A B)^½ in the direction x xᵀ is -Σ_k U_k² S_k. So all of it,
    the distance too, comes of one singular value decomposition of (N, D), exact also where N is less than D.
    """
    rows = as_rows(features)
    count = len(rows)
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 rows, not {count}")
    mean = rows.mean(0)
    centred = rows - mean
    # The rows of U are wanted; of a tall matrix its triangle is decomposed, (D, D).
    u, s = _left_singular(centred @ reference.root / (count - 1) ** 0.5)
    shift = mean - reference.mean
    spread, cross = centred.square().sum(1) * (count / (count - 1)), u.square() @ s * count
    # Each of the two means is a trace: tr A, and tr (A B)^½.
    distance = shift.square().sum() + spread.mean() + reference.covariance.trace() - 2 * cross.mean()
    influence = 2 * centred @ shift + (spread - spread.mean()) - (cross - cross.mean())
    return distance.clamp_min(0) + influence - influence.mean()


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U (N, K) and S (K,) of the thin singular value decomposition of (N, D)."""
    if len(matrix) <= matrix.shape[1]:
        u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
        return u, s
    q, r = torch.linalg.qr(matrix)
    u, s, _ = torch.linalg.svd(r)
    return q @ u, s
