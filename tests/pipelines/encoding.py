"""What the tests of encode share."""

from pathlib import Path

import torch

from ldm import storage
from ldm.latents.manifest import (
    ShardReceipt,
    fingerprint_hash,
)
from pipelines.encode import EncodeConfig, ShardEncoder, plan
from pipelines.tracking import TrackingConfig

SIZE = 16


def config(folder: str, destination: object, vae: str, **changes: object) -> EncodeConfig:
    values = {
        "source": f"{folder}/*.tar",
        "destination": str(destination),
        "autoencoder": vae,
        "image_size": SIZE,
        "batch_size": 8,
        "tracking": TrackingConfig(enabled=False),
        "max_quarantined": 0.1,
        **changes,
    }
    return EncodeConfig(**values)


def tree(folder: object) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file."""
    files = sorted(path for path in Path(str(folder)).rglob("*") if path.is_file())
    return {str(p.relative_to(str(folder))): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def contents(folder: object) -> dict[str, bytes]:
    return {name: data for name, (data, _) in tree(folder).items()}


def encode_here(settings: EncodeConfig, name: str) -> ShardReceipt:
    """One shard through the actor's class in this very process."""
    todo, threads = plan(settings), torch.get_num_threads()
    todo.autoencoder.save(storage.join(settings.destination, "autoencoder"))
    try:
        encoder = ShardEncoder(settings, fingerprint_hash(todo.fingerprint), "cpu", 1)
        return encoder.encode_shard(name, todo.urls[name])
    finally:
        torch.set_num_threads(threads)  # on which the last bits of other tests depend
