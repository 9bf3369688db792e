"""Parquet tables in memory, whole ones."""

import pyarrow as pa
import pyarrow.parquet as pq


def from_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Raises pyarrow.ArrowInvalid where it is no Parquet."""
    # Not `pq.read_table`: its threads let go of the buffer when they please. A process that ends meanwhile is aborted,
    # for Python lets no thread in any more.
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(columns=columns, use_threads=False)
