"""A table joined by key: every value at its record, the older generation as it was, mistakes before any write."""

import json
from pathlib import Path

import pandas as pd
import pytest

from ldm import storage
from ldm.config import RequestError
from ldm.latents.dataset import LatentDataset
from ldm.latents.join import JoinConfig, JoinReport, join, plan
from ldm.latents.manifest import commit_generation, fingerprint_hash, read_manifest, read_receipts
from ldm.latents.verify import open_to_verify, verify_quick
from ldm.latents.verify_shard import verify_receipt
from ldm.latents.writer import sample_id
from tests.ldm.damage import flip_a_bit, whole_dataset
from tests.pictures import latent_dataset, records, write_latent_shard


@pytest.fixture
def place(kl, tmp_path) -> Path:
    """Shards shard-0 of 4 and shard-1 of 3 samples, whose keys `00000`, … repeat; labels 0 to 2, captions."""
    latent_dataset(str(tmp_path / "latents"), kl, (4, 3))
    return tmp_path


def give(place: Path, table: str | bytes | pd.DataFrame, name: str = "t.csv", **options: object) -> JoinReport:
    return join(config(place, table, name, **options))


def config(place: Path, table: str | bytes | pd.DataFrame, name: str = "t.csv", **options: object) -> JoinConfig:
    if isinstance(table, pd.DataFrame):
        table.to_parquet(place / name)
    else:
        (place / name).write_bytes(table.encode() if isinstance(table, str) else table)
    return JoinConfig(latents=str(place / "latents"), table=str(place / name), **options)  # type: ignore[arg-type]


def columns(place: Path, generation: str | None = None) -> pd.DataFrame:
    """The columns of all shards, with the name of the shard."""
    url = str(place / "latents")
    rows = read_manifest(url, generation).shards
    parts = [pd.read_parquet(f"{url}/columns/{row['columns']}.parquet").assign(shard=row["name"]) for row in rows]
    return pd.concat(parts).set_index(["shard", "key"]).sort_index()


def labels(place: Path, generation: str | None = None) -> list[int]:
    return LatentDataset(str(place / "latents"), global_batch_size=1, generation=generation).all().labels.tolist()


def problems(place: Path) -> list[str]:
    opened = open_to_verify(str(place / "latents"))
    assert opened.manifest is not None
    found = [line for line in verify_quick(opened.manifest, opened.receipts)[0] if "fingerprint.json" not in line]
    return found + [line for r in opened.receipts for line in verify_receipt(str(place / "latents"), 4, r)]


def test_labels_captions_and_scores_by_shard_and_key(place):
    before, older = columns(place), read_manifest(str(place / "latents")).generation
    report = give(
        place,
        "shard,key,label,caption,score\n"
        'shard-0,00001,7,"two\nlines, and a comma",0.5\n'
        "shard-1,00002,,NA,2\n"
        "shard-9,00000,1,of another data set,1\n",
    )
    assert report == JoinReport(
        7, 2, 1, ("label", "caption", "score"), read_manifest(str(place / "latents")).generation
    )
    after = columns(place)
    assert after.loc[("shard-0", "00001"), ["label", "caption", "score"]].tolist() == [
        7,
        "two\nlines, and a comma",
        0.5,
    ]
    there = after.loc[("shard-1", "00002")]
    assert pd.isna(there.label) and there.caption == "NA" and there.score == 2
    untouched = [pair for pair in before.index if pair not in [("shard-0", "00001"), ("shard-1", "00002")]]
    assert after.loc[untouched, before.columns].equals(before.loc[untouched].astype(after.dtypes[before.columns]))
    assert after.loc[untouched, "score"].isna().all()
    # Training reads the new labels; a run that pinned the older generation reads what it read.
    assert (
        labels(place) == [0, 7, 2, 0, 0, 1, 8] and read_manifest(str(place / "latents")).conditioning.num_classes == 8
    )
    assert labels(place, older) == [0, 1, 2, 0, 0, 1, 2] and columns(place, older).equals(before)
    assert problems(place) == []


def test_twice_is_once(place):
    table = "shard,key,label\nshard-0,00001,2\n"
    first = give(place, table)
    files = sorted((place / "latents").rglob("*"))
    assert give(place, table) == first
    assert sorted((place / "latents").rglob("*")) == files


