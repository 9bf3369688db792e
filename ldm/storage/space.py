"""Whether a destination can be written to, and has room: asked before any work."""

import os
import shutil
from pathlib import Path

from ldm.config import RequestError
from ldm.storage.transport import is_local, local_path

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


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
