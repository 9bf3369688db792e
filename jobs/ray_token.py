"""The token of a Ray cluster, with which one runs code there: whether it asks for one, who else may read its file."""

import json
import os
import urllib.request
from pathlib import Path

from pipelines.progress import say
from pipelines.token_files import other_readers


def warn_of_open_doors(address: str) -> None:
    """A line for each way by which others may run code on the cluster whose dashboard is at `address`.

    `ray start --head` asks for a token only where it finds one, or RAY_AUTH_MODE=token; and Ray leaves the file of a
    token that it makes readable by everyone (mode 0644).
    """
    if _asks_for_none(address):
        say(
            f"submit: {address}: asks for no token, so that whoever reaches it runs code there; "
            "begin it with `ray get-auth-token --generate` and RAY_AUTH_MODE=token ray start --head"
        )
    path = _token_file()
    if path is not None and path.is_file() and (others := other_readers(path)):
        say(f"submit: {path}: {others} can read the token, with which one runs code on the cluster; chmod 600 {path}")


def _asks_for_none(address: str) -> bool:
    """Whether it says so; older Rays do not say."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/authentication_mode", timeout=5) as answer:
            return bool(json.load(answer)["authentication_mode"] == "disabled")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _token_file() -> Path | None:
    """Where Ray's client looks; None where the token is in the environment."""
    if "RAY_AUTH_TOKEN" in os.environ:
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
