"""The evaluation: figures move the way that they must, add up, and repeat; bad input is refused in one line."""

import contextlib
import io
import json
import math
import shutil
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm import images, shards
from ldm.config import RequestError
from ldm.digits import write_digit_shards
from ldm.latents.choice import is_held_out
from ldm.latents.manifest import Conditioning
from ldm.latents.writer import sample_id
from ldm.snapshot import read_snapshot
from ldm.sources import InputShard, find_shards
from pipelines import serve
from pipelines.evaluate import EvaluateConfig, EvaluateReport, evaluate, plan
from pipelines.evaluate.client import SamplesClient
from pipelines.evaluate.reference import Reference, read_reference
from pipelines.tracking import Tracker, TrackingConfig
from tests.ldm.extractors import Means, write_script
from tests.pipelines.tiny_snapshot import NAMES as DIGIT_NAMES
from tests.pipelines.tiny_snapshot import write_tiny_snapshot

HOLDOUT = 0.2
QUICK: dict[str, Any] = {"sampler": "dpmpp_2m", "num_inference_steps": 2, "guidance_scale": 1.5, "holdout": HOLDOUT}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digit_shards(folder, shards=2)
    return folder


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_snapshot(tmp_path_factory.mktemp("evaluate") / "snapshot")


@pytest.fixture(scope="module")
def reference(digits: Path, snapshot: str) -> Reference:
    return read_reference(find_shards(f"{digits}/*.tar")[0], read_snapshot(snapshot), HOLDOUT, 20_000)


