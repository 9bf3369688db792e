"""`ldm verify`, and `python -m jobs.verify` for `ray job submit`."""

import sys

from jobs.cli import main
from ldm import storage
from ldm.config import Config
from ldm.latents.manifest import read_manifest
from pipelines.verify import VerifyConfig as StageConfig
from pipelines.verify import verify as run

__all__ = ["POSITIONAL", "StageConfig", "dry_run", "run"]

POSITIONAL = "latents"


def dry_run(config: Config) -> str:
    """Checks the request; returns what would be done."""
    assert isinstance(config, StageConfig)
    manifest = read_manifest(config.latents, config.generation)
    size = storage.readable(sum(row["bytes"] for row in manifest.shards))
    return (
        f"verify {manifest.num_samples:,} records in {len(manifest.shards):,} tars ({size}) of {config.latents}, "
        f"generation {manifest.generation}: {config.level}"
    )


if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
