"""What is measured of whole sets of pictures, in named features and in pixels. Every figure of the samples stands
beside a floor: the same of pictures that the model never saw. A floor is no bound, but what a perfect model would give
about.

    N  samples      M  held-out pictures
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import metrics
from ldm.autoencoder import Autoencoder
from ldm.features import BATCH_SIZE, Extractor, Features, in_fixed_batches
from pipelines.evaluate.kept import NOTHING_KEPT, Kept
from pipelines.evaluate.reference import Pictures, Reference

NEIGHBOURS = 5
COMPARED_SIZE = 32
"""Side, in pixels, to which pictures are reduced before they are compared pixel by pixel."""
RECONSTRUCT_BATCH = 8  # pictures: decoding takes far more memory than encoding
MANIFOLD_ROWS = 5000
"""Pictures of a set that span a manifold, at most: the distances between them are a matrix."""
SAMPLES, EQUAL, FLOOR, RECONSTRUCTION = "samples", "equal_n", "floor", "reconstruction"
Sides = Mapping[str, Tensor]
"""A row for each picture of each set that figures are compared of: keys SAMPLES and, where there are, the others."""


@dataclass(frozen=True)
class Estimate:
    """A figure of `count` pictures, with the 95% interval that covers the choice of these pictures."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Figure:
    """One figure of each set: of the samples and, where there are pictures for it, of the other sides."""

    name: str
    sides: dict[str, Estimate]

    def flat(self) -> dict[str, float]:
        """NAME, NAME_low and NAME_high of the samples; NAME_equal_n, NAME_floor, NAME_reconstruction."""
        drawn = self.sides[SAMPLES]
        flat = {self.name: drawn.value, f"{self.name}_low": drawn.low, f"{self.name}_high": drawn.high}
        return flat | {f"{self.name}_{side}": e.value for side, e in self.sides.items() if side != SAMPLES}

    def document(self) -> dict[str, Any]:
        """For report.json."""
        return {side: asdict(estimate) for side, estimate in self.sides.items()}


