"""The power laws of a scaling study: of which of its points each is, and how it is drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.power_law import PowerLaw, fit_power_law
from pipelines import plots
from pipelines.study.table import Row

_LABELS = {
    "parameters": "parameters",
    "compute": "training FLOPs",
    "data": "training samples",
}
_LOSS = "validation loss"


def points_of(rows: Sequence[Row]) -> dict[str, tuple[list[float], list[float]]]:
    """What each law is of, as (x, loss).

    parameters: the models on all the data that the study has. data: the largest model on each share. compute: of all
    points of all curves those that no other beats with less compute (Kaplan et al. 2020, figure 2).
    """
    most, largest = max(row["fraction"] for row in rows), max(row["parameters"] for row in rows)
    whole = [row for row in rows if row["fraction"] == most]
    widest = [row for row in rows if row["parameters"] == largest]
    flops, losses = zip(*((p["flops"], p["loss"]) for row in rows for p in row["curve"]), strict=True)
    front = plots.pareto_front(flops, losses).tolist()
    return {
        "parameters": ([row["parameters"] for row in whole], [row["loss"] for row in whole]),
        "compute": ([flops[i] for i in front], [losses[i] for i in front]),
        "data": ([row["samples"] for row in widest], [row["loss"] for row in widest]),
    }


def fits_of(rows: Sequence[Row], seed: int) -> dict[str, PowerLaw]:
    """By name; without those that have too few points."""
    found = {key: fit_power_law(x, y, with_floor=True, seed=seed) for key, (x, y) in points_of(rows).items()}
    return {key: law for key, law in found.items() if law is not None}


def plots_of(rows: Sequence[Row], laws: Mapping[str, PowerLaw]) -> dict[str, bytes]:
    """The loss against each axis, with its law and the interval of b; the distance against parameters and compute."""
    figures = {}
    for key, (x, y) in points_of(rows).items():
        order = np.argsort(x)
        series: dict[str, Any] = {"front" if key == "compute" else "measured": (np.array(x)[order], np.array(y)[order])}
        if key == "compute":
            series |= _curves(rows)
        if law := laws.get(key):
            series |= {f"fit: b = {law.b:.2g}": _curve(law, x)}
        figures[f"{key}.png"] = plots.line(
            series, _LABELS[key], _LOSS, f"{_LOSS.capitalize()} against {key}", log_x=True, log_y=True
        )
    if all("fd" in row for row in rows):
        figures["quality.png"] = plots.line(
            _quality(rows), "training FLOPs", rows[0]["features"], "Quality against compute", log_x=True, log_y=True
        )
    return figures


def _curves(rows: Sequence[Row]) -> dict[str, Any]:
    """The loss of each model on the largest share, while it is trained."""
    most = max(row["fraction"] for row in rows)
    of = {row["name"]: row["curve"] for row in rows if row["fraction"] == most}
    return {name: ([p["flops"] for p in curve], [p["loss"] for p in curve]) for name, curve in of.items()}


def _curve(law: PowerLaw, x: Sequence[float]) -> tuple[Any, ...]:
    """The law over the range of its points: an extrapolation is for the reader to make, and to doubt."""
    over = np.geomspace(min(x), max(x), 12)
    return (over, law(over), *(law.band(over) or ()))


def _quality(rows: Sequence[Row]) -> dict[str, Any]:
    """A line for each share of the data, over the models."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: float(row["training_flops"])):
        lines.setdefault(f"{100 * row['fraction']:g}% of the data", []).append(row)
    curves = {name: ([r["training_flops"] for r in found], [r["fd"] for r in found]) for name, found in lines.items()}
    ends = [min(r["training_flops"] for r in rows), max(r["training_flops"] for r in rows)]
    return curves | {"floor (held-out pictures)": (ends, [rows[0]["floor"]] * 2)}
