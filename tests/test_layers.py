"""jobs -> pipelines -> ldm, never back; no engine (ray, deepspeed, mlflow) in ldm; stages stay apart."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "ldm": {"ldm"},
    "pipelines": {"ldm", "pipelines"},
    "jobs": {"ldm", "pipelines", "jobs"},
    "infra": set[str](),
}
ENGINES = {"ray", "deepspeed", "mlflow"}
STAGES = {"encode", "verify", "train", "serve", "evaluate"}
COMPOSERS = {"study"}
"""What composes stages, as jobs do: it may import them all, and none imports it."""


def problems(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """The imports in `source` that `module` (a dotted name) may not have, wherever they stand."""
    parts = module.split(".")
    layer, stage = parts[0], _stage(module)
    found = []
    for line, name in imports(source, parts if is_package else parts[:-1]):
        target = name.split(".")[0]
        if target in MAY_IMPORT and target not in MAY_IMPORT[layer]:
            found.append(f"{module}:{line}: {layer} may not import {name}")
        elif layer == "ldm" and target in ENGINES:
            found.append(f"{module}:{line}: ldm may not import {name}")
        elif stage and stage not in COMPOSERS and _stage(name) not in (None, stage):
            found.append(f"{module}:{line}: the stage {stage} may not import {name}")
    return found


def imports(source: str, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; `from a import b` gives a.b, and relative names are resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def _stage(name: str) -> str | None:
    """`pipelines.train.loop` => `train`; None for what belongs to no stage (tracking, cluster, …)."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "pipelines" and parts[1] in STAGES | COMPOSERS else None


def test_every_module_keeps_to_its_layer() -> None:
    files = [path for layer in MAY_IMPORT for path in sorted((ROOT / layer).rglob("*.py"))]
    assert {path.relative_to(ROOT).parts[0] for path in files} >= {"ldm", "pipelines", "jobs"}
    found = []
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        found += problems(module, path.read_text(), is_package=is_package)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ldm.sampler", "import pipelines.encode"),
        ("ldm.sampler", "from jobs import cli"),
        ("ldm.sampler", "def f():\n    import ray"),
        ("ldm.latents.writer", "if False:\n    from mlflow.tracking import MlflowClient"),
        ("ldm.sampler", "import importlib\nimportlib.import_module('deepspeed.ops')"),
        ("pipelines.encode", "import jobs.cli"),
        ("pipelines.encode", "from pipelines import train"),
        ("pipelines.encode", "from pipelines.train.loop import run"),
        ("pipelines.encode", "from . import serve"),
        ("pipelines.train.loop", "from ..evaluate import evaluate"),
        ("pipelines.train.loop", "def f():\n    import pipelines.serve as s"),
        ("pipelines.evaluate.run", "from pipelines.study import sweep"),
        ("infra.check", "import ldm"),
    ],
)
def test_a_planted_import_is_found(module: str, source: str) -> None:
    assert len(problems(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ldm.sampler", "import torch\nfrom ldm.config import Config\nimport raytracer"),
        ("pipelines.encode", "import ray\nfrom pipelines import tracking, cluster\nfrom ldm import storage"),
        ("pipelines.train.loop", "from . import checkpoint\nfrom pipelines.train.ema import Ema"),
        ("pipelines.tracking", "import mlflow"),
        ("pipelines.study.scaling", "from pipelines.train import train\nfrom pipelines.evaluate import measures"),
        ("jobs.demo", "from pipelines import encode, train, serve, evaluate"),
    ],
)
def test_a_right_import_is_let_through(module: str, source: str) -> None:
    assert problems(module, source) == []
