"""Writes the latents of one input shard: tars, indexes and columns first, their receipt last, as the commit."""

import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ldm import storage
from ldm.latents.columns import columns_of
from ldm.latents.receipt import (
    Accounting,
    Moments,
    OutputShard,
    ShardReceipt,
    merge,
    read_receipt,
    receipt_name,
    receipt_url,
)
from ldm.latents.tables import rows_to_parquet

_BLOCK = tarfile.BLOCKSIZE
MOMENTS_AT_ONCE = 64
MEMBER = "latents.npy"
"""A sample KEY is the member KEY.latents.npy: fp16, uncompressed."""


def sample_id(shard: str, key: str, variant: str = "") -> int:
    """63-bit id of a sample: a hash of (input shard, key), for keys repeat across shards.

    variant: which of several records of one picture, as in `flip` or `32x48`; empty where there is only one.
    """
    text = f"{shard}\0{key}\0{variant}" if variant else f"{shard}\0{key}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class ShardWriter:
    """Collects the latents of one input shard in a local folder; `commit` makes them durable.

    Leaving without it writes nothing. One tar for each shape of record: NAME.tar, or NAME.HxW.tar in latent cells where
    `many_shapes` may come. attempt: 0, or the number of the try of what was quarantined before.
    """

    def __init__(
        self,
        url: str,
        source: str,
        fingerprint: str,
        channels: int,
        *,
        attempt: int = 0,
        batch_size: int = 0,
        many_shapes: bool = False,
    ) -> None:
        self.url, self.source, self.fingerprint, self.channels = url, source, fingerprint, channels
        self.attempt, self.batch_size, self.many_shapes = attempt, batch_size, many_shapes
        self.name = receipt_name(source, attempt)
        self._tars: dict[tuple[int, ...], _TarOfOneShape] = {}
        self._keys: set[str] = set()
        self._refused: list[dict[str, Any]] = []

    def __enter__(self) -> "ShardWriter":
        self._folder = storage.attempt_folder(self.url)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for tar in self._tars.values():
            tar.close()
        storage.remove(str(self._folder))

    def add(self, key: str, record: npt.NDArray[np.float16], /, *, variant: str = "", **columns: Any) -> None:
        """Appends one record: raw moments (2C, h, w) or latents (C, h, w), finite. A key has one for each variant."""
        assert record.dtype == np.float16, record.dtype
        if record.shape not in self._tars:
            cells = "x".join(map(str, record.shape[1:]))
            name = f"{self.name}.{cells}" if self.many_shapes else self.name
            assert self.many_shapes or not self._tars, (record.shape, list(self._tars))
            self._tars[record.shape] = _TarOfOneShape(self._folder / f"{name}.tar", name, record.shape, self.channels)
        identity = {"id": sample_id(self.source, key, variant), "picture": sample_id(self.source, key), "key": key}
        self._tars[record.shape].add(f"{key}~{variant}" if variant else key, record, {**identity, **columns})
        self._keys.add(key)

    def holds(self, key: str) -> bool:
        return key in self._keys

    def refuse(self, outcome: str, key: str, reason: str, index: int = 0, size: int = 0) -> None:
        """Notes a sample that is not encoded: "quarantined" or "filtered"; or "partial", of which other records are.

        index: its place in the input shard. size: bytes of the encoded picture.
        """
        record = {"shard": self.source, "key": key, "index": index, "outcome": outcome, "reason": reason, "bytes": size}
        self._refused.append(record)

    def commit(
        self, inputs: int, input_bytes: int, input_sha256: str, input_etag: str = "", input_url: str = ""
    ) -> ShardReceipt:
        """Data, a look whether they are there, then the receipt. Safe to do twice, by two writers at once.

        inputs: samples that came in, all of which must have been added or refused. Raises OSError where the storage
        fails, or another writer's receipt names other bytes than these.
        """
        if (committed := read_receipt(self.url, self.name)) is not None:
            return committed  # another writer came first, and its data must stay as its receipt says
        counts = [sum(r["outcome"] == outcome for r in self._refused) for outcome in ("filtered", "quarantined")]
        accounting = Accounting(len(self._keys) + sum(counts), len(self._keys), *counts)
        if accounting.inputs != inputs:
            raise RuntimeError(f"{self.name}: {inputs} samples came in, but {accounting}: this is a defect of encode")
        outputs = tuple(tar.commit(self.url) for _, tar in sorted(self._tars.items()))
        lines = "".join(json.dumps(record) + "\n" for record in self._refused).encode()
        if lines:
            storage.write_bytes(quarantine_url(self.url, self.name), lines)
        receipt = ShardReceipt(
            name=self.name,
            source=self.source,
            input_url=input_url,
            attempt=self.attempt,
            input_bytes=input_bytes,
            input_etag=input_etag,
            input_sha256=input_sha256,
            fingerprint=self.fingerprint,
            batch_size=self.batch_size,
            accounting=accounting,
            quarantine_sha256=hashlib.sha256(lines).hexdigest() if lines else "",
            outputs=outputs,
        )
        _verify(self.url, receipt)
        return _settle(self.url, receipt)


