"""Input tars: what a sample is, and that damage is never taken for the end."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset

from ldm.config import RequestError
from ldm.shards import (
    RawSample,
    ShardReader,
    bytes_per_sample,
    parse_label,
    read_class_names,
    shard_names,
    write_shard,
)
from tests.pictures import samples


def tar(path, members, form=tarfile.GNU_FORMAT, encoding="utf-8"):
    """A tar of (name, data) pairs; data None is a directory."""
    with tarfile.open(path, "w", format=form, encoding=encoding) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.size = len(data or b"")
            out.addfile(info, io.BytesIO(data or b""))
    return str(path)


def read(path):
    return [(sample.key, sample.members) for sample in ShardReader(str(path))]


def test_members_that_share_a_key_are_one_sample(tmp_path):
    path = tar(
        tmp_path / "a.tar",
        [
            ("dir", None),
            ("dir.v1/one.JPG", b"1"),
            ("dir.v1/one.cls", b"3"),
            ("dir.v1/one.seg.png", b"mask"),
            ("one.jpg", b"2"),
            ("two.txt", b" a caption \n"),
            ("README", b"no sample"),
            (".hidden", b"no sample"),
            ("dir/._one.jpg", b"no sample"),
            ("one.jpg", b"again"),
        ],
    )
    found = read(path)
    assert found == [
        ("dir.v1/one", {"jpg": b"1", "cls": b"3", "seg.png": b"mask"}),
        ("one", {"jpg": b"2"}),
        ("two", {"txt": b" a caption \n"}),
        ("one", {"jpg": b"again"}),
    ]
    first, _, third, _ = (RawSample(key, members) for key, members in found)
    assert (first.picture, first.label, first.caption) == (b"1", 3, None)
    assert (third.picture, third.label, third.caption) == (None, None, "a caption")


def test_samples_that_interleave_are_refused(tmp_path):
    """Sorted by extension, say: the captions would be lost, or belong to nobody."""
    members = [("one.jpg", b"1"), ("two.jpg", b"2"), ("one.txt", b"first"), ("two.txt", b"second")]
    with pytest.raises(tarfile.ReadError, match=r"the members of one stand apart \(one\.txt\); write each in a run"):
        read(tar(tmp_path / "a.tar", members))


def test_a_member_that_would_fill_the_memory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.shards.MAX_SAMPLE_BYTES", 10)
    path = tar(tmp_path / "a.tar", [("one.jpg", b"x" * 11), ("one.cls", b"1"), ("two.jpg", b"x" * 10)])
    one, two = ShardReader(path)
    assert one.problem == "has 11 bytes with its .jpg, the limit is 10" and one.members == {"jpg": b"", "cls": b"1"}
    assert two.problem == "" and two.picture == b"x" * 10


def test_labels_and_captions_from_json_fields():
    sample = RawSample("a", {"json": b'{"class": 7, "text": "a pear", "score": 0.5, "flag": true}', "n": b"3"})
    assert (sample.label_from("json.class"), sample.caption_from("json.text")) == (7, "a pear")
    assert (sample.label_from("json.none"), sample.caption_from("json.none"), sample.label_from("n")) == (None, None, 3)
    for field in ("score", "flag", "text"):
        with pytest.raises(ValueError, match=rf"^its json\.{field} is .*, expected a class number"):
            sample.label_from(f"json.{field}")
    with pytest.raises(ValueError, match="expected a text"):
        sample.caption_from("json.score")
    for text in (b"{", b"[1]", b"\xff", b"[" * 100_000):
        with pytest.raises(ValueError, match="^its .json "):
            RawSample("a", {"json": text}).label_from("json.class")


@pytest.mark.parametrize("extension", ["jpg", "avif", "jp2", "jfif"])
def test_the_picture_of_a_sample(extension):
    assert RawSample("one", {"cls": b"1", "seg.png": b"mask", extension: b"picture"}).picture == b"picture"
    assert RawSample("one", {"cls": b"1", f"seg.{extension}": b"mask"}).picture is None


def test_samples_are_those_of_webdataset(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(str(path), samples(5))
    theirs = [
        (s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")})
        for s in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert read(path) == theirs and len(theirs) == 5


def test_a_key_that_follows_itself_is_two_samples(tmp_path):
    path = tar(tmp_path / "a.tar", [("x.jpg", b"1"), ("x.cls", b"0"), ("x.jpg", b"2"), ("x.cls", b"1")])
    assert read(path) == [("x", {"jpg": b"1", "cls": b"0"}), ("x", {"jpg": b"2", "cls": b"1"})]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names(tmp_path, form):
    long = "d" * 90 + "/" + "k" * 60
    path = tar(tmp_path / "a.tar", [(f"{long}.jpg", b"1"), ("größe/日本.jpg", b"2")], form)
    assert [key for key, _ in read(path)] == [long, "größe/日本"]


def test_names_that_are_no_utf8_become_keys_that_are(tmp_path):
    path = tar(tmp_path / "a.tar", [("caf\xe9.jpg", b"1"), ("caf\xe8.jpg", b"2")], encoding="latin-1")
    keys = [key for key, _ in read(path)]
    assert keys == ["caf\\xe9", "caf\\xe8"]


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "²", "1 2", "nan", "1000000", "9" * 30, "9" * 5000])
def test_a_class_that_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match=r"^its \.cls holds .*, expected a class number from 0 to 999999$") as caught:
        parse_label(text.encode())
    assert len(str(caught.value)) < 120


def test_class_numbers():
    assert [parse_label(text) for text in (b"0", b" 7\n", b"042", b"999999")] == [0, 7, 42, 999_999]


def test_all_bytes_are_counted_and_hashed(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(str(path), samples(3))
    path.write_bytes(path.read_bytes() + b"\0" * 30_000)  # padded to a record, as `tar -b` does
    reader = ShardReader(str(path))
    assert reader.sha256 == "" and len(list(reader)) == 3
    assert reader.bytes_read == path.stat().st_size
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_bytes_of_a_sample_are_told_from_the_head(tmp_path, form):
    """Exactly, whatever the headers; damage behind the head is not seen, for nothing behind it is read."""
    members = [(f"größe-{n:03d}.{name}", b"x" * size) for n in range(100) for name, size in (("jpg", 3000), ("cls", 1))]
    path = Path(tar(tmp_path / "a.tar", members, form))
    each = blocks(path)[2 * 64][0] / 64
    assert bytes_per_sample(str(path)) == each == bytes_per_sample(str(path), most=10)
    assert bytes_per_sample(str(path), most=100) == path.stat().st_size / 100
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])
    assert bytes_per_sample(str(path)) == each
    path.write_bytes(data[: len(data) // 2])
    assert bytes_per_sample(str(path)) is None
    assert bytes_per_sample(tar(tmp_path / "b.tar", [("README", b"no sample")])) is None
    assert bytes_per_sample(str(tmp_path / "absent.tar")) is None


def test_tars_one_behind_another_are_read_to_the_end(tmp_path):
    """`cat a.tar b.tar`: tarfile alone would stop at the first end and lose the rest in silence."""
    for name, start in (("a", 0), ("b", 10)):
        write_shard(str(tmp_path / f"{name}.tar"), samples(3, start))
    both = tmp_path / "both.tar"
    both.write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    assert [key for key, _ in read(both)] == ["00000", "00001", "00002", "00010", "00011", "00012"]


def blocks(path):
    """Offsets of (header, end of data) of each member."""
    with tarfile.open(path) as opened:
        return [(m.offset, m.offset_data + -(-m.size // 512) * 512) for m in opened]


def test_a_truncated_tar_raises_wherever_it_is_cut(tmp_path):
    path, cut = tmp_path / "a.tar", tmp_path / "cut.tar"
    write_shard(str(path), samples(4))
    data, places = path.read_bytes(), blocks(path)
    lengths = {place + shift for _, place in places for shift in (-700, -1, 0, 1, 100, 511)}
    lengths |= {header + 512 for header, _ in places} | {1, 511, 512, 513}
    end = places[-1][1]
    for length in sorted(n for n in lengths if 0 < n <= end):
        cut.write_bytes(data[:length])
        with pytest.raises((tarfile.TarError, OSError)):
            read(cut)
    cut.write_bytes(data[: end + 512])  # GNU tar accepts a lone zero block, with a warning
    assert len(read(cut)) == 4


@pytest.mark.parametrize("damage", ["flip", "zeros", "text"])
def test_a_damaged_header_raises_and_is_not_the_end(tmp_path, damage):
    path = tmp_path / "a.tar"
    write_shard(str(path), samples(4))
    data, places = path.read_bytes(), blocks(path)
    for header, end in places:
        broken = bytearray(data)
        if damage == "flip":
            broken[header + 3] ^= 0x10
        elif damage == "zeros":  # a hole, as a failed download leaves it: the header and a part of the data
            broken[header : header + 600] = b"\0" * 600
        else:
            broken[header : header + 512] = b"x" * 512
        path.write_bytes(broken)
        if damage == "zeros" and not data[header + 600 : end].strip(b"\0"):
            continue
        with pytest.raises(tarfile.TarError):
            read(path)


@pytest.mark.parametrize("content", [b"", b"no tar", b"x" * 2000, b"\x1f\x8b" + b"\0" * 600])
def test_what_is_no_tar_raises(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(tarfile.TarError):
        read(path)


def test_an_empty_tar_holds_no_sample(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(str(path), [])
    assert read(path) == []


def test_write_shard_depends_on_the_samples_alone(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard(str(tmp_path / name), samples(3))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert read(tmp_path / "a.tar") == [(s.key, s.members) for s in samples(3)]


def test_names_of_output_shards():
    assert shard_names(["x/a.tar", "s3://b/c.tar"]) == {"a": "x/a.tar", "c": "s3://b/c.tar"}
    with pytest.raises(RequestError, match=r"^source=y/a\.tar: has the same name as x/a\.tar; .*rename one$"):
        shard_names(["x/a.tar", "y/a.tar"])
    with pytest.raises(RequestError, match=r"^source=x/a\.zip: is no \.tar"):
        shard_names(["x/a.zip"])


def test_class_names(tmp_path):
    file = tmp_path / "classes.json"
    for value in (["apple", "pear"], {"1": "pear", "0": "apple"}):
        file.write_text(json.dumps(value))
        assert read_class_names(str(file)) == ("apple", "pear")
    for text in ("{", "3", '"apple"', "[1, 2]", '{"0": "a", "2": "b"}', "\xff"):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(RequestError, match="^class_names=") as caught:
            read_class_names(str(file))
        assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="^class_names=.*cannot be read"):
        read_class_names(str(tmp_path / "absent.json"))


@pytest.mark.real_data
def test_real_shards(shared):
    for folder, name, count in (("grocery", "train-00000.tar", 500), ("emoji", "emoji-00000.tar", 500)):
        reader = ShardReader(str(shared / "data" / folder / name))
        found = list(reader)
        assert len(found) > count - 300 and all(sample.picture for sample in found)
        assert reader.bytes_read == (shared / "data" / folder / name).stat().st_size
