"""What is in image shards or in a latent dataset, and what encoding would take."""

from ldm.inspection.config import InspectConfig
from ldm.inspection.latents import LatentsReport
from ldm.inspection.pictures import PicturesReport
from ldm.inspection.run import InspectPlan, inspect, plan

__all__ = ["InspectConfig", "InspectPlan", "LatentsReport", "PicturesReport", "inspect", "plan"]
