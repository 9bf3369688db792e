"""The order of samples: permutations that are computed, lanes, windows, and how well they shuffle."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.latents import order as order_module
from ldm.latents.order import FullOrder, LaneOrder, derive, permute, stream_key

KEY = derive(stream_key(0, "test"), 3)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_permutation_is_a_bijection(seed):
    for count in [*range(1, 301), 1023, 1024, 1025, 65_537, 300_000]:
        found = permute(np.arange(count), count, derive(stream_key(seed, "test"), count))
        assert np.array_equal(np.sort(found), np.arange(count))


@pytest.mark.parametrize("count", [1023, 65_537, 300_000])
def test_no_order_is_left(count):
    """Ranks and values are uncorrelated, and few neighbours stay neighbours."""
    found = permute(np.arange(count), count, KEY)
    assert abs(np.corrcoef(np.arange(count), found)[0, 1]) < 4 / np.sqrt(count)
    assert (np.abs(np.diff(found)) == 1).mean() < 0.02


def test_any_position_of_a_billion_is_computed():
    positions = np.array([0, 1, 999_999_999, 123_456_789])
    found = permute(positions, 10**9, KEY)
    assert len(set(found.tolist())) == 4 and found.min() >= 0 and found.max() < 10**9
    assert np.array_equal(permute(positions[::-1], 10**9, KEY), found[::-1])


def test_counts_and_keys_of_their_own():
    counts = np.repeat(np.arange(1, 60), np.arange(1, 60))
    positions = np.concatenate([np.arange(n) for n in range(1, 60)])
    keys = derive(stream_key(0, "windows"), counts)
    found = permute(positions, counts, keys)
    for count in range(1, 60):
        alone = permute(np.arange(count), count, derive(stream_key(0, "windows"), count))
        assert np.array_equal(found[counts == count], alone)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 16])
def test_small_permutations_are_as_if_drawn(count):
    """Over many epochs each sample stands at each place, and each pair at the first two, about equally often."""
    epochs = 20_000
    positions = np.tile(np.arange(count), epochs)
    keys = derive(stream_key(0, "small"), np.repeat(np.arange(epochs), count))
    found = permute(positions, count, keys).reshape(epochs, count)
    places = np.stack([np.bincount(found[:, place], minlength=count) for place in range(count)])
    chi_square = ((places - epochs / count) ** 2 / (epochs / count)).sum()
    freedom = (count - 1) ** 2
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 4
    pairs = np.bincount(found[:, 0] * count + found[:, 1], minlength=count**2).reshape(count, count)
    assert not np.diag(pairs).any()
    expected, freedom = epochs / (count * (count - 1)), count * (count - 1) - 1
    chi_square = ((pairs[~np.eye(count, dtype=bool)] - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 4


counts_of_shards = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(sum)


@settings(max_examples=150, deadline=None)
@given(
    counts=counts_of_shards,
    lanes=st.sampled_from([1, 2, 4, 16, 64]),
    live=st.sampled_from([1, 4, 64, 2048]),
    least=st.sampled_from([1, 16, 256]),
    seed=st.integers(0, 10),
    start=st.tuples(st.integers(0, 500), st.integers(0, 5)),
)
def test_every_epoch_is_a_permutation(counts, lanes, live, least, seed, start):
    """Also where shards, lanes and windows do not divide one another, and wherever the order begins."""
    counts, (position, first) = np.array(counts), start
    everything = sorted((shard, index) for shard, count in enumerate(counts) for index in range(count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "LANE_SAMPLES", least)
        patch.setattr(order_module, "LIVE_SHARDS", live)
        for order in (LaneOrder(counts, seed, lanes, position, first), FullOrder(counts, seed, position, first)):
            seen = []
            for epoch in (0, 1, 6):
                begin = position + epoch * len(everything)
                shards, indices, epochs = order.locate(np.arange(begin, begin + len(everything)))
                seen.append(list(zip(shards.tolist(), indices.tolist(), strict=True)))
                assert sorted(seen[-1]) == everything and set(epochs.tolist()) == {first + epoch}
            if len(everything) > 20 and live == 2048 and least == 256:
                assert seen[0] != seen[1] != seen[2]


@settings(max_examples=60, deadline=None)
@given(counts=counts_of_shards, lanes=st.sampled_from([1, 4, 64]), live=st.sampled_from([4, 2048]))
def test_what_is_read_ahead_is_what_is_read(counts, lanes, live):
    counts, total = np.array(counts), int(np.sum(counts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "LANE_SAMPLES", 1)
        patch.setattr(order_module, "LIVE_SHARDS", live)
        order = LaneOrder(counts, 0, lanes)
        for position in (0, 3, total - 1, 5 * total + 7):
            for own in ([0], list(range(lanes))):
                ahead, until = order.shards_ahead(position, own)
                assert until > position and len(set(ahead)) == len(ahead)
                positions = np.arange(position, until)
                positions = positions[np.isin(positions % lanes, own)]
                assert set(order.locate(positions)[0].tolist()) <= {shard for _, shard in ahead}
                assert [wait for wait, _ in ahead] == sorted(wait for wait, _ in ahead)


@settings(max_examples=60, deadline=None)
@given(counts=counts_of_shards, lanes=st.sampled_from([1, 4, 64]), data=st.data())
def test_positions_in_any_order(counts, lanes, data):
    """As a mixture asks for them: out of order, and across the ends of epochs."""
    total = sum(counts)
    lane_samples = data.draw(st.sampled_from([1, 256]))
    positions = np.array(data.draw(st.lists(st.integers(0, 3 * total), min_size=1, max_size=20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "LANE_SAMPLES", lane_samples)
        for order in (LaneOrder(np.array(counts), 0, lanes), FullOrder(np.array(counts), 0)):
            whole = np.stack(order.locate(np.arange(3 * total + 1)))
            assert np.array_equal(np.stack(order.locate(positions)), whole[:, positions])


def test_a_small_data_set_is_shuffled_as_a_large_one_is():
    """Fewer samples than lanes: the same ones would stand beside one another in every epoch."""
    order, beside = LaneOrder(np.array([21]), 0, 64), set()
    for epoch in range(200):
        indices = order.locate(np.arange(21) + epoch * 21)[1].tolist()
        beside |= set(itertools.pairwise(indices))
    assert len(beside) > 0.99 * 21 * 20


def test_a_position_outside_is_refused():
    for wrong in (-1, 5):
        with pytest.raises(AssertionError, match="outside"):
            permute(np.array([0, wrong]), 5, KEY)


def test_a_lane_keeps_its_shards_in_every_epoch():
    """So that a node reads the same part of the data again, which lies in its cache."""
    counts, lanes = np.full(640, 50), 64
    order = LaneOrder(counts, 0, lanes)
    positions = np.arange(order.num_samples)
    for epoch in range(3):
        shards = order.locate(positions + epoch * order.num_samples)[0]
        for lane in (0, 17, 63):
            assert set(shards[positions % lanes == lane].tolist()) == set(range(lane, 640, lanes))


def test_windows_change_one_after_another():
    """Not all at once, which would ask the store for everything at once."""
    counts = np.full(6400, 20)
    order = LaneOrder(counts, 0, 64)
    ends = sorted(order._epoch(0).window_at(lane)[1] for lane in range(64))
    assert len({end // 64 for end in ends}) == 64


@pytest.mark.parametrize(("shards", "classes"), [(1000, 10), (1000, 1000), (10_000, 10), (10_000, 100)])
def test_lanes_balance_classes_as_a_full_permutation_does(shards, classes):
    """A data set sorted by class: the distance of a batch's classes from their shares, at most 5% above that of a
    full permutation."""
    counts, batch = np.full(shards, 100), 256
    order_distance, full_distance = (
        _class_distance(order, classes, batch) for order in (LaneOrder(counts, 0, 64), FullOrder(counts, 0))
    )
    assert order_distance < 1.05 * full_distance


def _class_distance(order, classes: int, window: int) -> float:
    """Mean total variation distance of the classes in windows of the stream from those of all samples."""
    shards, indices, _ = order.locate(np.arange(200 * window) + 7 * window)
    number = (np.cumsum(order.counts) - order.counts)[shards] + indices
    labels = (number * classes // order.num_samples).reshape(-1, window)
    found = np.stack([np.bincount(row, minlength=classes) / window for row in labels])
    return float(np.abs(found - 1 / classes).sum(1).mean() / 2)
