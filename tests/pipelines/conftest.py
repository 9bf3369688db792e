"""What tests of this folder share: image shards, an autoencoder, latents, a run on them; a browser before the page."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ldm.autoencoder import Autoencoder
from ldm.digits import write_digit_shards
from ldm.engine import StepEngine
from ldm.latents.manifest import Conditioning
from ldm.shards import RawSample
from pipelines.serve.config import ServeConfig
from pipelines.serve.local import local_app
from pipelines.serve.replica import Replica
from pipelines.train import train
from tests.pictures import image_shard, kl_model, latent_dataset, samples
from tests.pipelines.browsing import Turnstile, Visit, serving
from tests.pipelines.tiny_snapshot import write_tiny_snapshot
from tests.pipelines.training import Run, config, tracked

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ANIMALS = tuple(f"{kind} {name}" for kind in ("red", "grey", "tiny") for name in ("fox", "owl", "hare", "seal", "tern"))


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    kl_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of the handwritten digits; only read."""
    folder = tmp_path_factory.mktemp("digits")
    write_digit_shards(folder, shards=2)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Three shards of 20 samples; the middle one holds four that cannot be encoded."""
    folder = tmp_path_factory.mktemp("images")
    image_shard(folder / "train-00000.tar", samples(20))
    bad = samples(20, start=20)
    bad[3].members["png"] = b"no picture"
    bad[7] = RawSample("00022", bad[7].members)  # stands twice
    del bad[11].members["png"]
    bad[15].members["cls"] = b"seven"
    image_shard(folder / "train-00001.tar", bad)
    image_shard(folder / "train-00002.tar", samples(20, start=40))
    return str(folder)


@pytest.fixture(scope="session")
def latents(tmp_path_factory) -> str:
    """A latent dataset to train on, that no test changes: 45 random moments (8, 2, 2) of 3 classes."""
    folder = tmp_path_factory.mktemp("latents")
    autoencoder = Autoencoder(kl_model())
    latent_dataset(str(folder), autoencoder, counts=(20, 18, 7))
    autoencoder.save(str(folder / "autoencoder"))
    return str(folder)


@pytest.fixture(scope="session")
def uninterrupted(latents: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 8 steps that nothing disturbed, and that no test changes."""
    place = tmp_path_factory.mktemp("runs")
    uri = f"sqlite:///{place}/mlflow.db"
    report = train(config(latents, place / "run", tracking=tracked(uri)))
    return Run(place / "run", uri, report)


@pytest.fixture(scope="session")
def mlflow_folder(tmp_path_factory):
    """The folder of MLflow's database and artifacts: making one takes seconds, so the tests of tracking share it."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def page_replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """Four models: numerals of ten classes (the default), animals of many, blank of none, and a flow."""
    folder = tmp_path_factory.mktemp("snapshots")
    write_tiny_snapshot(folder / "numerals")
    names = tuple(f"{animal} {i}" for animal in ANIMALS for i in (1, 2, 3))
    write_tiny_snapshot(folder / "animals", Conditioning("class", len(names), names))
    write_tiny_snapshot(folder / "blank", Conditioning())
    described = Path(write_tiny_snapshot(folder / "flow", seed=1), "snapshot.json")
    about = json.loads(described.read_text())
    about["diffusion"] |= {"schedule": "flow", "prediction_type": "velocity"}
    described.write_text(json.dumps(about))
    replica = Replica(ServeConfig(snapshot=str(folder), batch_size=4, max_models=4, max_waiting=2, refresh_s=0), "cpu")
    yield replica
    replica.close()


@pytest.fixture(scope="module")
def page_url(page_replica: Replica) -> Iterator[str]:
    with serving(local_app(page_replica)) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium. For a module: while Playwright runs, its thread has an event loop that asyncio refuses."""
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs a Chromium, found none of {', '.join(BROWSERS)}: apt-get install chromium")
    api.expect.set_options(timeout=30_000)
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, page_url: str) -> Iterator[Visit]:
    """A window on the page. At its end: nothing was asked of another host, and nothing stands in the console."""
    visit = Visit(browser.new_context(viewport={"width": 1360, "height": 900}), page_url)
    visit.context.set_default_timeout(30_000)
    yield visit
    visit.context.close()
    assert {r.url for r in visit.requests if not r.url.startswith((visit.url + "/", "data:", "about:"))} == set()
    assert visit.complaints == []


@pytest.fixture
def turnstile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Turnstile]:
    """Holds every drawing before its first step."""
    turnstile = Turnstile(StepEngine.step)
    monkeypatch.setattr(StepEngine, "step", lambda engine: turnstile.step(engine))
    yield turnstile
    turnstile.open()


@pytest.fixture
def expect(browser: Any) -> Callable[..., Any]:
    """Playwright's assertion that waits."""
    from playwright.sync_api import expect

    return expect  # type: ignore[no-any-return]
