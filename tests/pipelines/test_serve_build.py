"""`ldm serve` as KubeRay and `serve deploy` start it: by import paths in a Serve config."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ldm.config import RequestError
from pipelines.serve import build
from tests.pipelines.tiny_snapshot import write_tiny_snapshot

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-of-a-test"


def serve_config(args: dict[str, Any], port: int) -> dict[str, Any]:
    """What the RayService of infra/ hands to Ray Serve, with other keys and on another port."""
    manifest = yaml.safe_load((ROOT / "infra/k8s/overlays/example/serve.yaml").read_text())
    config: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["proxy_location"] = "HeadOnly"
    for application in config["applications"]:
        application["args"] = args
    return config


@pytest.mark.ray
def test_the_config_of_the_ray_service_serves(ray_session: None, tmp_path: Path, free_port: Callable[[], int]) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    snapshot = write_tiny_snapshot(tmp_path / "snapshot")
    port, body = free_port(), {"num_inference_steps": 2, "response_format": "png"}
    args = {"snapshot": snapshot, "device": "cpu", "token_file": str(tmp_path / "token"), "batch_size": 4}
    config = ServeDeploySchema.model_validate(serve_config(args, port))
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    try:
        _get_global_client().deploy_apps(config)
        running(serve, {"ldm", "ldm-samplers"})
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            right, wrong = ({"authorization": f"Bearer {token}"} for token in (TOKEN, TOKEN + "!"))
            assert client.post("/v1/samples", json=body).status_code == 401
            assert client.post("/v1/samples", json=body, headers=wrong).status_code == 401
            assert client.post("/v1/samples", json=body, headers=right | {"origin": "http://evil"}).status_code == 403
            answer = client.post("/v1/samples", json=body, headers=right)
            assert answer.status_code == 200 and answer.content.startswith(b"\x89PNG")
    finally:
        serve.shutdown()


def running(serve: Any, names: set[str]) -> None:
    """Waits until these applications run."""
    limit = time.monotonic() + 90
    while True:
        found = {name: (app.status, app.message) for name, app in serve.status().applications.items()}
        if {name for name, (status, _) in found.items() if status == "RUNNING"} >= names:
            return
        assert time.monotonic() < limit and "DEPLOY_FAILED" not in str(found), found
        time.sleep(0.1)


def test_what_others_reach_needs_a_token() -> None:
    with pytest.raises(RequestError, match="without a token; give token_file=FILE"):
        build.frontend({"snapshot": "s", "device": "cpu"})


def test_the_device_is_named_before_there_are_nodes() -> None:
    with pytest.raises(RequestError, match="^device=auto: nobody knows yet what the nodes have"):
        build.samplers({"snapshot": "s"})


def test_a_misspelt_key_is_one_line() -> None:
    with pytest.raises(RequestError, match="snapshots"):
        build.samplers({"snapshots": "s"})
