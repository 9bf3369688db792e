"""Which snapshots are served, and how a newer one takes the place of an older one without a request that fails."""

import asyncio
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from ldm.config import RequestError
from pipelines.serve.catalog import Catalog
from pipelines.serve.replica import Replica
from tests.pipelines.serving import post, replica, within
from tests.pipelines.tiny_snapshot import write_tiny_snapshot


def write_version(folder: Path, step: int) -> Path:
    """A snapshot with weights and a step of its own, as `ldm train` leaves them in `output/snapshots`."""
    made = folder.parent / f"made-{step}"
    write_tiny_snapshot(made, seed=step)
    text = (made / "snapshot.json").read_text().replace('"step": 30', f'"step": {step}')
    (made / "snapshot.json").write_text(text)
    folder.mkdir(exist_ok=True)
    return Path(shutil.move(made, folder / f"step-{step:010d}"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """What `ldm train` leaves after steps 10 and 20."""
    folder = tmp_path / "run" / "snapshots"
    folder.parent.mkdir()
    for step in (10, 20):
        write_version(folder, step)
    return folder.parent


class TestCatalog:
    def test_one_snapshot(self, output: Path) -> None:
        catalog = Catalog(str(output / "snapshots" / "step-0000000010"))
        assert [version.name for version in catalog.versions()] == ["step-0000000010"]
        assert catalog.default().snapshot.step == 10

    @pytest.mark.parametrize("inner", ["", "snapshots"])
    def test_the_newest_of_a_training_run_is_the_default(self, output: Path, inner: str) -> None:
        catalog = Catalog(str(output / inner))
        assert catalog.default().name == "step-0000000020"
        assert catalog.find("step-0000000010").snapshot.step == 10

    def test_a_half_written_one_is_none(self, output: Path) -> None:
        (output / "snapshots" / "step-0000000030").mkdir()
        (output / "snapshots" / "step-0000000040").mkdir()
        (output / "snapshots" / "step-0000000040" / "snapshot.json").write_text("{")
        assert Catalog(str(output)).default().name == "step-0000000020"

    @pytest.mark.parametrize("name", ["../snapshots/step-0000000010", "step-0000000030", "", ".", "/etc"])
    def test_a_name_is_no_path(self, output: Path, name: str) -> None:
        with pytest.raises(RequestError, match=r"is not served here; give step-0000000010, step-0000000020"):
            Catalog(str(output)).find(name)

    def test_nothing_to_serve(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"^snapshot=.*: holds no snapshot; give one that"):
            Catalog(str(tmp_path)).default()
        with pytest.raises(RequestError, match=r"^snapshot=.*nowhere: is no snapshot"):
            Catalog(str(tmp_path / "nowhere")).default()

    def test_a_model_of_mlflow_by_alias_and_version(self, output: Path, tmp_path: Path, monkeypatch: Any) -> None:
        from mlflow import MlflowClient

        uri = f"sqlite:///{tmp_path}/mlflow.db"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        client, first, second = MlflowClient(uri), *sorted((output / "snapshots").iterdir())
        client.create_registered_model("digits")
        client.create_model_version("digits", str(first))
        experiment = client.create_experiment("training")
        model = client.create_logged_model(experiment, name="model", params={"snapshot": str(second)})
        client.create_model_version("digits", f"models:/{model.model_id}", model_id=model.model_id)
        client.set_registered_model_alias("digits", "champion", "1")
        catalog = Catalog("models:/digits@champion")
        assert (catalog.default().name, catalog.default().snapshot.step) == ("digits@champion", 10)
        client.set_registered_model_alias("digits", "champion", "2")  # a model that training logged
        assert catalog.default().snapshot.step == 20
        assert Catalog("models:/digits/1").default().snapshot.step == 10
        for wrong in ("models:/digits@nobody", "models:/other@champion", "models:/digits/9"):
            with pytest.raises(RequestError, match=f"^snapshot={wrong}: MLflow has no snapshot of that name"):
                Catalog(wrong).default()


def until(condition: Any, seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def step_of(made: Replica) -> int:
    return int(post(made, {"num_inference_steps": 1}).raise_for_status().json()["step"])


class TestSwitch:
    def test_a_newer_version_takes_over_and_no_request_fails(self, output: Path) -> None:
        with replica(str(output), refresh_s=0.05) as made:

            async def ask(client: httpx.AsyncClient) -> set[int]:
                long = asyncio.create_task(client.post("/v1/samples", json={"num_inference_steps": 500}))
                steps: list[int] = []
                while 30 not in steps:
                    answer = await client.post("/v1/samples", json={"num_inference_steps": 2})
                    steps.append(answer.raise_for_status().json()["step"])
                    if len(steps) == 3:
                        await asyncio.to_thread(write_version, output / "snapshots", 30)
                assert (await long).raise_for_status().json()["step"] == 20  # it ends with what it began with
                return set(steps)

            assert within(made, ask) == {20, 30}

    def test_a_broken_version_leaves_the_old_one_serving(self, output: Path, caplog: Any) -> None:
        with replica(str(output), refresh_s=0.05) as made, caplog.at_level(logging.ERROR, "ldm.serve"):
            broken = write_version(output / "snapshots", 30)
            weights = bytearray((broken / "denoiser.safetensors").read_bytes())
            weights[-1] ^= 1
            (broken / "denoiser.safetensors").write_bytes(weights)
            until(lambda: any("goes on with step-0000000020" in record.message for record in caplog.records))
            assert step_of(made) == 20
            assert sum("it is damaged" in record.message for record in caplog.records) == 1  # said once, not each time
            write_version(output / "snapshots", 40)
            until(lambda: step_of(made) == 40)

    def test_others_are_loaded_by_name_and_the_oldest_makes_room(self, output: Path) -> None:
        write_version(output / "snapshots", 5)
        with replica(str(output), max_models=2) as made:
            for step in (10, 5, 10):
                answer = post(made, {"num_inference_steps": 1, "model": f"step-{step:010d}"})
                assert answer.raise_for_status().json()["step"] == step
                loaded = {model["step"]: model["loaded"] for model in made.describe()["models"]}
                assert loaded == {20: True, 10: step == 10, 5: step == 5}
            assert step_of(made) == 20

    def test_old_versions_are_let_go_of(self, output: Path) -> None:
        with replica(str(output), refresh_s=0.05) as made:
            for step in (30, 40, 50):
                write_version(output / "snapshots", step)
                until(lambda step=step: step_of(made) == step)
            assert sum(model["loaded"] for model in made.describe()["models"]) == 2

    def test_the_same_weights_with_another_schedule_are_another_model(self, output: Path) -> None:
        twin = output / "snapshots" / "twin"
        shutil.copytree(output / "snapshots" / "step-0000000020", twin)
        described = json.loads((twin / "snapshot.json").read_text())
        described["diffusion"]["schedule"] = "cosine"
        (twin / "snapshot.json").write_text(json.dumps(described))
        with replica(str(output)) as made:
            bodies = [{"model": name, "num_inference_steps": 4} for name in ("twin", "step-0000000020")]
            one, other = (post(made, body).raise_for_status().json() for body in bodies)
        assert (one["model"], other["model"]) == ("twin", "step-0000000020")
        assert one["images"][0]["png"] != other["images"][0]["png"]

    def test_a_broken_one_is_told_to_the_one_who_names_it(self, output: Path) -> None:
        (output / "snapshots" / "step-0000000010" / "denoiser.safetensors").write_bytes(b"nothing")
        with replica(str(output)) as made:
            answer = post(made, {"model": "step-0000000010"})
            assert answer.status_code == 422
            assert answer.json()["detail"].startswith("model=step-0000000010: cannot be loaded")
            assert step_of(made) == 20
