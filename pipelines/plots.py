"""Plots as PNG files: one clean style, and the same bytes for the same numbers and version of matplotlib.

Figures are drawn by Agg and without pyplot, so that any thread may draw, and no screen is needed.
"""

import io
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_IN, DPI = (7.0, 4.2), 120
# Okabe and Ito's colours, which colour-blind readers tell apart (jfly.uni-koeln.de/color).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_STYLE = {
    "font.family": "DejaVu Sans",  # which matplotlib brings along
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
MAX_TICKS = 6
"""Where the curves have no more places than these, each is a tick: 64, 128, 256, and not 6 x 10^1."""
_DRAWING = threading.Lock()  # the style is a setting of the whole process

Numbers: TypeAlias = Sequence[float] | npt.NDArray[Any]
Series: TypeAlias = tuple[Numbers, Numbers] | tuple[Numbers, Numbers, Numbers, Numbers]
"""(x, y), or (x, y, low, high) with an interval around each y."""
Cloud: TypeAlias = tuple[Numbers, Numbers] | tuple[Numbers, Numbers, Sequence[str]]
"""(x, y), or (x, y, texts) with a text beside each point."""


def line(
    series: Mapping[str, Series],
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
) -> bytes:
    """Curves by name, with their points, => a PNG. Labels name their units. Raises ValueError for uneven lengths."""

    def draw(axes: "Axes") -> None:
        for colour, (name, (x, y, *interval)) in zip(_colours(series), series.items(), strict=True):
            axes.plot(x, y, marker="o", color=colour, label=name)
            if interval:
                low, high = interval
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)

    places = sorted({float(place) for x, *_ in series.values() for place in x})
    ticks = places if log_x and len(places) <= MAX_TICKS else None
    return _png(draw, x_label, y_label, title, log_x, log_y, legend=len(series) > 1, x_ticks=ticks)


def scatter_front(
    series: Mapping[str, Cloud],
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
) -> bytes:
    """Points by name, and the Pareto front of all of them, less being better on both axes, => a PNG."""

    def draw(axes: "Axes") -> None:
        for colour, (name, (x, y, *texts)) in zip(_colours(series), series.items(), strict=True):
            axes.plot(x, y, "o", color=colour, label=name, markersize=6)
            for x_i, y_i, text in zip(x, y, *texts, strict=True) if texts else ():
                axes.annotate(text, (x_i, y_i), (5, 4), textcoords="offset points", fontsize=8, color="#555555")
        x_all, y_all = (np.concatenate([np.asarray(cloud[i], float) for cloud in series.values()]) for i in (0, 1))
        best = pareto_front(x_all, y_all)
        front: dict[str, Any] = {"color": "#888888", "label": "Pareto front"}
        axes.plot(x_all[best], y_all[best], drawstyle="steps-post", linewidth=1.2, zorder=0, **front)

    return _png(draw, x_label, y_label, title, log_x, log_y, legend=True)


def pareto_front(x: Numbers, y: Numbers) -> npt.NDArray[np.int64]:
    """Which points no other one beats on one axis without losing on the other, less being better, by rising x."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    front: list[int] = []
    for i in np.lexsort((y, x)):
        if not front or y[i] < y[front[-1]]:
            front.append(int(i))
    return np.array(front, dtype=np.int64)


def _colours(series: Mapping[str, Any]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(series))]


def _png(
    draw: Any,
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool,
    log_y: bool,
    legend: bool,
    x_ticks: Sequence[float] | None = None,
) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    defaults: Any = matplotlib.rcParamsDefault
    style: Any = {key: defaults[key] for key in defaults if key != "backend"} | _STYLE
    with _DRAWING, matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE_IN, dpi=DPI, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(
            xlabel=x_label, ylabel=y_label, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear"
        )
        for axis in (axes.xaxis,) * log_x + (axes.yaxis,) * log_y:
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        if x_ticks is not None:
            axes.set_xticks(x_ticks, [f"{float(f'{place:.3g}'):g}" for place in x_ticks])
            axes.set_xticks([], minor=True)
        axes.set_title(title, loc="left", fontweight="bold")
        if legend:  # below, where no curve is
            figure.legend(loc="outside lower left", ncols=3)
        return _encode(figure)


def _encode(figure: "Figure") -> bytes:
    """Without the version and the date that savefig writes by itself."""
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()
