"""`ldm convert`: new columns of a latent dataset from a table."""

import sys

from jobs.cli import main
from ldm.config import Config
from ldm.latents.join import JoinConfig as StageConfig
from ldm.latents.join import join as run
from ldm.latents.join import plan

__all__ = ["POSITIONAL", "StageConfig", "dry_run", "run"]

POSITIONAL = "latents"


def dry_run(config: Config) -> str:
    """Checks the request; returns what would be done."""
    assert isinstance(config, StageConfig)
    todo = plan(config)
    return (
        f"join {', '.join(todo.table.values.column_names)} to {config.latents}: by {todo.table.by}, "
        f"{todo.matched:,} of {todo.manifest.num_samples:,} records are matched, "
        f"{todo.unused_rows:,} of {len(todo.table.values):,} rows are of no use"
    )


if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
