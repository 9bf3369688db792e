"""Writes one latent shard: tar, index and columns under temporary names, the receipt last, as the commit."""

import hashlib
import io
import os
import tarfile
import tempfile
import zlib
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ldm import storage
from ldm.latents.manifest import Accounting, Moments, ShardReceipt, receipt_url

_BLOCK = tarfile.BLOCKSIZE
MEMBER = "latents.npy"
"""A sample KEY is the member KEY.latents.npy: fp16, uncompressed."""


def sample_id(shard: str, key: str) -> int:
    """63-bit id of a sample: a hash of (input shard, key), for keys repeat across shards."""
    digest = hashlib.blake2b(f"{shard}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class ShardWriter:
    """Collects one shard in a local temporary directory; `commit` uploads it. Leaving without it writes nothing."""

    def __init__(self, url: str, name: str, fingerprint: str, channels: int) -> None:
        self.url, self.name, self.fingerprint, self.channels = url, name, fingerprint, channels
        self._rows: list[dict[str, Any]] = []
        self._index: list[dict[str, int]] = []
        self._quarantined: list[tuple[str, str]] = []
        self._filtered: list[tuple[str, str]] = []
        self._shape: tuple[int, ...] = ()
        self._sums = np.zeros((3, channels))
        self._cells = 0
        self._digest = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> "ShardWriter":
        # Local destinations collect on their own disk, so that the commit is a rename.
        folder = storage.local_path(self.url) if storage.is_local(self.url) else None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix=".attempt-", dir=folder)
        self._tar_path = Path(self._folder.name) / f"{self.name}.tar"
        self._tar = self._tar_path.open("wb")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tar.close()
        self._folder.cleanup()

    def add(self, key: str, record: npt.NDArray[np.float16], **columns: Any) -> None:
        """Appends one sample. record: raw moments (2C, h, w) or latents (C, h, w), all of one shape, finite."""
        assert record.dtype == np.float16 and self._shape in ((), record.shape)
        self._shape = record.shape
        npy = io.BytesIO()
        np.lib.format.write_array(npy, np.ascontiguousarray(record), version=(1, 0))
        data = record.tobytes()
        member = npy.getvalue()
        start = self._write_member(f"{key}.{MEMBER}", member)
        identity = sample_id(self.name, key)
        offset = start + len(member) - len(data)
        self._index.append({"id": identity, "offset": offset, "length": len(data), "crc32": zlib.crc32(data)})
        self._rows.append({"id": identity, "key": key, **columns})
        self._count_moments(record.astype(np.float64))

    def quarantine(self, key: str, reason: str) -> None:
        self._quarantined.append((key, reason))

    def filter(self, key: str, reason: str) -> None:
        self._filtered.append((key, reason))

    def commit(self, input_bytes: int, input_sha256: str) -> ShardReceipt:
        """Makes the shard durable; the receipt comes last. Safe to do twice, by two writers at once."""
        self._write(b"\0" * (2 * _BLOCK))  # the end of a tar
        self._tar.flush()
        os.fsync(self._tar.fileno())
        self._tar.close()
        index = _parquet(self._index, _INDEX_SCHEMA)
        columns = _parquet(self._rows, _COLUMNS_SCHEMA)
        encoded = len(self._rows)
        inputs = encoded + len(self._filtered) + len(self._quarantined)
        labels = [row["label"] for row in self._rows if row["label"] is not None]
        receipt = ShardReceipt(
            name=self.name,
            input_bytes=input_bytes,
            input_sha256=input_sha256,
            fingerprint=self.fingerprint,
            accounting=Accounting(inputs, encoded, len(self._filtered), len(self._quarantined)),
            shape=tuple(self._shape),
            latents_bytes=self._offset,
            latents_sha256=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
            columns_sha256=hashlib.sha256(columns).hexdigest(),
            max_label=max(labels, default=-1),
            moments=Moments(self._cells, *(tuple(row) for row in self._sums.tolist())),
            quarantined=tuple(self._quarantined),
            filtered=tuple(self._filtered),
        )
        if encoded:
            storage.commit_file(self._tar_path, latents_url(self.url, self.name))
            storage.write_bytes(index_url(self.url, self.name), index)
            storage.write_bytes(columns_url(self.url, self.name), columns)
        storage.write_json(receipt_url(self.url, self.name), asdict(receipt))
        return receipt

    def _write_member(self, name: str, data: bytes) -> int:
        """Appends a tar member; returns where its data begins."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        start = self._offset
        self._write(data + b"\0" * (-len(data) % _BLOCK))
        return start

    def _write(self, data: bytes) -> None:
        self._tar.write(data)
        self._digest.update(data)
        self._offset += len(data)

    def _count_moments(self, record: npt.NDArray[np.float64]) -> None:
        mean = record[: self.channels]
        self._cells += mean[0].size
        self._sums[0] += mean.sum((1, 2))
        self._sums[1] += np.square(mean).sum((1, 2))
        if len(record) == 2 * self.channels:
            self._sums[2] += np.exp(record[self.channels :]).sum((1, 2))


def latents_url(url: str, name: str) -> str:
    return storage.join(url, "latents", f"{name}.tar")


def index_url(url: str, name: str) -> str:
    return storage.join(url, "latents", f"{name}.index.parquet")


def columns_url(url: str, name: str) -> str:
    return storage.join(url, "columns", f"{name}.parquet")


_INDEX_SCHEMA = pa.schema([("id", pa.int64()), ("offset", pa.int64()), ("length", pa.int64()), ("crc32", pa.uint32())])
_COLUMNS_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.string()),
        ("label", pa.int64()),
        ("caption", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    return buffer.getvalue()
