"""The cache of remote files: verified and capped, on a disk that is full or damaged, from a store that fails."""

import errno
import hashlib
import mmap
import os
import re
import subprocess
import time

import pytest

from ldm.config import DamagedError, RequestError
from ldm.latents import cache as module
from ldm.latents.cache import Cache, RemoteFile, local_copy
from tests.ldm.caching import SIZE, held, is_right, parts, until


def test_a_mapped_file_outlives_its_eviction(put, tmp_path):
    (first, second), cache = put(2), Cache(SIZE, tmp_path)
    with cache.get(first).open("rb") as handle:
        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    cache.get(second)
    assert held(tmp_path, [first, second]) == [1]
    assert hashlib.sha256(mapped).hexdigest() == first.sha256
    assert is_right(cache.get(first), first)


def test_a_local_file_is_its_own_copy(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x")
    cache = Cache(0, tmp_path / "cache")
    for url in (str(tmp_path / "a.tar"), f"file://{tmp_path}/a.tar"):
        file = RemoteFile(url, "", 1)
        cache.prefetch([file])
        assert cache.get(file) == tmp_path / "a.tar"
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_file_larger_than_the_cache(put, tmp_path):
    (file,) = put(1)
    message = f"^{file.url}: has 60.0 kB, and the cache {tmp_path} may take 50.0 kB; let it take more, or set LDM_CACHE"
    with pytest.raises(RequestError, match=message):
        Cache(50_000, tmp_path).get(file)
    assert not parts(tmp_path)


def test_the_cap_is_a_share_of_the_disk_by_default(put, small_disk):
    disk, files = small_disk("size=500k"), put(8)
    cache = Cache(folder=disk / "cache")
    for file in files:
        assert is_right(cache.get(file), file)
    assert len(held(disk / "cache", files)) == 6  # of 512,000 x 0.8 bytes
    Cache(folder=disk / "cache").get(files[0])
    assert len(held(disk / "cache", files)) == 6  # what it takes itself counts as free


def test_a_full_disk(put, small_disk):
    disk, files = small_disk("size=300k"), put(6)
    cache = Cache(10**9, disk / "cache")
    for file in files:
        assert is_right(cache.get(file), file)
    assert 2 <= len(held(disk / "cache", files)) <= 4 and 5 in held(disk / "cache", files)
    for path in (disk / "cache").glob("??/*"):
        path.unlink()
    with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 4096)
    with pytest.raises(OSError) as caught:
        cache.get(files[0])
    assert caught.value.errno == errno.ENOSPC
    assert re.fullmatch(
        rf"\[Errno 28\] no room for {files[0].url} \(60.0 kB\), and nothing is left to give way; free some, "
        rf"or set LDM_CACHE to another folder: '{disk}/cache'",
        str(caught.value),
    )
    (disk / "filler").unlink()
    assert is_right(cache.get(files[0]), files[0])


def test_a_disk_that_fills_up_under_a_download(put, tmp_path, monkeypatch):
    """Where room cannot be kept beforehand: the least recently used gives way, until none is left."""
    files, cache, pwrite = put(3), Cache(10**9, tmp_path), os.pwrite
    cache.get(files[0])
    cache.get(files[1])

    def full(handle: int, data: bytes, start: int) -> int:
        if len(data) > 1000 and len(held(tmp_path, files)) >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(handle, data, start)

    monkeypatch.setattr("os.pwrite", full)
    room = 2
    assert is_right(cache.get(files[2]), files[2]) and held(tmp_path, files) == [1, 2]
    room = 0
    with pytest.raises(OSError, match=r"^\[Errno 28\] no room for s3://[^\n]* nothing is left to give way"):
        cache.get(files[0])
    assert held(tmp_path, files) == [] and not parts(tmp_path)


def test_a_cache_that_can_only_be_read(put, small_disk):
    disk, (file, other) = small_disk("size=1m"), put(2)
    Cache(folder=disk).get(file)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    cache = Cache(folder=disk)
    cache.prefetch([file, other])
    assert is_right(cache.get(file), file)
    message = (
        rf"^\[Errno 30\] the cache cannot take {other.url} \(Read-only file system\); let it be written to, or set"
    )
    with pytest.raises(OSError, match=message):
        cache.get(other)


