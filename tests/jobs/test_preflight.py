"""What is asked before a job is sent, and in a job before its stage: one line for each thing that does not fit."""

import os
import platform
from pathlib import Path

import pytest
import ray

from jobs import cluster_checks, package, preflight
from jobs.submit import job_name
from ldm.config import RequestError, parse
from pipelines.encode import EncodeConfig
from pipelines.evaluate import EvaluateConfig
from pipelines.train import TrainConfig

ENCODE = {"source": "in-0.tar", "destination": "latents", "autoencoder": "vae"}
WITH_PASSWORD = "http://me:hunter2@mlflow:5000"  # pragma: allowlist secret


def encode(**changes: object) -> EncodeConfig:
    return parse(EncodeConfig, [("test", {**ENCODE, "tracking": {"enabled": False}, **changes})])


@pytest.mark.parametrize(
    ("ray_version", "python", "message"),
    [
        ("2.1.0", None, "runs Ray 2.1.0, and this is Ray "),
        (None, "3.8.1", "runs Python 3.8.1, and this is Python "),
    ],
)
def test_another_minor_version_is_refused(ray_version: str | None, python: str | None, message: str) -> None:
    versions = {"rayVersion": ray_version or ray.__version__, "pythonVersion": python or platform.python_version()}
    with pytest.raises(RequestError, match=f"^--address=http://head:8265: {message}"):
        preflight.check_versions("http://head:8265", versions)


def test_another_patch_level_is_not() -> None:
    ours = ".".join(platform.python_version_tuple()[:2])
    preflight.check_versions("a", {"rayVersion": ray.__version__, "pythonVersion": f"{ours}.99"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tracking.uri", WITH_PASSWORD),
        ("tracking.uri", WITH_PASSWORD.replace("http", "postgresql")),
        ("source", "https://host/a.tar?X-Amz-Signature=hunter2"),
        ("class_names", "https://storage.googleapis.com/b/ids.txt?X-Goog-Algorithm=GOOG4&X-Goog-Signature=hunter2"),
    ],
)
def test_a_secret_in_the_configuration_is_refused_and_not_repeated(key: str, value: str) -> None:
    changes = {"tracking": {"uri": value}} if key == "tracking.uri" else {key: value}
    with pytest.raises(RequestError, match=f"^{key}=.*: holds a secret, .*leave it out") as refused:
        package.resolve(encode(**changes))
    assert "hunter2" not in str(refused.value)


def test_so_is_one_in_the_environment_that_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", WITH_PASSWORD)
    with pytest.raises(RequestError, match="^tracking.uri=http://…@mlflow:5000: holds a secret"):
        package.resolve(encode(tracking={"enabled": True}))


def test_what_is_no_secret_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    config = package.resolve(encode(source="s3://bucket/train-{0..3}.tar", tracking={"uri": "http://mlflow:5000"}))
    assert config.source == "s3://bucket/train-{0..3}.tar"


def test_code_that_is_too_large_is_refused_before_it_is_copied(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"pipelines: has [\d.,]+ kB, and Ray takes 1.0 kB with a job"):
        package.pack(tmp_path, encode(), limit=1000)
    assert list(tmp_path.iterdir()) == []
    size = package.pack(tmp_path, encode(), limit=10**8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "jobs", "ldm", "pipelines"]
    packed = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "config.yaml"]
    assert size == sum(path.stat().st_size for path in packed)
    assert not [path for path in packed if "__pycache__" in path.parts]


def test_a_job_is_named_by_its_stage_and_the_place_that_it_writes_to(tmp_path: Path) -> None:
    config = package.resolve(encode(destination=str(tmp_path / "cats & dogs")))
    name = job_name("encode", config)
    assert name.startswith("encode-cats-dogs-") and name == job_name("encode", config.model_copy(update={"flip": True}))
    assert name != job_name("encode", package.resolve(encode(destination=str(tmp_path / "b" / "cats & dogs"))))
    train = parse(TrainConfig, [("test", {"latents": "l", "output": "s3://b/run"})])
    assert job_name("train", train).startswith("train-run-")
    evaluate = parse(EvaluateConfig, [("test", {"snapshot": "s", "reference": "r"})])
    assert job_name("evaluate", evaluate).startswith("evaluate-evaluation-")


