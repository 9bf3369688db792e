"""`ldm convert`: new columns of a latent dataset; a snapshot to diffusers; a model of others to a snapshot."""

import sys
from typing import TypeVar

from jobs.cli import main
from ldm.config import Config
from ldm.exchange import ExportConfig, ExportReport, ImportConfig, ImportReport, export, import_model
from ldm.exchange.export import check as check_export
from ldm.latents.join import JoinConfig, JoinReport, join, plan
from pipelines.progress import say

__all__ = ["FORMS", "StageConfig", "dry_run", "run"]

R = TypeVar("R", ExportReport, ImportReport)

StageConfig = JoinConfig
FORMS = {"table": (JoinConfig, "latents"), "to": (ExportConfig, "snapshot"), "from": (ImportConfig, None)}
"""The key that chooses a form of the command => its configuration, and the key that arguments without `=` give."""


def run(config: Config) -> JoinReport | ExportReport | ImportReport:
    """Converts what is asked for. Raises RequestError."""
    if isinstance(config, JoinConfig):
        return join(config)
    if isinstance(config, ExportConfig):
        return _told(export(config))
    assert isinstance(config, ImportConfig)
    return _told(import_model(config))


def dry_run(config: Config) -> str:
    """Checks the request; returns what would be done."""
    if isinstance(config, JoinConfig):
        return _dry_join(config)
    if isinstance(config, ExportConfig):
        snapshot = check_export(config)
        return f"write {config.snapshot} (step {snapshot.step:,}) to {config.output}, for diffusers' DiTPipeline"
    assert isinstance(config, ImportConfig)
    found = _told(import_model(config, dry_run=True))
    shape = "x".join(map(str, found.latent_shape))
    return (
        f"write {config.source} to {config.output}: a DiT of {found.parameters / 1e6:.1f} M parameters, "
        f"latents {shape}, {found.num_classes} classes"
    )


def _dry_join(config: JoinConfig) -> str:
    todo = plan(config)
    return (
        f"join {', '.join(todo.table.values.column_names)} to {config.latents}: by {todo.table.by}, "
        f"{todo.matched:,} of {todo.manifest.num_samples:,} records are matched, "
        f"{todo.unused_rows:,} of {len(todo.table.values):,} rows are of no use"
    )


def _told(report: R) -> R:
    """Says its notes."""
    for note in report.notes:
        say(f"convert: {note}")
    return report


if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
