"""The pictures of an evaluation: exactly N, the same for any number of workers, and none drawn twice after a kill."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm import images
from ldm.config import RequestError, validate
from ldm.digits import write_digit_shards
from ldm.sampling import SampleConfig, plan, sample
from ldm.snapshot import read_snapshot
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.evaluate.drawing import DrawingConfig, connect, draw
from pipelines.serve.local import local_app
from tests.commands import kill_when
from tests.pipelines.browsing import serving
from tests.pipelines.serving import replica
from tests.pipelines.tiny_snapshot import write_tiny_snapshot
from tests.processes import named

QUICK: dict[str, Any] = {"num_inference_steps": 1, "seed": 7, "device": "cpu"}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_snapshot(tmp_path_factory.mktemp("drawing") / "snapshot")


@pytest.fixture(scope="module")
def url(snapshot: str) -> Iterator[str]:
    """A deployment in this process."""
    with replica(snapshot, batch_size=8) as made, serving(local_app(made)) as url:
        yield url


def asked(snapshot: str, output: Path, **changes: Any) -> DrawingConfig:
    return validate(DrawingConfig, {"snapshot": snapshot, "output": str(output), **QUICK, **changes})


def drawn(config: DrawingConfig) -> Any:
    made = read_snapshot(config.snapshot)
    return draw(config, made, connect(config, made, None))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


class Killer(threading.Thread):
    """SIGKILLs one of the workers when the first shard is there."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.killed = folder, 0

    def run(self) -> None:
        while not self.killed:
            time.sleep(0.005)
            if any(self.folder.glob("*.tar")) and (found := workers()):
                os.kill(found[0], signal.SIGKILL)
                self.killed = found[0]


def workers() -> list[int]:
    """Those that draw now."""
    return [process.pid for process in named("ray::ShardDrawer.draw")]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
class TestOnRay:
    def test_a_killed_worker_loses_and_repeats_nothing(self, snapshot: str, tmp_path: Path) -> None:
        """1,001 pictures by two workers of which one is killed, then some of them by one: those of `ldm sample`."""
        ray = {"through": "ray", "num_images": 1001, "batch_size": 10, "num_inference_steps": 2}
        config = asked(snapshot, tmp_path, num_workers=2, **ray)
        killer = Killer(tmp_path / "samples")
        killer.start()
        found = drawn(config)
        assert killer.killed
        assert found.pictures.pixels.shape == (1001, 3, 32, 32)
        assert found.pictures.labels.tolist() == [number % 10 for number in range(1001)]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as a worker has
        try:
            place = {"output": str(tmp_path / "offline"), "format": "webdataset", "samples_per_shard": 80}
            values = {**QUICK, **ray, "snapshot": snapshot, **place}
            del values["through"]
            sample(validate(SampleConfig, values))
        finally:
            torch.set_num_threads(threads)
        whole = shards(tmp_path / "offline")
        assert len(whole) == 13 and shards(tmp_path / "samples") == whole
        assert {path.suffix for path in (tmp_path / "samples").iterdir()} == {".tar", ".json"}
        for name in sorted(whole)[3:5]:
            (tmp_path / "samples" / name).unlink()
        again = drawn(config.model_copy(update={"num_workers": 1}))
        assert torch.equal(again.pictures.pixels, found.pictures.pixels)
        assert shards(tmp_path / "samples") == whole and again.images_per_second > 0

    def test_what_the_workers_cannot_draw_is_one_line(self, snapshot: str, tmp_path: Path) -> None:
        about = Path(write_tiny_snapshot(tmp_path / "custom")) / "snapshot.json"
        values = json.loads(about.read_text())
        about.write_text(json.dumps({**values, "denoiser": {**values["denoiser"], "type": "custom"}}))
        with pytest.raises(RequestError, match="^denoiser_type=null: .* was trained with a class of its own; give"):
            drawn(asked(str(about.parent), tmp_path, through="ray", num_images=5))


