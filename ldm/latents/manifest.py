"""The manifest of a latent dataset: what it holds, how it was made, and whether it may be used.

Written last, it is the commit. Generations are immutable and named by their hash; `manifest.json` points to the newest.
"""

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ldm import storage
from ldm.autoencoder import Autoencoder
from ldm.config import RequestError, canonical_json, differences
from ldm.images import PICTURE_RULES
from ldm.latents.tables import from_parquet

FORMAT = "ldm-latents"
VERSION = 1
Store = Literal["moments", "mean"]


@dataclass(frozen=True)
class Accounting:
    """inputs = encoded + filtered + quarantined, for each shard and in all."""

    inputs: int = 0
    encoded: int = 0
    filtered: int = 0
    quarantined: int = 0

    def __post_init__(self) -> None:
        assert self.inputs == self.encoded + self.filtered + self.quarantined, self

    def __add__(self, other: "Accounting") -> "Accounting":
        return Accounting(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.inputs:,} = {self.encoded:,} encoded + {self.filtered:,} filtered "
            f"+ {self.quarantined:,} quarantined"
        )


@dataclass(frozen=True)
class Moments:
    """Per-channel sums over `count` latent cells, in float64: of the mean, its square, and the posterior variance."""

    count: int
    sum: tuple[float, ...]
    sum_of_squares: tuple[float, ...]
    sum_of_variances: tuple[float, ...]


