"""Figures against torchmetrics and closed forms, influences against derivatives, intervals against repetition."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from ldm import metrics
from ldm.metrics.manifold import Manifold


class Rows(torch.nn.Module):
    """torchmetrics' extractor for what is features already."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, rows):
        return rows


def gaussian_rows(count, dim, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) * scale + shift


def correlated(count, dim, seed, shift=0.0):
    return gaussian_rows(count, dim, seed) @ gaussian_rows(dim, dim, 99) / dim**0.5 + shift


def coverage(draw, contributions, repeats=300):
    """(share of the intervals that hold the mean of the figure over all repeats, the mean)"""
    each = [contributions(draw(seed)) for seed in range(repeats)]
    expected = np.mean([float(values.mean()) for values in each])
    intervals = [metrics.mean_interval(values, num_resamples=400) for values in each]
    return np.mean([low <= expected <= high for low, high in intervals]), expected


class TestFrechet:
    @pytest.mark.parametrize(("count", "dim"), [(300, 24), (400, 64), (40, 64)])
    def test_is_that_of_torchmetrics(self, count, dim):
        drawn, real = correlated(count, dim, 1, shift=0.2), correlated(350, dim, 2)
        theirs = FrechetInceptionDistance(feature=Rows(dim)).set_dtype(torch.float64)
        theirs.update(real, real=True)
        theirs.update(drawn, real=False)
        assert metrics.frechet_distance(drawn, real) == pytest.approx(float(theirs.compute()), rel=1e-6)

    def test_is_the_closed_form_for_known_gaussians(self):
        a, b = correlated(200, 8, 1), correlated(100, 8, 2, shift=1.0)
        one, other = metrics.fit_gaussian(a), metrics.fit_gaussian(b)
        expected = metrics.frechet_distance_of_gaussians(one.mean, one.covariance, other.mean, other.covariance)
        assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)

    @pytest.mark.parametrize(("count", "dim"), [(60, 6), (8, 12)])
    def test_a_contribution_is_the_derivative_by_the_weight_of_its_row(self, count, dim):
        rows, reference = correlated(count, dim, 1, shift=0.3), metrics.fit_gaussian(correlated(100, dim, 2))

        def distance(weights):
            share = weights / weights.sum()
            mean = share @ rows
            centred = (rows - mean) * (share * count / (count - 1)).sqrt()[:, None]
            singular = torch.linalg.svdvals(centred @ reference.root)[: min(dim, count - 1)]
            return (
                (mean - reference.mean).square().sum()
                + centred.square().sum()
                + reference.covariance.trace()
                - 2 * singular.sum()
            )

        weights = torch.ones(count, dtype=torch.float64, requires_grad=True)
        value = distance(weights)
        (slope,) = torch.autograd.grad(value, weights)
        contributions = metrics.frechet_contributions(rows, reference)
        assert float(contributions.mean()) == pytest.approx(value.item(), rel=1e-9)
        assert torch.allclose(contributions - contributions.mean(), slope * count, atol=1e-7)

    def test_the_interval_covers_the_figure_of_so_many_rows(self):
        reference = metrics.fit_gaussian(gaussian_rows(500, 4, 5000, shift=0.4))
        covered, expected = coverage(
            lambda seed: gaussian_rows(150, 4, seed), lambda rows: metrics.frechet_contributions(rows, reference)
        )
        assert 0.91 <= covered <= 0.98
        true = metrics.frechet_distance_of_gaussians(torch.zeros(4), torch.eye(4), reference.mean, reference.covariance)
        assert expected > true  # what a distance gains at 150 rows, which is why N stands beside it

    def test_near_its_floor_the_interval_is_wide_rather_than_wrong(self):
        reference = metrics.Gaussian(torch.zeros(16).double(), torch.eye(16).double(), 10**6)
        covered, _ = coverage(
            lambda seed: gaussian_rows(50, 16, seed), lambda rows: metrics.frechet_contributions(rows, reference), 120
        )
        assert covered >= 0.93


