"""Models in and out: snapshots to and from diffusers' DiT folders, and from the original DiT checkpoints."""

from ldm.exchange.export import ExportConfig, ExportReport, export
from ldm.exchange.load import ImportConfig, ImportReport, import_model

__all__ = ["ExportConfig", "ExportReport", "ImportConfig", "ImportReport", "export", "import_model"]
