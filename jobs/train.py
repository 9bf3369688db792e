"""`ldm train`, and `python -m jobs.train` for `ray job submit`."""

import sys

from jobs.cli import main
from ldm.config import Config
from pipelines.progress import counted
from pipelines.train import TrainConfig as StageConfig
from pipelines.train import check, finished, plan
from pipelines.train import train as run
from pipelines.train.estimate import Estimate, estimate
from pipelines.train.run import describe_samples

__all__ = ["StageConfig", "check", "conclude", "dry_run", "finished", "run"]

conclude = run
"""A run that is finished notes what is excluded now, and sends what MLflow has not heard; it starts no worker."""


def dry_run(config: Config) -> Estimate:
    """Checks the request; returns what would be done, and what it would take."""
    assert isinstance(config, StageConfig)
    todo = plan(config)
    least, most = config.workers_range
    workers = counted(most, "worker") if least == most else f"{least} to {most} workers"
    what = (
        f"train on {describe_samples(todo.dataset)} (generation {'+'.join(todo.generations)}) "
        f"to step {config.max_steps:,}, {workers}, ZeRO-{config.zero_stage}, {config.precision}, "
        f"from {todo.checkpoint or config.init_from or 'fresh weights'}"
        + "".join(f"\ninit_from: {note}" for note in todo.notes)
    )
    return estimate(config, todo.dataset, what, todo.output_bytes, todo.step)


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
