"""Training while nodes die, S3 and MLflow are away, a credential expires or the same is begun twice."""

import time
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from ldm.autoencoder import Autoencoder
from pipelines.train.checkpoint import committed_steps
from tests.cluster import processes
from tests.cluster.bed import Bed, Command
from tests.cluster.services import MlflowServer
from tests.cluster.test_cluster_encode import OUTAGE_S, workers
from tests.pictures import kl_model, latent_dataset
from tests.pipelines.training import assert_bitwise, state

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(900)]
STEPS, EVERY, BATCH = 16, 2, 16
TRAIN = (
    f"num_workers=2 max_steps={STEPS} checkpoint_every={EVERY} log_every={EVERY} global_batch_size={BATCH} "
    "micro_batch_size=8 learning_rate=1e-2 device=cpu keep_snapshots=1 validation.grid=0 denoiser.hidden_size=16 "
    "denoiser.depth=1 denoiser.num_heads=2 denoiser.patch_size=1"
).split()
POINTS = [BATCH * step for step in range(EVERY, STEPS + 1, EVERY)]


@pytest.fixture(scope="module")
def latents(s3: str) -> str:
    """A latent dataset on S3."""
    autoencoder = Autoencoder(kl_model())
    latent_dataset(f"{s3}/train/latents", autoencoder, counts=(20, 18, 7))
    autoencoder.save(f"{s3}/train/latents/autoencoder")
    return f"{s3}/train/latents"


@pytest.fixture(scope="module")
def keys(latents: str) -> list[str]:
    return ["train", f"latents={latents}", *TRAIN, "tracking.experiment=faults"]


@pytest.fixture(scope="module")
def undisturbed(whole_bed: Bed, keys: list[str], s3: str) -> dict[str, torch.Tensor]:
    """What the last checkpoint holds of a run that nothing disturbed."""
    whole_bed.make_whole()
    assert whole_bed.run(*keys, f"output={s3}/train/undisturbed")["step"] == STEPS
    return state(f"{s3}/train/undisturbed")


def slow(bed: Bed) -> None:
    """A checkpoint takes seconds, and the next one waits for it: so there is a middle of the run."""
    bed.s3.rage(1.0, kinds=("slow",), delay=0.3, only=lambda method, path: method in ("PUT", "POST"))


def in_the_middle(output: str, command: Command) -> int:
    """Waits for the first checkpoints; the newest one's step."""
    processes.until(lambda: len(committed_steps(output)) >= 2, "the first checkpoints", command.process)
    return max(committed_steps(output))


def assert_as_undisturbed(bed: Bed, output: str, undisturbed: dict[str, torch.Tensor], run_id: str) -> None:
    """The same bits, and each point once."""
    assert_bitwise(state(output), undisturbed)
    client = MlflowClient(bed.environment["MLFLOW_TRACKING_URI"])
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == POINTS
    assert client.get_run(run_id).info.status == "FINISHED"
    experiment = client.get_run(run_id).info.experiment_id
    named = f"attributes.run_name = 'train/{output.rsplit('/', 1)[-1]}'"
    assert len(client.search_runs([experiment], named)) == 1


def test_a_node_dies_while_mlflow_is_down(
    bed: Bed, mlflow_server: MlflowServer, keys: list[str], undisturbed: dict[str, torch.Tensor], s3: str
) -> None:
    """SIGKILL to a node of the workers; the points that MLflow missed are there at the end, each once."""
    slow(bed)
    output = f"{s3}/train/node"
    with bed.ldm(*keys, f"output={output}", "--json") as command:
        in_the_middle(output, command)
        mlflow_server.kill()
        bed.kill_node(next(node for node in bed.nodes if workers(node, "ray::RayTrainWorker")))
        command.until("train: goes on from step")
        mlflow_server.start()
        report = command.reports()
    assert_as_undisturbed(bed, output, undisturbed, report["run_id"])


def test_s3_is_down_for_half_a_minute(bed: Bed, keys: list[str], undisturbed: dict[str, torch.Tensor], s3: str) -> None:
    slow(bed)
    output = f"{s3}/train/outage"
    with bed.ldm(*keys, f"output={output}", "--json") as command:
        in_the_middle(output, command)
        with bed.s3.down():
            time.sleep(OUTAGE_S)
        report = command.reports()
    assert_as_undisturbed(bed, output, undisturbed, report["run_id"])


def test_a_credential_that_expires(bed: Bed, keys: list[str], undisturbed: dict[str, torch.Tensor], s3: str) -> None:
    """One line says it, with exit code 1; the same command goes on from the last checkpoint."""
    slow(bed)
    output = f"{s3}/train/expired"
    with bed.ldm(*keys, f"output={output}") as command:
        step = in_the_middle(output, command)
        bed.s3.rage(1.0, kinds=("expired",))
        said = command.ends(1)
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: training failed: ") and "the last good checkpoint is" in last, said
    assert "expired" in last and "Traceback" not in said, said
    bed.s3.calm()
    with bed.ldm(*keys, f"output={output}", "--json") as command:
        report = command.reports()
    assert int(command.said().split("step-")[1].split(";")[0]) >= step
    assert_as_undisturbed(bed, output, undisturbed, report["run_id"])


def test_two_at_once(bed: Bed, keys: list[str], undisturbed: dict[str, torch.Tensor], s3: str) -> None:
    """The one that began last goes on; the other says so in a line, and ends."""
    slow(bed)
    output = f"{s3}/train/twice"
    one_core = [*keys, f"output={output}", "--json"]
    with bed.ldm(*one_core) as first:
        in_the_middle(output, first)
        with bed.ldm(*one_core) as second:
            said = first.ends(1)
            report = second.reports()
    assert_as_undisturbed(bed, output, undisturbed, report["run_id"])
    assert "has begun" in said.strip().splitlines()[-1], said


def test_the_head_begins_anew(bed: Bed, keys: list[str], undisturbed: dict[str, torch.Tensor], s3: str) -> None:
    """A GCS that keeps nothing takes its jobs along: the command says so and ends; the same command goes on."""
    slow(bed)
    output = f"{s3}/train/head"
    with bed.ldm(*keys, f"output={output}") as command:
        in_the_middle(output, command)
        bed.restart_head()
        said = command.ends(1)
    bed.make_whole()
    report: dict[str, Any] = bed.run(*keys, f"output={output}")
    assert_as_undisturbed(bed, output, undisturbed, report["run_id"])
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and "the same command goes on" in last and "Traceback" not in said, said
