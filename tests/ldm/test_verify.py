"""Each kind of damage is found and named; what is whole has no problem; nothing ends in a traceback."""

import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldm import storage
from ldm.config import RequestError
from ldm.latents.manifest import fingerprint_hash, generation_receipts, read_manifest
from ldm.latents.verify import Extras, open_to_verify, verify_autoencoder, verify_quick
from ldm.latents.verify_shard import verify_receipt
from tests.ldm.damage import edit_table, flip_a_bit, rewrite, rewrite_manifest, whole_dataset, with_true_hashes
from tests.pictures import kl_model, records, write_latent_shard

TAR, INDEX, COLUMNS = "latents/one.2x2.tar", "latents/one.2x2.index.parquet", "columns/one.2x2.parquet"


@pytest.fixture(scope="module")
def original(kl, tmp_path_factory) -> Path:
    url = tmp_path_factory.mktemp("verify")
    whole_dataset(str(url), kl)
    return url


@pytest.fixture
def place(original, tmp_path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(original, tmp_path / "latents")
    return tmp_path / "latents"


def without(url: object, lines: list[str]) -> list[str]:
    """The lines, files named from the folder of the data set."""
    assert all(line.startswith(f"{url}/") for line in lines), lines
    return [line.removeprefix(f"{url}/") for line in lines]


def quick(url: object) -> list[str]:
    opened = open_to_verify(str(url))
    found = verify_quick(opened.manifest, opened.receipts)[0] if opened.manifest else []
    return without(url, [*opened.problems, *found])


def full(url: object) -> list[str]:
    opened = open_to_verify(str(url))
    if opened.manifest is None:
        return quick(url)
    lines = verify_autoencoder(opened.manifest)
    for receipt in opened.receipts:
        lines += verify_receipt(str(url), opened.manifest.channels, receipt)
    return quick(url) + without(url, lines)


def test_what_is_whole_has_no_problem(original):
    assert full(original) == []
    opened = open_to_verify(str(original))
    assert [receipt.name for receipt in opened.receipts] == ["one", "one~1", "two"]
    assert sum(output.count for receipt in opened.receipts for output in receipt.outputs) == 44
    assert verify_quick(opened.manifest, opened.receipts) == ([], Extras(0, 0))


def test_on_an_object_store(original, s3):
    for path in original.rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{s3}/verify/{path.relative_to(original)}", path.read_bytes())
    assert full(f"{s3}/verify") == []
    storage.write_bytes(f"{s3}/verify/{TAR}", (original / TAR).read_bytes()[:-512])
    lines = full(f"{s3}/verify")
    assert len(lines) == 2 and lines[0].startswith(f"{TAR}: has ") and lines[1].startswith(f"{TAR}: does not have the")


@pytest.mark.parametrize("content", [None, '{"name": "a web app"}', "{"])
def test_what_is_no_latent_dataset(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(RequestError, match="^latents=.*manifest.json"):
        open_to_verify(str(tmp_path))


def test_a_generation_that_is_not_there(original):
    with pytest.raises(RequestError, match="generation abc is not there; it holds "):
        open_to_verify(str(original), "abc")


def test_what_belongs_to_no_generation_is_counted_and_no_problem(place):
    fingerprint = read_manifest(str(place)).fingerprint
    write_latent_shard(str(place), "three", records(2), fingerprint=fingerprint_hash(fingerprint))
    (place / "latents" / "four.tar").write_bytes(b"of a run that was killed")
    (place / "quarantine" / "four.jsonl").write_bytes(b"{}")
    opened = open_to_verify(str(place))
    assert verify_quick(opened.manifest, opened.receipts) == ([], Extras(orphans=2, newer_receipts=1))
    (place / "receipts" / "three.json").write_text("{")
    assert quick(place)[0].startswith("receipts: one that is no part yet cannot be read (ValueError")


QUICK = [
    ("generations/HASH.json", "does not have the hash that is its name"),
    ("generations/HASH.receipts.parquet", "does not have the hash that its manifest names"),
    ("generations/HASH.shards.parquet", "does not have the hash that its manifest names"),
    ("fingerprint.json", "fingerprint.json: is not that of the generation"),
    ("reading.json", "reading.json: is damaged; its sha256 is not the one that it names"),
]


@pytest.mark.parametrize(("file", "problem"), QUICK)
def test_a_flipped_bit_that_quick_finds(place, file, problem):
    path = place / file.replace("HASH", read_manifest(str(place)).generation)
    word = b"cls" if file == "reading.json" else b"moments"
    flip_a_bit(path, path.read_bytes().index(word) if path.suffix == ".json" else None)
    lines = quick(place)
    assert len(lines) == 1 and problem in lines[0], lines
    assert lines[0].startswith(file.replace("HASH", path.name.split(".")[0]))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "manifest.json: is no JSON"),
        ("[]", "manifest.json is not of a latent dataset"),
        ('{"format": "ldm-latents"}', "manifest.json names no generation"),
        ('{"format": "ldm-latents", "generation": "0123"}', "generation 0123 is not there; it holds "),
    ],
)
def test_a_pointer_that_leads_nowhere(place, content, problem):
    (place / "manifest.json").write_text(content)
    lines = quick(place)
    assert len(lines) == 1 and lines[0].startswith("manifest.json: ") and problem in lines[0]


