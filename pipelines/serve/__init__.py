"""Snapshot => pictures over HTTP: Ray Serve around a sampler that every request shares, step by step."""

from pipelines.serve.config import ServeConfig
from pipelines.serve.deployment import ServePlan, deployment, plan, serve_forever

__all__ = ["ServeConfig", "ServePlan", "deployment", "plan", "serve_forever"]
