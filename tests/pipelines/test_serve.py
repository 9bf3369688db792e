"""The deployment on Ray Serve: two replicas behind one frontend, which owns every request whoever draws it."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch

from ldm.config import RequestError
from ldm.drawing import load_sampler
from ldm.plan import SamplerConfig
from pipelines import serve
from tests.pipelines.serving import pixels
from tests.pipelines.tiny_snapshot import write_tiny_snapshot
from tests.processes import named

ROWS = 8
LONG = {"num_inference_steps": 1000, "num_images": 4, "background": True}
SETTINGS = {"num_inference_steps": 3, "eta": 0.5, "guidance_scale": 2.0, "exact": True}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_snapshot(tmp_path_factory.mktemp("serve") / "snapshot")


@pytest.fixture(scope="class")
def endpoint(ray_session: None, snapshot: str) -> Iterator[str]:
    config = serve.ServeConfig(snapshot=snapshot, port=0, batch_size=ROWS, num_replicas=2, deadline_s=1e5)
    with serve.deployment(config) as url:
        yield url


@pytest.fixture
def client(endpoint: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint, trust_env=False, timeout=200) as client:
        yield client


def offline(snapshot: str, labels: list[int], seeds: list[int]) -> Any:
    """With as many threads as a replica has here: each of two has half of Ray's 4 CPUs, and no more than there are."""
    settings = SamplerConfig(**{key: value for key, value in SETTINGS.items() if key != "exact"})
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
    try:
        sampler = load_sampler(snapshot, ROWS // 2, "cpu")
        return sampler.draw(torch.tensor(labels), torch.tensor(seeds), settings).numpy()
    finally:
        torch.set_num_threads(before)


def replicas() -> list[psutil.Process]:
    """The processes that hold the model."""
    return named("ray::ServeReplica:ldm-samplers")


@pytest.mark.ray
class TestDeployment:
    def test_concurrent_requests_are_spread_and_do_not_mix(self, client: httpx.Client, snapshot: str) -> None:
        def draw(seed: int) -> bytes:
            body = {**SETTINGS, "labels": [seed % 10], "seed": seed, "response_format": "png"}
            return client.post("/v1/samples", json=body).raise_for_status().content

        with ThreadPoolExecutor(8) as pool:
            drawn = list(pool.map(draw, range(16)))
        for seed, png in enumerate(drawn):
            assert np.array_equal(pixels(png), offline(snapshot, [seed % 10], [seed])[0])

    def test_bulk_comes_from_both_in_order(self, client: httpx.Client, snapshot: str) -> None:
        body = {**SETTINGS, "num_images": 200, "seed": 7, "response_format": "npy"}
        with tarfile.open(fileobj=io.BytesIO(client.post("/v1/bulk", json=body).raise_for_status().content)) as tar:
            found = [np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar]  # type: ignore[union-attr]
        assert np.array_equal(np.stack(found), offline(snapshot, [i % 10 for i in range(200)], list(range(7, 207))))

    def test_a_long_answer_comes_whole(self, client: httpx.Client) -> None:
        """More than the 4 MB that one message of gRPC holds: Ray's way for messages is not to be that one."""
        body = {"num_images": 1500, "num_inference_steps": 1, "response_format": "npy"}
        answer = client.post("/v1/bulk", json=body).raise_for_status()
        assert len(answer.content) > 5 * 2**20
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
            assert len(tar.getnames()) == 1500

    def test_every_id_is_found_and_cancelled_whichever_replica_draws_it(self, client: httpx.Client) -> None:
        ids = [client.post("/v1/samples", json=LONG).raise_for_status().json()["id"] for _ in range(6)]
        assert {client.get(f"/v1/samples/{id}").json()["status"] for id in ids} == {"running"}
        assert {client.delete(f"/v1/samples/{id}").json()["status"] for id in ids} == {"cancelled"}
        assert nothing_waits(client)

    def test_hanging_up_cancels(self, client: httpx.Client, endpoint: str) -> None:
        body = {"num_inference_steps": 1000, "num_images": 8}
        for path in ("/v1/samples", "/v1/bulk"):
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{endpoint}{path}", json=body, timeout=0.5, trust_env=False)
            assert nothing_waits(client)

    def test_a_replica_that_dies_loses_no_request(self, client: httpx.Client, snapshot: str) -> None:
        body = {**SETTINGS, "num_inference_steps": 1000, "num_images": 4}
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(client.post, "/v1/samples", json={**body, "seed": 4 * i}) for i in range(4)]
            time.sleep(0.3)
            replicas()[0].kill()
            drawn = [answer.result().raise_for_status().json()["images"] for answer in answers]
        again = [client.post("/v1/samples", json={**body, "seed": 4 * i}).json()["images"] for i in range(4)]
        assert drawn == again

    def test_a_wrong_request_is_refused_and_the_next_one_served(self, client: httpx.Client) -> None:
        refused = client.post("/v1/samples", json={"num_inference_steps": 5000})
        assert refused.status_code == 422
        assert refused.json()["detail"].startswith("num_inference_steps=5000: the most here is 1000")
        assert client.post("/v1/samples", json=SETTINGS).status_code == 200

    def test_every_metric_of_the_dashboard_is_exported(self, client: httpx.Client) -> None:
        """The names that Grafana asks for are those that Prometheus is given."""
        import ray

        body = {"num_inference_steps": 5, "previews": 2, "background": True}
        dashboard = (Path(__file__).parents[2] / "infra" / "grafana" / "ldm-serve.json").read_text()
        wanted = set(re.findall(r"ray_ldm_serve_\w+", dashboard))
        assert len(wanted) > 6
        found, limit = "", time.monotonic() + 60
        while not all(f"{name}{{" in found for name in wanted):
            assert time.monotonic() < limit, sorted(name for name in wanted if f"{name}{{" not in found)
            id = client.post("/v1/samples", json=body).raise_for_status().json()["id"]
            client.delete(f"/v1/samples/{client.post('/v1/samples', json=LONG).json()['id']}")
            client.post("/v1/samples", json={**LONG, "deadline_s": 1e-6})
            client.get(f"/v1/samples/{id}/events")
            found = ""
            for node in ray.nodes():
                url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
                found += httpx.get(url, trust_env=False).text
            time.sleep(1)

    def test_a_second_serve_on_the_same_ray_is_refused(self, endpoint: str, snapshot: str) -> None:
        with (
            pytest.raises(RequestError, match="a Ray Serve runs on this cluster already"),
            serve.deployment(serve.ServeConfig(snapshot=snapshot, port=0)),
        ):
            pass
        httpx.get(f"{endpoint}/healthz", trust_env=False).raise_for_status()  # and the first one goes on


