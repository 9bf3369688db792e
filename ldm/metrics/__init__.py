"""Figures on sets of pictures: pure functions of features, in float64.

Rows are samples. A row is whatever the caller measures in: the features of a named network, or raw pixels
(pictures are flattened here). No figure means anything without the name of its features and its N.

Most figures come as one number for each row, whose mean is the figure: an interval is then that of a mean
(`mean_interval`), and a class's part the mean over its rows. For a distance these are the values of its empirical
influence function (Hampel 1974), set off by the distance: the first order of the bootstrap, at the price of one
evaluation in place of a thousand.

    N, M  rows of a set      D  numbers in a row
"""

from ldm.metrics.bootstrap import bootstrap_interval, mean_interval
from ldm.metrics.gaussian import (
    Gaussian,
    fit_gaussian,
    frechet_contributions,
    frechet_distance,
    frechet_distance_of_gaussians,
)
from ldm.metrics.kernel import KernelReference, kernel_distance
from ldm.metrics.manifold import (
    Manifold,
    ManifoldContributions,
    equal_class_counts,
    inside_manifold,
    knn_precision,
    knn_recall,
    manifold_contributions,
    within_class_recall,
)
from ldm.metrics.nearest import Neighbours, nearest_distance, nearest_neighbours
from ldm.metrics.saved import SavedStatistics, read_statistics, write_statistics
from ldm.metrics.score import log_score_contributions
from ldm.metrics.sliced import SlicedReference, sliced_wasserstein

__all__ = [
    "Gaussian",
    "KernelReference",
    "Manifold",
    "ManifoldContributions",
    "Neighbours",
    "SavedStatistics",
    "SlicedReference",
    "bootstrap_interval",
    "equal_class_counts",
    "fit_gaussian",
    "frechet_contributions",
    "frechet_distance",
    "frechet_distance_of_gaussians",
    "inside_manifold",
    "kernel_distance",
    "knn_precision",
    "knn_recall",
    "log_score_contributions",
    "manifold_contributions",
    "mean_interval",
    "nearest_distance",
    "nearest_neighbours",
    "read_statistics",
    "sliced_wasserstein",
    "within_class_recall",
    "write_statistics",
]
