"""Parquet tables in memory, whole ones."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def rows_to_parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    return to_parquet(pa.Table.from_pylist(rows, schema=schema))


def from_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Raises pyarrow.ArrowInvalid where it is no Parquet."""
    # Not `pq.read_table`: its threads let go of the buffer when they please. A process that ends meanwhile is aborted,
    # for Python lets no thread in any more.
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(columns=columns, use_threads=False)
