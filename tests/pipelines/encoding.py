"""What the tests of encode share."""

from pathlib import Path
from typing import Any

from ldm import storage
from ldm.latents.manifest import fingerprint_hash
from ldm.latents.receipt import ShardReceipt
from ldm.latents.writer import quarantine_url
from pipelines.encode import EncodeConfig, plan
from pipelines.encode.plan import Task
from pipelines.encode.worker import ShardEncoder
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


def quarantine(destination: object, name: str) -> list[dict[str, Any]]:
    """What was refused of one input shard."""
    return storage.read_json_lines(quarantine_url(str(destination), name))


def contents(folder: object) -> dict[str, bytes]:
    return {name: data for name, (data, _) in tree(folder).items()}


def encode_here(settings: EncodeConfig, name: str, attempt: int = 0, threads: int = 1) -> ShardReceipt:
    """One shard through the actor's class in this very process."""
    todo = plan(settings)
    todo.autoencoder.save(storage.join(settings.destination, "autoencoder"))
    task = next((task for task in todo.tasks if task.shard.name == name), Task(todo.shards[name], attempt))
    encoder = ShardEncoder(settings, fingerprint_hash(todo.fingerprint), "cpu", threads)
    try:
        return encoder.encode_shard(task).receipt
    finally:
        encoder.close()
