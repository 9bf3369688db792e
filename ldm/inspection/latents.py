"""What is in a latent dataset."""

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ldm import images, storage
from ldm.autoencoder import load_autoencoder
from ldm.config import RequestError
from ldm.inspection.config import InspectConfig
from ldm.latents.manifest import Manifest
from ldm.latents.preview import preview
from ldm.latents.tables import from_parquet
from ldm.latents.writer import columns_url

_AT_ONCE = 16


@dataclass(frozen=True)
class LatentsReport:
    """records: latents, of which a picture has several where sizes or flipped copies were asked for. tars: one for each
    shape of an input shard. bytes: of the tars. classes: records by name. columns: name => type. statistics: for each
    channel. psnr: dB of the previewed records that have a source. problems: what could not be read."""

    kind: str
    generation: str
    records: int
    tars: int
    bytes: int
    shapes: dict[str, int]
    classes: dict[str, int]
    unlabelled: int
    columns: dict[str, str]
    accounting: dict[str, int]
    statistics: dict[str, list[float]]
    fingerprint: dict[str, Any]
    set_aside: dict[str, str]
    preview: str | None
    psnr: dict[str, float]
    problems: list[str]


def inspect_latents(
    config: InspectConfig, manifest: Manifest, progress: Callable[[int, int], None] | None = None
) -> LatentsReport:
    """Reads the manifest and all columns; with `preview`, decodes some records."""
    shapes: Counter[str] = Counter()
    for row in manifest.shards:
        shapes["x".join(map(str, row["shape"]))] += row["count"]
    labels, columns, problems = _read_columns(manifest, progress)
    psnr, written = _preview(config, manifest, problems) if config.preview is not None else ({}, None)
    return LatentsReport(
        kind="latents",
        generation=manifest.generation,
        records=manifest.num_samples,
        tars=len(manifest.shards),
        bytes=sum(row["bytes"] for row in manifest.shards),
        shapes=dict(shapes),
        classes={_name(manifest, label): count for label, count in sorted(labels.items()) if label >= 0},
        unlabelled=labels[-1],
        columns=columns,
        accounting=asdict(manifest.accounting),
        statistics={"mean": [*manifest.statistics.mean], "std": [*manifest.statistics.std]},
        fingerprint=manifest.fingerprint,
        set_aside=manifest.set_aside,
        preview=written,
        psnr=psnr,
        problems=problems,
    )


def _read_columns(
    manifest: Manifest, progress: Callable[[int, int], None] | None
) -> tuple[Counter[int], dict[str, str], list[str]]:
    """(records by label, -1 without one; types of the columns by name; files that cannot be read)"""

    def read(row: dict[str, Any]) -> pa.Table | str:
        place = columns_url(manifest.url, row["columns"])
        try:
            data = storage.read_bytes(place)
            if hashlib.sha256(data).hexdigest() != row["columns_sha256"]:
                return f"{place}: does not have the hash that its manifest names; it is damaged"
            return from_parquet(data)
        except FileNotFoundError:
            return f"{place}: is missing"

    labels: Counter[int] = Counter()
    columns: dict[str, str] = {}
    problems = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for number, table in enumerate(pool.map(read, manifest.shards), start=1):
            if isinstance(table, str):
                problems.append(table)
            else:
                columns |= {f.name: str(f.type) for f in table.schema if columns.get(f.name, "null") == "null"}
                for entry in pc.value_counts(table["label"].fill_null(-1)).to_pylist():
                    labels[entry["values"]] += entry["counts"]
            if progress is not None:
                progress(number, len(manifest.shards))
    return labels, columns, problems


def _preview(config: InspectConfig, manifest: Manifest, problems: list[str]) -> tuple[dict[str, float], str | None]:
    """(PSNR by record, where the grid was written); what is wrong is added to `problems`."""
    assert config.preview is not None
    try:
        autoencoder = load_autoencoder(
            storage.join(manifest.url, "autoencoder"), precision=manifest.fingerprint["autoencoder"]["precision"]
        )
        made = preview(manifest, autoencoder, config.count, config.seed)
    except RequestError as error:
        problems.append(str(error).removeprefix("autoencoder="))
        return {}, None
    except (FileNotFoundError, ValueError, tarfile.TarError, pa.ArrowException) as error:
        problems.append(f"the preview could not be made: {' '.join(str(error).split())}")
        return {}, None
    problems += made.problems
    storage.write_bytes(config.preview, images.to_png(made.grid))
    return {name: round(value, 2) for name, value in made.psnr.items()}, config.preview


def _name(manifest: Manifest, label: int) -> str:
    names = manifest.conditioning.names
    return names[label] if label < len(names) else str(label)
