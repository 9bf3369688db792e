"""A latent dataset opens in other people's tools (plain webdataset and pandas: tests/ldm/test_latents.py)."""

import glob
from pathlib import Path

import numpy as np
import pytest

from ldm.autoencoder import Autoencoder
from tests.pictures import kl_model, latent_dataset


@pytest.mark.ray
def test_ray_data_reads_the_shards(ray_session: None, tmp_path: Path) -> None:
    import ray.data

    _, content = latent_dataset(str(tmp_path), Autoencoder(kl_model()), (5, 3))
    rows = ray.data.read_webdataset(glob.glob(f"{tmp_path}/latents/*.tar")).take_all()
    found = {(Path(row["__url__"]).stem, row["__key__"]): row["latents.npy"] for row in rows}
    assert len(found) == 8
    for shard, moments in content.items():
        for number, expected in enumerate(moments):
            assert np.array_equal(found[shard, f"{number:05d}"], expected)
