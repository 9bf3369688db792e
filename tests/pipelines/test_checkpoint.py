"""Checkpoints on real gloo processes: exact resume, any stage and world into any other, and damage of every kind."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm import storage
from ldm.config import RequestError
from pipelines.train import zero
from pipelines.train.checkpoint import (
    Part,
    checkpoint_url,
    load_checkpoint,
    newest_checkpoint,
    read_full,
    save_checkpoint,
)
from pipelines.train.checkpoint_files import CheckpointError, read_marker
from pipelines.train.ema import Ema, EmaProfile
from tests.pipelines import gloo, tiny

pytestmark = pytest.mark.slow

CASES = [(stage, precision) for stage in zero.STAGES for precision in zero.PRECISIONS]
PROFILES = (EmaProfile("fast", 0.5), EmaProfile("slow", 0.999))
SAVED, TRAINED = 3, 6  # steps
Rank = dict[Any, dict[str, Any]]


def output_of(root: str, world: int, stage: int, precision: str) -> str:
    return storage.join(root, f"{world}-{stage}-{precision}")


def train(run: zero.Engine, ema: Ema, first: int, last: int) -> list[list[float]]:
    losses = []
    for step in range(first, last):
        done, of_step = tiny.train_step(run, step)
        assert done.applied
        ema.update()
        losses.append(of_step)
    return losses


def state_of(run: zero.Engine, ema: Ema) -> dict[str, Any]:
    """What a test compares: this rank's fragments, the counters, and a forward pass in fp32 or bf16."""
    with torch.no_grad():
        output = run(tiny.batch(0)[0]).float()
    return {
        "fragments": tiny.snapshot(run, ema),
        "optimizer_step": run.state.optimizer_step,
        "updates": dict(ema.updates),
        "buffers": {name: buffer.clone() for name, buffer in run.state.buffers.items()},
        "output": output,
    }


def train_and_save(rank: int, world: int, root: str, cases: list[tuple[int, str]]) -> Rank:
    """An uninterrupted run of each case, which saves half-way."""
    found = {}
    for stage, precision in cases:
        run = tiny.engine(rank, world, stage, precision)
        ema = Ema(run.state, PROFILES)
        train(run, ema, 0, SAVED)
        run.state.buffers["scale"].fill_(0.25)
        progress = {"step": SAVED, "images_seen": SAVED * tiny.GLOBAL_BATCH, "seed": 7}
        url = save_checkpoint(
            output_of(root, world, stage, precision), Part.of(run.state, ema), progress, zero.all_gather
        )
        saved = state_of(run, ema)
        losses = train(run, ema, SAVED, TRAINED)
        found[stage, precision] = {"url": url, "saved": saved, "losses": losses, "final": state_of(run, ema)}
        run.close()
    return found


def resume(rank: int, world: int, root: str, cases: list[tuple[int, str]]) -> Rank:
    """New processes, and models of other first weights, that go on from the checkpoints of `train_and_save`."""
    found = {}
    for stage, precision in cases:
        run = tiny.engine(rank, world, stage, precision, seed=99)
        ema = Ema(run.state, PROFILES)
        url = newest_checkpoint(output_of(root, world, stage, precision))
        assert url is not None
        progress = load_checkpoint(url, run.state, ema, zero.all_gather)
        loaded = state_of(run, ema)
        losses = train(run, ema, SAVED, TRAINED)
        found[stage, precision] = {
            "progress": progress,
            "loaded": loaded,
            "losses": losses,
            "final": state_of(run, ema),
        }
        run.close()
    return found


def load_all(rank: int, world: int, urls: list[str]) -> Rank:
    """Each checkpoint into each stage."""
    found = {}
    for stage in zero.STAGES:
        run = tiny.engine(rank, world, stage, "fp32", seed=99)
        ema = Ema(run.state, PROFILES)
        for url in urls:
            load_checkpoint(url, run.state, ema, zero.all_gather)
            found[stage, url] = state_of(run, ema)
        run.close()
    return found


def refuse(rank: int, world: int, good: str, broken: dict[str, str], root: str) -> dict[str, str]:
    """The errors that this rank raises on damage, on another model, and where a peer cannot write."""
    errors = {}

    def error_of(what: str, url: str, run: zero.Engine, profiles: tuple[EmaProfile, ...] = PROFILES) -> None:
        with pytest.raises((CheckpointError, RequestError)) as caught:
            load_checkpoint(url, run.state, Ema(run.state, profiles), zero.all_gather)
        errors[what] = f"{type(caught.value).__name__}: {caught.value}"

    run = tiny.engine(rank, world, 2, "fp32")
    for what, url in broken.items():
        error_of(what, url, run)
    error_of("profile", good, run, (EmaProfile("other", 0.9),))
    blocked = f"{root}/file/below" if rank == 1 else f"{root}/half"
    with pytest.raises((CheckpointError, OSError)) as caught:
        part = Part.of(run.state, Ema(run.state, PROFILES))
        save_checkpoint(blocked, part, {"step": 5}, zero.all_gather)
    errors["save"] = str(caught.value)
    run.close()
    wider = tiny.engine(rank, world, 2, "fp32", hidden=105)
    error_of("model", good, wider)
    wider.close()
    return errors


