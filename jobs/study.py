"""`ldm study`: sweeps, latent against pixel diffusion, scaling; and `python -m jobs.study` for `ray job submit`."""

import sys
from types import ModuleType

from jobs.cli import main
from ldm.config import Config
from pipelines.study import latent_vs_pixel, scaling, sweep
from pipelines.study.outcome import StudyPlan, StudyReport

__all__ = ["KINDS", "StageConfig", "dry_run", "run", "show"]

StageConfig = sweep.SweepConfig
_STUDIES: dict[str, ModuleType] = {sweep.STUDY: sweep, latent_vs_pixel.STUDY: latent_vs_pixel, scaling.STUDY: scaling}
KINDS: dict[str, type[Config]] = {
    sweep.STUDY: sweep.SweepConfig,
    latent_vs_pixel.STUDY: latent_vs_pixel.LatentVsPixelConfig,
    scaling.STUDY: scaling.ScalingConfig,
}
"""The first word of the arguments => its configuration."""
show = str


def run(config: Config) -> StudyReport:
    """Does what is missing of the study. Raises RequestError; RuntimeError where an arm fails."""
    report: StudyReport = _STUDIES[_kind(config)].run(config)
    return report


def dry_run(config: Config) -> StudyPlan:
    """Checks the request; the arms, and about how long they take."""
    planned: StudyPlan = _STUDIES[_kind(config)].dry_run(config)
    return planned


def _kind(config: Config) -> str:
    return next(name for name, model in KINDS.items() if type(config) is model)


if __name__ == "__main__":
    sys.exit(main(["study", *sys.argv[1:]]))
