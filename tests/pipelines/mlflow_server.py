"""MLflow's own server, in this process: a start of `mlflow server` takes many times as long."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


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
        from mlflow.server import app, handlers
        from mlflow.tracking._tracking_service import utils

        patch.setattr(utils, "_tracking_uri", None)
        patch.setattr(handlers, "_tracking_store", None)
        patch.setattr(handlers, "_artifact_repo", None)
        server = make_server("127.0.0.1", 0, app, threaded=True)
        import threading

        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
        server.server_close()
