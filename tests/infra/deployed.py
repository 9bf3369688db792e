"""What the tests of infra/ share: its files, the schemas, and what kustomize makes of the overlay."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
BASE = INFRA / "k8s" / "base"
EXAMPLE = INFRA / "k8s" / "overlays" / "example"
KUBERNETES = "1.33"
"""The version whose schemas are used; kubernetes-validate brings them along."""


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, package
    return found.group(1)


def objects(text: str) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(text) if found]


def base_objects() -> list[dict[str, Any]]:
    files = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    return [found for name in files if name.endswith(".yaml") for found in objects((BASE / name).read_text())]


def example_env() -> dict[str, str]:
    """The secrets that a person fills in, with values."""
    lines = (EXAMPLE / "secrets.example.env").read_text().splitlines()
    return {line.split("=")[0]: "0123456789abcdef" for line in lines if not line.startswith("#")}


def built(folder: Path) -> list[dict[str, Any]]:
    """The objects of the example overlay with its secrets filled in; skips where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl, whose kustomize would build the overlay")
    shutil.copytree(INFRA, folder / "infra")
    overlay = folder / "infra" / EXAMPLE.relative_to(INFRA)
    (overlay / "secrets.env").write_text("".join(f"{key}={value}\n" for key, value in example_env().items()))
    done = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return objects(done.stdout)


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


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec at any depth of an object."""
    if isinstance(node, dict):
        if isinstance(node.get("containers"), list):
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from pods(value)
