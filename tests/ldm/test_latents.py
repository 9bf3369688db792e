"""The latent dataset: what is written is what is read, by us and by others, and damage is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import webdataset

from ldm import storage
from ldm.config import RequestError
from ldm.latents import dataset as dataset_module
from ldm.latents.dataset import LatentDataset, draw_latents, is_held_out
from ldm.latents.manifest import (
    Accounting,
    Conditioning,
    Moments,
    Statistics,
    check_fingerprint,
    combine,
    commit_generation,
    fingerprint_hash,
    make_fingerprint,
    read_manifest,
    read_receipts,
)
from ldm.latents.order import permute
from ldm.latents.writer import ShardWriter, sample_id
from tests.pictures import latent_dataset, records, write_latent_shard

COUNTS = (7, 13, 1, 5)
TOTAL = sum(COUNTS)


@pytest.fixture(scope="module")
def written(kl, tmp_path_factory):
    """(url, moments by shard) of a data set of uneven shards, that no test changes."""
    url = str(tmp_path_factory.mktemp("latents"))
    _, content = latent_dataset(url, kl, COUNTS)
    return url, content


@pytest.fixture
def copy(written, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(written[0], tmp_path / "copy")
    return tmp_path / "copy"


def moments_by_id(content):
    return {
        sample_id(shard, f"{n:05d}"): record for shard, moments in content.items() for n, record in enumerate(moments)
    }


# What is written


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
    fingerprint = make_fingerprint(kl, 4, (255, 255, 255), "moments", "float32")
    moments = records(4)
    receipt = write_latent_shard(url, "a", moments, fingerprint=fingerprint_hash(fingerprint), keys=keys)
    commit_generation(url, [receipt], fingerprint, kl)
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
    sums = [Moments(1, (v,), (v * v,), (0.0,)) for v in values]
    assert combine(sums).mean == pytest.approx((values.mean(),))
    assert combine(sums).std == pytest.approx((values.std(),))


def test_accounting_adds_up(kl, tmp_path):
    latent_dataset(str(tmp_path), kl, COUNTS, quarantined=2)
    manifest, receipts = read_manifest(str(tmp_path)), read_receipts(str(tmp_path))
    assert manifest.accounting == Accounting(TOTAL + 8, TOTAL, 0, 8)
    assert str(manifest.accounting) == f"{TOTAL + 8} = {TOTAL} encoded + 0 filtered + 8 quarantined"
    assert [row["count"] for row in manifest.shards] == [receipts[r["name"]].accounting.encoded for r in manifest.shards]
    assert receipts["shard-0"].quarantined == (("bad-0", "planted"), ("bad-1", "planted"))
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
    fingerprint = make_fingerprint(kl, 4, (255, 255, 255), "moments", "float32")
    both = [
        write_latent_shard(url, name, records(count), fingerprint="f", quarantined=3)
        for name, count in (("a", 2), ("empty", 0))
    ]
    commit_generation(url, both, fingerprint, kl)
    assert read_manifest(url).accounting == Accounting(8, 2, 0, 6)
    assert storage.list_dir(f"{url}/latents") == ["a.index.parquet", "a.tar"]
    assert LatentDataset(url, global_batch_size=1).num_samples == 2
    assert read_receipts(url) == {receipt.name: receipt for receipt in both}


# What is read


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


def test_fewer_maps_than_shards(written, monkeypatch):
    url, _ = written
    expected = [LatentDataset(url, global_batch_size=9).batch(step).moments for step in range(6)]
    monkeypatch.setattr(dataset_module, "_OPEN_SHARDS", 2)
    data = LatentDataset(url, global_batch_size=9)
    assert all(torch.equal(data.batch(step).moments, expected[step]) for step in range(6))
    assert len(data._shards) == 2


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_out_the_same_global_batch(written, world):
    whole = LatentDataset(written[0], global_batch_size=8, seed=3)
    parts = [LatentDataset(written[0], global_batch_size=8, seed=3) for _ in range(world)]
    for step in (0, 1, 5, 1000):
        expected = whole.batch(step)
        found = [part.batch(step, rank, world) for rank, part in enumerate(parts)]
        for name in ("moments", "labels", "ids", "epochs"):
            assert torch.equal(torch.cat([getattr(b, name) for b in found]), getattr(expected, name))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, TOTAL - 1, TOTAL, TOTAL + 1, 3 * TOTAL])
def test_epochs_follow_one_another(written, batch_size):
    """Over three epochs every sample stands exactly three times, once in each, whatever the batch size."""
    data = LatentDataset(written[0], global_batch_size=batch_size, seed=1)
    batches = [data.batch(step) for step in range(-(-3 * TOTAL // batch_size))]
    ids = torch.cat([b.ids for b in batches])[: 3 * TOTAL]
    epochs = torch.cat([b.epochs for b in batches])[: 3 * TOTAL]
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in range(TOTAL)]
    for epoch in range(3):
        assert len(set(ids[epochs == epoch].tolist())) == TOTAL
    # The stream does not depend on the batch size.
    whole = LatentDataset(written[0], global_batch_size=3 * TOTAL, seed=1).batch(0)
    assert torch.equal(ids, whole.ids)


def test_the_order_differs_between_epochs_and_seeds(written):
    orders = [
        tuple(LatentDataset(written[0], global_batch_size=TOTAL, seed=seed).batch(epoch).ids.tolist())
        for seed in range(3)
        for epoch in range(3)
    ]
    orders.append(tuple(LatentDataset(written[0], global_batch_size=TOTAL).all().ids.tolist()))
    assert len(set(orders)) == 10


def test_a_step_needs_nothing_but_its_number(written):
    """Resume at step k: a fresh reader gives what the old one would have given."""
    old = LatentDataset(written[0], global_batch_size=6, seed=2)
    expected = [old.batch(step) for step in range(20)]
    for step in (19, 7, 0):
        found = LatentDataset(written[0], global_batch_size=6, seed=2).batch(step)
        assert torch.equal(found.moments, expected[step].moments) and torch.equal(found.epochs, expected[step].epochs)


def test_one_sample_alone(kl, tmp_path):
    latent_dataset(str(tmp_path), kl, (1,))
    batch = LatentDataset(str(tmp_path), global_batch_size=4).batch(2)
    assert batch.epochs.tolist() == [8, 9, 10, 11] and len(set(batch.ids.tolist())) == 1


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
    cached = sorted(p for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert len(cached) == 3 * len(COUNTS) and not any(".tmp" in p.name for p in cached)
    storage.write_bytes(f"{s3}/latents/latents/shard-1.tar", b"x" * 100)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"shard-1\.tar: has sha256 .*it is damaged"):
        LatentDataset(f"{s3}/latents", global_batch_size=9).all()


# Order and split


@pytest.mark.parametrize("seed", [0, 1])
def test_the_permutation_is_a_bijection(seed):
    for count in range(1, 301):
        found = permute(np.arange(count), count, seed, epoch=0)
        assert np.array_equal(np.sort(found), np.arange(count))


@pytest.mark.parametrize("count", [1023, 1024, 1025, 65_537, 300_000])
def test_large_permutations(count):
    found = permute(np.arange(count), count, 0, epoch=3)
    assert np.array_equal(np.sort(found), np.arange(count))
    # No order is left: ranks and values are uncorrelated, and few neighbours stay neighbours.
    assert abs(np.corrcoef(np.arange(count), found)[0, 1]) < 4 / np.sqrt(count)
    assert (np.abs(np.diff(found)) == 1).mean() < 0.02


def test_any_position_of_a_billion_is_computed():
    positions = np.array([0, 1, 999_999_999, 123_456_789])
    found = permute(positions, 10**9, 0, 0)
    assert len(set(found.tolist())) == 4 and found.min() >= 0 and found.max() < 10**9
    assert np.array_equal(permute(positions[::-1], 10**9, 0, 0), found[::-1])


def test_small_permutations_visit_every_place():
    """Over many epochs each sample stands at each place about equally often."""
    counts = np.zeros((5, 5))
    for epoch in range(2000):
        counts[np.arange(5), permute(np.arange(5), 5, 0, epoch)] += 1
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert chi_square < 60  # 16 degrees of freedom; 39 is 0.1% for independent cells


def test_train_and_holdout_divide_the_samples(written):
    everything = set(LatentDataset(written[0], global_batch_size=1).all().ids.tolist())
    train, held = (
        set(LatentDataset(written[0], global_batch_size=1, holdout=0.3, split=split).all().ids.tolist())
        for split in ("train", "holdout")
    )
    assert train | held == everything and not train & held and train and held


def test_the_holdout_share_and_its_nesting():
    ids = np.random.default_rng(0).integers(0, 2**63, 20_000)
    small, large = is_held_out(ids, 0.05), is_held_out(ids, 0.2)
    assert small.mean() == pytest.approx(0.05, abs=0.008) and large.mean() == pytest.approx(0.2, abs=0.012)
    assert (large | ~small).all()
    assert not is_held_out(ids, 0).any() and is_held_out(ids, 1).all()


def test_added_shards_move_no_sample_to_the_other_split(kl, tmp_path):
    held = []
    for counts in (COUNTS, (*COUNTS, 20)):
        url = str(tmp_path / str(len(counts)))
        latent_dataset(url, kl, counts)
        ids = LatentDataset(url, global_batch_size=1, holdout=0.3, split="holdout").all().ids
        held.append(set(ids.tolist()))
    assert held[0] < held[1]


def test_an_empty_split_is_refused(written):
    with pytest.raises(RequestError, match=r"the holdout split holds no sample \(holdout=0\.0\)"):
        LatentDataset(written[0], global_batch_size=1, split="holdout")


# Drawing


def test_a_drawn_latent_depends_on_seed_epoch_and_id_alone(written):
    data = LatentDataset(written[0], global_batch_size=TOTAL)
    first, later = data.batch(0), data.batch(1)
    whole = draw_latents(first, data.statistics, seed=5)
    halves = [
        draw_latents(dataset_module.LatentBatch(*(getattr(first, n)[s] for n in ("moments", "labels", "ids", "epochs"))),
                     data.statistics, seed=5)
        for s in (slice(0, 11), slice(11, None))
    ]  # fmt: skip
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(draw_latents(first, data.statistics, seed=6), whole)
    # Another epoch: the same moments, another draw.
    order, again = first.ids.argsort(), later.ids.argsort()
    assert torch.equal(first.moments[order], later.moments[again])
    assert not torch.equal(whole[order], draw_latents(later, data.statistics, seed=5)[again])


def test_drawn_latents_are_posterior_samples(written):
    data = LatentDataset(written[0], global_batch_size=TOTAL * 400)
    batch = data.batch(0)  # 400 epochs
    statistics = data.statistics
    raw = draw_latents(batch, statistics, 0) * torch.tensor(statistics.std)[:, None, None]
    raw = raw + torch.tensor(statistics.mean)[:, None, None]
    one = batch.ids == batch.ids[0]
    mean, std = batch.moments[0, :4].float(), (0.5 * batch.moments[0, 4:].float()).exp()
    assert ((raw[one].mean(0) - mean).abs() < 5 * std / 20).all()
    assert (raw[one].std(0) / std - 1).abs().max() < 0.25
    normalised = draw_latents(batch, statistics, 0)
    assert (normalised.std((0, 2, 3)) - 1).abs().max() < 0.02 and normalised.mean((0, 2, 3)).abs().max() < 0.02


def test_latents_without_a_variance_are_only_normalised(kl, tmp_path):
    url = str(tmp_path)
    fingerprint = make_fingerprint(kl, 4, (255, 255, 255), "mean", "float32")
    means = records(20, shape=(4, 2, 2))
    commit_generation(url, [write_latent_shard(url, "a", means, fingerprint="f")], fingerprint, kl)
    data = LatentDataset(url, global_batch_size=20)
    latents = draw_latents(data.all(), data.statistics, 0)
    assert torch.equal(latents, draw_latents(data.all(), data.statistics, 1)) and data.latent_shape == (4, 2, 2)
    assert latents.std((0, 2, 3), correction=0) == pytest.approx(np.ones(4), rel=1e-5)


# Labels


def test_samples_without_labels(kl, tmp_path):
    latent_dataset(str(tmp_path), kl, (4,), classes=0)
    data = LatentDataset(str(tmp_path), global_batch_size=4)
    assert data.manifest.conditioning == Conditioning() and data.num_classes == 0
    assert data.batch(0).labels.tolist() == [0, 0, 0, 0]


def test_a_missing_label_is_the_null_class(kl, tmp_path):
    url = str(tmp_path)
    fingerprint = make_fingerprint(kl, 4, (255, 255, 255), "moments", "float32")
    with ShardWriter(url, "a", "f", 4) as writer:
        for n, label in enumerate((0, None, 4)):
            writer.add(str(n), records(1)[0], label=label)
        receipt = writer.commit(1, "0")
    commit_generation(url, [receipt], fingerprint, kl, class_names=("a", "b"))
    data = LatentDataset(url, global_batch_size=3)
    assert data.num_classes == 5 and data.manifest.conditioning.names == ("a", "b")
    assert data.all().labels.tolist() == [0, 5, 4]


# Generations and damage


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
    assert commit_generation(str(tmp_path), receipts, values["fingerprint"], kl) == first
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    fewer = commit_generation(str(tmp_path), receipts[:2], values["fingerprint"], kl)
    assert read_manifest(str(tmp_path)).generation == fewer
    assert commit_generation(str(tmp_path), receipts, values["fingerprint"], kl) == first
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
    damage(next((copy / "generations").glob("*.parquet")), flip)
    with pytest.raises(ValueError, match=r"\.parquet: does not have the hash"):
        read_manifest(str(copy))


def test_a_newer_format_is_refused(copy):
    file = next((copy / "generations").glob("*.json"))
    damage(file, lambda data: data.replace(b'"version": 1\n', b'"version": 2\n'))
    with pytest.raises(RequestError, match="has format version 2, this program reads up to 1"):
        read_manifest(str(copy))


def test_the_fingerprint_says_what_differs(kl):
    made = make_fingerprint(kl, 64, (255, 255, 255), "moments", "float32")
    check_fingerprint("x", made, json.loads(json.dumps(made)))
    other = make_fingerprint(kl, 32, (0, 255, 255), "mean", "float32")
    with pytest.raises(RequestError) as caught:
        check_fingerprint("place", made, other)
    assert str(caught.value).startswith("destination=place: holds latents made in another way (")
    for part in ("pictures.size: 64 != 32", "store: moments != mean", "pictures.background: [255, 255, 255] != [0, 255"):
        assert part in str(caught.value)


def test_the_shard_table_is_plain_parquet(written):
    table = pq.read_table(next(Path(written[0]).glob("generations/*.parquet"))).to_pylist()
    assert [(row["name"], row["count"]) for row in table] == [(f"shard-{i}", n) for i, n in enumerate(COUNTS)]
    assert all(Path(written[0], "latents", f"{r['name']}.tar").stat().st_size == r["bytes"] for r in table)