class TestSeveralNodes:
    @pytest.mark.parametrize("key", ["source", "destination", "autoencoder"])
    def test_may_not_share_a_local_path(self, key: str, tmp_path: Path) -> None:
        urls = {"source": "s3://b/a.tar", "destination": "s3://b/latents", "autoencoder": "s3://b/vae"}
        config = package.resolve(encode(**{**urls, key: str(tmp_path / "here")}))
        with pytest.raises(RequestError, match=rf"^{key}={tmp_path}/here: lies on a disk of one node \(\w+\), and 2 n"):
            cluster_checks.check_one_node_only(config, 2)
        cluster_checks.check_one_node_only(config, 1)

    def test_may_share_a_network_file_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = package.resolve(encode(**{key: str(tmp_path / key) for key in ENCODE}))
        for kind, fits in [("nfs4", True), ("fuse.juicefs", True), ("ext4", False), ("fuse.fuse-overlayfs", False)]:
            monkeypatch.setattr(cluster_checks, "file_system", lambda path, kind=kind: kind)
            if fits:
                cluster_checks.check_one_node_only(config, 2)
            else:
                with pytest.raises(RequestError, match=f"one node \\({kind}\\)"):
                    cluster_checks.check_one_node_only(config, 2)

    def test_may_not_track_in_sqlite(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        urls = {"source": "s3://b/a.tar", "destination": "s3://b/latents", "autoencoder": "owner/vae"}
        config = package.resolve(encode(**urls, tracking={"enabled": True}))
        with pytest.raises(
            RequestError, match="^tracking.uri=sqlite:///.*/mlflow.db: is a file on one node, and 2 nodes"
        ):
            cluster_checks.check_one_node_only(config, 2)
        cluster_checks.check_one_node_only(package.resolve(encode(**urls)), 2)


def test_the_kind_of_file_system_is_that_of_the_deepest_mount(tmp_path: Path) -> None:
    assert cluster_checks.file_system(Path("/proc/self/status")) == "proc"
    assert cluster_checks.file_system(tmp_path / "not" / "there") == cluster_checks.file_system(tmp_path)


def test_what_does_not_answer_is_one_line_by_key(s3: str, free_port: object) -> None:
    server = f"http://127.0.0.1:{free_port()}"  # type: ignore[operator]
    environment = dict(os.environ)
    found = cluster_checks.unreachable({"source": f"{s3}/in-0.tar", "destination": "nowhere://b/latents"}, server)
    assert set(found) == {"destination", "tracking.uri"}
    assert found["destination"].startswith("destination=nowhere://b/latents: cannot be reached from a worker (")
    assert found["tracking.uri"].startswith(f"tracking.uri={server}: cannot be reached from a worker (")
    assert all("\n" not in line for line in found.values())
    assert dict(os.environ) == environment


SAID = {"host": "node-7", "python": "3.11.1", "installed": "", "uploaded": "/pkg", "unreachable": {}}


def test_code_that_is_not_what_was_submitted_is_refused() -> None:
    found = {"ldm": "/pkg", "pipelines": "/usr/lib/python3/dist-packages", "jobs": "/pkg"}
    with pytest.raises(RequestError, match="pipelines comes from /usr/lib/python3/dist-packages on node-7, not from"):
        cluster_checks.check_worker(encode(), {**SAID, "found": found})


def test_mlflow_may_be_away_only_for_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {**SAID, "found": {"ldm": "/pkg"}, "unreachable": {"tracking.uri": "tracking.uri=http://m: is away"}}
    config = parse(TrainConfig, [("test", {"latents": "l", "output": str(tmp_path)})])
    with pytest.raises(RequestError, match="^tracking.uri=http://m: is away$"):
        cluster_checks.check_worker(config, said)
    (tmp_path / "run.json").write_text("{}")
    cluster_checks.check_worker(config, said)
    assert "job: tracking.uri=http://m: is away; the run goes on, and sends later\n" in capsys.readouterr().err
