"""The records of latent shards as they lie in mapped tars: a batch is one gather over all of them.

Tars are mapped, not read. Records of every open shard are addressed from one place, the lowest mapping, so that a batch
from two hundred shards is a single call that copies each record once, straight to where it is wanted.
"""

import ctypes
import hashlib
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ldm.config import DamagedError
from ldm.latents.cache import Cache, RemoteFile
from ldm.latents.choice import Chosen
from ldm.latents.manifest import Manifest
from ldm.latents.tables import from_parquet
from ldm.latents.writer import columns_url, index_url, latents_url
from ldm.storage import is_local

Integers = npt.NDArray[np.int64]
_ALIGNMENT = 64
"""Of a record in a file, in bytes: tar members begin at multiples of 512, and a .npy header is a multiple of 64."""
_FETCHED_AT_ONCE = 8
_MOST_RECORDS = 8_000_000
_MOST_MAPS = 16_384
"""What is held of open shards, at most: 37 bytes a record, and as many mappings as a quarter of Linux's limit."""


@dataclass
class Source:
    """The shards of one data set that hold one shape, and which of their records are chosen.

    numbers: of the shards in the manifest, (S,). chosen: over all shards of the manifest.
    """

    manifest: Manifest
    numbers: Integers
    chosen: Chosen

    @cached_property
    def counts(self) -> Integers:
        """Chosen records of each shard (S,)."""
        return self.chosen.counts[self.numbers]

    def record(self, shard: int, index: int) -> int:
        """The number in its tar of a chosen record."""
        numbers = self._chosen_numbers(shard)
        return index if numbers is None else int(numbers[index])

    def lacks(self, shard: int, record: int) -> bool:
        """Whether a record of the shard is not chosen."""
        numbers = self._chosen_numbers(shard)
        return numbers is not None and record not in numbers

    def _chosen_numbers(self, shard: int) -> Integers | None:
        number = int(self.numbers[shard])
        return self.chosen.numbers(number, int(self.manifest.counts[number]))

    def files(self, shard: int) -> list[RemoteFile]:
        """The index, the columns and the tar of shard number `shard` of this source."""
        url, row = self.manifest.url, self.manifest.shard(int(self.numbers[shard]))
        return [
            RemoteFile(index_url(url, row["name"]), row["index_sha256"], row["index_bytes"]),
            RemoteFile(columns_url(url, row["columns"]), row["columns_sha256"], row["columns_bytes"]),
            RemoteFile(latents_url(url, row["name"]), row["sha256"], row["bytes"]),
        ]


_FIELDS = {"ids": np.int64, "labels": np.int64, "offsets": np.int64, "crcs": np.uint32, "checked": np.bool_}


