"""What a replica tells of itself and of a request, as plain values; of a request batches of

{"type": "taken", "model", "step", "labels", "seeds", "calls"}    the first one, or
{"type": "refused", "status", "detail", "retry_after"}            the only one
{"type": "progress", "steps_done", "images_done"}
{"type": "preview", "index", "steps_done", "data"}                data: bytes of a PNG
{"type": "picture", "index", "data"}                              of a PNG with its provenance, or of a .npy
{"type": "done"}, or {"type": "failed", "status", "detail"}       the last one
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ldm import images
from ldm.job import Drawn, Event, Job, Preview, Progress
from ldm.provenance import make_provenance, to_text
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


@dataclass(frozen=True)
class Taken:
    """A request that is drawn. model: its name. settings: what its pictures depend on, JSON values."""

    model: str
    snapshot: Snapshot
    job: Job
    settings: Mapping[str, Any]

    def event(self) -> dict[str, Any]:
        """The first one."""
        labels = self.job.labels
        return {
            "type": "taken",
            "model": self.model,
            "step": self.snapshot.step,
            "labels": None if labels is None else labels.tolist(),
            "seeds": self.job.seeds.tolist(),
            "calls": self.job.steps,
        }

    def encode(self, events: Sequence[Event], npy: bool) -> list[dict[str, Any]]:
        """Those of the engine: pictures as PNGs, or as .npy."""
        told: list[dict[str, Any]] = []
        for event in events:
            if isinstance(event, Progress):
                told.append({"type": "progress", "steps_done": event.steps_done, "images_done": event.images_done})
            elif isinstance(event, Preview):
                data = images.to_png(event.pixels.numpy())
                told.append({"type": "preview", "index": event.index, "steps_done": event.steps_done, "data": data})
            elif isinstance(event, Drawn):
                data = _to_npy(event.pixels) if npy else self._to_png(event)
                told.append({"type": "picture", "index": event.index, "data": data})
            elif event.problem is None:
                told.append({"type": "done"})
            else:
                told.append({"type": "failed", "status": 504 if event.late else 500, "detail": event.problem})
        return told

    def _to_png(self, drawn: Drawn) -> bytes:
        """With its provenance."""
        seed = int(self.job.seeds[drawn.index])
        label = None if self.job.labels is None else int(self.job.labels[drawn.index])
        about = make_provenance(self.snapshot, self.settings, seed, label)
        return images.to_png(drawn.pixels.numpy(), to_text(about))


def _to_npy(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels.numpy(), allow_pickle=False)
    return buffer.getvalue()
