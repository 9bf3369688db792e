"""What serving costs and gains: a load generator on this machine, against the whole deployment (HTTP, Ray, the engine).

    python tests/bench/bench_serve.py PART …      saturated, overhead, poisson, overload, cancels; some minutes each

A DiT of 6 blocks of width 192 on latents (4, 16, 16), pictures of 128 px, random weights, fp32.

saturated: pictures/s of a bulk request over those of the offline sampler in calls of as many rows, in turn.
overhead: one picture over HTTP beside the offline sampler's time for it, in turn.
poisson: requests of 10, 25 or 50 steps, half of them guided, at random moments, at 0.9 of what the engine can do; the
same requests at the same moments to the same model behind `@serve.batch`, which draws groups of like settings.
overload: three times what it can do, for a minute, each request with a deadline.
cancels: 1,000 requests that are given up at random moments.
"""

import asyncio
import contextlib
import json
import random
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from ldm.buckets import measure_buckets
from ldm.denoiser import DenoiserConfig
from ldm.drawing import PictureSampler, load_sampler
from ldm.plan import SamplerConfig
from pipelines import cluster, serve
from tests.pipelines.tiny_snapshot import write_tiny_snapshot

STEPS = (10, 25, 50)
MEAN_ROWS = statistics.mean(STEPS) * 1.5  # half of the requests are guided
SECONDS, DEADLINE_S, CANCELS = 60.0, 10.0, 1000


def write_model(folder: Path) -> str:
    config = DenoiserConfig(hidden_size=192, depth=6, num_heads=3, patch_size=2)
    return write_tiny_snapshot(folder / "snapshot", image_size=128, config=config)


def saturated(url: str) -> dict[str, Any]:
    rows, pictures, ratios, rates = 16, 192, [], []
    settings = SamplerConfig(num_inference_steps=20)
    with deployed(url, batch_size=rows) as endpoint, client(endpoint) as http:
        offline = load_sampler(url, rows, "cpu")
        seeds = torch.arange(pictures)
        for _ in range(7):
            began = time.perf_counter()
            offline.draw(seeds % 10, seeds, settings)
            between = time.perf_counter()
            body = {"num_images": pictures, "num_inference_steps": 20, "response_format": "npy"}
            http.post("/v1/bulk", json=body).raise_for_status()
            ended = time.perf_counter()
            ratios.append((between - began) / (ended - between))
            rates.append(pictures / (ended - between))
    return {"images_per_s": round(statistics.median(rates), 1), **summary("bulk / offline", ratios)}


def overhead(url: str) -> dict[str, Any]:
    settings, extra = SamplerConfig(num_inference_steps=10), []
    with deployed(url, batch_size=8) as endpoint, client(endpoint) as http:
        offline = load_sampler(url, 1, "cpu")  # a single picture is drawn in the bucket of one
        for seed in range(60):
            began = time.perf_counter()
            offline.draw(torch.tensor([seed % 10]), torch.tensor([seed]), settings)
            between = time.perf_counter()
            body = {"seed": seed, "labels": [seed % 10], "num_inference_steps": 10, "response_format": "png"}
            http.post("/v1/samples", json=body).raise_for_status()
            extra.append(1e3 * ((time.perf_counter() - between) - (between - began)))
    return summary("ms beside the sampling", extra[10:])


def poisson(url: str) -> dict[str, Any]:
    sampler = load_sampler(url, 1, "cpu")
    seconds = measure_buckets(sampler)
    rows = max(seconds)
    capacity = rows / seconds[rows] / MEAN_ROWS
    requests = arrivals(0.9 * capacity, SECONDS)
    found: dict[str, Any] = {"rows": rows, "requests_per_s": round(0.9 * capacity, 2), "requests": len(requests)}
    with deployed(url, batch_size=rows, max_waiting=10_000, deadline_s=1e5) as endpoint:
        found["engine"] = asyncio.run(load(endpoint, requests))
    for most in sorted({rows, 16}):
        with batched(url, rows, most) as endpoint:
            name = f"serve.batch of {most}"
            found[name] = asyncio.run(load(endpoint, requests))
        ratio = found["engine"]["answered_per_s"] / found[name]["answered_per_s"]
        found[f"engine / {name}"] = round(ratio, 2)
    return found


def overload(url: str) -> dict[str, Any]:
    sampler = load_sampler(url, 1, "cpu")
    seconds = measure_buckets(sampler)
    rows = max(seconds)
    requests = arrivals(3 * rows / seconds[rows] / MEAN_ROWS, SECONDS)
    with deployed(url, batch_size=rows, deadline_s=DEADLINE_S) as endpoint:
        asyncio.run(load(endpoint, requests[:20]))
        before = memory()
        found = asyncio.run(load(endpoint, requests))
        after = memory()
    return {"deadline_s": DEADLINE_S, **found, "memory_mb_before": before, "memory_mb_after": after}


def cancels(url: str) -> dict[str, Any]:
    generator, kinds = random.Random(0), Counter[str]()

    async def one(http: httpx.AsyncClient, number: int) -> None:
        body = {"seed": number, "num_inference_steps": 20, "num_images": generator.choice([1, 4])}
        if number % 2:  # half hang up, half are deleted
            with contextlib.suppress(httpx.TimeoutException):
                await http.post("/v1/samples", json=body, timeout=generator.uniform(0.01, 1.0))
            kinds["hung up"] += 1
            return
        answer = await http.post("/v1/samples", json={**body, "background": True}, timeout=60)
        if answer.status_code == 429:
            kinds["refused"] += 1
            return
        await asyncio.sleep(generator.uniform(0, 1.0))
        state = (await http.delete(f"/v1/samples/{answer.json()['id']}", timeout=60)).json()
        kinds[state["status"]] += 1

    async def all_of_them() -> float:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=endpoint, trust_env=False, limits=limits) as http:
            for first in range(0, CANCELS, 50):
                await asyncio.gather(*[one(http, number) for number in range(first, first + 50)])
            began = time.perf_counter()
            while (await http.get("/readyz")).json()["waiting"]:
                await asyncio.sleep(0.005)
            empty = time.perf_counter() - began
            (await http.post("/v1/samples", json={"num_inference_steps": 5}, timeout=60)).raise_for_status()
            return empty

    with deployed(url, batch_size=8, max_waiting=500, deadline_s=1e5) as endpoint:
        empty = asyncio.run(all_of_them())
    return {"requests": CANCELS, **kinds, "seconds_until_empty": round(empty, 3)}


