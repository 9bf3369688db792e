"""Counter-based random numbers: what is drawn depends on what it is for, never on who draws it.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), checked
against the Random123 test vectors. The key is (seed, purpose); the counter is (block, epoch or step, id), so that
the noise of a sample is the same on any rank, in any batch, in any order.

Integers are the same everywhere. Gaussians come from Box-Muller in float64 built of +, -, *, / and sqrt alone,
which IEEE 754 rounds correctly: their bits do not depend on vector width, thread count or batch position, nor should
they on the device (library logarithms and cosines promise none of this).
"""

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def key(seed: int, purpose: str) -> tuple[int, int]:
    """The two 32-bit key words of a stream: a hash, so that purposes and seeds never overlap."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Philox4x32-10. counter: four int64 tensors (...) of uint32 values => (..., 4) of uint32 values in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit product wraps to a signed number; the shift and the mask still give its exact halves.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & _MASK, (p1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _MASK, high0 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def words(key: tuple[int, int], ids: Tensor, counter: int | Tensor, count: int) -> Tensor:
    """`count` uniform uint32 values for each id. ids: int64 (N,); counter: an int or (N,) => int64 (N, count)."""
    blocks = torch.arange((count + 3) // 4, device=ids.device)  # (B,)
    step = torch.as_tensor(counter, device=ids.device).expand_as(ids)
    ids, step = ids[:, None], step[:, None]  # (N, 1)
    # (N, B, 4) => (N, B * 4)
    return philox((blocks, step & _MASK, ids & _MASK, (ids >> 32) & _MASK), key).flatten(1)[:, :count]


def uniform_integers(seed: int, purpose: str, ids: Tensor, counter: int | Tensor, high: int) -> Tensor:
    """(N,) integers in [0, high), high < 2^31; the bias of the multiply-shift is below high / 2^32."""
    return (words(key(seed, purpose), ids, counter, 1)[:, 0] * high) >> 32


def uniform(seed: int, purpose: str, ids: Tensor, counter: int | Tensor) -> Tensor:
    """(N,) float64 in [0, 1)."""
    return words(key(seed, purpose), ids, counter, 1)[:, 0].double() * 2.0**-32


def normal(seed: int, purpose: str, ids: Tensor, counter: int | Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard Gaussians. ids: int64 (N,); counter: an int or (N,) => float32 (N, *shape)."""
    count = math.prod(shape)
    uniforms = words(key(seed, purpose), ids, counter, count + count % 2).double()
    radius_word, angle_word = uniforms[:, 0::2], uniforms[:, 1::2]
    radius = (-2.0 * _log((radius_word + 1.0) * 2.0**-32)).sqrt()  # u in (0, 1]
    sine, cosine = _sine_cosine_of_turns(angle_word * 2.0**-32)
    pairs = torch.stack((radius * cosine, radius * sine), dim=-1).flatten(1)  # (N, count or count + 1)
    return pairs[:, :count].float().reshape(len(ids), *shape)


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of float64 in (0, 1], within 2e-16 relative, from exactly rounded operations."""
    mantissa, exponent = torch.frexp(x)  # mantissa in [0.5, 1)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2.0, mantissa)
    exponent = torch.where(small, exponent - 1, exponent).double()
    # log(m) = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.1716: eleven odd terms reach float64
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = torch.full_like(s, 1.0 / 21)
    for k in range(19, 0, -2):
        series = series * square + 1.0 / k
    return exponent * math.log(2.0) + 2.0 * s * series


def _sine_cosine_of_turns(turns: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos of 2 pi turns, turns in [0, 1): Taylor series on an eighth of a turn, then the quadrant."""
    quadrant = torch.floor(turns * 4.0 + 0.5)
    x = (turns - quadrant * 0.25) * (2.0 * math.pi)  # in [-pi/4, pi/4]
    square = x * x
    sine, cosine = torch.full_like(x, 1.0 / math.factorial(17)), torch.full_like(x, 1.0 / math.factorial(16))
    for k in range(15, 0, -2):
        sine = sine * -square + 1.0 / math.factorial(k)
        cosine = cosine * -square + 1.0 / math.factorial(k - 1)
    sine = sine * x
    quadrant = quadrant.long() % 4
    swapped = quadrant % 2 == 1
    sine, cosine = torch.where(swapped, cosine, sine), torch.where(swapped, sine, cosine)
    return torch.where(quadrant >= 2, -sine, sine), torch.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
