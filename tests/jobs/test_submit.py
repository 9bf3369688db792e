"""`ldm submit` against a real cluster, started by `ray start --head` with its token authentication on."""

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import follow as follow_module
from jobs.preflight import Cluster, _get
from pipelines.train.checkpoint import committed_steps
from tests.jobs.test_interrupt import training
from tests.pictures import image_shard, kl_model, samples

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of somebody who may submit: the address and the token of a cluster on loopback."""
    from tests.conftest import _free_port

    folder = tmp_path_factory.mktemp("cluster")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": str(ROOT), "LDM_WORKER_LOGS": ""}
    gcs, dashboard, client, agent = (_free_port() for _ in range(4))
    program = Path(sys.executable).with_name("ray")
    # A job finds its cluster through a file in the temporary folder: another cluster of this machine must not write it.
    # Not below `folder`, for the path of a socket has at most 107 characters.
    own = tempfile.mkdtemp(prefix="ray-")
    # --block keeps the cluster's processes below this one, so that they are ended by their ids.
    head = subprocess.Popen(
        [
            str(program), "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats",
            "--include-dashboard=true", f"--port={gcs}", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
            "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=200000000", f"--temp-dir={own}",
        ],
        env={**environment, "RAY_AUTH_MODE": "token"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until_it_answers(address, environment)
        yield {**environment, "RAY_ADDRESS": address, "RAY_GCS": f"127.0.0.1:{gcs}", "RAY_FOLDER": str(own)}
    finally:
        _end(head)
        shutil.rmtree(own, ignore_errors=True)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """A node of the cluster: its family, by its ids."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=15)
    for one in alive:
        one.kill()


@pytest.fixture
def jobs_client(cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Who asks the cluster about its jobs, beside `ldm submit`."""
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.setenv(name, cluster[name])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient

    # Its token as a header: what Ray itself read of the environment stays as it was first read in this process.
    token = Path(cluster["RAY_AUTH_TOKEN_PATH"]).read_text()
    return JobSubmissionClient(cluster["RAY_ADDRESS"], headers={"Authorization": f"Bearer {token}"})


def _wait_until_it_answers(address: str, environment: dict[str, str]) -> None:
    import requests

    headers = {"Authorization": f"Bearer {Path(environment['RAY_AUTH_TOKEN_PATH']).read_text()}"}
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if requests.get(f"{address}/api/version", headers=headers, timeout=5).ok:
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.3)
    raise TimeoutError(f"{address} did not answer within 120 s")


@pytest.fixture
def submit(cluster: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `ldm submit …` from a folder of its own."""
    image_shard(tmp_path / "in-0.tar", samples(5))
    kl_model().save_pretrained(tmp_path / "vae")

    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobs.cli", "submit", *arguments]
        environment = {**cluster, **changes}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=500)

    return run


ENCODE = ["encode", "source=in-0.tar", "destination=latents", "autoencoder=vae", "image_size=16", "device=cpu"]


