"""Makes docs/images/mlflow.png: MLflow's page on real runs, with the columns that the README names, in a real Chromium.

    python tests/bench/picture_mlflow.py sqlite:///ldm-demo/mlflow.db docs/images/mlflow.png

It writes one tag into the store, the view with these columns, as MLflow's own button for sharing a view does.
"""

import io
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image

COLUMNS = [
    "metrics.`val/loss`",
    "metrics.`train/loss`",
    "metrics.`perf/images_per_second`",
    "metrics.`progress/optimizer_step`",
    "params.`learning_rate`",
    "params.`denoiser.hidden_size`",
    "params.`denoiser.depth`",
]
VIEW = "columns"
SIZE = {"width": 1900, "height": 560}  # so wide that MLflow shows all of the columns
TABLE = {"x": 0, "y": 0, "width": 1412, "height": 560}  # and not the assistant beside it
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT_S = 120


def main(store: str, target: str) -> None:
    client = MlflowClient(store)
    experiment = next(one for one in client.search_experiments() if one.name != "Default")
    view = {"selectedColumns": COLUMNS, "searchFilter": "tags.stage = 'train'", "orderByKey": COLUMNS[0]}
    view |= {"orderByAsc": True}
    client.set_experiment_tag(experiment.experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(view))
    with mlflow_server(store) as url:
        shot = photograph(f"{url}/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={VIEW}")
    picture = Image.open(io.BytesIO(shot)).convert("RGB").quantize(128)  # a page has few colours
    picture.save(target, optimize=True)
    print(f"{target}: {Path(target).stat().st_size:,} bytes")


@contextmanager
def mlflow_server(store: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        store,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + WAIT_S
            while not answers(url):
                assert process.poll() is None and time.monotonic() < deadline, "mlflow ui did not start"
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/health", timeout=5).status == 200)
    except OSError:
        return False


def photograph(page_url: str) -> bytes:
    """PNG of the page once its table stands."""
    from playwright.sync_api import sync_playwright

    browser_path = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=browser_path)
        page = browser.new_page(viewport=SIZE)  # type: ignore[arg-type]
        page.goto(page_url)
        page.get_by_text("val/loss").first.wait_for(timeout=WAIT_S * 1000)
        page.wait_for_timeout(3000)  # for the rows to be laid out
        shot = page.screenshot(clip=TABLE)  # type: ignore[arg-type]
        browser.close()
    return shot


if __name__ == "__main__":
    main(*sys.argv[1:])
