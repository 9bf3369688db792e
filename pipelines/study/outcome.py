"""What a study leaves: tables, plots, a grid of pictures, one MLflow run; and its report."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ldm import images, storage
from pipelines.study.arms import Arms
from pipelines.study.config import StudyConfig
from pipelines.study.table import Row, to_text, write_tables
from pipelines.tracking import Tracker

_LABEL_WIDTH = 190


@dataclass(frozen=True)
class StudyReport:
    """What scripts may rely on. arms: of the study; skipped: those that were done before. rows: the table."""

    study: str
    arms: int
    skipped: int
    rows: list[Row]
    summary: dict[str, Any]
    output: str
    files: list[str]
    run_id: str | None

    def __str__(self) -> str:
        lines = [to_text(self.rows), *(f"{key}: {value}" for key, value in self.summary.items())]
        return "\n".join([*lines, f"{self.arms} arms ({self.skipped} done before); {', '.join(self.files)}"])


@dataclass(frozen=True)
class StudyPlan:
    """What `--dry-run` says. seconds: an estimate for the arms that are not done; None where nothing can be said."""

    study: str
    arms: list[str]
    done: list[str]
    seconds: float | None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{name}{'  (done)' if name in self.done else ''}" for name in self.arms]
        about = f"{self.study}: {len(self.arms)} arms, {len(self.done)} of them done"
        took = "" if self.seconds is None else f"; about {self.seconds / 60:,.1f} minutes, an estimate"
        return "\n".join([about + took, *lines, *self.notes])


@contextlib.contextmanager
def study_run(config: StudyConfig, arms: Arms) -> Iterator[Tracker]:
    """Claims the output; the study's one MLflow run, which goes on where the study does."""
    folder, name = storage.join(config.output, "tracking"), f"study/{storage.name(config.output)}"
    with Tracker(config.tracking, name, config, arms.run_id, folder=folder) as tracker:
        arms.claim(tracker.run_id)
        yield tracker


def write_outcome(
    arms: Arms,
    tracker: Tracker,
    rows: Sequence[Row],
    summary: dict[str, Any],
    figures: Mapping[str, bytes],
    names: Sequence[str],
    skipped: int,
) -> StudyReport:
    """figures: PNG files by name; names: of all arms. In `output`, and in the tracker's run."""
    about = {"study": arms.study, "request": arms.request, "summary": summary}
    write_tables(arms.output, rows, about)
    for name, png in figures.items():
        storage.write_bytes(storage.join(arms.output, name), png)
        tracker.image(name, read_png(png))
    tracker.document("table.json", {**about, "rows": list(rows)})
    files = [storage.join(arms.output, name) for name in ("table.md", "table.csv", "table.json", *figures)]
    return StudyReport(arms.study, len(names), skipped, list(rows), summary, arms.output, files, tracker.run_id)


def read_png(png: bytes) -> npt.NDArray[np.uint8]:
    """=> uint8 (3, H, W)"""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.uint8)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def save_strip(arms: Arms, name: str, first: npt.NDArray[np.uint8]) -> None:
    """An arm's first pictures, uint8 (n, 3, H, W), side by side: a row of the grid."""
    strip = images.to_png(images.grid(first, columns=len(first)))
    storage.write_bytes(storage.join(arms.output, "arms", f"{name}.png"), strip)


def strips_grid(arms: Arms, names: Sequence[str]) -> bytes:
    """The arms' first pictures as one PNG: a row for each arm, with its name, and a column for each seed."""
    strips = [read_png(storage.read_bytes(storage.join(arms.output, "arms", f"{name}.png"))) for name in names]
    width = _LABEL_WIDTH + max(strip.shape[2] for strip in strips)
    canvas = Image.new("RGB", (width, sum(max(16, strip.shape[1]) + 2 for strip in strips)), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for name, strip in zip(names, strips, strict=True):
        height = max(16, strip.shape[1])
        draw.text((4, top + height // 2 - 6), name, fill="black")
        canvas.paste(Image.fromarray(strip.transpose(1, 2, 0)), (_LABEL_WIDTH, top))
        top += height + 2
    return images.to_png(np.asarray(canvas).transpose(2, 0, 1))
