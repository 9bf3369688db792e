"""The deployment: pictures over HTTP are those of the offline sampler, and what is wrong is refused in one line."""

import asyncio
import base64
import io
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from PIL import Image

from ldm import images
from ldm.config import RequestError
from ldm.diffusion import DiffusionConfig
from ldm.drawing import PictureSampler, load_sampler
from ldm.latents.manifest import Conditioning
from ldm.plan import SamplerConfig
from ldm.snapshot import Snapshot, read_snapshot
from pipelines import serve
from pipelines.serve.app import Engine, create_app
from tests.pipelines.tiny_snapshot import NAMES, write_tiny_snapshot

BATCH = 4
SETTINGS = {"num_inference_steps": 3, "eta": 0.5, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_snapshot(tmp_path_factory.mktemp("serve") / "snapshot")


@pytest.fixture(scope="module")
def sampler(snapshot: str) -> PictureSampler:
    return load_sampler(snapshot, BATCH, "cpu")


@pytest.fixture(scope="class")
def endpoint(ray_session: None, snapshot: str) -> Iterator[str]:
    with serve.deployment(serve.ServeConfig(snapshot=snapshot, port=0, batch_size=BATCH, max_images=8)) as url:
        yield url


@pytest.fixture
def client(endpoint: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint, trust_env=False, timeout=60) as client:
        yield client


def offline(sampler: PictureSampler, labels: list[int], seeds: list[int]) -> npt.NDArray[np.uint8]:
    return sampler.draw(torch.tensor(labels), torch.tensor(seeds), SamplerConfig(**SETTINGS)).numpy()


def in_process(engine: Engine, snapshot: str | Snapshot) -> httpx.AsyncClient:
    """A client of the application alone, without a server and without Ray."""
    described = read_snapshot(snapshot) if isinstance(snapshot, str) else snapshot
    transport = httpx.ASGITransport(create_app(engine, described, max_images=8))
    return httpx.AsyncClient(transport=transport, base_url="http://app")


def post(engine: Engine, snapshot: str | Snapshot, body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with in_process(engine, snapshot) as client:
            if isinstance(body, bytes):
                headers = {"content-type": "application/json"}
                return await client.post("/v1/samples", content=body, headers=headers)
            return await client.post("/v1/samples", json=body)

    return asyncio.run(send())


@pytest.mark.ray
class TestDeployment:
    def test_npy_has_the_bytes_of_the_offline_sampler(self, client: httpx.Client, sampler: PictureSampler) -> None:
        labels, seeds = [3, 1, 4, 1, 5, 9], [6, 5, 3, 5, 8, 9]  # more than a batch
        body = {**SETTINGS, "labels": labels, "seeds": seeds, "response_format": "npy"}
        answer = client.post("/v1/samples", json=body).raise_for_status()
        pictures = np.load(io.BytesIO(answer.content), allow_pickle=False)
        assert pictures.shape == (6, 3, 32, 32)
        assert np.array_equal(pictures, offline(sampler, labels, seeds))

    def test_json_names_what_makes_a_picture_again(self, client: httpx.Client, sampler: PictureSampler) -> None:
        body = {**SETTINGS, "labels": ["two", 7], "seed": 10, "num_images": 3}
        answer = client.post("/v1/samples", json=body).raise_for_status().json()
        assert answer["step"] == 30
        assert [(p["seed"], p["label"]) for p in answer["images"]] == [(10, 2), (11, 7), (12, 2)]
        expected = offline(sampler, [2, 7, 2], [10, 11, 12])
        pngs = [base64.b64decode(p["png"]) for p in answer["images"]]
        assert pngs == [images.to_png(picture) for picture in expected]

    def test_png_is_one_picture(self, client: httpx.Client) -> None:
        body = {**SETTINGS, "labels": [0], "response_format": "png"}
        answer = client.post("/v1/samples", json=body).raise_for_status()
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).size == (32, 32)

    def test_concurrent_requests_do_not_mix(self, client: httpx.Client, sampler: PictureSampler) -> None:
        def draw(seed: int) -> bytes:
            body = {**SETTINGS, "labels": [seed % 10], "seed": seed, "response_format": "png"}
            return client.post("/v1/samples", json=body).raise_for_status().content

        with ThreadPoolExecutor(8) as pool:
            drawn = list(pool.map(draw, range(16)))
        assert drawn == [images.to_png(offline(sampler, [seed % 10], [seed])[0]) for seed in range(16)]

    def test_probes_and_model(self, client: httpx.Client, snapshot: str) -> None:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json() == {"status": "ready", "waiting": 0}
        (model,) = client.get("/v1/models").json()["models"]
        assert (model["snapshot"], model["step"], model["images_seen"]) == (snapshot, 30, 960)
        assert (model["num_classes"], model["classes"], model["image_size"]) == (10, list(NAMES), 32)
        assert (model["batch_size"], model["max_images"]) == (BATCH, 8)

    def test_a_wrong_request_is_refused_and_the_next_one_served(self, client: httpx.Client) -> None:
        refused = client.post("/v1/samples", json={"num_inference_steps": 5000})
        assert refused.status_code == 422
        assert refused.json()["detail"].startswith("num_inference_steps=5000: must be 1 to 1000")
        assert client.post("/v1/samples", json=SETTINGS).status_code == 200

    def test_a_second_serve_on_the_same_ray_is_refused(self, endpoint: str, snapshot: str) -> None:
        with (
            pytest.raises(RequestError, match="a Ray Serve runs on this cluster already"),
            serve.deployment(serve.ServeConfig(snapshot=snapshot, port=0)),
        ):
            pass
        httpx.get(f"{endpoint}/healthz", trust_env=False).raise_for_status()  # and the first one goes on


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"labels": [10]}, "labels=10: is no class of this model; give 0 to 9"),
        ({"labels": ["ten"]}, "labels=ten: is no class of this model; give 0 to 9, or zero, one"),
        ({"labels": ["²"]}, "labels=²: is no class of this model"),
        ({"labels": [True]}, "labels.0=true: "),
        ({"labels": []}, "labels=[]: "),
        ({"seeds": [1, -1]}, "seeds.1=-1: input should be greater than or equal to 0"),
        ({"seed": 2**53}, "seed=9007199254740992: "),
        ({"seed": 1, "seeds": [1]}, "seed, seeds: both are given"),
        ({"seeds": [1, 2], "num_images": 3}, "num_images=3: 2 seeds are given"),
        ({"num_images": 9}, "num_images=9: the most in one request is 8"),
        ({"num_images": 2, "response_format": "png"}, "response_format=png: holds one picture, not 2"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: input should be greater than 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001: must be 1 to 1000"),
        ({"num_inference_steps": 10**8}, "num_inference_steps=100000000: input should be less than or equal to"),
        ({"eta": 1.5}, "eta=1.5: must be from 0 (deterministic) to 1 (ancestral), or sigma_hat"),
        ({"sampler": "heun"}, "sampler=heun: is for a flow; this model is a diffusion"),
        ({"sampler": "dpmpp_2m", "eta": 0.5}, "eta=0.5: sampler=dpmpp_2m is deterministic"),
        ({"guidance_interval": [0.8, 0.2]}, "guidance_interval=[0.8, 0.2]: must be two rising shares"),
        ({"guidance": 2}, "guidance=2: extra inputs are not permitted"),
        (b'{"eta": NaN}', "eta=NaN: "),
        (b'{"guidance_scale": Infinity}', "guidance_scale=Infinity: "),
        (b'{"eta": ', "body: is no JSON"),
        ([1], "input should be a valid dictionary"),
    ],
)
def test_a_wrong_request_names_its_field(sampler: PictureSampler, snapshot: str, body: Any, detail: str) -> None:
    answer = post(Engine(sampler, 1), snapshot, body)
    assert answer.status_code == 422, answer.text
    assert detail.lower() in answer.json()["detail"].lower()
    assert "\n" not in answer.json()["detail"]


