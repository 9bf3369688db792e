"""MLflow's server as `infra/mlflow/start.sh` guards it: with a password, and nothing for whom nobody gave rights.

Users and runs lie in SQLite here, in place of the PostgreSQL of start.sh.
"""

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.infra.deployed import INFRA

pytestmark = pytest.mark.faults  # a start of MLflow takes long
START = (INFRA / "mlflow" / "start.sh").read_text()
PASSWORD = secrets.token_hex(12)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server with the settings and options of start.sh."""
    from tests.conftest import _free_port

    folder, port = tmp_path_factory.mktemp("mlflow"), _free_port()
    (settings,) = re.findall(r'file\.write\("(\[mlflow\].*?)"\)', START)
    (folder / "auth.ini").write_text(
        settings.replace("\\n", "\n") + f"admin_password = {PASSWORD}\ndatabase_uri = sqlite:///{folder}/users.db\n"
    )
    (options,) = re.findall(r"exec mlflow server (.*) \"\$@\"", START)
    options = (
        options.replace("0.0.0.0", "127.0.0.1")
        .replace("--port 5000", f"--port {port}")
        .replace("--workers 2", "--workers 1")
    )
    environment = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(12),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    program = Path(sys.executable).with_name("mlflow")
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [program, "server", *options.split()], env=environment, cwd=folder, stdout=out, stderr=out
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(lambda: httpx.get(f"{url}/health", trust_env=False).status_code == 200, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _wait(holds: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if holds():
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise TimeoutError(log.read_text())


def ask(server: str, path: str, user: tuple[str, str] | None, **body: object) -> httpx.Response:
    url = f"{server}/api/2.0/mlflow/{path}"
    return httpx.post(url, json=body, auth=user, trust_env=False, timeout=60)


def test_only_users_are_let_in_and_only_to_what_is_theirs(server: str) -> None:
    admin, name = ("admin", PASSWORD), {"name": "secret"}
    for user in (None, ("admin", "wrong"), ("admin", ""), ("nobody", PASSWORD)):
        assert ask(server, "experiments/create", user, **name).status_code == 401
        assert ask(server, "runs/search", user, experiment_ids=["0"]).status_code == 401
    assert httpx.get(server, trust_env=False).status_code == 401  # the page, too
    made = ask(server, "experiments/create", admin, **name).raise_for_status().json()["experiment_id"]
    other = {"username": "guest", "password": secrets.token_hex(12)}
    assert ask(server, "users/create", None, **other).status_code == 401
    ask(server, "users/create", admin, **other).raise_for_status()
    guest = (other["username"], other["password"])
    assert ask(server, "runs/create", guest, experiment_id=made).status_code == 403
    assert ask(server, "experiments/search", guest, max_results=10).json().get("experiments", []) == []
    assert ask(server, "runs/create", admin, experiment_id=made).status_code == 200


def test_another_hosts_name_is_refused(server: str) -> None:
    """DNS rebinding: a page of somebody else that has its own name lead here."""
    answer = httpx.get(f"{server}/api/2.0/mlflow/experiments/get", headers={"Host": "evil.example"}, trust_env=False)
    assert answer.status_code == 403
