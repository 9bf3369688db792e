"""Joins a table to the columns of a latent dataset, by key: new captions, scores or labels without encoding again."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from ldm import storage
from ldm.config import Config, DamagedError, Location, RequestError
from ldm.latents.join_table import Integers, JoinTable, read_join_table
from ldm.latents.manifest import Manifest, commit_generation, generation_receipts, read_manifest
from ldm.latents.receipt import OutputShard, ShardReceipt
from ldm.latents.tables import from_parquet, to_parquet
from ldm.latents.writer import columns_url
from ldm.shards import read_class_names

_SHARDS_AT_ONCE = 16
T = TypeVar("T")


class JoinConfig(Config):
    """Joins a table to the columns of a latent dataset, as a new generation."""

    latents: Location = Field(description="directory or URL of the latent dataset")
    table: Location = Field(
        description="what to join: .parquet, .csv or .jsonl, each row named by `id`, by `shard` and `key`, or by `key`"
    )
    columns: tuple[str, ...] = Field((), description="columns of the table to take, a,b,…; none named: all")
    class_names: Location | None = Field(None, description="JSON file with the list of class names, for new labels")

    @field_validator("columns", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value


@dataclass(frozen=True)
class JoinPlan:
    """matched: records that the table has a row for. unused_rows: of the table. names: of the classes, afterwards."""

    manifest: Manifest
    receipts: list[ShardReceipt]
    table: JoinTable
    names: tuple[str, ...]
    matched: int
    unused_rows: int


@dataclass(frozen=True)
class JoinReport:
    """samples: records of the data set. matched: those that the table has a row for. unused_rows: of the table."""

    samples: int
    matched: int
    unused_rows: int
    columns: tuple[str, ...]
    generation: str


def join(config: JoinConfig) -> JoinReport:
    """Writes the joined columns as new files, and a generation that names them. What was there stays as it is.

    A column that is there already is replaced; where the table has no row it keeps its value, and a new one is null.
    Raises RequestError, see `plan`.
    """
    todo = plan(config)
    joined = iter(_for_all(todo.receipts, lambda source, output: _write(config.latents, source, output, todo.table)))
    if read_manifest(config.latents).generation != todo.manifest.generation:
        raise OSError(f"{config.latents}: another run has changed it meanwhile; nothing is joined, try again")
    generation = commit_generation(
        config.latents,
        [replace(receipt, outputs=tuple(next(joined) for _ in receipt.outputs)) for receipt in todo.receipts],
        todo.manifest.fingerprint,
        todo.manifest.channels,
        todo.manifest.factor,
        todo.names,
        todo.manifest.set_aside,
    )
    columns = tuple(todo.table.values.column_names)
    return JoinReport(todo.manifest.num_samples, todo.matched, todo.unused_rows, columns, generation)


def plan(config: JoinConfig) -> JoinPlan:
    """Joins everything once without writing it, so that nothing is found wrong half way.

    Raises RequestError where the table cannot be read, names a sample twice or none, would change what a record is, or
    has labels without a name; DamagedError where the columns of the data set are damaged.
    """
    manifest = read_manifest(config.latents)
    names = read_class_names(config.class_names) if config.class_names else manifest.conditioning.names
    table = read_join_table(config.table, config.columns)
    receipts = generation_receipts(config.latents, manifest.generation)
    tried = _for_all(receipts, lambda source, output: _try(config.latents, source, output, table))
    highest = max(highest for _, highest in tried)
    if names and highest >= len(names):
        key = f"class_names={config.class_names}" if config.class_names else "class_names"
        raise RequestError(f"{key}: {len(names)} classes have a name, but the labels go up to {highest}; name all")
    rows = [numbers for numbers, _ in tried]
    used = _check_matches(config, table, [source for source, _ in _shards(receipts)], rows)
    matched = sum(int((numbers >= 0).sum()) for numbers in rows)
    return JoinPlan(manifest, receipts, table, names, matched, len(table.values) - used)


def _try(url: str, source: str, output: OutputShard, table: JoinTable) -> tuple[Integers, int]:
    """(the table's row of each record, the highest label afterwards, -1 for none)"""
    before = _columns(url, output)
    rows = table.rows_of(source, before)
    return rows, _highest_label(_joined(before, rows, table))


def _check_matches(config: JoinConfig, table: JoinTable, sources: list[str], rows: list[Integers]) -> int:
    """Returns how many rows of the table are of use."""
    owner = np.full(len(table.values), -1)
    numbers = {source: number for number, source in enumerate(dict.fromkeys(sources))}
    for source, found in zip(sources, rows, strict=True):
        found = np.unique(found[found >= 0])
        others = owner[found]
        clash = np.flatnonzero((others >= 0) & (others != numbers[source]))
        if len(clash):
            both = sorted([source, list(numbers)[others[clash[0]]]])
            raise RequestError(
                f"table={config.table}: one of its keys stands in the shards {both[0]} and {both[1]}; "
                "give the table a column `shard` too"
            )
        owner[found] = numbers[source]
    used = int((owner >= 0).sum())
    if not used:
        raise RequestError(
            f"table={config.table}: none of its {len(owner):,} rows, by {table.by}, is of a sample of {config.latents}"
        )
    return used


def _joined(columns: pa.Table, rows: Integers, table: JoinTable) -> pa.Table:
    """The columns (n rows) with those of the table; rows: of the table, -1 where there is none."""
    for name in table.values.column_names:
        taken = table.values[name].take(pa.array(rows, mask=rows < 0))
        if name not in columns.column_names:
            columns = columns.append_column(name, taken)
            continue
        kind = _common_type(name, columns[name].type, taken.type)
        column = pc.if_else(pa.array(rows >= 0), taken.cast(kind), columns[name].cast(kind))
        columns = columns.set_column(columns.column_names.index(name), name, column)
    return columns.combine_chunks()


def _common_type(name: str, was: pa.DataType, new: pa.DataType) -> pa.DataType:
    """Raises RequestError where one column cannot hold both."""

    def number(kind: pa.DataType) -> bool:
        return pa.types.is_integer(kind) or pa.types.is_floating(kind)

    if was == new or pa.types.is_null(new):
        return was
    if pa.types.is_null(was):
        return new
    if number(was) and number(new):
        return pa.float64()
    if pa.types.is_large_string(new) and pa.types.is_string(was):
        return was
    raise RequestError(f"columns={name}: is {new} in the table, {was} in the data set; give it another name")


def _write(url: str, source: str, output: OutputShard, table: JoinTable) -> OutputShard:
    before = _columns(url, output)
    columns = _joined(before, table.rows_of(source, before), table)
    data = to_parquet(columns)
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"{output.name}.{sha256[:16]}"
    storage.write_bytes(columns_url(url, name), data)
    highest = _highest_label(columns)
    return replace(output, columns=name, columns_bytes=len(data), columns_sha256=sha256, max_label=highest)


def _highest_label(columns: pa.Table) -> int:
    highest = pc.max(columns["label"]).as_py()
    return -1 if highest is None else int(highest)


def _columns(url: str, output: OutputShard) -> pa.Table:
    place = columns_url(url, output.columns)
    data = storage.read_bytes(place)
    if hashlib.sha256(data).hexdigest() != output.columns_sha256:
        raise DamagedError(f"{place}: does not have the hash that its receipt names; it is damaged")
    return from_parquet(data)


def _shards(receipts: Sequence[ShardReceipt]) -> Iterator[tuple[str, OutputShard]]:
    return ((receipt.source, output) for receipt in receipts for output in receipt.outputs)


def _for_all(receipts: Sequence[ShardReceipt], work: Callable[[str, OutputShard], T]) -> list[T]:
    """work(source, output) of every output shard, in their order."""
    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        return list(pool.map(lambda shard: work(*shard), _shards(receipts)))
