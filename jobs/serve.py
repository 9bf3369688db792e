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
    number = config.num_replicas if isinstance(config.num_replicas, int) else "{} to {}".format(*config.num_replicas)
    return f"serve step {todo.snapshot.step:,} of {config.snapshot} at {todo.url}, replicas: {number}"


if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
