"""What an encode would take: measured on this machine, for all pictures."""

import os
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch

from ldm.autoencoder import Autoencoder
from ldm.decoding import Decoded, DecoderPool
from ldm.images import PictureRules
from ldm.inspection.config import InspectConfig
from ldm.latents.writer import estimate_bytes

_MEASURE_S = 10.0
_DECODE_LIMIT_S = 60.0


@dataclass(frozen=True)
class Forecast:
    """images_per_second: decoded and encoded by this machine, `device` says what computed. hours: of num_workers such
    machines. output_bytes: of the latents. price: of the whole, None without a price."""

    images_per_second: float
    device: str
    num_workers: int
    hours: float
    output_bytes: int
    price: float | None


def forecast(config: InspectConfig, autoencoder: Autoencoder, kept: list[bytes], pictures: int) -> Forecast:
    """kept: some encoded pictures, at least one. pictures: how many there are to encode."""
    rate = measure(autoencoder, kept, config.image_size, config.batch_size)
    hours = pictures / (rate * config.num_workers) / 3600
    parts = 2 if config.store == "moments" and not autoencoder.deterministic else 1
    cells = (config.image_size // autoencoder.factor) ** 2
    return Forecast(
        images_per_second=round(rate, 2),
        device=str(autoencoder.device),
        num_workers=config.num_workers,
        hours=round(hours, 4),
        output_bytes=pictures * estimate_bytes(parts * autoencoder.latent_channels, cells),
        price=None if config.price_per_hour is None else round(hours * config.price_per_hour, 2),
    )


def measure(autoencoder: Autoencoder, kept: list[bytes], image_size: int, batch_size: int) -> float:
    """Pictures decoded and encoded in a second; the start of the processes and of the autoencoder is not counted."""
    processes = len(os.sched_getaffinity(0))
    with DecoderPool(processes, PictureRules((image_size,)), _DECODE_LIMIT_S) as decoders:
        for future in [decoders.submit(kept[0]) for _ in range(2 * processes)]:
            future.result()
        first = batch_size if autoencoder.device.type == "cuda" else 1
        autoencoder.encode(torch.zeros(first, 3, image_size, image_size, dtype=torch.uint8))
        pictures, done = cycle(kept), 0
        started = time.perf_counter()
        waiting: deque[Future[Decoded]] = deque(decoders.submit(data) for data in islice(pictures, 2 * batch_size))
        while done == 0 or time.perf_counter() - started < _MEASURE_S:
            views = [waiting.popleft().result()[0][0].pixels for _ in range(batch_size)]
            waiting.extend(decoders.submit(data) for data in islice(pictures, batch_size))
            # .cpu(): on a GPU the calls only hand over work.
            autoencoder.encode(torch.from_numpy(np.stack(views))).half().cpu()
            done += batch_size
        return done / (time.perf_counter() - started)
