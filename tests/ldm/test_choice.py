"""Which samples are read: conditions on columns, excluded ids, held-out pictures; several data sets; several shapes."""

import numpy as np
import pytest
import torch

from ldm.config import DamagedError, RequestError
from ldm.latents.choice import Choice, choose, parse_condition, read_ids
from ldm.latents.dataset import LatentDataset
from ldm.latents.manifest import commit_generation, fingerprint_hash, read_manifest
from ldm.latents.writer import ShardWriter, sample_id
from tests.pictures import records, some_fingerprint

SCORES = [[1.0, 6.5, None, 9.0, 5.0], [0.5, 7.0, 8.0], [3.0, 4.0, 5.5, 6.0]]
"""aesthetic of the samples of three shards; width is 100 x number, genre of the middle shard is missing."""


@pytest.fixture(scope="module")
def scored(kl, tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp("scored"))
    write_scored(url, kl)
    return url


def write_scored(url: str, kl, names: str = "abc", scores=SCORES) -> None:
    fingerprint, receipts = some_fingerprint(kl, 4), []
    for shard, row in zip(names, scores, strict=False):
        with ShardWriter(url, shard, fingerprint_hash(fingerprint), 4) as writer:
            for number, (score, record) in enumerate(zip(row, records(len(row), seed=ord(shard)), strict=True)):
                genre = {} if shard == "b" else {"genre": ("cat", "dog")[number % 2]}
                writer.add(str(number), record, label=number % 3, width=100 * number, aesthetic=score, **genre)
            receipts.append(writer.commit(len(row), 1, "0"))
    commit_generation(url, receipts, fingerprint, kl.latent_channels, kl.factor)


def names(url: str, where: str) -> set[str]:
    """The samples that fulfil a condition, as in `a1`."""
    data = LatentDataset(url, global_batch_size=1, where=where)
    known = {sample_id(s, str(n)): f"{s}{n}" for s, row in zip("abc", SCORES, strict=True) for n in range(len(row))}
    return {known[identity] for identity in data.all().ids.tolist()}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("aesthetic > 5", "a1 a3 b1 b2 c2 c3"),
        ("aesthetic > 5 and width >= 200", "a3 b2 c2 c3"),
        ("aesthetic<=1 or aesthetic>=9", "a0 a3 b0"),
        ("not aesthetic > 5", "a0 a4 b0 c0 c1"),
        ("4 < aesthetic <= 6", "a4 c2 c3"),
        ("aesthetic is None", "a2"),
        ("aesthetic is not None and width == 0", "a0 b0 c0"),
        ("genre == 'cat'", "a0 a2 a4 c0 c2"),
        ("genre != 'cat'", "a1 a3 c1 c3"),
        ("genre in ['dog', 'cow']", "a1 a3 c1 c3"),
        ("genre not in ['dog']", "a0 a2 a4 c0 c2"),
        ("genre is None", "b0 b1 b2"),
        ("width > aesthetic and label == 1", "a1 a4 b1 c1"),
        ("(width == 100 or width == 200) and -1 < aesthetic", "a1 b1 b2 c1 c2"),
        ("key == '3'", "a3 c3"),
    ],
)
def test_conditions(scored, where, expected):
    assert names(scored, where) == set(expected.split())


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("aesthetic >", "cannot be read; compare columns"),
        ("aesthetic", "does not fit the columns"),
        ("open('x')", r"\"open\('x'\)\" cannot be used here"),
        ("aesthetic + 1 > 3", "'aesthetic \\+ 1' cannot be used here"),
        ("__import__.x > 1", "cannot be used here"),
        ("genre > 5", r"does not fit the columns \(genre: string\)"),
        ("aestetic > 5", "has no column 'aestetic'; did you mean 'aesthetic'\\?"),
        ("aesthetic > 100", "the train split holds no sample"),
        ("(" * 500 + "width", "cannot be read"),
        ("width > 99999999999999999999999", "compare columns"),
    ],
)
def test_conditions_that_cannot_be(scored, where, problem):
    with pytest.raises(RequestError, match=problem) as caught:
        LatentDataset(scored, global_batch_size=1, where=where)
    assert "\n" not in str(caught.value)


