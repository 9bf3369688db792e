"""Power laws: exact on exact points, and an interval that covers what it should."""

import numpy as np
import pytest

from ldm.power_law import fit_power_law

X = np.geomspace(1e5, 1e9, 9)


@pytest.mark.parametrize(("a", "b"), [(3.0, 0.07), (200.0, 0.5), (0.4, 0.0), (1e6, 1.3)])
def test_exact_points_give_the_law_back(a: float, b: float) -> None:
    law = fit_power_law(X, a * X**-b, with_floor=False)
    assert law is not None and law.c == 0 and law.points == 9
    assert (law.a, law.b) == (pytest.approx(a, rel=1e-3), pytest.approx(b, abs=1e-5))
    assert law(X) == pytest.approx(a * X**-b, rel=1e-4)
    assert law.low is not None and law.high is not None and law.high - law.low < 1e-4


@pytest.mark.parametrize(("a", "b", "c"), [(30.0, 0.3, 0.2), (5e3, 0.7, 1.0), (3.0, 0.1, 0.0)])
def test_with_the_loss_that_nothing_gets_below(a: float, b: float, c: float) -> None:
    law = fit_power_law(X, a * X**-b + c, with_floor=True)
    assert law is not None
    assert law(X) == pytest.approx(a * X**-b + c, rel=1e-3)
    assert law.b == pytest.approx(b, abs=0.01) and law.c == pytest.approx(c, abs=0.02)


def test_the_same_slope_as_least_squares_of_logarithms() -> None:
    noise = np.random.default_rng(0).normal(0, 1e-3, len(X))
    y = 3 * X**-0.07 * np.exp(noise)
    law = fit_power_law(X, y, with_floor=False)
    slope, _ = np.polyfit(np.log(X), np.log(y), 1)
    assert law is not None and law.b == pytest.approx(-slope, rel=1e-3)


@pytest.mark.parametrize("with_floor", [False, True])
def test_the_interval_covers_the_truth(with_floor: bool) -> None:
    """In 40 trials of 9 points with 1% of noise: 38 of them, give or take what a bootstrap of few points does."""
    rng, covered, widths = np.random.default_rng(1), 0, []
    truth = 0.2
    for _ in range(40):
        y = (20 * X**-truth + (0.1 if with_floor else 0)) * (1 + rng.normal(0, 0.01, len(X)))
        law = fit_power_law(X, y, with_floor=with_floor)
        assert law is not None and law.low is not None and law.high is not None
        covered += law.low <= truth <= law.high
        widths.append(law.high - law.low)
    assert covered >= 34
    assert np.median(widths) < 0.1


def test_the_band_of_the_curve_holds_the_curve_and_the_points() -> None:
    y = (20 * X**-0.2 + 0.1) * (1 + np.random.default_rng(2).normal(0, 0.01, len(X)))
    law = fit_power_law(X, y, with_floor=True)
    assert law is not None
    low, high = law.band(X) or (X, X)
    assert (low <= law(X)).all() and (law(X) <= high).all()
    assert ((high - low) / law(X) < 0.1).all() and (low < y).sum() >= 6 <= (y < high).sum()


def test_too_few_points_say_so() -> None:
    assert fit_power_law([2.0, 2.0], [1.0, 1.1], with_floor=False) is None
    law = fit_power_law([1.0, 10.0], [1.0, 0.1], with_floor=True)  # no floor from two points
    assert (
        law is not None
        and (law.b, law.c) == (pytest.approx(1, abs=1e-4), 0)
        and law.low is None
        and law.band([3.0]) is None
        and "no interval" in str(law)
    )
    with pytest.raises(ValueError, match="above 0"):
        fit_power_law([1.0, 2.0], [1.0, 0.0], with_floor=False)
