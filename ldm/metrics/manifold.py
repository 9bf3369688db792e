"""k-NN manifolds: precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

Precision and density ask whether what is drawn is like what is real; recall and coverage whether all that is real is
drawn. The manifold of a set is the union of balls around its rows, each reaching to the k-th nearest other row of the
same set. It grows with the number of rows that span it: figures compare only at equal numbers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.metrics.rows import as_rows, distances


class Manifold:
    """The k-NN manifold of rows (M, D), M more than k. radii: float64 (M,)."""

    def __init__(self, rows: Tensor, k: int = 5) -> None:
        self.rows, self.k = as_rows(rows), k
        if not 1 <= k < len(self.rows):
            raise ValueError(f"k={k} neighbours need a manifold of at least {k + 1} rows, not {len(self.rows)}")
        # The nearest row of a set to one of its own is itself, at distance 0: hence k + 1.
        self.radii = torch.cat([d.kthvalue(k + 1, dim=1).values for d in distances(self.rows, self.rows)])


@dataclass(frozen=True)
class ManifoldContributions:
    """float64, whose means are the figures: precision and density over the drawn rows, the others over the real ones.

    Precision: 1 where a drawn row lies in a ball of a real one (eq. 2 of Kynkäänniemi et al.). density: the number of
    such balls over k; its mean may be above 1 (eq. 4 of Naeem et al.). recall: 1 where a real row lies in a ball of a
    drawn one; None where k or fewer are drawn. coverage: 1 where a drawn row lies in the real row's own ball (eq. 5 of
    Naeem et al.).
    """

    precision: Tensor
    density: Tensor
    recall: Tensor | None
    coverage: Tensor


def manifold_contributions(real: Manifold, drawn: Tensor) -> ManifoldContributions:
    """All four of drawn rows (N, D) against a real manifold, from one matrix of distances."""
    rows = as_rows(drawn)
    spanned = Manifold(rows, real.k) if len(rows) > real.k else None
    counts, covered = [], torch.zeros(len(real.rows), dtype=torch.bool, device=rows.device)
    recalled, first = torch.zeros_like(covered), 0
    for block in distances(rows, real.rows):  # (n, M)
        inside = block <= real.radii
        counts.append(inside.sum(1))
        covered |= inside.any(0)
        if spanned is not None:
            recalled |= (block <= spanned.radii[first : first + len(block), None]).any(0)
        first += len(block)
    count = torch.cat(counts)
    return ManifoldContributions(
        precision=(count > 0).double(),
        density=count.double() / real.k,
        recall=None if spanned is None else recalled.double(),
        coverage=covered.double(),
    )


def knn_recall(real: Tensor, generated: Tensor, k: int = 5) -> float:
    """Share of the real rows that lie inside the k-NN manifold of the generated ones."""
    return float(inside_manifold(real, generated, k).double().mean())


def knn_precision(real: Tensor, generated: Tensor, k: int = 5) -> float:
    """Share of the generated rows inside the k-NN manifold of the real ones."""
    return float(inside_manifold(generated, real, k).double().mean())


def inside_manifold(points: Tensor, manifold: Tensor, k: int = 5) -> Tensor:
    """Whether each row of points (N, D) lies inside the k-NN manifold of manifold (M, D): bool (N,)."""
    spanned = Manifold(manifold, k)
    return torch.cat([(d <= spanned.radii).any(1) for d in distances(as_rows(points), spanned.rows)])


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