SECRETS = {name: f"never-sent-{name}" for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")}


def test_of_two_at_once_one_wins_and_both_report(
    submit: Callable[..., subprocess.CompletedProcess[str]], jobs_client: Any, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2) as both:
        ends = [end.result() for end in [both.submit(submit, *ENCODE, "--json", **SECRETS) for _ in range(2)]]
    for done in ends:
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert (report["encoded"], report["shards"]) == (5, 1)
        assert "encode: 5 = 5 encoded + 0 filtered + 0 quarantined" in done.stderr  # the job's log, from its beginning
        assert re.search(r"job: Python 3\.\d+.*ldm, pipelines, jobs come from \S+_ray_pkg_\w+ on ", done.stderr)
        assert "the entry point runs on the head node" in done.stderr or "attached to it" in done.stderr
    (details,) = (job for job in jobs_client.list_jobs() if job.submission_id.startswith("encode-latents-"))
    assert re.fullmatch(r"encode-latents-[0-9a-f]{8}-a1", details.submission_id)
    begun = [f"submit: job {details.submission_id} on " in done.stderr for done in ends]
    attached = [bool(re.search(r"-a1 is \w+ on \S+ already: attached to it", done.stderr)) for done in ends]
    assert sorted(begun) == sorted(attached) == [False, True] and begun != attached
    assert details.runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "300"
    assert not any(secret in str(details) for secret in SECRETS.values())
    assert (tmp_path / "latents" / "manifest.json").exists()
    assert (tmp_path / "mlflow.db").exists()  # tracked where the one who submits stands


def test_the_exit_code_of_the_job_is_passed_on(
    submit: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "in-0.tar").write_bytes(b"this is no tar" * 100)
    for attempt in (1, 2):  # Ray takes an id once
        done = submit(*ENCODE, "tracking.enabled=false", "max_tries=1", "--name", "broken")
        assert done.returncode == 1, done.stderr
        assert "error: 1 of 1 shards failed" in done.stderr and f"submit: job broken-a{attempt} on " in done.stderr


def test_without_the_token_nothing_is_submitted(
    submit: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong-token"
    wrong.write_text(secrets.token_hex(32))
    done = submit(*ENCODE, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert done.returncode == 2
    assert done.stderr.startswith("error: --address=http://127.0.0.1:") and done.stderr.count("\n") == 1


def test_ctrl_c_is_never_lost_in_what_is_awaited() -> None:
    class Deaf:
        """A stream that ends where it is cancelled."""

        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            os.kill(os.getpid(), signal.SIGINT)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            yield ""

        def get_job_info(self, job_id: str) -> None:
            pytest.fail("the job is followed after Ctrl-C")

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(follow_module.Detached):
            follow_module.follow(Deaf(), "job", "http://127.0.0.1:8265")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.faults
def test_ctrl_c_detaches_and_says_how_to_follow(cluster: dict[str, str], tmp_path: Path) -> None:
    image_shard(tmp_path / "in-0.tar", samples(5))
    kl_model().save_pretrained(tmp_path / "vae")
    command = [sys.executable, "-m", "jobs.cli", "submit", *ENCODE, "tracking.enabled=false"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=cluster
    )
    assert process.stderr is not None
    while "submit: job encode-latents-" not in (line := process.stderr.readline()):
        assert line, "the job was never submitted"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert "detached, the job goes on" in rest and "ray job logs --follow --address" in rest
    deadline = time.monotonic() + 120
    while not (tmp_path / "latents" / "manifest.json").exists():
        assert time.monotonic() < deadline, "the job did not go on"
        time.sleep(0.5)


@pytest.mark.faults
def test_a_training_that_is_stopped_keeps_its_checkpoint(
    submit: Callable[..., subprocess.CompletedProcess[str]], jobs_client: Any, tmp_path: Path, cluster: dict[str, str]
) -> None:
    model = "denoiser.hidden_size=16 denoiser.depth=1 denoiser.num_heads=2 denoiser.patch_size=1"
    done = submit(*training(tmp_path, *model.split()), "--no-wait", "--name", "stopped")
    assert done.returncode == 0 and "stop:   RAY_AUTH_MODE=token ray job stop --address" in done.stderr, done.stderr
    _until(lambda: "first step after" in jobs_client.get_job_logs("stopped-a1"))
    stop = done.stderr.rpartition("stop:   RAY_AUTH_MODE=token ray ")[2].split()
    program = str(Path(sys.executable).with_name("ray"))
    subprocess.run([program, *stop], env={**cluster, "RAY_AUTH_MODE": "token"}, timeout=120, check=True)
    assert jobs_client.get_job_status("stopped-a1").value == "STOPPED"
    (step,) = committed_steps(str(tmp_path / "run"))
    assert f"train: stopped at step {step:,} with the checkpoint" in jobs_client.get_job_logs("stopped-a1")


@pytest.mark.faults
def test_with_two_nodes_the_entry_point_is_on_the_worker_and_a_local_source_is_refused(
    submit: Callable[..., subprocess.CompletedProcess[str]], jobs_client: Any, cluster: dict[str, str], tmp_path: Path
) -> None:
    from tests.conftest import _free_port

    program = str(Path(sys.executable).with_name("ray"))
    ports = [f"--dashboard-agent-listen-port={_free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
    ports.append(f"--temp-dir={cluster['RAY_FOLDER']}")  # as on machines of one image: the same path on each node
    node = subprocess.Popen(
        [program, "start", "--block", f"--address={cluster['RAY_GCS']}", "--num-cpus=2", *ports],
        env={**cluster, "RAY_AUTH_MODE": "token"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _until(lambda: len(_workers(jobs_client)) == 1)
        done = submit(*ENCODE, "--name", "two-nodes", "tracking.enabled=false")
        assert done.returncode == 2, done.stderr
        assert f"error: source={tmp_path}/in-0.tar: lies on a disk of one node (" in done.stderr
        assert not (tmp_path / "latents").exists()
        (worker,) = _workers(jobs_client)
        assert jobs_client.get_job_info("two-nodes-a1").driver_node_id == worker["node_id"]
    finally:
        _end(node)


def _workers(jobs_client: Any) -> tuple[dict[str, Any], ...]:
    """The nodes besides the head, asked for with the client's token: Ray reads that of a process only once."""
    nodes = _get(jobs_client, "/api/v0/nodes?detail=1&limit=10000")["result"]["result"]
    return Cluster(jobs_client, "", tuple(node for node in nodes if node["state"] == "ALIVE")).workers


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, "never came to hold"
        time.sleep(0.3)


@pytest.mark.faults
def test_a_pipeline_of_jobs_skips_in_its_job_what_is_there(
    submit: Callable[..., subprocess.CompletedProcess[str]], cluster: dict[str, str], tmp_path: Path
) -> None:
    keys = dict(pair.split("=") for pair in ENCODE[1:]) | {"tracking": {"enabled": False}}
    (tmp_path / "pipeline.yaml").write_text(json.dumps({"encode": keys, "verify": {"level": "quick"}}))
    command = [sys.executable, "-m", "jobs.cli", "run", "pipeline.yaml", "--json", "--address", cluster["RAY_ADDRESS"]]
    for skipped in (False, True):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=cluster, timeout=500)
        assert done.returncode == 0, done.stderr
        encode, verify = json.loads(done.stdout)["steps"]
        assert (encode["step"], encode["skipped"], encode["report"]["encoded"]) == ("encode", skipped, 5)
        assert (verify["step"], verify["skipped"], verify["report"]["ok"]) == ("verify", False, True)
