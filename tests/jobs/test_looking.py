"""`ldm inspect`, `ldm verify` and `ldm convert` as one calls them."""

import json
from pathlib import Path

import pytest

from jobs import cli
from ldm.autoencoder import load_autoencoder
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import read_manifest
from tests.ldm.damage import whole_dataset
from tests.pictures import image_shard, kl_model, samples


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vae")
    kl_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vae: str) -> Path:
    """A folder to stand in, with image shards and a latent dataset `latents`."""
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        image_shard(tmp_path / f"in-{number}.tar", samples(3, start=3 * number))
    whole_dataset("latents", load_autoencoder(vae))
    return tmp_path


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(arguments.split())
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "arguments", ["in-0.tar in-1.tar", "in-{0..1}.tar", "target=in-*.tar", "in-0.tar,in-1.tar probe=300"]
)
def test_inspect_pictures(place: Path, capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    code, out, _ = run(f"inspect {arguments} --json --preview grid.png", capsys)
    assert code == 0 and out.count("\n") == 1
    report = json.loads(out)
    assert (report["kind"], report["shards"], report["samples"]) == ("pictures", 2, 6)
    assert (place / "grid.png").stat().st_size > 0
    code, out, _ = run(f"inspect {arguments}", capsys)
    assert code == 0 and "\nsamples  6, of which 6 can be encoded\n" in out and "\nformats  PNG 6\n" in out


def test_inspect_latents(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("inspect latents --json", capsys)
    assert code == 0 and json.loads(out)["records"] == 44 and json.loads(out)["kind"] == "latents"
    code, out, _ = run("inspect latents", capsys)
    assert code == 0 and "accounting   14 = 11 encoded + 2 filtered + 1 quarantined\n" in out
    assert run("inspect latents --dry-run", capsys)[1].startswith("inspect the latent dataset latents, generation ")


def test_verify_says_each_problem_and_fails(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("verify latents --json", capsys)
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report == {
        "ok": True,
        "problems": [],
        "generation": read_manifest("latents").generation,
        "checked": 44,
        "orphans": 0,
        "newer_receipts": 0,
    }
    tar = place / "latents" / "latents" / "one.2x2.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    (place / "latents" / "quarantine" / "two.jsonl").unlink()
    code, out, err = run("verify latents --json", capsys)
    assert code == 1 and json.loads(out)["ok"] is False
    assert err.splitlines() == json.loads(out)["problems"]
    assert [line.split(": ")[0] for line in err.splitlines()] == [str(tar), f"{place}/latents/quarantine/two.jsonl"]


@pytest.mark.parametrize("file", ["manifest.json", "generations/HASH.json", "generations/HASH.shards.parquet"])
def test_a_damaged_manifest_is_a_problem_and_no_traceback(
    place: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    path = place / "latents" / file.replace("HASH", read_manifest("latents").generation)
    path.write_bytes(path.read_bytes()[:-20])
    code, out, err = run("verify latents --json", capsys)
    assert code == 1 and len(err.splitlines()) == 1 and str(path) in err
    assert json.loads(out)["checked"] == 0
    if file != "manifest.json":  # which for the others is a wrong request
        code, _, err = run("inspect latents", capsys)
        assert code == 1 and len(err.splitlines()) == 1 and str(path.name) in err


def test_convert(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "t.csv").write_text("shard,key,label\none,00001,9\nsix,00001,9\n")
    before = read_manifest("latents").generation
    code, out, _ = run("convert latents table=t.csv --dry-run", capsys)
    assert code == 0 and out == (
        "join label to latents: by shard and key, 4 of 44 records are matched, 1 of 2 rows are of no use\n"
    )
    assert read_manifest("latents").generation == before
    code, out, _ = run("convert latents table=t.csv --json", capsys)
    report = json.loads(out)
    assert code == 0 and (report["matched"], report["unused_rows"]) == (4, 1)
    assert read_manifest("latents").generation == report["generation"] != before
    assert read_manifest("latents").conditioning.num_classes == 10
    assert run("verify latents", capsys)[0] == 0
    data = LatentDataset("latents", global_batch_size=1)  # of two sizes, and four records of one picture
    epoch = [data.batch(step) for step in range(44)]
    assert len({batch.moments.shape for batch in epoch}) == 2 == len(data.record_shapes)
    assert sorted(int(batch.labels) for batch in epoch).count(9) == 4
