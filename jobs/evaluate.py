"""`ldm evaluate`, and `python -m jobs.evaluate` for `ray job submit`."""

import sys

from jobs.cli import main
from ldm.config import Config
from pipelines import cluster
from pipelines.evaluate import EvaluateConfig as StageConfig
from pipelines.evaluate import EvaluateReport, evaluate, finished, plan
from pipelines.serve import ServeConfig, deployment

__all__ = ["StageConfig", "dry_run", "finished", "run"]


def run(config: StageConfig) -> EvaluateReport:
    """Evaluates through the deployment at `endpoint`, or one that is started for it; or by workers on Ray."""
    plan(config)  # before anything is started
    if config.through == "ray" or config.endpoint is not None:
        return evaluate(config)
    served = ServeConfig(
        snapshot=config.snapshot,
        port=0,
        batch_size=config.batch_size,
        refresh_s=0,
        num_replicas=config.num_replicas,
        device=config.device,
        denoiser_type=config.denoiser_type,
    )
    with cluster.ray_session(), deployment(served) as url:
        return evaluate(config, url)


def dry_run(config: Config) -> str:
    """Checks the request; returns what would be done."""
    assert isinstance(config, StageConfig)
    todo = plan(config)
    against = f"{len(todo.shards)} shards"
    if todo.statistics:
        against = f"the statistics of {todo.statistics.gaussian.count:,} pictures"
    code = "" if todo.features in ("classifier", "vae") else ", RUNNING the network of that file"
    return (
        f"draw {config.num_images} pictures from step {todo.snapshot.step:,} of {config.snapshot} and measure them "
        f"against {against}, in the features {todo.features}{code}"
    )


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
