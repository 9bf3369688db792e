"""Reading, writing and removing files, whole ones, on the local disk and in object stores."""

import contextlib
import errno
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec

from ldm.storage.listing import exists, file_info
from ldm.storage.ranges import read_range
from ldm.storage.temporary import temporary_beside
from ldm.storage.transport import ask, insist, is_local, local_path, s3_code

PART = 16 << 20
"""Bytes asked for at once, so also what is asked for again after a fault."""
_STREAMS = 8
"""Parts of one file that are fetched at once: one S3 connection gives less than a tenth of what a node can take."""


class Readable(Protocol):
    """A file to read from its start to its end."""

    def read(self, size: int = -1, /) -> bytes: ...


class Digest(Protocol):
    """A hash of `hashlib`."""

    def update(self, data: Any, /) -> None: ...


@contextlib.contextmanager
def open_read(url: str) -> Iterator[Readable]:
    """A file open for reading from its start to its end. Raises FileNotFoundError; an OSError where it is cut short."""
    if is_local(url):
        with local_path(url).open("rb") as handle:
            yield handle
        return
    with ask(url, _open) as file:
        yield _RemoteFile(url, file)


def read_bytes(url: str) -> bytes:
    """The whole of one version of a file. Raises FileNotFoundError."""
    if is_local(url):
        return local_path(url).read_bytes()

    def read(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
        # Not `cat_file`: above 50 MB s3fs fetches parts, of several versions perhaps, and gives up at a broken one.
        with _open(fs, path) as file:
            data = bytes(file.read())
            if problem := _cut(len(data), file):
                raise OSError(errno.EIO, problem)
        return data

    return ask(url, read)


class _RemoteFile:
    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file, self._count = url, file, 0

    def read(self, size: int = -1, /) -> bytes:
        # After a failure fsspec's file stands where it stood. s3fs asks for the ETag that it met at first.
        data = bytes(insist(self._url, lambda: self._file.read(size)))
        self._count += len(data)
        if (size < 0 or (size and not data)) and (problem := _cut(self._count, self._file)):
            raise OSError(errno.EIO, problem, self._url)
        return data


def _open(fs: fsspec.AbstractFileSystem, path: str) -> Any:
    file = fs.open(path, "rb", block_size=PART)
    if getattr(file, "details", {}).get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))  # s3fs opens it as an empty file
    return file


def _cut(count: int, file: Any) -> str:
    """What is wrong with a file that ended after `count` bytes; "" where that is its size, or nobody knows its size."""
    size = getattr(file, "size", None)
    return "" if size in (None, count) else f"ended after {count} of {size} bytes"


def read_json(url: str) -> Any:
    """Raises FileNotFoundError, or ValueError naming the file where it is no JSON."""
    try:
        return json.loads(read_bytes(url))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{url}: is no JSON ({error})") from None


