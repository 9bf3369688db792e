"""The cache of remote files: fetched once for a node, verified, capped; right whatever is killed, full or broken."""

import contextlib
import errno
import hashlib
import mmap
import multiprocessing
import os
import random
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from ldm import storage
from ldm.config import DamagedError, RequestError
from ldm.latents import cache as module
from ldm.latents.cache import Cache, RemoteFile, local_copy

SIZE = 60_000
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def chaos(chaos_s3, monkeypatch):
    """The proxy; no repetition but by storage, after short pauses; parts of a third of a file."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("ldm.storage.transport.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("ldm.storage.files.PART", 20_000)
    return chaos_s3


@pytest.fixture
def put(s3) -> Callable[[int], list[RemoteFile]]:
    """A function that writes objects of SIZE random bytes."""
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])

    def write(count: int) -> list[RemoteFile]:
        files = []
        for _ in range(count):
            key, body = f"{uuid.uuid4().hex}.tar", os.urandom(SIZE)
            client.put_object(Bucket="bucket", Key=key, Body=body)
            files.append(RemoteFile(f"{s3}/{key}", hashlib.sha256(body).hexdigest(), len(body)))
        return files

    return write


@pytest.fixture
def overwrite(s3) -> Callable[[RemoteFile, bytes | None], None]:
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])

    def write(file: RemoteFile, data: bytes | None) -> None:
        key = storage.name(file.url)
        if data is None:
            client.delete_object(Bucket="bucket", Key=key)
        else:
            client.put_object(Bucket="bucket", Key=key, Body=data)

    return write


def is_right(path: Path, file: RemoteFile) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


def held(folder: Path, files: list[RemoteFile]) -> list[int]:
    """The numbers of the files that are in the cache."""
    names = {path.name for path in folder.glob("??/*")}
    return [number for number, file in enumerate(files) if f"{file.sha256}.tar" in names]


def parts(folder: Path) -> list[Path]:
    return list((folder / "parts").glob("*"))


def parts_with_room(folder: Path) -> list[Path]:
    found = []
    for part in parts(folder):
        with contextlib.suppress(FileNotFoundError):  # it has just become a whole file
            found += [part] if part.stat().st_size else []
    return found


def until(true: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.01)


# --- several processes


def get_all(cache: Cache, files: list[RemoteFile], barrier, answers) -> None:
    storage.exists(files[0].url)  # what a process does once takes as long as the rest
    barrier.wait()
    cache.prefetch(files)
    answers.put([is_right(cache.get(file), file) for file in files])


def test_of_four_processes_one_fetches_each_file(chaos, put, tmp_path):
    """A used cache travels to them: only its settings are pickled."""
    folder, files = tmp_path / "cache", put(9)
    cache = Cache(folder=folder)
    cache.prefetch(files[8:])
    cache.get(files[8])
    barrier, answers = SPAWN.Barrier(5), SPAWN.Queue()
    processes = [SPAWN.Process(target=get_all, args=(cache, files[:8], barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    until(lambda: barrier.n_waiting == 4)
    chaos.calm()
    barrier.wait()
    assert [answers.get(timeout=60) for _ in processes] == [[True] * 8] * 4
    for process in processes:
        process.join()
    assert chaos.counts["bytes_out"] == 8 * SIZE and chaos.counts["HEAD"] == 0
    assert held(folder, files) == list(range(9)) and not parts(folder)


def get_in_parts(folder: Path, file: RemoteFile) -> None:
    storage.files.PART = 20_000
    Cache(folder=folder).get(file)


def test_a_process_that_is_killed_over_a_download(chaos, put, tmp_path):
    """One who waits for it goes on by itself; what another dead one has left is swept."""
    folder, (file, other, third) = tmp_path, put(3)

    def killed_at_work(file: RemoteFile, meanwhile: Callable[[], None] = lambda: None) -> None:
        chaos.rage(1.0, kinds=("slow",), delay=30, only=lambda method, path: chaos.counts["GET"] > 1)
        process = SPAWN.Process(target=get_in_parts, args=(folder, file))
        process.start()
        until(lambda: chaos.counts["slow"] and chaos.counts["bytes_out"])  # one part is there
        meanwhile()
        process.kill()
        process.join()
        chaos.calm()

    paths: list[Path] = []
    waiting = threading.Thread(target=lambda: paths.append(Cache(folder=folder).get(file)))

    def wait() -> None:
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive()

    killed_at_work(file, wait)
    waiting.join(30)
    assert is_right(paths[0], file) and not parts(folder)
    killed_at_work(other)
    assert [part.stat().st_size for part in parts(folder)] == [SIZE] and not is_right(parts(folder)[0], other)
    cache = Cache(folder=folder)
    assert is_right(cache.get(third), third) and not parts(folder)
    assert is_right(cache.get(other), other)
    assert held(folder, [file, other, third]) == [0, 1, 2]


def serve(folder: Path, max_bytes: int, questions) -> None:
    cache = Cache(max_bytes, folder)
    while (file := questions.recv()) is not None:
        questions.send(is_right(cache.get(file), file))


def test_the_least_recently_used_gives_way_whoever_used_it(put, tmp_path):
    files = put(6)
    pipes = []
    for _ in range(2):
        here, there = SPAWN.Pipe()
        SPAWN.Process(target=serve, args=(tmp_path, 3 * SIZE, there), daemon=True).start()
        pipes.append(here)
    draw, used = random.Random(0), []
    for turn in range(60):
        number = draw.randrange(6)
        pipes[turn % 2].send(files[number])
        assert pipes[turn % 2].recv()
        used = [*(n for n in used if n != number), number]
        assert held(tmp_path, files) == sorted(used[-3:])
    for pipe in pipes:
        pipe.send(None)


def use_at_random(folder: Path, max_bytes: int, files: list[RemoteFile], seed: int, answers) -> None:
    cache, draw, right = Cache(max_bytes, folder), random.Random(seed), 0
    for _ in range(60):
        ahead = draw.sample(files, 4)
        cache.prefetch(ahead)
        for file in ahead[:2]:
            while True:
                try:
                    right += is_right(cache.get(file), file)
                    break
                except FileNotFoundError as error:
                    assert str(folder) in str(error)  # it gave way before it was opened
    cache.close()
    answers.put(right)


def test_several_processes_with_caps_of_their_own(put, tmp_path):
    """The bytes on the disk stay below the largest cap, but for what the three need at once."""
    files, answers = put(12), SPAWN.Queue()
    caps = [3 * SIZE, 4 * SIZE, 5 * SIZE]
    processes = [
        SPAWN.Process(target=use_at_random, args=(tmp_path, cap, files, seed, answers)) for seed, cap in enumerate(caps)
    ]
    for process in processes:
        process.start()
    taken = []
    while any(process.is_alive() for process in processes):
        whole = len(held(tmp_path, files))  # first, so that nothing counts twice
        taken.append(whole + len(parts_with_room(tmp_path)))
        time.sleep(0.002)
    assert [answers.get(timeout=1) for _ in processes] == [120] * 3
    assert max(taken) <= 5 + 3 and len(taken) > 100
    assert Cache(5 * SIZE, tmp_path).get(files[0]) and len(held(tmp_path, files)) <= 5 and not parts(tmp_path)


# --- what is on the disk


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


# --- what comes from the store


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


# --- fetching ahead


@pytest.fixture
def asked(chaos, monkeypatch) -> list[str]:
    """The names of the objects in the order in which they were asked for, one at a time; each comes after 50 ms."""
    names: list[str] = []

    def note(method: str, path: str) -> bool:
        if method == "GET":
            names.append(storage.name(path).partition("?")[0])
        return method == "GET"

    monkeypatch.setattr(module, "_THREADS", 1)
    monkeypatch.setattr("ldm.storage.files.PART", SIZE)
    chaos.rage(1.0, kinds=("slow",), delay=0.05, only=note)
    return names


def names(files: list[RemoteFile]) -> list[str]:
    return [storage.name(file.url) for file in files]


def test_files_are_fetched_in_the_order_of_use(asked, put, tmp_path):
    files, cache = put(6), Cache(folder=tmp_path)
    began = time.monotonic()
    cache.prefetch(files)
    assert time.monotonic() - began < 0.05
    until(lambda: len(held(tmp_path, files)) == 6)
    assert asked == names(files)
    cache.prefetch(files)
    until(lambda: cache._workers == 0)
    assert len(asked) == 6


def test_a_new_list_replaces_what_waits(asked, put, tmp_path):
    files, cache = put(12), Cache(folder=tmp_path)
    cache.prefetch(files[:6])
    until(lambda: asked)
    cache.prefetch([files[0], *files[9:6:-1]])
    until(lambda: cache._workers == 0)
    assert asked == names([files[0], *files[9:6:-1]])
    cache.prefetch(files[10:])
    until(lambda: len(asked) == 5)
    cache.close()
    until(lambda: cache._workers == 0)
    assert asked[4:] == names(files[10:11]) and not parts(tmp_path)


def test_what_is_needed_now_does_not_queue(asked, put, tmp_path):
    files, cache = put(20), Cache(folder=tmp_path)
    cache.prefetch(files)
    assert is_right(cache.get(files[19]), files[19])
    assert len(asked) < 8
    cache.close()


def test_no_more_is_fetched_ahead_than_fits(asked, put, tmp_path):
    files, cache = put(8), Cache(4 * SIZE, tmp_path)
    for number in (0, 4, 5, 6):
        cache.get(files[number])
    cache.prefetch([files[1], files[2], files[3], files[0], files[7]])
    until(lambda: cache._workers == 0)
    assert held(tmp_path, files) == [0, 1, 2, 3] and asked[4:] == names(files[1:4])


def test_an_error_of_a_prefetch_is_met_by_get(asked, put, overwrite, tmp_path):
    (missing, good), cache = put(2), Cache(folder=tmp_path)
    overwrite(missing, None)
    cache.prefetch([missing, good])
    until(lambda: held(tmp_path, [good]))
    with pytest.raises(FileNotFoundError, match=missing.url):
        cache.get(missing)
    assert asked[:1] == names([missing]) and asked[-1:] == names([missing])


def test_a_copy_for_one_who_does_not_know_its_size(put, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    (file,) = put(1)
    path = local_copy(file.url, file.sha256)
    assert is_right(path, file) and path == Cache().get(file) and tmp_path in path.parents
