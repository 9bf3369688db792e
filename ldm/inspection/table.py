"""A report of inspect as a table for a person."""

from typing import Any

from ldm import storage
from ldm.inspection.latents import LatentsReport
from ldm.inspection.pictures import PicturesReport

_CLASSES = 20
_PROBLEMS = 20


def to_text(report: PicturesReport | LatentsReport) -> str:
    rows = _of_pictures(report) if isinstance(report, PicturesReport) else _of_latents(report)
    rows += [("problem", line) for line in report.problems[:_PROBLEMS]]
    if len(report.problems) > _PROBLEMS:
        rows.append(("", f"and {len(report.problems) - _PROBLEMS:,} more"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def _of_pictures(report: PicturesReport) -> list[tuple[str, str]]:
    about = "" if report.exact else "about "
    rows = [
        ("shards", f"{report.shards:,}, {storage.readable(report.bytes)}"),
        ("samples", f"{about}{report.samples:,}, of which {about}{report.encodable:,} can be encoded"),
        ("probed", f"{report.probed:,} samples of {report.probed_shards:,} shards"),
        ("formats", _counts(report.formats)),
    ]
    for name, values in (("width", report.width), ("height", report.height)):
        if values:
            least, middle, greatest = values
            rows.append((name, f"{least:g} to {greatest:g} pixels, median {middle:g}"))
    rows.append(("broken", f"{sum(report.broken.values()):,} ({report.broken_share:.2%})"))
    rows += [("", f"{count:,} {reason}") for reason, count in report.broken.items()]
    rows.append(("labels", f"{report.labelled:.1%}, captions {report.captioned:.1%}"))
    if report.class_names:
        rows.append(("classes", f"{len(report.class_names):,} sub-folders: {_few(report.class_names)}"))
    rows += _of_forecast(report)
    return rows + ([("preview", report.preview)] if report.preview else [])


def _of_forecast(report: PicturesReport) -> list[tuple[str, str]]:
    made = report.forecast
    if made is None:
        how = "nothing that can be decoded" if not report.width else "give autoencoder= to have it measured"
        return [("encode", how)]
    rate = f"{made.images_per_second:,.1f} images/s decoded and encoded here ({made.device})"
    time = f"{made.hours:,.1f} hours" if made.hours >= 1 else f"{60 * made.hours:,.1f} minutes"
    machines = "this machine" if made.num_workers == 1 else f"{made.num_workers:,} such machines"
    rows = [("encode", rate), ("", f"about {time} on {machines}, {storage.readable(made.output_bytes)} of latents")]
    return rows + ([("", f"price {made.price:,.2f}")] if made.price is not None else [])


def _of_latents(report: LatentsReport) -> list[tuple[str, str]]:
    counts = report.accounting
    rows = [
        ("generation", report.generation),
        ("records", f"{report.records:,} in {report.tars:,} tars, {storage.readable(report.bytes)}"),
        ("shapes", _counts(report.shapes)),
        (
            "accounting",
            f"{counts['inputs']:,} = {counts['encoded']:,} encoded + {counts['filtered']:,} filtered "
            f"+ {counts['quarantined']:,} quarantined",
        ),
        ("columns", ", ".join(f"{name} ({kind})" for name, kind in report.columns.items())),
        ("unlabelled", f"{report.unlabelled:,}"),
    ]
    if report.classes:
        shown = dict(list(report.classes.items())[:_CLASSES])
        more = f", … {len(report.classes) - _CLASSES:,} more" if len(report.classes) > _CLASSES else ""
        rows.append(("classes", f"{len(report.classes):,}: {_counts(shown)}{more}"))
    for name, values in report.statistics.items():
        rows.append((name, " ".join(f"{value:.4f}" for value in values)))
    rows += [("fingerprint" if not number else "", line) for number, line in enumerate(_leaves(report.fingerprint))]
    rows += [("set aside", f"{shard}: {why}") for shard, why in report.set_aside.items()]
    if report.preview:
        rows.append(("preview", report.preview))
        rows += [("", f"{name}: {value:.1f} dB PSNR") for name, value in report.psnr.items()]
    return rows


def _counts(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in values.items()) or "none"


def _few(names: list[str]) -> str:
    return ", ".join(names[:_CLASSES]) + (", …" if len(names) > _CLASSES else "")


def _leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    """`a.b: value` for each leaf."""
    lines = []
    for key, value in values.items():
        lines += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}: {value}"]
    return lines
