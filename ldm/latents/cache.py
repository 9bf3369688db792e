"""Remote files on the local disk: fetched once for a node, verified by their hash, never read while incomplete."""

import contextlib
import errno
import functools
import hashlib
import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from ldm import storage
from ldm.config import DamagedError
from ldm.latents.shelf import FULL, RemoteFile, Shelf, hash_file

__all__ = ["Cache", "RemoteFile", "cache_folder", "hash_file", "local_copy"]

_THREADS = 8
"""Files that a process fetches ahead at a time: one S3 connection gives about 60 MB/s. A large file takes several."""
_PERHAPS_CUT = (errno.EBUSY, errno.EINVAL, errno.EIO)
"""How it looks when an object is shorter than it should be: it says so, refuses a range, or sends too little."""


class Cache:
    """Local copies of remote files, which all processes of a node share that name the same folder.

    Pickled, only its settings travel. Each process opens its own filesystems: start processes by spawn, not by fork.

    Args:
        max_bytes: what the cache may take of the disk, files on their way included; the least recently used files give
            way. By default 80% of what the disk has free or the cache takes already, found out at the first use.
            Processes may differ in it: each that brings a file makes room by its own.
        folder: `$LDM_CACHE`, else `~/.cache/ldm`, as it is where the cache is used.
    """

    def __init__(self, max_bytes: int | None = None, folder: Path | None = None) -> None:
        self._settings = (max_bytes, folder)
        self._shelf = Shelf(folder or cache_folder(), max_bytes)
        self._lock = threading.Lock()
        self._queue: deque[RemoteFile] = deque()
        self._workers = 0

    def __reduce__(self) -> tuple[type["Cache"], tuple[int | None, Path | None]]:
        return Cache, self._settings

    def get(self, file: RemoteFile) -> Path:
        """The path of the verified copy, marked as just used; a local file is its own copy, and is not verified.

        Open it at once: the copy may give way to others at any time, and where it has (FileNotFoundError), call again.
        What is open or mapped stays readable. Waits while another thread or process brings the file.

        Raises DamagedError where the remote file is not the one that its manifest names, RequestError where it is
        larger than the cache may be, OSError where it cannot be fetched or the disk cannot take it.
        """
        if storage.is_local(file.url):
            return storage.local_path(file.url)
        self._bring(file, wait=True)
        return self._shelf.place(file)

    def prefetch(self, files: Sequence[RemoteFile]) -> None:
        """Begins to fetch `files` in this order in the background, in place of what waited until now.

        Only those from the beginning that fit the cache together, lest they drive out one another. Those that are here
        already are marked as just used. What goes wrong is told by `get`, which tries for itself.
        """
        with contextlib.suppress(OSError, DamagedError):  # the folder, a hash that is none
            missing = self._missing(files)
            with self._lock:
                self._queue = deque(missing)
                fresh = max(min(_THREADS, len(missing)) - self._workers, 0)
                self._workers += fresh
            for _ in range(fresh):
                threading.Thread(target=self._work, name="cache", daemon=True).start()

    def close(self) -> None:
        """Forgets what waits to be fetched; what is on its way arrives. `get` and `prefetch` go on to work."""
        with self._lock:
            self._queue.clear()

    def _missing(self, files: Sequence[RemoteFile]) -> list[RemoteFile]:
        remote = dict.fromkeys(file for file in files if not storage.is_local(file.url))
        ahead, room = [], self._shelf.max_bytes if remote else 0
        for file in remote:
            room -= file.bytes
            if room < 0:
                break
            ahead.append(file)
        # Backwards, so that the file that is needed first is the last to give way.
        return [file for file in reversed(ahead) if not self._shelf.use(file, verify=False)][::-1]

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._workers -= 1
                    return
                file = self._queue.popleft()
            with contextlib.suppress(Exception):  # `get` meets it again, and tells
                self._bring(file, wait=False)

    def _bring(self, file: RemoteFile, wait: bool) -> None:
        """Returns when the file is here; without `wait` at once, where another brings it or others fill the cache."""
        while True:
            try:
                if self._shelf.use(file):
                    return
                with self._shelf.part(file, wait) as part:
                    if part is None:
                        return
                    if self._shelf.use(file):  # another has brought it while this one waited
                        return
                    if self._shelf.make_room(file, part, needed_now=wait):
                        _fetch_verified(file, Path(part.name))
                        self._shelf.put(file, part)
                    return
            except OSError as error:  # on a full disk again, once others have given way
                if error.errno not in FULL or not self._shelf.give_way(file.bytes):
                    self._shelf.explain(error, file)
                    raise


def _fetch_verified(file: RemoteFile, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        storage.fetch_known(file.url, target, file.bytes, digest)
    except OSError as error:
        if error.errno in _PERHAPS_CUT and (found := storage.size(file.url)) != file.bytes:
            raise DamagedError(
                f"{file.url}: has {found} bytes, its manifest says {file.bytes}; it is damaged: write it anew"
            ) from error
        raise
    if (found_hash := digest.hexdigest()) != file.sha256:
        raise DamagedError(
            f"{file.url}: has sha256 {found_hash[:12]}…, its manifest says {file.sha256[:12]}…; "
            "it is damaged: write it anew"
        )


def cache_folder() -> Path:
    """`$LDM_CACHE`, else `~/.cache/ldm`."""
    return Path(os.environ.get("LDM_CACHE", "~/.cache/ldm")).expanduser()


@functools.cache
def _cache_in(folder: Path) -> Cache:
    return Cache(folder=folder)


def local_copy(url: str, sha256: str) -> Path:
    """The local path of `url`, for a caller who does not know its size. As `Cache.get` with the default cap."""
    file = RemoteFile(url, sha256, 0 if storage.is_local(url) else storage.size(url))
    return _cache_in(cache_folder()).get(file)
