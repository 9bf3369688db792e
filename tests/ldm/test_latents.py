"""The latent dataset: what is written is what is read, by us and by others."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import webdataset

from ldm import storage
from ldm.config import DamagedError, RequestError
from ldm.latents import records as records_module
from ldm.latents.cache import Cache
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import Conditioning, commit_generation, fingerprint_hash, read_manifest, read_receipts
from ldm.latents.receipt import Accounting, Moments, Statistics, statistics
from ldm.latents.writer import ShardWriter, quarantine_url, sample_id
from tests.pictures import COUNTS, TOTAL, latent_dataset, records, some_fingerprint, write_latent_shard


def moments_by_id(content):
    return {
        sample_id(shard, f"{n:05d}"): record for shard, moments in content.items() for n, record in enumerate(moments)
    }


def test_a_shard_written_twice_is_the_same(kl, tmp_path):
    trees = []
    for name in ("a", "b"):
        latent_dataset(str(tmp_path / name), kl, COUNTS, quarantined=2)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        trees.append({str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files})
    assert trees[0] == trees[1]
    assert sum(name.endswith(".tar") for name in trees[0]) == len(COUNTS)
    assert not any("attempt" in name or ".tmp" in name for name in trees[0])


def test_plain_webdataset_reads_it(written):
    url, content = written
    for shard, moments in content.items():
        found = list(webdataset.WebDataset(f"{url}/latents/{shard}.tar", shardshuffle=False).decode())
        assert [sample["__key__"] for sample in found] == [f"{n:05d}" for n in range(len(moments))]
        for sample, expected in zip(found, moments, strict=True):
            assert sample["latents.npy"].dtype == np.float16
            assert np.array_equal(sample["latents.npy"], expected)


@pytest.mark.parametrize(
    "keys",
    [
        [f"{'k' * 150}{n}" for n in range(4)],
        [f"{'d' * 60}/{'k' * (20 + 25 * n)}" for n in range(4)],
        ["a/größe", "日本", "with space", "v1.0/x"],
    ],
    ids=["all long", "short and long", "foreign"],
)
def test_keys_of_every_length(kl, tmp_path, keys):
    """A name of over 100 bytes takes two tar blocks more: records then lie at unequal distances."""
    url = str(tmp_path)
    fingerprint = some_fingerprint(kl, 4)
    moments = records(4)
    receipt = write_latent_shard(url, "a", moments, fingerprint=fingerprint_hash(fingerprint), keys=keys)
    commit_generation(url, [receipt], fingerprint, kl.latent_channels, kl.factor)
    assert np.array_equal(LatentDataset(url, global_batch_size=2).all().moments.numpy(), moments)
    theirs = list(webdataset.WebDataset(f"{url}/latents/a.tar", shardshuffle=False).decode())
    assert [sample["__key__"] for sample in theirs] == keys
    assert all(np.array_equal(s["latents.npy"], m) for s, m in zip(theirs, moments, strict=True))


def test_the_index_says_where_each_record_lies(written):
    import zlib

    url, content = written
    for shard, moments in content.items():
        data = Path(f"{url}/latents/{shard}.tar").read_bytes()
        index = pd.read_parquet(f"{url}/latents/{shard}.index.parquet")
        assert list(index.columns) == ["id", "offset", "length", "crc32"]
        for row, (n, record) in zip(index.itertuples(), enumerate(moments), strict=True):
            piece = data[row.offset : row.offset + row.length]
            assert piece == record.tobytes() and row.crc32 == zlib.crc32(piece)
            assert row.id == sample_id(shard, f"{n:05d}")


def test_columns_open_in_pandas(written):
    url, content = written
    columns = pd.concat(pd.read_parquet(f"{url}/columns/{shard}.parquet") for shard in content)
    assert len(columns) == TOTAL and columns.id.is_unique
    first = columns.iloc[1]
    assert (first.key, first.label, first.caption, first.width, first.height) == ("00001", 1, "caption 1", 20, 16)


def test_ids_differ_between_shards_and_keys():
    ids = {sample_id(shard, f"{key:05d}") for shard in ("a", "b", "a0") for key in range(2000)}
    assert len(ids) == 6000 and min(ids) >= 0 and max(ids) < 2**63
    assert sample_id("a", "b") != sample_id("ab", "")


def test_statistics_are_those_of_posterior_samples(written):
    url, content = written
    moments = np.concatenate(list(content.values())).astype(np.float64)
    mean, variance = moments[:, :4], np.exp(moments[:, 4:])
    found = read_manifest(url).statistics
    assert found.mean == pytest.approx(mean.mean((0, 2, 3)), rel=1e-12)
    assert found.std == pytest.approx(np.sqrt(mean.var((0, 2, 3)) + variance.mean((0, 2, 3))), rel=1e-12)


def test_statistics_of_latents_without_a_variance():
    values = np.array([1.0, 2.0, 4.0])
    parts = [Moments(1, (v,), (0.0,), (0.0,)) for v in values]
    assert statistics(parts).mean == pytest.approx((values.mean(),))
    assert statistics(parts).std == pytest.approx((values.std(),))


@pytest.mark.parametrize("far", [0.0, 3e4])
def test_statistics_do_not_depend_on_how_samples_are_cut_into_shards(far):
    """And lose no digit far from zero, where a sum of squares in float64 would lose eight."""
    values = (far + np.random.default_rng(0).normal(size=(500, 3, 2, 2))).astype(np.float16)
    whole = statistics([Moments.of(values, 3)])
    for cuts in ([250], [1, 2, 499], list(range(7, 500, 13))):
        parts = [Moments.of(part, 3) for part in np.split(values, cuts)]
        assert statistics(parts[::-1]) == statistics(parts)
        assert statistics(parts).mean == pytest.approx(whole.mean, rel=1e-14)
        assert statistics(parts).std == pytest.approx(whole.std, rel=1e-12)


def test_accounting_adds_up(kl, tmp_path):
    latent_dataset(str(tmp_path), kl, COUNTS, quarantined=2)
    manifest, receipts = read_manifest(str(tmp_path)), read_receipts(str(tmp_path))
    assert manifest.accounting == Accounting(TOTAL + 8, TOTAL, 0, 8)
    assert str(manifest.accounting) == f"{TOTAL + 8} = {TOTAL} encoded + 0 filtered + 8 quarantined"
    assert [row["count"] for row in manifest.shards] == [
        receipts[r["name"]].accounting.encoded for r in manifest.shards
    ]
    place = quarantine_url(str(tmp_path), "shard-0")
    assert [(r["key"], r["reason"], r["outcome"]) for r in storage.read_json_lines(place)] == [
        ("bad-0", "planted", "quarantined"),
        ("bad-1", "planted", "quarantined"),
    ]
    with pytest.raises(AssertionError):
        Accounting(3, 1, 1, 0)


def test_a_writer_that_fails_writes_nothing(tmp_path):
    def fail() -> None:
        with ShardWriter(str(tmp_path), "a", "f", 4) as writer:
            writer.add("x", records(1)[0], label=None)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert read_receipts(str(tmp_path)) == {} and list(tmp_path.iterdir()) == []


def test_a_shard_without_a_sample_is_accounted_and_holds_no_file(kl, tmp_path):
    url = str(tmp_path)
    fingerprint = some_fingerprint(kl, 4)
    both = [
        write_latent_shard(url, name, records(count), fingerprint="f", quarantined=3)
        for name, count in (("a", 2), ("empty", 0))
    ]
    commit_generation(url, both, fingerprint, kl.latent_channels, kl.factor)
    assert read_manifest(url).accounting == Accounting(8, 2, 0, 6)
    assert storage.list_dir(f"{url}/latents") == ["a.index.parquet", "a.tar"]
    assert LatentDataset(url, global_batch_size=1).num_samples == 2
    assert read_receipts(url) == {receipt.name: receipt for receipt in both}


def test_the_mapped_gather_is_the_content_of_the_tars(written):
    url, content = written
    expected = moments_by_id(content)
    data = LatentDataset(url, global_batch_size=TOTAL)
    for batch in (data.all(), data.batch(0), data.batch(3)):
        assert batch.moments.dtype == torch.float16 and batch.moments.shape == (TOTAL, 8, 2, 2)
        assert set(batch.ids.tolist()) == set(expected)
        for identity, record in zip(batch.ids.tolist(), batch.moments.numpy(), strict=True):
            assert np.array_equal(record, expected[identity])
    labels = {sample_id(s, f"{n:05d}"): n % 3 for s, moments in content.items() for n in range(len(moments))}
    batch = data.batch(1)
    assert dict(zip(batch.ids.tolist(), batch.labels.tolist(), strict=True)) == labels


def test_shape_conditioning_and_statistics(written):
    data = LatentDataset(written[0], global_batch_size=4)
    assert (data.num_samples, data.latent_shape, data.num_classes) == (TOTAL, (4, 2, 2), 3)
    assert data.manifest.conditioning == Conditioning("class", 3)
    assert isinstance(data.statistics, Statistics) and len(data.statistics.mean) == 4


def test_a_process_may_end_right_after_reading(written):
    """A thread that still held the manifest's table aborted seven of ten such processes."""
    code = f"from ldm.latents.manifest import read_manifest; [read_manifest({written[0]!r}) for _ in range(3)]"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in running] == [0] * 3


