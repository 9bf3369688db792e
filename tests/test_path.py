"""The whole path at 64 px: encode, 30 ZeRO-2 steps on two workers with a resume, eight pictures over HTTP.

On real photos with a pretrained VAE; and on S3, on made pictures with random weights, which never skips.
"""

import base64
import io
import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import images, storage
from ldm.autoencoder import Autoencoder, load_autoencoder
from ldm.config import parse
from ldm.latents.dataset import LatentDataset
from ldm.shards import ShardReader
from pipelines.encode import EncodeConfig, encode
from pipelines.serve import ServeConfig, deployment
from pipelines.train import TrainConfig, train
from tests.pictures import image_shard, samples, tiny_model

pytestmark = pytest.mark.ray
SIZE = 64


@dataclass(frozen=True)
class Case:
    """count: of the pictures in `source`. place: where everything is written."""

    source: str
    autoencoder: str
    count: int
    place: str


@pytest.fixture(params=["s3", pytest.param("photos", marks=pytest.mark.real_data)])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    if request.param == "photos":
        shared: Path = request.getfixturevalue("shared")
        source = shared / "data" / "grocery" / "train-00000.tar"
        return Case(str(source), str(shared / "models" / "taesd"), 512, str(tmp_path))
    place = f"{request.getfixturevalue('s3')}/path"
    autoencoder = Autoencoder(tiny_model())
    autoencoder.save(storage.join(place, "vae"))
    return Case(image_shard(storage.join(place, "in-00000.tar"), samples(40)), storage.join(place, "vae"), 40, place)


def test_from_shards_to_pictures_over_http(ray_session: None, case: Case) -> None:
    quiet = {"tracking": {"enabled": False}, "device": "cpu"}
    request: dict[str, Any] = {
        "source": case.source,
        "destination": storage.join(case.place, "latents"),
        "autoencoder": case.autoencoder,
        "image_size": SIZE,
    }
    report = encode(parse(EncodeConfig, [("test", {**request, **quiet})]))
    assert (report.inputs, report.encoded, report.quarantined) == (case.count, case.count, 0)
    _assert_stored_latents_decode_as_the_vae_reconstructs(case)

    run: dict[str, Any] = {
        "latents": storage.join(case.place, "latents"),
        "output": storage.join(case.place, "run"),
        "global_batch_size": 16,
        "num_workers": 2,
        "zero_stage": 2,
        "learning_rate": 1e-3,
        "log_every": 5,
        "denoiser": {"hidden_size": 64, "depth": 2, "num_heads": 2},
    }
    first = train(parse(TrainConfig, [("test", {**run, **quiet, "max_steps": 20})]))
    trained = train(parse(TrainConfig, [("test", {**run, **quiet, "max_steps": 30, "resume": "required"})]))
    assert (first.step, trained.step, trained.images_seen) == (20, 30, 480)
    assert trained.loss is not None and trained.loss < 1.5

    with deployment(ServeConfig(snapshot=trained.snapshot, port=0, batch_size=8, device="cpu")) as url:
        answer = _post(f"{url}/v1/samples", {"seeds": list(range(8)), "num_inference_steps": 5})
    assert [picture["seed"] for picture in answer["images"]] == list(range(8))
    drawn = [Image.open(io.BytesIO(base64.b64decode(picture["png"]))) for picture in answer["images"]]
    assert all(picture.size == (SIZE, SIZE) for picture in drawn)
    assert len({picture.tobytes() for picture in drawn}) == 8


def _assert_stored_latents_decode_as_the_vae_reconstructs(case: Case) -> None:
    """A stored fp16 latent loses no more than the VAE's own reconstruction: mean PSNR within 0.1 dB."""
    autoencoder = load_autoencoder(case.autoencoder)
    dataset = LatentDataset(storage.join(case.place, "latents"), global_batch_size=1)
    stored = dataset.all().moments[:, : autoencoder.latent_channels].float()
    photos = torch.from_numpy(np.stack([_decode(sample.picture) for sample in ShardReader(case.source)]))
    from_stored, direct = [], []
    for batch, latent in zip(photos.split(32), stored.split(32), strict=True):
        from_stored.append(_psnr(autoencoder.decode(latent), batch))
        own = autoencoder.encode(batch)[:, : autoencoder.latent_channels]
        direct.append(_psnr(autoencoder.decode(own), batch))
    ours, own_psnr = float(torch.cat(from_stored).mean()), float(torch.cat(direct).mean())
    print(f"PSNR over {len(photos)} pictures: from stored latents {ours:.3f} dB, direct {own_psnr:.3f} dB")
    assert abs(ours - own_psnr) < 0.1


def _decode(data: bytes | None) -> np.ndarray:
    assert data is not None
    return images.decode(data, SIZE)[0]


def _psnr(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) twice => dB (N,)."""
    squared = (found.double() - wanted.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / squared)


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as answer:
        return json.loads(answer.read())
