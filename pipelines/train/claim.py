"""Of several commands on one output the one that began last goes on; the one before learns of it and ends.

A lease would have to run out before a command whose machine died could be given again: so the last one has the right.
"""

import platform
import threading
import uuid
from datetime import UTC, datetime
from typing import Any

from ldm import storage

OWNER_FILE = "owner.json"
_LOOK_EVERY_S = 3.0


class Claim:
    """From now on `output` is this command's; `check` tells when it is another's. For the length of a `with` block."""

    def __init__(self, output: str) -> None:
        self._output, self._url = output, storage.join(output, OWNER_FILE)
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        self._own = {"token": uuid.uuid4().hex, "host": platform.node(), "begun": begun}
        self._other: dict[str, Any] | None = None
        self._over = threading.Event()

    def __enter__(self) -> "Claim":
        storage.write_json(self._url, self._own)
        # Not of the loop that answers Ctrl-C: a store that is down is asked for minutes.
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def check(self) -> None:
        """Raises RuntimeError once another command has begun on the output; never waits."""
        if self._other is not None:
            who = f"at {self._other.get('begun')} on {self._other.get('host')}"
            raise RuntimeError(
                f"output={self._output}: another `ldm train` has begun here {who}, and goes on; this one ends"
            )

    def _watch(self) -> None:
        while self._other is None and not self._over.wait(_LOOK_EVERY_S):
            try:
                found = storage.read_json(self._url)
            except (OSError, ValueError):  # nobody can look now, or it is no claim
                continue
            if isinstance(found, dict) and found.get("token") != self._own["token"]:
                self._other = found
