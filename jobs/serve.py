"""`ldm serve`, and `python -m jobs.serve` for `ray job submit`."""

import sys

from jobs.cli import main
from ldm.config import Config
from pipelines.serve import ServeConfig as StageConfig
from pipelines.serve import plan
from pipelines.serve import serve_forever as run

__all__ = ["StageConfig", "dry_run", "run"]


def dry_run(config: Config) -> str:
    """Checks the request; returns what would be done."""
    assert isinstance(config, StageConfig)
    todo = plan(config)
    return f"serve step {todo.snapshot.step:,} of {config.snapshot} at {todo.url}, {config.num_replicas} replicas"


if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
