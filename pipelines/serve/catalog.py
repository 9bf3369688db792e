"""Which snapshots there are to serve, and which one is served where nobody names one."""

from dataclasses import dataclass

from ldm import storage
from ldm.config import RequestError
from ldm.snapshot import Snapshot, read_snapshot
from pipelines.lineage import SNAPSHOT_PARAM
from pipelines.registry import SNAPSHOT_TAG

MLFLOW = "models:/"
SNAPSHOTS = "snapshots"
"""Where `ldm train` writes them in its output."""


@dataclass(frozen=True)
class Version:
    """A snapshot that can be served. name: what requests call it."""

    name: str
    snapshot: Snapshot

    @property
    def key(self) -> tuple[str, str]:
        """One for one set of weights and settings: a folder is never written twice, but for its whole self."""
        return self.snapshot.url, self.snapshot.weights_sha256


class Catalog:
    """The snapshots behind one `ServeConfig.snapshot`.

    A snapshot; a folder of them, or the output of `ldm train`, of which the one with the most steps is the default; or
    a model of MLflow, `models:/NAME@ALIAS` or `models:/NAME/VERSION`. What a request calls a model is looked up in a
    list: it is never a path.
    """

    def __init__(self, reference: str) -> None:
        self.reference = reference
        self._read: dict[str, Snapshot] = {}  # of a folder, by URL: snapshots there are never changed

    def default(self) -> Version:
        """What is served where nobody names a model. Raises RequestError where there is none that can be read."""
        if self._folder() is None:
            url = _resolve_mlflow(self.reference) if self.reference.startswith(MLFLOW) else self.reference
            name = self.reference.removeprefix(MLFLOW) if url != self.reference else storage.name(url)
            return Version(name, read_snapshot(url))
        if not (versions := self.versions()):
            raise RequestError(
                f"snapshot={self.reference}: holds no snapshot; give one that `ldm train` wrote, its output, or "
                "models:/NAME@ALIAS"
            )
        return max(versions, key=lambda version: (version.snapshot.step, version.name))

    def versions(self) -> list[Version]:
        """All that a request may name; those of a folder that cannot be read are left out."""
        folder = self._folder()
        if folder is None:
            return [self.default()]
        found = []
        for name in storage.list_dir(folder):
            url = storage.join(folder, name)
            try:
                if url not in self._read:
                    self._read[url] = read_snapshot(url)
            except RequestError:
                continue
            found.append(Version(name, self._read[url]))
        return found

    def find(self, name: str) -> Version:
        """Raises RequestError where no model has this name."""
        versions = self.versions()
        for version in versions:
            if version.name == name:
                return version
        known = ", ".join(version.name for version in versions)
        raise RequestError(f"model={name}: is not served here; give {known[:200]}, or leave it out")

    def _folder(self) -> str | None:
        """The folder of snapshots, None where the reference is one snapshot."""
        reference = self.reference
        if reference.startswith(MLFLOW) or storage.exists(storage.join(reference, "snapshot.json")):
            return None
        inner = storage.join(reference, SNAPSHOTS)
        if storage.is_directory(inner):
            return inner
        return reference if storage.is_directory(reference) else None


def _resolve_mlflow(reference: str) -> str:
    """`models:/NAME@ALIAS` or `models:/NAME/VERSION` => the URL of the snapshot. Raises RequestError."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    name, at, alias = reference.removeprefix(MLFLOW).partition("@")
    client = MlflowClient()
    try:
        if at:
            version = client.get_model_version_by_alias(name, alias)
        else:
            name, _, number = name.partition("/")
            version = client.get_model_version(name, number)
        if SNAPSHOT_TAG in version.tags:  # as `ldm train` makes them
            return str(version.tags[SNAPSHOT_TAG])
        source = str(version.source)
        if source.startswith(MLFLOW):  # a logged model, which somebody registered
            return str(client.get_logged_model(source.removeprefix(MLFLOW)).params[SNAPSHOT_PARAM])
    except (MlflowException, KeyError) as error:
        text = " ".join(str(error).split())[:160]
        raise RequestError(
            f"snapshot={reference}: MLflow has no snapshot of that name ({text}); give models:/NAME@ALIAS"
        ) from None
    return source
