"""Figures against closed forms, brute force, and sets whose answer is known."""

import math

import numpy as np
import pytest
import torch

from ldm import metrics


def gaussian_rows(count, dim, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) * scale + shift


def test_frechet_distance_of_gaussians_closed_forms():
    identity = torch.eye(4, dtype=torch.float64)
    zero, ones = torch.zeros(4), torch.ones(4)
    assert metrics.frechet_distance_of_gaussians(zero, identity, 3 * ones, identity) == pytest.approx(36)
    # Commuting covariances: the sum of (sqrt(a_i) - sqrt(b_i))^2.
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.0]), torch.tensor([4.0, 1.0, 9.0, 25.0])
    expected = 1 + 1 + 0 + 25
    assert metrics.frechet_distance_of_gaussians(zero, a.diag(), zero, b.diag()) == pytest.approx(expected)


def test_frechet_distance_against_the_eigenvalues_of_the_product():
    mixing = gaussian_rows(6, 6, seed=3)
    a, b = gaussian_rows(200, 6, seed=1) @ mixing, gaussian_rows(150, 6, seed=2, scale=1.5, shift=0.3)
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_fewer_rows_than_features():
    a = gaussian_rows(10, 64, seed=1)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    shifted = a + torch.linspace(0, 1, 64)
    assert metrics.frechet_distance(a, shifted) == pytest.approx(
        float((torch.linspace(0, 1, 64).double() ** 2).sum()), rel=1e-7
    )


def test_frechet_distance_of_equal_sets_is_zero_and_grows_with_noise():
    a = gaussian_rows(500, 8, seed=1)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    noisy = [a + gaussian_rows(500, 8, seed=2, scale=scale) for scale in (0.2, 0.5, 1.0, 2.0)]
    by_noise = [metrics.frechet_distance(a, rows) for rows in noisy]
    assert by_noise == sorted(by_noise)


def brute_force_recall(real, generated, k):
    """The definition, row by row: inside the ball of any generated row to its k-th nearest other."""
    inside = 0
    for row in real:
        for i, centre in enumerate(generated):
            others = sorted(math.dist(centre, other) for j, other in enumerate(generated) if j != i)
            if math.dist(row, centre) <= others[k - 1]:
                inside += 1
                break
    return inside / len(real)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_recall_and_precision_against_brute_force(k):
    real, generated = gaussian_rows(40, 3, seed=1), gaussian_rows(25, 3, seed=2, scale=0.7, shift=0.4)
    recall = brute_force_recall(real.tolist(), generated.tolist(), k)
    precision = brute_force_recall(generated.tolist(), real.tolist(), k)
    assert 0 < recall < 1
    assert metrics.knn_recall(real, generated, k) == pytest.approx(recall)
    assert metrics.knn_precision(real, generated, k) == pytest.approx(precision)


def test_blocks_of_rows_do_not_change_the_answer(monkeypatch):
    real, generated = gaussian_rows(300, 5, seed=1), gaussian_rows(270, 5, seed=2)
    whole = metrics.inside_manifold(real, generated)
    monkeypatch.setattr("ldm.metrics.rows.CHUNK_ROWS", 7)
    assert torch.equal(metrics.inside_manifold(real, generated), whole)


def test_collapse_has_precision_and_no_recall():
    real = gaussian_rows(200, 8, seed=1)
    collapsed = real[:1].repeat(50, 1)  # one real sample, again and again: balls of radius 0
    assert metrics.knn_precision(real, collapsed) == 1
    assert metrics.knn_recall(real, collapsed) == pytest.approx(1 / 200)
    assert metrics.knn_recall(real, real) == 1


def test_recall_falls_when_modes_are_missing_and_precision_with_noise():
    modes = torch.tensor([[0.0] * 4, [100.0] * 4])
    real = torch.cat([gaussian_rows(100, 4, seed=1) + mode for mode in modes])
    one_mode = gaussian_rows(100, 4, seed=2)
    assert metrics.knn_recall(real, one_mode) <= 0.5
    assert metrics.knn_precision(real, one_mode) > 0.9
    assert metrics.knn_precision(real, one_mode + gaussian_rows(100, 4, 3, scale=10)) < 0.1