@pytest.mark.parametrize("at", range(0, 40, 3))
def test_any_flipped_bit_of_the_manifest_is_a_problem_or_harmless_white_space(place, at):
    path = place / "generations" / f"{read_manifest(str(place)).generation}.json"
    data = path.read_bytes()
    flip_a_bit(path, at * len(data) // 40)
    lines = quick(place)
    assert len(lines) == 1 and lines[0].split(":")[0] in (str(path.relative_to(place)), "manifest.json"), lines


FULL = [
    ("quarantine/one.jsonl", "quarantine/one.jsonl: does not have the hash that its receipt names"),
    ("autoencoder/diffusion_pytorch_model.safetensors", "autoencoder: is not the one that made the latents (weights: "),
    (TAR, f"{TAR}: does not have the hash that its receipt names"),
    (INDEX, f"{INDEX}: does not have the hash that its receipt names"),
    (COLUMNS, f"{COLUMNS}: does not have the hash that its receipt names"),
]


@pytest.mark.parametrize(("file", "problem"), FULL)
def test_a_flipped_bit_that_full_finds(place, file, problem):
    flip_a_bit(place / file)
    assert quick(place) == []  # of the same size: this is what quick cannot see
    lines = full(place)
    assert lines[0].startswith(problem) and all(line.split(":")[0] == problem.split(":")[0] for line in lines), lines


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('"inputs": 8', "receipts/two.json: is no receipt (AssertionError"),
        ('"max_label": 3', "receipts/two.json: says something else than the manifest's table"),
        ('"input_url": "elsewhere"', "receipts/two.json: says something else than the manifest's table"),
        ('"inputs": [', "receipts/two.json: is no receipt (ValueError"),
    ],
)
def test_a_receipt_that_says_other_things(place, line, problem):
    path = place / "receipts" / "two.json"
    was = next(text for text in path.read_text().splitlines() if line.split(":")[0] in text)
    path.write_text(path.read_text().replace(was, line + ",", 1))
    assert quick(place) == []
    lines = full(place)
    assert len(lines) == 1 and lines[0].startswith(problem), lines


@pytest.mark.parametrize("change", [lambda v: v | {"norm_num_groups": 2}, lambda v: [], lambda v: {}])
def test_an_autoencoder_that_is_another_or_none(place, change):
    path = place / "autoencoder" / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    lines = full(place)
    assert len(lines) == 1 and lines[0].startswith("autoencoder: "), lines


