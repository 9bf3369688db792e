"""What all tests share: the real data, one Ray for the session, free ports."""

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos_s3 import ChaosProxy, chaos_in_front_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with the real pictures and weights; skips where there is none."""
    place = Path(os.environ.get("LDM_SHARED") or ROOT.parent / "shared")
    if not (place / "data").is_dir():
        pytest.skip(f"no real data: {place}/data is missing; set LDM_SHARED to the directory above data/")
    return place


@pytest.fixture(scope="session")
def ray_session(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray with 4 logical CPUs for all tests that are marked `ray`; begun at the first use.

    It begins after the S3 server, so that its workers know where that is.
    """
    import ray

    with pytest.MonkeyPatch.context() as patch:
        # Ray turns its token on by itself, but only where nothing in this process has said so before.
        patch.delenv("RAY_AUTH_MODE", raising=False)
        patch.setenv("LDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYTHONPATH", str(ROOT / "examples"), prepend=os.pathsep)  # a denoiser of one's own
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=512 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function that names a TCP port of this machine that was free a moment ago."""
    return _free_port


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URL of an empty bucket of an S3 server in this process, which the `AWS_*` variables point to."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=_free_port(), verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import boto3

        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture
def chaos_s3(s3: str) -> Iterator[ChaosProxy]:
    """A calm proxy in front of the S3 server of `s3`, which `AWS_ENDPOINT_URL` points to during the test.

    It holds for this process and for what it starts. The workers of a Ray that runs already have the environment of
    its start: give them `runtime_env={"env_vars": {"AWS_ENDPOINT_URL": chaos_s3.endpoint}}`.
    """
    from s3fs import S3FileSystem

    with chaos_in_front_of(os.environ["AWS_ENDPOINT_URL"]) as chaos, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", chaos.endpoint)
        S3FileSystem.clear_instance_cache()  # they go on with the endpoint that they met
        yield chaos
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts a file system of its own with these options; needs the right to mount."""
    mounted = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no right to mount a small disk here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)
