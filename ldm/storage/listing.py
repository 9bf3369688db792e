"""What is there: whether a file or directory exists, how large files are, what stands in a directory."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from ldm.storage.transport import ask, is_local, local_path, name


class Listing(NamedTuple):
    """What stands in one directory: files by name, with their size in bytes and ETag ("" where there is none)."""

    files: dict[str, tuple[int, str]]
    folders: list[str]


def exists(url: str) -> bool:
    """Whether there is a file or directory; an OSError where that cannot be told."""
    if is_local(url):
        return local_path(url).exists()
    try:
        ask(url, lambda fs, path: fs.info(path))  # fsspec's own `exists` says no to any error
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_directory(url: str) -> bool:
    """Whether there is a directory; on an object store, whether anything lies below."""
    if is_local(url):
        return local_path(url).is_dir()
    try:
        return bool(ask(url, lambda fs, path: fs.info(path))["type"] == "directory")
    except (FileNotFoundError, NotADirectoryError):
        return False


def file_info(url: str) -> tuple[int, str]:
    """Size in bytes and ETag ("" where there is none) of one file. Raises FileNotFoundError, IsADirectoryError."""
    if is_local(url):
        status = local_path(url).stat()
        directory, about = stat.S_ISDIR(status.st_mode), (status.st_size, "")
    else:
        info = ask(url, lambda fs, path: fs.info(path))
        directory, about = info["type"] == "directory", _size_and_etag(info)
    if directory:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), url)
    return about


def size(url: str) -> int:
    """Size in bytes. Raises FileNotFoundError, IsADirectoryError."""
    return file_info(url)[0]


def list_dir(url: str) -> list[str]:
    """Names in a directory, sorted; empty where there is none."""
    if is_local(url):
        try:
            return sorted(os.listdir(local_path(url)))
        except (FileNotFoundError, NotADirectoryError):
            return []
    listing = scan(url)
    return sorted({*listing.files, *listing.folders})


def list_files(url: str) -> dict[str, tuple[int, str]]:
    """The files of a directory by name: size in bytes and ETag ("" where there is none); empty where there is none.

    An object store tells them in pages of 1,000, with no request for each file.
    """
    return scan(url).files


def scan(url: str) -> Listing:
    """What stands in a directory, not below; nothing where there is none."""
    listing = Listing({}, [])
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if is_local(url):
            _scan_local(local_path(url), listing)
        else:
            ask(url, lambda fs, path: _scan_remote(fs, path, listing))
    return listing


def list_tree(url: str) -> dict[str, tuple[int, str]]:
    """The files at any depth of a directory by their path below it: size in bytes and ETag ("" where there is none)."""
    if is_local(url):
        return dict(_walk_local(local_path(url), "", set()))

    def walk(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, tuple[int, str]]:
        fs.invalidate_cache()
        root = path.strip("/")
        found = {str(info["name"]).strip("/"): info for info in fs.find(path, detail=True).values()}
        return {name[len(root) + 1 :]: _size_and_etag(info) for name, info in found.items() if name != root}

    return ask(url, walk)


def _walk_local(folder: Path, below: str, above: set[str]) -> Iterator[tuple[str, tuple[int, str]]]:
    """Linked folders too, but none inside itself."""
    real = os.path.realpath(folder)
    if real in above:
        return
    listing = Listing({}, [])
    _scan_local(folder, listing)
    for file, about in listing.files.items():
        yield below + file, about
    for inner in listing.folders:
        yield from _walk_local(folder / inner, f"{below}{inner}/", above | {real})


def _scan_local(folder: Path, listing: Listing) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                listing.folders.append(entry.name)
            else:
                with contextlib.suppress(FileNotFoundError):  # a link to nothing, or gone since
                    listing.files[entry.name] = (entry.stat().st_size, "")


def _scan_remote(fs: fsspec.AbstractFileSystem, path: str, listing: Listing) -> None:
    listing.files.clear()  # of a try before
    listing.folders.clear()
    fs.invalidate_cache(path)
    for info in fs.ls(path, detail=True):
        if info["name"].strip("/") == path.strip("/"):
            continue  # an object store may list the directory itself
        if info["type"] == "directory":
            listing.folders.append(name(info["name"]))
        else:
            listing.files[name(info["name"])] = _size_and_etag(info)


def _size_and_etag(info: dict[str, Any]) -> tuple[int, str]:
    return int(info["size"] or 0), str(info.get("ETag") or info.get("etag") or "").strip('"')
