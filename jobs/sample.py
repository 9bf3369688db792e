"""`ldm sample`, and `python -m jobs.sample` for `ray job submit`."""

import sys

from jobs.cli import main
from ldm.config import Config
from ldm.sample_config import SampleConfig as StageConfig
from ldm.sampling import SampleReport, check, sample
from pipelines.progress import Progress

__all__ = ["StageConfig", "dry_run", "run"]


def run(config: StageConfig) -> SampleReport:
    """Samples, and shows the progress."""
    with Progress("sample", check(config).num_images, "pictures") as progress:
        return sample(config, progress.advance_to)


def dry_run(config: Config) -> str:
    """Checks the request; returns what would be done."""
    assert isinstance(config, StageConfig)
    todo = check(config)
    what = f"{todo.num_images} pictures" + (f" ({config.task})" if config.task != "generate" else "")
    return f"sample {what} from step {todo.snapshot.step:,} of {config.snapshot} into {config.output}"


if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
