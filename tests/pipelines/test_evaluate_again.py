"""What of an evaluation counts as done, and what another one left there: no figures stand beside other pictures."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config import RequestError, validate
from ldm.metrics import read_statistics, write_statistics
from ldm.shards import ShardReader, write_shard
from pipelines.evaluate import EvaluateConfig, evaluate, finished
from pipelines.serve.local import local_app
from tests.pictures import image_shard, samples, write_pictures
from tests.pipelines.browsing import serving
from tests.pipelines.serving import replica
from tests.pipelines.tiny_snapshot import write_tiny_snapshot

LEFT = {"report.json", "grid.png", "nearest.png", "request.json"}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_snapshot(tmp_path_factory.mktemp("again") / "snapshot")


@pytest.fixture(scope="module")
def url(snapshot: str) -> Iterator[str]:
    """A deployment in this process, of at most two steps."""
    with replica(snapshot, batch_size=8, max_steps=2) as made, serving(local_app(made)) as url:
        yield url


@pytest.fixture
def reference(tmp_path: Path) -> str:
    return image_shard(tmp_path / "reference" / "shard.tar", samples(40))


def asked(snapshot: str, reference: str, output: Path, **changes: Any) -> EvaluateConfig:
    values = {"snapshot": snapshot, "reference": reference, "output": str(output), "tracking": {"enabled": False}}
    return validate(
        EvaluateConfig, {**values, "num_images": 12, "num_inference_steps": 1, "features": "vae", **changes}
    )


def left(output: Path) -> set[str]:
    return {path.name for path in output.iterdir() if path.is_file()}


def relabelled(path: str) -> None:
    """The first picture's class is another one; the file has as many bytes."""
    size, content = Path(path).stat().st_size, [*ShardReader(path)]
    content[0].members["cls"] = b"2"
    write_shard(path, content)
    assert Path(path).stat().st_size == size


def test_a_corrected_label_is_another_reference(url: str, snapshot: str, reference: str, tmp_path: Path) -> None:
    config = asked(snapshot, reference, tmp_path / "output")
    done = evaluate(config, url)
    again = finished(config)
    assert again is not None and again.metrics == done.metrics
    relabelled(reference)
    assert finished(config) is None


def test_so_it_is_in_an_object_store_and_in_a_folder(
    url: str, snapshot: str, reference: str, s3: str, tmp_path: Path
) -> None:
    from ldm import storage

    remote, folder = f"{s3}/{tmp_path.name}/shard.tar", tmp_path / "pictures"
    storage.write_bytes(remote, Path(reference).read_bytes())
    for sample in samples(12):
        for extension, data in sample.members.items():
            storage.write_bytes(str(folder / f"{sample.key}.{extension}"), data)
    configs = [asked(snapshot, place, tmp_path / "a", holdout=0.2) for place in (remote, str(folder))]
    configs[1] = configs[1].model_copy(update={"output": str(tmp_path / "b")})
    for config in configs:
        evaluate(config, url)
        assert finished(config) is not None
    relabelled(reference)
    storage.write_bytes(remote, Path(reference).read_bytes())
    (folder / "00000.cls").write_bytes(b"2")
    assert [finished(config) for config in configs] == [None, None]


