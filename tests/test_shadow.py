"""Another package named `ldm` on the path is named in one line, instead of an ImportError from its inside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def import_jobs(*path: Path) -> subprocess.CompletedProcess[str]:
    """`import jobs`, the first thing that `ldm` does, in a process with `path` and no site-packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-P", "-S", "-c", "import jobs"],
        env=environment,
        capture_output=True,
        text=True,
        cwd="/",
    )


@pytest.mark.parametrize("with_init", [True, False], ids=["package", "namespace package"])
def test_another_ldm_is_refused_in_one_line(tmp_path: Path, with_init: bool) -> None:
    (tmp_path / "ldm" / "models").mkdir(parents=True)
    (tmp_path / "ldm" / "util.py").write_text("import missing_dependency")
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    if with_init:
        (tmp_path / "ldm" / "__init__.py").write_text("")
    done = import_jobs(tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "ldm") in done.stderr and "ldm-pipelines" in done.stderr


def test_our_own_ldm_is_let_through() -> None:
    done = import_jobs(ROOT)
    assert (done.returncode, done.stderr) == (0, "")
