"""The HTTP interface without Ray: the pictures of the offline sampler, and one line for what is wrong."""

import asyncio
import base64
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from ldm import images
from ldm.drawing import Blend, Edit, load_sampler
from ldm.latents.manifest import Conditioning
from ldm.plan import SamplerConfig
from pipelines.serve.gate import MAX_BODY
from pipelines.serve.local import local_app
from pipelines.serve.replica import Replica
from tests.pipelines.serving import pixels, pngs, post, provenance, read_events, replica, within
from tests.pipelines.tiny_snapshot import NAMES, write_tiny_snapshot

SETTINGS = {"num_inference_steps": 3, "eta": 0.5, "guidance_scale": 2.0}
ROWS = 8


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_snapshot(tmp_path_factory.mktemp("serve") / "snapshot")


@pytest.fixture(scope="module")
def served(snapshot: str) -> Iterator[Replica]:
    """Refuses pictures of more than 8, steps of more than 100."""
    with replica(snapshot, max_images=8, max_steps=100) as made:
        yield made


def offline(
    snapshot: str, labels: list[int], seeds: list[int], source: Any = None, **settings: Any
) -> npt.NDArray[np.uint8]:
    """By the sampler of `ldm sample`, in calls of as many rows."""
    config = SamplerConfig(**{**SETTINGS, **settings})
    sampler = load_sampler(snapshot, ROWS if config.guidance_scale == 1 else ROWS // 2, "cpu")
    return sampler.draw(torch.tensor(labels), torch.tensor(seeds), config, source).numpy()


def drawn(answer: httpx.Response) -> npt.NDArray[np.uint8]:
    """uint8 (N, 3, H, W)."""
    return np.stack([pixels(png) for png in pngs(answer)])


class TestPictures:
    def test_json_names_what_makes_a_picture_again(self, served: Replica, snapshot: str) -> None:
        answer = post(served, {**SETTINGS, "labels": ["two", 7], "seed": 10, "num_images": 3, "exact": True})
        body = answer.raise_for_status().json()
        assert (body["status"], body["model"], body["step"]) == ("done", "snapshot", 30)
        assert [(p["index"], p["seed"], p["label"]) for p in body["images"]] == [(0, 10, 2), (1, 11, 7), (2, 12, 2)]
        expected = offline(snapshot, [2, 7, 2], [10, 11, 12])
        assert np.array_equal(drawn(answer), expected)

    def test_png_is_one_picture(self, served: Replica, snapshot: str) -> None:
        body = {**SETTINGS, "labels": [4], "seeds": [5], "response_format": "png", "exact": True}
        answer = post(served, body).raise_for_status()
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-model-step"] == "30"
        assert np.array_equal(pixels(answer.content), offline(snapshot, [4], [5])[0])

    def test_urls_are_links_to_the_same_bytes(self, served: Replica) -> None:
        async def ask(client: httpx.AsyncClient) -> None:
            body = {**SETTINGS, "num_images": 2, "exact": True}
            inline = pngs(await client.post("/v1/samples", json=body))
            linked = (await client.post("/v1/samples", json={**body, "response_format": "urls"})).json()["images"]
            assert all(set(picture) == {"index", "seed", "label", "url"} for picture in linked)
            assert [(await client.get(picture["url"])).content for picture in linked] == inline

        within(served, ask)

    def test_the_same_bytes_alone_and_in_a_full_mixed_batch(self, served: Replica) -> None:
        """Of the same padded bucket, which is what `exact` gives."""
        mixed = [
            {"seed": seed, "num_inference_steps": 3 + seed % 4, "guidance_scale": [1, 2.5][seed % 2], "exact": True}
            for seed in range(12)
        ]

        async def together(client: httpx.AsyncClient) -> list[list[bytes]]:
            answers = await asyncio.gather(*[client.post("/v1/samples", json=body) for body in mixed])
            return [pngs(answer) for answer in answers]

        assert within(served, together) == [pngs(post(served, body)) for body in mixed]

    def test_interpolation_goes_from_seed_to_seed(self, served: Replica, snapshot: str) -> None:
        body = {"seed": 3, "seed_to": 8, "num_images": 5, "labels": [1], "num_inference_steps": 3, "exact": True}
        blend = Blend(torch.full((5,), 3), torch.full((5,), 8), torch.arange(5) / 4)
        expected = offline(snapshot, [1] * 5, [3] * 5, blend, eta=0, guidance_scale=1)
        assert np.array_equal(drawn(post(served, body)), expected)

    def test_image_to_image_starts_from_the_picture(self, served: Replica, snapshot: str) -> None:
        given = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
        picture = base64.b64encode(images.to_png(given)).decode()
        body = {**SETTINGS, "picture": picture, "strength": 0.7, "labels": [1], "seeds": [5], "exact": True}
        expected = offline(snapshot, [1], [5], Edit(torch.from_numpy(given)[None], 0.7))
        assert np.array_equal(drawn(post(served, body)), expected)

    def test_bulk_is_a_tar_in_order_with_the_offline_bytes(self, served: Replica, snapshot: str) -> None:
        body = {**SETTINGS, "num_images": 150, "seed": 7, "response_format": "npy"}  # three parts
        answer = post(served, body, "/v1/bulk").raise_for_status()
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
            members = [(m.name, np.load(io.BytesIO(tar.extractfile(m).read()))) for m in tar]  # type: ignore[union-attr]
        assert [name for name, _ in members] == [f"{i:08d}.npy" for i in range(150)]
        expected = offline(snapshot, [i % 10 for i in range(150)], list(range(7, 157)))
        assert np.array_equal(np.stack([member for _, member in members]), expected)

    def test_bulk_takes_labels_and_seeds_of_each_picture(self, served: Replica, snapshot: str) -> None:
        seeds, labels = [(7 * i) % 1000 for i in range(70)], [(3 * i) % 10 for i in range(70)]
        answer = post(served, {**SETTINGS, "seeds": seeds, "labels": labels}, "/v1/bulk").raise_for_status()
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
            found = [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
        assert np.array_equal(np.stack([pixels(png) for png in found]), offline(snapshot, labels, seeds))
        assert [provenance(png)["seed"] for png in found] == seeds

    def test_an_unconditional_model_takes_no_label_and_no_guidance(self, tmp_path: Path) -> None:
        with replica(write_tiny_snapshot(tmp_path / "plain", Conditioning())) as made:
            drawn = post(made, {"num_inference_steps": 2, "num_images": 2}).raise_for_status().json()
            assert ["label" in picture for picture in drawn["images"]] == [False, False]
            assert "labels=3: the model is unconditional" in post(made, {"labels": [3]}).json()["detail"]
            assert "guidance_scale=2.0: the model is" in post(made, {"guidance_scale": 2}).json()["detail"]


class TestFollowing:
    def test_events_show_pictures_form_and_late_ones_learn_the_same(self, served: Replica) -> None:
        async def ask(client: httpx.AsyncClient) -> None:
            body = {"num_inference_steps": 12, "num_images": 2, "previews": 3, "background": True}
            answer = await client.post("/v1/samples", json=body)
            assert answer.status_code == 202
            id, url = answer.json()["id"], answer.json()["events"]
            async with client.stream("GET", url) as stream:
                told = [event async for event in read_events(stream)]
            kinds = [kind for kind, _ in told]
            assert kinds[-1] == "done" and kinds.count("preview") == 6 and kinds.count("picture") == 2
            previews = [(data["index"], data["steps_done"]) for kind, data in told if kind == "preview"]
            assert sorted(previews) == [(index, step) for index in (0, 1) for step in (3, 6, 9)]
            steps = [data["steps_done"] for kind, data in told if kind == "progress"]
            assert steps == sorted(steps) and steps[-1] == 24
            drawn = {data["index"]: base64.b64decode(data["png"]) for kind, data in told if kind == "picture"}
            assert Image.open(io.BytesIO(drawn[0])).size == (32, 32)

            async with client.stream("GET", url) as stream:  # again, when all is over
                late = [event async for event in read_events(stream)]
            assert [kind for kind, _ in late] == ["picture", "picture", "progress", "done"]
            state = (await client.get(f"/v1/samples/{id}")).json()
            assert (state["status"], state["steps_done"], state["images_done"]) == ("done", 24, 2)
            assert (await client.get(state["images"][1]["url"])).content == drawn[1]

        within(served, ask)

    def test_delete_cancels_at_the_next_step(self, served: Replica) -> None:
        async def ask(client: httpx.AsyncClient) -> None:
            body = {"num_inference_steps": 100, "num_images": 8, "background": True, "guidance_scale": 2}
            answer = (await client.post("/v1/samples", json=body)).json()
            deleted = await client.delete(f"/v1/samples/{answer['id']}")
            assert deleted.json()["status"] == "cancelled"
            await asyncio.wait_for(_empty(served), 5)
            async with client.stream("GET", answer["events"]) as stream:
                assert [kind async for kind, _ in read_events(stream)][-1] == "cancelled"
            again = await client.delete(f"/v1/samples/{answer['id']}")
            assert again.json()["status"] == "cancelled"

        within(served, ask)

    def test_hanging_up_cancels(self, served: Replica) -> None:
        async def ask(client: httpx.AsyncClient) -> None:
            body = {"num_inference_steps": 100, "num_images": 8}
            for path in ("/v1/samples", "/v1/bulk"):
                waiting = asyncio.create_task(client.post(path, json=body))
                while not served.waiting:
                    await asyncio.sleep(0.001)
                waiting.cancel()
                await asyncio.wait_for(_empty(served), 5)

        within(served, ask)

    def test_what_is_done_stays_done(self, served: Replica) -> None:
        async def ask(client: httpx.AsyncClient) -> None:
            answer = (await client.post("/v1/samples", json={"num_inference_steps": 1})).json()
            assert (await client.delete(f"/v1/samples/{answer['id']}")).json()["status"] == "done"

        within(served, ask)


async def _empty(made: Replica) -> None:
    while made.waiting:
        await asyncio.sleep(0.001)


def _bomb() -> str:
    """A PNG of 400 kB that says it is of 60,000 x 60,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100 * 2**20))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return base64.b64encode(png).decode()


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "detail"),
        [
            ({"labels": [10]}, "labels=10: is no class of this model; give 0 to 9"),
            ({"labels": ["ten"]}, "labels=ten: is no class of this model; give 0 to 9, or zero, one"),
            ({"labels": ["²"]}, "labels=²: is no class of this model"),
            ({"labels": [True]}, "labels.0=true: "),
            ({"labels": []}, "labels=[]: "),
            ({"prompt": "a cat"}, "prompt: this model knows classes, not texts; give labels"),
            ({"seeds": [1, -1]}, "seeds.1=-1: input should be greater than or equal to 0"),
            ({"seed": 2**53}, "seed=9007199254740992: "),
            ({"seed": 2**53 - 1, "num_images": 2}, "seed=9007199254740991: the last picture's would be above"),
            ({"seed": 1.5}, "seed=1.5: "),
            ({"seed": 1, "seeds": [1]}, "seeds: stands with seed"),
            ({"seeds": [1, 2], "num_images": 3}, "num_images=3: 2 seeds are given; leave it out"),
            ({"num_images": 0}, "num_images=0: "),
            ({"num_images": 9}, "num_images=9: the most in one request is 8; use /v1/bulk"),
            ({"num_images": 10**30}, "num_images=1"),
            ({"num_inference_steps": -1}, "num_inference_steps=-1: "),
            ({"num_inference_steps": 101}, "num_inference_steps=101: the most here is 100"),
            ({"eta": 1.5}, "eta=1.5: must be from 0"),
            ({"guidance_scale": -1}, "guidance_scale=-1: "),
            ({"sampler": "euler"}, "sampler=euler: is for a flow"),
            ({"size": 64}, "size=64: this model draws [32, 32] alone"),
            ({"size": [32, 64]}, "size=[32, 64]: this model draws"),
            ({"model": "../../etc/passwd"}, "model=../../etc/passwd: is not served here; give snapshot"),
            ({"model": "/etc/passwd"}, "model=/etc/passwd: is not served here"),
            ({"picture": "%%%"}, "picture=%%%…: is no base64"),
            ({"picture": base64.b64encode(b"GIF89a").decode()}, "picture: cannot be read as a picture"),
            ({"picture": _bomb()}, "picture: cannot be read as a picture"),
            ({"strength": 0.5}, "strength=0.5: is of a picture"),
            ({"num_images": 2, "response_format": "png"}, "response_format=png: holds one picture, not 2"),
            ({"response_format": "png", "background": True}, "response_format=png: comes at the end"),
            ({"previews": 21}, "previews=21: "),
            ({"deadline_s": 0}, "deadline_s=0: "),
            ({"stepps": 3}, "stepps=3: "),
            (b"{", "body: is no JSON"),
            (b'{"eta": NaN}', "eta=NaN: "),
            (b'{"guidance_scale": Infinity}', "guidance_scale=Infinity: "),
            (b'{"deadline_s": NaN}', "deadline_s=NaN: "),
            (b"[" * 100_000, "body: is no JSON"),
            ([1], "input should be a valid dictionary"),
        ],
        ids=lambda value: str(value)[:40] if not isinstance(value, str) else "",
    )
    def test_a_wrong_request_names_its_field(self, served: Replica, body: Any, detail: str) -> None:
        answer = post(served, body)
        assert answer.status_code == 422, answer.text
        assert detail.lower() in answer.json()["detail"].lower()
        assert "\n" not in answer.json()["detail"]
        assert len(answer.json()["detail"]) < 500

    def test_bulk_is_refused_before_it_begins(self, served: Replica) -> None:
        answer = post(served, {"labels": [10], "num_images": 500}, "/v1/bulk")
        assert (answer.status_code, answer.json()["detail"][:10]) == (422, "labels=10:")

    @pytest.mark.parametrize("announced", [True, False])
    def test_a_body_without_bounds_is_not_read(self, served: Replica, announced: bool) -> None:
        async def ask(client: httpx.AsyncClient) -> tuple[httpx.Response, int]:
            sent = 0

            async def much() -> Any:
                nonlocal sent
                for _ in range(100):
                    sent += 2**20
                    yield bytes(2**20)

            headers = {"content-type": "application/json"} | ({"content-length": str(100 * 2**20)} if announced else {})
            return await client.post("/v1/samples", content=much(), headers=headers), sent

        answer, sent = within(served, ask)
        assert (answer.status_code, answer.json()["detail"]) == (413, f"body: the most is {MAX_BODY} bytes")
        assert sent <= MAX_BODY + 2**21

    def test_unknown_ids(self, served: Replica) -> None:
        async def ask(client: httpx.AsyncClient) -> None:
            for method, path in [("GET", "x"), ("GET", "x/events"), ("GET", "x/0.png"), ("DELETE", "x")]:
                answer = await client.request(method, f"/v1/samples/{path}")
                assert (answer.status_code, answer.json()["detail"][:5]) == (404, "id=x:")
            drawn = (await client.post("/v1/samples", json={"num_inference_steps": 1})).json()
            assert (await client.get(f"/v1/samples/{drawn['id']}/5.png")).status_code == 404
            for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/nothing.js"):
                assert (await client.get(path)).status_code == 404

        within(served, ask)

    def test_a_model_without_a_null_class_is_not_guided(self, snapshot: str) -> None:
        with replica(snapshot) as made:
            version = made._default.version
            described = replace(version.snapshot, denoiser={**version.snapshot.denoiser, "label_dropout": 0.0})
            made._default.version = replace(version, snapshot=described)
            detail = post(made, {"guidance_scale": 2}).json()["detail"]
        assert detail.startswith("guidance_scale=2.0: the model was trained without the null class")


class TestToken:
    TOKEN = "correct horse"

    def test_without_it_nothing_is_drawn(self, served: Replica) -> None:
        async def ask(client: httpx.AsyncClient) -> None:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": self.TOKEN}):
                for method, path in [("POST", "/v1/samples"), ("POST", "/v1/bulk"), ("GET", "/v1/models")]:
                    answer = await client.request(method, path, json={}, headers=headers)
                    assert answer.status_code == 401
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert "authorization: is not" in answer.json()["detail"]
            assert (await client.get("/healthz")).status_code == 200
            bearing = {"authorization": f"Bearer {self.TOKEN}"}
            assert (await client.get("/v1/models", headers=bearing)).status_code == 200

        within(served, ask, token_sha256=hashlib.sha256(self.TOKEN.encode()).hexdigest())


class TestOverload:
    def test_what_does_not_fit_is_told_when_to_come_again_while_probes_are_answered(self, snapshot: str) -> None:
        with replica(snapshot, max_waiting=2) as made:
            gate, denoise = threading.Event(), made._default.engine.sampler.denoise
            made._default.engine.sampler.denoise = lambda *given: (gate.wait(60), denoise(*given))[1]  # type: ignore[method-assign]

            async def ask(client: httpx.AsyncClient) -> None:
                taken = [asyncio.create_task(client.post("/v1/samples", json=SETTINGS)) for _ in range(2)]
                while made.waiting < 2:
                    await asyncio.sleep(0.001)
                refused = await client.post("/v1/samples", json=SETTINGS)
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert (await client.get("/readyz")).json() == {"status": "ready", "waiting": 2}
                assert (await client.get("/healthz")).status_code == 200
                gate.set()
                assert [answer.status_code for answer in await asyncio.gather(*taken)] == [200, 200]

            within(made, ask)

    def test_a_deadline_that_cannot_be_kept_is_refused_at_once(self, served: Replica) -> None:
        answer = post(served, {"num_images": 8, "num_inference_steps": 100, "deadline_s": 0.001})
        assert answer.status_code == 429
        assert answer.json()["detail"].startswith("the deadline could not be kept")

    def test_a_deadline_that_passes_is_told(self, snapshot: str) -> None:
        with replica(snapshot) as made:
            engine = made._default.engine
            denoise = engine.sampler.denoise
            engine.sampler.denoise = lambda *given: (threading.Event().wait(0.2), denoise(*given))[1]  # type: ignore[method-assign]
            answer = post(made, {"num_inference_steps": 20, "deadline_s": 0.5})
        assert (answer.status_code, answer.json()["detail"][:11]) == (504, "deadline_s:")

    def test_a_failure_is_told_and_the_next_one_served(self, snapshot: str) -> None:
        with replica(snapshot) as made:
            engine = made._default.engine
            denoise = engine.sampler.denoise
            engine.sampler.denoise = lambda *given: denoise(given[0][:, :1], *given[1:])  # type: ignore[method-assign]
            answer = post(made, {})
            assert (answer.status_code, answer.json()["detail"][:13]) == (500, "RuntimeError:")
            engine.sampler.denoise = denoise  # type: ignore[method-assign]
            assert post(made, SETTINGS).status_code == 200


def test_what_is_served_is_described(served: Replica, snapshot: str) -> None:
    async def ask(client: httpx.AsyncClient) -> Any:
        return (await client.get("/v1/models")).json()

    described = within(served, ask)
    (model,) = described["models"]
    assert (model["name"], model["default"], model["loaded"], model["snapshot"]) == ("snapshot", True, True, snapshot)
    assert (model["step"], model["images_seen"], model["image_size"]) == (30, 960, 32)
    assert (model["num_classes"], model["classes"], model["guidance"]) == (10, list(NAMES), True)
    assert model["samplers"] == ["ddim", "ddpm", "dpmpp_2m"]
    drawn_by = {"precision": "fp32", "compile": False, "device": "cpu"}
    limits = {"max_images": 8, "max_steps": 100, "batch_size": 8, "deadline_s": 600.0}
    assert described["limits"] == limits | drawn_by


def test_openapi_describes_every_field(served: Replica) -> None:
    schema = local_app(served).openapi()
    paths = {"/v1/samples", "/v1/samples/{id}", "/v1/samples/{id}/events", "/v1/samples/{id}/{index}.png", "/v1/bulk"}
    assert set(schema["paths"]) == paths | {"/v1/models", "/healthz", "/readyz"}
    for name in ("SamplesRequest", "BulkRequest"):
        fields = schema["components"]["schemas"][name]["properties"]
        assert all(field.get("description") for field in fields.values())
    assert {"200", "202", "401", "413", "422", "429"} <= set(schema["paths"]["/v1/samples"]["post"]["responses"])