@dataclass(frozen=True)
class Statistics:
    """Per-channel mean and standard deviation (C,) of posterior samples over the whole data set."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


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
class ShardReceipt:
    """The commit of one input shard: what came in, what went out, and why the rest did not."""

    name: str
    input_bytes: int
    input_sha256: str
    fingerprint: str
    accounting: Accounting
    shape: tuple[int, ...]  # of one record: (2C, h, w) moments, or (C, h, w)
    latents_bytes: int
    latents_sha256: str
    index_sha256: str
    columns_sha256: str
    max_label: int  # -1 where no sample has a label
    moments: Moments
    quarantined: tuple[tuple[str, str], ...]  # (key, reason)
    filtered: tuple[tuple[str, str], ...]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ShardReceipt":
        pairs = {k: tuple((str(a), str(b)) for a, b in values[k]) for k in ("quarantined", "filtered")}
        sums = {k: tuple(v) for k, v in values["moments"].items() if k != "count"}
        moments = Moments(count=values["moments"]["count"], **sums)
        made = {"accounting": Accounting(**values["accounting"]), "moments": moments, **pairs}
        return ShardReceipt(**{**values, **made, "shape": tuple(values["shape"])})


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
    accounting: Accounting
    shards: tuple[dict[str, Any], ...]  # rows of the shard table: name, count, shape, bytes, sha256, index_sha256

    @property
    def num_samples(self) -> int:
        return self.accounting.encoded


def make_fingerprint(
    autoencoder: Autoencoder, image_size: int, background: tuple[int, int, int], store: Store, precision: str
) -> dict[str, Any]:
    """Everything that the bytes of a latent depend on. Writer and reader both call this and nothing else."""
    return {
        "format": VERSION,
        "autoencoder": {
            "class": autoencoder.class_name,
            "config": hashlib.sha256(canonical_json(autoencoder.config).encode()).hexdigest()[:16],
            "weights": autoencoder.weights_sha256[:16],
            "input_range": [-1, 1],
            "precision": precision,
        },
        "pictures": {**PICTURE_RULES, "size": image_size, "background": list(background)},
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


def receipt_url(url: str, name: str) -> str:
    return storage.join(url, "receipts", f"{name}.json")


def read_receipts(url: str) -> dict[str, ShardReceipt]:
    """All committed shards by name."""
    receipts = {}
    for file in storage.list_dir(storage.join(url, "receipts")):
        if file.endswith(".json") and not file.startswith("."):
            values = storage.read_json(storage.join(url, "receipts", file))
            receipts[values["name"]] = ShardReceipt.from_dict(values)
    return receipts


def combine(moments: Sequence[Moments]) -> Statistics:
    """Statistics over all shards, summed in the given order. Var[z] = Var[mean] + E[posterior variance]."""
    count = sum(m.count for m in moments)
    means, stds = [], []
    for sums in zip(*(zip(m.sum, m.sum_of_squares, m.sum_of_variances, strict=True) for m in moments), strict=True):
        mean = math.fsum(s[0] for s in sums) / count
        variance = math.fsum(s[1] + s[2] for s in sums) / count - mean * mean
        means.append(mean)
        stds.append(math.sqrt(max(variance, 1e-12)))
    return Statistics(tuple(means), tuple(stds))


def commit_generation(
    url: str,
    receipts: Sequence[ShardReceipt],
    fingerprint: dict[str, Any],
    autoencoder: Autoencoder,
    class_names: tuple[str, ...] = (),
) -> str:
    """Writes a generation over the given shards and points `manifest.json` to it. Returns its hash."""
    receipts = sorted(receipts, key=lambda r: r.name)
    kept = [r for r in receipts if r.accounting.encoded]
    assert kept, "a data set without a sample is refused before this"
    rows = [
        {
            "name": r.name,
            "count": r.accounting.encoded,
            "shape": list(r.shape),
            "bytes": r.latents_bytes,
            "sha256": r.latents_sha256,
            "index_sha256": r.index_sha256,
            "columns_sha256": r.columns_sha256,
        }
        for r in kept
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    highest = max(r.max_label for r in kept)
    if class_names and len(class_names) <= highest:
        raise RequestError(f"class_names: gives {len(class_names)} names, but the labels go up to {highest}; name all")
    num_classes = max(highest + 1, len(class_names))
    conditioning = Conditioning("class", num_classes, class_names) if num_classes else Conditioning()
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "streams": {"latents": {"store": fingerprint["store"], "dtype": "float16", "shapes": _shapes(kept)}},
        "channels": autoencoder.latent_channels,
        "factor": autoencoder.factor,
        "conditioning": asdict(conditioning),
        "statistics": asdict(combine([r.moments for r in kept])),
        "accounting": asdict(sum((r.accounting for r in receipts), Accounting())),
        "fingerprint": fingerprint,
        "shards": {"count": len(rows), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()},
    }
    generation = _hash(manifest)
    base, pointer_url = storage.join(url, "generations", generation), storage.join(url, "manifest.json")
    if not storage.exists(f"{base}.json"):
        storage.write_bytes(f"{base}.parquet", buffer.getvalue())
        storage.write_json(f"{base}.json", manifest)
    pointer = {"format": FORMAT, "generation": generation}
    if not storage.exists(pointer_url) or storage.read_json(pointer_url) != pointer:
        storage.write_json(pointer_url, pointer)
    return generation


def read_manifest(url: str, generation: str | None = None, key: str = "latents") -> Manifest:
    """Opens the newest generation, or the named one. Raises RequestError (for the config key `key`)."""
    if generation is None:
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
        generation = str(pointer["generation"])
    base = storage.join(url, "generations", generation)
    if not storage.exists(f"{base}.json"):
        names = storage.list_dir(storage.join(url, "generations"))
        known = ", ".join(name.removesuffix(".json") for name in names if name.endswith(".json"))
        raise RequestError(f"{key}={url}: generation {generation} is not there; it holds {known or 'none'}")
    values = storage.read_json(f"{base}.json")
    if values["version"] > VERSION:
        raise RequestError(f"{key}={url}: has format version {values['version']}, this program reads up to {VERSION}")
    if _hash(values) != generation:
        raise ValueError(f"{base}.json: does not have the hash that is its name; it is damaged")
    table = storage.read_bytes(f"{base}.parquet")
    if hashlib.sha256(table).hexdigest() != values["shards"]["sha256"]:
        raise ValueError(f"{base}.parquet: does not have the hash that its manifest names; it is damaged")
    return Manifest(
        url=url,
        generation=generation,
        fingerprint=values["fingerprint"],
        store=values["streams"]["latents"]["store"],
        dtype=values["streams"]["latents"]["dtype"],
        channels=values["channels"],
        factor=values["factor"],
        conditioning=Conditioning.from_dict(values["conditioning"]),
        statistics=Statistics(tuple(values["statistics"]["mean"]), tuple(values["statistics"]["std"])),
        accounting=Accounting(**values["accounting"]),
        shards=tuple(from_parquet(table).to_pylist()),
    )


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()[:16]


def _shapes(receipts: Sequence[ShardReceipt]) -> list[list[int]]:
    return [list(shape) for shape in sorted({r.shape for r in receipts})]
