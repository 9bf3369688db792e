"""The receipt of one input shard: the commit of its latents. What came in, what went out, and why the rest did not.

Receipts are JSON files first; a generation holds all of them again in two Parquet tables, one row for each receipt and
one for each output shard, so that ten thousand shards are read with two requests.
"""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ldm import storage
from ldm.config import DamagedError
from ldm.latents.tables import from_parquet, rows_to_parquet


@dataclass(frozen=True)
class Accounting:
    """inputs = encoded + filtered + quarantined, for each shard and in all. Counts samples that came in."""

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
class Statistics:
    """Per-channel mean and standard deviation (C,) of posterior samples over the whole data set."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Moments:
    """Of `count` latent cells, per channel (C,), in float64: the mean, the sum of squared deviations from it, and the
    mean of the posterior variance."""

    count: int
    mean: tuple[float, ...]
    squares: tuple[float, ...]
    variance: tuple[float, ...]

    @staticmethod
    def of(records: npt.NDArray[np.float16], channels: int) -> "Moments":
        """records: raw moments (N, 2C, h, w), or latents (N, C, h, w) without a variance."""
        means = records[:, :channels].astype(np.float64)
        mean = means.mean((0, 2, 3))
        squares = np.square(means - mean[None, :, None, None]).sum((0, 2, 3))
        logvar = records[:, channels:].astype(np.float64)
        variance = np.exp(logvar).mean((0, 2, 3)) if logvar.size else np.zeros(channels)
        return Moments(means[:, 0].size, *(tuple(values.tolist()) for values in (mean, squares, variance)))


def merge(parts: Sequence[Moments]) -> Moments:
    """Of all cells together: Chan, Golub & LeVeque, "Updating formulae ...", 1979, eq. 2.1, over all parts at once.

    The sums are exact (fsum), so that neither the order nor a mean far from zero costs a digit.
    """
    parts = [part for part in parts if part.count]
    if len(parts) == 1:
        return parts[0]
    count, columns = sum(part.count for part in parts), []
    for channel in range(len(parts[0].mean)):
        mean = math.fsum(p.count * p.mean[channel] for p in parts) / count
        between = math.fsum(p.count * (p.mean[channel] - mean) ** 2 for p in parts)
        squares = math.fsum(p.squares[channel] for p in parts) + between
        columns.append((mean, squares, math.fsum(p.count * p.variance[channel] for p in parts) / count))
    return Moments(count, *zip(*columns, strict=True))


def statistics(parts: Sequence[Moments]) -> Statistics:
    """Of posterior samples: Var[z] = Var[mean] + E[posterior variance]."""
    whole = merge(parts)
    spread = zip(whole.squares, whole.variance, strict=True)
    std = tuple(math.sqrt(max(squares / whole.count + variance, 1e-12)) for squares, variance in spread)
    return Statistics(whole.mean, std)


def check_names(*names: str) -> None:
    """Names become files of the data set. Raises DamagedError for one that would lead out of its folder."""
    for name in names:
        if not isinstance(name, str) or not name or "/" in name or "\0" in name:
            raise DamagedError(f"a receipt or a generation names the file {name!r}, which is none of its data set")


@dataclass(frozen=True)
class OutputShard:
    """One tar of latents of one shape. shape: of a record, (2C, h, w) moments or (C, h, w). max_label: -1 for none.

    columns: name of the file of columns, which is the shard's own until others are joined to it.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str
    columns: str
    columns_bytes: int
    columns_sha256: str
    max_label: int
    moments: Moments

    def __post_init__(self) -> None:
        check_names(self.name, self.columns)


@dataclass(frozen=True)
class ShardReceipt:
    """The commit of one input shard, or of another try of what was quarantined in it (`attempt` 1, 2, ...).

    input_url: where it was read. quarantine_sha256: of `quarantine/NAME.jsonl`; empty where every sample was encoded.
    batch_size: of the calls of the autoencoder, on which the last bits depend.
    """

    name: str
    source: str  # name of the input shard
    input_url: str
    attempt: int
    input_bytes: int
    input_etag: str
    input_sha256: str
    fingerprint: str
    batch_size: int
    accounting: Accounting
    quarantine_sha256: str
    outputs: tuple[OutputShard, ...]

    def __post_init__(self) -> None:
        check_names(self.name, self.source)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ShardReceipt":
        outputs = tuple(_output(output, Moments(**_tuples(output["moments"]))) for output in values["outputs"])
        return ShardReceipt(**{**values, "accounting": Accounting(**values["accounting"]), "outputs": outputs})


