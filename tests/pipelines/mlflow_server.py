"""MLflow's own server, in this process: a start of `mlflow server` takes many times as long."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The URL of a server whose database and artifacts lie in `folder`; artifacts go through it, too."""
    from werkzeug.serving import make_server

    uri = f"sqlite:///{folder}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        # Before the import: its protection against foreign hosts and its stores are chosen there.
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", uri)
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", str(folder / "artifacts"))
        patch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
        patch.setenv("MLFLOW_TRACKING_URI", uri)  # which the server changes, and which is so put back
        patch.setenv("MLFLOW_REGISTRY_URI", uri)  # changed and put back too; until then a client asks where it tracks
        patch.delenv("MLFLOW_REGISTRY_URI")
        from mlflow.server import app, handlers
        from mlflow.tracking._model_registry import utils as registry_utils
        from mlflow.tracking._tracking_service import utils

        patch.setattr(utils, "_tracking_uri", None)
        patch.setattr(registry_utils, "_registry_uri", None)
        patch.setattr(handlers, "_tracking_store", None)
        patch.setattr(handlers, "_model_registry_store", None)
        patch.setattr(handlers, "_artifact_repo", None)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
        server = make_server("127.0.0.1", 0, app, threaded=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
        server.server_close()


def history(client: MlflowClient, run_id: str | None, key: str) -> list[tuple[int, float]]:
    """(step, value) of all points that a run has of a metric."""
    return [(point.step, point.value) for point in client.get_metric_history(str(run_id), key)]


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    """Polls for what another thread or process brings about."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.01)
