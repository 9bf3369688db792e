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

from ldm import images, shards
from ldm.classifier import Classifier, train_classifier
from ldm.config import RequestError
from ldm.digits import write_digit_shards
from ldm.latents.choice import is_held_out
from ldm.latents.manifest import Conditioning
from ldm.latents.writer import sample_id
from ldm.snapshot import read_snapshot
from pipelines import serve
from pipelines.evaluate import EvaluateConfig, EvaluateReport, evaluate, measures, plan
from pipelines.evaluate.client import SamplesClient
from pipelines.evaluate.reference import Pictures, Reference, read_reference
from pipelines.tracking import Tracker, TrackingConfig
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
    urls = shards.shard_names(sorted(str(path) for path in digits.iterdir()))
    return read_reference(urls, read_snapshot(snapshot), HOLDOUT, 20_000)


@pytest.fixture(scope="module")
def classifier(reference: Reference) -> Classifier:
    assert reference.train.labels is not None
    return train_classifier(reference.train.pixels, reference.train.labels, 10, epochs=4)


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
        found = read_reference({"digits-00000": str(digits / "digits-00000.tar")}, wide, 0.0, 5)
        assert found.train.pixels.shape == (5, 3, 16, 64)

    def test_reads_no_more_than_asked(self, digits: Path, snapshot: str) -> None:
        urls = {"digits-00000": str(digits / "digits-00000.tar"), "missing": "never-opened.tar"}
        found = read_reference(urls, read_snapshot(snapshot), 0.0, 50)
        assert (len(found.train), len(found.holdout)) == (50, 0)

    def test_a_label_that_the_model_does_not_have(self, tmp_path: Path, snapshot: str) -> None:
        path = write_pictures(tmp_path / "shard.tar", labels=[3, 10])
        with pytest.raises(RequestError, match=r"^reference: holds label 10, but the model has classes 0 to 9"):
            read_reference({"shard": path}, read_snapshot(snapshot), 0.0, 10)

    def test_nothing_readable(self, tmp_path: Path, snapshot: str) -> None:
        path = str(tmp_path / "words.tar")
        shards.write_shard(path, [shards.RawSample("a", {"txt": b"no picture"})])
        with pytest.raises(RequestError, match=r"^reference=.*words\.tar: holds no readable picture"):
            read_reference({"words": path}, read_snapshot(snapshot), 0.0, 10)

    def test_a_truncated_tar(self, tmp_path: Path, digits: Path, snapshot: str) -> None:
        path = tmp_path / "cut.tar"
        path.write_bytes((digits / "digits-00000.tar").read_bytes()[:10_000])
        with pytest.raises(RequestError, match=r"^reference=.*cut\.tar: is no whole tar"):
            read_reference({"cut": str(path)}, read_snapshot(snapshot), 0.0, 10_000)


@pytest.mark.slow
class TestMeasures:
    def test_pictures_never_seen_are_as_good_as_the_floor(self, reference: Reference, classifier: Classifier) -> None:
        perfect = reference.holdout
        name = f"fd-{classifier.name}"
        distances = measures.frechet_distances(perfect, reference, classifier, 0)
        assert distances[name] == pytest.approx(distances[f"{name}_floor"])
        assert distances[f"{name}_equal_n"] == pytest.approx(distances[f"{name}_floor"])
        nearest = measures.nearest_distances(perfect, reference)
        assert nearest["nearest_train"] == nearest["nearest_train_floor"] > 0
        recall = measures.class_recall(perfect, reference, 0).metrics
        assert recall["recall_ratio"] == recall["recall_ratio_worst_class"] == 1
        accuracy = measures.conditional_accuracy(perfect, reference, classifier, 0).metrics
        assert accuracy["accuracy"] == accuracy["classifier_accuracy"] > 0.85
        assert accuracy["accuracy_low"] <= accuracy["accuracy"] <= accuracy["accuracy_high"]

    def test_one_picture_for_each_class_has_accuracy_and_no_recall(
        self, reference: Reference, classifier: Classifier
    ) -> None:
        right = classifier.predict(reference.train.pixels) == reference.train.labels
        collapsed = repeated(reference.train.take(right), 30)
        accuracy = measures.conditional_accuracy(collapsed, reference, classifier, 0)
        assert accuracy.metrics["accuracy"] == accuracy.metrics["accuracy_worst_class"] == 1
        assert [row["class"] for row in accuracy.by_class] == list(range(10))
        recall = measures.class_recall(collapsed, reference, 0).metrics
        assert recall["recall_ratio"] < 0.1
        assert recall["recall_floor"] > 0.3
        assert measures.nearest_distances(collapsed, reference)["nearest_train"] == 0  # it recites

    def test_noise_has_neither(self, reference: Reference, classifier: Classifier) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8, generator=generator)
        noise = Pictures(pixels, torch.arange(200) % 10)
        name = f"fd-{classifier.name}"
        distances = measures.frechet_distances(noise, reference, classifier, 0)
        assert distances[name] > 5 * distances[f"{name}_floor"]
        assert measures.conditional_accuracy(noise, reference, classifier, 0).metrics["accuracy"] < 0.3
        nearest = measures.nearest_distances(noise, reference)
        assert nearest["nearest_train"] > 2 * nearest["nearest_train_floor"]

    def test_without_held_out_pictures_there_is_no_floor(self, reference: Reference, classifier: Classifier) -> None:
        bare = Reference(reference.train, reference.holdout.take(torch.arange(0)), 0)
        samples = reference.holdout
        assert set(measures.frechet_distances(samples, bare, classifier, 0)) == {f"fd-{classifier.name}"}
        assert set(measures.nearest_distances(samples, bare)) == {"nearest_train"}

    def test_large_pictures_are_compared_at_32_pixels(self) -> None:
        small = torch.arange(0, 256, 64, dtype=torch.uint8).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
        blocks = small.repeat_interleave(32, 2).repeat_interleave(32, 3)  # 64 px
        assert measures.compared(blocks).shape == (1, 3 * 32 * 32)
        assert measures.compared(blocks)[0, 0] == 0  # far from an edge a block keeps its value


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

    def test_is_tracked_at_the_images_seen(self, config: EvaluateConfig, report: EvaluateReport) -> None:
        from mlflow import MlflowClient

        client = MlflowClient(str(config.tracking.uri))
        run = client.get_run(str(report.run_id))
        assert run.info.run_name == "evaluate/snapshot"
        assert run.data.metrics["eval/accuracy"] == report.metrics["accuracy"]
        assert client.get_metric_history(str(report.run_id), "eval/recall")[0].step == 960
        assert run.data.tags["features"] == report.features
        assert {file.path for file in client.list_artifacts(str(report.run_id))} == {"grid.png", "report.json"}
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
        assert set(report.metrics) == {name, "nearest_train"} | floors
        labelled = config.model_copy(update={**changes, "features": "classifier"})
        with pytest.raises(RequestError, match=r"features=classifier: the reference holds pictures without a label"):
            evaluate(labelled, endpoint)

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
        self.check("^features=classifier: the model is unconditional; give features=vae", plain, digits)
        self.check(r"^guidance_scale=2\.0: the model is", plain, digits, features="vae", guidance_scale=2.0)

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


def repeated(pictures: Pictures, times: int) -> Pictures:
    """The first picture of each class, so many times."""
    assert pictures.labels is not None
    first = torch.stack([(pictures.labels == label).nonzero()[0, 0] for label in torch.unique(pictures.labels)])
    return pictures.take(first.repeat(times))


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