@pytest.fixture(scope="class")
def endpoint(ray_session: None, snapshot: str) -> Iterator[str]:
    with serve.deployment(serve.ServeConfig(snapshot=snapshot, port=0, batch_size=16)) as url:
        yield url


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
class TestEvaluate:
    @pytest.fixture(scope="class")
    def config(self, digits: Path, snapshot: str, tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
        folder = tmp_path_factory.mktemp("evaluation")
        tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="test")
        return EvaluateConfig(
            snapshot=snapshot,
            reference=f"{digits}/*.tar",
            output=str(folder / "evaluation"),
            num_images=101,
            max_reference=700,
            tracking=tracking,
            **QUICK,
        )

    @pytest.fixture(scope="class")
    def report(self, config: EvaluateConfig, endpoint: str) -> EvaluateReport:
        with Tracker(config.tracking, "train/run") as training:  # which the snapshot came of
            training.model(read_snapshot(config.snapshot))
        return evaluate(config, endpoint)

    def test_random_weights_are_found_out(self, report: EvaluateReport) -> None:
        figures = report.metrics
        assert report.num_images == 101
        assert figures["classifier_accuracy"] > 0.8
        assert figures["accuracy"] < 0.4  # chance is 0.1
        assert figures["recall_ratio"] < 0.2
        assert report.features.startswith("classifier-")
        assert figures[f"fd-{report.features}_equal_n"] > 2 * figures[f"fd-{report.features}_floor"]
        assert figures["nearest_train"] > figures["nearest_train_floor"]
        assert figures[f"precision-{report.features}"] < 0.5 * figures[f"precision-{report.features}_floor"]
        assert figures["memorised"] < 0.1  # noise is near to nothing
        assert all(math.isfinite(value) for value in figures.values())

    def test_report_and_grid_stand_where_asked(self, config: EvaluateConfig, report: EvaluateReport) -> None:
        document = json.loads(Path(report.report).read_text())
        assert Path(report.report).parent == Path(config.output)
        assert document["metrics"] == report.metrics
        counts = document["reference"]
        assert (counts["train"] + counts["holdout"], counts["skipped"]) == (700, 1)
        assert document["settings"]["num_images"] == 101
        assert {key: document["settings"][key] for key in QUICK} == QUICK
        assert document["settings"]["spacing"] is None  # what is not given is named too
        assert document["snapshot"]["step"] == 30
        assert [row["name"] for row in document["by_class"]][:2] == ["zero", "one"]
        drawn = [11] + [10] * 9  # of 101 pictures, the classes in turn
        total = sum(row["accuracy"] * count for row, count in zip(document["by_class"], drawn, strict=True))
        assert total / 101 == pytest.approx(report.metrics["accuracy"])
        _, (width, height) = images.decode(Path(report.grid).read_bytes(), 32)
        assert (width, height) == (10 * 34 - 2, 2 * (4 * 34 - 2) + 8)
        _, (width, height) = images.decode((Path(config.output) / "nearest.png").read_bytes(), 32)
        assert (width, height) == (10 * 34 - 2, 2 * (2 * 34 - 2) + 8)

    def test_every_figure_has_its_n_its_interval_and_its_floors(self, report: EvaluateReport) -> None:
        document = json.loads(Path(report.report).read_text())
        named = {f"{name}-{report.features}" for name in ("fd", "kid", "precision", "density", "recall", "coverage")}
        assert set(document["figures"]) == named | {"sliced_wasserstein", "nearest_train", "memorised"}
        for name in named | {"sliced_wasserstein"}:
            sides = document["figures"][name]
            assert set(sides) == {"samples", "equal_n", "floor", "reconstruction"}
            assert sides["samples"]["count"] == 101
            assert sides["floor"]["count"] == sides["equal_n"]["count"] == sides["reconstruction"]["count"] < 101
            assert all(side["low"] <= side["value"] <= side["high"] for side in sides.values())
        assert set(document["resize"]) == {"reference", "features", "pixels"}
        worst = document["worst_class"]["accuracy"]
        assert worst["accuracy"] == report.metrics["accuracy_worst_class"] and worst["name"] in DIGIT_NAMES
        assert {row["class"] for row in document["by_class"] if "fd_part" in row} == set(range(10))
        pairs = document["nearest"]["samples"]
        assert len(pairs) == 10 and pairs[0]["training_picture"].startswith("digits-0000")
        assert [pair["closeness"] for pair in pairs] == sorted(pair["closeness"] for pair in pairs)

    def test_is_tracked_at_the_images_seen(self, config: EvaluateConfig, report: EvaluateReport) -> None:
        from mlflow import MlflowClient

        client = MlflowClient(str(config.tracking.uri))
        run = client.get_run(str(report.run_id))
        assert run.info.run_name == "evaluate/snapshot"
        assert run.data.metrics["eval/accuracy"] == report.metrics["accuracy"]
        assert client.get_metric_history(str(report.run_id), "eval/recall")[0].step == 960
        assert run.data.tags["features"] == report.features
        assert {file.path for file in client.list_artifacts(str(report.run_id))} == {
            "grid.png",
            "nearest.png",
            "report.json",
        }
        (reference,) = run.inputs.dataset_inputs
        assert reference.tags[0].value == "reference"
        (measured,) = run.inputs.model_inputs
        assert client.get_logged_model(measured.model_id).params["snapshot"] == config.snapshot

    def test_again_it_gives_the_same_figures_and_grid(
        self, config: EvaluateConfig, report: EvaluateReport, endpoint: str, tmp_path: Path
    ) -> None:
        changes = {"output": str(tmp_path), "tracking": TrackingConfig(enabled=False), "endpoint": endpoint}
        again = evaluate(config.model_copy(update=changes))
        assert again.metrics == report.metrics
        assert Path(again.grid).read_bytes() == Path(report.grid).read_bytes()
        assert again.run_id is None

    def test_without_labels_the_vae_measures(self, config: EvaluateConfig, endpoint: str, tmp_path: Path) -> None:
        path = write_pictures(tmp_path / "photos.tar", labels=[None] * 40)
        changes = {
            "reference": path,
            "features": "vae",
            "num_images": 20,
            "output": str(tmp_path),
            "tracking": TrackingConfig(enabled=False),
        }
        report = evaluate(config.model_copy(update=changes), endpoint)
        name = f"fd-{report.features}"
        floors = {f"{name}_equal_n", f"{name}_floor", "nearest_train_floor"}
        assert report.features.startswith("vae-")
        assert set(report.metrics) >= {name, "nearest_train", "sliced_wasserstein"} | floors
        assert not {"accuracy", "recall", "fid", "is"} & set(report.metrics)
        chosen = evaluate(config.model_copy(update={**changes, "features": None}), endpoint)
        assert chosen.metrics == report.metrics
        labelled = config.model_copy(update={**changes, "features": "classifier"})
        with pytest.raises(RequestError, match=r"features=classifier: the reference holds pictures without a label"):
            evaluate(labelled, endpoint)

    def test_statistics_stand_for_the_pictures_that_they_are_of(
        self, config: EvaluateConfig, endpoint: str, tmp_path: Path
    ) -> None:
        """In the features of a network of the user's own."""
        network = write_script(Means(), tmp_path / "means.pt")
        saved = str(tmp_path / "statistics.safetensors")
        changes: dict[str, Any] = {
            "num_images": 20,
            "features": str(network),
            "output": str(tmp_path),
            "tracking": TrackingConfig(enabled=False),
        }
        whole = evaluate(config.model_copy(update={**changes, "save_statistics": saved}), endpoint)
        alone = evaluate(config.model_copy(update={**changes, "reference": saved}), endpoint)
        name = f"fd-{whole.features}"
        assert whole.features.startswith("means-")
        assert set(alone.metrics) == {name, f"{name}_low", f"{name}_high"}
        assert alone.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-9)
        other = config.model_copy(update={**changes, "reference": saved, "features": None})
        with pytest.raises(RequestError, match=r"^reference=.*: holds statistics of means-.*, not of vae-"):
            evaluate(other, endpoint)

    def test_another_snapshot_is_refused(self, config: EvaluateConfig, endpoint: str, tmp_path: Path) -> None:
        other = write_tiny_snapshot(tmp_path / "other", seed=1)
        with pytest.raises(RequestError, match=r"^endpoint=.*: serves .*snapshot \(step 30\), not snapshot=.*other"):
            evaluate(config.model_copy(update={"snapshot": other}), endpoint)


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