def test_where_labels_are_read_is_a_part_of_the_request(
    url: str, snapshot: str, reference: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = asked(snapshot, reference, tmp_path / "output", features=None, label="json.kind")
    done = evaluate(config, url)
    lack = "40 of 40 reference pictures have no label (label=json.kind)"
    assert f"evaluate: {lack}: measured in vae, without accuracy\n" in capfd.readouterr().err
    assert done.features.startswith("vae-") and not {"accuracy", "recall"} & done.metrics.keys()
    assert finished(config) is not None
    assert finished(config.model_copy(update={"label": "cls"})) is None
    message = r"^features=classifier: 40 of 40 .* \(label=json\.kind\); give features=vae, or the label that"
    with pytest.raises(RequestError, match=message):
        evaluate(config.model_copy(update={"features": "classifier"}), url)


def test_one_picture_without_a_label_is_told(
    url: str, snapshot: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_pictures(tmp_path / "shard.tar", labels=[None, *(i % 10 for i in range(39))])
    evaluate(asked(snapshot, path, tmp_path / "output"), url)
    lack = "1 of 40 reference pictures have no label (label=cls)"
    assert f"evaluate: {lack}: measured without recall by class\n" in capfd.readouterr().err


def test_nothing_stays_of_another_evaluation_that_was_killed(
    url: str, snapshot: str, reference: str, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    evaluate(asked(snapshot, reference, output), url)
    assert left(output) == LEFT
    with pytest.raises(RequestError, match=r"^num_inference_steps=3: the most here is 2"):  # says the deployment
        evaluate(asked(snapshot, reference, output, num_inference_steps=3), url)
    assert left(output) == set()


def test_what_was_asked_before_stays_until_it_is_done_again(
    url: str, snapshot: str, reference: str, tmp_path: Path
) -> None:
    config = asked(snapshot, reference, tmp_path / "output", num_inference_steps=2)
    done = evaluate(config, url)
    (sampled,) = (tmp_path / "output" / "samples").glob("*.tar")
    sampled.unlink()
    with (
        replica(snapshot, batch_size=8, max_steps=1) as made,
        serving(local_app(made)) as other,
        pytest.raises(RequestError, match="the most here is 1"),
    ):
        evaluate(config, other)
    assert left(tmp_path / "output") == LEFT
    again = finished(config)
    assert again is not None and again.metrics == done.metrics


def test_statistics_leave_no_pairs_of_other_pictures(url: str, snapshot: str, reference: str, tmp_path: Path) -> None:
    output, saved = tmp_path / "output", str(tmp_path / "statistics.safetensors")
    evaluate(asked(snapshot, reference, output, save_statistics=saved), url)
    assert left(output) == LEFT
    evaluate(asked(snapshot, saved, output), url)
    assert left(output) == {"report.json", "grid.png"}


def test_statistics_of_something_else_are_work_left(url: str, snapshot: str, reference: str, tmp_path: Path) -> None:
    saved = str(tmp_path / "statistics.safetensors")
    config = asked(snapshot, reference, tmp_path / "output", save_statistics=saved)
    evaluate(config, url)
    assert finished(config) is not None
    right = read_statistics("saved", saved)
    others = [
        replace(right, features="vae-000000000000"),
        replace(right, pictures={**right.pictures, "background": [0, 0, 0]}),
        replace(right, reference="0" * 16),  # of other pictures, in the same features
    ]
    for other in others:
        write_statistics(saved, other)
        assert finished(config) is None
    Path(saved).write_bytes(b"torn")
    assert finished(config) is None
    evaluate(config, url)
    assert torch.equal(read_statistics("saved", saved).gaussian.mean, right.gaussian.mean)
    assert finished(config) is not None


def kept_in(output: Path) -> dict[str, int]:
    """When each file was written, ns, by its name."""
    return {path.name: path.stat().st_mtime_ns for path in (output / "kept").iterdir()}


@pytest.mark.parametrize("features", ["vae", "classifier"])
def test_what_is_known_of_the_reference_is_not_computed_for_each_snapshot(
    features: str, url: str, snapshot: str, reference: str, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    config = asked(snapshot, reference, output, features=features, holdout=0.3)
    first = evaluate(config, url)
    there = kept_in(output)
    kinds = {"features": 3, "reconstructions": 1, "classifier": int(features == "classifier")}
    assert {kind: sum(name.startswith(kind) for name in there) for kind in kinds} == kinds

    other = config.model_copy(update={"num_inference_steps": 2})
    again = evaluate(other, url)
    assert kept_in(output) == there
    alone = evaluate(other.model_copy(update={"output": str(tmp_path / "alone")}), url)
    assert again.metrics == alone.metrics != first.metrics  # to the bit


def test_what_is_kept_is_of_these_pictures_or_is_computed_again(
    url: str, snapshot: str, reference: str, tmp_path: Path
) -> None:
    output, mine = tmp_path / "output", tmp_path / "output" / "kept" / "features.npy"
    config = asked(snapshot, reference, output, holdout=0.3)
    first = evaluate(config, url)
    mine.write_bytes(b"of somebody else")
    there = kept_in(output)
    image_shard(tmp_path / "reference" / "shard.tar", samples(40, start=7))
    second = evaluate(config, url)
    assert second.metrics != first.metrics
    assert mine.exists() and kept_in(output).keys() & there.keys() == {mine.name}  # those of the others are gone

    for path in (output / "kept").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-5])
    (output / "request.json").unlink()
    assert evaluate(config, url).metrics == second.metrics
    assert len(kept_in(output)) == len(there)
