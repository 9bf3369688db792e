"""Power laws fitted to a few points: L = a x^-b, or L = a x^-b + c with the loss c that no x gets below.

As in Kaplan et al. 2020 (arXiv 2001.08361) and, with c, Hoffmann et al. 2022 (arXiv 2203.15556, equation 2).
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_RESAMPLES = 500
_AT_ONCE = 100
_AROUND = np.linspace(-1, 1, 41)
_EXPONENTS = np.concatenate([[0.0], np.geomspace(1e-3, 4.0, 120)])


@dataclass(frozen=True)
class PowerLaw:
    """L = a x^-b + c, fitted to `points` of x. low, high: the 95% interval of b; None where no point is left over.

    The interval is of the scatter of these points around the curve. It knows nothing of what another grid, another
    recipe or a larger model would give.
    """

    a: float
    b: float
    c: float
    low: float | None
    high: float | None
    points: int
    draws: Floats = field(repr=False)
    """(m, 3): a, b and c of each resample; m is 0 where there is no interval."""

    def __call__(self, x: npt.ArrayLike) -> Floats:
        return np.asarray(self.a * np.asarray(x, np.float64) ** -self.b + self.c)

    @property
    def about(self) -> dict[str, float | int | None]:
        """As plain values."""
        return {"a": self.a, "b": self.b, "b_low": self.low, "b_high": self.high, "c": self.c, "points": self.points}

    def band(self, x: npt.ArrayLike) -> tuple[Floats, Floats] | None:
        """The 95% interval of the curve at each x (n,): least (n,), most (n,); None where there is none."""
        if not len(self.draws):
            return None
        a, b, c = self.draws.T[:, :, None]
        low, high = np.quantile(a * np.asarray(x, np.float64) ** -b + c, [0.025, 0.975], axis=0)
        return low, high

    def __str__(self) -> str:
        interval = "no interval" if self.low is None else f"{self.low:.3g} to {self.high:.3g}"
        floor = f" + {self.c:.4g}" if self.c else ""
        return f"{self.a:.4g} x^-{self.b:.3g}{floor}, b {interval} ({self.points} points)"


def fit_power_law(x: npt.ArrayLike, y: npt.ArrayLike, *, with_floor: bool, seed: int = 0) -> PowerLaw | None:
    """Least squares of the relative error (y - L) / y, for x, y above 0; None for fewer than 2 different x.

    with_floor: c is fitted too, which takes 4 different x at least, else it is 0. The interval is a bootstrap over
    residuals (Efron 1979), scaled by the root of n / (n - parameters), for the fit has eaten a part of them.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 1 or not ((x > 0) & (y > 0)).all():
        raise ValueError("a power law is fitted to pairs of numbers above 0")
    different = len(np.unique(x))
    if different < 2:
        return None
    with_floor = with_floor and different >= 4
    free = len(x) - (3 if with_floor else 2)
    scale = np.exp(np.log(x).mean())  # so that a and c are of one size
    a, b, c = (values[0] for values in _fit(x / scale, y[None], with_floor))
    low = high = None
    draws = np.empty((0, 3))
    if free > 0:
        fitted = a * (x / scale) ** -b + c
        residuals = (y / fitted - 1) * np.sqrt(len(x) / free)
        rows = np.random.Generator(np.random.Philox(seed)).integers(0, len(x), (_RESAMPLES, len(x)))
        all_a, all_b, all_c = _fit(x / scale, fitted * np.maximum(1 + residuals[rows], 1e-9), with_floor)
        low, high = (float(q) for q in np.quantile(all_b, [0.025, 0.975]))
        draws = np.stack([all_a * scale**all_b, all_b, all_c], axis=1)
    return PowerLaw(float(a * scale**b), float(b), float(c), low, high, len(x), draws)


def _fit(x: Floats, y: Floats, with_floor: bool) -> tuple[Floats, ...]:
    """x (n,), y (m, n) => a, b, c (m,). For a given b the rest is linear: b, at least 0, is searched."""
    parts = [_fit_rows(x, rows, with_floor) for rows in np.array_split(y, -(-len(y) // _AT_ONCE))]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _fit_rows(x: Floats, y: Floats, with_floor: bool) -> tuple[Floats, Floats, Floats]:
    row = np.arange(len(y))
    tried = np.broadcast_to(_EXPONENTS, (len(y), len(_EXPONENTS)))
    reach = None
    for _ in range(4):
        a, c, error = _given_exponent(x, y, tried, with_floor)
        best = error.argmin(1)
        a, b, c = a[row, best], tried[row, best], c[row, best]
        reach = 0.08 * b + 2e-3 if reach is None else reach / 15  # the coarse grid has steps of 7%
        tried = np.maximum(b[:, None] + reach[:, None] * _AROUND, 0.0)
    return a, b, c


def _given_exponent(x: Floats, y: Floats, b: Floats, with_floor: bool) -> tuple[Floats, Floats, Floats]:
    """x (n,), y (m, n), b (m, k) => a, c and the squared relative error (m, k), with a and c at least 0."""
    powers = x ** -b[:, :, None] / y[:, None]  # (m, k, n), in units of y: the relative error is powers a + ones c - 1
    inverse = 1 / y[:, None]
    pp, pi, ii = (powers**2).sum(2), (powers * inverse).sum(2), (inverse**2).sum(2)
    p, i = powers.sum(2), inverse.sum(2)
    a, c = p / pp, np.zeros_like(p)
    if with_floor:
        determinant = pp * ii - pi**2
        with np.errstate(divide="ignore", invalid="ignore"):
            both_a, both_c = (p * ii - i * pi) / determinant, (i * pp - p * pi) / determinant
        inside = (determinant > 1e-12 * pp * ii) & (both_a >= 0) & (both_c >= 0)
        a, c = np.where(inside, both_a, a), np.where(inside, both_c, c)
    error = ((powers * a[:, :, None] + inverse * c[:, :, None] - 1) ** 2).sum(2)
    return a, c, error
