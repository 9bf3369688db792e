"""What only the cluster can answer: whether its nodes run our code and reach what a stage reads and writes."""

import fnmatch
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

import ldm
from jobs.package import PACKAGES, locations
from ldm import storage
from ldm.config import Config, RequestError
from pipelines import cluster
from pipelines.progress import counted, say
from pipelines.tracking import TrackingConfig

_SHARED = ("nfs*", "cifs", "smb*", "lustre", "ceph", "gluster*", "gpfs", "beegfs*", "wekafs", "afs", "fuse.*")
_NOT_SHARED = ("fuse.*overlay*", "fuse.*snap*")
_PATTERN = re.compile(r"[*?\[{]")
SQLITE = "sqlite:///"


def check(config: Config) -> None:
    """Asks within a job, before its stage begins; one line says what runs where. Raises RequestError."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node, has in cluster.live_nodes().items() if has.get("CPU", 0) >= 1 or node == here]
    check_one_node_only(config, len(nodes))
    check_worker(config, ask_worker(config, next((node for node in nodes if node != here), here)))


def check_one_node_only(config: Config, nodes: int) -> None:
    """Raises RequestError where several nodes are to work with what lies on one of them."""
    if nodes < 2:
        return
    several = f"and {counted(nodes, 'node')} work"
    for key, url in locations(config):
        if storage.is_local(url) and not _is_shared(kind := file_system(storage.local_path(url))):
            raise RequestError(
                f"{key}={url}: lies on a disk of one node ({kind}), {several}; "
                "give a URL such as s3://BUCKET/…, or a folder on a file system that all nodes mount"
            )
    tracking = _tracking(config)
    if tracking is not None and str(tracking.uri).startswith(SQLITE):
        raise RequestError(
            f"tracking.uri={tracking.uri}: is a file on one node, {several}; give an MLflow server's URL "
            "(or MLFLOW_TRACKING_URI), or tracking.enabled=false"
        )


def file_system(path: Path) -> str:
    """The kind of file system, `ext4`, that a path lies on or would lie on."""
    place = os.path.realpath(path.expanduser())
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    above = [mount for mount in mounts if f"{place}/".startswith(f"{mount.rstrip('/')}/")]
    return mounts[max(above, key=len)] if above else "unknown"


def ask_worker(config: Config, node: str) -> dict[str, Any]:
    """What a process on this node (its id) says: versions, whose code it imports, and what it cannot reach."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    tracking = _tracking(config)
    server = str(tracking.uri) if tracking and not str(tracking.uri).startswith(SQLITE) else None
    packages, stores = PACKAGES, _stores(config)

    def look() -> dict[str, Any]:
        """Pickled by value: it asks what this node would import."""
        import importlib
        import importlib.metadata
        import platform
        from pathlib import Path

        found = {name: str(Path(str(importlib.import_module(name).__file__)).parent.parent) for name in packages}
        from jobs.cluster_checks import unreachable

        try:
            installed = importlib.metadata.version(ldm.DISTRIBUTION)
        except importlib.metadata.PackageNotFoundError:
            installed = ""
        return {
            "host": platform.node(),
            "python": platform.python_version(),
            "installed": installed,
            "uploaded": str(Path.cwd()),
            "found": found,
            "unreachable": unreachable(stores, server),
        }

    here = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        answer: dict[str, Any] = ray.get(ray.remote(look).options(num_cpus=0, scheduling_strategy=here).remote())
    except ray.exceptions.RayError as error:
        last = " ".join(str(error).strip().splitlines()[-1].split())[:200]
        raise RequestError(f"--address: a worker process cannot run our code ({last})") from None
    return answer


def check_worker(config: Config, said: Mapping[str, Any]) -> None:
    """Says what a worker runs. Raises RequestError where that is other code than ours, or where it reaches no store."""
    import ray

    for name, place in said["found"].items():
        if os.path.realpath(place) != os.path.realpath(said["uploaded"]):
            raise RequestError(
                f"--address: {name} comes from {place} on {said['host']}, not from what was submitted "
                f"({said['uploaded']}); take it out of PYTHONPATH there"
            )
    other = said["installed"] and said["installed"] != ldm.__version__
    say(
        f"job: Python {said['python']}, Ray {ray.__version__}, {ldm.DISTRIBUTION} {ldm.__version__}; "
        f"{', '.join(PACKAGES)} come from {said['uploaded']} on {said['host']}"
        + (f" (installed there: {said['installed']}, not used)" if other else "")
    )
    for key, text in said["unreachable"].items():
        if key == "tracking.uri" and _goes_on(config):
            say(f"job: {text}; the run goes on, and sends later")
        else:
            raise RequestError(text)


def unreachable(stores: Mapping[str, str], server: str | None) -> dict[str, str]:
    """What this process cannot reach: one line by key. stores: one URL of each store, by key; server: of MLflow."""
    found = {}
    for key, url in stores.items():
        try:
            storage.exists(url)
        except (OSError, RequestError) as error:
            text = " ".join(str(error).split())[:300]
            found[key] = f"{key}={url}: cannot be reached from a worker ({text}); see its endpoint and its credentials"
    if server is not None and (text := _asked_mlflow(server)):
        found["tracking.uri"] = (
            f"tracking.uri={server}: cannot be reached from a worker ({text}); give one that the nodes reach, "
            "or tracking.enabled=false"
        )
    return found


def _asked_mlflow(uri: str) -> str:
    """Why a server gives no answer; nothing where it does."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"], os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "1", "15"
    from mlflow import MlflowClient

    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # any client, server or network fault
        return " ".join(str(error).split())[:200] or type(error).__name__
    finally:  # this process may be a worker of the stage's
        del os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"], os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    return ""


def _stores(config: Config) -> dict[str, str]:
    """One URL of each store that a configuration names, by its key."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for key, url in locations(config):
        if not storage.is_local(url):
            plain = _PATTERN.split(url)[0].rstrip("/")
            found.setdefault(urlsplit(plain)[:2], (key, plain))
    return {key: url for key, url in found.values()}


def _tracking(config: Config) -> TrackingConfig | None:
    tracking: TrackingConfig | None = getattr(config, "tracking", None)
    return tracking.resolved() if tracking is not None and tracking.enabled else None


def _goes_on(config: Config) -> bool:
    """Whether it is a training that began, which needs no MLflow to go on."""
    output = getattr(config, "output", None)
    return output is not None and hasattr(config, "resume") and storage.exists(storage.join(output, "run.json"))


def _is_shared(kind: str) -> bool:
    """Whether all nodes see the same files on a file system of this kind."""
    if any(fnmatch.fnmatch(kind, pattern) for pattern in _NOT_SHARED):
        return False
    return any(fnmatch.fnmatch(kind, pattern) for pattern in _SHARED)