@pytest.mark.parametrize(
    ("diffusion", "settings"),
    [
        (DiffusionConfig(), {"sampler": "dpmpp_2m"}),
        (DiffusionConfig(), {"eta": "sigma_hat", "spacing": "leading", "clip_x0": 2.0}),
        (DiffusionConfig(), {"guidance_scale": 3, "guidance_interval": [0.2, 0.8], "guidance_rescale": 0.7}),
        (DiffusionConfig(schedule="flow"), {"sampler": "heun"}),
    ],
    ids=str,
)
def test_every_setting_of_the_sampler_is_taken(snapshot: str, diffusion: DiffusionConfig, settings: Any) -> None:
    sampler = load_sampler(snapshot, BATCH, "cpu")
    sampler.diffusion = diffusion
    body = {"num_inference_steps": 4, "labels": [3], "seed": 5, "response_format": "npy"}
    usual, found = (
        np.load(io.BytesIO(post(Engine(sampler, 1), snapshot, {**body, **changes}).raise_for_status().content))
        for changes in ({}, settings)
    )
    labels, seeds = torch.tensor([3]), torch.tensor([5])
    expected = sampler.draw(labels, seeds, SamplerConfig(num_inference_steps=4, **settings))
    assert np.array_equal(found, expected.numpy())
    assert not np.array_equal(found, usual)


