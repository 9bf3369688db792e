"""The stream of samples: one order for any batch size, world and restart; splits and draws by id."""

import numpy as np
import pytest
import torch

from ldm.config import RequestError
from ldm.latents.choice import is_held_out
from ldm.latents.dataset import LatentBatch, LatentDataset, draw_latents
from ldm.latents.manifest import (
    commit_generation,
)
from tests.pictures import COUNTS, TOTAL, latent_dataset, records, some_fingerprint, write_latent_shard


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_out_the_same_global_batch(written, world):
    whole = LatentDataset(written[0], global_batch_size=8, seed=3)
    parts = [LatentDataset(written[0], global_batch_size=8, seed=3) for _ in range(world)]
    for step in (0, 1, 5, 1000):
        expected = whole.batch(step)
        found = [part.batch(step, rank, world) for rank, part in enumerate(parts)]
        for name in ("moments", "labels", "ids", "epochs"):
            assert torch.equal(torch.cat([getattr(b, name) for b in found]), getattr(expected, name))


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
