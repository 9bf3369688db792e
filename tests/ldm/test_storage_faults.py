"""An S3 that fails: each answer of storage is right or an OSError of one line, and what will not pass fails at once."""

import hashlib
import os
import threading
import uuid

import boto3
import pytest

from ldm import storage
from ldm.config import RequestError
from ldm.shards import ShardReader, write_shard
from tests.chaos_s3 import KINDS
from tests.pictures import samples

SHARD = samples(6)


@pytest.fixture
def chaos(chaos_s3, monkeypatch):
    """The proxy, with no repetition by botocore, so that ten times as much is left to s3fs and storage, and short
    pauses; small parts, so that a file has many of them."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("ldm.storage.transport.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("ldm.storage.files.PART", 20_000)
    return chaos_s3


@pytest.fixture
def place(s3):
    return f"{s3}/{uuid.uuid4().hex}"


@pytest.fixture
def direct(s3):
    """boto3 past the proxy."""
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def questions(place, folder):
    """Name => (question, right answer), for what `fill` has written."""
    data = os.urandom(70_000)
    storage.write_bytes(f"{place}/in/data", data)
    write_shard(f"{place}/in/a.tar", SHARD)
    for number in range(3):
        storage.write_json(f"{place}/in/sub-{number}/x.json", {"n": number})
    sha256 = hashlib.sha256(storage.read_bytes(f"{place}/in/a.tar")).hexdigest()

    def fetched():
        storage.fetch(f"{place}/in/data", folder / "fetched")
        return (folder / "fetched").read_bytes()

    def read_shard():
        reader = ShardReader(f"{place}/in/a.tar")
        return [sample.key for sample in reader], reader.sha256

    def written():
        url = f"{place}/out/{uuid.uuid4().hex}"
        storage.write_bytes(url, data)
        return storage.read_bytes(url)

    def committed():
        url = f"{place}/out/{uuid.uuid4().hex}"
        (folder / "made").write_bytes(data)
        storage.commit_file(folder / "made", url)
        return storage.read_bytes(url)

    def created():
        url = f"{place}/out/{uuid.uuid4().hex}"
        return storage.create(url, b"one"), storage.create(url, b"two"), storage.read_bytes(url)

    def removed():
        url = f"{place}/gone/{uuid.uuid4().hex}"
        for number in range(2):
            storage.write_bytes(f"{url}/{number}", b"x")
        storage.remove(url)
        return storage.list_dir(url)

    names = ["a.tar", "data", "sub-0", "sub-1", "sub-2"]
    jsons = [f"{place}/in/sub-{number}/x.json" for number in range(3)]
    return {
        "exists": (lambda: storage.exists(f"{place}/in/data"), True),
        "exists, a directory": (lambda: storage.exists(f"{place}/in"), True),
        "exists, nothing": (lambda: storage.exists(f"{place}/in/nothing"), False),
        "exists, a bucket": (lambda: storage.exists("s3://bucket"), True),
        "is_directory": (lambda: storage.is_directory(f"{place}/in"), True),
        "is_directory, a file": (lambda: storage.is_directory(f"{place}/in/data"), False),
        "size": (lambda: storage.size(f"{place}/in/data"), len(data)),
        "list_dir": (lambda: storage.list_dir(f"{place}/in"), names),
        "list_files": (lambda: sorted(storage.list_files(f"{place}/in")), names[:2]),
        "expand, a range": (lambda: storage.expand(f"{place}/in/sub-{{0..2}}/x.json"), jsons),
        "expand, a glob": (lambda: storage.expand(f"{place}/in/*/*.json"), jsons),
        "expand, any depth": (lambda: storage.expand(f"{place}/**/*.json"), jsons),
        "read_bytes": (lambda: storage.read_bytes(f"{place}/in/data"), data),
        "read_json": (lambda: storage.read_json(f"{place}/in/sub-1/x.json"), {"n": 1}),
        "fetch": (fetched, data),
        "ShardReader": (read_shard, ([sample.key for sample in SHARD], sha256)),
        "write_bytes": (written, data),
        "commit_file": (committed, data),
        "create": (created, (True, False, b"one")),
        "remove": (removed, []),
    }


@pytest.mark.faults
def test_every_answer_is_right_with_a_fault_in_ten_requests(chaos, place, tmp_path):
    asked = questions(place, tmp_path)
    faults = 0
    for seed in range(8):
        chaos.rage(0.1, seed=seed, delay=0.01)
        for name, (question, answer) in asked.items():
            assert question() == answer, name
        faults += chaos.faults
    assert faults > 25


@pytest.mark.faults
def test_every_answer_is_right_or_an_error_with_a_fault_in_two_requests(chaos, place, tmp_path, monkeypatch):
    asked = questions(place, tmp_path)
    monkeypatch.setattr("ldm.storage.transport.TRIES", 2)
    failed = 0
    for seed in range(5):
        chaos.rage(0.5, seed=seed, delay=0.01)
        for name, (question, answer) in asked.items():
            try:
                assert question() == answer, name
            except OSError as error:
                assert not isinstance(error, FileNotFoundError | PermissionError), name
                assert place in str(error) or ("s3://bucket" in str(error) and "\n" not in str(error))
                failed += 1
    assert failed > 6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("slow", "broken", "truncated")])
def test_an_outage_is_never_an_answer(kind, chaos, place, tmp_path, monkeypatch):
    asked = questions(place, tmp_path)
    monkeypatch.setattr("ldm.storage.transport.TRIES", 2)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)
    chaos.rage(1.0, kinds=(kind,))
    for name, (question, _) in asked.items():
        with pytest.raises(OSError) as caught:
            question()
        assert not isinstance(caught.value, FileNotFoundError) and "\n" not in str(caught.value), name


def test_with_the_repetitions_of_botocore(chaos_s3, place, tmp_path):
    asked = questions(place, tmp_path)
    chaos_s3.rage(0.1, seed=1)
    for name in ("exists, nothing", "list_dir", "fetch", "ShardReader", "write_bytes", "create", "remove"):
        question, answer = asked[name]
        assert question() == answer, name
    assert chaos_s3.faults > 0


def test_a_long_listing_is_never_cut(chaos, place):
    from moto.s3.models import s3_backends

    folder = place.removeprefix("s3://bucket/")
    for number in range(2500):
        s3_backends["123456789012"]["aws"].put_object("bucket", f"{folder}/x-{number:04d}.tar", b"x")
    for seed in range(4):
        chaos.rage(0.4, seed=seed, kinds=("error", "busy", "lost", "broken", "truncated"))
        assert len(storage.expand(f"{place}/x-{{0000..2499}}.tar")) == 2500
        assert chaos.faults and chaos.counts["HEAD"] == 0
    chaos.calm()
    assert len(storage.expand(f"{place}/*.tar")) == 2500 and chaos.counts == {
        "GET": 3,  # pages
        "bytes_in": 0,
        "bytes_out": chaos.counts["bytes_out"],
    }


def test_a_stalled_answer_is_asked_for_again(chaos, place, monkeypatch):
    storage.write_bytes(f"{place}/x", b"data")
    monkeypatch.setattr("s3fs.S3FileSystem.read_timeout", 0.3)
    type(storage.open_fs(place)[0]).clear_instance_cache()
    chaos.rage(1.0, kinds=("slow",), first=1, delay=5)
    assert storage.read_bytes(f"{place}/x") == b"data"
    assert chaos.counts["slow"] == 1 and chaos.counts["HEAD"] == 2


@pytest.mark.parametrize("kind", ["lost", "error", "gone"])
def test_an_upload_in_parts_whose_end_gets_lost(kind, chaos, place, tmp_path, monkeypatch):
    """`gone`: the upload was completed, the answer got lost, and the store has forgotten it at the repetition."""
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize: 5 << 20)
    data = os.urandom(11 << 20)
    (tmp_path / "made").write_bytes(data)
    chaos.rage(1.0, kinds=(kind,), first=1, only=lambda method, path: method == "POST" and "uploadId=" in path)
    storage.commit_file(tmp_path / "made", f"{place}/x")
    assert chaos.counts[kind] == 1 and storage.read_bytes(f"{place}/x") == data


def test_objects_that_were_not_deleted_are_noticed(chaos, place):
    for number in range(2):
        storage.write_bytes(f"{place}/{number}", b"x")
    chaos.rage(1.0, kinds=("undeleted",), first=1, only=lambda method, path: method == "POST")
    storage.remove(place)
    assert chaos.counts["undeleted"] == 1 and storage.list_dir(place) == []
    storage.write_bytes(f"{place}/x", b"x")
    chaos.rage(1.0, kinds=("undeleted",), only=lambda method, path: method == "POST")
    with pytest.raises(OSError, match=f"is still there after it was removed.*{place}"):
        storage.remove(place)


def test_one_version_is_read_though_another_is_written(chaos, place, direct, tmp_path):
    """The object changes between the question for its size and that for its bytes."""
    key = f"{place.removeprefix('s3://bucket/')}/x"
    new = b"new" * 30_000
    boto = boto3.client("s3", endpoint_url=f"http://{chaos.upstream[0]}:{chaos.upstream[1]}")

    def rewrite(method, path):
        if method == "GET" and boto.head_object(Bucket="bucket", Key=key)["ContentLength"] != len(new):
            boto.put_object(Bucket="bucket", Key=key, Body=new)
        return False

    storage.write_bytes(f"{place}/x", b"old" * 20_000)
    chaos.rage(1.0, only=rewrite)
    assert storage.read_bytes(f"{place}/x") == new
    storage.write_bytes(f"{place}/x", b"old" * 20_000)
    with pytest.raises(OSError, match=r"changed while it was fetched.*/x'"):
        storage.fetch(f"{place}/x", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_creation_whose_answer_got_lost_is_ours(chaos, place):
    for kind in ("lost", "error", "broken"):
        chaos.rage(1.0, kinds=(kind,), first=1, only=lambda method, path: method == "PUT")
        assert storage.create(f"{place}/{kind}", b"ours") is True
        assert chaos.counts["PUT"] == 2 and storage.read_bytes(f"{place}/{kind}") == b"ours"


def test_of_many_creators_one_wins(chaos, place):
    for seed in range(4):
        chaos.rage(0.1, seed=seed, delay=0.01)
        url, won = f"{place}/{seed}", []

        def create(number, url=url, won=won):
            if storage.create(url, f"writer {number}".encode()):
                won.append(number)

        threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and storage.read_bytes(url) == f"writer {won[0]}".encode()


def test_what_will_not_pass_fails_at_once(chaos, s3, place, tmp_path):
    (tmp_path / "made").write_bytes(b"x")
    refused = {
        "exists": lambda: storage.exists(f"{place}/x"),
        "list_dir": lambda: storage.list_dir(place),
        "read_bytes": lambda: storage.read_bytes(f"{place}/x"),
        "fetch": lambda: storage.fetch(f"{place}/x", tmp_path / "x"),
        "write_bytes": lambda: storage.write_bytes(f"{place}/x", b"x"),
        "commit_file": lambda: storage.commit_file(tmp_path / "made", f"{place}/x"),
        "create": lambda: storage.create(f"{place}/x", b"x"),
        "expand": lambda: storage.expand(f"{place}/*.tar"),
        "ShardReader": lambda: list(ShardReader(f"{place}/x.tar")),
    }
    for name, ask in refused.items():
        chaos.rage(1.0, kinds=("denied",))
        with pytest.raises(PermissionError, match=rf"(Access Denied|Forbidden, or .* expired): '{place}") as caught:
            ask()
        assert chaos.counts["denied"] == 1 and "\n" not in str(caught.value), name
    chaos.calm()
    for ask in (
        lambda: storage.read_bytes("s3://no-such-bucket/x"),
        lambda: storage.write_bytes("s3://no-such-bucket/x", b"x"),
    ):
        chaos.calm()
        with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] [^\n]*: 's3://no-such-bucket/x'$"):
            ask()
        assert sum(chaos.counts[method] for method in ("GET", "HEAD", "PUT")) <= 2
    with pytest.raises(OSError, match=r"^[^\n]*Invalid bucket name[^\n]*$"):
        storage.write_bytes("s3://No_Bucket!/x", b"x")


def test_without_credentials(chaos, place, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PermissionError, match=rf"^\[Errno 13\] Unable to locate credentials: '{place}/x'$"):
        storage.exists(f"{place}/x")
    assert not chaos.counts


def test_files_that_may_be_read_and_not_listed(chaos, place):
    for number in range(3):
        storage.write_bytes(f"{place}/{number}.tar", b"x" * (number + 1))
    chaos.rage(1.0, kinds=("denied",), only=lambda method, path: method == "GET")
    found = storage.find(f"{place}/{{0..2}}.tar")
    assert [(file.url, file.bytes) for file in found] == [(f"{place}/{n}.tar", n + 1) for n in range(3)]
    with pytest.raises(PermissionError):
        storage.find(f"{place}/*.tar")
    chaos.calm()
    with pytest.raises(RequestError, match=rf"^reference={place}/3\.tar: does not exist"):
        storage.find(f"{place}/{{0..3}}.tar", "reference")
