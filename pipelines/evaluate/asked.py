"""What an evaluation was asked and what it reported: OUTPUT/request.json, written last; nothing is measured twice."""

from collections.abc import Sequence
from typing import Any

from ldm import storage

_FILE = "request.json"


def forget(output: str, request: dict[str, Any] | None, files: Sequence[str]) -> None:
    """Removes what another evaluation left there, its `files` too: they are not of the pictures that come now."""
    if request is not None and _known(output).get("request") == request:
        return
    for name in (_FILE, *files):
        storage.remove(storage.join(output, name))


def keep(output: str, request: dict[str, Any] | None, report: dict[str, Any]) -> None:
    """request: all that the figures depend on; None: it cannot be told, and nothing is kept."""
    if request is not None:
        storage.write_json(storage.join(output, _FILE), {"request": request, "report": report})


def kept(output: str, request: dict[str, Any] | None, needs: Sequence[str]) -> dict[str, Any] | None:
    """The report of an evaluation that was asked the same, if the files that it `needs` are there; else None."""
    known = _known(output)
    if request is None or known.get("request") != request:
        return None
    whole = all(storage.exists(storage.join(output, name)) for name in needs)
    report: dict[str, Any] | None = known.get("report")
    return report if whole else None


def _known(output: str) -> dict[str, Any]:
    """Empty where nothing is kept, or it is damaged: then it is done again."""
    try:
        known = storage.read_json(storage.join(output, _FILE))
    except (FileNotFoundError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