def test_an_unconditional_model_takes_no_label_and_no_guidance(tmp_path: Path) -> None:
    url = write_tiny_snapshot(tmp_path / "plain", Conditioning())
    engine = Engine(load_sampler(url, BATCH, "cpu"), 1)
    drawn = post(engine, url, {"num_inference_steps": 2, "num_images": 2})
    assert [p["label"] for p in drawn.json()["images"]] == [None, None]
    assert "labels=3: the model is unconditional" in post(engine, url, {"labels": [3]}).json()["detail"]
    assert "guidance_scale=2.0: the model is" in post(engine, url, {"guidance_scale": 2}).json()["detail"]


def test_a_model_without_a_null_class_is_not_guided(sampler: PictureSampler, snapshot: str) -> None:
    described = read_snapshot(snapshot)
    other = replace(described, denoiser={**described.denoiser, "label_dropout": 0.0})
    detail = post(Engine(sampler, 1), other, {"guidance_scale": 2}).json()["detail"]
    assert detail.startswith("guidance_scale=2.0: the model was trained without the null class")


class GatedSampler(PictureSampler):
    """Draws when its gate opens, so that a request can be caught while it runs."""

    def __init__(self, sampler: PictureSampler) -> None:
        self.__dict__.update(sampler.__dict__)
        self.gate, self.entered = threading.Event(), threading.Event()

    def draw(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.entered.set()
        self.gate.wait(60)
        return super().draw(*args, **kwargs)


def test_requests_beyond_the_queue_are_refused_while_probes_are_answered(
    sampler: PictureSampler, snapshot: str
) -> None:
    gated = GatedSampler(sampler)
    engine = Engine(gated, max_waiting=2)

    async def scenario() -> None:
        async with in_process(engine, snapshot) as client:
            taken = [asyncio.create_task(client.post("/v1/samples", json=SETTINGS)) for _ in range(2)]
            await asyncio.to_thread(gated.entered.wait, 60)
            while engine.waiting < 2:
                await asyncio.sleep(0.001)
            refused = await client.post("/v1/samples", json=SETTINGS)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert (await client.get("/readyz")).status_code == 429
            assert (await client.get("/healthz")).status_code == 200
            gated.gate.set()
            assert [answer.status_code for answer in await asyncio.gather(*taken)] == [200, 200]
            assert (await client.get("/readyz")).json() == {"status": "ready", "waiting": 0}

    asyncio.run(scenario())


def test_pictures_that_are_no_squares_are_described(sampler: PictureSampler, snapshot: str) -> None:
    wide = replace(read_snapshot(snapshot), latent_shape=(4, 2, 8))

    async def ask() -> httpx.Response:
        async with in_process(Engine(sampler, 1), wide) as client:
            return await client.get("/v1/models")

    assert asyncio.run(ask()).json()["models"][0]["image_size"] == [16, 64]


def test_openapi_describes_every_field(sampler: PictureSampler, snapshot: str) -> None:
    schema = create_app(Engine(sampler, 1), read_snapshot(snapshot), 8).openapi()
    assert set(schema["paths"]) == {"/v1/samples", "/v1/models", "/healthz", "/readyz"}
    fields = schema["components"]["schemas"]["SamplesRequest"]["properties"]
    assert all(field.get("description") for field in fields.values())
    assert {"200", "422", "429"} <= set(schema["paths"]["/v1/samples"]["post"]["responses"])


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

    def test_no_snapshot(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"^snapshot=.*: is no snapshot"):
            serve.plan(serve.ServeConfig(snapshot=str(tmp_path)))


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
