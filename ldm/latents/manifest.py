"""The manifest of a latent dataset: what it holds, how it was made, and whether it may be used.

Written last, it is the commit. Generations are immutable and named by their hash; `manifest.json` points to the newest.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ldm import storage
from ldm.autoencoder import Autoencoder
from ldm.config import DamagedError, RequestError, canonical_json, differences
from ldm.latents.receipt import (
    Accounting,
    OutputShard,
    ShardReceipt,
    Statistics,
    account,
    check_names,
    from_tables,
    receipts_in,
    statistics,
    to_tables,
)
from ldm.latents.tables import from_parquet

FORMAT = "ldm-latents"
VERSION = 2
Store = Literal["moments", "mean"]
TABLES = ("receipts", "shards")
"""The Parquet tables of a generation."""
_GENERATION = re.compile("[0-9a-f]{16}")
_READ_COLUMNS = [
    *("name", "count", "shape", "bytes", "sha256", "index_bytes", "index_sha256"),
    *("columns", "columns_bytes", "columns_sha256"),
]


@dataclass(frozen=True)
class Conditioning:
    """What each sample is conditioned on: a tagged union, `none` or `class`."""

    type: Literal["none", "class"] = "none"
    num_classes: int = 0
    names: tuple[str, ...] = ()

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Conditioning":
        return Conditioning(values["type"], values.get("num_classes", 0), tuple(values.get("names", ())))


@dataclass(frozen=True)
class Manifest:
    """One immutable generation of a latent dataset. `generation` is its hash."""

    url: str
    generation: str
    fingerprint: dict[str, Any]
    store: Store
    dtype: str
    channels: int
    factor: int
    conditioning: Conditioning
    statistics: Statistics
    num_samples: int  # records: a picture has several where sizes or flipped copies were asked for
    accounting: Accounting
    set_aside: dict[str, str]  # input shards that are not in it, with the reason
    table: pa.Table  # of the shards, with the columns of _READ_COLUMNS: a hundred thousand rows cost little so

    @cached_property
    def shards(self) -> tuple[dict[str, Any], ...]:
        """The rows of the shard table."""
        return tuple(self.table.to_pylist())

    def shard(self, number: int) -> dict[str, Any]:
        row: dict[str, Any] = self.table.slice(number, 1).to_pylist()[0]
        return row

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """Records of each shard, int64 (S,)."""
        return self.table["count"].to_numpy().astype(np.int64)

    @cached_property
    def shapes(self) -> dict[tuple[int, ...], npt.NDArray[np.int64]]:
        """The numbers of the shards of each shape of record, in the order of the shapes."""
        values = self.table["shape"].combine_chunks()
        flat = values.flatten().to_numpy().reshape(len(values), -1)
        unique, which = np.unique(flat, axis=0, return_inverse=True)
        return {tuple(map(int, shape)): np.flatnonzero(which.ravel() == n) for n, shape in enumerate(unique)}


def make_fingerprint(
    autoencoder: Autoencoder, pictures: dict[str, Any], store: Store, precision: str
) -> dict[str, Any]:
    """Everything that the bytes of a latent depend on. Writer and reader both call this and nothing else.

    pictures: what `PictureRules.fingerprint` says.
    """
    return {
        "format": VERSION,
        "autoencoder": {
            "class": autoencoder.class_name,
            "config": hashlib.sha256(canonical_json(autoencoder.config).encode()).hexdigest()[:16],
            "weights": autoencoder.weights_sha256[:16],
            "input_range": [-1, 1],
            "precision": precision,
        },
        "pictures": pictures,
        "store": store,
        "dtype": "float16",
    }


def fingerprint_hash(fingerprint: dict[str, Any]) -> str:
    return _hash(fingerprint)


def check_fingerprint(url: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises RequestError with a readable diff where a data set was made in another way than is asked for."""
    lines = differences(found, wanted)
    if lines:
        raise RequestError(
            f"destination={url}: holds latents made in another way ({'; '.join(lines)}); "
            "give another destination, or the settings that made it"
        )


def check_alike(manifests: Sequence[Manifest]) -> None:
    """Raises RequestError where data sets cannot be mixed."""
    first = manifests[0]
    for other in manifests[1:]:
        lines = differences(
            {"fingerprint": first.fingerprint, "conditioning": asdict(first.conditioning)},
            {"fingerprint": other.fingerprint, "conditioning": asdict(other.conditioning)},
        )
        if lines:
            raise RequestError(f"latents={other.url}: does not go with {first.url} ({'; '.join(lines)})")


def read_receipts(url: str) -> dict[str, ShardReceipt]:
    """All committed receipts by name: those that the newest generation holds, and those written since."""
    known: dict[str, ShardReceipt] = {}
    if storage.exists(storage.join(url, "manifest.json")):
        known = {receipt.name: receipt for receipt in generation_receipts(url, key="destination")}
    return known | {receipt.name: receipt for receipt in receipts_in(url, but=known)}


def generation_receipts(url: str, generation: str | None = None, key: str = "latents") -> list[ShardReceipt]:
    """The receipts that a generation holds, in the order of their names. Raises RequestError, DamagedError."""
    values, base = _read_generation(url, generation, key)
    return from_tables(*(_checked(f"{base}.{table}.parquet", values[table]) for table in TABLES))


