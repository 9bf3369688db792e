"""The test bed, one for the session: a cluster of four raylets, S3 behind a proxy, MLflow on PostgreSQL."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ldm import storage
from tests.chaos_s3 import chaos_in_front_of
from tests.cluster import processes
from tests.cluster.bed import NODES, Bed
from tests.cluster.services import MlflowServer, PostgreSQL
from tests.conftest import ROOT, _free_port
from tests.pictures import image_shard, kl_model, samples

SHARDS, PICTURES = 12, 12


@pytest.fixture(scope="session")
def bed_folder() -> Iterator[Path]:
    """Short, for Ray's sockets lie in it; open to PostgreSQL's user."""
    with tempfile.TemporaryDirectory(prefix="ldm-bed-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o711)
        yield Path(folder)


@pytest.fixture(scope="session")
def mlflow_server(s3: str, bed_folder: Path) -> Iterator[MlflowServer]:
    """MLflow's server with its runs in PostgreSQL and its artifacts on S3."""
    with ExitStack() as started:
        database = PostgreSQL(bed_folder, _free_port())
        started.callback(processes.end, database.process)
        aws = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
        # Its workers for jobs of its own, seven processes, are of no use here.
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment = {**processes.clean_environment(), **aws, **quiet}
        server = MlflowServer(bed_folder, _free_port(), database.uri, f"{s3}/mlflow", environment)
        started.callback(lambda: processes.end(server.process))
        yield server


@pytest.fixture(scope="session")
def whole_bed(s3: str, bed_folder: Path, mlflow_server: MlflowServer) -> Iterator[Bed]:
    """All of it; what is started is ended by its id, whatever happens."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request to S3
    with ExitStack() as started:
        proxy = started.enter_context(chaos_in_front_of(os.environ["AWS_ENDPOINT_URL"]))
        aws = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
        environment = {
            **processes.clean_environment(), **aws, "AWS_ENDPOINT_URL": proxy.endpoint, "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_URI": mlflow_server.uri, "MLFLOW_EXPERIMENT_NAME": "bed", "LDM_WORKER_LOGS": "",
        }  # fmt: skip
        bed = Bed(bed_folder, proxy, environment)
        started.callback(bed.close)
        bed.start_head()
        for _ in range(NODES):
            bed.add_node()
        yield bed


@pytest.fixture
def bed(whole_bed: Bed) -> Bed:
    """The bed with all its nodes, whatever the test before did to it."""
    whole_bed.make_whole()
    return whole_bed


@pytest.fixture(scope="session")
def source(s3: str) -> str:
    """Image shards on S3, as a brace range."""
    for shard in range(SHARDS):
        image_shard(f"{s3}/images/in-{shard:05d}.tar", samples(PICTURES, start=PICTURES * shard))
    return f"{s3}/images/in-{{00000..{SHARDS - 1:05d}}}.tar"


@pytest.fixture(scope="session")
def vae(s3: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random first stage on S3."""
    folder = tmp_path_factory.mktemp("vae")
    kl_model().save_pretrained(folder)
    for file in folder.iterdir():
        storage.write_bytes(f"{s3}/vae/{file.name}", file.read_bytes())
    return f"{s3}/vae"
