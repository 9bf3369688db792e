"""The pages of docs/ do what they say: their commands run, on small pictures; their links and messages are there."""

import ast
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests

from jobs import cli
from pipelines import serve
from tests.commands import console_commands
from tests.conftest import _free_port
from tests.pictures import encoded, kl_model, picture

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PROGRAMS = str(Path(sys.executable).parent)
CLUSTER = "\n## 9. On a cluster\n"

TINY = """
checkpoint_every: 2
global_batch_size: 8
log_every: 2
device: cpu
denoiser: {hidden_size: 16, depth: 1, num_heads: 2, patch_size: 2}
validation: {images: 4, grid: 2, num_inference_steps: 2}
"""
SUBSTITUTED = {
    # What would take hours, or is fetched: on the left as the pages have it, on the right as it is run.
    "--config dit-s-2 ": "--config tiny.yaml ",
    "stabilityai/sd-vae-ft-mse": "vae",
    "image_size=256": "image_size=32",
    "max_steps=20000": "max_steps=4",
    "max_steps=30000": "max_steps=6",
    "step-0000020000": "step-0000000004",
    "num_images=1000": "num_images=8 features=vae",
    "num_images=16": "num_images=4 num_inference_steps=4",
    "host=0.0.0.0": "host=127.0.0.1",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who begins: pictures of two classes, and what the substitutions name."""
    folder = tmp_path_factory.mktemp("docs")
    for number in range(48):
        path = folder / "pictures" / ("apple", "pear")[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number, 40, 32)))
    kl_model().save_pretrained(folder / "vae")
    kl_model(seed=1).save_pretrained(folder / "other-vae")
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def page(name: str) -> str:
    return (DOCS / name).read_text()


def as_run(command: str, **more: str) -> str:
    for text, instead in {**SUBSTITUTED, **more}.items():
        command = command.replace(text, instead)
    return command


def run_in_shell(command: str, folder: Path, **environment: str) -> str:
    """What it says on stderr. The programs of this environment are found, and nothing of a Ray that runs is known."""
    mine = _fresh(Path.home()) | environment
    command = re.sub(r"^ldm ", f"{shlex.quote(sys.executable)} -m jobs.cli ", command)
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=mine, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (command, done.stderr)
    return done.stderr


@pytest.fixture(scope="module")
def tutorial(ray_session: None, place: Path) -> Path:
    """The folder after the tutorial, but for its cluster."""
    commands = console_commands(page("tutorial.md").split(CLUSTER)[0])
    assert commands.pop(0) == "source .venv/bin/activate" and len(commands) > 12
    run_all(commands, place)
    return place


def run_all(commands: list[str], place: Path) -> None:
    """In their order, in this process and its Ray; what is served is served until the next `ldm` command."""
    served, port = contextlib.ExitStack(), str(_free_port())
    ports = {"port=8000": f"port={port}", "127.0.0.1:8000": f"127.0.0.1:{port}"}
    with served, contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for command in (as_run(command, **ports) for command in commands):
            words = shlex.split(command, comments=True)
            if words[0] != "ldm":
                run_in_shell(command, place)
                continue
            served.close()  # as Ctrl-C does
            if words[1] == "serve":
                _, config = cli.parse_stage("serve", words[2:])
                assert isinstance(config, serve.ServeConfig)
                served.enter_context(serve.deployment(config))
            else:
                assert cli.main(words[1:]) == 0, command


@pytest.mark.ray
def test_the_commands_of_the_tutorial_run(tutorial: Path) -> None:
    assert (tutorial / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tutorial / "pears" / "grid.png").exists() and (tutorial / "evaluation" / "nearest.png").exists()
    assert (tutorial / "serve-token").stat().st_mode & 0o777 == 0o600


@pytest.mark.ray
def test_what_the_howtos_and_troubleshooting_add_runs_after_it(tutorial: Path) -> None:
    run_all(console_commands(page("howto.md") + page("troubleshooting.md")), tutorial)
    assert (tutorial / "run" / "snapshots" / "step-0000000006").is_dir()
    assert (tutorial / "other.png").exists()


@pytest.mark.ray
def test_the_tutorial_ends_on_a_cluster(place: Path, tmp_path: Path) -> None:
    """With a home of its own, in which Ray leaves its token."""
    make_token, start, submit = console_commands(page("tutorial.md").split(CLUSTER)[1])
    assert start == "RAY_AUTH_MODE=token ray start --head --block"
    refused = subprocess.run(
        ["bash", "-c", f"{start} --port={_free_port()}"],
        env=_fresh(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        refused.returncode != 0 and "but no authentication token was found" in refused.stderr
    )  # never open by mistake
    run_in_shell(make_token, place, HOME=str(tmp_path))
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    with _cluster(start, home=tmp_path) as address:
        assert requests.get(f"{address}/api/authentication_mode", timeout=30).json() == {"authentication_mode": "token"}
        wrong = {"Authorization": "Bearer " + "0" * 64}
        for path in ("/api/jobs/", "/api/version", "/nodes?view=summary"):
            assert requests.get(f"{address}{path}", timeout=30).status_code == 401
            assert requests.get(f"{address}{path}", headers=wrong, timeout=30).status_code == 403
        job = {"entrypoint": f"touch {tmp_path}/planted"}
        assert requests.post(f"{address}/api/jobs/", json=job, timeout=30).status_code == 401
        command = as_run(submit, **{"http://127.0.0.1:8265": address}) + " device=cpu"
        said = run_in_shell(command, place, HOME=str(tmp_path), LDM_WORKER_LOGS="")
        warned = [line for line in said.splitlines() if "token" in line and "RAY_AUTH_MODE=token ray job" not in line]
        assert not warned and "48 = 48 encoded + 0 filtered + 0 quarantined" in said
    assert (place / "latents-2" / "manifest.json").exists() and not (tmp_path / "planted").exists()


def _fresh(home: Path) -> dict[str, str]:
    """The environment of somebody with this home who knows of no Ray."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return mine | {"HOME": str(home), "PATH": f"{PROGRAMS}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def _cluster(command: str, home: Path) -> Iterator[str]:
    """Runs `ray start …` of the page on ports of its own until the end of the block; yields the dashboard's URL."""
    ports = {
        name: _free_port()
        for name in ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    }
    own = [f"--{name}={number}" for name, number in ports.items()]
    own += ["--num-cpus=4", "--disable-usage-stats", "--object-store-memory=200000000"]
    own += ["--min-worker-port=0", "--max-worker-port=0"]
    command = f"exec env {command} {' '.join(own)}"
    head = subprocess.Popen(
        ["bash", "-c", command], env=_fresh(home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        _wait_for(lambda: requests.get(f"{address}/api/version", timeout=5).status_code in (200, 401), head)
        yield address
    finally:
        family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        head.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=15)
        for process in alive:
            process.kill()


def _wait_for(holds: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the cluster ended"
        with contextlib.suppress(requests.ConnectionError):
            if holds():
                return
        time.sleep(0.3)
    raise TimeoutError("the cluster did not answer within 120 s")


def test_each_substitution_is_of_a_page() -> None:
    commands = "\n".join(c for name in ("tutorial.md", "howto.md") for c in console_commands(page(name)))
    for text in SUBSTITUTED:
        assert text in commands, text


PAGES = sorted([*DOCS.glob("*.md"), ROOT / "SECURITY.md", ROOT / "infra" / "README.md"])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_and_keys_of_the_makefile_are_there(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)", path.read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for file in re.findall(r"`((?:tests|ldm|pipelines|jobs|infra)/[\w/]+\.(?:py|json|yaml))`", path.read_text()):
        assert (ROOT / file).exists(), file


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in DOCS.glob("*.md"):
        assert f"docs/{path.name}" in readme, path.name


def messages() -> set[str]:
    """The texts of the program, with `…` for what is filled in."""
    found = set()
    for layer in ("ldm", "pipelines", "jobs"):
        for path in (ROOT / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.add("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return {text.replace("`", "") for text in found}


def test_what_troubleshooting_says_one_sees_is_what_the_program_says() -> None:
    cells = re.findall(r"^\| (.*?) \|", page("troubleshooting.md"), re.MULTILINE)
    seen = [
        text
        for cell in cells
        for text in re.findall(r"`([^`]+)`", cell)
        if ":" in text or "…" in text or len(text) > 40
    ]
    assert len(seen) > 30
    known = messages()
    for text in seen:
        assert any(text in message for message in known) or text.split("=")[0] in ("num_workers", "val/loss"), text
