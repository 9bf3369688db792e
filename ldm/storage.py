"""Paths and fsspec URLs: one set of functions for the local disk and for object stores.

Every write is whole or absent. Local files are written under a temporary name, flushed to the disk and renamed;
an object store shows an object only when its upload is complete.
"""

import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from ldm.config import RequestError

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_REFUSED = ("pipe:", "sh:", "exec:")


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local URL."""
    assert is_local(url), url
    return Path(url.removeprefix("file://")).expanduser()


def absolute(url: str) -> str:
    """A relative local path made absolute; an URL as it stands."""
    return os.path.abspath(local_path(url)) if is_local(url) else url


def open_fs(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL and the path inside it.

    Call it in the process that uses it: an s3fs made before a fork hangs. Raises RequestError for an unknown
    protocol, or one whose package is missing.
    """
    if url.startswith(_REFUSED):
        raise RequestError(f"{url}: runs a shell command, which is refused; give a path or a URL such as s3://")
    try:
        fs, path = fsspec.core.url_to_fs(url if "://" in url else os.path.expanduser(url))
    except (ValueError, ImportError) as error:
        raise RequestError(f"{url}: {error}; give a path or a URL such as s3://bucket/key") from None
    return fs, path


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])


def name(url: str) -> str:
    """The last part of a path or URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def exists(url: str) -> bool:
    fs, path = open_fs(url)
    return bool(fs.exists(path))


def size(url: str) -> int:
    """Size in bytes. Raises FileNotFoundError."""
    fs, path = open_fs(url)
    return int(fs.info(path)["size"])


def list_dir(url: str) -> list[str]:
    """Names in a directory, sorted; empty where there is none."""
    fs, path = open_fs(url)
    fs.invalidate_cache(path)
    try:
        names = [name(str(entry)) for entry in fs.ls(path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(n for n in names if n != name(path))  # an object store may list the directory itself


def read_bytes(url: str) -> bytes:
    """Raises FileNotFoundError."""
    fs, path = open_fs(url)
    data = fs.cat_file(path)
    return data if isinstance(data, bytes) else bytes(data)


def read_json(url: str) -> Any:
    """Raises FileNotFoundError, or ValueError naming the file where it is no JSON."""
    try:
        return json.loads(read_bytes(url))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{url}: is no JSON ({error})") from None


def write_bytes(url: str, data: bytes) -> None:
    """Writes a whole object, or nothing."""
    if not is_local(url):
        fs, path = open_fs(url)
        fs.pipe_file(path, data)
        return
    temporary = temporary_beside(url)
    try:
        temporary.write_bytes(data)
        commit_file(temporary, url)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(url: str, value: Any) -> None:
    """Writes JSON that two writers of the same value write alike."""
    write_bytes(url, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def temporary_beside(url: str) -> Path:
    """A name of its own for each attempt, on the disk of the local `url`, so that overlapping writers never meet."""
    path = local_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def commit_file(file: Path, url: str) -> None:
    """Moves a finished local file to `url`: at once for a local one, by one upload for an object store."""
    if not is_local(url):
        fs, path = open_fs(url)
        fs.put_file(str(file), path)
        file.unlink()
        return
    target = local_path(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
    if file.stat().st_dev == target.parent.stat().st_dev:
        os.replace(file, target)
    else:
        temporary = temporary_beside(url)
        try:
            shutil.copyfile(file, temporary)
            commit_file(temporary, url)
        finally:
            temporary.unlink(missing_ok=True)
        file.unlink()
        return
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a power cut
    finally:
        os.close(directory)


def fetch(url: str, target: Path) -> None:
    """Copies an object to a local file. Raises FileNotFoundError."""
    fs, path = open_fs(url)
    fs.get_file(path, str(target))


def check_writable(key: str, url: str) -> None:
    """Raises RequestError, for the config key `key`, where a local directory cannot be made or written to."""
    if not is_local(url):
        return
    nearest = _nearest(url)
    if not nearest.is_dir():
        raise RequestError(f"{key}={url}: {nearest} is a file; give a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RequestError(f"{key}={url}: {nearest} cannot be written to; give another directory")


def check_space(key: str, url: str, needed: int, remedy: str) -> None:
    """Raises RequestError, for the config key `key`, where a local disk has less than `needed` bytes free."""
    if not is_local(url):
        return
    free = shutil.disk_usage(_nearest(url)).free
    if needed > free:
        raise RequestError(f"{key}={url}: needs about {readable(needed)}, but {readable(free)} are free; {remedy}")


def readable(count: int) -> str:
    """Bytes for a person to read: `1.2 GB`."""
    unit, name = next(((u, n) for u, n in _UNITS if count >= u), _UNITS[-1])
    return f"{count / unit:,.1f} {name}"


def same_disk(one: str, other: str) -> bool:
    """Whether both are local and on one disk, where a hard link can stand for a copy."""
    return is_local(one) and is_local(other) and _nearest(one).stat().st_dev == _nearest(other).stat().st_dev


def _nearest(url: str) -> Path:
    """The local path itself, or the nearest folder above it that is there already."""
    path = local_path(url).absolute()
    return next(place for place in [path, *path.parents] if place.exists())


def remove(url: str) -> None:
    """Removes a file or a directory with all that is in it; nothing there is no error."""
    fs, path = open_fs(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def expand(source: str | Sequence[str]) -> list[str]:
    """Sources to files: comma sets, `{00000..00007}` and `{a,b}` in braces, and globs; in sorted order, each once;
    local ones are absolute, for workers may stand in another folder.

    Raises RequestError where a pattern matches nothing or a file is missing.
    """
    texts = [source] if isinstance(source, str) else list(source)
    urls: list[str] = []
    for pattern in itertools.chain.from_iterable(split_commas(text) for text in texts):
        for url in _expand_braces(pattern):
            urls += _matches(url)
    if not urls:
        raise RequestError("source='': is empty; give at least one path or URL")
    return sorted(set(urls))


def _matches(url: str) -> list[str]:
    fs, path = open_fs(url)
    fs.invalidate_cache()  # shards may have come since this process looked last
    if not any(mark in url for mark in "*?["):
        if not fs.exists(path):
            raise RequestError(f"source={url}: does not exist; give an existing tar, or a glob such as 'dir/*.tar'")
        found = [path]
    else:
        found = [str(match) for match in fs.glob(path)]
        if not found:
            raise RequestError(f"source={url}: matches no file; give an existing tar, or a glob that matches some")
    return found if is_local(url) else [str(fs.unstrip_protocol(match)) for match in found]


def split_commas(text: str) -> list[str]:
    """Splits at commas outside braces."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _expand_braces(pattern: str) -> list[str]:
    """`a-{00..02}-{x,y}` => every combination; the width of the first number is kept."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    body = match.group(1)
    numbers = _RANGE.fullmatch(body)
    if numbers:
        first, last = numbers.groups()
        if int(last) < int(first):
            raise RequestError(f"source={pattern}: the range {{{body}}} runs backwards")
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        choices = body.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [url for choice in choices for url in _expand_braces(f"{head}{choice}{tail}")]