def commit_generation(
    url: str,
    receipts: Sequence[ShardReceipt],
    fingerprint: dict[str, Any],
    channels: int,
    factor: int,
    class_names: tuple[str, ...] = (),
    set_aside: Mapping[str, str] | None = None,
) -> str:
    """Writes a generation over the given receipts and points `manifest.json` to it. Returns its hash.

    set_aside: input shards that failed to the end, with their reasons; they are named in the manifest.
    """
    receipts = sorted(receipts, key=lambda r: r.name)
    outputs = [output for receipt in receipts for output in receipt.outputs]
    assert outputs, "a data set without a sample is refused before this"
    highest = max(output.max_label for output in outputs)
    if class_names and len(class_names) <= highest:
        raise RequestError(f"class_names: gives {len(class_names)} names, but the labels go up to {highest}; name all")
    num_classes = max(highest + 1, len(class_names))
    conditioning = Conditioning("class", num_classes, class_names) if num_classes else Conditioning()
    tables = dict(zip(TABLES, to_tables(receipts), strict=True))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "streams": {"latents": {"store": fingerprint["store"], "dtype": "float16", "shapes": _shapes(outputs)}},
        "channels": channels,
        "factor": factor,
        "conditioning": asdict(conditioning),
        "statistics": asdict(statistics([output.moments for output in outputs])),
        "num_samples": sum(output.count for output in outputs),
        "accounting": asdict(account(receipts)),
        "set_aside": dict(sorted((set_aside or {}).items())),
        "fingerprint": fingerprint,
        **{name: hashlib.sha256(table).hexdigest() for name, table in tables.items()},
    }
    generation = _hash(manifest)
    base, pointer_url = storage.join(url, "generations", generation), storage.join(url, "manifest.json")
    if not storage.exists(f"{base}.json"):
        for name, table in tables.items():
            storage.write_bytes(f"{base}.{name}.parquet", table)
        storage.write_json(f"{base}.json", manifest)
    pointer = {"format": FORMAT, "generation": generation}
    if not storage.exists(pointer_url) or storage.read_json(pointer_url) != pointer:
        storage.write_json(pointer_url, pointer)
    return generation


def read_manifest(url: str, generation: str | None = None, key: str = "latents") -> Manifest:
    """Opens the newest generation, or the named one. Raises RequestError (for the config key `key`)."""
    values, base = _read_generation(url, generation, key)
    table = from_parquet(_checked(f"{base}.shards.parquet", values["shards"]), _READ_COLUMNS)
    check_names(*table["name"].to_pylist(), *table["columns"].to_pylist())
    return Manifest(
        url=url,
        generation=storage.name(base),
        fingerprint=values["fingerprint"],
        store=values["streams"]["latents"]["store"],
        dtype=values["streams"]["latents"]["dtype"],
        channels=values["channels"],
        factor=values["factor"],
        conditioning=Conditioning.from_dict(values["conditioning"]),
        statistics=Statistics(tuple(values["statistics"]["mean"]), tuple(values["statistics"]["std"])),
        num_samples=values["num_samples"],
        accounting=Accounting(**values["accounting"]),
        set_aside=values["set_aside"],
        table=table,
    )


def _read_generation(url: str, generation: str | None, key: str) -> tuple[dict[str, Any], str]:
    """(the manifest proper, its URL without an ending)"""
    generation = generation or _newest(url, key)
    base = storage.join(url, "generations", generation)
    if not _GENERATION.fullmatch(generation) or not storage.exists(f"{base}.json"):
        names = storage.list_dir(storage.join(url, "generations"))
        known = ", ".join(name.removesuffix(".json") for name in names if name.endswith(".json"))
        raise RequestError(f"{key}={url}: generation {generation} is not there; it holds {known or 'none'}")
    try:
        values = storage.read_json(f"{base}.json")
    except ValueError as error:
        raise DamagedError(str(error)) from None
    version = values.get("version") if isinstance(values, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise RequestError(f"{key}={url}: has format version {version}, this program reads {VERSION}")
    if _hash(values) != generation:
        raise DamagedError(f"{base}.json: does not have the hash that is its name; it is damaged")
    return values, base


def _newest(url: str, key: str) -> str:
    pointer_url = storage.join(url, "manifest.json")
    if not storage.exists(pointer_url):
        raise RequestError(
            f"{key}={url}: is no latent dataset (no manifest.json); give what `ldm encode` wrote, once it is done"
        )
    try:
        pointer = storage.read_json(pointer_url)
    except ValueError as error:
        raise RequestError(f"{key}={error}") from None
    if not isinstance(pointer, dict) or pointer.get("format") != FORMAT:
        raise RequestError(f"{key}={url}: manifest.json is not of a latent dataset; give what `ldm encode` wrote")
    if not isinstance(pointer.get("generation"), str):
        raise RequestError(f"{key}={url}: manifest.json names no generation; it is damaged")
    return str(pointer["generation"])


def _checked(url: str, sha256: str) -> bytes:
    data = storage.read_bytes(url)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedError(f"{url}: does not have the hash that its manifest names; it is damaged")
    return data


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()[:16]


def _shapes(outputs: Sequence[OutputShard]) -> list[list[int]]:
    return [list(shape) for shape in sorted({output.shape for output in outputs})]
