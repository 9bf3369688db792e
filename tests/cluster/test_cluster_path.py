"""The whole path over several nodes: submit encode, train and evaluate, then serve; all of it on S3, in one MLflow."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from ldm import storage
from ldm.drawing import load_sampler
from ldm.plan import SamplerConfig
from ldm.snapshot import read_snapshot
from tests.cluster.bed import CPUS, Bed
from tests.cluster.conftest import PICTURES, SHARDS
from tests.pipelines.encoding import config, encode_here
from tests.pipelines.serving import pixels, provenance

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
ENCODE = ("image_size=16", "batch_size=8", "device=cpu")
SHAPE = ("denoiser.hidden_size=16", "denoiser.depth=1", "denoiser.num_heads=2", "denoiser.patch_size=2")
STEPS = ("max_steps=12", "checkpoint_every=6", "log_every=3", "global_batch_size=16", "learning_rate=1e-2")
TRAIN = ("num_workers=2", "zero_stage=2", "device=cpu", *STEPS, *SHAPE)
SETTINGS = {"num_inference_steps": 3, "eta": 0.5, "guidance_scale": 2.0}
ROWS = 8


def test_from_submitted_jobs_to_a_picture(bed: Bed, s3: str, source: str, vae: str) -> None:
    place, own = f"{s3}/path", "tracking.experiment=path"
    latents, output = f"{place}/latents", f"{place}/run"
    report = bed.submit("encode", f"source={source}", f"destination={latents}", f"autoencoder={vae}", *ENCODE, own)
    count = SHARDS * PICTURES
    assert (report["inputs"], report["encoded"], report["shards"]) == (count, count, SHARDS)
    _assert_bytes_of_a_local_encode(s3, latents, vae)
    trained = bed.submit("train", f"latents={latents}", f"output={output}", *TRAIN, own)
    assert (trained["step"], trained["images_seen"]) == (12, 192)
    keys = ("reference=" + source, f"snapshot={trained['snapshot']}", f"output={place}/evaluation")
    few = ("features=vae", "num_images=16", "num_inference_steps=3", "batch_size=8", "through=ray", "device=cpu")
    evaluated = bed.submit("evaluate", *keys, *few, own)
    assert evaluated["num_images"] == 16
    _assert_one_lineage(bed, trained["run_id"], evaluated["run_id"])
    with serving(bed, f"snapshot={output}") as client:
        body = {**SETTINGS, "labels": [1], "seed": 5, "exact": True, "response_format": "png"}
        png = client.post("/v1/samples", json=body).raise_for_status().content
        assert np.array_equal(pixels(png), _drawn_here(trained["snapshot"]))
        assert provenance(png)["weights_sha256"] == read_snapshot(trained["snapshot"]).weights_sha256


@contextmanager
def serving(bed: Bed, *keys: str) -> Iterator[httpx.Client]:
    """`ldm serve` on the cluster, and one who asks it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with bed.ldm("serve", *keys, f"port={port}", f"batch_size={ROWS}", "device=cpu") as command:
        command.until("Ctrl-C stops it")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as client:
            yield client
        command.process.terminate()
        command.ends()


def _assert_bytes_of_a_local_encode(s3: str, latents: str, vae: str) -> None:
    settings = config(f"{s3}/images", f"{s3}/path/local", vae, source=f"{s3}/images/in-00007.tar")
    encode_here(settings, "in-00007")
    for name in ("in-00007.tar", "in-00007.index.parquet"):
        here = storage.read_bytes(f"{s3}/path/local/latents/{name}")
        assert storage.read_bytes(f"{latents}/latents/{name}") == here, name


def _assert_one_lineage(bed: Bed, trained: str, evaluated: str) -> None:
    """Each run of the experiment names what it took from the one before."""
    client = MlflowClient(bed.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("path")
    found = {run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    (encoded,) = found - {trained, evaluated}
    encode, train, evaluate = (client.get_run(run_id) for run_id in (encoded, trained, evaluated))
    names = [run.info.run_name for run in (encode, train, evaluate)]
    assert names == ["encode/latents", "train/run", "evaluate/step-0000000012"]
    assert {run.info.status for run in (encode, train, evaluate)} == {"FINISHED"}
    assert _inputs(encode)["latents"] == _inputs(train)["training"]
    assert _inputs(encode)["source"] == _inputs(evaluate)["reference"]
    (measured,) = evaluate.inputs.model_inputs
    assert measured.model_id in {made.model_id for made in train.outputs.model_outputs}
    points = [point.step for point in client.get_metric_history(trained, "train/loss")]
    assert points == [48, 96, 144, 192]


def _inputs(run: Run) -> dict[str, str]:
    """Digests of the data sets that a run names, by their use."""
    return {data.tags[0].value: data.dataset.digest for data in run.inputs.dataset_inputs}


def _drawn_here(snapshot: str) -> npt.NDArray[np.uint8]:
    """The picture, uint8 (3, H, W), in this process, with as many threads as the replica has cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(CPUS)
    try:
        drawn = load_sampler(snapshot, ROWS // 2, "cpu").draw(
            torch.tensor([1]), torch.tensor([5]), SamplerConfig(**SETTINGS)
        )
    finally:
        torch.set_num_threads(before)
    return np.asarray(drawn)[0]
