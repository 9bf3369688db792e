"""Plots: what is drawn stands in the picture, the same bytes each time, in any thread."""

import io
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pytest
from PIL import Image

from pipelines.plots import COLOURS, line, pareto_front, scatter_front

X = [1.0, 2.0, 4.0]
CURVES = {"one": (X, [3.0, 2.0, 1.0]), "two": (X, [1.0, 2.0, 3.0], [0.5, 1.5, 2.5], [1.5, 2.5, 3.5])}


def colours_in(png: bytes) -> set[str]:
    """All colours of a PNG, as #RRGGBB."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
    return {"#{:02X}{:02X}{:02X}".format(*colour) for colour in np.unique(pixels, axis=0).tolist()}


def test_each_curve_has_its_colour_and_the_bytes_are_the_same_whoever_draws() -> None:
    drawn = line(CURVES, "steps", "loss", "Loss by steps", log_x=True, log_y=True)
    assert {COLOURS[0], COLOURS[1]} <= colours_in(drawn) and COLOURS[2] not in colours_in(drawn)
    with matplotlib.rc_context({"lines.linewidth": 9, "figure.facecolor": "red"}), ThreadPoolExecutor(2) as pool:
        again = list(pool.map(lambda _: line(CURVES, "steps", "loss", "Loss by steps", True, True), range(2)))
    assert set(again) == {drawn}
    assert line(CURVES, "steps", "loss", "Loss by steps") != drawn
    assert line(CURVES, "steps", "loss", "Another title", True, True) != drawn


def test_the_front_is_what_nothing_else_beats() -> None:
    x, y = [1, 2, 2, 3, 4, 5], [9, 7, 6, 8, 6, 1]
    assert pareto_front(x, y).tolist() == [0, 2, 5]
    assert pareto_front([], []).tolist() == []
    random = np.random.default_rng(0).random((200, 2))
    beaten = [any((other <= own).all() and (other < own).any() for other in random) for own in random]
    assert sorted(pareto_front(*random.T)) == [i for i, is_beaten in enumerate(beaten) if not is_beaten]


def test_points_with_texts_and_their_front() -> None:
    clouds = {"ddim": ([1, 2], [4, 3], ["S=10", "S=20"]), "euler": ([1.5], [5])}
    drawn = scatter_front(clouds, "seconds", "FD", "Quality by time")
    assert {COLOURS[0], COLOURS[1], "#888888"} <= colours_in(drawn)
    assert scatter_front({**clouds, "ddim": ([1, 2], [4, 3])}, "seconds", "FD", "Quality by time") != drawn


def test_uneven_series_are_refused() -> None:
    with pytest.raises(ValueError):
        line({"one": ([1, 2], [1])}, "x", "y", "title")
