"""The order of samples: a pure function of (seed, epoch, counts of the shards), computed and never stored.

Position g of the stream lies in lane g mod L. A lane owns a fixed range of the shards, so that the ranks of a node,
which own whole lanes, read the same shards in every epoch. The shards are dealt to the lanes like cards: each lane
holds every part of the data set, however that is sorted. Within an epoch a lane takes its shards in a shuffled order
that is as even (one from each part, then the next from each), and shuffles samples over windows of several shards.

A permutation of n is a Feistel network over Z_a x Z_a, a = ceil(sqrt(n)), walked along its cycle until it falls below n
(Black & Rogaway, "Ciphers with arbitrary finite domains", 2002). Any position costs the same, in any epoch.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ldm.random import key

LANES = 64
"""Largest number of lanes, and of nodes that read nothing twice but the few shards that a cut between lanes divides."""
LANE_SAMPLES = 256
"""A lane holds at least so many samples: fewer could hardly be shuffled in it. A small data set has fewer lanes."""
LIVE_SHARDS = 2048
"""Shards that the windows of all lanes shuffle over at a time: the more, the nearer to a full permutation, and the more
must lie in the nodes' caches."""

_EPOCHS_KEPT = 3
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Its multiples, modulo 1, lie evenly however many there are."""
Integers = npt.NDArray[np.int64]
Unsigned = npt.NDArray[np.uint64]

_ROUNDS = np.arange(8, dtype=np.uint64) << np.uint64(40)
"""What tells the rounds apart lies above the half that they hash."""
_27, _30, _31, _32 = (np.uint64(bits) for bits in (27, 30, 31, 32))
_FACTORS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
_GOLDEN = np.array([0x9E3779B97F4A7C15], np.uint64)


def stream_key(seed: int, purpose: str) -> Unsigned:
    """The key (1,) of a family of permutations; `derive` makes that of a member."""
    return np.array([key(seed, purpose)[0]], np.uint64)


def derive(stream: Unsigned, number: int | Integers) -> Unsigned:
    """The key of each member of a family, or of a family in a family: (1,) or (n,). Broadcasts."""
    return _mix(stream ^ _mix(np.atleast_1d(number).astype(np.uint64) + _GOLDEN))


def permute(positions: Integers, counts: int | Integers, stream: Unsigned) -> Integers:
    """Each position in [0, count) => another one in [0, count): int64 (n,). counts and keys are one for all or (n,)."""
    limits = np.broadcast_to(counts, positions.shape).astype(np.uint64)
    sides = np.ceil(np.sqrt(limits)).astype(np.uint64)
    values = positions.astype(np.uint64)
    assert (values < limits).all(), "a position outside would walk for ever"
    values = _feistel(values, sides, stream)
    outside = np.flatnonzero(values >= limits)
    while len(outside):
        again = _feistel(values[outside], sides[outside], stream[outside] if len(stream) > 1 else stream)
        values[outside] = again
        outside = outside[again >= limits[outside]]
    return values.astype(np.int64)


def _feistel(values: Unsigned, sides: Unsigned, stream: Unsigned) -> Unsigned:
    right, left = np.divmod(values, sides)
    for number in _ROUNDS:
        # The upper half of the hash times the side: in [0, side) without a division.
        left += ((_mix(right ^ (stream + number)) >> _32) * sides) >> _32
        left -= sides * (left >= sides)
        left, right = right, left
    return right * sides + left


def _mix(x: Unsigned) -> Unsigned:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> _30)) * _FACTORS[0]
    x = (x ^ (x >> _27)) * _FACTORS[1]
    return x ^ (x >> _31)


Located = tuple[Integers, Integers, Integers]
"""Shards, indices in them, and epochs, int64 (n,) each."""


class FullOrder:
    """One permutation of all samples for each epoch.

    counts: samples of each shard (S,). position, epoch: where the order begins.
    """

    def __init__(self, counts: Integers, seed: int, position: int = 0, epoch: int = 0) -> None:
        self.counts, self.position, self.epoch = counts, position, epoch
        self.num_samples = int(counts.sum())
        self._ends = np.cumsum(counts)
        self._stream = stream_key(seed, "order")

    def locate(self, positions: Integers) -> Located:
        """positions: of the stream, int64 (n,), in any order."""
        epochs, within = np.divmod(positions - self.position, self.num_samples)
        epochs += self.epoch
        numbers = permute(within, self.num_samples, derive(self._stream, epochs))
        shards = np.searchsorted(self._ends, numbers, side="right")
        return shards, numbers - (self._ends[shards] - self.counts[shards]), epochs


class LaneOrder:
    """The order by lanes.

    counts: samples of each shard (S,). lanes: at most, a power of 2 that divides the global batch; lane i of them is a
    part of lane i mod `self.lanes`. position, epoch: where the order begins.
    """

    def __init__(self, counts: Integers, seed: int, lanes: int, position: int = 0, epoch: int = 0) -> None:
        self.counts, self.position, self.epoch = counts, position, epoch
        self.num_samples = int(counts.sum())
        while lanes > 1 and self.num_samples < lanes * LANE_SAMPLES:
            lanes //= 2
        self.lanes = lanes
        self._order, self._windows = stream_key(seed, "lane-shards"), stream_key(seed, "lane-windows")
        shards = np.flatnonzero(counts)
        self._dealt = np.concatenate([shards[lane::lanes] for lane in range(lanes)])
        """The shards as they follow one another in the lanes."""
        self._ends = np.cumsum(counts[self._dealt])
        share = min(1.0, LIVE_SHARDS / len(shards))
        self._window = math.ceil(self.num_samples / lanes * share)
        """Samples of a lane that are shuffled at a time: all of them where there are few shards."""
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def locate(self, positions: Integers) -> Located:
        """positions: of the stream, int64 (n,), in any order."""
        epochs = self.epoch_of(positions)
        shards, indices = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            shards[here], indices[here] = self._epoch(int(epoch)).locate(positions[here])
        return shards, indices, epochs

    def shards_ahead(self, position: int, lanes: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
        """((positions until a window begins, a shard of it) of the windows that the given lanes are in and of the next
        ones, in the order in which these begin; the position at which the first of the windows ends)"""
        found: list[tuple[int, Integers]] = []
        ends = []
        for lane in sorted({lane % self.lanes for lane in lanes}):
            begin = position + (lane - position) % self.lanes
            for _ in range(2):
                shards, end = self._epoch(int(self.epoch_of(np.array(begin)))).window_at(begin)
                found.append((begin, shards))
                begin = end
                ends.append(end)
        first: dict[int, int] = {}
        for begin, shards in sorted(found, key=lambda window: window[0]):
            for shard in shards.tolist():
                first.setdefault(shard, max(0, begin - position))
        return [(wait, shard) for shard, wait in first.items()], min(ends)

    def epoch_of(self, positions: Integers) -> Integers:
        return (positions - self.position) // self.num_samples + self.epoch

    def _epoch(self, number: int) -> "_Epoch":
        if number not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
            self._epochs[number] = _Epoch(self, number)
        return self._epochs[number]


class _Epoch:
    """One epoch of a LaneOrder: its lanes, and the pieces of shards in the order in which they are read."""

    def __init__(self, order: LaneOrder, number: int) -> None:
        self.order, self.number, lanes = order, number, order.lanes
        self._windows = derive(derive(order._windows, number), np.arange(lanes))
        self.first = order.position + (number - order.epoch) * order.num_samples
        self.offsets = (np.arange(lanes) - self.first) % lanes
        """Of the first position of each lane, from the first of the epoch."""
        self.lengths = np.maximum(0, -(-(order.num_samples - self.offsets) // lanes))
        self.starts = np.cumsum(self.lengths) - self.lengths
        # Where a shard begins or a lane does, a piece does.
        shard_starts = order._ends - order.counts[order._dealt]
        begins = np.union1d(shard_starts, self.starts[self.lengths > 0])
        lane = np.searchsorted(self.starts + self.lengths, begins, side="right")
        dealt = np.searchsorted(order._ends, begins, side="right")
        length = np.diff(np.append(begins, order.num_samples))
        read = self._shuffle(lane)
        self.shards, self.firsts = order._dealt[dealt[read]], (begins - shard_starts[dealt])[read]
        self.ends = np.cumsum(length[read])
        self.begins = self.ends - length[read]

    def _shuffle(self, lane: Integers) -> Integers:
        """The numbers of the pieces, by lane, then in the order in which they are read."""
        count = np.bincount(lane, minlength=self.order.lanes)
        within = np.arange(len(lane)) - (np.cumsum(count) - count)[lane]
        # As many equal parts as a window has pieces, and one piece of each in turn, the parts always in one order: any
        # window holds one of each. Of one part, the lanes read at any time pieces that lie evenly in it.
        parts = max(1, LIVE_SHARDS // self.order.lanes)
        part = within * np.minimum(parts, count[lane]) // count[lane]
        group = lane * parts + part
        size = np.bincount(group)[group]
        place = np.arange(len(lane)) - np.searchsorted(group, group)
        key = derive(self.order._order, self.number)
        turn = (permute(place, size, derive(key, part)) + (lane * _GOLDEN_RATIO % 1.0 * size).astype(np.int64)) % size
        return np.lexsort((derive(key, -1 - group), turn, lane))

    def locate(self, positions: Integers) -> tuple[Integers, Integers]:
        """(shards, indices) of positions of this epoch."""
        lanes = positions % self.order.lanes
        index = (positions - self.first - self.offsets[lanes]) // self.order.lanes
        window, begin, end = self._window(lanes, index)
        stream = derive(self._windows[lanes], window)
        place = self.starts[lanes] + begin + permute(index - begin, end - begin, stream)
        piece = np.searchsorted(self.ends, place, side="right")
        return self.shards[piece], self.firsts[piece] + place - self.begins[piece]

    def window_at(self, position: int) -> tuple[Integers, int]:
        """(the shards of the window that `position` is in, the first position of its lane after that window)"""
        lane = np.array([position % self.order.lanes])
        index = (position - self.first - self.offsets[lane]) // self.order.lanes
        _, begin, end = (int(values[0]) for values in self._window(lane, index))
        start = int(self.starts[lane[0]])
        pieces = slice(
            int(np.searchsorted(self.ends, start + begin, side="right")),
            int(np.searchsorted(self.ends, start + end, side="left")) + 1,
        )
        return self.shards[pieces], position + (end - int(index[0])) * self.order.lanes

    def _window(self, lanes: Integers, index: Integers) -> tuple[Integers, Integers, Integers]:
        """(number, begin, end) of the window of each index in its lane. The lanes change theirs one after another; the
        first of a lane takes in what is left before its first full one, the last what is left after its last."""
        size, lengths = self.order._window, self.lengths[lanes]
        late = lanes * size // self.order.lanes
        last = np.maximum(1, (lengths + late) // size - 1)
        number = np.clip((index + late) // size, 1, last)
        begin = np.where(number == 1, 0, number * size - late)
        return number, begin, np.where(number == last, lengths, (number + 1) * size - late)