def two_ranks(rank: int, world: int, root: str, of_three: list[str], good: str, broken: dict[str, str]) -> Any:
    """One process start for all that two fresh ranks do."""
    return resume(rank, world, root, CASES), load_all(rank, world, of_three), refuse(rank, world, good, broken, root)


def three_ranks(rank: int, world: int, root: str, of_two: list[str]) -> Any:
    remote = f"local://{root}/remote"  # any URL but file:// goes by upload and fetch, as an object store does
    os.makedirs(checkpoint_url(output_of(f"{root}/remote", world, 2, "fp32"), SAVED), exist_ok=True)
    cases = [(stage, "fp32") for stage in zero.STAGES]
    return (
        load_all(rank, world, of_two),
        train_and_save(rank, world, root, cases),
        train_and_save(rank, world, remote, [(2, "fp32")]),
        resume(rank, world, remote, [(2, "fp32")]),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def trained(root: str) -> list[Rank]:
    return gloo.run(train_and_save, 2, root, CASES)


@pytest.fixture(scope="module")
def three(root: str, trained: list[Rank]) -> list[Any]:
    return gloo.run(three_ranks, 3, root, [case["url"] for case in trained[0].values()])


@pytest.fixture(scope="module")
def broken(root: str, trained: list[Rank]) -> dict[str, str]:
    return {what: damage(trained[0][2, "fp32"]["url"], Path(root) / what, what) for what in DAMAGES}


@pytest.fixture(scope="module")
def two(root: str, trained: list[Rank], three: list[Any], broken: dict[str, str]) -> list[Any]:
    (Path(root) / "file").write_text("no directory")
    of_three = [case["url"] for case in three[0][1].values()]
    return gloo.run(two_ranks, 2, root, of_three, trained[0][2, "fp32"]["url"], broken)


DAMAGES = {
    "truncated": "rank-00001-of-00002.*safetensors: is truncated or damaged; it has",
    "flipped": "rank-00001-of-00002.*safetensors: is damaged; its sha256",
    "missing": "rank-00001-of-00002.*safetensors: is missing",
    "index": "rank-00001-of-00002.*json: is damaged",
    "average": "ema-00001-of-00002.*safetensors: is damaged; its sha256",
    "buffers": "buffers-.*safetensors: is truncated or damaged; it has",
    "marker": "checkpoint.json: is damaged; its sha256",
    "marker cut": "checkpoint.json: is no JSON .*; it is damaged; no earlier checkpoint is there; give another output",
    "uncommitted": "is no committed checkpoint",
    "future": "has checkpoint format 3; this version reads 2",
}


def damage(good: str, directory: Path, how: str) -> str:
    """A copy of a good checkpoint, broken in one way."""
    url = directory / Path(good).name
    shutil.copytree(good, url)
    (data,) = url.glob("rank-00001-*.safetensors")
    (index,) = url.glob("rank-00001-*.json")
    marker = url / "checkpoint.json"
    match how:
        case "truncated":
            data.write_bytes(data.read_bytes()[:-4096])
        case "flipped":
            tiny.flip(data)
        case "average":
            tiny.flip(*url.glob("ema-00001-*.safetensors"))
        case "buffers":
            (buffers,) = url.glob("buffers-*.safetensors")
            buffers.write_bytes(buffers.read_bytes()[:-1])
        case "marker":
            marker.write_text(marker.read_text().replace('"optimizer_step": 3', '"optimizer_step": 2'))
        case "marker cut":
            marker.write_text(marker.read_text()[:-100])
        case "missing":
            data.unlink()
        case "index":
            index.write_text(index.read_text().replace('"start": 0', '"start": 1', 1))
        case "uncommitted":
            marker.unlink()
        case "future":
            marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format_version": 3}))
    return str(url)


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """Bitwise equality of whole states, however the ranks cut them; one rank's view of the buffers is enough."""
    first, second = (tiny.assemble(of_rank["fragments"] for of_rank in ranks) for ranks in (one, other))
    assert first.keys() == second.keys()
    assert {kind for kind, _ in first} == {*tiny.KINDS, "ema.fast", "ema.slow"}
    for key in first:
        assert torch.equal(first[key], second[key]), key
    for of_rank in other:
        assert of_rank["optimizer_step"] == one[0]["optimizer_step"]
        assert of_rank["updates"] == one[0]["updates"]
        for name, buffer in one[0]["buffers"].items():
            assert torch.equal(buffer, of_rank["buffers"][name])


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(trained, two, stage, precision):
    straight = [rank[stage, precision] for rank in trained]
    resumed = [rank[0][stage, precision] for rank in two]
    assert_same([case["saved"] for case in straight], [case["loaded"] for case in resumed])
    assert_same([case["final"] for case in straight], [case["final"] for case in resumed])
    for was, now in zip(straight, resumed, strict=True):
        assert now["progress"] == {"step": 3, "images_seen": 36, "seed": 7}
        assert now["losses"] == was["losses"]
        assert torch.equal(now["loaded"]["output"], was["saved"]["output"])
        assert torch.equal(now["final"]["output"], was["final"]["output"])


@pytest.mark.parametrize("into", zero.STAGES)
@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_two_ranks_of_any_stage_load_into_three_of_any(trained, three, stage, precision, into):
    source = [rank[stage, precision] for rank in trained]
    loaded = [rank[0][into, source[0]["url"]] for rank in three]
    assert_same([case["saved"] for case in source], loaded)
    if precision == "fp32":
        for of_rank in loaded:
            torch.testing.assert_close(of_rank["output"], source[0]["saved"]["output"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("into", zero.STAGES)
@pytest.mark.parametrize("stage", zero.STAGES)
def test_three_ranks_of_any_stage_load_into_two_of_any(three, two, stage, into):
    source = [rank[1][stage, "fp32"] for rank in three]
    assert_same([case["saved"] for case in source], [rank[1][into, source[0]["url"]] for rank in two])


def test_an_object_store_holds_the_same(three):
    straight, resumed = ([rank[part][2, "fp32"] for rank in three] for part in (2, 3))
    assert straight[0]["url"].startswith("local://")
    assert_same([rank[1][2, "fp32"]["saved"] for rank in three], [case["saved"] for case in straight])
    assert_same([case["final"] for case in straight], [case["final"] for case in resumed])


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_one_process_reads_whole_tensors(trained, stage, precision):
    source = [rank[stage, precision] for rank in trained]
    expected = tiny.assemble(case["saved"]["fragments"] for case in source)
    model = tiny.Tiny(0)
    for kind in (*tiny.KINDS, "ema.fast", "ema.slow"):
        whole = read_full(source[0]["url"], kind)
        assert {name: t.shape for name, t in whole.items()} == {
            name: p.shape for name, p in model.named_parameters() if p.requires_grad
        }
        assert all(torch.equal(whole[name].flatten(), expected[kind, name]) for name in whole)
    missing, unexpected = model.load_state_dict(
        read_full(source[0]["url"], "ema.slow") | read_full(source[0]["url"], "buffer")
    )
    assert not missing
    assert not unexpected
    assert model.scale == 0.25


def test_the_marker_says_what_was_saved(trained):
    marker = read_marker(trained[0][2, "bf16"]["url"])
    assert marker["optimizer_step"] == SAVED
    assert marker["ema"] == {"fast": {"decay": 0.5, "updates": 3}, "slow": {"decay": 0.999, "updates": 3}}
    assert (marker["world"], marker["stage"], len(marker["files"])) == (2, 2, 5)


@pytest.mark.parametrize(("what", "message"), DAMAGES.items())
def test_damage_is_refused_by_every_rank(two, what, message):
    for rank in two:
        assert re.search(message, rank[2][what]), rank[2][what]
        assert rank[2][what].startswith(("CheckpointError: ", "DamagedCheckpoint: "))


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_refused_when_whole_tensors_are_read(broken, what):
    with pytest.raises(CheckpointError, match=DAMAGES[what].partition("; no earlier")[0]):
        for kind in ("master", "ema.slow", "buffer"):
            read_full(broken[what], kind)


def test_another_model_or_average_is_refused(trained, two):
    with pytest.raises(CheckpointError, match=r"has no ema\.typo; it has buffer, ema\.fast"):
        read_full(trained[0][2, "fp32"]["url"], "ema.typo")
    for rank in two:
        assert "parameter last.weight has shape (3, 103), but this model's is (3, 105)" in rank[2]["model"]
        assert "ema=other" in rank[2]["profile"]
        assert "it has fast, slow" in rank[2]["profile"]


def test_where_one_rank_cannot_write_nothing_is_committed(root, two):
    assert "Not a directory" in two[1][2]["save"] or "File exists" in two[1][2]["save"]
    assert "rank 1: " in two[0][2]["save"]
    assert not list(Path(root, "half/checkpoints/step-0000000005").iterdir()), "a disk that is full needs the room"
    assert newest_checkpoint(f"{root}/half") is None