def test_keys_keep_their_zeros(place):
    with pytest.raises(RequestError, match="none of its 2 rows, by shard and key, is of a sample of"):
        give(place, "shard,key,label\nshard-0,1,2\nshard-0,2,2\n")
    with pytest.raises(RequestError, match="its key is int64, expected string"):
        give(place, '{"key": 1, "label": 2}\n', "t.jsonl")


def test_a_key_alone_serves_where_it_stands_in_one_shard(place):
    with pytest.raises(RequestError, match="one of its keys stands in the shards shard-0 and shard-1; give the table"):
        give(place, "key,label\n00003,5\n00001,5\n")
    report = give(place, "key,label\n00003,5\n")
    assert (report.matched, report.unused_rows) == (1, 0)
    assert labels(place) == [0, 1, 2, 5, 0, 1, 2]


def test_by_id_from_jsonl(place):
    lines = [{"id": sample_id("shard-1", "00000"), "score": 1.5, "tags": ["a"]}, {"id": 5, "score": 2, "tags": []}]
    report = give(place, "\n".join(map(json.dumps, lines)), "t.jsonl")
    assert (report.matched, report.unused_rows) == (1, 1)
    assert list(columns(place).loc[("shard-1", "00000"), "tags"]) == ["a"]


def test_all_records_of_a_picture_or_one_of_them(kl, tmp_path):
    """Several sizes and flipped copies of one picture: its key is that of all, an id may be that of one."""
    url = str(tmp_path / "latents")
    whole_dataset(url, kl)
    report = give(tmp_path, "shard,key,label\none,00003,1\none,00050,1\n")
    assert (report.matched, report.unused_rows) == (8, 0)  # 00050 is of a second try of the shard
    one = sample_id("two", "00001", "4x4-flip")
    report = give(tmp_path, f"id,score\n{one},1\n{sample_id('two', '00002')},2\n")
    assert report.matched == 5
    found = pd.concat(pd.read_parquet(f"{url}/columns/{row['columns']}.parquet") for row in read_manifest(url).shards)
    assert found[found.score == 1].id.tolist() == [one]
    assert found[found.score == 2].key.tolist() == ["00002"] * 4
    assert (found[found.key.isin(["00003", "00050"])].groupby("key").label.sum() >= 4).all()
    assert problems(tmp_path) == []


def test_chosen_columns_of_a_parquet_of_pandas(place):
    frame = pd.DataFrame({"shard": ["shard-0"], "key": ["00000"], "width": [5], "kind": ["x"], "score": [1]})
    frame["kind"] = frame["kind"].astype("category")
    with pytest.raises(RequestError, match="its column width says what a record is, which stays; leave it out"):
        give(place, frame, "t.parquet")
    assert give(place, frame, "t.parquet", columns="kind,score").columns == ("kind", "score")
    found = columns(place)
    assert found.loc[("shard-0", "00000"), "kind"] == "x" and found.width.tolist() == [20] * 7


def test_numbers_of_two_kinds_become_float(place):
    give(place, "shard,key,score\nshard-0,00000,1\nshard-0,00001,2\n")
    give(place, "shard,key,score\nshard-0,00001,2.5\n")
    assert columns(place).score.dropna().tolist() == [1, 2.5]
    with pytest.raises(RequestError, match="columns=score: is string in the table, double in the data set"):
        give(place, "shard,key,score\nshard-0,00001,good\n")


def test_a_later_encode_keeps_what_was_joined(place):
    url = str(place / "latents")
    give(place, "shard,key,label,score\nshard-0,00000,2,9\n")
    fingerprint = read_manifest(url).fingerprint
    write_latent_shard(url, "shard-2", records(2), fingerprint=fingerprint_hash(fingerprint))
    commit_generation(url, list(read_receipts(url).values()), fingerprint, 4, 2)
    assert labels(place) == [2, 1, 2, 0, 0, 1, 2, 0, 1]
    assert columns(place).loc[("shard-0", "00000"), "score"] == 9


