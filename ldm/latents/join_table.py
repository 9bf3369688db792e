"""The table that is joined to a latent dataset: read, checked, and found in by a hash of each row's key."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from ldm import storage
from ldm.config import RequestError
from ldm.latents.columns import SCHEMA
from ldm.latents.tables import from_parquet
from ldm.latents.writer import sample_id
from ldm.shards import MAX_LABEL

REPLACEABLE = {"label": pa.int64(), "caption": pa.string()}
"""Columns of every data set that a table may replace."""
_KEYS = {"id": pa.int64(), "shard": pa.string(), "key": pa.string()}
_LARGEST_BLOCK = 1 << 30

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class JoinTable:
    """values: the columns to join. by: `id`, `shard and key` or `key`. hashes: of each row's key, sorted; `order`: the
    rows in that order."""

    url: str
    values: pa.Table
    by: str
    hashes: Integers
    order: Integers

    def rows_of(self, source: str, columns: pa.Table) -> Integers:
        """Number of the row for each record (n,) of the input shard `source`, -1 where there is none."""
        if self.by == "key":
            return self._find(_hash_keys(None, columns["key"].to_pylist()))
        pictures = self._find(columns["picture"].to_numpy())
        if self.by != "id":
            return pictures
        records = self._find(columns["id"].to_numpy())  # one of several of a picture, or all of them
        return np.where(records >= 0, records, pictures)

    def _find(self, hashes: Integers) -> Integers:
        places = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        return np.where(self.hashes[places] == hashes, self.order[places], -1)


def read_join_table(url: str, chosen: Sequence[str] = ()) -> JoinTable:
    """Reads a .parquet, .csv or .jsonl with the columns `chosen`, or all. Raises RequestError."""
    read = _parse(url)
    by = "id" if "id" in read.column_names else "shard and key" if "shard" in read.column_names else "key"
    for name in by.split(" and "):
        if name not in read.column_names:
            found = ", ".join(read.column_names)
            raise RequestError(f"table={url}: has no column {name!r} (it has {found}); give id, shard and key, or key")
        read = _cast(url, read, name, _KEYS[name])
    keys = {name: read[name].to_pylist() for name in by.split(" and ")}
    if any(None in column or "" in column for column in keys.values()):
        raise RequestError(f"table={url}: has a row without {by}; name the sample of each row")
    hashes = np.array(keys["id"], np.int64) if by == "id" else _hash_keys(keys.get("shard"), keys["key"])
    order = np.argsort(hashes, kind="stable")
    twice = np.flatnonzero(np.diff(hashes[order]) == 0)
    if len(twice):
        row = int(order[twice[0]])
        named = " ".join(str(column[row]) for column in keys.values())
        raise RequestError(f"table={url}: has two rows for {by} {named}; leave one")
    return JoinTable(url, _values(url, read, chosen), by, hashes[order], order)


def _values(url: str, read: pa.Table, chosen: Sequence[str]) -> pa.Table:
    """What is to be joined. Raises RequestError."""
    there = [name for name in read.column_names if name not in _KEYS]
    for name in chosen:
        if name not in there:
            raise RequestError(f"columns={name}: is not in the table, which has {', '.join(there) or 'keys alone'}")
    names = list(chosen) or there
    if not names:
        raise RequestError(f"table={url}: has keys and no other column; give one to join")
    values = read.select(names)
    for name in names:
        if not name:
            raise RequestError(f"table={url}: has a column without a name; leave it out, or choose with columns=")
        if name in SCHEMA.names and name not in REPLACEABLE:
            raise RequestError(
                f"table={url}: its column {name} says what a record is, which stays; leave it out or rename it, "
                "or choose others with columns="
            )
        if name in REPLACEABLE:
            values = _cast(url, values, name, REPLACEABLE[name])
    if "label" in names:
        least, most = pc.min_max(values["label"]).as_py().values()
        if least is not None and not 0 <= least <= most <= MAX_LABEL:
            raise RequestError(f"table={url}: its labels go from {least} to {most}, expected 0 to {MAX_LABEL}")
    return values.combine_chunks()


def _parse(url: str) -> pa.Table:
    """The whole table, at least one row, no two columns of one name."""
    ending = storage.name(url).rpartition(".")[2]
    parsers: dict[str, Callable[[bytes], pa.Table]] = {"parquet": from_parquet, "csv": _parse_csv, "jsonl": _parse_json}
    if ending not in parsers:
        raise RequestError(f"table={url}: is no table that can be read; give a .parquet, .csv or .jsonl")
    try:
        read = parsers[ending](storage.read_bytes(url))
    except (FileNotFoundError, IsADirectoryError):
        raise RequestError(f"table={url}: is no file; give a .parquet, .csv or .jsonl") from None
    except pa.ArrowException as error:
        raise RequestError(f"table={url}: cannot be read ({' '.join(str(error).split())[:160]})") from None
    if len(read) == 0:
        raise RequestError(f"table={url}: has no row")
    twice = [name for name in read.column_names if read.column_names.count(name) > 1]
    if twice:
        raise RequestError(f"table={url}: has two columns {twice[0]!r}; leave one")
    for number, field in enumerate(read.schema):
        if pa.types.is_dictionary(field.type):  # a category of pandas
            read = read.set_column(number, field.name, read[number].cast(field.type.value_type))
    return read


def _parse_csv(data: bytes) -> pa.Table:
    # Keys are texts: `00012` is not 12. One block: types are guessed from the first. Captions have several lines.
    converting = pyarrow.csv.ConvertOptions(column_types={**_KEYS, **REPLACEABLE}, strings_can_be_null=False)
    reading = pyarrow.csv.ReadOptions(use_threads=False, block_size=_block(data))
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(pa.BufferReader(data), reading, parsing, converting)


def _parse_json(data: bytes) -> pa.Table:
    reading = pyarrow.json.ReadOptions(use_threads=False, block_size=_block(data))
    return pyarrow.json.read_json(pa.BufferReader(data), reading)


def _block(data: bytes) -> int:
    return min(max(1, len(data)), _LARGEST_BLOCK)


def _cast(url: str, table: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    column = table[name]
    if column.type == kind:
        return table
    # Numbers as keys have lost their zeros, and texts as numbers are a mistake: only the width may differ.
    alike = pa.types.is_integer(column.type) and pa.types.is_integer(kind)
    alike |= pa.types.is_large_string(column.type) and pa.types.is_string(kind)
    if not alike and not pa.types.is_null(column.type):
        raise RequestError(f"table={url}: its {name} is {column.type}, expected {kind}")
    try:
        return table.set_column(table.column_names.index(name), name, column.cast(kind))
    except pa.ArrowInvalid as error:
        raise RequestError(f"table={url}: its {name} is no {kind} ({' '.join(str(error).split())[:120]})") from None


def _hash_keys(shards: list[str] | None, keys: list[str]) -> Integers:
    return np.array([sample_id(s, k) for s, k in zip(shards or [""] * len(keys), keys, strict=True)], np.int64)