class _TarOfOneShape:
    """One latent tar in the making, with its index and its columns."""

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], channels: int) -> None:
        self.path, self.name, self.shape, self.channels = path, name, shape, channels
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._digest, self._offset = hashlib.sha256(), 0
        self._rows: list[dict[str, Any]] = []
        self._index: list[dict[str, int]] = []
        self._pending: list[npt.NDArray[np.float16]] = []
        self._moments: list[Moments] = []

    def add(self, key: str, record: npt.NDArray[np.float16], row: dict[str, Any]) -> None:
        npy = io.BytesIO()
        np.lib.format.write_array(npy, np.ascontiguousarray(record), version=(1, 0))
        data, member = record.tobytes(), npy.getvalue()
        offset = self._write_member(f"{key}.{MEMBER}", member) + len(member) - len(data)
        self._index.append({"id": row["id"], "offset": offset, "length": len(data), "crc32": zlib.crc32(data)})
        self._rows.append(row)
        self._pending.append(record)
        if len(self._pending) == MOMENTS_AT_ONCE:
            self._count_moments()

    def commit(self, url: str) -> OutputShard:
        """Makes tar, index and columns durable under their final names."""
        self._write(b"\0" * (2 * _BLOCK))  # the end of a tar
        self.close()
        self._count_moments()
        index, columns = rows_to_parquet(self._index, _INDEX_SCHEMA), columns_of(self._rows)
        storage.commit_file(self.path, latents_url(url, self.name))
        storage.write_bytes(index_url(url, self.name), index)
        storage.write_bytes(columns_url(url, self.name), columns)
        return OutputShard(
            name=self.name,
            shape=self.shape,
            count=len(self._rows),
            bytes=self._offset,
            sha256=self._digest.hexdigest(),
            index_bytes=len(index),
            index_sha256=hashlib.sha256(index).hexdigest(),
            columns=self.name,
            columns_bytes=len(columns),
            columns_sha256=hashlib.sha256(columns).hexdigest(),
            max_label=max((row["label"] for row in self._rows if row.get("label") is not None), default=-1),
            moments=merge(self._moments),
        )

    def close(self) -> None:
        self._file.close()

    def _write_member(self, name: str, data: bytes) -> int:
        """Appends a tar member; returns where its data begins."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        start = self._offset
        self._write(data + b"\0" * (-len(data) % _BLOCK))
        return start

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)

    def _count_moments(self) -> None:
        if self._pending:
            self._moments.append(Moments.of(np.stack(self._pending), self.channels))
            self._pending.clear()


def _verify(url: str, receipt: ShardReceipt) -> None:
    """Raises OSError where what was written is not there in full: the receipt is not written then."""
    for output in receipt.outputs:
        for place, wanted in files_of(url, output):
            found = storage.size(place)
            if found != wanted:
                raise OSError(f"{place}: has {found} bytes after {wanted} were written")


def _settle(url: str, receipt: ShardReceipt) -> ShardReceipt:
    """Writes the receipt where there is none; one of the same content by an overlapping writer is as good."""
    place = receipt_url(url, receipt.name)
    if storage.create(place, storage.to_json(asdict(receipt))):
        return receipt
    found = ShardReceipt.from_dict(storage.read_json(place))
    if replace(found, input_url=receipt.input_url) == receipt:
        return found
    # The data on the disk is ours now, and the receipt that of the other: neither may stand.
    storage.remove(place)
    raise OSError(f"{place}: another writer gave other bytes for this shard at the same time; it is encoded anew")


def files_of(url: str, output: OutputShard) -> list[tuple[str, int]]:
    """(URL, bytes) of the tar, its index and its columns."""
    return [
        (latents_url(url, output.name), output.bytes),
        (index_url(url, output.name), output.index_bytes),
        (columns_url(url, output.columns), output.columns_bytes),
    ]


def estimate_bytes(channels: int, cells: int) -> int:
    """What a record takes in the tar with its headers, in the index and in the columns."""
    return 2 * channels * cells + 1024 + 100


def latents_url(url: str, name: str) -> str:
    return storage.join(url, "latents", f"{name}.tar")


def index_url(url: str, name: str) -> str:
    return storage.join(url, "latents", f"{name}.index.parquet")


def columns_url(url: str, name: str) -> str:
    return storage.join(url, "columns", f"{name}.parquet")


def quarantine_url(url: str, name: str) -> str:
    return storage.join(url, "quarantine", f"{name}.jsonl")


_INDEX_SCHEMA = pa.schema([("id", pa.int64()), ("offset", pa.int64()), ("length", pa.int64()), ("crc32", pa.uint32())])