def test_class_names_cover_all_labels(place):
    names = place / "names.json"
    names.write_text('["a", "b", "c", "d"]')
    give(place, "shard,key,label\nshard-0,00000,3\n", class_names=str(names))
    assert read_manifest(str(place / "latents")).conditioning.names == ("a", "b", "c", "d")
    before = sorted((place / "latents").rglob("*"))
    with pytest.raises(RequestError, match="^class_names: 4 classes have a name, but the labels go up to 4; name all"):
        give(place, "shard,key,label\nshard-0,00000,4\n")
    names.write_text('["a", "b"]')  # of what the table leaves as it was
    with pytest.raises(RequestError, match="^class_names=.*names.json: 2 classes have a name, but .* up to 3"):
        give(place, "shard,key,label\nshard-0,00001,1\n", class_names=str(names))
    assert sorted((place / "latents").rglob("*")) == before


MISTAKES = [
    ("t.csv", "key\n00000\n", "has keys and no other column"),
    ("t.csv", "name,label\na,1\n", "has no column 'key' (it has name, label); give id, shard and key, or key"),
    ("t.csv", "shard,label\na,1\n", "has no column 'key'"),
    ("t.csv", "shard,key,label\n", "has no row"),
    ("t.csv", "", "cannot be read (Empty CSV file"),
    ("t.csv", "shard,key,label\nshard-0,00000,seven\n", "cannot be read (In CSV column"),
    ("t.csv", "shard,key,label\nshard-0,00000,1.5\n", "cannot be read (In CSV column"),
    ("t.csv", "shard,key,label\nshard-0,00000,-1\n", "its labels go from -1 to -1, expected 0 to 999999"),
    ("t.csv", "shard,key,label\nshard-0,00000,1\nshard-0,00000,2\n", "has two rows for shard and key shard-0 00000"),
    ("t.csv", "shard,key,label\nshard-0,,1\n", "has a row without shard and key"),
    ("t.csv", "shard,key,a,a\nshard-0,00000,1,2\n", "has two columns 'a'; leave one"),
    ("t.csv", ",shard,key,a\n0,shard-0,00000,1\n", "has a column without a name"),
    ("t.jsonl", "{", "cannot be read (JSON parse error"),
    ("t.jsonl", '{"key": "00003", "label": "1"}', "its label is string, expected int64"),
    ("t.parquet", "PAR1 and no more", "cannot be read ("),
    ("t.xlsx", "x", "is no table that can be read; give a .parquet, .csv or .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), MISTAKES)
def test_a_mistake_in_the_table_is_named_before_anything_is_written(place, name, content, message):
    before = sorted((place / "latents").rglob("*"))
    with pytest.raises(RequestError) as caught:
        give(place, content, name)
    assert str(caught.value).startswith(f"table={place / name}: {message}"), caught.value
    assert "\n" not in str(caught.value)
    assert sorted((place / "latents").rglob("*")) == before


def test_other_mistakes(place):
    with pytest.raises(RequestError, match=r"^table=.*none.csv: is no file"):
        join(JoinConfig(latents=str(place / "latents"), table=str(place / "none.csv")))
    with pytest.raises(RequestError, match=r"^latents=.*: is no latent dataset"):
        join(JoinConfig(latents=str(place), table=str(place / "t.csv")))
    with pytest.raises(RequestError, match=r"^columns=colour: is not in the table, which has label"):
        give(place, "key,label\n00003,1\n", columns=("colour",))


def test_a_plan_writes_nothing_and_counts_what_would_match(place):
    settings = config(place, "key,label\n00003,5\nx,1\n")
    before = sorted((place / "latents").rglob("*"))
    todo = plan(settings)
    assert (todo.matched, todo.unused_rows, todo.table.by) == (1, 1, "key")
    assert sorted((place / "latents").rglob("*")) == before


def test_damaged_columns_are_not_joined(place):
    flip_a_bit(place / "latents" / "columns" / "shard-1.parquet")
    with pytest.raises(ValueError, match=r"shard-1.parquet: does not have the hash"):
        give(place, "key,label\n00003,5\n")


def test_on_an_object_store(place, s3):
    for path in (place / "latents").rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{s3}/join/{path.relative_to(place / 'latents')}", path.read_bytes())
    storage.write_bytes(f"{s3}/join.csv", b"key,label\n00003,5\n")
    generation = join(JoinConfig(latents=f"{s3}/join", table=f"{s3}/join.csv")).generation
    assert read_manifest(f"{s3}/join").generation == generation
    assert read_manifest(f"{s3}/join").conditioning.num_classes == 6
