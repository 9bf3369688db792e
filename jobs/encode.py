"""`ldm encode`, and `python -m jobs.encode` for `ray job submit`."""

import sys

from jobs.cli import main
from ldm import storage
from ldm.config import Config
from pipelines.encode import EncodeConfig as StageConfig
from pipelines.encode import encode as run
from pipelines.encode import finished, plan

__all__ = ["StageConfig", "dry_run", "finished", "run"]


def dry_run(config: Config) -> str:
    """Checks the request; returns what would be done."""
    assert isinstance(config, StageConfig)
    todo = plan(config)
    size = "" if todo.output_bytes is None else f", about {storage.readable(todo.output_bytes)}"
    return (
        f"encode {len(todo.tasks)} of {len(todo.shards)} shards ({storage.readable(todo.input_bytes)}), "
        f"{len(todo.shards) - len(todo.tasks)} are there already, into {config.destination}{size}"
    )


if __name__ == "__main__":
    sys.exit(main(["encode", *sys.argv[1:]]))
