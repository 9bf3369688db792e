"""The whole of what is measured, on a trained model: floor, reconstructions and samples come in that order."""

from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm import images
from ldm.autoencoder import Autoencoder, load_autoencoder
from ldm.digits import load_digit_pictures
from ldm.features import Features, load_extractor
from ldm.identity import IdentityAutoencoder
from ldm.shards import ShardReader
from pipelines.evaluate.figures import measure
from pipelines.evaluate.reference import Pictures, Reference
from tests.ldm.extractors import Means, write_script
from tests.pipelines.quick_model import draw_from_quick_model

pytestmark = pytest.mark.slow


class Blurring(IdentityAutoencoder):
    """A first stage that loses what is finer than four pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.config["block_out_channels"] = [3, 3, 3]

    def encode(self, x: Tensor):  # type: ignore[no-untyped-def]
        return super().encode(F.avg_pool2d(x, 4))

    def decode(self, latents: Tensor):  # type: ignore[no-untyped-def]
        return super().decode(F.interpolate(latents, scale_factor=4.0, mode="bilinear"))


def check_order(train: Tensor, held_out: Tensor, autoencoder: Autoencoder, features: Features, steps: int) -> None:
    drawn = draw_from_quick_model(train, autoencoder, steps, len(held_out))
    names = tuple(f"shard/{i}" for i in range(len(train)))
    reference = Reference(Pictures(train, None), Pictures(held_out, None), 0, names)
    figures = measure(Pictures(drawn, None), reference, features, autoencoder).metrics
    print({name: round(value, 4) for name, value in figures.items()})
    name, kernel = f"fd-{features.name}", f"kid-{features.name}"
    assert figures[f"{name}_floor"] < figures[f"{name}_reconstruction"] < figures[name]
    assert figures[name] == figures[f"{name}_equal_n"]
    assert figures[f"{kernel}_floor"] < min(figures[f"{kernel}_reconstruction"], figures[kernel])
    for name in (f"precision-{features.name}", f"coverage-{features.name}"):
        assert figures[name] < figures[f"{name}_floor"]


def test_of_digits_through_a_stage_that_blurs(tmp_path: Path) -> None:
    pictures, _ = load_digit_pictures()
    network = load_extractor(str(write_script(Means(), tmp_path / "means.pt")), (32, 32))
    mixed = pictures[torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))]
    check_order(mixed[:1200], mixed[1200:1320], Autoencoder(Blurring()), network, steps=60)


@pytest.mark.real_data
def test_of_photos_through_taesd_in_a_real_networks_features(shared: Path) -> None:
    reader = islice(ShardReader(str(shared / "data" / "grocery" / "train-00000.tar")), 99)
    pictures = torch.stack([torch.from_numpy(images.decode(sample.picture or b"", 64)[0]) for sample in reader])
    held_out = torch.arange(len(pictures)) % 11 < 3  # 27, for the network takes a tenth of a second for each
    network = load_extractor(str(shared / "models" / "mobilenet_v2_features.pt"), (64, 64))
    taesd = load_autoencoder(str(shared / "models" / "taesd"))
    check_order(pictures[~held_out], pictures[held_out], taesd, network, steps=100)