def read_json_lines(url: str) -> list[Any]:
    """Raises FileNotFoundError, or ValueError naming the file where a line is no JSON."""
    try:
        return [json.loads(line) for line in read_bytes(url).splitlines()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{url}: is no JSON lines ({error})") from None


def write_bytes(url: str, data: bytes) -> None:
    """Writes a whole object, or nothing."""
    if not is_local(url):
        ask(url, lambda fs, path: fs.pipe_file(path, data))
        return
    temporary = temporary_beside(url)
    try:
        temporary.write_bytes(data)
        commit_file(temporary, url)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: Any) -> bytes:
    """JSON that two writers of the same value write alike."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_json(url: str, value: Any) -> None:
    write_bytes(url, to_json(value))


@contextlib.contextmanager
def writing(url: str) -> Iterator[BinaryIO]:
    """A file to write to, of which only what stands in it at the end of the block is at `url`; nothing if it raises."""
    with contextlib.ExitStack() as stack:
        folder = None if is_local(url) else stack.enter_context(tempfile.TemporaryDirectory())
        temporary = temporary_beside(url) if folder is None else Path(folder) / "whole"
        stack.callback(temporary.unlink, missing_ok=True)
        with temporary.open("wb") as handle:
            yield handle
        commit_file(temporary, url)


def create(url: str, data: bytes) -> bool:
    """Writes a whole object where none is, or says False: of several writers one hears True.

    On an object store all those hear True who wrote the same bytes at the same time.
    """
    if is_local(url):
        return _create_local(url, data)
    if exists(url):
        return False

    def put(fs: fsspec.AbstractFileSystem, path: str) -> bool:
        try:
            fs.pipe_file(path, data, mode="create")
        except OSError as error:
            if not isinstance(error, FileExistsError) and s3_code(error) != "PreconditionFailed":
                raise
            # Perhaps it was us, and the answer got lost on its way: the repetition then meets what it wrote itself.
            return read_bytes(url) == data
        return True

    return ask(url, put)


def _create_local(url: str, data: bytes) -> bool:
    temporary, target = temporary_beside(url), local_path(url)
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        try:
            os.link(temporary, target)
        except FileExistsError:
            # NFS may say so to the repetition of a request that it has done.
            return os.path.samefile(temporary, target)
        _flush_directory(target.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def commit_file(file: Path, url: str) -> None:
    """Moves a finished local file to `url`: at once for a local one, by one upload for an object store."""
    if not is_local(url):
        ask(url, lambda fs, path: fs.put_file(str(file), path))
        file.unlink()
        return
    target = local_path(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
    if file.stat().st_dev == target.parent.stat().st_dev:
        os.replace(file, target)
        _flush_directory(target.parent)
        return
    temporary = temporary_beside(url)
    try:
        shutil.copyfile(file, temporary)
        commit_file(temporary, url)
    finally:
        temporary.unlink(missing_ok=True)
    file.unlink()


def _flush_directory(folder: Path) -> None:
    """A name must survive a power cut, too."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def fetch(url: str, target: Path) -> None:
    """Copies a file to a local one, or leaves none. Raises FileNotFoundError."""
    try:
        if is_local(url):
            shutil.copyfile(local_path(url), target)
            return
        found = file_info(url)
        fetch_known(url, target, found[0])
        if file_info(url) != found:
            raise OSError(errno.EBUSY, "changed while it was fetched", url)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def fetch_known(url: str, target: Path, size: int, digest: Digest | None = None) -> None:
    """Copies `size` bytes of a remote file to a local one, with no other question; a failure leaves a part of them.

    It is for the caller to find by their hash whether they are those of one version: `digest` is fed while they come.
    """
    with _open_sized(target, size) as handle, ThreadPoolExecutor(_STREAMS) as pool:

        def fetch_part(start: int) -> slice | bytes | bytearray:
            end = min(start + PART, size)

            def read(fs: fsspec.AbstractFileSystem, path: str) -> bytes | bytearray:
                data = read_range(fs, path, start, end)
                if len(data) != end - start and file_info(url)[0] != size:
                    raise OSError(errno.EBUSY, f"does not have {size} bytes", url)  # nor will it at the next try
                if len(data) != end - start:
                    raise OSError(errno.EIO, f"sent {len(data)} bytes of {end - start}")
                return data

            data = ask(url, read)
            _write_at(handle, data, start)
            # Of several parts not the bytes: those that wait for an earlier part would pile up in memory.
            return data if size <= PART else slice(start, end)

        for part in pool.map(fetch_part, range(0, size, PART)):  # raises what a part raised
            if digest is None:
                continue
            if isinstance(part, slice):
                digest.update(memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))[part])
            else:
                digest.update(part)


def _write_at(handle: BinaryIO, data: bytes | bytearray, start: int) -> None:
    rest = memoryview(data)
    while rest:  # a disk that fills up takes a part first
        count = os.pwrite(handle.fileno(), rest, start)
        rest, start = rest[count:], start + count


def _open_sized(target: Path, size: int) -> BinaryIO:
    """A file of that many bytes, to write to; the room that it has on the disk it keeps."""
    handle = os.fdopen(os.open(target, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    handle.truncate(size)
    return handle


def remove(url: str) -> None:
    """Removes a file or a directory with all that is in it; nothing there is no error."""

    def take_away(fs: fsspec.AbstractFileSystem, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)
        if exists(url):  # s3fs overlooks the objects that an answer names as not deleted
            raise OSError(errno.EBUSY, "is still there after it was removed")

    if exists(url):
        ask(url, take_away)
