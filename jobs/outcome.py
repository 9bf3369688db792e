"""A stage done: by running it, or because its output is there and fits."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ldm.config import Config
from pipelines.progress import say


@dataclass(frozen=True)
class Outcome:
    """report: of the stage, None where it has none."""

    report: Any
    skipped: bool = False


def do(stage: ModuleType, config: Config) -> Outcome:
    """Runs a stage, a module `jobs.VERB`."""
    return Outcome(stage.run(config))


def do_unless_done(stage: ModuleType, config: Config) -> Outcome:
    """Runs a stage unless it says itself that nothing is left to do."""
    return skip(stage, config) or do(stage, config)


def skip(stage: ModuleType, config: Config) -> Outcome | None:
    """None where something is left to do, or the stage cannot tell. Raises RequestError for what does not fit."""
    report = stage.finished(config) if hasattr(stage, "finished") else None
    if report is None:
        return None
    say(f"{stage.__name__.rpartition('.')[2]}: skipped, its output is there and fits")
    # What a finished stage has to do all the same, at no cost.
    return Outcome(stage.conclude(config) if hasattr(stage, "conclude") else report, skipped=True)
