"""The stream of samples: one order for any batch size, world and restart; splits and draws by id."""

import hashlib
import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config import RequestError
from ldm.latents.batch import LatentBatch, draw_latents
from ldm.latents.choice import is_held_out
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import (
    commit_generation,
)
from tests.pictures import COUNTS, TOTAL, latent_dataset, records, some_fingerprint, write_latent_shard


def chain(url: str, batch_size: int, world: int, workers: int, steps: range, **options) -> list[str]:
    """The running hash of (id, epoch) in the order of the global stream, after each step, as all ranks read it."""
    ranks = [LatentDataset(url, global_batch_size=batch_size, seed=3, **options) for _ in range(world)]
    streams = [data.batches(steps.start, rank=rank, world=world, workers=workers) for rank, data in enumerate(ranks)]
    digest, found = hashlib.sha256(), []
    for _ in steps:
        ids, epochs = np.full(batch_size, -1), np.full(batch_size, -1)
        for rank, stream in enumerate(streams):
            batch, slots = next(stream), ranks[rank].slots(rank, world)
            assert len(batch) == batch_size // world
            ids[slots], epochs[slots] = batch.ids, batch.epochs
        digest.update(ids.tobytes() + epochs.tobytes())
        found.append(digest.hexdigest())
    for stream in streams:
        stream.close()
    return found


@pytest.mark.parametrize("batch_size", [24, 192])
def test_the_stream_is_the_same_on_any_world_and_with_any_workers(written, batch_size):
    """Shards of 7, 13, 1 and 5 samples; 8 and 64 lanes: nothing divides anything."""
    expected = chain(written[0], batch_size, 1, 0, range(12))
    for world, workers in ((1, 2), (1, 8), (2, 0), (3, 2), (4, 0), (8, 2)):
        assert chain(written[0], batch_size, world, workers, range(12)) == expected, (world, workers)


def test_it_goes_on_exactly_on_another_world(written):
    """Stopped after any step."""
    expected = [LatentDataset(written[0], global_batch_size=24, seed=3).batch(step) for step in range(9)]
    for stopped, world in ((1, 8), (4, 3), (7, 2)):
        data = LatentDataset(written[0], global_batch_size=24, seed=3)
        for step in range(stopped, 9):
            parts = {rank: data.batch(step, rank, world) for rank in range(world)}
            for name in ("moments", "labels", "ids", "epochs"):
                whole = torch.empty_like(getattr(expected[step], name))
                for rank, part in parts.items():
                    whole[data.slots(rank, world)] = getattr(part, name)
                assert torch.equal(whole, getattr(expected[step], name))


