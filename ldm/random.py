"""Counter-based random numbers: what is drawn depends on what it is for, never on who draws it.

The generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), checked
against the Random123 test vectors. The key is (seed, purpose); the counter is (block, epoch or step, id, 0), so that
the noise of a sample is the same on any rank, in any batch, in any order.

Integers are the same everywhere. Gaussians come from Box-Muller in float32 built of +, -, *, / and sqrt alone, which
IEEE 754 rounds correctly: their bits do not depend on vector width, thread count or batch position, nor should they
on the device (library logarithms and cosines promise none of this).
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

Key = tuple[int, int]
Words = tuple[Tensor, Tensor, Tensor, Tensor]

_MASK = 0xFFFFFFFF
_SIGN = -0x80000000
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10

_NUMPY_FROM = 64
"""32-bit words for each id from which NumPy's generator, which starts anew for each id, beats the vectorised rounds."""
_AT_ONCE = 1 << 16
"""Gaussians in work at a time on a CPU: their intermediate values stay in its cache."""


def key(seed: int, purpose: str) -> Key:
    """The two 64-bit key words of a stream: a hash, so that purposes and seeds never overlap."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def philox(counter: Words, key: Key) -> Tensor:
    """Philox4x64-10. counter: four int64 tensors (...) => int64 (..., 4). The bits are those of uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ _signed(k0), low1, high0 ^ c3 ^ _signed(k1), low0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def words(key: Key, ids: Tensor, counter: int | Tensor, count: int) -> Tensor:
    """`count` uniform 32-bit words for each id: the halves of Philox's, the lower first; blocks count from 1.

    ids: int64 (N,); counter: an int or (N,) => int32 (N, count). The bits are those of uint32.
    """
    steps = torch.as_tensor(counter, device=ids.device).expand_as(ids)
    if ids.device.type == "cpu" and count >= _NUMPY_FROM:
        return _numpy_words(key, ids, steps, count)
    blocks = torch.arange(1, (count + 7) // 8 + 1, device=ids.device)  # (B,)
    ids, steps = ids[:, None], steps[:, None]  # (N, 1)
    # (N, B, 4) of 64 bits => (N, B * 8) of 32
    return philox((blocks, steps, ids, torch.zeros_like(blocks)), key).flatten(1).view(torch.int32)[:, :count]


def uniform_integers(seed: int, purpose: str, ids: Tensor, counter: int | Tensor, high: int) -> Tensor:
    """(N,) integers in [0, high), high < 2^31; the bias of the multiply-shift is below high / 2^32."""
    return ((words(key(seed, purpose), ids, counter, 1)[:, 0].long() & _MASK) * high) >> 32


def uniform(seed: int, purpose: str, ids: Tensor, counter: int | Tensor) -> Tensor:
    """(N,) float64 in [0, 1)."""
    return (words(key(seed, purpose), ids, counter, 1)[:, 0].long() & _MASK).double() * 2.0**-32


def normal(seed: int, purpose: str, ids: Tensor, counter: int | Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard Gaussians. ids: int64 (N,); counter: an int or (N,) => float32 (N, *shape)."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    stream, steps = key(seed, purpose), torch.as_tensor(counter, device=ids.device).expand_as(ids)
    found = torch.empty(len(ids), pairs, 2, device=ids.device)
    rows = max(1, _AT_ONCE // max(count, 1)) if ids.device.type == "cpu" else max(len(ids), 1)
    for first in range(0, len(ids), rows):
        part = slice(first, first + rows)
        drawn = words(stream, ids[part], steps[part], 2 * pairs).view(-1, pairs, 2)
        radius = _radius(drawn[..., 0])
        cosine, sine = _direction(drawn[..., 1])
        torch.mul(radius, cosine, out=found[part, :, 0])
        torch.mul(radius, sine, out=found[part, :, 1])
    return found.flatten(1)[:, :count].reshape(len(ids), *shape)


def _numpy_words(key: Key, ids: Tensor, steps: Tensor, count: int) -> Tensor:
    """The same words from NumPy's generator, which is compiled."""
    generator = np.random.Philox(key=np.array(key, np.uint64))
    state = generator.state
    found = np.empty((len(ids), (count + 1) // 2), np.uint64)
    # It counts one up before each block, so that it stands at block 0 here.
    counters = np.zeros((len(ids), 4), np.uint64)
    counters[:, 1], counters[:, 2] = steps.numpy().view(np.uint64), ids.numpy().view(np.uint64)
    for row, start in zip(found, counters, strict=True):
        state["state"]["counter"] = start
        generator.state = state
        row[:] = generator.random_raw(len(row))
    return torch.from_numpy(found.view(np.int32))[:, :count]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 64 bits of a * b, all of them unsigned, in signed arithmetic that wraps."""
    a_high, a_low = (a >> 32) & _MASK, a & _MASK
    b_high, b_low = b >> 32, b & _MASK
    low, cross, other = a_low * b_low, a_low * b_high, a_high * b_low
    carry = ((low >> 32) & _MASK) + (cross & _MASK) + (other & _MASK)
    high = a_high * b_high + ((cross >> 32) & _MASK) + ((other >> 32) & _MASK) + (carry >> 32)
    return high, a * _signed(b)


def _signed(value: int) -> int:
    """The int64 with the lower 64 bits of `value`."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 log u), u in (0, 1] from the lower 31 bits of an int32: float32, at most 6.56."""
    uniform = ((word & 0x7FFFFFFF).float() + 1.0) * 2.0**-31
    return (_log(uniform) * -2.0).sqrt()


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of a normal float32 in (0, 1], from exactly rounded operations."""
    # x = m 2^e with m in [sqrt(1/2), sqrt(2)): the bits of sqrt(1/2) are where the exponent begins to count.
    bits = x.view(torch.int32) - 0x3F3504F3
    exponent = (bits >> 23).float()
    mantissa = ((bits & 0x7FFFFF) + 0x3F3504F3).view(torch.float32)
    # log(m) = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.1716: five odd terms reach float32
    s = (mantissa - 1.0).div_(mantissa + 1.0)
    square = s * s
    series = square * (1.0 / 9)
    for k in (7, 5, 3):
        series.add_(1.0 / k).mul_(square)
    return exponent.mul_(math.log(2.0)).add_(series.add_(1.0).mul_(s).mul_(2.0))


def _direction(word: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of an angle that an int32 names: its upper two bits the quadrant, the others the place in it."""
    x = (word << 2).float().mul_(math.pi * 2.0**-33)  # in [-pi/4, pi/4]
    square = x * x
    sine = square * (1.0 / math.factorial(9))
    for k in (7, 5, 3):
        sine.add_((-1) ** (k // 2) / math.factorial(k)).mul_(square)
    sine.add_(1.0).mul_(x)
    cosine = square * (-1.0 / math.factorial(10))
    for k in (8, 6, 4, 2):
        cosine.add_((-1) ** (k // 2) / math.factorial(k)).mul_(square)
    cosine.add_(1.0)
    # Quarter turns: (c, s), (-s, c), (-c, -s), (s, -c), by the bits of the floats.
    odd, upper, lower = (word << 1) >> 31, word & _SIGN, (word << 1) & _SIGN
    cosine_bits, sine_bits = cosine.view(torch.int32), sine.view(torch.int32)
    exchange = (cosine_bits ^ sine_bits) & odd
    return (
        (cosine_bits ^ exchange ^ upper ^ lower).view(torch.float32),
        (sine_bits ^ exchange ^ upper).view(torch.float32),
    )
