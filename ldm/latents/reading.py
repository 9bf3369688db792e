"""`reading.json` of a latent dataset: what is taken of a sample beside its pixels, of all its shards alike.

No latent depends on it, so it is no part of the fingerprint. It carries the SHA-256 of what it says.
"""

import hashlib
from typing import Any

from ldm import storage
from ldm.config import DamagedError, canonical_json

FILE = "reading.json"


def keep(url: str, reading: dict[str, Any]) -> None:
    """Of the data set at `url`, for the runs that follow; what is kept there already stays."""
    storage.create(storage.join(url, FILE), storage.to_json({**reading, "sha256": _hash(reading)}))


def kept(url: str) -> dict[str, Any] | None:
    """None where nothing is kept: of an older data set. Raises DamagedError."""
    place = storage.join(url, FILE)
    try:
        found = storage.read_json(place)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DamagedError(str(error)) from None
    if not isinstance(found, dict) or found.pop("sha256", None) != _hash(found):
        raise DamagedError(f"{place}: is damaged; its sha256 is not the one that it names")
    return found


def _hash(reading: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(reading).encode()).hexdigest()