def nothing_waits(client: httpx.Client) -> bool:
    """Whether no replica holds a request; each answers about every second time."""
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        if {client.get("/readyz").json()["waiting"] for _ in range(12)} == {0}:
            return True
    return False


class TestPlan:
    def test_a_port_in_use(self, snapshot: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            with pytest.raises(RequestError, match=f"^port={port}: is in use; give another"):
                serve.plan(serve.ServeConfig(snapshot=snapshot, port=port))

    def test_a_free_port_is_found_and_a_given_one_kept(self, snapshot: str, free_port: Callable[[], int]) -> None:
        todo = serve.plan(serve.ServeConfig(snapshot=snapshot, port=0))
        assert todo.port > 0
        assert todo.url == f"http://127.0.0.1:{todo.port}"
        port = free_port()
        assert serve.plan(serve.ServeConfig(snapshot=snapshot, port=port)).port == port

    def test_another_machines_address(self, snapshot: str) -> None:
        with pytest.raises(RequestError, match=r"^host=203\.0\.113\.7: is no address of this machine"):
            serve.plan(serve.ServeConfig(snapshot=snapshot, host="203.0.113.7", port=0))

    def test_what_others_reach_needs_a_token(self, snapshot: str, tmp_path: Path) -> None:
        with pytest.raises(
            RequestError, match=r"^host=0\.0\.0\.0: others could use it without a token; give token_file"
        ):
            serve.plan(serve.ServeConfig(snapshot=snapshot, host="0.0.0.0", port=0))
        file = tmp_path / "token"
        for text, problem in ((None, "cannot be read"), ("short", "holds no token of at least 8 characters")):
            if text is not None:
                file.write_text(text)
                file.chmod(0o600)
            with pytest.raises(RequestError, match=f"^token_file={file}: {problem}"):
                serve.plan(serve.ServeConfig(snapshot=snapshot, host="0.0.0.0", port=0, token_file=str(file)))
        file.write_text("long enough\n")
        todo = serve.plan(serve.ServeConfig(snapshot=snapshot, host="0.0.0.0", port=0, token_file=str(file)))
        assert todo.token_sha256 is not None
        assert "long enough" not in repr(todo)

    def test_no_snapshot(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"^snapshot=.*: holds no snapshot; give one"):
            serve.plan(serve.ServeConfig(snapshot=str(tmp_path)))


@pytest.mark.faults
@pytest.mark.ray
def test_replicas_come_with_the_queue(ray_session: None, snapshot: str) -> None:
    config = serve.ServeConfig(snapshot=snapshot, port=0, batch_size=2, num_replicas=(1, 2), deadline_s=1e5)
    with serve.deployment(config) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        assert len(replicas()) == 1
        ids = [client.post("/v1/samples", json={**LONG, "num_images": 100}).json()["id"] for _ in range(30)]
        limit = time.monotonic() + 120
        while len(replicas()) < 2:
            assert time.monotonic() < limit
            time.sleep(1)
        for id in ids:
            assert client.delete(f"/v1/samples/{id}").json()["status"] == "cancelled"
        client.post("/v1/samples", json=SETTINGS).raise_for_status()


@pytest.mark.faults
@pytest.mark.ray
def test_why_a_replica_does_not_start_is_told_in_one_line(ray_session: None, tmp_path: Path) -> None:
    url = write_tiny_snapshot(tmp_path / "custom")
    described = tmp_path / "custom" / "snapshot.json"
    described.write_text(described.read_text().replace('"type": "dit"', '"type": "custom"'))
    with (
        pytest.raises(RequestError, match=r"^denoiser_type=null: .* give denoiser_type=package\.module:Class$"),
        serve.deployment(serve.ServeConfig(snapshot=url, port=0)),
    ):
        pass


FOREVER = """
import sys
from pipelines.serve import ServeConfig, serve_forever
serve_forever(ServeConfig(snapshot=sys.argv[1], port=int(sys.argv[2]), batch_size=1))
"""


@pytest.mark.faults
@pytest.mark.ray
def test_serve_forever_ends_on_sigterm_and_leaves_no_process(snapshot: str, free_port: Callable[[], int]) -> None:
    port = free_port()
    command = [sys.executable, "-c", FOREVER, snapshot, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if "Ctrl-C stops it" in line:
                break
        assert process.poll() is None, said
        assert f"http://127.0.0.1:{port}" in said
        started = psutil.Process(process.pid).children(recursive=True)
        assert httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out == ""  # stdout is for reports
    assert [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
