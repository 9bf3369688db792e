"""A random first stage that the tests of this folder share."""

from pathlib import Path

import pytest

from ldm.autoencoder import Autoencoder, load_autoencoder
from tests.pictures import kl_model


@pytest.fixture(scope="session")
def kl_folder(tmp_path_factory) -> Path:
    """A diffusers folder of a random AutoencoderKL: factor 2, 4 channels."""
    folder = tmp_path_factory.mktemp("vae")
    kl_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def kl(kl_folder) -> Autoencoder:
    return load_autoencoder(str(kl_folder))