def test_what_is_open_is_bounded(written):
    url, _ = written
    expected = LatentDataset(url, global_batch_size=1, captions=True)
    for limit, value in (("_MOST_MAPS", 2), ("_MOST_RECORDS", 15)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records_module, limit, value)
            patch.setattr(records_module, "LIVE_SHARDS", 0)
            data = LatentDataset(url, global_batch_size=1, captions=True)
            for step in range(3 * TOTAL):
                batch = data.batch(step)
                assert torch.equal(batch.moments, expected.batch(step).moments)
                assert batch.captions == expected.batch(step).captions
            held = data._records[0]._open
            assert len(held.maps) <= 2 or held.count <= 15
            assert sum(int((part >= 0).sum()) for part in held.starts) == len(held.maps) < len(COUNTS)


def test_a_shard_that_fails_to_open_harms_no_other(written, tmp_path):
    """It is refused each time, until it is mended; the others are read as ever."""
    url = str(tmp_path / "copy")
    shutil.copytree(written[0], url)
    whole = LatentDataset(written[0], global_batch_size=3)
    data = LatentDataset(url, global_batch_size=3)
    tar = Path(url, "latents", "shard-1.tar")
    kept = tar.read_bytes()
    tar.write_bytes(kept[:-512])
    refused = 0
    for step in [*range(40), *range(40)]:
        try:
            assert torch.equal(data.batch(step).moments, whole.batch(step).moments)
        except DamagedError as error:
            assert "shard-1.tar: has " in str(error)
            refused += 1
    assert 0 < refused < 80
    tar.write_bytes(kept)
    assert all(torch.equal(data.batch(step).moments, whole.batch(step).moments) for step in range(40))


