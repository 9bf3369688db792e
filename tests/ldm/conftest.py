"""A random first stage and a latent dataset that the tests of this folder share."""

from pathlib import Path

import numpy as np
import pytest

from ldm.autoencoder import Autoencoder, load_autoencoder
from tests.pictures import kl_model, latent_dataset


@pytest.fixture(scope="session")
def kl_folder(tmp_path_factory) -> Path:
    """A diffusers folder of a random AutoencoderKL: factor 2, 4 channels."""
    folder = tmp_path_factory.mktemp("vae")
    kl_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def kl(kl_folder) -> Autoencoder:
    return load_autoencoder(str(kl_folder))


@pytest.fixture(scope="session")
def written(kl, tmp_path_factory) -> tuple[str, dict[str, np.ndarray]]:
    """(url, moments by shard) of a data set of uneven shards, that no test changes."""
    url = str(tmp_path_factory.mktemp("latents"))
    return url, latent_dataset(url, kl)[1]
