"""The arms of a study and what is done of them.

OUTPUT/study.json      which study, and all that its figures depend on and its arms share; the MLflow run
       arms/NAME.json  one arm that is done: written whole, and done again only to be measured as others are
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm import storage
from ldm.config import RequestError, differences

FORMAT = "ldm-study"
VERSION = 1


class Arms:
    """The arms in `output`. Making one claims nothing; `claim` does."""

    def __init__(self, output: str, study: str, request: Mapping[str, Any]) -> None:
        """request: plain JSON values. Raises RequestError where another study is there, or arms of another request."""
        self.output, self.study, self.request = output, study, dict(request)
        storage.check_writable("output", output)
        known = self._read()
        self.run_id: str | None = known.get("run_id")

    def claim(self, run_id: str | None) -> None:
        """Writes down what the arms here are of."""
        self.run_id = run_id
        about = {"format": FORMAT, "version": VERSION, "study": self.study, "request": self.request, "run_id": run_id}
        storage.write_json(self._url(), about)

    def done(self, name: str) -> dict[str, Any] | None:
        """What `finish` was given; None for an arm that is not done."""
        url = self._arm_url(name)
        if not storage.exists(url):
            return None
        try:
            row = storage.read_json(url)
        except ValueError:  # no file of ours: it is done anew
            return None
        return row if isinstance(row, dict) else None

    def alike(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that are done, and measured in the same features as the first of them."""
        rows = {name: row for name in names if (row := self.done(name)) is not None}
        features = next((row.get("features") for row in rows.values()), None)
        return [name for name, row in rows.items() if row.get("features") == features]

    def names(self) -> list[str]:
        """Of all arms that are done, in the order of their names."""
        folder = storage.join(self.output, "arms")
        names = storage.list_dir(folder) if storage.is_directory(folder) else []
        return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))

    def finish(self, name: str, row: Mapping[str, Any]) -> None:
        storage.write_json(self._arm_url(name), dict(row))

    def _read(self) -> dict[str, Any]:
        if not storage.exists(self._url()):
            return {}
        known = storage.read_json(self._url())
        if not isinstance(known, dict) or known.get("format") != FORMAT or known.get("version") != VERSION:
            raise RequestError(f"output={self.output}: holds a study.json of something else; give another output")
        if known["study"] != self.study:
            raise RequestError(f"output={self.output}: holds a study {known['study']}; give another output")
        # Without an arm there is nothing that would not compare: a request that failed can be mended.
        if self.names() and (found := differences(known["request"], self.request)):
            raise RequestError(
                f"output={self.output}: holds arms of another request ({'; '.join(found)}); give another output"
            )
        return known

    def _url(self) -> str:
        return storage.join(self.output, "study.json")

    def _arm_url(self, name: str) -> str:
        return storage.join(self.output, "arms", f"{name}.json")