def test_a_condition_names_its_columns():
    assert parse_condition("a > 1 and (b in [1] or not c is None)")[1] == {"a", "b", "c"}


def test_what_was_chosen_is_counted_and_hashed(scored):
    manifest, ids = read_manifest(scored), frozenset([sample_id("a", "1"), sample_id("c", "0"), 12345])
    found = choose(manifest, [Choice("aesthetic > 5", ids, 0.5)])[0]
    assert found.left_out["where"] == 6 and found.left_out["exclude"] == 1
    assert found.counts.sum() + sum(found.left_out.values()) == 12
    data = LatentDataset(scored, global_batch_size=2, where="aesthetic > 5", exclude=ids, holdout=0.5)
    assert data.chosen == {"samples": data.num_samples, "hash": found.hash(manifest), "left_out": found.left_out}
    other = LatentDataset(scored, global_batch_size=2, where="aesthetic >= 5.5", exclude=ids, holdout=0.5)
    assert other.chosen["hash"] == found.hash(manifest)  # of the samples, not of the words
    assert LatentDataset(scored, global_batch_size=2, exclude=ids).chosen["hash"] != found.hash(manifest)
    assert LatentDataset(scored, global_batch_size=2).chosen["left_out"] == {}


def test_only_what_is_asked_about_is_read(scored, tmp_path, monkeypatch):
    """A hundred thousand shards open without a look at their columns."""
    monkeypatch.setattr("ldm.latents.choice._read_columns", None)
    assert LatentDataset(scored, global_batch_size=2).num_samples == 12
    with pytest.raises(TypeError):
        LatentDataset(scored, global_batch_size=2, where="width > 0")


def test_chosen_samples_are_the_ones_that_are_read(scored):
    everything = LatentDataset(scored, global_batch_size=12).all()
    by_id = dict(zip(everything.ids.tolist(), everything.moments, strict=True))
    data = LatentDataset(scored, global_batch_size=4, where="aesthetic > 5", captions=True)
    batches = [data.batch(step) for step in range(6)]
    for batch in batches:
        for identity, moments in zip(batch.ids.tolist(), batch.moments, strict=True):
            assert torch.equal(moments, by_id[identity])
        assert batch.captions == (None,) * 4
    epochs = torch.cat([batch.ids for batch in batches]).reshape(-1, 6)
    assert all(len(set(epoch.tolist())) == 6 for epoch in epochs)


def test_captions_go_with_their_samples(written):
    data = LatentDataset(written[0], global_batch_size=5, captions=True)
    ids = {sample_id(s, f"{n:05d}"): f"caption {n}" for s, rows in written[1].items() for n in range(len(rows))}
    for step in range(4):
        batch = data.batch(step)
        assert batch.captions == tuple(ids[identity] for identity in batch.ids.tolist())
        assert batch[1:3].captions == batch.captions[1:3] and len(batch[1:3]) == 2
    assert LatentDataset(written[0], global_batch_size=5).batch(0).captions is None


def test_a_picture_id_excludes_all_its_records(kl, tmp_path):
    url, fingerprint = str(tmp_path), some_fingerprint(kl, 4)
    with ShardWriter(url, "a", fingerprint_hash(fingerprint), 4) as writer:
        for key in "xyz":
            for variant in ("", "flip"):
                writer.add(key, records(1, seed=ord(key))[0], variant=variant, label=None)
        receipts = [writer.commit(3, 1, "0")]
    commit_generation(url, receipts, fingerprint, kl.latent_channels, kl.factor)
    one = LatentDataset(url, global_batch_size=1, exclude=[sample_id("a", "y", "flip")])
    assert one.num_samples == 5
    both = LatentDataset(url, global_batch_size=1, exclude=[sample_id("a", "y")])
    assert both.num_samples == 4 and both.chosen["left_out"] == {"exclude": 2}


