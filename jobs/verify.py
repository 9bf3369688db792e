"""`ldm verify`, and `python -m jobs.verify` for `ray job submit`."""

import sys

from jobs.cli import main
from ldm import storage
from ldm.config import Config
from ldm.latents.manifest import read_manifest
from pipelines.progress import counted
from pipelines.train import plan
from pipelines.train.selfcheck import ResumeCheckConfig, ResumeCheckReport, check_resume, short_run
from pipelines.verify import VerifyConfig as StageConfig
from pipelines.verify import VerifyReport, verify

__all__ = ["POSITIONAL", "SWITCHES", "StageConfig", "dry_run", "run"]

POSITIONAL = "latents"
SWITCHES = {"resume": ResumeCheckConfig}


def run(config: Config) -> VerifyReport | ResumeCheckReport:
    """A latent dataset, or with --resume the exactness of a resume. Raises RequestError."""
    if isinstance(config, ResumeCheckConfig):
        return check_resume(config)
    assert isinstance(config, StageConfig)
    return verify(config)


def dry_run(config: Config) -> str:
    """Checks the request; returns what would be done."""
    if isinstance(config, ResumeCheckConfig):
        todo, workers = plan(short_run(config, config.output)), counted(config.workers_range[1], "worker")
        return (
            f"verify that training resumes exactly: {todo.parameters / 1e6:.1f} M parameters, three runs of "
            f"{config.steps} steps on {workers}, below {config.output}, removed at the end"
        )
    assert isinstance(config, StageConfig)
    manifest = read_manifest(config.latents, config.generation)
    size = storage.readable(sum(row["bytes"] for row in manifest.shards))
    return (
        f"verify {manifest.num_samples:,} records in {len(manifest.shards):,} tars ({size}) of {config.latents}, "
        f"generation {manifest.generation}: {config.level}"
    )


if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
