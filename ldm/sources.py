"""What there is to encode: WebDataset tars, or a folder of pictures cut into shards of its own; each with a name.

The name of an input shard is the name of its output, so it depends on nothing but the input.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice

from ldm import storage
from ldm.config import RequestError, canonical_json
from ldm.shards import PICTURE_EXTENSIONS, RawSample, ShardReader, clean

_SAMPLES_IN_A_FOLDER_SHARD = 1000
_FILES_AT_ONCE = 16
_PATTERN = re.compile(r"[{*?\[,]|^@|\.(tar|txt)$")
_MEMBERS = (*PICTURE_EXTENSIONS, "cls", "txt", "json")


@dataclass(frozen=True)
class InputShard:
    """The unit of work and of commit: a tar at `url`, or `files` of the folder `url`, which then have one `label`.

    etag: what the object store says of its contents, or a hash over the files' names, sizes, ETags and class, which a
    new sub-folder that sorts before may change; empty where unknown.
    """

    name: str
    url: str
    bytes: int
    etag: str
    files: tuple[str, ...] = ()
    label: int | None = None

    def reader(self) -> "ShardReader | FolderReader":
        return FolderReader(self) if self.files else ShardReader(self.url, self.bytes)


def find_shards(source: str | Sequence[str]) -> tuple[dict[str, InputShard], tuple[str, ...]]:
    """(input shards by name, in their order; class names, which the sub-folders of a folder of pictures give).

    Raises RequestError where there is nothing, something of no use, or two inputs of one name.
    """
    # Not asked of a pattern: who may not list a bucket is refused for the key that is its text.
    if isinstance(source, str) and source.strip() and not _PATTERN.search(source) and storage.is_directory(source):
        folder = storage.absolute(source)
        files = storage.list_tree(folder)
        tars = sorted(name for name in files if name.endswith(".tar") and "/" not in name)
        if not tars:
            return _folder_shards(folder, files)
        if any(_extension(name) in PICTURE_EXTENSIONS for name in files):
            raise RequestError(
                f"source={source}: holds tars and pictures; give {source.rstrip('/')}/*.tar, or move one"
            )
        source = [storage.join(folder, name) for name in tars]
    shards: dict[str, InputShard] = {}
    for file in storage.find(source):
        name = storage.name(file.url)
        if not name.endswith(".tar"):
            raise RequestError(f"source={file.url}: is no .tar; give WebDataset tars, or one folder of pictures")
        _add(shards, InputShard(name.removesuffix(".tar"), file.url, file.bytes, file.etag))
    if not any(shard.bytes for shard in shards.values()):  # one among others is set aside when it is read
        raise RequestError(f"source={next(iter(shards.values())).url}: is empty; give a tar that holds pictures")
    return shards, ()


def reader_of(url: str, name: str) -> "ShardReader | FolderReader":
    """Reads the input shard `name` again, given its URL: of a tar, or of the folder of pictures that it was cut from.

    Raises RequestError where there is none.
    """
    if url.endswith(".tar"):
        return ShardReader(url)
    shards, _ = find_shards(url)
    if name not in shards:
        raise RequestError(f"{url}: holds no shard {name} any more")
    return shards[name].reader()


def _folder_shards(url: str, found: Mapping[str, tuple[int, str]]) -> tuple[dict[str, InputShard], tuple[str, ...]]:
    """A folder of pictures: the first sub-folder is the class; runs of samples in the order of their names.

    found: its files, as `storage.list_tree` gives them.
    """
    files = [name for name in found if _extension(name) in _MEMBERS and not storage.name(name).startswith(".")]
    files.sort(key=lambda name: (_folder(name), _stem(name), name))  # so that folders and samples are runs
    if not any(_extension(name) in PICTURE_EXTENSIONS for name in files):
        raise RequestError(f"source={url}: is a folder without pictures and without tars; give one that holds some")
    classes = sorted({name.split("/")[0] for name in files if "/" in name})
    shards: dict[str, InputShard] = {}
    for folder, inside in groupby(files, key=_folder):
        samples = (tuple(members) for _, members in groupby(inside, key=_stem))
        label = classes.index(folder.split("/")[0]) if folder else None
        number = 0
        while some := list(islice(samples, _SAMPLES_IN_A_FOLDER_SHARD)):
            names = tuple(name for members in some for name in members)
            contents = [[name, *found[name]] for name in names]
            etag = hashlib.sha256(canonical_json([contents, label]).encode()).hexdigest()[:16]
            title = (folder or storage.name(url)).replace("/", ".")
            size = sum(found[name][0] for name in names)
            _add(shards, InputShard(f"{title}-{number:05d}", url, size, etag, names, label))
            number += 1
    return shards, tuple(classes)


class FolderReader:
    """Reads the files of one shard of a folder; as `ShardReader` does a tar."""

    def __init__(self, shard: InputShard) -> None:
        self.shard = shard
        self.bytes_read = 0
        self.sha256 = ""

    def __iter__(self) -> Iterator[RawSample]:
        digest = hashlib.sha256()
        for stem, members in groupby(self._files(), key=lambda file: _stem(file[0])):
            sample = RawSample(_key(stem))
            for name, data in members:
                self.bytes_read += len(data)
                digest.update(f"{name}\0{len(data)}\0".encode() + data)
                if _extension(name) in sample.members:  # a.JPG and a.jpg: two samples of one key, as in a tar
                    yield self._labelled(sample)
                    sample = RawSample(sample.key)
                sample.members[_extension(name)] = data
            yield self._labelled(sample)
        if self.bytes_read != self.shard.bytes:
            raise OSError(f"{self.shard.url}: its files changed while they were read")
        self.sha256 = digest.hexdigest()

    def _labelled(self, sample: RawSample) -> RawSample:
        if self.shard.label is not None:
            sample.members.setdefault("cls", str(self.shard.label).encode())
        return sample

    def _files(self) -> Iterator[tuple[str, bytes]]:
        """Several at a time: an object store answers each late."""
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            for first in range(0, len(self.shard.files), _FILES_AT_ONCE):
                names = self.shard.files[first : first + _FILES_AT_ONCE]
                yield from zip(names, pool.map(self._read, names), strict=True)

    def _read(self, name: str) -> bytes:
        return storage.read_bytes(storage.join(self.shard.url, name))


def _add(shards: dict[str, InputShard], shard: InputShard) -> None:
    if shard.name in shards:
        raise RequestError(
            f"source={shard.url}: has the same name as {shards[shard.name].url} ({shard.name}); "
            "output shards are named after inputs, rename one"
        )
    shards[shard.name] = shard


def _extension(name: str) -> str:
    return storage.name(name).rpartition(".")[2].lower()


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _key(stem: str) -> str:
    """For WebDataset a key ends at the first dot of its last part."""
    folder, slash, base = stem.rpartition("/")
    return clean(folder + slash + base.replace(".", "%2E"))