def test_after_a_power_cut(chaos, put, tmp_path, monkeypatch):
    """A file of the right size may hold other bytes, or a part may be missing: what is damaged is fetched anew."""
    files, cache = put(3), Cache(folder=tmp_path)
    paths = [cache.get(file) for file in files]
    paths[0].write_bytes(b"\0" * SIZE)
    paths[1].write_bytes(b"short")
    chaos.calm()
    monkeypatch.setattr("ldm.latents.shelf._machine_began", lambda: time.time() + 1)
    assert all(is_right(cache.get(file), file) for file in files[1:])
    assert chaos.counts["bytes_out"] == SIZE
    monkeypatch.setattr(module, "_THREADS", 1)
    monkeypatch.setattr("ldm.latents.shelf._machine_began", lambda: time.time() - 0.05)
    time.sleep(0.1)
    cache.prefetch(files)
    until(lambda: cache._workers == 0)
    assert is_right(paths[0], files[0]) and chaos.counts["bytes_out"] == 2 * SIZE


def test_a_hash_that_is_a_path(put, tmp_path):
    (file,) = put(1)
    (tmp_path / "mine").write_bytes(b"precious")
    cache = Cache(folder=tmp_path / "cache")
    hostile = RemoteFile(file.url, "../../mine", SIZE)
    cache.prefetch([hostile])
    with pytest.raises(DamagedError, match=r"its manifest says sha256 '../../mine', which is none"):
        cache.get(hostile)
    assert (tmp_path / "mine").read_bytes() == b"precious"


def test_a_damaged_object_is_refused(chaos, put, overwrite, tmp_path):
    flipped, cut, longer, gone, good = put(5)
    overwrite(flipped, b"x" * SIZE)
    overwrite(cut, b"x" * 30_000)  # in the middle of its second part
    overwrite(longer, b"x" * 90_000)
    overwrite(gone, None)
    cache = Cache(folder=tmp_path)
    cache.prefetch([flipped, cut, longer, gone, good])  # the damaged ones do not stop the others
    until(lambda: held(tmp_path, [good]))
    for file, error, message in (
        (flipped, DamagedError, rf"^{flipped.url}: has sha256 \w+…, its manifest says \w+…; it is damaged"),
        (cut, DamagedError, rf"^{cut.url}: has 30000 bytes, its manifest says 60000; it is damaged"),
        (longer, DamagedError, rf"^{longer.url}: has sha256 "),
        (gone, FileNotFoundError, rf"^\[Errno 2\] [^\n]*: '{gone.url}'$"),
    ):
        chaos.calm()
        for _ in range(2):
            with pytest.raises(error, match=message) as caught:
                cache.get(file)
            assert "\n" not in str(caught.value)
        assert chaos.counts["GET"] <= 12  # no patience with what will not pass: twice, by two ways, up to three parts
    until(lambda: not parts(tmp_path))
    assert len(list(tmp_path.glob("??/*"))) == 1


def test_a_store_where_a_tenth_of_the_requests_fail(chaos, put, tmp_path):
    files, cache = put(40), Cache(folder=tmp_path)
    chaos.rage(0.1, seed=2, delay=0.01)
    cache.prefetch(files)
    assert all(is_right(cache.get(file), file) for file in files)
    assert chaos.faults > 5


def test_an_outage_is_an_error_of_one_line(chaos, put, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.storage.transport.TRIES", 2)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    (file,), cache = put(1), Cache(folder=tmp_path)
    for kind in ("busy", "reset", "denied"):
        chaos.rage(1.0, kinds=(kind,))
        with pytest.raises(OSError, match=rf"^[^\n]*'{file.url}'$"):
            cache.get(file)
    chaos.calm()
    assert is_right(cache.get(file), file)


def test_a_copy_for_one_who_does_not_know_its_size(put, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    (file,) = put(1)
    path = local_copy(file.url, file.sha256)
    assert is_right(path, file) and path == Cache().get(file) and tmp_path in path.parents
