"""Image shards, a random autoencoder, latents and a run on them that the tests of this folder share."""

import pytest

from ldm.autoencoder import Autoencoder
from ldm.shards import RawSample
from pipelines.train import train
from tests.pictures import image_shard, kl_model, latent_dataset, samples
from tests.pipelines.training import Run, config, tracked


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    kl_model().save_pretrained(folder)
    return str(folder)


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
