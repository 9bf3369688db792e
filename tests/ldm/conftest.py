"""A random first stage, a latent dataset, and objects of a store that the tests of this folder share."""

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldm import storage
from ldm.autoencoder import Autoencoder, load_autoencoder
from ldm.latents.cache import RemoteFile
from tests.ldm.caching import SIZE
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


@pytest.fixture
def chaos(chaos_s3, monkeypatch):
    """The proxy; no repetition but by storage, after short pauses; parts of a third of a file."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("ldm.storage.transport.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("ldm.storage.files.PART", 20_000)
    return chaos_s3


@pytest.fixture
def put(s3) -> Callable[[int], list[RemoteFile]]:
    """A function that writes objects of SIZE random bytes."""
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])

    def write(count: int) -> list[RemoteFile]:
        files = []
        for _ in range(count):
            key, body = f"{uuid.uuid4().hex}.tar", os.urandom(SIZE)
            client.put_object(Bucket="bucket", Key=key, Body=body)
            files.append(RemoteFile(f"{s3}/{key}", hashlib.sha256(body).hexdigest(), len(body)))
        return files

    return write


@pytest.fixture
def overwrite(s3) -> Callable[[RemoteFile, bytes | None], None]:
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])

    def write(file: RemoteFile, data: bytes | None) -> None:
        key = storage.name(file.url)
        if data is None:
            client.delete_object(Bucket="bucket", Key=key)
        else:
            client.put_object(Bucket="bucket", Key=key, Body=data)

    return write
