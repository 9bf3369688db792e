"""The built wheel holds all that it needs, and gives a working `ldm` away from the repository.

The wheel itself is installed by pip; its dependencies are lent by the environment that runs the tests, for a
full installation takes minutes. That one is `make test-install`.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ldm", "pipelines", "jobs")

pytestmark = pytest.mark.wheel


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command as from a shell that knows nothing of the repository; returns its output."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing is left behind in the repository."""
    sources, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", built, sources, cwd=sources)
    (path,) = built.glob("ldm_pipelines-*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with the wheel in it, and the dependencies of ours behind it."""
    place = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=place)
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip()
    Path(own, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place


def test_wheel_holds_every_module_and_config(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".html", ".css", ".js", ".svg")
    }
    assert any(name.startswith("jobs/configs/") for name in sources)
    assert "pipelines/serve/page/index.html" in sources
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_ldm_runs_from_an_empty_directory(environment: Path, tmp_path: Path) -> None:
    where = run(environment / "bin" / "python", "-c", "import ldm; print(ldm.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    assert "encode" in run(environment / "bin" / "ldm", "--help", cwd=tmp_path)
    keys = ("source=a.tar", "destination=latents", "autoencoder=vae")
    printed = run(
        environment / "bin" / "ldm", "encode", "--config", "demo-encode", "--print-config", *keys, cwd=tmp_path
    )
    assert "image_size: 32" in printed  # from the packaged YAML
