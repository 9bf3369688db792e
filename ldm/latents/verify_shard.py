"""All that one receipt vouches for, read to the last byte: hashes, and tar, index and columns against one another."""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ldm import storage
from ldm.latents.receipt import Moments, OutputShard, ShardReceipt, merge, receipt_url
from ldm.latents.tables import from_parquet
from ldm.latents.writer import (
    MEMBER,
    MOMENTS_AT_ONCE,
    columns_url,
    index_url,
    latents_url,
    quarantine_url,
    sample_id,
)
from ldm.shards import Hashed

_SHOWN = 5
"""Problems of single records that are named for each tar; the others are counted."""
_TOLERANCE = 1e-9
"""Of the moments: another machine adds up in another order."""

Record = npt.NDArray[np.float16]
Rows = list[dict[str, Any]]


def verify_receipt(url: str, channels: int, receipt: ShardReceipt) -> list[str]:
    """Problems of the files of one receipt of the data set `url`, whose latents have so many channels."""
    checks: list[tuple[str, Callable[[], Iterator[str]]]] = [
        (receipt_url(url, receipt.name), lambda: _check_receipt_file(url, receipt)),
        (quarantine_url(url, receipt.name), lambda: _check_quarantine(url, receipt)),
    ]
    for output in receipt.outputs:
        checks += [(latents_url(url, output.name), lambda o=output: _check_output(url, channels, receipt.source, o))]  # type: ignore[misc]
    problems: list[str] = []
    for place, check in checks:
        try:
            problems.extend(check())
        except FileNotFoundError:
            continue  # quick has named it
        except OSError as error:
            problems.append(f"{place}: cannot be read ({' '.join(str(error).split())})")
    return problems


def _check_receipt_file(url: str, receipt: ShardReceipt) -> Iterator[str]:
    place = receipt_url(url, receipt.name)
    try:
        original = ShardReceipt.from_dict(storage.read_json(place))
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        yield f"{place}: is no receipt ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        return
    if _as_encoded(receipt, original) != original:
        yield f"{place}: says something else than the manifest's table"


def _as_encoded(receipt: ShardReceipt, original: ShardReceipt) -> ShardReceipt:
    """With the columns that it had before `ldm convert` gave it others, for which its file knows no better."""
    before = {output.name: output for output in original.outputs}
    outputs = []
    for output in receipt.outputs:
        if output.columns != output.name and output.name in before:
            was = before[output.name]
            keys = ("columns", "columns_bytes", "columns_sha256", "max_label")
            output = replace(output, **{key: getattr(was, key) for key in keys})
        outputs.append(output)
    return replace(receipt, outputs=tuple(outputs))


def _check_quarantine(url: str, receipt: ShardReceipt) -> Iterator[str]:
    place, counts = quarantine_url(url, receipt.name), receipt.accounting
    outcomes: list[str] = []
    if receipt.quarantine_sha256:
        data = storage.read_bytes(place)
        if hashlib.sha256(data).hexdigest() != receipt.quarantine_sha256:
            yield f"{place}: does not have the hash that its receipt names"
            return
        outcomes = [json.loads(line)["outcome"] for line in data.splitlines()]
    found = (outcomes.count("filtered"), outcomes.count("quarantined"))
    if found != (counts.filtered, counts.quarantined):
        said = f"{counts.filtered} and {counts.quarantined}"
        yield f"{place}: names {found[0]} filtered and {found[1]} quarantined samples, its receipt says {said}"


def _check_output(url: str, channels: int, source: str, output: OutputShard) -> Iterator[str]:
    """One tar with its index and columns. Raises OSError where the storage fails."""
    index_place, columns_place = index_url(url, output.name), columns_url(url, output.columns)
    index, why = _read_table(index_place, output.index_sha256, output.count, ["id", "offset", "length", "crc32"])
    yield from why
    wanted = ["id", "picture", "key", "label"]
    columns, why = _read_table(columns_place, output.columns_sha256, output.count, wanted)
    yield from why
    yield from (f"{columns_place}: {line}" for line in _few(_check_columns(source, output, columns, index)))
    yield from (
        f"{latents_url(url, output.name)}: {line}" for line in _check_tar(url, channels, source, output, index, columns)
    )


def _read_table(place: str, sha256: str, count: int, names: list[str]) -> tuple[Rows, list[str]]:
    """(its rows, none where it cannot be trusted; what is wrong with it)"""
    try:
        data = storage.read_bytes(place)
    except FileNotFoundError:  # quick has named it
        return [], []
    if hashlib.sha256(data).hexdigest() != sha256:
        return [], [f"{place}: does not have the hash that its receipt names"]
    try:
        rows: Rows = from_parquet(data, names).select(names).to_pylist()
    except (pa.ArrowException, KeyError) as error:
        return [], [f"{place}: is not the table that it should be ({' '.join(str(error).split())[:120]})"]
    if len(rows) != count:
        return [], [f"{place}: has {len(rows):,} rows, its receipt says {count:,}"]
    return rows, []


