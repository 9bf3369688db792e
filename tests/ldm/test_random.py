"""The generator against its published vectors, and the Gaussians against their definition."""

import math

import mpmath
import numpy as np
import pytest
import torch

from ldm import random

VECTORS = [  # Random123, kat_vectors: philox4x32 10
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_against_the_vectors_of_random123(counter, key, expected):
    words = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    found = random.philox(words, (k0, k1))
    assert found.tolist() == [[int(word, 16) for word in expected.split()]]


def test_words_put_block_counter_and_id_where_they_say():
    identity, counter = (0x0370734413198A2E, 0x85A308D3)
    key = (0xA4093822, 0x299F31D0)
    found = random.words(key, torch.tensor([identity]), counter, 6)
    for block in range(2):
        parts = (block, counter, 0x13198A2E, 0x03707344)
        expected = random.philox(tuple(torch.tensor([p]) for p in parts), key)[0].tolist()
        assert found[0, 4 * block : 4 * block + 4].tolist() == expected[: 6 - 4 * block]
    per_id = random.words(key, torch.tensor([identity, identity]), torch.tensor([counter, counter + 1]), 6)
    assert torch.equal(per_id[0], found[0]) and not torch.equal(per_id[1], found[0])


def test_negative_and_large_ids_are_streams_of_their_own():
    ids = torch.tensor([-1, 0, 1, 2**32, 2**62, -(2**63)])
    found = random.words((1, 2), ids, 0, 4)
    assert found.min() >= 0 and found.max() < 2**32
    assert len({tuple(row) for row in found.tolist()}) == len(ids)


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


def test_extreme_words_give_finite_gaussians(monkeypatch):
    corners = torch.tensor([[a, b] for a in (0, 1, 2**31, 2**32 - 1) for b in (0, 2**29, 2**31, 2**32 - 1)])
    monkeypatch.setattr(random, "words", lambda *_: corners)
    found = random.normal(0, "x", torch.zeros(len(corners)), 0, (2,))
    assert found.isfinite().all()
    assert found.abs().max() == pytest.approx(math.sqrt(2 * 32 * math.log(2)))  # the smallest u is 2^-32


def test_logarithm_against_mpmath():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [
            torch.rand(3000, dtype=torch.float64, generator=generator),
            2.0 ** -torch.arange(33, dtype=torch.float64),
            1 - 2.0 ** -torch.arange(1, 33, dtype=torch.float64),
            (math.sqrt(0.5) * (1 + torch.arange(-50, 50, dtype=torch.float64) * 1e-15)),
        ]
    )
    x = x[x > 0]
    with mpmath.workdps(40):
        errors = [
            abs(mpmath.mpf(found) - mpmath.log(value)) / abs(mpmath.log(value)) if value != 1 else abs(found)
            for value, found in zip(x.tolist(), random._log(x).tolist(), strict=True)
        ]
    assert float(max(errors)) < 1e-15


def test_sine_and_cosine_against_mpmath():
    turns = torch.cat(
        [
            torch.rand(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
            torch.arange(64, dtype=torch.float64) / 64,
            torch.tensor([1 - 2.0**-32, 0.125 - 2.0**-32, 0.125 + 2.0**-32]),
        ]
    )
    sine, cosine = random._sine_cosine_of_turns(turns)
    with mpmath.workdps(40):
        angles = [2 * mpmath.pi * mpmath.mpf(t) for t in turns.tolist()]
        sine_error = max(abs(mpmath.sin(a) - s) for a, s in zip(angles, sine.tolist(), strict=True))
        cosine_error = max(abs(mpmath.cos(a) - c) for a, c in zip(angles, cosine.tolist(), strict=True))
    assert float(max(sine_error, cosine_error)) < 1e-15


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
    word = random.words(random.key(3, "t"), ids, 5, 1)[:, 0]
    assert torch.equal(random.uniform(3, "t", ids, 5), word.double() / 2**32)
    assert torch.equal(random.uniform_integers(3, "t", ids, 5, 1000), word * 1000 // 2**32)