def test_the_autoencoder_of_another_training(place):
    kl_model(seed=1).save_pretrained(place / "autoencoder")
    assert full(place)[0].startswith("autoencoder: is not the one that made the latents (weights: ")
    (place / "autoencoder" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 100)
    assert full(place)[0].startswith("autoencoder: cannot be loaded (")
    shutil.rmtree(place / "autoencoder")
    assert full(place)[0].startswith("autoencoder: cannot be loaded (holds no config.json")


@pytest.mark.parametrize("change", [lambda data: data[:-100], lambda data: data + b"\0", lambda data: b""])
def test_a_file_of_another_size(place, change):
    for file in (TAR, INDEX, COLUMNS):
        data = (place / file).read_bytes()
        (place / file).write_bytes(change(data))
        lines = full(place)
        assert lines and all(line.startswith(f"{file}: ") for line in lines), lines
        assert quick(place)
        (place / file).write_bytes(data)


@pytest.mark.parametrize("file", [TAR, INDEX, COLUMNS, "receipts/two.json", "quarantine/two.jsonl", "fingerprint.json"])
def test_a_file_that_is_missing(place, file):
    (place / file).unlink()
    assert quick(place) == [f"{file}: is missing"]
    assert full(place) == [f"{file}: is missing"]


@pytest.mark.parametrize("end", ["json", "receipts.parquet", "shards.parquet"])
def test_a_missing_part_of_the_generation(place, end):
    file = f"generations/{read_manifest(str(place)).generation}.{end}"
    (place / file).unlink()
    lines = quick(place)
    assert len(lines) == 1 and ("is not there" if end == "json" else f"{file}: is missing") in lines[0]


@pytest.mark.parametrize("at", range(0, 16 * 512, 257))
def test_any_flipped_bit_of_a_tar_is_found_in_full(place, at):
    flip_a_bit(place / TAR, at % (place / TAR).stat().st_size)
    lines = full(place)
    assert f"{TAR}: does not have the hash that its receipt names" in lines
    assert all(line.startswith(TAR) for line in lines)


@pytest.mark.parametrize("file", [INDEX, COLUMNS])
@pytest.mark.parametrize("at", [3, 60, 200, 500, -5])
def test_any_flipped_bit_of_a_table_is_found_in_full(place, file, at):
    flip_a_bit(place / file, at)
    assert full(place) == [f"{file}: does not have the hash that its receipt names"]


def test_a_damaged_record_is_named_by_its_key(place):
    data = (place / TAR).read_bytes()
    flip_a_bit(place / TAR, data.index(b"00003~4x4-flip.latents.npy") + 512 + 128 + 5)
    assert full(place) == [
        f"{TAR}: does not have the hash that its receipt names",
        f"{TAR}: 00003~4x4-flip: does not have the crc32 of its index",
    ]


def plant_nan(place: Path) -> None:
    data = bytearray((place / TAR).read_bytes())
    start = data.index(b"00002~4x4.latents.npy") + 512 + 128
    data[start : start + 2] = np.array(np.nan, np.float16).tobytes()
    (place / TAR).write_bytes(data)

    def same(rows: list[dict]) -> None:
        row = next(row for row in rows if row["offset"] == start)
        row["crc32"] = zlib.crc32(data[start : start + row["length"]])

    edit_table(place / INDEX, same)


def swap_ids(place: Path) -> None:
    def swap(rows: list[dict]) -> None:
        rows[0]["id"], rows[1]["id"] = rows[1]["id"], rows[0]["id"]

    edit_table(place / INDEX, swap)
    edit_table(place / COLUMNS, swap)


def swap_keys(place: Path) -> None:
    edit_table(place / COLUMNS, lambda rows: rows[0].update(key="00001"))


def other_label(place: Path) -> None:
    edit_table(place / COLUMNS, lambda rows: rows[0].update(label=7))


def one_row_less(place: Path) -> None:
    edit_table(place / COLUMNS, list.pop)


def other_offset(place: Path) -> None:
    edit_table(place / INDEX, lambda rows: rows[0].update(offset=0))


