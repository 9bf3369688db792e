"""What there is to encode: shards in tars, and a folder of pictures cut into shards."""

import uuid
from pathlib import Path

import pytest

from ldm import sources, storage
from ldm.config import RequestError
from ldm.sources import find_shards, reader_of
from tests.pictures import encoded, image_shard, picture, samples

FILES = {
    "apple/a.png": encoded(picture(0)),
    "apple/a.txt": b"an apple",
    "apple/b.JPG": encoded(picture(1), "JPEG"),
    "apple/red/c.webp": encoded(picture(2), "WEBP"),
    "pear/d.png": encoded(picture(3)),
    "pear/d.cls": b"7",
    "pear/d.json": b'{"width": 3}',
    "pear/notes.pdf": b"of no use",
    ".thumbs/x.bin": b"of no use",
}


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    place = str(tmp_path / "in") if request.param == "local" else f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"
    for name, data in FILES.items():
        storage.write_bytes(f"{place}/{name}", data)
    return place


def test_a_folder_of_pictures(folder):
    """The class is the first sub-folder, a .cls of its own goes before it; other files are left out."""
    shards, classes = find_shards(folder)
    assert classes == ("apple", "pear")
    assert list(shards) == ["apple-00000", "apple.red-00000", "pear-00000"]
    found = {name: list(shard.reader()) for name, shard in shards.items()}
    assert {name: [sample.key for sample in content] for name, content in found.items()} == {
        "apple-00000": ["apple/a", "apple/b"],
        "apple.red-00000": ["apple/red/c"],
        "pear-00000": ["pear/d"],
    }
    assert [sample.label for content in found.values() for sample in content] == [0, 0, 0, 7]
    first = found["apple-00000"][0]
    assert (first.picture, first.caption) == (FILES["apple/a.png"], "an apple")
    assert found["pear-00000"][0].fields() == {"width": 3}
    assert [s.key for s in reader_of(folder, "apple-00000")] == ["apple/a", "apple/b"]
    with pytest.raises(RequestError, match="holds no shard plum-00000 any more$"):
        reader_of(folder, "plum-00000")


def test_a_folder_is_cut_into_shards_by_its_names_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SAMPLES_IN_A_FOLDER_SHARD", 3)
    for number in range(7):
        storage.write_bytes(f"{tmp_path}/in/{number}.png", FILES["apple/a.png"])
        storage.write_bytes(f"{tmp_path}/in/{number}.txt", b"text")
    shards, classes = find_shards(f"{tmp_path}/in")
    assert classes == () and [len(list(shard.reader())) for shard in shards.values()] == [3, 3, 1]
    assert list(shards) == ["in-00000", "in-00001", "in-00002"]
    assert [sample.label for sample in shards["in-00000"].reader()] == [None] * 3
    before = {name: shard.etag for name, shard in shards.items()}
    storage.write_bytes(f"{tmp_path}/in/6.png", FILES["pear/d.png"] + b"x")
    after = {name: shard.etag for name, shard in find_shards(f"{tmp_path}/in")[0].items()}
    assert [name for name in before if before[name] != after[name]] == ["in-00002"]


def test_a_folder_that_changes_while_it_is_read_is_no_shard(tmp_path):
    storage.write_bytes(f"{tmp_path}/in/a.png", FILES["apple/a.png"])
    (shard,) = find_shards(f"{tmp_path}/in")[0].values()
    storage.write_bytes(f"{tmp_path}/in/a.png", FILES["apple/a.png"] + b"x")
    with pytest.raises(OSError, match="its files changed while they were read"):
        list(shard.reader())


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    storage.write_bytes(f"{tmp_path}/far/a.png", FILES["apple/a.png"])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "apple").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "far")
    shards, classes = find_shards(f"{tmp_path}/in")
    assert classes == ("apple",) and [s.key for s in shards["apple-00000"].reader()] == ["apple/a"]


def test_samples_of_a_folder_are_those_of_their_names(tmp_path):
    """However the names of folders and files sort among each other; dots do not cut a key short."""
    names = ["1.jpg", "cats/2.jpg", "cats/more/3.jpg", "cats/z.jpg", "zebra.jpg"]
    names += ["photo.jpg", "photo.orig.jpg", "photo.txt", "twice.JPG", "twice.jpg"]
    for name in names:
        storage.write_bytes(f"{tmp_path}/in/{name}", b"text" if name.endswith("txt") else encoded(picture(1), "JPEG"))
    shards, _ = find_shards(f"{tmp_path}/in")
    found = {name: [(s.key, sorted(s.members)) for s in shard.reader()] for name, shard in shards.items()}
    jpg, labelled = ["jpg"], ["cls", "jpg"]
    assert found == {
        "in-00000": [
            ("1", jpg),
            ("photo", ["jpg", "txt"]),
            ("photo%2Eorig", jpg),
            ("twice", jpg),
            ("twice", jpg),
            ("zebra", jpg),
        ],
        "cats-00000": [("cats/2", labelled), ("cats/z", labelled)],
        "cats.more-00000": [("cats/more/3", labelled)],
    }


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_folder_of_tars_is_its_tars(tmp_path, slash):
    for name in ("b", "a"):
        image_shard(tmp_path / f"{name}.tar", samples(1))
    (tmp_path / "classes.json").write_text("[]")
    assert find_shards(f"{tmp_path}{slash}") == find_shards(f"{tmp_path}/*.tar")
    (tmp_path / "c.png").write_bytes(encoded(picture(0, 8, 8)))
    with pytest.raises(RequestError, match=rf"^source={tmp_path}{slash}: holds tars and pictures; give {tmp_path}/\*"):
        find_shards(f"{tmp_path}{slash}")


def test_what_is_no_source(tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(RequestError, match=r"bare: is a folder without pictures and without tars; give one that"):
        find_shards(f"{tmp_path}/bare")
    image_shard(tmp_path / "one" / "a.tar", samples(1))
    image_shard(tmp_path / "two" / "a.tar", samples(1))
    with pytest.raises(RequestError, match=r"two/a\.tar: has the same name as .*one/a\.tar \(a\)"):
        find_shards(f"{tmp_path}/*/a.tar")
    Path(tmp_path / "words.csv").write_text("x")
    with pytest.raises(RequestError, match=r"words\.csv: is no \.tar; give WebDataset tars"):
        find_shards(f"{tmp_path}/words.csv")


def test_a_list_of_urls(tmp_path):
    image_shard(tmp_path / "in" / "a.tar", samples(1))
    image_shard(tmp_path / "in" / "b.tar", samples(1))
    (tmp_path / "list.txt").write_text(f"# shards\nin/b.tar\n{tmp_path}/in/a.tar\n")
    shards, _ = find_shards(f"{tmp_path}/list.txt")
    assert [shard.url for shard in shards.values()] == [f"{tmp_path}/in/a.tar", f"{tmp_path}/in/b.tar"]
    assert all(shard.bytes == Path(shard.url).stat().st_size for shard in shards.values())
