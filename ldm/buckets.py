"""The batch shapes of a `StepEngine`, and how long a call takes in each: measured, for no two machines agree."""

import time

import torch

from ldm.drawing import PictureSampler

LARGEST = 64
"""Rows at most, where nobody says."""
NEARLY = 0.95
"""A batch with this share of the fastest one's rows a second will do: a smaller one answers sooner."""


def measure_buckets(sampler: PictureSampler, largest: int | None = None) -> dict[int, float]:
    """Rows => seconds of a call of the denoiser: 1, 2, 4, … and `largest`.

    Without `largest` it ends where larger ones are no faster, or do not fit. The first call in each shape compiles what
    is compiled; the faster one of two after it counts.
    """
    sizes = [2**i for i in range(LARGEST.bit_length()) if 2**i < (largest or 2 * LARGEST)] + [largest] * (
        largest is not None
    )
    seconds: dict[int, float] = {}
    for size in sizes:
        try:
            seconds[size] = _seconds(sampler, size)
        except torch.OutOfMemoryError:
            if largest is not None or not seconds:
                raise
            break
        best = max(rows / s for rows, s in seconds.items())
        if largest is None and size / seconds[size] < NEARLY * best:
            break
    if largest is None:
        best = max(rows / s for rows, s in seconds.items())
        enough = next(rows for rows, s in seconds.items() if rows / s >= NEARLY * best)
        seconds = {rows: s for rows, s in seconds.items() if rows <= max(enough, 2)}  # 2: guidance
    return seconds


@torch.no_grad()
def _seconds(sampler: PictureSampler, rows: int) -> float:
    x = torch.zeros(rows, *sampler.latent_shape, device=sampler.device)
    t = torch.zeros(rows, dtype=torch.float32 if sampler.diffusion.is_flow else torch.int64, device=sampler.device)
    labels = None
    if sampler.conditioning.type == "class":
        labels = torch.zeros(rows, dtype=torch.int64, device=sampler.device)
    tries = []
    for _ in range(3):
        began = time.perf_counter()
        sampler.denoise(x, t, labels)
        if sampler.device.type == "cuda":
            torch.cuda.synchronize(sampler.device)
        tries.append(time.perf_counter() - began)
    return min(tries[1:])
