"""Latent datasets to damage, and those that somebody damaged with all hashes made to match."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldm import storage
from ldm.autoencoder import Autoencoder
from ldm.images import PictureRules
from ldm.latents import reading
from ldm.latents.manifest import (
    FORMAT,
    TABLES,
    commit_generation,
    fingerprint_hash,
    make_fingerprint,
    read_manifest,
    read_receipts,
)
from ldm.latents.receipt import ShardReceipt, receipt_url
from ldm.latents.writer import ShardWriter
from tests.pictures import records


def whole_dataset(url: str, autoencoder: Autoencoder) -> str:
    """Two input shards of two shapes, flipped copies, what was refused, and a second try of that. Its generation."""
    fingerprint = make_fingerprint(autoencoder, PictureRules((4, 8), flip=True).fingerprint(), "moments", "float32")
    autoencoder.save(storage.join(url, "autoencoder"))
    storage.write_json(storage.join(url, "fingerprint.json"), fingerprint)
    reading.keep(url, {"label": "cls"})
    made = fingerprint_hash(fingerprint)
    receipts = [_shard(url, name, made, range(5), refused=("broken", "small")) for name in ("one", "two")]
    receipts.append(_shard(url, "one", made, range(50, 51), attempt=1))
    return commit_generation(url, receipts, fingerprint, autoencoder.latent_channels, autoencoder.factor)


def _shard(
    url: str, name: str, fingerprint: str, keys: range, attempt: int = 0, refused: tuple[str, ...] = ()
) -> ShardReceipt:
    with ShardWriter(url, name, fingerprint, 4, attempt=attempt, many_shapes=True) as writer:
        for n in keys:
            for cells in (2, 4):
                for flip in ("", "-flip"):
                    record = records(1, seed=100 * n + cells + len(flip), shape=(8, cells, cells))[0]
                    variant = f"{2 * cells}x{2 * cells}{flip}"
                    writer.add(f"{n:05d}", record, variant=variant, label=n % 3, flipped=bool(flip))
        for outcome, key in zip(("quarantined", "filtered"), refused, strict=False):
            writer.refuse(outcome, key, "planted")
        return writer.commit(len(keys) + len(refused), 1000, "0" * 64)


def flip_a_bit(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def rewrite(url: Path, change: Callable[[ShardReceipt], ShardReceipt]) -> None:
    """Receipts changed by `change`, in their files and in a new generation, so that every hash of them matches."""
    receipts = [change(receipt) for receipt in read_receipts(str(url)).values()]
    for receipt in receipts:
        storage.write_json(receipt_url(str(url), receipt.name), asdict(receipt))
    commit_generation(str(url), receipts, storage.read_json(str(url / "fingerprint.json")), 4, 2)


def rewrite_manifest(url: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The manifest proper changed, as a new generation whose name is its hash."""
    old = read_manifest(str(url)).generation
    values = json.loads((url / "generations" / f"{old}.json").read_text())
    change(values)
    new = fingerprint_hash(values)  # the same hash
    for table in TABLES:
        shutil.copy(url / "generations" / f"{old}.{table}.parquet", url / "generations" / f"{new}.{table}.parquet")
    storage.write_json(str(url / "generations" / f"{new}.json"), values)
    storage.write_json(str(url / "manifest.json"), {"format": FORMAT, "generation": new})


def with_true_hashes(url: Path, receipt: ShardReceipt) -> ShardReceipt:
    """A receipt that names the sizes and hashes of what is there now."""

    def facts(file: str) -> tuple[int, str]:
        data = (url / file).read_bytes()
        return len(data), hashlib.sha256(data).hexdigest()

    outputs = []
    for output in receipt.outputs:
        found = {}
        for part, file in (
            ("", f"latents/{output.name}.tar"),
            ("index_", f"latents/{output.name}.index.parquet"),
            ("columns_", f"columns/{output.columns}.parquet"),
        ):
            found[f"{part}bytes"], found[f"{part}sha256"] = facts(file)
        outputs.append(replace(output, **found))
    return replace(receipt, outputs=tuple(outputs))


def edit_table(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Rows of a Parquet file changed in place."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), buffer)
    path.write_bytes(buffer.getvalue())
