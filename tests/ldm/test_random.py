"""The generator against its published vectors, and the Gaussians against their definition."""

import math

import mpmath
import numpy as np
import pytest
import torch

from ldm import random

VECTORS = [  # Random123, kat_vectors: philox4x64 10
    (
        "0000000000000000 0000000000000000 0000000000000000 0000000000000000",
        "0000000000000000 0000000000000000",
        "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b",
    ),
    (
        "ffffffffffffffff ffffffffffffffff ffffffffffffffff ffffffffffffffff",
        "ffffffffffffffff ffffffffffffffff",
        "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
    ),
    (
        "243f6a8885a308d3 13198a2e03707344 a4093822299f31d0 082efa98ec4e6c89",
        "452821e638d01377 be5466cf34e90c6c",
        "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
    ),
]


def signed(value: int) -> int:
    """The int64 with the bits of an uint64."""
    return value - 2**64 if value >= 2**63 else value


def block(values: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox of one counter, as unsigned integers."""
    found = random.philox(tuple(torch.tensor([signed(v)]) for v in values), key)
    return [word % 2**64 for word in found[0].tolist()]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_against_the_vectors_of_random123(counter, key, expected):
    k0, k1 = (int(word, 16) for word in key.split())
    found = block(tuple(int(word, 16) for word in counter.split()), (k0, k1))
    assert found == [int(word, 16) for word in expected.split()]


KEY = (0x452821E638D01377, 0xBE5466CF34E90C6C)


def test_words_put_block_counter_and_id_where_they_say():
    identity, counter = (0x243F6A8885A308D3, 0x13198A2E)
    found = random.words(KEY, torch.tensor([identity]), counter, 11)[0].tolist()
    halves = [half for b in (1, 2) for word in block((b, counter, identity, 0), KEY) for half in (word, word >> 32)]
    assert [word % 2**32 for word in found] == [half % 2**32 for half in halves][:11]
    per_id = random.words(KEY, torch.tensor([identity, identity]), torch.tensor([counter, counter + 1]), 11)
    assert per_id[0].tolist() == found and per_id[1].tolist() != found


def test_the_compiled_words_are_the_vectorised_ones(monkeypatch):
    ids, steps = torch.tensor([5, -7, 0, -1, 2**62, -(2**63)]), torch.tensor([3, 0, 9, 2**40, 1, 0])
    compiled = random.words(KEY, ids, steps, 201)
    monkeypatch.setattr(random, "_NUMPY_FROM", 10**9)
    assert torch.equal(random.words(KEY, ids, steps, 201), compiled)


def test_negative_and_large_ids_are_streams_of_their_own():
    ids = torch.tensor([-1, 0, 1, 2**32, 2**62, -(2**63)])
    found = random.words((1, 2), ids, 0, 4)
    assert found.dtype == torch.int32 and len({tuple(row) for row in found.tolist()}) == len(ids)


def test_keys_of_seeds_and_purposes_never_meet():
    keys = {random.key(seed, purpose) for seed in range(-3, 300) for purpose in ("a", "b", "1/a", "/a")}
    assert len(keys) == 303 * 4
    assert random.key(0, "posterior") == random.key(0, "posterior")


def test_a_gaussian_depends_on_its_id_alone():
    ids = torch.randint(0, 2**62, (41,), generator=torch.Generator().manual_seed(0))
    epochs = torch.arange(41) % 3
    shape = (3, 5, 7)  # an odd count: the last of a pair is dropped
    whole = random.normal(7, "posterior", ids, epochs, shape)
    for size in (1, 2, 16):
        parts = [
            random.normal(7, "posterior", ids[i : i + size], epochs[i : i + size], shape)
            for i in range(0, len(ids), size)
        ]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(1))
    assert torch.equal(random.normal(7, "posterior", ids[order], epochs[order], shape), whole[order])
    # A longer draw begins with the shorter one.
    assert torch.equal(random.normal(7, "posterior", ids, epochs, (200,))[:, :105], whole.flatten(1))


def test_gaussians_do_not_depend_on_the_number_of_threads():
    ids, before = torch.arange(64), torch.get_num_threads()
    draws = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            draws.append(random.normal(0, "x", ids, 0, (4, 32, 32)))  # large enough to be split over threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*draws)


def test_seed_purpose_counter_and_id_each_change_the_draw():
    ids = torch.tensor([5])
    draws = [
        random.normal(*args, (8,))
        for args in ((0, "a", ids, 0), (1, "a", ids, 0), (0, "b", ids, 0), (0, "a", ids, 1), (0, "a", ids + 1, 0))
    ]
    assert len({tuple(draw[0].tolist()) for draw in draws}) == len(draws)


def test_gaussians_are_standard_normal():
    draws = random.normal(0, "moments", torch.arange(1000), 0, (1000,)).double()
    values = draws.flatten()
    count = len(values)
    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((values**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / count)
    # Kolmogorov-Smirnov: sqrt(n) D stays below 1.95 with probability 0.999.
    ordered = values.sort().values
    cdf = torch.special.ndtr(ordered)
    steps = torch.arange(count + 1) / count
    distance = torch.maximum((cdf - steps[:-1]).abs().max(), (cdf - steps[1:]).abs().max())
    assert distance * math.sqrt(count) < 1.95
    # Neighbours in a draw (the two of a Box-Muller pair) and neighbouring ids are uncorrelated.
    for a, b in ((draws[:, 0::2], draws[:, 1::2]), (draws[:-1], draws[1:])):
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())


def test_extreme_words_give_finite_gaussians():
    corners = [0, 1, 2**30, 2**31 - 1, -1, -(2**31), 2**29]
    radius = random._radius(torch.tensor(corners, dtype=torch.int32))
    cosine, sine = random._direction(torch.tensor(corners, dtype=torch.int32))
    assert all(values.isfinite().all() for values in (radius, cosine, sine))
    assert radius.min() == 0 and radius.max() == pytest.approx(math.sqrt(2 * 31 * math.log(2)))  # u in [2^-31, 1]


def test_logarithm_against_mpmath():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [
            torch.rand(3000, generator=generator).clamp(min=2.0**-31),
            2.0 ** -torch.arange(32),
            1 - 2.0 ** -torch.arange(1, 24),
            math.sqrt(0.5) * (1 + torch.arange(-50, 50) * 6e-8),
        ]
    )
    with mpmath.workdps(40):
        errors = [
            abs(mpmath.mpf(found) - mpmath.log(value)) / abs(mpmath.log(value)) if value != 1 else abs(found)
            for value, found in zip(x.tolist(), random._log(x).tolist(), strict=True)
        ]
    assert float(max(errors)) < 3e-7


def test_directions_against_mpmath():
    corners = [q * 2**30 + offset for q in range(-2, 2) for offset in (0, 1, 2**29 - 1, 2**29, 2**30 - 1)]
    drawn = torch.randint(-(2**31), 2**31, (3000,), generator=torch.Generator().manual_seed(0))
    words = torch.cat([drawn, torch.tensor(corners)]).int()
    cosine, sine = random._direction(words)
    with mpmath.workdps(40):
        worst = 0.0
        for word, c, s in zip(words.tolist(), cosine.tolist(), sine.tolist(), strict=True):
            place = (word % 2**30 + 2**29) % 2**30 - 2**29  # the lower 30 bits, signed
            angle = mpmath.pi / 2 * ((word >> 30) % 4) + mpmath.pi / 2 * mpmath.mpf(place) / 2**30
            worst = max(worst, float(abs(mpmath.cos(angle) - c)), float(abs(mpmath.sin(angle) - s)))
    assert worst < 2e-7


@pytest.mark.parametrize("high", [1, 2, 3, 1000, 2**31 - 1])
def test_uniform_integers_fill_their_range(high):
    found = random.uniform_integers(3, "t", torch.arange(20_000), 0, high)
    assert found.dtype == torch.int64 and found.min() >= 0 and found.max() < high
    if high <= 3:
        counts = torch.bincount(found, minlength=high) / len(found)
        assert torch.allclose(counts, torch.full((high,), 1 / high), atol=0.02)
    else:
        assert float(found.double().mean()) == pytest.approx(high / 2, rel=0.03)


def test_uniforms_lie_in_zero_to_one_and_fill_it():
    found = random.uniform(3, "u", torch.arange(50_000), 0)
    assert found.dtype == torch.float64 and found.min() >= 0 and found.max() < 1
    histogram, _ = np.histogram(found.numpy(), bins=20, range=(0, 1))
    chi_square = ((histogram - 2500) ** 2 / 2500).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, 0.1%


def test_integers_uniforms_and_words_are_one_stream():
    ids = torch.arange(100)
    word = random.words(random.key(3, "t"), ids, 5, 1)[:, 0].long() % 2**32
    assert torch.equal(random.uniform(3, "t", ids, 5), word.double() / 2**32)
    assert torch.equal(random.uniform_integers(3, "t", ids, 5, 1000), word * 1000 // 2**32)
