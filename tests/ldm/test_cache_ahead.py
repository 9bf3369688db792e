"""Fetching ahead: in the order of use, no more than fits, and never in the way of what is needed now."""

import time

import pytest

from ldm import storage
from ldm.latents import cache as module
from ldm.latents.cache import Cache, RemoteFile
from tests.ldm.caching import SIZE, held, is_right, parts, until


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