class TestKernel:
    def test_is_that_of_torchmetrics(self):
        drawn, real = correlated(300, 24, 1, shift=0.2), correlated(300, 24, 2)
        theirs = KernelInceptionDistance(feature=Rows(24), subsets=1, subset_size=300).set_dtype(torch.float64)
        theirs.update(real, real=True)
        theirs.update(drawn, real=False)
        expected = float(theirs.compute()[0])
        assert metrics.kernel_distance(drawn, real) == pytest.approx(expected, rel=1e-6)

    def test_subsets_give_the_mean_over_them_and_the_seed_chooses(self, monkeypatch):
        from ldm.metrics import kernel

        drawn, real = correlated(70, 5, 1, shift=0.5), correlated(200, 5, 2)
        subsets = kernel._subsets(70, 30, 7), kernel._subsets(200, 30, 8)
        assert [len(side) for side in subsets] == [2, 6]
        pairs = [(drawn[subsets[0][i % 2]], real[subsets[1][i]]) for i in range(6)]
        expected = np.mean([float(poly_mmd(a, b)) for a, b in pairs])
        assert metrics.kernel_distance(drawn, real, 30, seed=7) == pytest.approx(expected, rel=1e-9)
        assert metrics.kernel_distance(drawn, real, 30, seed=8) != metrics.kernel_distance(drawn, real, 30, seed=7)
        assert len(metrics.KernelReference(real).contributions(drawn, 30)) == 60  # ten fill no subset

    def test_one_reference_gives_each_set_what_it_has_alone(self):
        """Also sets of other sizes, whose subsets are others."""
        real = correlated(200, 5, 2)
        together = metrics.KernelReference(real, seed=7)
        for count in (70, 25, 70, 400):
            drawn = correlated(count, 5, count, shift=0.5)
            alone = metrics.KernelReference(real, seed=7).contributions(drawn, 30)
            assert torch.equal(together.contributions(drawn, 30), alone)

    def test_does_not_depend_on_the_number_of_rows(self):
        """For one dimension the kernel's features are x, x², x³ with weights 3, 3, 1: its distance is known."""
        expected = 3 * 0.5**2 + 3 * 0.25**2 + 1.625**2
        each = [
            metrics.kernel_distance(gaussian_rows(20, 1, seed), gaussian_rows(20, 1, 1000 + seed, shift=0.5))
            for seed in range(400)
        ]
        assert np.mean(each) == pytest.approx(expected, abs=3 * np.std(each) / 20)

    def test_the_interval_covers(self):
        real = gaussian_rows(100, 3, 9999, shift=0.5)
        covered, _ = coverage(lambda seed: gaussian_rows(100, 3, seed), metrics.KernelReference(real).contributions)
        assert 0.88 <= covered <= 0.98


class TestManifold:
    @pytest.mark.parametrize("k", [1, 4])
    def test_all_four_against_the_definitions_row_by_row(self, k):
        real, drawn = gaussian_rows(40, 3, seed=1), gaussian_rows(25, 3, seed=2, scale=0.7, shift=0.4)

        def radii(rows):
            return [sorted(math.dist(x, y) for j, y in enumerate(rows) if j != i)[k - 1] for i, x in enumerate(rows)]

        real_radii, drawn_radii = radii(real.tolist()), radii(drawn.tolist())
        near = [[math.dist(x, y) for y in real.tolist()] for x in drawn.tolist()]
        balls = [sum(d <= r for d, r in zip(row, real_radii, strict=True)) for row in near]
        found = metrics.manifold_contributions(Manifold(real, k), drawn)
        assert found.precision.tolist() == [float(count > 0) for count in balls]
        assert found.density.tolist() == pytest.approx([count / k for count in balls])
        columns = range(len(real))
        assert found.coverage.tolist() == [float(any(row[j] <= real_radii[j] for row in near)) for j in columns]
        recalled = [any(row[j] <= r for row, r in zip(near, drawn_radii, strict=True)) for j in columns]
        assert found.recall is not None and found.recall.tolist() == [float(x) for x in recalled]

    def test_density_is_one_on_average_for_more_of_the_same_and_outliers_do_not_lift_it(self):
        real, drawn = gaussian_rows(1500, 4, 1), gaussian_rows(1500, 4, 2)
        found = metrics.manifold_contributions(Manifold(real), drawn)
        assert float(found.density.mean()) == pytest.approx(1, abs=0.05)
        assert float(found.coverage.mean()) == pytest.approx(1 - 0.5**5, abs=0.02)  # Naeem et al., lemma 2
        few = metrics.manifold_contributions(Manifold(real), drawn[:3])
        assert few.recall is None and len(few.precision) == 3

    def test_repeated_rows_are_found_though_products_round(self):
        real = gaussian_rows(300, 64, 1, shift=50.0).float()
        repeated = real[7].repeat(20, 1)
        found = metrics.manifold_contributions(Manifold(real), repeated)
        assert float(found.precision.mean()) == 1
        assert found.recall is not None and found.recall.nonzero().flatten().tolist() == [7]  # balls of radius 0


