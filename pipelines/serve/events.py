"""What a replica tells of itself and of a request, as plain values; of a request batches of

{"type": "taken", "model", "step", "labels", "seeds", "calls"}    the first one, or
{"type": "refused", "status", "detail", "retry_after"}            the only one
{"type": "progress", "steps_done", "images_done"}
{"type": "preview", "index", "steps_done", "data"}                data: bytes of a PNG
{"type": "picture", "index", "data"}                              of a PNG, or of a .npy
{"type": "done"}, or {"type": "failed", "status", "detail"}       the last one
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ldm import images
from ldm.job import Drawn, Event, Preview, Progress
from ldm.snapshot import Snapshot


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """What a model is and can be asked for, in /v1/models."""
    height, width = snapshot.picture_shape()
    flow = snapshot.diffusion_config.is_flow
    return {
        "snapshot": snapshot.url,
        "step": snapshot.step,
        "images_seen": snapshot.images_seen,
        "weights_sha256": snapshot.weights_sha256,
        "image_size": height if height == width else [height, width],
        "num_classes": snapshot.conditioning.num_classes,
        "classes": list(snapshot.conditioning.names),
        "num_train_timesteps": snapshot.diffusion_config.num_train_timesteps,
        "flow": flow,
        "samplers": ["euler", "heun"] if flow else ["ddim", "ddpm", "dpmpp_2m"],
        "guidance": snapshot.conditioning.type == "class" and snapshot.denoiser.get("label_dropout") != 0,
    }


def encode(events: Sequence[Event], npy: bool) -> list[dict[str, Any]]:
    """Events as plain values: pictures as PNGs, or as .npy."""
    told: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, Progress):
            told.append({"type": "progress", "steps_done": event.steps_done, "images_done": event.images_done})
        elif isinstance(event, Preview):
            data = images.to_png(event.pixels.numpy())
            told.append({"type": "preview", "index": event.index, "steps_done": event.steps_done, "data": data})
        elif isinstance(event, Drawn):
            data = _to_npy(event.pixels) if npy else images.to_png(event.pixels.numpy())
            told.append({"type": "picture", "index": event.index, "data": data})
        elif event.problem is None:
            told.append({"type": "done"})
        else:
            told.append({"type": "failed", "status": 504 if event.late else 500, "detail": event.problem})
    return told


def _to_npy(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels.numpy(), allow_pickle=False)
    return buffer.getvalue()
