"""The records of latent shards as they lie in mapped tars: a batch is one gather over all of them.

Tars are mapped, not read. Records of every open shard are addressed from one place, the lowest mapping, so that a batch
from two hundred shards is a single call that copies each record once, straight to where it is wanted.
"""

import ctypes
import hashlib
import os
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ldm.config import DamagedError
from ldm.latents.cache import Cache, RemoteFile
from ldm.latents.order import LIVE_SHARDS, Integers
from ldm.latents.source import Source
from ldm.latents.tables import from_parquet
from ldm.storage import is_local

_ALIGNMENT = 64
"""Of a record in a file, in bytes: tar members begin at multiples of 512, and a .npy header is a multiple of 64."""
_OPENED_AT_ONCE = 8
_MOST_RECORDS = 8_000_000
_MOST_MAPS = 16_384
"""What is held of open shards, at most, unless the windows of the lanes need more: 25 bytes a record, and as many
mappings as a quarter of Linux's limit. Above it the less recently used half gives way."""
_SECONDS_BETWEEN_LOOKS = 1.0


_FIELDS = {"ids": np.int64, "labels": np.int32, "offsets": np.int64, "crcs": np.uint32, "checked": np.bool_}


@dataclass(frozen=True)
class _Shard:
    """A shard as it is opened: its chosen records, its mapped tar, where that lies in the cache, its captions."""

    arrays: dict[str, npt.NDArray[Any]]
    mapped: Tensor
    path: str
    captions: Any


@dataclass
class _Open:
    """What is held of the open shards. A gather keeps hold of the one that it began with, and so of its maps: nothing
    is taken from one, but it is replaced by another."""

    starts: list[Integers]
    """Of each source: the place of each shard's first chosen record in the arrays; -1 for one that is not open."""
    maps: dict[tuple[int, int], tuple[Tensor, str]] = field(default_factory=dict)
    """By source and shard: the mapped tar, and where it lies in the cache; "" for a local one."""
    captions: dict[tuple[int, int], Any] = field(default_factory=dict)
    count: int = 0
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    window: tuple[npt.NDArray[np.void], int] = field(default_factory=lambda: (np.empty(0, np.void), 0))
    """(a record at every place where one can begin, the address of the first)"""

    def append(self, values: dict[str, npt.NDArray[Any]]) -> int:
        """Adds records; returns the place of the first. The old arrays stay whole for those who hold them."""
        first, length = self.count, len(values["ids"])
        for name, kind in _FIELDS.items():
            array = self.arrays.get(name)
            if array is None or first + length > len(array):
                grown: npt.NDArray[Any] = np.zeros(max(2 * first, first + length, 1024), kind)
                if array is not None:
                    grown[:first] = array[:first]
                self.arrays[name] = array = grown
            array[first : first + length] = values[name]
        self.count += length
        return first