class TestThroughServe:
    def test_is_exactly_what_was_asked_for(self, url: str, snapshot: str, tmp_path: Path) -> None:
        config = asked(snapshot, tmp_path, endpoint=url, num_images=101, batch_size=2)
        found = drawn(config)
        assert found.pictures.pixels.shape == (101, 3, 32, 32) and found.images_per_second > 0
        assert found.pictures.labels.tolist() == [number % 10 for number in range(101)]
        sample(SampleConfig(snapshot=snapshot, output=str(tmp_path / "a"), num_images=101, batch_size=8, **QUICK))
        offline = [images.decode((tmp_path / "a" / f"{i:06d}.png").read_bytes(), 32)[0] for i in range(101)]
        assert np.array_equal(found.pictures.pixels, np.stack(offline))
        again = drawn(config)
        assert again.images_per_second == 0 and torch.equal(again.pictures.pixels, found.pictures.pixels)

    def test_another_request_draws_anew_and_says_so(
        self, url: str, snapshot: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        config = asked(snapshot, tmp_path, endpoint=url, num_images=20, batch_size=1)
        before = drawn(config)
        other = drawn(config.model_copy(update={"seed": 8}))
        assert not torch.equal(other.pictures.pixels, before.pictures.pixels)
        said = capfd.readouterr().err
        place = f"{tmp_path}/samples"
        assert f"evaluate: draws anew, for {place} holds those of another request (seed: 7 != 8)\n" in said
        assert "0000000007-0000000014.tar" not in shards(tmp_path / "samples")

    def test_another_deployment_draws_anew(
        self, url: str, snapshot: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        config = asked(snapshot, tmp_path, endpoint=url, num_images=20, batch_size=1)
        before = drawn(config)
        with replica(snapshot, batch_size=8, precision="bf16") as made, serving(local_app(made)) as other:
            anew = drawn(config.model_copy(update={"endpoint": other}))
        assert anew.images_per_second > 0 and not torch.equal(anew.pictures.pixels, before.pictures.pixels)
        assert "holds those of another request (precision: fp32 != bf16)\n" in capfd.readouterr().err

    def test_another_class_of_denoiser_draws_anew(
        self, url: str, snapshot: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        drawn(asked(snapshot, tmp_path, endpoint=url, num_images=2))
        drawn(asked(snapshot, tmp_path, endpoint=url, num_images=2, denoiser_type="mine:Other"))
        assert "holds those of another request (denoiser_type: null != mine:Other)\n" in capfd.readouterr().err
        mine = SampleConfig(snapshot=snapshot, denoiser_type="mine:Other", **QUICK)
        assert plan(mine).settings(mine)["denoiser_type"] == "mine:Other"  # so does `ldm sample`, and through=ray

    def test_what_somebody_else_drew_there_is_not_removed(self, url: str, snapshot: str, tmp_path: Path) -> None:
        place = {"output": str(tmp_path / "samples"), "format": "webdataset", "num_images": 4}
        sample(SampleConfig(snapshot=snapshot, **place, **QUICK))  # type: ignore[arg-type]
        before = shards(tmp_path / "samples")
        with pytest.raises(RequestError, match=r"^output=.*/samples: holds pictures of another request \(.*; give"):
            drawn(asked(snapshot, tmp_path, endpoint=url, num_images=20))
        assert shards(tmp_path / "samples") == before

    def test_a_killed_evaluation_goes_on_to_the_same_figures(self, url: str, snapshot: str, tmp_path: Path) -> None:
        write_digit_shards(tmp_path / "digits", shards=2)
        settings = {**QUICK, "num_images": 301, "num_inference_steps": 6, "batch_size": 1, "endpoint": url}
        settings |= {"snapshot": snapshot, "reference": f"{tmp_path}/digits/digits-00000.tar", "features": "vae"}
        settings |= {"max_reference": 60, "holdout": 0.2, "tracking": {"enabled": False}}
        whole = evaluate(validate(EvaluateConfig, {**settings, "output": str(tmp_path / "whole")}))
        place = tmp_path / "killed"
        given = [f"{key}={value}" for key, value in settings.items() if key != "tracking"]
        arguments = ["evaluate", f"output={place}", "tracking.enabled=false", *given]
        kill_when(arguments, lambda: len(list(place.glob("samples/*.tar"))) > 3, tmp_path)
        there = {path: path.stat().st_mtime_ns for path in place.glob("samples/*.tar")}
        assert 3 < len(there) < 38 and not (place / "report.json").exists()
        again = evaluate(validate(EvaluateConfig, {**settings, "output": str(place)}))
        assert (again.metrics, again.num_images) == (whole.metrics, 301)
        assert {path: path.stat().st_mtime_ns for path in there} == there
        assert shards(place / "samples") == shards(tmp_path / "whole" / "samples")
        assert Path(again.grid).read_bytes() == Path(whole.grid).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"through": "ray", "endpoint": "http://127.0.0.1:1"}, "^endpoint=http://127.0.0.1:1: is of through=serve"),
        ({"through": "ray", "num_replicas": 2}, "^num_replicas=2: is of through=serve; give num_workers"),
        ({"num_workers": 2}, "^num_workers=2: is of through=ray; give it, or num_replicas"),
        ({"through": "http"}, "^through=http: "),
    ],
)
def test_keys_that_do_not_go_together(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        asked("snapshot", tmp_path, **changes)