def test_ranks_own_whole_lanes(written):
    data = LatentDataset(written[0], global_batch_size=192)
    for world in (2, 4, 8):
        lanes = [set((data.slots(rank, world) % data.lanes).tolist()) for rank in range(world)]
        assert all(len(own) == 64 // world for own in lanes) and len(set.union(*lanes)) == 64


def test_one_small_shard_and_eight_ranks(kl, tmp_path):
    latent_dataset(str(tmp_path), kl, (3,))
    ranks = [LatentDataset(str(tmp_path), global_batch_size=64, seed=rank // 8) for rank in range(8)]
    for step in (0, 1, 1000):
        batches = [data.batch(step, rank, 8) for rank, data in enumerate(ranks)]
        assert [len(batch) for batch in batches] == [8] * 8


def test_a_background_reader_that_fails_says_so(written, monkeypatch):
    data = LatentDataset(written[0], global_batch_size=4)
    real = data.batch
    monkeypatch.setattr(data, "batch", lambda step, *rest, **named: real(step // (step != 5), *rest, **named))
    stream = data.batches(2, workers=2)
    assert [len(next(stream)) for _ in range(3)] == [4, 4, 4]
    with pytest.raises(ZeroDivisionError):
        next(stream)


def test_it_travels_to_a_spawned_process(written):
    data = LatentDataset(written[0], global_batch_size=4, seed=5, where="label > 0", exclude={0: [1], 9: [2]})
    data.batch(0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(LatentDataset.batch, (data, 3))
    assert torch.equal(found.ids, data.batch(3).ids) and torch.equal(found.moments, data.batch(3).moments)


def test_exclusion_in_the_middle_of_an_epoch(written):
    """From the step on the ids appear no more; the rest of the stream of that epoch stays as it was, and the next
    epochs are permutations of what is left."""
    url, batch_size, step = written[0], 4, 9  # of 26 samples: step 9 is in the second epoch
    before = LatentDataset(url, global_batch_size=batch_size, seed=1)
    gone = before.batch(11).ids[:2].tolist() + before.batch(7).ids[:1].tolist()
    after = LatentDataset(url, global_batch_size=batch_size, seed=1, exclude={step: gone})
    assert after.num_samples == TOTAL - 3 and after.chosen["left_out"] == {"exclude": 3}
    for number in range(step):
        assert torch.equal(after.batch(number).ids, before.batch(number).ids)
    replaced = 0
    for number in range(step, 13):  # to the end of the epoch
        old, new = before.batch(number), after.batch(number)
        same = torch.tensor([identity not in gone for identity in old.ids.tolist()])
        assert torch.equal(old.ids[same], new.ids[same]) and torch.equal(old.epochs, new.epochs)
        assert torch.equal(old.moments[same], new.moments[same])
        replaced += int((~same).sum())
    assert replaced >= 2
    later = [after.batch(number) for number in range(step, 60)]
    assert not set(torch.cat([batch.ids for batch in later]).tolist()) & set(gone)
    ids, epochs = (torch.cat([getattr(batch, name) for batch in later[4:]]) for name in ("ids", "epochs"))
    for epoch in range(2, int(epochs.max())):
        assert len(set(ids[epochs == epoch].tolist())) == TOTAL - 3 == int((epochs == epoch).sum())
    # A reader that begins later, in another world, gives the same.
    parts = [
        LatentDataset(url, global_batch_size=4, seed=1, exclude={step: gone}).batch(30, rank, 2) for rank in (0, 1)
    ]
    assert torch.equal(torch.cat([part.ids for part in parts]), after.batch(30).ids)


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True),
    batch_size=st.sampled_from([1, 4, 6, 64]),
    weights=st.sampled_from([None, (2, 1)]),
    data=st.data(),
)
def test_what_is_excluded_never_comes_again(written, steps, batch_size, weights, data):
    urls = [written[0], written[0]] if weights else written[0]
    everything = LatentDataset(written[0], global_batch_size=1).all().ids.tolist()
    exclude = {step: data.draw(st.lists(st.sampled_from(everything), max_size=8)) for step in steps}
    found = LatentDataset(urls, global_batch_size=batch_size, seed=1, exclude=exclude, weights=weights)
    for step in range(0, 50, 3):
        gone = {identity for first, ids in exclude.items() if first <= step for identity in ids}
        assert not gone & set(found.batch(step).ids.tolist()), step


@pytest.mark.parametrize("shuffle", ["lanes", "full"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, TOTAL - 1, TOTAL, TOTAL + 1, 3 * TOTAL, 64, 192])
def test_epochs_follow_one_another(written, batch_size, shuffle):
    """Over three epochs every sample stands exactly three times, once in each, whatever the batch size."""
    data = LatentDataset(written[0], global_batch_size=batch_size, seed=1, shuffle=shuffle)
    batches = [data.batch(step) for step in range(-(-3 * TOTAL // batch_size))]
    ids = torch.cat([b.ids for b in batches])[: 3 * TOTAL]
    epochs = torch.cat([b.epochs for b in batches])[: 3 * TOTAL]
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in range(TOTAL)]
    for epoch in range(3):
        assert len(set(ids[epochs == epoch].tolist())) == TOTAL
    if shuffle == "full":  # which does not depend on the batch size; lanes divide it
        whole = LatentDataset(written[0], global_batch_size=3 * TOTAL, seed=1, shuffle="full").batch(0)
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
    with pytest.raises(RequestError, match=r"the holdout split holds no sample \(.*holdout=0\.0\)"):
        LatentDataset(written[0], global_batch_size=1, split="holdout")


def test_a_drawn_latent_depends_on_seed_epoch_and_id_alone(written):
    data = LatentDataset(written[0], global_batch_size=TOTAL)
    first, later = data.batch(0), data.batch(1)
    whole = draw_latents(first, data.statistics, seed=5)
    columns = (first.moments, first.labels, first.ids, first.epochs)
    for part in (slice(0, 11), slice(11, None)):
        alone = draw_latents(LatentBatch(*(column[part] for column in columns)), data.statistics, seed=5)
        assert torch.equal(alone, whole[part])
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
    fingerprint = some_fingerprint(kl, 4, "mean")
    means = records(20, shape=(4, 2, 2))
    commit_generation(
        url, [write_latent_shard(url, "a", means, fingerprint="f")], fingerprint, kl.latent_channels, kl.factor
    )
    data = LatentDataset(url, global_batch_size=20)
    latents = draw_latents(data.all(), data.statistics, 0)
    assert torch.equal(latents, draw_latents(data.all(), data.statistics, 1)) and data.latent_shape == (4, 2, 2)
    assert latents.std((0, 2, 3), correction=0) == pytest.approx(np.ones(4), rel=1e-5)