@dataclass
class _Open:
    """What is held of the open shards. A gather keeps hold of the one that it began with, and so of its maps."""

    starts: list[Integers]
    """Of each source: the place of each shard's first chosen record in the arrays; -1 for one that is not open."""
    maps: list[Tensor] = field(default_factory=list)
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

    shape: of a record. null_label: what a record without a label gets. Safe to use from several threads.
    """

    def __init__(
        self, sources: Sequence[Source], shape: tuple[int, ...], null_label: int, cache: Cache, captions: bool
    ) -> None:
        self.sources, self.shape, self.null_label = sources, shape, null_label
        self._cache, self._with_captions = cache, captions
        self._size = int(np.prod(shape))
        self._lock = threading.Lock()
        self._open = self._nothing_open()

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
        labels, ids = (torch.from_numpy(held.arrays[name][places]) for name in ("labels", "ids"))
        return Gathered(torch.from_numpy(out), labels, ids, captions)

    def _opened(self, source: Integers, shards: Integers) -> _Open:
        """Opens those that are not open yet."""
        with self._lock:
            held = self._open
            missing = self._missing(held, source, shards)
            if missing and (held.count > _MOST_RECORDS or len(held.maps) + len(missing) > _MOST_MAPS):
                held = self._nothing_open()
                missing = self._missing(held, source, shards)
            if missing:
                self._fetch(missing)
                for number, shard in missing:
                    self._open_shard(held, number, shard)
                self._set_window(held)
            self._open = held
            return held

    def _fetch(self, shards: Sequence[tuple[int, int]]) -> None:
        """Has the files of several shards fetched at once where they are remote."""
        files = [file for number, shard in shards for file in self.sources[number].files(shard)]
        if remote := [file for file in files if not is_local(file.url)]:
            with ThreadPoolExecutor(_FETCHED_AT_ONCE) as pool:
                list(pool.map(self._cache.get, remote))

    def _nothing_open(self) -> _Open:
        return _Open([np.full(len(source.numbers), -1, np.int64) for source in self.sources])

    def _missing(self, held: _Open, source: Integers, shards: Integers) -> list[tuple[int, int]]:
        found = []
        for number in np.unique(source):
            wanted = np.unique(shards[source == number])
            found += [(int(number), int(shard)) for shard in wanted[held.starts[number][wanted] < 0]]
        return found

    def _open_shard(self, held: _Open, number: int, shard: int) -> None:
        source = self.sources[number]
        index_file, columns_file, tar_file = source.files(shard)
        names = ["id", "label", *(["caption"] if self._with_captions else [])]
        index = from_parquet(self._read(index_file), ["id", "offset", "crc32"])
        columns = from_parquet(self._read(columns_file), names)
        mapped = self._map(tar_file)
        offsets = index["offset"].to_numpy()
        if len(index) != len(columns) or (offsets % _ALIGNMENT).any() or not self._fits(offsets, mapped):
            raise DamagedError(f"{index_file.url}: does not belong to its tar and columns; it is damaged")
        chosen = source.chosen.numbers(int(source.numbers[shard]), len(index))
        place = slice(None) if chosen is None else chosen
        first = held.append(
            {
                "ids": columns["id"].to_numpy()[place],
                "labels": columns["label"].fill_null(self.null_label).to_numpy()[place],
                "offsets": ((mapped.data_ptr() + offsets) // _ALIGNMENT)[place],
                "crcs": index["crc32"].to_numpy()[place],
                # What came through the cache was held against its hash when it came.
                "checked": np.full(len(offsets), not is_local(tar_file.url))[place],
            }
        )
        held.maps.append(mapped)
        if self._with_captions:
            captions = columns["caption"].combine_chunks()
            held.captions[number, shard] = captions if chosen is None else captions.take(chosen)
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

    def _map(self, file: RemoteFile) -> Tensor:
        """A tar, mapped: uint8 (bytes,). torch closes the file again, so that mappings cost no descriptors."""
        for _ in range(2):
            try:
                path = self._cache.get(file)
                found = path.stat().st_size
                if found != file.bytes:  # a map of a truncated file would end in SIGBUS
                    raise DamagedError(f"{path}: has {found} bytes, its manifest says {file.bytes}; it is damaged")
                return torch.from_file(str(path), shared=False, size=found, dtype=torch.uint8)
            except FileNotFoundError as error:
                missing = error
        raise DamagedError(f"{file.url}: is missing") from missing

    def _fits(self, offsets: Integers, mapped: Tensor) -> bool:
        return not len(offsets) or (offsets.min() >= 0 and offsets.max() + 2 * self._size <= len(mapped))

    def _set_window(self, held: _Open) -> None:
        """One view from the lowest mapping to the highest. What lies between the mappings is never touched."""
        begin = min(mapped.data_ptr() for mapped in held.maps)
        length = max(mapped.data_ptr() + len(mapped) for mapped in held.maps) - begin
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
        key = from_parquet(self._read(columns), ["key"])["key"][source.record(shard, index)]
        return DamagedError(f"{tar.url}: the record of {key} does not have its crc32; it is damaged")


@dataclass(frozen=True)
class Gathered:
    """moments: fp16 (n, *shape). labels, ids: int64 (n,). captions: (n,) texts or None."""

    moments: Tensor
    labels: Tensor
    ids: Tensor
    captions: tuple[str | None, ...] | None
