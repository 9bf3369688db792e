"""What infra/ deploys fits KubeRay's schema and the tested set of packages."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "infra" / "kuberay" / "raycluster.yaml"
COMPOSE = ROOT / "infra" / "mlflow" / "docker-compose.yaml"
DOCKERFILE = ROOT / "infra" / "Dockerfile"


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, package
    return found.group(1)


def strict(schema: Any) -> Any:
    """A Kubernetes schema in which an unknown field is an error; the API server would drop it in silence."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict) and not open_ended:
        closed["additionalProperties"] = False
    return closed


@pytest.fixture(scope="module")
def cluster_schema(shared: Path) -> Any:
    path = shared / "data" / "kuberay-crds" / "ray.io_rayclusters.yaml"
    if not path.exists():
        pytest.skip(f"no KubeRay schema: {path} is missing")
    versions = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    return next(strict(v["schema"]["openAPIV3Schema"]) for v in versions if v["name"] == "v1")


@pytest.mark.real_data
def test_ray_cluster_fits_the_schema_of_kuberay(cluster_schema: Any) -> None:
    jsonschema.validate(yaml.safe_load(CLUSTER.read_text()), cluster_schema)


@pytest.mark.real_data
@pytest.mark.parametrize(
    "edit", [("replicas: 2", "replicas: two"), ("maxReplicas", "maxReplica"), ("runAsNonRoot", "runAsNoRoot")]
)
def test_a_wrong_ray_cluster_does_not_fit(cluster_schema: Any, edit: tuple[str, str]) -> None:
    wrong = CLUSTER.read_text().replace(*edit)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(wrong), cluster_schema)


def test_ray_cluster_is_safe_and_of_the_tested_version() -> None:
    spec = yaml.safe_load(CLUSTER.read_text())["spec"]
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert not container["image"].endswith(":latest") and ":" in container["image"]


def test_dockerfile_pins_its_packages_and_drops_root() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    assert any(re.fullmatch(r"FROM python:3\.1[123]\.\d+-slim-\w+", line) for line in lines)
    assert all("-c constraints.txt" in line for line in lines if "pip install ." in line)
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]
    for source in (line.split()[1:-1] for line in lines if line.startswith("COPY ")):
        assert all((ROOT / name).exists() for name in source), source


def test_mlflow_server_is_the_tested_one_and_holds_no_password() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert f":v{pinned('mlflow')}" in services["mlflow"]["image"]
    assert all(re.search(r":\S*\d", service["image"]) for service in services.values())
    assert all(port.startswith("127.0.0.1:") for s in services.values() for port in s.get("ports", []))
    secrets = re.findall(r"PASSWORD: (\S+)", COMPOSE.read_text())
    assert secrets and all(secret.startswith("${") for secret in secrets)