def scaled(place: Path) -> None:
    """All numbers doubled, and every crc made to match: only the moments give it away."""
    data = bytearray((place / TAR).read_bytes())

    def double(rows: list[dict]) -> None:
        for row in rows:
            piece = slice(row["offset"], row["offset"] + row["length"])
            data[piece] = (2 * np.frombuffer(bytes(data[piece]), np.float16)).tobytes()
            row["crc32"] = zlib.crc32(bytes(data[piece]))

    edit_table(place / INDEX, double)
    (place / TAR).write_bytes(data)


@pytest.mark.parametrize(
    ("plant", "problem"),
    [
        (plant_nan, f"{TAR}: 00002~4x4: holds numbers that are not finite"),
        (swap_ids, f"{TAR}: 00000~4x4: its id is not the hash of its shard and key"),
        (swap_keys, f"{COLUMNS}: 00001: its picture is not the hash of shard and key"),
        (other_label, f"{COLUMNS}: its labels go up to 7, its receipt says 2"),
        (one_row_less, f"{COLUMNS}: has 9 rows, its receipt says 10"),
        (other_offset, f"{TAR}: 00000~4x4: has 64 bytes at 640, its index says 64 bytes at 0"),
        (scaled, f"{TAR}: the mean and spread of its records are not those of its receipt"),
    ],
)
def test_what_somebody_changed_with_all_its_hashes(place, plant, problem):
    plant(place)
    rewrite(place, lambda receipt: with_true_hashes(place, receipt))
    assert quick(place) == []
    lines = full(place)
    assert problem in lines, lines


def test_a_manifest_that_does_not_follow_from_its_tables(place):
    def other_counts(receipt):
        outputs = tuple(replace(output, count=output.count - 3) for output in receipt.outputs)
        return replace(receipt, outputs=outputs, fingerprint="another") if receipt.name == "two" else receipt

    def edit(values):
        values["num_samples"] += 1
        values["statistics"]["mean"][0] += 1e-9
        values["accounting"]["inputs"] += 1
        values["accounting"]["encoded"] += 1
        values["conditioning"]["num_classes"] = 2

    rewrite(place, other_counts)
    rewrite_manifest(place, edit)
    where = f"generations/{read_manifest(str(place)).generation}.json: "
    assert quick(place) == [
        f"{where}says 39 records, its receipts 38",
        f"{where}says 15 = 12 encoded + 2 filtered + 1 quarantined, "
        "its receipts 14 = 11 encoded + 2 filtered + 1 quarantined",
        f"{where}its mean and standard deviation are not those of its receipts",
        f"{where}has 2 classes, but labels up to 2",
        "receipts/two.json: was made with another fingerprint",
    ]
    assert f"{TAR.replace('one', 'two')}: has 10 records that can be read, its receipt says 7" in full(place)


def test_refused_samples_without_their_file(place):
    """Counts in the receipt, and no file with the reasons."""
    rewrite(place, lambda receipt: replace(receipt, quarantine_sha256=""))
    assert quick(place) == []
    said = "quarantine/one.jsonl: names 0 filtered and 0 quarantined samples, its receipt says 1 and 1"
    assert said in full(place)


def test_ten_wrong_records_are_five_lines_and_a_count(place):
    edit_table(place / INDEX, lambda rows: [row.update(crc32=1) for row in rows])
    rewrite(place, lambda receipt: with_true_hashes(place, receipt))
    lines = full(place)
    assert len(lines) == 6 and lines[-1] == f"{TAR}: and 5 more of its records are wrong"


def test_the_older_generation_is_verified_by_its_name(place):
    older = read_manifest(str(place)).generation
    rewrite(place, lambda receipt: replace(receipt, input_url="elsewhere"))
    assert read_manifest(str(place)).generation != older
    opened = open_to_verify(str(place), older)
    assert list(opened.receipts) == generation_receipts(str(place), older)
    assert verify_quick(opened.manifest, opened.receipts)[0] == []