def test_pictures_are_flattened_whatever_their_dtype():
    pictures = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    other = torch.randint(0, 256, (15, 3, 4, 4), dtype=torch.uint8)
    expected = metrics.nearest_distance(other.flatten(1), pictures.flatten(1).double())
    assert torch.equal(metrics.nearest_distance(other, pictures), expected)


def test_within_class_recall_sees_a_collapsed_class():
    real, labels = gaussian_rows(90, 4, seed=1), torch.arange(90) % 3
    generated, generated_labels = gaussian_rows(90, 4, seed=2), torch.arange(90) % 3
    generated[generated_labels == 1] = real[1].clone()  # class 1 always gives the same row
    recalls = metrics.within_class_recall(real, labels, generated, generated_labels)
    assert recalls.shape == (3,) and recalls.dtype == torch.float64
    assert recalls[0] > 0.5 and recalls[2] > 0.5
    assert recalls[1] == pytest.approx(1 / 30)
    for label in (0, 2):
        expected = metrics.knn_recall(real[labels == label], generated[generated_labels == label])
        assert recalls[label] == expected


def test_within_class_recall_of_a_class_too_small_is_zero():
    real, labels = gaussian_rows(40, 4, seed=1), torch.arange(40) % 2
    recalls = metrics.within_class_recall(real, labels, real[labels == 0], torch.zeros(20, dtype=torch.int64))
    assert recalls.tolist() == [1.0, 0.0]


def test_equal_class_counts_keeps_the_smaller_count_of_each_class():
    labels_a = torch.tensor([0] * 10 + [1] * 4 + [2] * 3)
    labels_b = torch.tensor([2] * 1 + [1] * 9 + [0] * 6)
    kept_a, kept_b = metrics.equal_class_counts(labels_a, labels_b)
    assert labels_a[kept_a].bincount().tolist() == labels_b[kept_b].bincount().tolist() == [6, 4, 1]
    assert len(set(kept_a.tolist())) == 11
    again_a, again_b = metrics.equal_class_counts(labels_a, labels_b)
    assert torch.equal(kept_a, again_a) and torch.equal(kept_b, again_b)
    other_a, _ = metrics.equal_class_counts(labels_a, labels_b, seed=1)
    assert not torch.equal(kept_a, other_a)


def test_nearest_distance_against_brute_force():
    a, b = gaussian_rows(30, 3, seed=1), gaussian_rows(20, 3, seed=2)
    expected = [min(math.dist(x, y) for y in b.tolist()) for x in a.tolist()]
    assert metrics.nearest_distance(a, b).tolist() == pytest.approx(expected)
    assert metrics.nearest_distance(a, torch.cat([b, a])).eq(0).all()  # exactly 0 between equal rows


def test_bootstrap_interval_is_deterministic_and_near_the_normal_one():
    values = gaussian_rows(400, 1, seed=1).flatten()
    interval = metrics.bootstrap_interval(values)
    assert interval == metrics.bootstrap_interval(values)
    assert interval != metrics.bootstrap_interval(values, seed=1)
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    assert interval == pytest.approx((values.mean().item() - half, values.mean().item() + half), abs=0.02)


def test_bootstrap_interval_of_any_statistic_of_rows():
    rows, reference = gaussian_rows(100, 3, seed=1), gaussian_rows(100, 3, seed=2)
    low, high = metrics.bootstrap_interval(
        rows, lambda drawn: metrics.frechet_distance(drawn, reference), num_resamples=50
    )
    assert 0 < low < high
    assert metrics.bootstrap_interval(torch.ones(5)) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: metrics.knn_recall(torch.zeros(9, 2), torch.zeros(5, 2), k=5), "at least 6 rows"),
        (lambda: metrics.frechet_distance(torch.zeros(1, 2), torch.zeros(5, 2)), "at least 2 rows"),
        (lambda: metrics.nearest_distance(torch.zeros(4), torch.zeros(4)), "one row for each"),
        (lambda: metrics.nearest_distance(torch.zeros(4, 2), torch.zeros(0, 2)), "empty"),
        (lambda: metrics.bootstrap_interval(torch.zeros(0)), "at least one"),
    ],
)
def test_what_cannot_be_measured_is_said(call, says):
    with pytest.raises(ValueError, match=says):
        call()