class Records:
    """Reads records of one shape from several sources.

    shape: of a record. null_label: what a record without a label gets. shapes: of how many such readers this is one.
    Safe to use from several threads.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        shape: tuple[int, ...],
        null_label: int,
        cache: Cache,
        *,
        captions: bool = False,
        shapes: int = 1,
    ) -> None:
        self.sources, self.shape, self.null_label = sources, shape, null_label
        self._cache, self._with_captions = cache, captions
        self._size = int(np.prod(shape))
        mean = sum(int(source.counts.sum()) for source in sources) // sum(len(source.numbers) for source in sources) + 1
        self._most_records = max(_MOST_RECORDS // shapes, LIVE_SHARDS * mean * 3 // 2)
        self._most_maps = _MOST_MAPS // shapes
        self._lock = threading.Lock()
        self._open = _Open([np.full(len(source.numbers), -1, np.int64) for source in sources])
        self._used = [np.zeros(len(source.numbers), np.int64) for source in sources]
        self._turn, self._looked = 0, 0.0

    def gather(self, source: Integers, shards: Integers, indices: Integers) -> "Gathered":
        """The records at `indices` among the chosen ones of `shards` of `source`, int64 (n,) each.

        Raises DamagedError where a record is not what was written.
        """
        held = self._opened(source, shards)
        places = np.empty(len(shards), np.int64)
        for number in np.unique(source):
            here = np.flatnonzero(source == number)
            places[here] = held.starts[number][shards[here]] + indices[here]
        window, base = held.window
        # One call, and in one thread: a second one gains nothing where the memory is the limit, and would wait for its
        # turn wherever the cores are at work.
        out = window[held.arrays["offsets"][places] - base // _ALIGNMENT].view(np.float16).reshape(-1, *self.shape)
        self._check(held, places, out, source, shards)
        captions = None
        if self._with_captions:
            each = zip(source.tolist(), shards.tolist(), indices.tolist(), strict=True)
            captions = tuple(held.captions[number, shard][index].as_py() for number, shard, index in each)
        labels, ids = (torch.from_numpy(held.arrays[name][places].astype(np.int64)) for name in ("labels", "ids"))
        return Gathered(torch.from_numpy(out), labels, ids, captions)

    def _opened(self, source: Integers, shards: Integers) -> _Open:
        """Opens those that are not open yet."""
        with self._lock:
            self._turn += 1
            wanted = {int(number): np.unique(shards[source == number]) for number in np.unique(source)}
            for number, its in wanted.items():
                self._used[number][its] = self._turn
            missing = [(n, int(shard)) for n, its in wanted.items() for shard in its[self._open.starts[n][its] < 0]]
            if missing:
                held = self._open = self._with_room(missing)
                try:
                    for (number, shard), opened in zip(missing, self._opened_at_once(missing), strict=True):
                        self._add(held, number, shard, opened)
                finally:  # where one fails, those before it are open
                    self._set_window(held)
            return self._open

    def _with_room(self, missing: Sequence[tuple[int, int]]) -> _Open:
        """What is open, without what has to give way: a tar that the cache let go takes room on the disk while it is
        mapped; above the limits the less recently used half goes."""
        held = self._open
        more = sum(int(self.sources[number].counts[shard]) for number, shard in missing)
        if held.count + more > self._most_records or len(held.maps) + len(missing) > self._most_maps:
            return self._recent_half(held)
        if time.monotonic() - self._looked < _SECONDS_BETWEEN_LOOKS:
            return held
        self._looked = time.monotonic()
        gone = [key for key, (_, path) in held.maps.items() if path and not os.path.exists(path)]
        if not gone:
            return held
        starts = [part.copy() for part in held.starts]
        kept = replace(held, starts=starts, maps=dict(held.maps), arrays=dict(held.arrays))
        for number, shard in gone:
            del kept.maps[number, shard]
            kept.starts[number][shard] = -1
        return kept

    def _recent_half(self, held: _Open) -> _Open:
        kept = _Open([np.full_like(part, -1) for part in held.starts])
        by_use = sorted(held.maps, key=lambda key: -int(self._used[key[0]][key[1]]))
        for number, shard in by_use:
            count = int(self.sources[number].counts[shard])
            enough = kept.count + count > self._most_records // 2 or len(kept.maps) >= self._most_maps // 2
            if enough and self._used[number][shard] < self._turn:
                break
            begin = held.starts[number][shard]
            values = {name: held.arrays[name][begin : begin + count] for name in _FIELDS}
            kept.starts[number][shard] = kept.append(values)
            kept.maps[number, shard] = held.maps[number, shard]
            if (number, shard) in held.captions:
                kept.captions[number, shard] = held.captions[number, shard]
        return kept

    def _opened_at_once(self, shards: Sequence[tuple[int, int]]) -> Iterator[_Shard]:
        """Remote ones several at a time; for local ones threads were measured to take twice as long."""
        if all(is_local(self.sources[number].manifest.url) for number, _ in shards):
            yield from (self._open_shard(*each) for each in shards)
            return
        with ThreadPoolExecutor(min(len(shards), _OPENED_AT_ONCE)) as pool:
            yield from pool.map(self._open_shard, *zip(*shards, strict=True))

    def _open_shard(self, number: int, shard: int) -> _Shard:
        source = self.sources[number]
        index_file, columns_file, tar_file = source.files(shard)
        names = ["id", "label", *(["caption"] if self._with_captions else [])]
        index = from_parquet(self._read(index_file), ["id", "offset", "crc32"])
        columns = from_parquet(self._read(columns_file), names)
        mapped, path = self._map(tar_file)
        offsets = index["offset"].to_numpy()
        if len(index) != len(columns) or (offsets % _ALIGNMENT).any() or not self._fits(offsets, mapped):
            raise DamagedError(f"{index_file.url}: does not belong to its tar and columns; it is damaged")
        chosen = source.chosen.numbers(int(source.numbers[shard]), len(index))
        place = slice(None) if chosen is None else chosen
        arrays = {
            "ids": columns["id"].to_numpy()[place],
            "labels": columns["label"].fill_null(self.null_label).to_numpy()[place],
            "offsets": ((mapped.data_ptr() + offsets) // _ALIGNMENT)[place],
            "crcs": index["crc32"].to_numpy()[place],
            # What came through the cache was held against its hash when it came.
            "checked": np.full(len(offsets), not is_local(tar_file.url))[place],
        }
        captions = None
        if self._with_captions:
            captions = columns["caption"].combine_chunks()
            captions = captions if chosen is None else captions.take(chosen)
        return _Shard(arrays, mapped, "" if is_local(tar_file.url) else str(path), captions)

    def _add(self, held: _Open, number: int, shard: int, opened: _Shard) -> None:
        first = held.append(opened.arrays)
        held.maps[number, shard] = opened.mapped, opened.path
        if opened.captions is not None:
            held.captions[number, shard] = opened.captions
        held.starts[number][shard] = first

    def _read(self, file: RemoteFile) -> bytes:
        """A small file, whose hash is looked at."""
        for _ in range(2):  # another process may have made room in the cache just now
            try:
                path = self._cache.get(file)
                data = path.read_bytes()
                break
            except FileNotFoundError as error:
                missing = error
        else:
            raise DamagedError(f"{file.url}: is missing") from missing
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise DamagedError(f"{path}: does not have the hash that its manifest names; it is damaged")
        return data

    def _map(self, file: RemoteFile) -> tuple[Tensor, Path]:
        """A tar, mapped: uint8 (bytes,); and its path. torch closes it again: mappings cost no descriptors."""
        for _ in range(2):
            try:
                path = self._cache.get(file)
                found = path.stat().st_size
                if found != file.bytes:  # a map of a truncated file would end in SIGBUS
                    raise DamagedError(f"{path}: has {found} bytes, its manifest says {file.bytes}; it is damaged")
                return torch.from_file(str(path), shared=False, size=found, dtype=torch.uint8), path
            except FileNotFoundError as error:
                missing = error
        raise DamagedError(f"{file.url}: is missing") from missing

    def _fits(self, offsets: Integers, mapped: Tensor) -> bool:
        return not len(offsets) or (offsets.min() >= 0 and offsets.max() + 2 * self._size <= len(mapped))

    def _set_window(self, held: _Open) -> None:
        """One view from the lowest mapping to the highest. What lies between the mappings is never touched."""
        if not held.maps:
            return
        begin = min(mapped.data_ptr() for mapped, _ in held.maps.values())
        length = max(mapped.data_ptr() + len(mapped) for mapped, _ in held.maps.values()) - begin
        everything = memoryview((ctypes.c_char * length).from_address(begin))
        count = (length - 2 * self._size) // _ALIGNMENT + 1
        held.window = np.ndarray((count,), f"V{2 * self._size}", everything, strides=(_ALIGNMENT,)), begin

    def _check(
        self, held: _Open, places: Integers, out: npt.NDArray[np.float16], source: Integers, shards: Integers
    ) -> None:
        """Holds each record of a local tar against its crc32, once: a check at each read would halve the speed."""
        fresh = np.flatnonzero(~held.arrays["checked"][places])
        for row in fresh:
            if zlib.crc32(memoryview(out[row])) != held.arrays["crcs"][places[row]]:
                number, shard = int(source[row]), int(shards[row])
                raise self._damaged(number, shard, int(places[row] - held.starts[number][shard]))
        if len(fresh):
            held.arrays["checked"][places[fresh]] = True

    def _damaged(self, number: int, shard: int, index: int) -> DamagedError:
        source = self.sources[number]
        _, columns, tar = source.files(shard)
        key = from_parquet(self._read(columns), ["key"])["key"][int(source.records(shard, np.array([index]))[0])]
        return DamagedError(f"{tar.url}: the record of {key} does not have its crc32; it is damaged")


@dataclass(frozen=True)
class Gathered:
    """moments: fp16 (n, *shape). labels, ids: int64 (n,). captions: (n,) texts or None."""

    moments: Tensor
    labels: Tensor
    ids: Tensor
    captions: tuple[str | None, ...] | None
