"""Encode while nodes die, S3 is away, a credential expires or somebody else does the same: the same bytes each time."""

import os
import time
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from ldm import storage
from pipelines.cluster import HEAD_BEGAN_ANEW
from tests.cluster import processes
from tests.cluster.bed import Bed, Node
from tests.cluster.conftest import PICTURES, SHARDS
from tests.processes import named

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.timeout(600)]
OUTAGE_S = 30


@pytest.fixture(scope="module")
def keys(source: str, vae: str) -> list[str]:
    """An encode by an actor on each node."""
    settings = "image_size=16 batch_size=8 device=cpu num_workers=3 tracking.enabled=false"
    return ["encode", f"source={source}", f"autoencoder={vae}", *settings.split()]


@pytest.fixture(scope="module")
def undisturbed(whole_bed: Bed, keys: list[str], s3: str) -> dict[str, bytes]:
    """The files of a run that nothing disturbed."""
    whole_bed.make_whole()
    report = whole_bed.run(*keys, f"destination={s3}/undisturbed")
    assert (report["encoded"], report["skipped_shards"]) == (SHARDS * PICTURES, 0)
    return contents(f"{s3}/undisturbed")


def contents(place: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(f"{place}/{name}") for name in storage.list_tree(place)}


def committed(place: str) -> dict[str, Any]:
    """When each file of the shards that are committed was written."""
    prefix = place.removeprefix("s3://bucket/")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    found = client.list_objects_v2(Bucket="bucket", Prefix=f"{prefix}/").get("Contents", [])
    written = {item["Key"].removeprefix(f"{prefix}/"): item["LastModified"] for item in found}
    done = {Path(name).stem for name in written if name.startswith("receipts/")}
    return {name: at for name, at in written.items() if Path(name).name.split(".")[0] in done}


def slow(bed: Bed, delay: float = 0.5) -> None:
    """Each thing that is written takes so many seconds, so that there is a middle of the work."""
    bed.s3.rage(1.0, kinds=("slow",), delay=delay, only=lambda method, path: method in ("PUT", "POST"))


def in_the_middle(place: str) -> dict[str, Any]:
    """Waits for the first shards; what is committed then."""
    processes.until(lambda: len(storage.list_tree(f"{place}/receipts")) >= 2, "the first shards")
    return committed(place)


def encodes(node: Node) -> bool:
    return bool(workers(node, "ray::ShardEncoder"))


def workers(node: Node, title: str) -> list[psutil.Process]:
    """The processes of a node whose title begins so."""
    return named(title, node.process.pid)


def assert_kept(place: str, before: dict[str, Any]) -> None:
    """What was committed was not written again."""
    assert before and before.items() <= committed(place).items()


def test_a_node_that_dies_and_one_that_comes(bed: Bed, keys: list[str], undisturbed: dict[str, bytes], s3: str) -> None:
    """Its shards go to the others, those that were committed to nobody; a node that comes late is used."""
    slow(bed)
    place = f"{s3}/node"
    with bed.ldm(*keys, f"destination={place}") as command:
        before = in_the_middle(place)
        slow(bed, 15)  # until the new node is at work
        bed.kill_node(next(node for node in bed.nodes if encodes(node)))
        command.until("failed, try 2 follows")
        late = bed.add_node()
        processes.until(lambda: encodes(late), "an encoder on the new node", command.process)
        bed.s3.calm()
        command.ends()
    assert_kept(place, before)
    assert contents(place) == undisturbed


def test_s3_is_down_for_half_a_minute(bed: Bed, keys: list[str], undisturbed: dict[str, bytes], s3: str) -> None:
    slow(bed)
    place = f"{s3}/outage"
    with bed.ldm(*keys, f"destination={place}") as command:
        before = in_the_middle(place)
        with bed.s3.down():
            time.sleep(OUTAGE_S)
        command.ends()
    assert_kept(place, before)
    assert contents(place) == undisturbed


def test_a_credential_that_expires(bed: Bed, keys: list[str], undisturbed: dict[str, bytes], s3: str) -> None:
    slow(bed)
    place = f"{s3}/expired"
    with bed.ldm(*keys, f"destination={place}") as command:
        before = in_the_middle(place)
        bed.s3.rage(1.0, kinds=("expired",))
        said = command.ends(1)
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and "expired" in last and "Traceback" not in said, said
    bed.s3.calm()
    report = bed.run(*keys, f"destination={place}")
    assert report["skipped_shards"] >= 2
    assert_kept(place, before)
    assert contents(place) == undisturbed


def test_two_at_once(bed: Bed, keys: list[str], undisturbed: dict[str, bytes], s3: str) -> None:
    """They share the nodes and the data set: each shard is committed once, whoever comes first."""
    slow(bed)
    place = f"{s3}/twice"
    half = [*keys, "num_workers=1", f"destination={place}", "--json"]
    with bed.ldm(*half) as one, bed.ldm(*half) as other:
        reports = [one.reports(), other.reports()]
    assert [report["encoded"] for report in reports] == [SHARDS * PICTURES] * 2
    assert len({report["generation"] for report in reports}) == 1
    assert contents(place) == undisturbed


def test_the_head_begins_anew(bed: Bed, keys: list[str], undisturbed: dict[str, bytes], s3: str) -> None:
    """A GCS that keeps nothing takes its jobs along: the command says so and ends; the same command goes on."""
    slow(bed)
    place = f"{s3}/head"
    with bed.ldm(*keys, f"destination={place}") as command:
        before = in_the_middle(place)
        slow(bed, 15)  # until the head is back
        bed.restart_head()
        said = command.ends(1)
    bed.make_whole()
    report = bed.run(*keys, f"destination={place}")
    assert report["skipped_shards"] >= 2
    assert_kept(place, before)
    assert contents(place) == undisturbed
    assert said.strip().splitlines()[-1] == f"error: {HEAD_BEGAN_ANEW}" and "Traceback" not in said, said