class TestSliced:
    def test_in_one_dimension_is_the_best_assignment(self):
        a, b = gaussian_rows(60, 1, 1), gaussian_rows(60, 1, 2, scale=2.0, shift=0.7)
        costs = (a - b.T).square().numpy()
        rows, columns = linear_sum_assignment(costs)
        assert metrics.sliced_wasserstein(a, b) == pytest.approx(costs[rows, columns].mean(), rel=1e-9)

    def test_is_the_closed_form_for_gaussians_of_unequal_numbers(self):
        a, b = gaussian_rows(6000, 1, 1), gaussian_rows(9100, 1, 2, scale=2.0, shift=1.0)
        assert metrics.sliced_wasserstein(a, b) == pytest.approx(1 + 1, rel=0.07)

    def test_a_shift_gives_its_share(self):
        rows, shift = gaussian_rows(50, 12, 1), torch.linspace(0, 1, 12).double()
        expected = float(shift.square().sum()) / 12
        assert metrics.sliced_wasserstein(rows + shift, rows) == pytest.approx(expected, rel=0.25)
        assert metrics.sliced_wasserstein(rows, rows) == pytest.approx(0, abs=1e-20)
        assert metrics.sliced_wasserstein(rows + shift, rows, seed=1) != metrics.sliced_wasserstein(rows + shift, rows)

    def test_the_interval_covers(self):
        real = gaussian_rows(60, 3, 9999, shift=0.5)
        covered, _ = coverage(
            lambda seed: gaussian_rows(60, 3, seed), lambda r: metrics.SlicedReference(real).contributions(r), 120
        )
        assert 0.88 <= covered <= 0.99


class TestScore:
    def test_is_that_of_torchmetrics(self):
        logits = gaussian_rows(200, 7, 1, scale=2.0)
        theirs = InceptionScore(feature=Rows(7), splits=1).set_dtype(torch.float64)
        theirs.update(logits)
        found = metrics.log_score_contributions(logits.log_softmax(1)).mean().exp()
        assert float(found) == pytest.approx(float(theirs.compute()[0]), rel=1e-6)

    def test_its_ends(self):
        sure = torch.eye(5).repeat(4, 1).log()  # -inf where the probability is 0
        assert float(metrics.log_score_contributions(sure).mean().exp()) == pytest.approx(5)
        assert metrics.log_score_contributions(torch.zeros(9, 5)).tolist() == pytest.approx([0] * 9)


def test_a_mean_has_the_interval_of_its_bootstrap():
    values = gaussian_rows(300, 1, 1).flatten()
    assert metrics.mean_interval(values) == metrics.mean_interval(values)
    assert metrics.mean_interval(values) == pytest.approx(metrics.bootstrap_interval(values), abs=0.01)
    assert metrics.mean_interval(torch.ones(5)) == (1.0, 1.0)
    with pytest.raises(ValueError, match="at least one value"):
        metrics.mean_interval(torch.zeros(0))


@pytest.mark.parametrize(("count", "at_once"), [(1, 10), (7, 3), (300, 2000)])
def test_a_mean_is_redrawn_as_the_definition_has_it(count, at_once, monkeypatch):
    monkeypatch.setattr("ldm.metrics.bootstrap._AT_ONCE", at_once)
    values, generator = gaussian_rows(count, 1, 1).flatten(), np.random.Generator(np.random.Philox(5))
    means = [values.numpy()[generator.integers(0, count, count)].mean() for _ in range(1000)]
    expected = np.quantile(means, [0.025, 0.975])
    assert metrics.mean_interval(values, seed=5) == pytest.approx(tuple(expected), rel=1e-9)


def test_what_is_close_is_measured_by_its_surroundings():
    training = torch.cat([gaussian_rows(100, 6, 1), gaussian_rows(100, 6, 2, scale=0.01, shift=30)])
    copy, ordinary, smooth = training[3], gaussian_rows(1, 6, 3)[0], gaussian_rows(1, 6, 4, scale=0.01, shift=30)[0]
    near = metrics.nearest_neighbours(torch.stack([copy + 1e-3, ordinary, smooth]), training)
    assert near.row[0] == 3
    assert near.distance[2] < 0.1 * near.distance[1]  # nearer by far, for all of its kind are near
    assert near.closeness[0] < 0.01 and near.closeness[1] > 0.3 and near.closeness[2] > 0.3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: metrics.kernel_distance(torch.zeros(1, 2), torch.zeros(5, 2)), "at least 2 rows"),
        (lambda: metrics.sliced_wasserstein(torch.zeros(5, 2), torch.zeros(1, 2)), "at least 2 rows"),
        (lambda: metrics.log_score_contributions(torch.zeros(0, 3)), "needs log probabilities"),
    ],
)
def test_what_cannot_be_measured_is_said(call, says):
    with pytest.raises(ValueError, match=says):
        call()
