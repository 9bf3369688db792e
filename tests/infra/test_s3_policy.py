"""infra/s3-policy.json allows what the stages ask S3 for, and nothing else of it is allowed."""

import fnmatch
import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from ldm import storage
from ldm.autoencoder import Autoencoder
from ldm.latents.dataset import LatentDataset
from ldm.latents.receipt import receipt_url
from ldm.sources import find_shards, reader_of
from pipelines.train.checkpoint import checkpoint_url, remove_checkpoint
from tests.chaos_s3 import ChaosProxy
from tests.infra.deployed import INFRA
from tests.pictures import image_shard, kl_model, latent_dataset, samples, write_tiny_snapshot

POLICY = INFRA / "s3-policy.json"
Asked = tuple[str, str]
"""(IAM action, object's ARN) of one request."""


def statements(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text().replace("CHANGE-bucket", "policy"))["Statement"]
    return found


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def allows(policy: list[dict[str, Any]], asked: Asked) -> bool:
    action, resource = asked
    return any(
        action in as_list(each["Action"])
        and any(fnmatch.fnmatchcase(resource, pattern) for pattern in as_list(each["Resource"]))
        for each in policy
    )


def needed(method: str, path: str) -> Asked | None:
    """What a request needs by S3's table of actions; None for many deletions, whose keys stand in the body."""
    url = urlsplit(path)
    bucket, _, key = unquote(url.path).lstrip("/").partition("/")
    query, arn = parse_qs(url.query, keep_blank_values=True), f"arn:aws:s3:::{bucket}"
    if not key and (method, *query) == ("POST", "delete"):
        return None
    if not key:
        assert method == "HEAD" or query.get("list-type") == ["2"], f"{method} {path}: needs more than to list"
        return "s3:ListBucket", arn
    actions = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject", "DELETE": "s3:DeleteObject"}
    if "uploadId" in query or "uploads" in query:
        actions |= {"POST": "s3:PutObject", "DELETE": "s3:AbortMultipartUpload"}
    return actions[method], f"{arn}/{key}"


@pytest.fixture
def asked(chaos_s3: ChaosProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[Asked]:
    """The actions that the requests of the test need, but for deletions of many. The bucket `policy` is there."""
    import boto3

    boto3.client("s3").create_bucket(Bucket="policy")
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    found: set[Asked] = set()

    def note(method: str, path: str) -> bool:
        if (action := needed(method, path)) is not None:
            found.add(action)
        return False

    chaos_s3.rage(1.0, only=note)
    return found


def test_what_the_stages_ask_for_is_allowed(asked: set[Asked], tmp_path: Path) -> None:
    """What encode and train do with S3, without their processes: read shards, write and read latents, snapshots."""
    image_shard(tmp_path / "train-0.tar", samples(4))
    storage.write_bytes("s3://policy/shards/train-0.tar", (tmp_path / "train-0.tar").read_bytes())
    asked.clear()  # the pictures are put there by a person
    autoencoder = Autoencoder(kl_model())
    autoencoder.save(str(tmp_path / "vae"))
    shards, _ = find_shards("s3://policy/shards/train-{0..0}.tar")
    assert len(list(reader_of(shards["train-0"].url, "train-0"))) == 4
    latent_dataset("s3://policy/latents", autoencoder)
    LatentDataset("s3://policy/latents", global_batch_size=4).batch(0)
    write_tiny_snapshot("s3://policy/runs/first/snapshots/step-7", autoencoder, str(tmp_path / "vae"))
    policy = statements(POLICY)
    assert {action for action, _ in asked} == {"s3:ListBucket", "s3:GetObject", "s3:PutObject"}
    assert [each for each in sorted(asked) if not allows(policy, each)] == []


def test_what_is_removed_may_be(asked: set[Asked]) -> None:
    """A checkpoint that is pruned, in one request for many, and a receipt that is withdrawn."""
    url = checkpoint_url("s3://policy/runs/second", 10)
    keys = [storage.join(url, name) for name in ("checkpoint.json", "rank-0.safetensors", "rank-1.safetensors")]
    keys.append(receipt_url("s3://policy/latents", "shard-withdrawn"))
    for key in keys:
        storage.write_bytes(key, b"{}")
    remove_checkpoint("s3://policy/runs/second", 10)
    storage.remove(keys[-1])
    assert not any(storage.exists(key) for key in keys)
    policy = statements(POLICY)
    gone = {("s3:DeleteObject", key.replace("s3://", "arn:aws:s3:::")) for key in keys}
    assert [each for each in sorted(asked | gone) if not allows(policy, each)] == []


@pytest.mark.parametrize(
    "asked",
    [
        ("s3:DeleteObject", "arn:aws:s3:::policy/shards/train-0.tar"),
        ("s3:PutObject", "arn:aws:s3:::policy/shards/train-0.tar"),
        ("s3:DeleteObject", "arn:aws:s3:::policy/latents/latents/train-0.tar"),
        ("s3:GetObject", "arn:aws:s3:::policy/mlflow/1/model"),
        ("s3:GetObject", "arn:aws:s3:::other/latents/manifest.json"),
        ("s3:PutBucketPolicy", "arn:aws:s3:::policy"),
    ],
)
def test_what_no_stage_needs_is_not(asked: Asked) -> None:
    assert not allows(statements(POLICY), asked)


@pytest.mark.parametrize("file", [POLICY, INFRA / "mlflow" / "s3-policy.json"], ids=["stages", "mlflow"])
def test_uploads_that_break_off_can_be_cleared_away_and_nothing_is_granted_by_star(file: Path) -> None:
    policy = statements(file)
    for each in policy:
        assert each["Effect"] == "Allow" and not any("*" in action for action in as_list(each["Action"]))
        assert all(resource.startswith("arn:aws:s3:::policy") for resource in as_list(each["Resource"]))
    puts = [each for each in policy if "s3:PutObject" in as_list(each["Action"])]
    assert puts and all("s3:AbortMultipartUpload" in each["Action"] for each in puts)
