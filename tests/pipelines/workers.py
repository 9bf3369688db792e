"""A training worker on two gloo ranks, without Ray, and a tracker that keeps what it logs."""

import time
from pathlib import Path
from typing import Any

import torch

from ldm.config import parse
from ldm.latents.dataset import LatentDataset
from pipelines.tracking import Tracker
from pipelines.train import TrainConfig
from pipelines.train.loop import Worker
from pipelines.train.start_times import StartTimes

WORLD = 2


def config(latents: str, output: Path | str, **changes: Any) -> TrainConfig:
    values = {
        "latents": latents,
        "output": str(output),
        "tracking": {"enabled": False},
        "max_steps": 4,
        "checkpoint_every": 4,
        "log_every": 2,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "num_workers": WORLD,
        "learning_rate": 1e-2,
        "holdout": 0.2,
        "device": "cpu",
        "validation": {"grid": 3, "num_inference_steps": 2},
        "denoiser": {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 1},
    }
    return parse(TrainConfig, [("test", values), ("changes", changes)])


class Notebook(Tracker):
    """Keeps what is logged."""

    def __init__(self, settings: TrainConfig) -> None:
        super().__init__(settings.tracking, "train/test")
        self.points: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[str, int, Any]] = []

    def log(self, metrics: dict[str, float], images_seen: int) -> None:
        self.points.append((images_seen, dict(metrics)))

    def grid(self, key: str, pixels: Any, images_seen: int) -> None:
        self.images.append((key, images_seen, pixels))


def worker(settings: TrainConfig, notebook: Notebook) -> Worker:
    dataset = LatentDataset(settings.latents_urls, global_batch_size=8)
    generations = [manifest.generation for manifest in dataset.manifests]
    return Worker(settings, generations, {}, notebook, None, StartTimes(time.time()))


def masters(run: Worker) -> list[torch.Tensor]:
    return [held.master.clone() for held in run.engine.state.held]
