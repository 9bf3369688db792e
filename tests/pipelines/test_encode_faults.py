"""Encode under real faults: whatever is killed and whenever, what is there in the end is byte for byte the same."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ldm import storage
from ldm.config import RequestError
from ldm.latents.manifest import read_manifest
from ldm.shards import RawSample
from pipelines.encode import encode, run
from tests.chaos_s3 import ChaosProxy
from tests.pictures import encoded, image_shard, picture
from tests.pipelines.encoding import config, contents, quarantine
from tests.processes import named

pytestmark = [pytest.mark.ray, pytest.mark.faults]
ROOT = Path(__file__).parents[2]
SHARDS, PICTURES = 6, 40


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards that fill no batch; two pictures of each are broken."""
    folder = tmp_path_factory.mktemp("images")
    for shard in range(SHARDS):
        numbers = range(PICTURES * shard, PICTURES * (shard + 1))
        content = [RawSample(f"{n:05d}", {"png": encoded(picture(n, 80, 64)), "cls": b"1"}) for n in numbers]
        content[3].members["png"] = b"broken"
        content[30].members["png"] = content[30].members["png"][:200]
        image_shard(folder / f"s-{shard}.tar", content)
    return folder


@pytest.fixture(scope="module")
def whole(ray_session: None, images: Path, vae: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing disturbed."""
    destination = tmp_path_factory.mktemp("whole") / "latents"
    report = encode(config(str(images), destination, vae, image_size=64))
    assert (report.inputs, report.encoded, report.quarantined) == (240, 228, 12)
    return contents(destination)


def settle(destination: Path, images: Path, vae: str) -> dict[str, bytes]:
    """Runs again with nothing left to do, which clears away what killed processes left; returns the files."""
    report = encode(config(str(images), destination, vae, image_size=64))
    assert report.skipped_shards == SHARDS
    return contents(destination)


def command(images: Path, destination: Path, vae: str) -> list[str]:
    keys = {"source": f"{images}/*.tar", "destination": destination, "autoencoder": vae, "image_size": 64}
    quiet = {"batch_size": 8, "tracking.enabled": "false", "max_quarantined": 0.1, "num_workers": 2}
    pairs = [f"{key}={value}" for key, value in {**keys, **quiet}.items()]
    return [sys.executable, "-m", "jobs.cli", "encode", *pairs]


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}


def kill_driver(images: Path, destination: Path, vae: str, moment: float) -> bool:
    """SIGKILL to `ldm encode` and nothing else, `moment` after its first shard began; False where it had ended."""
    with subprocess.Popen(
        command(images, destination, vae), env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as driver:
        while not list(destination.glob(".attempt-*")) and driver.poll() is None:
            time.sleep(0.002)
        time.sleep(moment)
        ended = driver.poll() is not None
        driver.kill()
    return not ended


def test_the_driver_killed_again_and_again(whole: dict[str, bytes], images: Path, vae: str, tmp_path: Path) -> None:
    """Each run begins at once, while the processes of the killed one still write."""
    destination, moments = tmp_path / "latents", random.Random(7)
    killed = [kill_driver(images, destination, vae, moments.uniform(0, 0.4)) for _ in range(3)]
    assert any(killed)
    subprocess.run(command(images, destination, vae), env=environment(), check=True, timeout=500)
    deadline = time.monotonic() + 30  # until the last writer of a killed run is gone
    while (found := settle(destination, images, vae)) != whole and time.monotonic() < deadline:
        time.sleep(1)
    assert found.keys() == whole.keys() and found == whole


def kill_when(ready: Callable[[], list[psutil.Process]]) -> int:
    """SIGKILL to the last of the processes that `ready` finds, once it finds some."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if found := ready():
            found[-1].kill()
            return found[-1].pid
        time.sleep(0.005)
    raise AssertionError("there was nothing to kill")


@pytest.mark.parametrize("victim", ["ray::ShardEncoder", f"{sys.executable} -P -m ldm.decoding"])
def test_a_killed_actor_or_decoder(
    whole: dict[str, bytes], images: Path, vae: str, tmp_path: Path, victim: str
) -> None:
    """A dead actor's shards go to another; a dead decoder's picture to a fresh one."""
    from concurrent.futures import ThreadPoolExecutor

    destination = tmp_path / "latents"
    with ThreadPoolExecutor(1) as pool:
        at_work = lambda: named(victim) if list(destination.glob(".attempt-*/*.tar")) else []  # noqa: E731
        killed = pool.submit(kill_when, at_work)
        encode(config(str(images), destination, vae, image_size=64, num_workers=2))
        assert not psutil.pid_exists(killed.result())
    assert settle(destination, images, vae) == whole


NODES = """
import sys, time, threading, pathlib
import ray
from ray.cluster_utils import Cluster
from pipelines.encode import encode
from tests.pipelines.encoding import config

if __name__ == "__main__":
    images, destination, vae = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)

    def actors_at_work():
        # An attempt's name holds the number of its process.
        attempts = pathlib.Path(destination).glob(".attempt-*/*.tar")
        return len({path.parent.name.rsplit("-", 3)[1] for path in attempts})

    def wait_for(actors):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and actors_at_work() < actors:
            time.sleep(0.005)

    settings = config(images, destination, vae, image_size=192)
    work = threading.Thread(target=lambda: print(encode(settings)), daemon=True)
    work.start()
    wait_for(1)
    node = cluster.add_node(num_cpus=1)
    wait_for(2)
    cluster.remove_node(node, allow_graceful=False)
    print("added and killed", flush=True)
    work.join()
    ray.shutdown()
    cluster.shutdown()
"""


def test_a_node_that_comes_and_dies(ray_session: None, images: Path, vae: str, tmp_path: Path) -> None:
    """It gets an actor; then its raylet is killed with SIGKILL, and what it was at goes to the node that is left."""
    encode(config(str(images), tmp_path / "whole", vae, image_size=192))  # large, so that there is time for all this
    script, destination = tmp_path / "nodes.py", tmp_path / "latents"
    script.write_text(NODES)
    arguments = [sys.executable, str(script), str(images), str(destination), vae]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "added and killed" in done.stdout, done.stderr[-3000:]
    assert "failed, try 2 follows" in done.stderr
    encode(config(str(images), destination, vae, image_size=192))  # which clears away what the dead node left
    assert contents(destination) == contents(tmp_path / "whole")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_one_actor_or_two_give_the_same_bytes(
    whole: dict[str, bytes], images: Path, vae: str, tmp_path: Path, num_workers: int
) -> None:
    encode(config(str(images), tmp_path / "latents", vae, image_size=64, num_workers=num_workers))
    assert contents(tmp_path / "latents") == whole


def test_a_full_disk(
    whole: dict[str, bytes], images: Path, vae: str, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    """Nothing half written is taken for done; with room again, the same command ends the work."""
    disk = small_disk("size=1400k")
    filler = disk / "filler"
    filler.write_bytes(b"x" * 500_000)
    settings = config(str(images), disk / "latents", vae, image_size=64)
    full = pytest.raises((RuntimeError, OSError), match="No space left on device")
    with pytest.MonkeyPatch.context() as patch, full:
        # The plan's estimate would refuse it at once: here the disk fills up while the work is under way.
        patch.setattr("ldm.storage.check_space", lambda *_: None)
        encode(settings)
    for receipt in (disk / "latents" / "receipts").glob("*.json"):
        assert receipt.read_bytes() == whole[f"receipts/{receipt.name}"]
    shutil.copytree(disk / "latents", tmp_path / "latents")  # a larger disk
    encode(config(str(images), tmp_path / "latents", vae, image_size=64))
    found = settle(tmp_path / "latents", images, vae)
    assert {name: found[name] for name in whole} == whole


def test_a_read_only_destination(images: Path, vae: str, small_disk: Callable[[str], Path]) -> None:
    place = small_disk("size=1m,ro")
    with pytest.raises(RequestError, match=r"^destination=.*: .* cannot be written to; give another directory$"):
        encode(config(str(images), place / "latents", vae, image_size=64))


def test_a_shard_that_vanishes_after_the_listing(
    whole: dict[str, bytes], images: Path, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, settings = run.plan, config(str(images), tmp_path / "latents", vae, image_size=64)

    def plan_and_lose(settings: object) -> object:
        todo = planned(settings)
        (images / "s-2.tar").rename(tmp_path / "s-2.tar")
        return todo

    monkeypatch.setattr(run, "plan", plan_and_lose)
    with pytest.raises(RuntimeError, match=r"^1 of 6 shards failed, the others are committed; .*s-2\.tar: .*No such"):
        encode(settings)
    (tmp_path / "s-2.tar").rename(images / "s-2.tar")
    manifest = read_manifest(str(tmp_path / "latents"))
    assert manifest.num_samples == 190 and list(manifest.set_aside) == ["s-2"]
    monkeypatch.undo()
    encode(settings)
    found = contents(tmp_path / "latents")
    assert {name: found[name] for name in whole} == whole


def test_an_object_store_that_fails(images: Path, vae: str, s3: str, chaos_s3: ChaosProxy, tmp_path: Path) -> None:
    """A tenth of all requests meets a fault; the data set is the same, and holds no file that nobody vouches for."""
    for file in images.glob("*.tar"):
        storage.write_bytes(f"{s3}/images/{file.name}", file.read_bytes())
    found = {}
    for place, share in (("calm", 0.0), ("chaos", 0.1)):
        chaos_s3.rage(share, seed=3)
        destination = f"{s3}/{place}"
        keys = [f"source={s3}/images/s-{{0..5}}.tar", f"destination={destination}", f"autoencoder={vae}"]
        quiet = ["image_size=64", "batch_size=8", "tracking.enabled=false", "max_quarantined=10%", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", "encode", *keys, *quiet],
            env=environment() | {"LDM_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["encoded"] == 228
        assert share == 0 or chaos_s3.faults > 10
        chaos_s3.calm()
        found[place] = {name: storage.read_bytes(f"{destination}/{name}") for name in storage.list_tree(destination)}
    assert found["calm"] == found["chaos"]
    names = {name for name in found["chaos"] if name.startswith("latents/")}
    assert names == {f"latents/s-{n}{ending}" for n in range(6) for ending in (".tar", ".index.parquet")}


def damaged(folder: Path) -> dict[str, str]:
    """Shards that cannot be encoded => what is said of each."""
    good = (folder / "s-0.tar").read_bytes()
    (folder / "cut.tar").write_bytes(good[: len(good) // 2])
    (folder / "empty.tar").write_bytes(b"")
    (folder / "text.tar").write_bytes(b"this is no tar" * 100)
    mixed = [RawSample("a", {"png": encoded(picture(1))}), RawSample("b", {"png": encoded(picture(2))})]
    mixed.append(RawSample("a", {"cls": b"1"}))
    image_shard(folder / "mixed.tar", mixed)
    return {"cut": "unexpected end of data", "empty": "empty file", "text": "header", "mixed": "a stand apart (a.cls)"}


def test_damaged_shards_stop_no_other(whole: dict[str, bytes], images: Path, vae: str, tmp_path: Path) -> None:
    """A line for each; what is committed is what a run without them gives. A key that stands twice is quarantined."""
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    content = [RawSample(key, {"png": encoded(picture(5))}) for key in "xyx"]
    image_shard(folder / "twice.tar", content)
    reasons = damaged(folder)
    settings = config(str(folder), tmp_path / "latents", vae, image_size=64)
    with pytest.raises(RuntimeError, match=r"^4 of 11 shards failed, the others are committed") as caught:
        encode(settings)
    manifest = read_manifest(str(tmp_path / "latents"))
    assert manifest.set_aside.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in manifest.set_aside[name] and "\n" not in manifest.set_aside[name]
        assert f"{folder}/{name}.tar: " in str(caught.value)
    assert (manifest.accounting.inputs, manifest.accounting.encoded) == (243, 230)
    assert quarantine(tmp_path / "latents", "twice")[0]["reason"] == "its key stands twice in the shard"
    found = contents(tmp_path / "latents")
    tars = {name: data for name, data in whole.items() if name.startswith("latents/s-")}
    assert {name: found[name] for name in tars} == tars
    assert not [name for name in found if Path(name).name.split(".")[0] in reasons]


def test_nothing_is_left_of_a_finished_run(whole: dict[str, bytes]) -> None:
    assert not [name for name in whole if "/." in f"/{name}"]
