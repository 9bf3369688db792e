"""Ranges of S3 objects: the signed way and s3fs's give the same bytes, and what is unusual goes the usual way."""

from collections.abc import Iterator

import pytest
import s3fs

from ldm import storage
from ldm.storage import ranges
from ldm.storage.transport import open_fs

DATA = bytes(range(256)) * 1000


@pytest.fixture
def place(s3, monkeypatch) -> str:
    monkeypatch.setattr(ranges, "_refused", set())
    ranges._connections.__dict__.clear()
    storage.write_bytes(f"{s3}/ranges", DATA)
    return f"{s3}/ranges"


@pytest.fixture
def usual(monkeypatch) -> Iterator[list[tuple[int, int]]]:
    """The ranges that s3fs was asked for."""
    asked, real = [], s3fs.S3FileSystem._cat_file

    async def cat_file(self, path, version_id=None, start=None, end=None):
        asked.append((start, end))
        return await real(self, path, version_id=version_id, start=start, end=end)

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", cat_file)
    s3fs.S3FileSystem.clear_instance_cache()  # an instance keeps the methods that it was made with
    yield asked
    s3fs.S3FileSystem.clear_instance_cache()


def test_the_signed_way_gives_the_bytes(place, usual):
    for start, end in ((0, 10), (0, len(DATA)), (255_990, 256_000), (100_000, 200_000)):
        assert ranges.read_range(*open_fs(place), start, end) == DATA[start:end]
    assert usual == []


def test_a_range_beyond_the_end_is_left_to_the_filesystem(place, usual):
    assert bytes(ranges.read_range(*open_fs(place), 255_990, 256_010)) == DATA[255_990:]
    assert usual == [(255_990, 256_010)]
    with pytest.raises(FileNotFoundError):
        ranges.read_range(*open_fs(f"{place}-none"), 0, 10)
    assert (
        ranges.read_range(*open_fs(place), 0, 10) == DATA[:10] and len(usual) == 2
    )  # the connection is as good as new


def test_settings_that_a_signed_url_does_not_carry(place, usual, monkeypatch):
    _, path = open_fs(place)
    for settings in (
        {"requester_pays": True},
        {"client_kwargs": {"verify": False}},
        {"config_kwargs": {"proxies": {"http": ""}}},
    ):
        fs = s3fs.S3FileSystem(**settings, skip_instance_cache=True)
        assert not ranges._is_plain_s3(fs), settings
    assert not ranges._is_plain_s3(s3fs.S3FileSystem(anon=True)) and not ranges._is_plain_s3(open_fs("/tmp")[0])
    assert ranges._is_plain_s3(open_fs(place)[0])
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(OSError):  # as s3fs would have it: by the proxy, which is not there
        ranges.read_range(
            s3fs.S3FileSystem(skip_instance_cache=True, config_kwargs={"retries": {"max_attempts": 0}}), path, 0, 9
        )
    assert usual == [(0, 9)]


def test_a_host_that_cannot_be_reached_directly_is_not_tried_again(place, usual, monkeypatch):
    tried = []

    def connect(parts):
        tried.append(parts.netloc)
        return ranges.http.client.HTTPConnection("127.0.0.1", 9)

    monkeypatch.setattr(ranges, "_connect", connect)
    for _ in range(3):
        assert ranges.read_range(*open_fs(place), 5, 9) == DATA[5:9]
    assert len(tried) == 1 and len(usual) == 3
