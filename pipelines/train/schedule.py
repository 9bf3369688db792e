"""The learning rate, a function of the images seen: another batch size has the same schedule."""

import math

from ldm.config import RequestError
from pipelines.train.config import TrainConfig


def learning_rate(config: TrainConfig, images_seen: int) -> float:
    """Of the optimizer step that ends at `images_seen`: a linear warm-up, then constant, or half a cosine
    (arXiv 1608.03983, equation 5, without restarts) down to `learning_rate_end`."""
    if images_seen < config.warmup_images:
        return config.learning_rate * images_seen / config.warmup_images
    if config.learning_rate_schedule == "constant":
        return config.learning_rate
    assert config.learning_rate_images is not None
    share = (images_seen - config.warmup_images) / (config.learning_rate_images - config.warmup_images)
    left = (1 + math.cos(math.pi * min(1.0, share))) / 2
    return config.learning_rate_end + (config.learning_rate - config.learning_rate_end) * left


def check_schedule(config: TrainConfig) -> None:
    """Raises RequestError where the keys do not make one schedule."""
    end, images = config.learning_rate_end, config.learning_rate_images
    if config.learning_rate_schedule == "constant":
        for key, value, unused in (("learning_rate_images", images, None), ("learning_rate_end", end, 0)):
            if value != unused:
                raise RequestError(f"{key}={value}: is for learning_rate_schedule=cosine; leave it out")
        return
    if images is None:
        asked = config.max_steps * config.global_batch_size
        raise RequestError(
            f"learning_rate_images=null: a cosine schedule has an end; give learning_rate_images={asked} for this run"
        )
    if images <= config.warmup_images:
        raise RequestError(f"learning_rate_images={images}: give more than warmup_images={config.warmup_images}")
    if end > config.learning_rate:
        raise RequestError(f"learning_rate_end={end}: give at most learning_rate={config.learning_rate}")
