"""A PNG over HTTP says where it is from, and that draws it again."""

import base64
import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ldm import images
from ldm.drawing import load_sampler
from ldm.plan import SamplerConfig
from ldm.snapshot import read_snapshot
from pipelines.serve.replica import Replica
from tests.pipelines.serving import pixels, pngs, post, provenance, replica
from tests.pipelines.tiny_snapshot import write_tiny_snapshot

SETTINGS = {"num_inference_steps": 3, "eta": 0.5, "guidance_scale": 2.0}
ROWS = 8


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_snapshot(tmp_path_factory.mktemp("provenance") / "snapshot")


@pytest.fixture(scope="module")
def served(snapshot: str) -> Iterator[Replica]:
    with replica(snapshot) as made:
        yield made


def test_a_png_names_what_draws_it_again(served: Replica, snapshot: str) -> None:
    (png,) = pngs(post(served, {**SETTINGS, "labels": ["two"], "seed": 10, "spacing": "trailing", "exact": True}))
    about = provenance(png)
    values = {**about["settings"]}
    rows = {key: values.pop(key) for key in ("exact", "batch_size", "precision", "compile", "device")}
    assert rows == {"exact": True, "batch_size": ROWS // 2, "precision": "fp32", "compile": False, "device": "cpu"}
    of = read_snapshot(snapshot)
    assert (about["weights_sha256"], about["step"]) == (of.weights_sha256, of.step)
    sampler = load_sampler(snapshot, rows["batch_size"], rows["device"])
    label, seed = torch.tensor([about["label"]]), torch.tensor([about["seed"]])
    assert np.array_equal(pixels(png), sampler.draw(label, seed, SamplerConfig(**values))[0].numpy())


def test_a_png_of_a_walk_names_its_ends_and_one_of_a_picture_that(served: Replica) -> None:
    walk = pngs(post(served, {"seed": 3, "seed_to": 8, "num_images": 2, "num_inference_steps": 2}))
    settings = provenance(walk[1])["settings"]
    assert (settings["seed_from"], settings["seed_to"], settings["num_images"]) == (3, 8, 2)
    given = images.to_png(np.zeros((3, 32, 32), np.uint8))
    body = {"picture": base64.b64encode(given).decode(), "num_inference_steps": 2}
    settings = provenance(pngs(post(served, body))[0])["settings"]
    assert settings["picture_sha256"] == hashlib.sha256(given).hexdigest()
    assert settings["strength"] == 0.6
