"""The Kubernetes objects of infra/k8s fit KubeRay's and Kubernetes' own schemas, and hang together."""

from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from ldm.config import validate
from pipelines.encode import EncodeConfig
from pipelines.serve import ServeConfig
from pipelines.train import TrainConfig
from tests.infra.deployed import BASE, EXAMPLE, KUBERNETES, base_objects, built, example_env, pinned, pods, strict

RAY = ("RayCluster", "RayJob", "RayService")
PARTS = {"encode": ("RayJob", "ldm-encode"), "train": ("RayJob", "ldm-train"), "serve": ("RayService", "ldm-serve")}
"""What `kubectl apply -k . -l ldm/PART` is for."""
SPOT_NOTICE_S = 120
"""Seconds between AWS's notice and the end of a spot instance."""


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return built(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def ray_schemas(shared: Path) -> dict[str, Any]:
    """Validators of KubeRay's schemas by kind; their own schema is not looked at, which would take seconds."""
    schemas = {}
    for kind in RAY:
        path = shared / "data" / "kuberay-crds" / f"ray.io_{kind.lower()}s.yaml"
        if not path.exists():
            pytest.skip(f"no KubeRay schema: {path} is missing")
        versions = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
        schema = next(strict(v["schema"]["openAPIV3Schema"]) for v in versions if v["name"] == "v1")
        schemas[kind] = jsonschema.Draft202012Validator(schema)
    return schemas


def named(found: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    return next(each for each in found if each["kind"] == kind and each["metadata"]["name"] == name)


class TestBuilt:
    """The example overlay as `kubectl apply -k` would send it."""

    @pytest.mark.real_data
    def test_the_ray_objects_fit_the_schemas_of_kuberay(
        self, example: list[dict[str, Any]], ray_schemas: dict[str, Any]
    ) -> None:
        mine = [each for each in example if each["kind"] in RAY]
        assert sorted(each["kind"] for each in mine) == ["RayCluster", "RayJob", "RayJob", "RayService"]
        for each in mine:
            ray_schemas[each["kind"]].validate(each)

    def test_all_others_fit_those_of_kubernetes(self, example: list[dict[str, Any]]) -> None:
        others = [each for each in example if each["kind"] not in RAY]
        assert len(others) > 15
        for each in others:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
            assert each["metadata"].get("namespace", each["metadata"]["name"]) == "ldm"

    def test_a_job_has_the_pods_of_the_patched_cluster_and_begins_with_one_worker(
        self, example: list[dict[str, Any]]
    ) -> None:
        cluster = named(example, "RayCluster", "ldm")["spec"]
        for name in ("ldm-encode", "ldm-train"):
            job = named(example, "RayJob", name)["spec"]["rayClusterSpec"]
            assert job["headGroupSpec"] == cluster["headGroupSpec"]
            mine, its = job["workerGroupSpecs"][0], cluster["workerGroupSpecs"][0]
            assert mine["template"] == its["template"]
            assert mine["replicas"] == mine["minReplicas"] == 1 and mine["maxReplicas"] == its["maxReplicas"] == 4
            assert job["enableInTreeAutoscaling"] is True and job["autoscalerOptions"] == cluster["autoscalerOptions"]
            assert job["authOptions"] == {"mode": "token"}
        assert cluster["workerGroupSpecs"][0]["template"]["spec"]["nodeSelector"] == {
            "karpenter.sh/capacity-type": "spot",
            "eks.amazonaws.com/instance-gpu-name": "l4",
        }

    def test_a_job_can_begin_with_its_workers_and_asks_for_as_many_as_may_come(
        self, example: list[dict[str, Any]]
    ) -> None:
        configs = named(example, "ConfigMap", "ldm-config")["data"]
        workers = named(example, "RayJob", "ldm-train")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        least, most = yaml.safe_load(configs["train.yaml"])["num_workers"]
        assert least <= workers["minReplicas"] and most == workers["maxReplicas"]
        assert yaml.safe_load(configs["encode.yaml"])["num_workers"] == workers["maxReplicas"]

    @pytest.mark.parametrize("part", PARTS)
    def test_a_part_is_applied_with_all_that_it_needs_and_without_the_others(
        self, example: list[dict[str, Any]], part: str
    ) -> None:
        """Another one that is applied too would be suspended again, however it was begun."""
        labelled = [each for each in example if f"ldm/{part}" in each["metadata"].get("labels", {})]
        applied = {(each["kind"], each["metadata"]["name"]) for each in labelled}
        assert {found for found in applied if found[0] in RAY} == {PARTS[part]}
        needed = needed_by(named(example, *PARTS[part]))
        assert needed <= applied and ("Secret", "ldm-secrets") in needed

    def test_every_image_of_ours_is_the_one_that_was_pushed(self, example: list[dict[str, Any]]) -> None:
        images = {c["image"] for each in example for pod in pods(each) for c in pod["containers"]}
        assert sum("ldm-pipelines" in image for image in images) == 1
        assert all(":" in image and not image.endswith(":latest") for image in images)

    def test_what_pods_refer_to_is_there(self, example: list[dict[str, Any]]) -> None:
        there = {(each["kind"], each["metadata"]["name"]): each for each in example}
        for each in example:
            assert needed_by(each) <= set(there)
            for pod in pods(each):
                for container in pod["containers"]:
                    for kind, reference in references(container):
                        assert reference["key"] in there[kind, reference["name"]]["data"]


def needed_by(one: dict[str, Any]) -> set[tuple[str, str]]:
    """(kind, name) of what the pods of an object refer to."""
    found = set()
    for pod in pods(one):
        if "serviceAccountName" in pod:
            found.add(("ServiceAccount", pod["serviceAccountName"]))
        for volume in pod.get("volumes", []):
            if "configMap" in volume:
                found.add(("ConfigMap", volume["configMap"]["name"]))
            if "secret" in volume:
                found.add(("Secret", volume["secret"]["secretName"]))
        for container in pod["containers"]:
            found |= {(kind, reference["name"]) for kind, reference in references(container)}
    return found


def references(container: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """(kind, {name, key}) of what the environment of a container comes from."""
    sources = [each["valueFrom"] for each in container.get("env", []) if "valueFrom" in each]
    kinds = {"configMapKeyRef": "ConfigMap", "secretKeyRef": "Secret"}  # pragma: allowlist secret
    return [(kinds[key], value) for source in sources for key, value in source.items()]


class TestSchemasFind:
    """What a schema is there for: each of these would be dropped or refused by a real cluster."""

    @pytest.mark.real_data
    @pytest.mark.parametrize(
        "edit", [("replicas: 0", "replicas: none"), ("maxReplicas", "maxReplica"), ("runAsNonRoot", "runAsNoRoot")]
    )
    def test_a_wrong_ray_cluster(self, ray_schemas: dict[str, Any], edit: tuple[str, str]) -> None:
        text = (BASE / "raycluster.yaml").read_text()
        ray_schemas["RayCluster"].validate(yaml.safe_load(text))
        with pytest.raises(jsonschema.ValidationError):
            ray_schemas["RayCluster"].validate(yaml.safe_load(text.replace(*edit)))

    @pytest.mark.parametrize("edit", [("replicas: 1", "replicas: one"), ("secretKeyRef", "secretKey")])
    def test_a_wrong_deployment(self, edit: tuple[str, str]) -> None:
        text = (BASE / "grafana.yaml").read_text().split("---\n")[1]
        kubernetes_validate.validate(yaml.safe_load(text), KUBERNETES, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(yaml.safe_load(text.replace(*edit)), KUBERNETES, strict=True)


class TestFiles:
    """Without kubectl and KubeRay's schemas."""

    def test_kubernetes_own_objects_fit(self) -> None:
        for each in base_objects():
            if each["kind"] not in RAY:
                kubernetes_validate.validate(each, KUBERNETES, strict=True)

    def test_no_pod_has_rights_that_it_does_not_need(self) -> None:
        found = [pod for each in base_objects() for pod in pods(each)]
        assert len(found) == 10
        for pod in found:
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                rights = container["securityContext"]
                assert rights["allowPrivilegeEscalation"] is False and rights["capabilities"] == {"drop": ["ALL"]}
                assert "memory" in container["resources"]["limits"]

    def test_ray_is_the_tested_one_and_asks_for_its_token(self) -> None:
        clusters = [named(base_objects(), "RayCluster", "ldm")["spec"]]
        clusters.append(named(base_objects(), "RayService", "ldm-serve")["spec"]["rayClusterConfig"])
        for cluster in clusters:
            assert cluster["rayVersion"] == pinned("ray") and cluster["authOptions"] == {"mode": "token"}

    def test_a_spot_worker_ends_before_its_machine_does(self) -> None:
        worker = named(base_objects(), "RayCluster", "ldm")["spec"]["workerGroupSpecs"][0]["template"]["spec"]
        assert worker["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
        assert 60 <= worker["terminationGracePeriodSeconds"] < SPOT_NOTICE_S
        # A hook that stops Ray would take the time in which training saves.
        assert all("lifecycle" not in container for container in worker["containers"])

    def test_what_costs_waits_until_it_is_told_to(self) -> None:
        waiting = [each for each in base_objects() if each["kind"] in ("RayJob", "RayService")]
        assert len(waiting) == 3 and all(each["spec"]["suspend"] is True for each in waiting)
        assert yaml.safe_load((EXAMPLE / "serve.yaml").read_text())["spec"]["suspend"] is True
        assert named(base_objects(), "RayCluster", "ldm")["spec"]["workerGroupSpecs"][0]["minReplicas"] == 0

    def test_the_overlay_changes_what_the_base_has(self) -> None:
        overlay = yaml.safe_load((EXAMPLE / "kustomization.yaml").read_text())
        for patch in overlay["patches"]:
            if "target" not in patch:
                patch = {"target": {"kind": "RayService", "name": "ldm-serve"}, "patch": "[]"}
            target = named(base_objects(), patch["target"]["kind"], patch["target"]["name"])
            for change in yaml.safe_load(patch["patch"]):
                *path, last = [part.replace("~1", "/") for part in change["path"].strip("/").split("/")]
                place: Any = target
                for part in path:
                    place = place[int(part)] if isinstance(place, list) else place[part]
                assert change["op"] == "add" or last in place

    def test_every_secret_is_asked_for_and_none_is_here(self) -> None:
        wanted = {
            reference["key"]
            for each in base_objects()
            for pod in pods(each)
            for container in pod["containers"]
            for kind, reference in references(container)
            if kind == "Secret"
        }
        volumes = [v for each in base_objects() for pod in pods(each) for v in pod.get("volumes", []) if "secret" in v]
        wanted |= {item["key"] for volume in volumes for item in volume["secret"]["items"]}
        assert wanted == set(example_env())
        for line in (EXAMPLE / "secrets.example.env").read_text().splitlines():
            assert line.startswith("#") or line.endswith("=")

    def test_the_jobs_configs_are_right_requests(self) -> None:
        validate(EncodeConfig, yaml.safe_load((EXAMPLE / "encode.yaml").read_text()))
        train = validate(TrainConfig, yaml.safe_load((EXAMPLE / "train.yaml").read_text()))
        manifest = yaml.safe_load((EXAMPLE / "serve.yaml").read_text())
        for application in yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]:
            serve = validate(ServeConfig, application["args"])
            assert serve.snapshot == train.output
