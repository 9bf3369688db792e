"""`ldm inspect`: what is in image shards or in a latent dataset."""

import sys

from jobs.cli import main
from ldm import storage
from ldm.config import Config
from ldm.inspection import InspectConfig as StageConfig
from ldm.inspection import LatentsReport, PicturesReport, inspect, plan
from ldm.inspection.table import to_text as show
from pipelines.progress import Progress

__all__ = ["POSITIONAL", "StageConfig", "dry_run", "run", "show"]

POSITIONAL = "target"


def run(config: StageConfig) -> PicturesReport | LatentsReport:
    """Looks, and shows the progress."""
    with Progress("inspect", 0, "steps") as progress:

        def advance(done: int, total: int) -> None:
            progress.total = total
            progress.advance_to(done)

        return inspect(config, advance)


def dry_run(config: Config) -> str:
    """Checks the request; returns what would be done."""
    assert isinstance(config, StageConfig)
    todo = plan(config)
    if todo.manifest is not None:
        return f"inspect the latent dataset {config.target}, generation {todo.manifest.generation}"
    size = storage.readable(sum(shard.bytes for shard in todo.shards.values()))
    number = f"{config.probe:,} samples" if config.probe else "1 % of the samples, at least 200,"
    return f"inspect {number} of {len(todo.shards):,} shards ({size})"


if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
