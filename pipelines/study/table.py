"""What a study found, as a table: rows of named values, written as JSON, CSV and Markdown."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from ldm import storage

Row = dict[str, Any]


_FIRST = (
    *("name", "space", "image_size", "latent_shape", "size", "fraction", "sampler", "eta", "guidance_scale", "steps"),
    *(
        "loss",
        "fd",
        "fd_low",
        "fd_high",
        "floor",
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "seconds_per_picture",
        "pareto",
    ),
    *("train_images_per_second", "peak_memory_gb", "activation_mb_per_image", "train_seconds", "parameters", "samples"),
)
"""What an arm is, and what was asked of it; the rest comes after."""


def columns(rows: Sequence[Row]) -> list[str]:
    """All keys of all rows."""
    found = dict.fromkeys(key for row in rows for key in row)
    return [key for key in _FIRST if key in found] + [key for key in found if key not in _FIRST]


def write_tables(output: str, rows: Sequence[Row], about: Row) -> None:
    """OUTPUT/table.json (with `about`, what the rows depend on), table.csv and table.md, each whole."""
    storage.write_json(storage.join(output, "table.json"), {**about, "rows": list(rows)})
    storage.write_bytes(storage.join(output, "table.csv"), to_csv(rows).encode())
    storage.write_bytes(storage.join(output, "table.md"), to_markdown(rows).encode())


def to_csv(rows: Sequence[Row]) -> str:
    """Every digit of every value; an empty cell where a row has none."""
    target = io.StringIO()
    writer = csv.DictWriter(target, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()


def to_markdown(rows: Sequence[Row]) -> str:
    """Four significant digits."""
    names = columns(rows)
    lines = [names, ["---"] * len(names), *([_cell(row.get(name)) for name in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_text(rows: Sequence[Row]) -> str:
    """For a terminal: columns of one width."""
    names = columns(rows)
    lines = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join("  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