def test_lists_of_ids(tmp_path):
    place = tmp_path / "ids.txt"
    place.write_text("12\n\n# taken down in May\n 7 # by its author\n")
    assert read_ids(str(place)) == {7, 12}
    for text, problem in (("12\nx7\n", "line 2 is 'x7'"), ("-3", "line 1"), (str(2**63), "line 1")):
        place.write_text(text)
        with pytest.raises(RequestError, match=problem):
            read_ids(str(place))
    with pytest.raises(RequestError, match=r"exclude=.*does not exist; give a text file of ids"):
        read_ids(str(tmp_path / "none"))


def test_a_damaged_column_file_is_named(kl, tmp_path):
    write_scored(str(tmp_path), kl)
    place = tmp_path / "columns" / "b.parquet"
    data = place.read_bytes()
    place.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedError, match=r"columns/b\.parquet: does not have the hash"):
        LatentDataset(str(tmp_path), global_batch_size=1, where="width > 0")
    place.unlink()
    with pytest.raises(DamagedError, match=r"columns/b\.parquet: is missing"):
        LatentDataset(str(tmp_path), global_batch_size=1, where="width > 0")


@pytest.fixture(scope="module")
def two(kl, tmp_path_factory) -> tuple[str, str]:
    """Two data sets of one fingerprint, of 12 and 40 samples."""
    folder = tmp_path_factory.mktemp("two")
    write_scored(str(folder / "small"), kl)
    write_scored(str(folder / "large"), kl, "xyz", [[1.0] * 20, [1.0] * 7, [1.0] * 13])
    return str(folder / "small"), str(folder / "large")


def shards_of(two, batch, data: LatentDataset) -> np.ndarray:
    """Which of the two data sets each sample is of."""
    small = {sample_id(s, str(n)) for s in "abc" for n in range(5)}
    return np.array([0 if identity in small else 1 for identity in batch.ids.tolist()])


