"""What an evaluation is held against, and what it refuses in one line before any work."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm import images, shards
from ldm.config import RequestError
from ldm.latents.choice import is_held_out
from ldm.latents.manifest import Conditioning
from ldm.latents.writer import sample_id
from ldm.snapshot import read_snapshot
from ldm.sources import InputShard, find_shards
from pipelines.evaluate import EvaluateConfig, plan
from pipelines.evaluate.reference import Reference, read_reference
from tests.pictures import samples, write_pictures
from tests.pipelines.tiny_snapshot import write_tiny_snapshot

HOLDOUT = 0.2


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_snapshot(tmp_path_factory.mktemp("evaluate") / "snapshot")


@pytest.fixture(scope="module")
def reference(digits: Path, snapshot: str) -> Reference:
    return read_reference(find_shards(f"{digits}/*.tar")[0], read_snapshot(snapshot), HOLDOUT, 20_000)


class TestReference:
    def test_is_split_as_training_splits(self, digits: Path, reference: Reference) -> None:
        assert (len(reference.train) + len(reference.holdout), reference.skipped) == (1797, 2)
        held_out = []
        for name in ("digits-00000", "digits-00001"):
            for sample in shards.ShardReader(str(digits / f"{name}.tar")):
                if is_held_out(np.array([sample_id(name, sample.key)]), HOLDOUT)[0]:
                    held_out.append(sample)
        kept = [s for s in held_out if s.key not in ("00600", "01200")]  # the two broken ones
        assert len(reference.holdout) == len(kept)
        assert reference.holdout.labels is not None
        assert reference.holdout.labels.tolist() == [s.label for s in kept]
        assert kept[0].picture is not None
        assert np.array_equal(reference.holdout.pixels[0].numpy(), images.decode(kept[0].picture, 32)[0])

    def test_has_the_shape_of_what_the_model_draws(self, digits: Path, snapshot: str) -> None:
        """With buckets that is not the size of the fingerprint."""
        wide = replace(read_snapshot(snapshot), latent_shape=(4, 2, 8))
        found = read_reference(find_shards(str(digits / "digits-00000.tar"))[0], wide, 0.0, 5)
        assert found.train.pixels.shape == (5, 3, 16, 64)

    def test_reads_no_more_than_asked(self, digits: Path, snapshot: str) -> None:
        inputs = find_shards(str(digits / "digits-00000.tar"))[0]
        inputs["missing"] = InputShard("missing", "never-opened.tar", 1, "")
        found = read_reference(inputs, read_snapshot(snapshot), 0.0, 50)
        assert (len(found.train), len(found.holdout)) == (50, 0)
        assert found.train_names[0] == "digits-00000/00000" and len(found.train_names) == 50

    def test_a_folder_of_pictures_is_split_as_its_shards_are(self, tmp_path: Path, snapshot: str) -> None:
        generator = np.random.default_rng(0)
        for number in range(60):
            place = tmp_path / "pictures" / ("three" if number % 2 else "seven")
            place.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (3, 32, 32), dtype=np.uint8)
            (place / f"{number:03d}.png").write_bytes(images.to_png(pixels))
        (tmp_path / "pictures" / "three" / "torn.png").write_bytes(b"no picture")
        inputs, classes = find_shards(str(tmp_path / "pictures"))
        found = read_reference(inputs, read_snapshot(snapshot), HOLDOUT, 100)
        assert classes == ("seven", "three")
        assert (len(found.train) + len(found.holdout), found.skipped) == (60, 1)
        keys = [(name, s.key) for name, shard in inputs.items() for s in shard.reader() if "torn" not in s.key]
        ids = np.array([sample_id(name, key) for name, key in keys])
        assert len(found.holdout) == int(is_held_out(ids, HOLDOUT).sum()) > 0
        assert found.train.labels is not None and found.holdout.labels is not None
        assert torch.cat([found.train.labels, found.holdout.labels]).bincount().tolist() == [30, 30]

    def test_labels_are_read_where_encode_was_told(self, tmp_path: Path, snapshot: str) -> None:
        content = [
            shards.RawSample(s.key, {**s.members, "json": f'{{"kind": {s.label}}}'.encode(), "cls": b"9"})
            for s in samples(12)
        ]
        shards.write_shard(str(tmp_path / "shard.tar"), content)
        inputs = find_shards(str(tmp_path / "shard.tar"))[0]
        found = read_reference(inputs, read_snapshot(snapshot), 0.0, 100, label="json.kind")
        assert found.train.labels is not None and found.train.labels.tolist() == [0, 1, 2] * 4

    def test_what_is_left_out_is_said_and_what_has_no_label_counted(
        self, tmp_path: Path, snapshot: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = write_pictures(tmp_path / "shard.tar", labels=[1, None, 3, None, 5])
        found = read_reference(find_shards(path)[0], read_snapshot(snapshot), 0.0, 10)
        assert (found.train.labels, found.skipped, found.unlabelled) == (None, 0, 2)
        assert "left out" not in capfd.readouterr().err
        broken = [*shards.ShardReader(path), shards.RawSample("torn", {"png": b"no picture"})]
        broken[0].members["cls"] = b"one"
        shards.write_shard(path, broken)
        found = read_reference(find_shards(path)[0], read_snapshot(snapshot), 0.0, 10)
        assert (len(found.train), found.skipped, found.unlabelled) == (4, 2, 2)
        said = "evaluate: 2 samples of the reference left out: no readable picture, or a broken label\n"
        assert said in capfd.readouterr().err

    def test_both_sides_are_the_pictures_of_the_whole(self, digits: Path, snapshot: str) -> None:
        inputs = find_shards(str(digits / "digits-00000.tar"))[0]
        whole, split = (read_reference(inputs, read_snapshot(snapshot), share, 50) for share in (0.0, 0.5))
        assert whole.holdout.pixels.shape == (0, 3, 32, 32) and whole.holdout.labels is not None
        kept = torch.tensor([name in split.train_names for name in whole.train_names])
        assert 10 < int(kept.sum()) < 40
        for part, rows in ((split.train, kept), (split.holdout, ~kept)):
            expected = whole.train.take(rows)
            assert torch.equal(part.pixels, expected.pixels)
            assert part.labels is not None and expected.labels is not None and part.labels.equal(expected.labels)

    def test_a_label_that_the_model_does_not_have(self, tmp_path: Path, snapshot: str) -> None:
        path = write_pictures(tmp_path / "shard.tar", labels=[3, 10])
        with pytest.raises(RequestError, match=r"^reference: holds label 10, but the model has classes 0 to 9"):
            read_reference(find_shards(path)[0], read_snapshot(snapshot), 0.0, 10)

    def test_nothing_readable(self, tmp_path: Path, snapshot: str) -> None:
        path = str(tmp_path / "words.tar")
        shards.write_shard(path, [shards.RawSample("a", {"txt": b"no picture"})])
        with pytest.raises(RequestError, match=r"^reference=.*words\.tar: holds no readable picture"):
            read_reference(find_shards(path)[0], read_snapshot(snapshot), 0.0, 10)

    def test_a_truncated_tar(self, tmp_path: Path, digits: Path, snapshot: str) -> None:
        path = tmp_path / "cut.tar"
        path.write_bytes((digits / "digits-00000.tar").read_bytes()[:10_000])
        with pytest.raises(RequestError, match=r"^reference=.*cut\.tar: is no whole tar"):
            read_reference(find_shards(str(path))[0], read_snapshot(snapshot), 0.0, 10_000)


@pytest.mark.ray
class TestPlan:
    def check(self, message: str, snapshot: str, reference: Path, **changes: Any) -> None:
        config = EvaluateConfig(snapshot=snapshot, reference=f"{reference}/*.tar").model_copy(update=changes)
        with pytest.raises(RequestError, match=message):
            plan(config)

    def test_what_cannot_be_measured_is_refused(self, snapshot: str, digits: Path, tmp_path: Path) -> None:
        self.check(r"^holdout=0\.0: the classifier's own accuracy", snapshot, digits, holdout=0.0)
        self.check(r"^num_inference_steps=5000: must be 1 to 1000", snapshot, digits, num_inference_steps=5000)
        self.check(r"^reference=.*/\*\.tar: matches no file", snapshot, tmp_path / "nowhere")
        self.check(r"^snapshot=.*: is no snapshot", str(tmp_path), digits)
        (tmp_path / "empty.tar").touch()
        self.check(r"^reference=.*empty\.tar: is empty", snapshot, tmp_path)

    def test_an_unconditional_model_has_no_accuracy(self, digits: Path, tmp_path: Path) -> None:
        plain = write_tiny_snapshot(tmp_path / "plain", Conditioning())
        says = "^features=classifier: the model is unconditional; give features=vae"
        self.check(says, plain, digits, features="classifier")
        assert plan(EvaluateConfig(snapshot=plain, reference=f"{digits}/*.tar")).features == "vae"
        self.check(r"^guidance_scale=2\.0: the model is", plain, digits, features="vae", guidance_scale=2.0)

    def test_what_has_no_use_together_is_refused(self, snapshot: str, digits: Path, tmp_path: Path) -> None:
        def check(message: str, **changes: Any) -> None:
            given = {"snapshot": snapshot, "reference": f"{digits}/*.tar", **changes}
            with pytest.raises(RequestError, match=message):
                plan(EvaluateConfig(**given))

        check(r"^features=inception: is none; give classifier, vae, or", features="inception")
        check(r"^features=no\.pt: is not there", features="no.pt")
        check(r"^save_statistics=s\.npz: takes a \.safetensors", save_statistics="s.npz")
        # Of a classifier, which is another one each time:
        check(r"^save_statistics=s\.safetensors: takes .* features that stay", save_statistics="s.safetensors")
        check(r"^reference=s\.safetensors: is not there", reference="s.safetensors")
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(b"12345678{}")
        check(r"^reference=.*broken.*: holds no statistics", reference=str(broken))
        check(r"^features=classifier: statistics have no pictures", reference=str(broken), features="classifier")
        save_file({"mean": torch.zeros(3)}, broken)
        check(r"holds no statistics of ldm evaluate \(its format is None", reference=str(broken))

    def test_a_model_without_a_null_class_is_not_guided(self, snapshot: str, digits: Path, tmp_path: Path) -> None:
        url = Path(shutil.copytree(snapshot, tmp_path / "snapshot"))
        described = (url / "snapshot.json").read_text()
        (url / "snapshot.json").write_text(described.replace('"label_dropout": 0.1', '"label_dropout": 0.0'))
        self.check(r"^guidance_scale=2\.0: the model was trained without", str(url), digits, guidance_scale=2.0)

    def test_an_endpoint_is_a_url(self) -> None:
        with pytest.raises(ValueError, match="is no URL of a deployment"):
            EvaluateConfig(snapshot="s", reference="r", endpoint="file:///etc/passwd")
