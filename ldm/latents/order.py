"""The order of samples: a pure function of (seed, epoch, number of samples), computed and never stored.

A permutation of N is a balanced Feistel network over the next power of four, walked along its cycle until it falls
below N (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002). Any position costs the same, in any epoch.
"""

import numpy as np
import numpy.typing as npt

from ldm.random import key

_ROUNDS = 6
Integers = npt.NDArray[np.int64]


def permute(positions: Integers, count: int, seed: int, epoch: int) -> Integers:
    """Positions within an epoch => sample numbers. int64 (n,) in [0, count) => int64 (n,) in [0, count)."""
    bits = max(1, ((count - 1).bit_length() + 1) // 2)  # of each half: the domain is 4^bits < 4 count
    round_keys = [np.uint64(key(seed, f"order/{epoch}/{r}")[0]) for r in range(_ROUNDS)]
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], bits, round_keys)
        outside = values >= np.uint64(count)
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], bits: int, round_keys: list[np.uint64]) -> npt.NDArray[np.uint64]:
    shift, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ (round_key << np.uint64(32))) & mask)
    return (left << shift) | right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
