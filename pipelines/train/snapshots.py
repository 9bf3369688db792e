"""The snapshots of a run: each made of a committed checkpoint, one process at a time; which of them stay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ldm import storage
from ldm.latents.dataset import LatentDataset
from ldm.snapshot import Snapshot, read_snapshot, write_snapshot
from pipelines.train.checkpoint import read_full
from pipelines.train.config import TrainConfig
from pipelines.train.record import best_steps, validations

PROFILE = "main"
"""The average that a snapshot holds."""
_NAME = re.compile(r"step-(\d{10,})")


def snapshot_url(output: str, step: int) -> str:
    """Where the snapshot of an optimizer step lies."""
    return storage.join(output, "snapshots", f"step-{step:010d}")


def is_there(output: str, step: int) -> bool:
    """Whether the snapshot of this step is whole."""
    return storage.exists(storage.join(snapshot_url(output, step), "snapshot.json"))


def make_snapshot(
    config: TrainConfig, dataset: LatentDataset, checkpoint: str, progress: Mapping[str, Any]
) -> Snapshot:
    """Of a committed checkpoint; `progress` holds "step" and "images_seen"."""
    url, manifest = snapshot_url(config.output, progress["step"]), dataset.manifest
    storage.remove(storage.join(url, "snapshot.json"))  # of a run that went back from here
    write_snapshot(
        url,
        read_full(checkpoint, f"ema.{PROFILE}") | read_full(checkpoint, "buffer"),
        denoiser_config=config.denoiser,
        diffusion_config=config.diffusion,
        statistics=dataset.statistics,
        conditioning=manifest.conditioning,
        latent_shape=dataset.latent_shape,
        fingerprint=manifest.fingerprint,
        step=progress["step"],
        images_seen=progress["images_seen"],
        autoencoder_url=storage.join(manifest.url, "autoencoder"),
    )
    return read_snapshot(url)


def snapshot_steps(output: str) -> list[int]:
    """The optimizer steps of the snapshots that are whole, in order."""
    return [step for step in _steps(output) if is_there(output, step)]


def validated_snapshot(output: str, step: int) -> Snapshot | None:
    """The snapshot of a step, where it is whole and was validated."""
    there = step in validations(output) and is_there(output, step)
    return read_snapshot(snapshot_url(output, step)) if there else None


def prune_snapshots(output: str, keep: int | None) -> list[str]:
    """Removes snapshots but the newest `keep` and the best one by validation loss; None: all stay.

    Returns the hashes of the weights of those that were whole.
    """
    gone: list[str] = []
    if keep is None:
        return gone
    whole = snapshot_steps(output)
    best = next((step for _, step in best_steps(output) if step in whole), None)
    for step in _steps(output):
        if whole and step < whole[-1] and step not in (*whole[-keep:], best):
            url = snapshot_url(output, step)
            if step in whole:
                gone.append(storage.read_json(storage.join(url, "snapshot.json"))["weights_sha256"])
            storage.remove(storage.join(url, "snapshot.json"))  # first: what is half removed is none
            storage.remove(url)
    return gone


def _steps(output: str) -> list[int]:
    names = storage.list_dir(storage.join(output, "snapshots"))
    return sorted(int(match.group(1)) for match in map(_NAME.fullmatch, names) if match)
