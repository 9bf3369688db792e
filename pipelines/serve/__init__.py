"""Snapshot => pictures over HTTP: a Ray Serve deployment around the very sampler of `ldm sample`."""

from pipelines.serve.deployment import ServeConfig, ServePlan, deployment, plan, serve_forever

__all__ = ["ServeConfig", "ServePlan", "deployment", "plan", "serve_forever"]