@pytest.mark.parametrize("batch_size", [1, 8, 10, 64])
def test_weights_hold_in_every_stretch(two, batch_size):
    data = LatentDataset(two, global_batch_size=batch_size, weights=(3, 1), seed=1)
    of = np.concatenate([shards_of(two, data.batch(step), data) for step in range(-(-1000 // batch_size))])
    share = np.cumsum(of == 0) / np.arange(1, len(of) + 1)
    assert abs(share[200:] - 0.75).max() < 0.08 and share[-1] == pytest.approx(0.75, abs=0.01)
    if batch_size == 64:
        assert ((of.reshape(-1, 64) == 0).sum(1) == 48).all()


def test_mixed_data_sets_run_through_their_own_epochs(two):
    data = LatentDataset(two, global_batch_size=8, seed=1)
    batches = [data.batch(step) for step in range(60)]
    ids, epochs = (torch.cat([getattr(b, name) for b in batches]) for name in ("ids", "epochs"))
    of = np.concatenate([shards_of(two, batch, data) for batch in batches])
    for number, size in ((0, 12), (1, 40)):
        its, its_epochs = ids[of == number], epochs[of == number]
        assert len(its) == pytest.approx(480 * size / 52, abs=9)
        for epoch in range(int(its_epochs.max()) - 1):  # a lane may be a row ahead of the others
            assert len(set(its[its_epochs == epoch].tolist())) == size == int((its_epochs == epoch).sum())
    assert data.num_samples == 52 and data.chosen["hash"].count("+") == 1
    # The statistics are those of the mixture.
    means = np.array([LatentDataset(url, global_batch_size=1).statistics.mean for url in two])
    assert data.statistics.mean == pytest.approx((12 * means[0] + 40 * means[1]) / 52)


def test_data_sets_that_do_not_go_together(two, kl, tmp_path):
    url, fingerprint = str(tmp_path), some_fingerprint(kl, 8)
    with ShardWriter(url, "a", fingerprint_hash(fingerprint), 4) as writer:
        writer.add("x", records(1)[0], label=None)
        receipts = [writer.commit(1, 1, "0")]
    commit_generation(url, receipts, fingerprint, kl.latent_channels, kl.factor)
    with pytest.raises(RequestError, match=r"does not go with .*num_classes: 3 != 0.*pictures\.size: 4 != 8"):
        LatentDataset([two[0], url], global_batch_size=1)
    for weights in ((1,), (1, 0), (1, -1), (1, 1, 1), (1, float("inf"))):
        with pytest.raises(RequestError, match="weights="):
            LatentDataset(two, global_batch_size=1, weights=weights)


@pytest.fixture(scope="module")
def shaped(kl, tmp_path_factory) -> str:
    """Records of three shapes: 30, 9 and 4 of them."""
    url, fingerprint = str(tmp_path_factory.mktemp("shaped")), some_fingerprint(kl, 4)
    receipts = []
    for shard, counts in (("a", (20, 5, 4)), ("b", (10, 4, 0))):
        with ShardWriter(url, shard, fingerprint_hash(fingerprint), 4, many_shapes=True) as writer:
            number = 0
            for count, cells in zip(counts, ((2, 2), (2, 3), (4, 1)), strict=True):
                for record in records(count, shape=(8, *cells)):
                    writer.add(str(number), record, label=None)
                    number += 1
            receipts.append(writer.commit(number, 1, "0"))
    commit_generation(url, receipts, fingerprint, kl.latent_channels, kl.factor)
    return url


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_one_shape_in_a_batch_and_every_sample_in_its_turn(shaped, batch_size):
    data = LatentDataset(shaped, global_batch_size=batch_size, seed=1)
    assert data.num_samples == 43 and len(data.record_shapes) == 3
    batches = [data.batch(step) for step in range(10 * 43 // batch_size)]
    seen: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for batch in batches:
        seen.setdefault(tuple(batch.moments.shape[1:]), []).append(batch.ids)
    for shape, size in (((8, 2, 2), 30), ((8, 2, 3), 9), ((8, 4, 1), 4)):
        ids = torch.cat(seen[shape])
        assert len(ids) == pytest.approx(10 * size, abs=2 * batch_size + 1)
        for epoch in range(len(ids) // size):
            assert len(set(ids[epoch * size : (epoch + 1) * size].tolist())) == size
    with pytest.raises(RequestError, match="holds the shapes"):
        _ = data.latent_shape


def test_what_is_excluded_later_moves_nothing_else(shaped, two):
    """Neither the turns of the shapes nor those of the data sets."""
    for url, batch_size in ((shaped, 2), (two, 8)):
        before = LatentDataset(url, global_batch_size=batch_size, seed=1)
        step = before.num_samples // batch_size // 3
        gone = before.batch(step).ids[:1].tolist()
        after = LatentDataset(url, global_batch_size=batch_size, seed=1, exclude={step: gone})
        moved = 0
        for number in range(2 * step):  # within the first epoch
            old, new = before.batch(number), after.batch(number)
            assert old.moments.shape == new.moments.shape
            changed = (old.ids != new.ids).numpy()
            assert set(old.ids[changed].tolist()) <= set(gone) and not (number < step and changed.any())
            moved += int(changed.sum())
        assert moved == 1
    with pytest.raises(RequestError, match=r"exclude: leaves no record of the shape \(8, 4, 1\)"):
        LatentDataset(shaped, global_batch_size=1, exclude={7: [sample_id("a", str(n)) for n in range(25, 29)]})


def test_what_cannot_be_asked(scored, two):
    for options, problem in (
        ({"exclude": [2**63]}, "exclude: holds 9223372036854775808, which is no id"),
        ({"global_batch_size": 0}, "global_batch_size=0: give at least 1"),
        ({"weights": [1, 2]}, r"weights=\[1, 2\]: give one above 0 for each of the 1 data sets"),
        ({"generation": ["a", "b"]}, "the run began with 2 data sets; give these, in order"),
    ):
        with pytest.raises(RequestError, match=problem):
            LatentDataset(scored, **{"global_batch_size": 4, **options})
    data = LatentDataset(scored, global_batch_size=4)
    for rank, world in ((0, 3), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(RequestError, match="give the ranks of a world that divides the batch of 4"):
            data.batch(0, rank, world)


def test_columns_are_read_once_for_all_lists(scored, monkeypatch):
    from ldm.latents import choice

    reads, real = [], choice._read_columns
    monkeypatch.setattr(choice, "_read_columns", lambda *arguments: reads.append(1) or real(*arguments))
    LatentDataset(scored, global_batch_size=1, exclude={step: [step] for step in range(20)})
    assert len(reads) == 3
