"""`ldm submit` against a real cluster, started by `ray start --head` with its token authentication on."""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from jobs import submit as submit_module
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
    # --block keeps the cluster's processes below this one, so that they are ended by their ids.
    head = subprocess.Popen(
        [
            str(program), "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats",
            "--include-dashboard=true", f"--port={gcs}", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
            "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=200000000",
        ],
        env={**environment, "RAY_AUTH_MODE": "token"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until_it_answers(address, environment)
        yield {**environment, "RAY_ADDRESS": address}
    finally:
        family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        head.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=15)
        for process in alive:
            process.kill()


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
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)

    return run


ENCODE = ["encode", "source=in-0.tar", "destination=latents", "autoencoder=vae", "image_size=16", "device=cpu"]


def test_a_job_encodes_with_relative_paths_and_its_report_comes_back(
    submit: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = submit(*ENCODE, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["encoded"], report["shards"]) == (5, 1)
    assert (tmp_path / "latents" / "manifest.json").exists()
    assert "encode: 5 = 5 encoded + 0 filtered + 0 quarantined" in done.stderr  # the job's log
    assert (tmp_path / "mlflow.db").exists()  # tracked where the one who submits stands


def test_the_exit_code_of_the_job_is_passed_on(
    submit: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "in-0.tar").write_bytes(b"this is no tar" * 100)
    done = submit(*ENCODE, "tracking.enabled=false")
    assert done.returncode == 1, done.stderr
    assert "error: 1 of 1 shards failed" in done.stderr


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

        def get_job_status(self, job_id: str) -> None:
            pytest.fail("the job is followed after Ctrl-C")

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            submit_module._follow(Deaf(), "job", as_json=False)
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
    while "submit: job ldm-encode-" not in (line := process.stderr.readline()):
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
