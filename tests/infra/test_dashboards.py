"""What the dashboards ask Prometheus for is what Ray gives it, and what Prometheus finds is Ray."""

import json
import re
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.deployed import BASE, INFRA, objects

DASHBOARDS = ("ldm-serve.json", "ldm-cluster.json")


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_whole(name: str) -> None:
    dashboard = json.loads((INFRA / "grafana" / name).read_text())
    assert name == f"{dashboard['uid']}.json"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 5
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    assert all(panel["datasource"]["uid"] == "${datasource}" and panel["targets"] for panel in panels)


def test_the_metrics_of_the_cluster_are_those_that_ray_draws_itself() -> None:
    """Those of `ldm serve` are asked of a running deployment: tests/pipelines/test_serve.py."""
    dashboard = (INFRA / "grafana" / "ldm-cluster.json").read_text()
    wanted = set(re.findall(r"ray_\w+", dashboard))
    found = util.find_spec("ray")
    assert found is not None and found.origin is not None
    panels = (Path(found.origin).parent / "dashboard/modules/metrics/dashboards").glob("*_dashboard_panels.py")
    theirs = {name for file in panels for name in re.findall(r"ray_\w+", file.read_text())}
    assert len(wanted) > 8 and wanted <= theirs, wanted - theirs


def test_grafana_finds_prometheus_and_the_dashboards_in_both_deployments() -> None:
    source = yaml.safe_load((INFRA / "grafana" / "datasource.yaml").read_text())["datasources"][0]
    folder = yaml.safe_load((INFRA / "grafana" / "dashboards.yaml").read_text())["providers"][0]["options"]["path"]
    services = yaml.safe_load((INFRA / "compose" / "compose.yaml").read_text())["services"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert {f"{folder}/{name}" for name in DASHBOARDS} <= set(mounted)
    pod = objects((BASE / "grafana.yaml").read_text())[1]["spec"]["template"]["spec"]
    assert folder in [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
    given = yaml.safe_load((INFRA / "grafana" / "kustomization.yaml").read_text())["configMapGenerator"]
    assert {name for each in given for name in each["files"]} >= set(DASHBOARDS)


def test_prometheus_looks_for_the_port_that_ray_pods_have() -> None:
    found = {each["kind"]: each for each in objects((BASE / "prometheus.yaml").read_text())}
    job = yaml.safe_load(found["ConfigMap"]["data"]["prometheus.yml"])["scrape_configs"][0]
    keep = next(rule for rule in job["relabel_configs"] if rule.get("action") == "keep")
    port = keep["regex"].split(";")[1]
    clusters = [objects((BASE / "raycluster.yaml").read_text())[0]["spec"]]
    clusters.append(objects((BASE / "rayservice.yaml").read_text())[0]["spec"]["rayClusterConfig"])
    for cluster in clusters:
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        assert all(has_port(group, port) for group in groups)
    assert found["Role"]["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]


def has_port(group: dict[str, Any], name: str) -> bool:
    container = group["template"]["spec"]["containers"][0]
    return {"name": name, "containerPort": 8080} in container["ports"]
