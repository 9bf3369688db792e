"""Files of tokens that others can read: ours is refused, Ray's is warned of."""

import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from jobs.ray_token import warn_of_open_doors
from ldm.config import RequestError
from pipelines.serve.config import ServeConfig, read_token
from pipelines.token_files import other_readers


def token_file(folder: Path, mode: int) -> Path:
    path = folder / "token"
    path.write_text("a-token-of-a-test")
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("mode", "others"),
    [(0o644, "everyone"), (0o604, "everyone"), (0o640, "the file's group"), (0o660, "the file's group")],
)
def test_a_token_of_serve_that_others_can_read_is_refused(tmp_path: Path, mode: int, others: str) -> None:
    path = token_file(tmp_path, mode)
    with pytest.raises(RequestError, match=f"^token_file={path}: can be read by {others}; chmod 600 {path}$"):
        read_token(ServeConfig(snapshot="s", token_file=str(path)))


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_token_of_ones_own_is_taken(tmp_path: Path, mode: int) -> None:
    path = token_file(tmp_path, mode)
    assert read_token(ServeConfig(snapshot="s", host="0.0.0.0", token_file=str(path))) == "a-token-of-a-test"


def test_the_group_of_a_file_of_somebody_else_is_that_ones_choice(tmp_path: Path) -> None:
    """As Kubernetes mounts a secret: root's, 0440, of the pod's group."""
    path = token_file(tmp_path, 0o440)
    if os.geteuid():
        pytest.skip("needs root, to give a file away")
    os.chown(path, 65534, -1)
    assert other_readers(path) == ""
    path.chmod(0o444)
    assert other_readers(path) == "everyone"


def test_rays_token_is_warned_of_where_its_client_looks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free_port: Callable[[], int],
) -> None:
    nobody = free_port()
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def said() -> str:
        warn_of_open_doors(f"http://127.0.0.1:{nobody}")
        return capsys.readouterr().err

    assert said() == ""  # there is none
    at_home = tmp_path / ".ray" / "auth_token"
    at_home.parent.mkdir()
    token_file(tmp_path, 0o644).rename(at_home)  # as `ray start --head` leaves it
    assert said().startswith(f"submit: {at_home}: everyone can read the token") and "chmod 600 " in (line := said())
    assert line.count("\n") == 1 and "a-token" not in line
    named = token_file(tmp_path, 0o640)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    assert f"chmod 600 {named}" in said()
    named.chmod(0o600)
    assert said() == ""
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-of-a-test")
    assert said() == ""


class _Dashboard(BaseHTTPRequestHandler):
    """Says what Ray's dashboard says at /api/authentication_mode; tests/test_docs.py asks a real one."""

    mode = "disabled"

    def do_GET(self) -> None:
        found = self.path == "/api/authentication_mode"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(f'{{"authentication_mode": "{self.mode}"}}'.encode() if found else b"no JSON")

    def log_message(self, *_: object) -> None:
        """Nothing to the terminal."""


@pytest.mark.parametrize(("mode", "warned"), [("disabled", True), ("token", False), ('"', False)])
def test_a_cluster_that_asks_for_no_token_is_warned_of(
    mode: str, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-of-a-test")
    monkeypatch.setattr(_Dashboard, "mode", mode)
    with HTTPServer(("127.0.0.1", 0), _Dashboard) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        warn_of_open_doors(f"http://127.0.0.1:{server.server_port}/")
    said = capsys.readouterr().err
    assert ("asks for no token" in said and said.count("\n") == 1) if warned else said == ""
