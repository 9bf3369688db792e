"""The image, and the services that run on one machine."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import create_engine

from tests.infra.deployed import INFRA, ROOT, base_objects, pinned, pods

DOCKERFILE = INFRA / "Dockerfile"
COMPOSE = INFRA / "compose" / "compose.yaml"
HADOLINT = Path(sys.executable).with_name("hadolint")
OPEN = ("${LISTEN:-127.0.0.1}:", "127.0.0.1:")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


class TestDockerfile:
    def test_hadolint_has_nothing_to_say(self) -> None:
        done = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "")

    def test_hadolint_finds_a_base_that_moves(self, tmp_path: Path) -> None:
        wrong = tmp_path / "Dockerfile"
        wrong.write_text(re.sub(r"FROM python:\S+", "FROM python:latest", DOCKERFILE.read_text()))
        done = subprocess.run([HADOLINT, wrong], capture_output=True, text=True)
        assert done.returncode == 1 and "DL3007" in done.stdout

    def test_it_pins_its_packages_and_drops_root(self) -> None:
        lines = DOCKERFILE.read_text().splitlines()
        assert any(re.fullmatch(r"FROM python:3\.1[123]\.\d+-slim-\w+", line) for line in lines)
        installs = [line for line in lines if "pip install" in line]
        assert installs and all("constraints.txt" in line for line in installs)
        assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]

    def test_it_copies_what_is_there_and_nothing_secret(self) -> None:
        copied = [line.split()[1:-1] for line in DOCKERFILE.read_text().splitlines() if line.startswith("COPY ")]
        names = [name for sources in copied for name in sources]
        assert all((ROOT / name).exists() for name in names)
        assert set(names) == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "ldm", "pipelines", "jobs"}

    def test_the_extra_that_it_installs_is_pinned(self) -> None:
        for package in ("boto3", "Flask-WTF", "psycopg2-binary", "mlflow", "ray"):
            assert pinned(package)


class TestCompose:
    def test_every_image_is_pinned_and_ours_is_built_from_here(self, services: dict[str, Any]) -> None:
        assert all(re.search(r":\S*\d", service["image"]) for service in services.values())
        build = services["mlflow"]["build"]
        assert (COMPOSE.parent / build["context"]).resolve() == ROOT
        assert (COMPOSE.parent / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE

    def test_both_ways_to_deploy_have_the_same_images(self, services: dict[str, Any]) -> None:
        cluster = {
            container["image"] for each in base_objects() for pod in pods(each) for container in pod["containers"]
        }
        shared = {"postgres", "prom/prometheus", "grafana/grafana"}
        here = {service["image"] for service in services.values()}
        assert {i for i in cluster if i.split(":")[0] in shared} == {i for i in here if i.split(":")[0] in shared}

    def test_only_this_machine_hears_them(self, services: dict[str, Any]) -> None:
        ports = [port for service in services.values() for port in service.get("ports", [])]
        assert len(ports) == 5 and all(port.startswith(OPEN) for port in ports)

    def test_it_holds_no_password_and_asks_for_each(self) -> None:
        text = COMPOSE.read_text()
        secrets = re.findall(r"(?:PASSWORD|SECRET\w*KEY): (\S+)", text)
        assert len(secrets) == 8 and all(secret.startswith("${") for secret in secrets)
        asked = set(re.findall(r"\$\{(\w+)[:}]", text))
        lines = (COMPOSE.parent / "example.env").read_text().splitlines()
        assert asked == {line.split("=")[0] for line in lines if not line.startswith("#")}

    def test_the_files_that_it_mounts_are_there(self, services: dict[str, Any]) -> None:
        mounts = [volume for service in services.values() for volume in service.get("volumes", [])]
        sources = [mount.split(":")[0] for mount in mounts if isinstance(mount, str)]
        files = [source for source in sources if source.startswith(".")]
        assert len(files) == 6 and all((COMPOSE.parent / file).is_file() for file in files)
        assert not any(source.startswith("/") for source in sources)  # Docker would make what is not there, as root

    def test_it_starts_without_a_ray_and_leaves_no_folder_in_its_way(self, services: dict[str, Any]) -> None:
        mounts = {name: [v for v in each.get("volumes", []) if isinstance(v, dict)] for name, each in services.items()}
        (ray,) = mounts.pop("prometheus")
        assert ray["source"] == "/tmp/ray" and ray["read_only"] is True and ray["bind"] == {"create_host_path": False}
        assert not any(mounts.values())
        assert {name for name, each in services.items() if each.get("profiles") == ["ray"]} == {"prometheus", "grafana"}

    def test_mlflow_reaches_its_databases_by_a_driver_that_is_installed(self) -> None:
        urls = re.findall(r"postgresql\S*://", (INFRA / "mlflow" / "start.sh").read_text())
        assert len(urls) == 3
        for url in urls[:2]:  # MLflow's; the third is psycopg2's own
            create_engine(f"{url}mlflow@localhost/mlflow")  # imports the driver, and does not connect

    def test_who_waits_waits_for_one_that_says_that_it_is_ready(self, services: dict[str, Any]) -> None:
        for service in services.values():
            for name, how in service.get("depends_on", {}).items():
                assert name in services
                assert how["condition"] == "service_completed_successfully" or "healthcheck" in services[name]
