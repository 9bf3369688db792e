"""Paths and URLs: what a source means, and that a write is whole or absent."""

import json
import os
import shutil
import tempfile
import threading
import uuid
from pathlib import Path

import pytest

from ldm import storage
from ldm.config import RequestError


@pytest.fixture(params=["local", "memory", "s3"])
def place(request, tmp_path):
    """A directory URL of its own on each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "place")
    base = "memory:/" if request.param == "memory" else request.getfixturevalue("s3")
    return f"{base}/{uuid.uuid4().hex}"


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_round_trip(place, tmp_path):
    url = storage.join(place, "a", "b.json")
    assert not storage.exists(url)
    assert storage.list_dir(place) == []
    storage.write_json(url, {"z": [1, 2], "a": "é"})
    assert storage.exists(url) and storage.read_json(url) == {"a": "é", "z": [1, 2]}
    assert storage.read_bytes(url).decode() == '{\n  "a": "é",\n  "z": [\n    1,\n    2\n  ]\n}\n'
    assert storage.size(url) == len(storage.read_bytes(url))
    storage.write_bytes(storage.join(place, "a", "c.bin"), b"12345")
    storage.write_bytes(storage.join(place, "a", "c.bin"), b"123")
    assert storage.list_dir(storage.join(place, "a")) == ["b.json", "c.bin"]
    assert storage.list_dir(f"{place}/") == ["a"]
    storage.fetch(storage.join(place, "a", "c.bin"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"123"
    storage.remove(storage.join(place, "a"))
    storage.remove(storage.join(place, "a"))
    assert not storage.exists(url)


def test_commit_file_moves(place, tmp_path):
    file = tmp_path / "made"
    file.write_bytes(b"new")
    url = storage.join(place, "deep", "target.bin")
    storage.write_bytes(url, b"old")
    storage.commit_file(file, url)
    assert storage.read_bytes(url) == b"new" and not file.exists()
    assert storage.list_dir(storage.join(place, "deep")) == ["target.bin"]


def test_absent_and_malformed_files(place):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(place, "none"))
    with pytest.raises(FileNotFoundError):
        storage.size(storage.join(place, "none"))
    storage.write_bytes(storage.join(place, "x.json"), b"{")
    with pytest.raises(ValueError, match=r"x\.json: is no JSON"):
        storage.read_json(storage.join(place, "x.json"))


def test_expand_sees_what_was_added_since(place):
    """A listing is never remembered: shards may be added between two runs of one process."""
    for number in range(3):
        # Written past fsspec's own cache, as another machine does.
        url = storage.join(place, f"x-{number}.tar")
        if url.startswith("s3://"):
            import boto3

            boto3.client("s3").put_object(
                Bucket="bucket", Key=url.removeprefix("s3://bucket/"), Body=b"1" * (number + 1)
            )
        else:
            storage.write_bytes(url, b"1" * (number + 1))
        assert [storage.name(u) for u in storage.expand(f"{place}/*.tar")] == [f"x-{n}.tar" for n in range(number + 1)]
        assert storage.size(url) == number + 1


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("a-{00..02}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
        ("a-{0..2}{x,y}.tar", ["a-0x.tar", "a-0y.tar", "a-1x.tar", "a-1y.tar", "a-2x.tar", "a-2y.tar"]),
        ("a-{09..11}.tar", ["a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{b,c}/x.tar", ["b/x.tar", "c/x.tar"]),
        ("a-{x,{0..1}}.tar", ["a-x.tar", "a-0.tar", "a-1.tar"]),
        ("a.tar,b-{0,1}.tar", ["a.tar", "b-0.tar", "b-1.tar"]),
        ("a.tar, b.tar,", ["a.tar", "b.tar"]),
        ("a.tar,a.tar", ["a.tar"]),
        (("a.tar", "b-{0..1}.tar"), ["a.tar", "b-0.tar", "b-1.tar"]),
        ("a.tar,*.tar,./a.tar", ["a.tar", "b.tar"]),
    ],
)
def test_expand_sets_and_ranges(source, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert storage.expand(source) == sorted(str(tmp_path / name) for name in names)


def test_expand_globs(place):
    for name in ("b-1.tar", "b-0.tar", "a-0.tar", "a-0.txt"):
        storage.write_bytes(storage.join(place, name), b"x")
    found = storage.expand(f"{place}/*.tar")
    assert [storage.name(url) for url in found] == ["a-0.tar", "b-0.tar", "b-1.tar"]
    assert all(storage.read_bytes(url) == b"x" for url in found)
    both = storage.expand(f"{place}/b-[01].tar,{place}/a-{{0..0}}.tar,{place}/b-?.tar")
    assert [storage.name(url) for url in both] == ["a-0.tar", "b-0.tar", "b-1.tar"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.tar", r"^source=none\.tar: does not exist"),
        ("none-*.tar", r"^source=none-\*\.tar: matches no file"),
        ("x-{3..1}.tar", r"^source=x-\{3\.\.1\}\.tar: the range \{3\.\.1\} runs backwards"),
        ("x-{0..1}.tar", r"^source=x-0\.tar: does not exist"),
        ("x-{0.tar", r"^source=x-\{0\.tar: does not exist"),
        ("", "is empty"),
        (" , ", "is empty"),
        ((), "is empty"),
        ("pipe:cat a.tar", "^pipe:cat a.tar: runs a shell command, which is refused"),
        (" pipe:cat a.tar", "^pipe:cat a.tar: runs a shell command, which is refused"),
        ("nosuch://x/a.tar", "^nosuch://x/a.tar: .*; give a path or a URL"),
    ],
)
def test_expand_refuses(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=message) as caught:
        storage.expand(source)
    assert "\n" not in str(caught.value)


def test_home_and_file_urls(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("~/x/a.tar", b"1")
    assert (tmp_path / "x" / "a.tar").read_bytes() == b"1"
    assert storage.read_bytes("~/x/a.tar") == storage.read_bytes(f"file://{tmp_path}/x/a.tar") == b"1"
    assert storage.expand("~/x/*.tar") == [str(tmp_path / "x" / "a.tar")]
    assert storage.absolute("x/a.tar") == str(tmp_path / "x" / "a.tar") == storage.absolute("~/x/a.tar")
    assert storage.absolute("s3://b/x") == "s3://b/x"
    assert storage.name("s3://b/x.tar/") == "x.tar"


def test_what_does_not_fit_the_disk_is_refused(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    deep = str(tmp_path / "not" / "there")
    storage.check_space("output", deep, free // 2, "")
    storage.check_space("output", "s3://bucket/x", 10**30, "")  # an object store has no end
    message = r"^output=.*/not/there: needs about 1,000\.0 TB, but [\d.,]+ .B are free; give another$"
    with pytest.raises(RequestError, match=message):
        storage.check_space("output", deep, 10**15, "give another")


def test_bytes_for_a_person():
    counts = (0, 1500, 5_123_456, 1_234_567_890, 10**15)
    assert [storage.readable(count) for count in counts] == ["0.0 kB", "1.5 kB", "5.1 MB", "1.2 GB", "1,000.0 TB"]


class FullDisk(Exception):
    pass


def full(*_args, **_options):
    raise FullDisk


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_failing_write_leaves_the_old_content(failing, tmp_path, monkeypatch):
    target = tmp_path / "x.json"
    storage.write_json(str(target), 1)
    monkeypatch.setattr(failing, full)
    with pytest.raises(FullDisk):
        storage.write_json(str(target), 2)
    assert json.loads(target.read_text()) == 1
    assert files_in(tmp_path) == ["x.json"]


def test_a_writer_that_dies_half_way_leaves_the_old_content(tmp_path):
    """A child is killed by the limit on file sizes in the middle of its write."""
    target = tmp_path / "x.bin"
    storage.write_bytes(str(target), b"old")
    pid = os.fork()
    if pid == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        storage.write_bytes(str(target), b"new" * 1000)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert target.read_bytes() == b"old"
    assert all(name.startswith(".") for name in files_in(tmp_path) if name != "x.bin")


def test_readers_never_see_a_part(tmp_path):
    """One thread rewrites, one reads: each read is one of the whole contents."""
    target, stop = str(tmp_path / "x.bin"), threading.Event()
    contents = {bytes([n]) * 200_000 for n in range(5)}
    storage.write_bytes(target, next(iter(contents)))
    seen = []

    def read() -> None:
        while not stop.is_set():
            seen.append(Path(target).read_bytes() in contents)

    reader = threading.Thread(target=read)
    reader.start()
    for content in sorted(contents) * 4:
        storage.write_bytes(target, content)
    stop.set()
    reader.join()
    assert seen and all(seen)


@pytest.fixture
def other_disk(tmp_path):
    """A directory on another device than tmp_path's."""
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_same_disk(tmp_path, other_disk):
    assert storage.same_disk(str(tmp_path), str(tmp_path / "not" / "there"))
    assert not storage.same_disk(str(tmp_path), str(other_disk))
    assert not storage.same_disk("s3://bucket/a", "s3://bucket/a")


def test_commit_across_disks(tmp_path, other_disk):
    file, target = other_disk / "made", tmp_path / "place" / "target"
    file.write_bytes(b"content")
    storage.commit_file(file, str(target))
    assert target.read_bytes() == b"content"
    assert files_in(other_disk) == [] and files_in(tmp_path) == ["place/target"]


def test_a_failing_commit_across_disks_loses_nothing(tmp_path, other_disk, monkeypatch):
    file, target = other_disk / "made", tmp_path / "target"
    file.write_bytes(b"content")
    target.write_bytes(b"old")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(FullDisk):
        storage.commit_file(file, str(target))
    assert file.read_bytes() == b"content" and target.read_bytes() == b"old"
    assert files_in(tmp_path) == ["target"]