class TestClient:
    def test_nothing_listens(self, free_port: Any) -> None:
        with pytest.raises(RequestError, match=r"^endpoint=http://127\.0\.0\.1:\d+: no deployment answers there"):
            SamplesClient(f"http://127.0.0.1:{free_port()}")

    def test_something_else_answers(self) -> None:
        with answering([(200, b"<html>")]) as (url, _), pytest.raises(RequestError, match="no deployment answers"):
            SamplesClient(url)

    def test_a_failure_in_passing_is_tried_again(self) -> None:
        pictures = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
        broken, rest = tar(pictures)[: 512 + 512 + 512], tar(pictures[1:])  # the first one, and no end
        answers = [(200, MODEL), (503, b'{"detail": "busy"}'), (0, b""), (200, broken), (200, rest)]
        with answering(answers) as (url, seen):
            drawn = torch.stack(list(SamplesClient(url).draw(torch.tensor([1, 2]), torch.tensor([3, 4]))))
        assert torch.equal(drawn, pictures)
        assert [path for path, _ in seen] == ["/v1/models"] + ["/v1/bulk"] * 4
        whole = {"model": "s", "labels": [1, 2], "seeds": [3, 4], "response_format": "npy"}
        assert [body for _, body in seen[1:]] == [whole] * 3 + [{**whole, "labels": [2], "seeds": [4]}]

    def test_the_model_that_is_asked_for_draws(self) -> None:
        with answering([(200, MODEL)] * 2) as (url, _):
            assert SamplesClient(url, "1").model["name"] == "other"
            assert SamplesClient(url, "2").model["name"] == "s"  # the default: the caller sees that it is another one

    def test_a_refusal_is_not_tried_again(self) -> None:
        with answering([(200, MODEL), (422, b'{"detail": "eta=2: is too much"}')]) as (url, seen):
            with pytest.raises(RequestError, match=r"^eta=2: is too much$"):
                next(SamplesClient(url).draw(None, torch.tensor([3]), eta=2))
            assert len(seen) == 2


MODEL = json.dumps(
    {
        "models": [
            {"name": "s", "snapshot": "run/s", "step": 1, "weights_sha256": "0"},
            {"name": "other", "snapshot": "run/other", "step": 2, "weights_sha256": "1"},
        ],
        "limits": {"batch_size": 16},
    }
).encode()


@contextlib.contextmanager
def answering(answers: list[tuple[int, bytes]]) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A server on this machine that gives these (status, body) in turn; status 0 hangs up. Yields (URL, requests)."""
    left, seen = iter(answers), list[tuple[str, Any]]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def answer(self, body: Any) -> None:
            seen.append((self.path, body))
            status, content = next(left)
            if status == 0:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()


def tar(pictures: torch.Tensor) -> bytes:
    """What a bulk request is answered with: a header and a member of 512 bytes for each of these small pictures."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for i, picture in enumerate(pictures.numpy()):
            member = io.BytesIO()
            np.save(member, picture)
            header = tarfile.TarInfo(f"{i:08d}.npy")
            header.size = len(member.getvalue())
            file.addfile(header, io.BytesIO(member.getvalue()))
    return buffer.getvalue()


def write_pictures(path: Path, labels: list[int | None]) -> str:
    """A shard of small pictures of noise, with a label or none."""
    generator = np.random.default_rng(0)
    samples = []
    for i, label in enumerate(labels):
        png = images.to_png(generator.integers(0, 256, (3, 32, 32), dtype=np.uint8))
        members = {"png": png} if label is None else {"png": png, "cls": str(label).encode()}
        samples.append(shards.RawSample(f"{i:03d}", members))
    shards.write_shard(str(path), samples)
    return str(path)
