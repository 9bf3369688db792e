"""The two applications by an import path, for what starts Ray Serve itself: KubeRay's RayService, `serve deploy`.

Each is named in a Serve config with the keys of `ldm serve` as its `args`; `infra/k8s/overlays/example/serve.yaml` has
both. Host and port are the config's `http_options`, so that `host` and `port` mean nothing here.
"""

from typing import Any

from ldm.config import RequestError, validate
from pipelines.serve.applications import frontend_application, samplers_application
from pipelines.serve.config import ServeConfig, read_token, token_sha256


def samplers(args: dict[str, Any]) -> Any:
    """The application `ldm-samplers`. Raises RequestError.

    It is built before there are nodes for it, so `device` is to be named. A replica has a CPU, and on cuda its share of
    a GPU; the config's `deployments` can give it other resources.
    """
    config = _config(args)
    if config.device == "auto":
        raise RequestError("device=auto: nobody knows yet what the nodes have; give device=cuda or device=cpu")
    resources = {"CPU": 1.0}
    if config.device == "cuda":
        resources["GPU"] = config.gpus_per_replica
    return samplers_application(config, config.device, resources, None)


def frontend(args: dict[str, Any]) -> Any:
    """The application `ldm`, which answers HTTP. Raises RequestError, also where no token guards it."""
    config = _config(args)
    return frontend_application(config, token_sha256(read_token(config)))


def _config(args: dict[str, Any]) -> ServeConfig:
    return validate(ServeConfig, {**args, "host": "0.0.0.0"})  # others reach it, so it needs a token