def arrivals(rate: float, seconds: float) -> list[tuple[float, dict[str, Any]]]:
    """(moment, body) of requests that come at `rate` a second, the same ones each time."""
    generator, moment, made = random.Random(0), 0.0, []
    while (moment := moment + generator.expovariate(rate)) < seconds:
        body = {"seed": len(made), "labels": [generator.randrange(10)], "response_format": "png"}
        body |= {"num_inference_steps": generator.choice(STEPS), "guidance_scale": generator.choice([1.0, 3.0])}
        made.append((moment, body))
    return made


async def load(endpoint: str, requests: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """Sends each at its moment, whatever became of those before."""
    answered, refused, codes = [], [], Counter[int]()

    async def send(http: httpx.AsyncClient, moment: float, body: dict[str, Any]) -> None:
        await asyncio.sleep(began + moment - time.perf_counter())
        sent = time.perf_counter()
        answer = await http.post("/v1/samples", json=body)
        (answered if answer.status_code == 200 else refused).append(time.perf_counter() - sent)
        codes[answer.status_code] += 1

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=endpoint, trust_env=False, timeout=1800, limits=limits) as http:
        began = time.perf_counter()
        await asyncio.gather(*[send(http, *request) for request in requests])
        took = time.perf_counter() - began
    return {
        "codes": dict(codes),
        "answered_per_s": round(len(answered) / took, 2),
        "answered_p50_s": round(quantile(answered, 0.5), 3),
        "answered_p99_s": round(quantile(answered, 0.99), 3),
        **(
            {
                "refused_p50_ms": round(1e3 * quantile(refused, 0.5)),
                "refused_p99_ms": round(1e3 * quantile(refused, 0.99)),
            }
            if refused
            else {}
        ),
    }


@contextlib.contextmanager
def deployed(url: str, **settings: Any) -> Iterator[str]:
    with serve.deployment(
        serve.ServeConfig(snapshot=url, port=0, refresh_s=0, max_images=10_000, **settings)
    ) as endpoint:
        with client(endpoint) as http:
            for seed in range(20):
                http.post("/v1/samples", json={"seed": seed, "num_inference_steps": 2}).raise_for_status()
        yield endpoint


@contextlib.contextmanager
def batched(url: str, rows: int, most: int) -> Iterator[str]:
    """The same model behind `@serve.batch`: `most` whole requests, of which those of like settings share a call."""
    from ray import serve as ray_serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    @ray_serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 2})
    class Batched:
        def __init__(self) -> None:
            cluster.use_threads(2)
            self.samplers: dict[int, PictureSampler] = {
                2**i: load_sampler(url, 2**i, "cpu") for i in range(rows.bit_length())
            }

        async def __call__(self, request: Any) -> Any:
            from starlette.responses import Response

            return Response(await self.draw(await request.json()), media_type="image/png")

        @ray_serve.batch(max_batch_size=most, batch_wait_timeout_s=0.01)
        async def draw(self, bodies: list[dict[str, Any]]) -> list[bytes]:
            return await asyncio.to_thread(self.draw_all, bodies)

        def draw_all(self, bodies: list[dict[str, Any]]) -> list[bytes]:
            from ldm import images

            groups: dict[tuple[int, float], list[int]] = {}
            for i, body in enumerate(bodies):
                groups.setdefault((body["num_inference_steps"], body["guidance_scale"]), []).append(i)
            drawn: dict[int, bytes] = {}
            for (steps, scale), members in groups.items():
                size = next(
                    size for size in self.samplers if size >= min(len(members), rows if scale == 1 else rows // 2)
                )
                labels, seeds = (torch.tensor([bodies[i][key] for i in members]) for key in ("labels", "seed"))
                settings = SamplerConfig(num_inference_steps=steps, guidance_scale=scale)
                pixels = self.samplers[size].draw(labels[:, 0], seeds, settings)
                drawn |= {i: images.to_png(picture.numpy()) for i, picture in zip(members, pixels, strict=True)}
            return [drawn[i] for i in range(len(bodies))]

    with cluster.ray_session():
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        ray_serve.run(Batched.bind(), route_prefix="/v1/samples")
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            ray_serve.shutdown()


def client(endpoint: str) -> httpx.Client:
    return httpx.Client(base_url=endpoint, trust_env=False, timeout=1800)


def memory() -> int:
    """Resident megabytes of the replica and the frontend."""
    processes = psutil.Process().children(recursive=True)
    return sum(p.memory_info().rss for p in processes if "ServeReplica" in " ".join(p.cmdline())) // 2**20


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summary(name: str, values: list[float]) -> dict[str, Any]:
    return {name: round(statistics.median(values), 3), "from": round(min(values), 3), "to": round(max(values), 3)}


if __name__ == "__main__":
    parts = {"saturated": saturated, "overhead": overhead, "poisson": poisson, "overload": overload, "cancels": cancels}
    if not set(sys.argv[1:]) <= set(parts):
        sys.exit(__doc__)
    for part in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({part: parts[part](write_model(Path(folder)))}), flush=True)