def receipt_name(source: str, attempt: int) -> str:
    return f"{source}~{attempt}" if attempt else source


def account(receipts: Iterable[ShardReceipt]) -> Accounting:
    """Of all: a later attempt takes over what the one before it left in quarantine."""
    total, latest = Accounting(), dict[str, ShardReceipt]()
    for receipt in sorted(receipts, key=lambda r: (r.source, r.attempt)):
        before = latest.get(receipt.source)
        if before is not None:
            handed_over = before.accounting.quarantined
            assert receipt.accounting.inputs == handed_over, (before, receipt)
            total = Accounting(
                total.inputs - handed_over, total.encoded, total.filtered, total.quarantined - handed_over
            )
        total += receipt.accounting
        latest[receipt.source] = receipt
    return total


def receipt_url(url: str, name: str) -> str:
    return storage.join(url, "receipts", f"{name}.json")


def read_receipt(url: str, name: str) -> ShardReceipt | None:
    """None where it is not committed."""
    try:
        return ShardReceipt.from_dict(storage.read_json(receipt_url(url, name)))
    except FileNotFoundError:
        return None


def names_in(url: str) -> set[str]:
    """Of the committed receipts, by their files."""
    files = storage.list_dir(storage.join(url, "receipts"))
    return {file.removesuffix(".json") for file in files if file.endswith(".json") and not file.startswith(".")}


def receipts_in(url: str, but: Iterable[str] = ()) -> list[ShardReceipt]:
    """The committed receipts by their files, without those of the names `but`."""
    wanted = [receipt_url(url, name) for name in sorted(names_in(url).difference(but))]
    with ThreadPoolExecutor(16) as pool:
        return [ShardReceipt.from_dict(values) for values in pool.map(storage.read_json, wanted)]


def to_tables(receipts: Sequence[ShardReceipt]) -> tuple[bytes, bytes]:
    """(table of receipts, table of output shards) as Parquet, in the order of the names."""
    rows, outputs = [], []
    for receipt in sorted(receipts, key=lambda r: r.name):
        values = {key: getattr(receipt, key) for key in _RECEIPTS.names if hasattr(receipt, key)}
        rows.append({**values, **asdict(receipt.accounting)})
        for output in receipt.outputs:
            plain = {key: getattr(output, key) for key in _SHARDS.names if hasattr(output, key)}
            moments = {f"moments_{key}": value for key, value in asdict(output.moments).items()}
            outputs.append({**plain, **moments, "receipt": receipt.name})
    return rows_to_parquet(rows, _RECEIPTS), rows_to_parquet(outputs, _SHARDS)


def from_tables(receipts: bytes, shards: bytes) -> list[ShardReceipt]:
    outputs: dict[str, list[OutputShard]] = {}
    for row in from_parquet(shards).to_pylist():
        moments = Moments(**_tuples({key: row.pop(f"moments_{key}") for key in Moments.__dataclass_fields__}))
        outputs.setdefault(row.pop("receipt"), []).append(_output(row, moments))
    found = []
    for row in from_parquet(receipts).to_pylist():
        counts = Accounting(*(row.pop(key) for key in Accounting.__dataclass_fields__))
        found.append(ShardReceipt(**row, accounting=counts, outputs=tuple(outputs.get(row["name"], ()))))
    return found


def _output(values: dict[str, Any], moments: Moments) -> OutputShard:
    return OutputShard(**{**values, "shape": tuple(values["shape"]), "moments": moments})


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


_TEXTS = ("name", "source", "input_url", "input_etag", "input_sha256", "fingerprint", "quarantine_sha256")
_COUNTS = ("attempt", "input_bytes", "batch_size", *Accounting.__dataclass_fields__)
_RECEIPTS = pa.schema([*((name, pa.string()) for name in _TEXTS), *((name, pa.int64()) for name in _COUNTS)])
_SHARDS = pa.schema(
    [
        *((name, pa.string()) for name in ("name", "receipt", "sha256", "index_sha256", "columns", "columns_sha256")),
        *((name, pa.int64()) for name in ("count", "bytes", "index_bytes", "columns_bytes")),
        *((name, pa.int64()) for name in ("max_label", "moments_count")),
        ("shape", pa.list_(pa.int64())),
        *((f"moments_{name}", pa.list_(pa.float64())) for name in ("mean", "squares", "variance")),
    ]
)