def test_what_the_cache_let_go_is_unmapped(written, s3, tmp_path, monkeypatch):
    """Lest it takes room on the disk for as long as it is mapped."""
    url, cache = written[0], tmp_path / "cache"
    for path in Path(url).rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{s3}/let-go/{path.relative_to(url)}", path.read_bytes())
    monkeypatch.setattr(records_module, "_SECONDS_BETWEEN_LOOKS", 0.0)
    data = LatentDataset(f"{s3}/let-go", global_batch_size=1, cache=Cache(folder=cache))
    expected = LatentDataset(url, global_batch_size=1)
    for step in range(2 * TOTAL):
        for path in cache.glob("??/*.tar"):
            path.unlink()  # as another process does that needs the room
        assert torch.equal(data.batch(step).moments, expected.batch(step).moments)
    deleted = [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{cache}" in line]
    assert len(deleted) <= 2 < len(COUNTS), deleted


def test_samples_without_labels(kl, tmp_path):
    latent_dataset(str(tmp_path), kl, (4,), classes=0)
    data = LatentDataset(str(tmp_path), global_batch_size=4)
    assert data.manifest.conditioning == Conditioning() and data.num_classes == 0
    assert data.batch(0).labels.tolist() == [0, 0, 0, 0]


def test_a_missing_label_is_the_null_class(kl, tmp_path):
    url = str(tmp_path)
    fingerprint = some_fingerprint(kl, 4)
    with ShardWriter(url, "a", "f", 4) as writer:
        for n, label in enumerate((0, None, 4)):
            writer.add(str(n), records(1)[0], label=label)
        receipt = writer.commit(3, 1, "0")
    with pytest.raises(RequestError, match="class_names: gives 2 names, but the labels go up to 4"):
        commit_generation(url, [receipt], fingerprint, kl.latent_channels, kl.factor, class_names=("a", "b"))
    commit_generation(url, [receipt], fingerprint, kl.latent_channels, kl.factor, class_names=tuple("abcde"))
    data = LatentDataset(url, global_batch_size=3)
    assert data.num_classes == 5 and data.manifest.conditioning.names == tuple("abcde")
    assert data.all().labels.tolist() == [0, 5, 4]