def _check_columns(source: str, output: OutputShard, columns: Rows, index: Rows) -> Iterator[str]:
    labels = [row["label"] for row in columns if row["label"] is not None]
    if columns and max(labels, default=-1) != output.max_label:
        yield f"its labels go up to {max(labels, default=-1)}, its receipt says {output.max_label}"
    if min(labels, default=0) < 0:
        yield f"has the label {min(labels)}"
    for row in columns:
        if row["picture"] != sample_id(source, row["key"]):
            yield f"{row['key']}: its picture is not the hash of shard and key"
    for row, place in zip(columns, index, strict=False):
        if row["id"] != place["id"]:
            yield f"{row['key']}: has the id {row['id']}, its index {place['id']}"


def _check_tar(url: str, channels: int, source: str, output: OutputShard, index: Rows, columns: Rows) -> Iterator[str]:
    wrong, moments, count = list[str](), list[Moments](), 0
    with storage.open_read(latents_url(url, output.name)) as raw:
        hashed, pending = Hashed(raw), list[Record]()
        places: Iterator[tuple[dict[str, Any], dict[str, Any]]] = zip_longest(index, columns, fillvalue={})
        try:
            for name, offset, record in _records(hashed, output.shape):
                count += 1
                wrong += _wrong_record(source, name, offset, record, *next(places, ({}, {})))
                if not wrong:  # else there is nothing to compare, and perhaps no finite number
                    pending.append(record)
                if len(pending) == MOMENTS_AT_ONCE:
                    moments.append(Moments.of(np.stack(pending), channels))
                    pending.clear()
        except _Damaged as error:
            wrong.append(str(error))
        hashed.drain()
    if pending:
        moments.append(Moments.of(np.stack(pending), channels))
    if hashed.digest.hexdigest() != output.sha256:
        yield "does not have the hash that its receipt names"
    if count != output.count:
        yield f"has {count:,} records that can be read, its receipt says {output.count:,}"
    elif not wrong and not _agree(merge(moments), output.moments):
        yield "the mean and spread of its records are not those of its receipt"
    yield from _few(iter(wrong))


def _records(file: Hashed, shape: tuple[int, ...]) -> Iterator[tuple[str, int, Record]]:
    """(key with its variant, offset of its numbers in the tar, fp16 record) of each. Raises _Damaged."""
    header = _npy_header(shape)
    length = 2 * int(np.prod(shape))
    try:
        with tarfile.open(fileobj=cast(BinaryIO, file), mode="r|") as tar:
            for member in tar:
                stem = member.name.removesuffix(f".{MEMBER}")
                if stem == member.name or not member.isreg() or member.size != len(header) + length:
                    raise _Damaged(f"{member.name}: is no KEY.{MEMBER} of {len(header) + length:,} bytes")
                content = tar.extractfile(member)
                data = content.read() if content is not None else b""
                if len(data) != member.size or not data.startswith(header):
                    raise _Damaged(f"{stem}: is no array of fp16 {list(shape)}")
                record = np.frombuffer(data, "<f2", offset=len(header)).reshape(shape)
                yield stem, member.offset_data + len(header), record
    # What tarfile raises of a damaged header; an OSError of the storage goes on.
    except (tarfile.TarError, ValueError, OverflowError, EOFError, IndexError, KeyError) as error:
        raise _Damaged(f"is no whole tar ({' '.join(str(error).split())[:120]})") from None


def _wrong_record(
    source: str, name: str, offset: int, record: Record, index: dict[str, Any], columns: dict[str, Any]
) -> Iterator[str]:
    """index, columns: its rows; empty where these could not be read."""
    if columns:
        variant = name.removeprefix(columns["key"]).removeprefix("~")
        if name != (f"{columns['key']}~{variant}" if variant else columns["key"]):
            yield f"{name}: its row in the columns is that of {columns['key']}"
        elif sample_id(source, columns["key"], variant) != columns["id"]:
            yield f"{name}: its id is not the hash of its shard and key"
    if index:
        if (offset, record.nbytes) != (index["offset"], index["length"]):
            place = f"{index['length']} bytes at {index['offset']}"
            yield f"{name}: has {record.nbytes} bytes at {offset}, its index says {place}"
        if zlib.crc32(record.tobytes()) != index["crc32"]:
            yield f"{name}: does not have the crc32 of its index"
    if not np.isfinite(record).all():
        yield f"{name}: holds numbers that are not finite"


class _Damaged(Exception):
    """Why the rest of a tar cannot be read."""


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """What stands before the numbers of every record."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _agree(one: Moments, other: Moments) -> bool:
    pairs = ((one.mean, other.mean), (one.squares, other.squares), (one.variance, other.variance))
    return one.count == other.count and all(np.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in pairs)


def _few(lines: Iterator[str]) -> Iterator[str]:
    """The first ones, and how many there are more."""
    left = 0
    for number, line in enumerate(lines):
        if number < _SHOWN:
            yield line
        else:
            left += 1
    if left:
        yield f"and {left:,} more of its records are wrong"
