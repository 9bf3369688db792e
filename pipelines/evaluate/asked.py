"""What an evaluation was asked and what it reported: OUTPUT/request.json, written last; nothing is measured twice."""

from collections.abc import Sequence
from typing import Any

from ldm import storage

_FILE = "request.json"


def forget(output: str) -> None:
    """Before anything of another evaluation is written there."""
    storage.remove(storage.join(output, _FILE))


def keep(output: str, request: dict[str, Any] | None, report: dict[str, Any]) -> None:
    """request: all that the figures depend on; None: it cannot be told, and nothing is kept."""
    if request is not None:
        storage.write_json(storage.join(output, _FILE), {"request": request, "report": report})


def kept(output: str, request: dict[str, Any] | None, needs: Sequence[str]) -> dict[str, Any] | None:
    """The report of an evaluation that was asked the same, if the files that it `needs` are there; else None."""
    url = storage.join(output, _FILE)
    if request is None or not storage.exists(url):
        return None
    try:
        known = storage.read_json(url)
    except ValueError:  # damaged: it is done again
        return None
    if not isinstance(known, dict) or known.get("request") != request:
        return None
    whole = all(storage.exists(storage.join(output, name)) for name in needs)
    report: dict[str, Any] | None = known.get("report")
    return report if whole else None
