"""`ldm train`, and `python -m jobs.train` for `ray job submit`."""

import sys

from jobs.cli import main
from ldm import storage
from ldm.config import Config
from pipelines.train import TrainConfig as StageConfig
from pipelines.train import plan
from pipelines.train import train as run
from pipelines.train.run import describe_samples

__all__ = ["StageConfig", "dry_run", "run"]


def dry_run(config: Config) -> str:
    """Checks the request; returns what would be done."""
    assert isinstance(config, StageConfig)
    todo = plan(config)
    epochs = config.max_steps * config.global_batch_size / todo.dataset.num_samples
    least, most = config.workers_range
    workers = f"{most} workers" if least == most else f"{least} to {most} workers"
    return (
        f"train {todo.parameters / 1e6:.1f} M parameters on {describe_samples(todo.dataset)} "
        f"(generation {'+'.join(todo.generations)}) to step {config.max_steps:,} ({epochs:.1f} epochs), "
        f"{workers}, ZeRO-{config.zero_stage}, {config.precision}, "
        f"from {todo.checkpoint or config.init_from or 'fresh weights'}, "
        f"writes up to {storage.readable(todo.output_bytes)}" + "".join(f"\ninit_from: {note}" for note in todo.notes)
    )


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