@dataclass(frozen=True)
class Sets:
    """The pictures whose figures stand side by side.

    pictures: SAMPLES, all of them; FLOOR, held-out ones; RECONSTRUCTION, those through the VAE and back. equal: rows of
    the samples, as many as the floor has and of the same classes. floor: its rows among the held-out pictures.
    """

    pictures: dict[str, Pictures]
    equal: Tensor | None = None
    floor: Tensor | None = None

    def describe(
        self,
        network: Callable[[Tensor], Tensor],
        of_reference: Callable[[Tensor], Tensor] | None = None,
        held_out: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """network: pixels uint8 (N, 3, H, W) => rows (N, D); the same of each set. of_reference: the same network for
        pictures of the reference. held_out: rows of all held-out pictures, where there are some already."""
        sides = {}
        for side, pictures in self.pictures.items():
            if side == FLOOR and held_out is not None:
                sides[side] = held_out[self.floor]
            else:
                sides[side] = (network if side == SAMPLES else of_reference or network)(pictures.pixels)
        if self.equal is not None:
            sides[EQUAL] = sides[SAMPLES][self.equal]
        return sides


def make_sets(
    samples: Pictures, reference: Reference, autoencoder: Autoencoder, seed: int, kept: Kept = NOTHING_KEPT
) -> Sets:
    """Samples, floor and reconstructions; the latter two only where two pictures were held out."""
    sample_rows, holdout_rows = equal_rows(samples, reference.holdout, seed)
    if len(holdout_rows) < 2:
        return Sets({SAMPLES: samples})
    floor = reference.holdout.take(holdout_rows)
    rebuild = kept.rows(
        "reconstructions",
        f"{autoencoder.weights_sha256} {autoencoder.dtype}",
        lambda pixels: reconstructed(pixels, autoencoder),
    )
    rebuilt = Pictures(rebuild(floor.pixels), floor.labels)
    return Sets({SAMPLES: samples, FLOOR: floor, RECONSTRUCTION: rebuilt}, sample_rows, holdout_rows)


def reconstructed(pixels: Tensor, autoencoder: Autoencoder) -> Tensor:
    """uint8 (N, 3, H, W) => the same through the VAE (the mean of its posterior) and back: uint8, on the CPU."""
    channels = autoencoder.latent_channels
    return in_fixed_batches(
        lambda batch: autoencoder.decode(autoencoder.encode(batch)[:, :channels]), pixels, RECONSTRUCT_BATCH
    )


def estimate(values: Tensor, count: int, seed: int, transform: Callable[[float], float] = float) -> Estimate:
    """transform of the mean of values (n,), which come of `count` pictures."""
    low, high = metrics.mean_interval(values, seed=seed)
    return Estimate(transform(float(values.mean())), transform(low), transform(high), count)


def figure(name: str, values: Sides, seed: int, transform: Callable[[float], float] = float) -> Figure:
    """values: of each set numbers (n,), one for each picture that counts, the transform of whose mean the figure is."""
    return Figure(name, {side: estimate(each, len(each), seed, transform) for side, each in values.items()})


def frechet(contributions: Sides, features: Features, seed: int) -> Figure:
    """`fd-NAME`, called `fid` only in the features that have that name by right, of `metrics.frechet_contributions`.

    The distance falls as a set grows: what compares with the floor and the reconstructions is `_equal_n`.
    """
    return figure("fid" if is_inception(features) else f"fd-{features.name}", contributions, seed)


def kernel(sides: Sides, train: Tensor, features: Features, seed: int) -> Figure:
    """`kid-NAME`, `kid` in Inception's features: does not depend on N but by chance."""
    real = metrics.KernelReference(train, seed)
    values = {side: real.contributions(rows) for side, rows in sides.items()}
    return figure("kid" if is_inception(features) else f"kid-{features.name}", values, seed)


def manifolds(sides: Sides, train: Tensor, features: Features, seed: int) -> list[Figure]:
    """Precision, density, recall and coverage in the named features, k = 5; nothing where train spans no manifold."""
    spanning = thinned(train, seed)
    if len(spanning) <= NEIGHBOURS:
        return []
    real, drawn = metrics.Manifold(spanning, NEIGHBOURS), {side: thinned(rows, seed) for side, rows in sides.items()}
    found = {side: metrics.manifold_contributions(real, rows) for side, rows in drawn.items()}

    def named(name: str) -> Figure:
        """Of as many pictures as are drawn, also where the mean is over the real ones."""
        values = {side: getattr(contributions, name) for side, contributions in found.items()}
        estimates = {side: estimate(each, len(drawn[side]), seed) for side, each in values.items() if each is not None}
        return Figure(f"{name}-{features.name}", estimates)

    figures = [named(name) for name in ("precision", "density", "coverage", "recall")]
    return [each for each in figures if SAMPLES in each.sides]


def sliced(sides: Sides, train: Tensor, seed: int) -> Figure:
    """`sliced_wasserstein` of pixels 0 to 1, squared: needs no network at all."""
    real = metrics.SlicedReference(train, seed)
    return figure("sliced_wasserstein", {side: real.contributions(rows) for side, rows in sides.items()}, seed)


def inception_score(sets: Sets, features: Features, seed: int) -> list[Figure]:
    """`is`, of the network that it is defined with and of no other."""
    if not isinstance(features, Extractor) or not features.is_inception:
        return []

    def log_probabilities(pixels: Tensor) -> Tensor:
        found = features.log_probabilities(pixels)
        assert found is not None  # for it is Inception
        return found

    described = sets.describe(log_probabilities)
    values = {side: metrics.log_score_contributions(rows) for side, rows in described.items()}
    return [figure("is", values, seed, math.exp)]


def is_inception(features: Features) -> bool:
    return isinstance(features, Extractor) and features.is_inception


def equal_rows(samples: Pictures, holdout: Pictures, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of both sets, chosen by the seed, as many of one as of the other: of each class where there are labels."""
    if samples.labels is not None and holdout.labels is not None:
        return metrics.equal_class_counts(samples.labels, holdout.labels, seed)
    a, b = (torch.zeros(len(pictures), dtype=torch.int64) for pictures in (samples, holdout))  # all of one class
    return metrics.equal_class_counts(a, b, seed)


def thinned(rows: Tensor, seed: int) -> Tensor:
    """At most MANIFOLD_ROWS of the rows, chosen by the seed, in their order."""
    if len(rows) <= MANIFOLD_ROWS:
        return rows
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(len(rows))[:MANIFOLD_ROWS]
    return rows[torch.from_numpy(np.sort(chosen))]


def compared(pixels: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) => float32 (N, D) of 0 to 1, reduced to at most 32 x 32 pixels."""
    if max(pixels.shape[2:]) <= COMPARED_SIZE:
        return (pixels.float() / 255).flatten(1)
    size = (COMPARED_SIZE, COMPARED_SIZE)
    parts = [F.interpolate(x.float() / 255, size, mode="bilinear", antialias=True) for x in pixels.split(BATCH_SIZE)]
    return torch.cat(parts).flatten(1)
