"""The columns of a latent shard: what is known of each record. One Parquet file beside each tar, in its order."""

import json
from typing import Any

import pyarrow as pa

from ldm.latents.tables import rows_to_parquet
from ldm.shards import clean

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("picture", pa.int64()),  # the id of what several records (sizes, flipped copies) are made of
        ("key", pa.string()),
        ("label", pa.int64()),
        ("caption", pa.string()),
        ("width", pa.int32()),  # of the original, the right way up
        ("height", pa.int32()),
        *((side, pa.float32()) for side in ("left", "top", "right", "bottom")),  # of the crop, in its pixels
        ("flipped", pa.bool_()),
    ]
)


def columns_of(rows: list[dict[str, Any]]) -> bytes:
    """The Parquet file of a shard: SCHEMA, then the kept JSON fields, each of a type that holds all its values."""
    kept = sorted({key for row in rows for key in row} - set(SCHEMA.names))
    extra = [(name, _type_of([row.get(name) for row in rows])) for name in kept]
    for name, kind in extra:
        for row in rows:
            row[name] = _as_type(row.get(name), kind)
    return rows_to_parquet(rows, pa.schema([*SCHEMA, *extra]))


def _type_of(values: list[Any]) -> pa.DataType:
    """Numbers are float64, so that shards agree; a field of several types, a nested one, and one with integers that
    float64 cannot hold (ids), is kept as JSON text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds and kinds <= {int, float} and all(abs(value) <= 2**53 for value in values if type(value) is int):
        return pa.float64()
    if kinds == {bool}:
        return pa.bool_()
    return pa.string() if kinds else pa.null()


def _as_type(value: Any, kind: pa.DataType) -> Any:
    if value is None or not pa.types.is_string(kind):
        return value
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True))
