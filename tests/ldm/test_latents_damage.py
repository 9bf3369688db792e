"""Generations stay, remote files arrive whole, and damage is refused."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from ldm import storage
from ldm.config import DamagedError, RequestError
from ldm.images import PictureRules
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import (
    check_fingerprint,
    commit_generation,
    make_fingerprint,
    read_manifest,
    read_receipts,
)
from ldm.latents.writer import sample_id
from tests.pictures import COUNTS, TOTAL, latent_dataset, some_fingerprint


@pytest.fixture
def copy(written, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(written[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_a_remote_data_set_is_the_local_one(written, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    url, _ = written
    for path in Path(url).rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{s3}/latents/{path.relative_to(url)}", path.read_bytes())
    remote, local = (LatentDataset(place, global_batch_size=9) for place in (f"{s3}/latents", url))
    for step in range(4):
        assert torch.equal(remote.batch(step).moments, local.batch(step).moments)
        assert torch.equal(remote.batch(step).labels, local.batch(step).labels)
    assert len(list((tmp_path / "cache").glob("??/*"))) == 3 * len(COUNTS)
    assert not list((tmp_path / "cache" / "parts").iterdir())
    whole = Path(url, "latents", "shard-1.tar").read_bytes()
    for damaged, problem in ((b"x" * 100, "has 100 bytes, its manifest says"), (flip(whole), "has sha256")):
        storage.write_bytes(f"{s3}/latents/latents/shard-1.tar", damaged)
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(ValueError, match=rf"shard-1\.tar: {problem} .*it is damaged"):
            LatentDataset(f"{s3}/latents", global_batch_size=9).all()


def test_a_pinned_generation_stays_when_shards_are_added(kl, tmp_path):
    url = str(tmp_path)
    first, _ = latent_dataset(url, kl, COUNTS)
    before = LatentDataset(url, global_batch_size=9).batch(2)
    second, _ = latent_dataset(url, kl, (*COUNTS, 20))
    assert first != second and read_manifest(url).generation == second
    assert LatentDataset(url, global_batch_size=9).num_samples == TOTAL + 20
    pinned = LatentDataset(url, global_batch_size=9, generation=first)
    assert pinned.num_samples == TOTAL and torch.equal(pinned.batch(2).moments, before.moments)
    with pytest.raises(RequestError, match="generation 0000 is not there; it holds") as caught:
        LatentDataset(url, global_batch_size=9, generation="0000")
    assert first in str(caught.value) and second in str(caught.value)


def test_committing_again_touches_nothing(kl, tmp_path):
    first, _ = latent_dataset(str(tmp_path), kl, COUNTS)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json") if "receipts" not in str(p)}
    values = json.loads((tmp_path / "generations" / f"{first}.json").read_text())
    receipts = list(read_receipts(str(tmp_path)).values())
    assert commit_generation(str(tmp_path), receipts, values["fingerprint"], kl.latent_channels, kl.factor) == first
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    fewer = commit_generation(str(tmp_path), receipts[:2], values["fingerprint"], kl.latent_channels, kl.factor)
    assert read_manifest(str(tmp_path)).generation == fewer
    assert commit_generation(str(tmp_path), receipts, values["fingerprint"], kl.latent_channels, kl.factor) == first
    assert read_manifest(str(tmp_path)).generation == first


def test_what_is_no_latent_dataset(tmp_path):
    for content in (None, "{", '{"name": "a web app"}', "[1]"):
        if content is not None:
            (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(RequestError, match="^latents=.*manifest.json") as caught:
            LatentDataset(str(tmp_path), global_batch_size=1)
        assert "\n" not in str(caught.value)


def damage(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("change", [lambda data: data[:-512], lambda data: data + b"\0", lambda data: b""])
def test_a_truncated_tar_is_refused(copy, change):
    damage(copy / "latents" / "shard-1.tar", change)
    with pytest.raises(ValueError, match=r"shard-1\.tar: has \d+ bytes, its manifest says \d+; it is damaged"):
        LatentDataset(str(copy), global_batch_size=TOTAL).batch(0)


@pytest.mark.parametrize("where", ["", "label > 0"])
def test_a_flipped_bit_is_never_read(copy, where):
    """In record 5 of shard-1, whose label is 2: the batch that has it is refused each time, others are right."""
    tar = copy / "latents" / "shard-1.tar"
    offset = pq.read_table(copy / "latents" / "shard-1.index.parquet")["offset"][5].as_py() + 17
    damage(tar, lambda data: data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
    data, identity, refused = (
        LatentDataset(str(copy), global_batch_size=1, where=where),
        sample_id("shard-1", "00005"),
        0,
    )
    for step in range(2 * data.num_samples):
        try:
            assert data.batch(step).ids.tolist() != [identity]
        except DamagedError as error:
            assert str(error) == f"{tar}: the record of 00005 does not have its crc32; it is damaged"
            refused += 1
    assert refused == 2


@pytest.mark.parametrize("name", ["latents/shard-1.tar", "latents/shard-1.index.parquet", "columns/shard-1.parquet"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(DamagedError, match=rf"{name}: is missing"):
        LatentDataset(str(copy), global_batch_size=TOTAL).batch(0)


@pytest.mark.parametrize("name", ["latents/shard-1.index.parquet", "columns/shard-1.parquet"])
def test_a_flipped_index_or_column_is_refused(copy, name):
    damage(copy / name, flip)
    with pytest.raises(ValueError, match=r"does not have the hash that its manifest names; it is damaged"):
        LatentDataset(str(copy), global_batch_size=TOTAL).batch(0)


def test_a_changed_manifest_is_refused(copy):
    generation = json.loads((copy / "manifest.json").read_text())["generation"]
    file = copy / "generations" / f"{generation}.json"
    damage(file, lambda data: data.replace(b'"factor": 2', b'"factor": 4'))
    with pytest.raises(ValueError, match="does not have the hash that is its name"):
        read_manifest(str(copy))


def test_a_flipped_shard_table_is_refused(copy):
    damage(next((copy / "generations").glob("*.shards.parquet")), flip)
    with pytest.raises(ValueError, match=r"\.parquet: does not have the hash"):
        read_manifest(str(copy))


def test_a_newer_format_is_refused(copy):
    file = next((copy / "generations").glob("*.json"))
    damage(file, lambda data: data.replace(b'"version": 2\n', b'"version": 3\n'))
    with pytest.raises(RequestError, match="has format version 3, this program reads 2"):
        read_manifest(str(copy))


def test_the_fingerprint_says_what_differs(kl):
    made = some_fingerprint(kl, 64)
    check_fingerprint("x", made, json.loads(json.dumps(made)))
    rules = PictureRules((32,), background=(0, 255, 255))
    other = make_fingerprint(kl, rules.fingerprint(), "mean", "float32")
    with pytest.raises(RequestError) as caught:
        check_fingerprint("place", made, other)
    assert str(caught.value).startswith("destination=place: holds latents made in another way (")
    for part in (
        "pictures.size: 64 != 32",
        "store: moments != mean",
        "pictures.background: [255, 255, 255] != [0, 255",
    ):
        assert part in str(caught.value)


def test_the_shard_table_is_plain_parquet(written):
    table = pq.read_table(next(Path(written[0]).glob("generations/*.shards.parquet"))).to_pylist()
    assert [(row["name"], row["count"]) for row in table] == [(f"shard-{i}", n) for i, n in enumerate(COUNTS)]
    assert all(Path(written[0], "latents", f"{r['name']}.tar").stat().st_size == r["bytes"] for r in table)
