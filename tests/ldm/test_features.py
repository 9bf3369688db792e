"""Networks of the user's own: what is taken, what is refused in one line, and that a picture's row is its own."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm import features, metrics
from ldm.config import RequestError
from ldm.drawing import resolve_device
from ldm.features import VaeFeatures, load_extractor
from tests.ldm.extractors import Faulty, InceptionLike, Means, write_exported, write_script

PICTURES = torch.randint(0, 256, (21, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def refused(path, says, shape=(16, 16)):
    with pytest.raises(RequestError, match=says) as caught:
        load_extractor(str(path), shape)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    return write_script(Means(), tmp_path_factory.mktemp("script") / "means.pt")


def test_a_script_and_a_program_give_what_the_module_gives(script, tmp_path):
    expected = Means()(PICTURES)[0]
    for path in (script, write_exported(Means(), tmp_path / "my means!.pt2", (4, 3, 16, 16))):
        extractor = load_extractor(str(path), (16, 16))
        assert torch.allclose(extractor.features(PICTURES), expected, atol=1e-4)
        assert extractor.log_probabilities(PICTURES) is None and not extractor.is_inception
    assert extractor.name.startswith("my_means_-") and len(extractor.name.rpartition("-")[2]) == 12
    assert extractor.batch_size == 32  # its batch is free


def test_a_program_of_one_batch_size_is_fed_that(tmp_path):
    path = write_exported(Means(), tmp_path / "fixed.pt2", (8, 3, 16, 16), free_batch=False)
    extractor = load_extractor(str(path), (16, 16))
    assert extractor.batch_size == 8
    assert torch.allclose(extractor.features(PICTURES), Means()(PICTURES)[0], atol=1e-4)
    refused(
        path,
        r"^features=.*fixed\.pt2: takes uint8 \(8, 3, 16, 16\); the pictures are uint8 \(N, 3, 32, 32\)$",
        (32, 32),
    )


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_it_reaches_another_process(suffix, tmp_path):
    """As Ray sends it; its file may be gone, or another one, by then."""
    path = tmp_path / f"means{suffix}"
    if suffix == ".pt":
        write_script(Means(), path)
    else:
        write_exported(Means(), path, (8, 3, 16, 16), free_batch=False)
    sent = load_extractor(str(path), (16, 16), batch_size=8)
    expected = sent.features(PICTURES)
    sent.device = "cuda"  # of the sender, which may have a GPU where the worker has none
    path.unlink()
    found = pickle.loads(pickle.dumps(sent))
    assert (found.name, found.batch_size, found.is_inception) == (sent.name, 8, False)
    assert found.device == resolve_device("auto")
    assert torch.allclose(found.features(PICTURES), expected, atol=1e-4)


def test_the_name_is_the_bytes(script, tmp_path):
    other = Means()
    nn.init.constant_(other.mix.weight, 0.5)
    renamed = write_script(other, tmp_path / "means.pt")
    one, two = (load_extractor(str(path), (16, 16)).name for path in (script, renamed))
    assert one != two and one.split("-")[0] == two.split("-")[0] == "means"


def test_a_row_depends_neither_on_its_neighbours_nor_on_their_number(script, kl):
    for network in (load_extractor(str(script), (16, 16)), VaeFeatures(kl)):
        whole = network.features(PICTURES)
        assert torch.equal(network.features(PICTURES[5:6]), whole[5:6])
        assert torch.equal(network.features(PICTURES.flip(0)).flip(0), whole)


def test_only_the_last_batch_is_copied_to_be_padded():
    seen = []

    def network(batch):
        seen.append(batch)
        return batch.flatten(1).float()

    assert torch.equal(features.in_fixed_batches(network, PICTURES, 8), PICTURES.flatten(1).float())
    assert [len(batch) for batch in seen] == [8, 8, 8] and not seen[2][5:].any()
    places = [PICTURES[first].data_ptr() for first in (0, 8, 16)]
    assert [batch.data_ptr() == place for batch, place in zip(seen, places, strict=True)] == [True, True, False]


def test_figures_do_not_depend_on_the_batch_size(script, kl):
    real = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    networks = {
        "script": [load_extractor(str(script), (16, 16), batch_size=size) for size in (1, 8, 32)],
        "vae": [VaeFeatures(kl, batch_size=size) for size in (1, 8, 32)],
    }
    for found in networks.values():
        drawn, train = zip(*[(n.features(PICTURES), n.features(real)) for n in found], strict=True)
        for measure in (metrics.frechet_distance, metrics.kernel_distance):
            figures = [measure(a, b) for a, b in zip(drawn, train, strict=True)]
            assert figures == pytest.approx([figures[0]] * 3, rel=1e-4)


def test_from_an_object_store(script, s3):
    from ldm import storage

    storage.write_bytes(f"{s3}/networks/means.pt", script.read_bytes())
    remote = load_extractor(f"{s3}/networks/means.pt", (16, 16))
    assert remote.name == load_extractor(str(script), (16, 16)).name


def test_inception_is_known_by_its_bytes_and_called_as_its_authors_call_it(tmp_path, monkeypatch):
    path = write_script(InceptionLike(), tmp_path / "whatever.pt")
    from ldm.latents.cache import hash_file

    assert not load_extractor(str(path), (16, 16)).is_inception
    monkeypatch.setattr(features, "INCEPTION_SHA256", hash_file(path))
    extractor = load_extractor(str(path), (16, 16))
    assert extractor.is_inception and extractor.name.startswith("inception-")
    assert torch.equal(extractor.features(PICTURES), InceptionLike()(PICTURES, return_features=True))
    expected = InceptionLike()(PICTURES, no_output_bias=True).log()
    found = extractor.log_probabilities(PICTURES)
    assert found is not None and torch.allclose(found, expected)


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_under_another_name_is_never_unpickled(tmp_path):
    mark = tmp_path / "it ran"
    for suffix in (".pt", ".ts", ".pt2"):
        plain, zipped, model = (tmp_path / f"{name}{suffix}" for name in ("plain", "zipped", "model"))
        plain.write_bytes(pickle.dumps(Bomb(mark)))
        torch.save(Bomb(mark), zipped)
        with zipfile.ZipFile(model, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Bomb(mark)))
            archive.writestr("archive/version", "3")
        for path in (plain, zipped, model):
            refused(path, r"^features=.*: is no (TorchScript module|torch\.export program)")
    assert not mark.exists()


def test_files_that_are_no_networks_are_refused_in_one_line(tmp_path, script):
    refused(tmp_path / "none.pt", r"^features=.*none\.pt: is not there")
    refused("inception", r"^features=inception: is none; give classifier, vae, or a file of TorchScript")
    refused(tmp_path / "weights.safetensors", "is none; give classifier, vae, or a file")
    cut = tmp_path / "cut.pt"
    cut.write_bytes(script.read_bytes()[:1000])
    refused(cut, r"^features=.*cut\.pt: is no TorchScript module \(")
    (tmp_path / "empty.pt2").touch()
    refused(tmp_path / "empty.pt2", r"is no torch\.export program of one input \(")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("shape", r"gives float32 \(32, 3, 2\) for 32 pictures; expected features \(N, D\), floats"),
        ("rows", r"gives float32 \(1, 3\) for 32 pictures"),
        ("integers", r"gives int64 \(32, 3\) for 32 pictures"),
        ("nan", "gives features that are not finite"),
        ("raises", r"fails at uint8 \(32, 3, 16, 16\) \(.*no such thing"),
    ],
)
def test_networks_that_answer_wrongly_are_refused_in_one_line(tmp_path, fault, says):
    refused(write_script(Faulty(fault), tmp_path / "faulty.pt"), rf"^features=.*faulty\.pt: {says}")


def test_a_program_of_other_inputs_is_refused(tmp_path):
    class Floats(nn.Module):
        def forward(self, x):
            return x.flatten(1) * 2

    program = torch.export.export(Floats(), (torch.zeros(2, 3, 16, 16),))
    torch.export.save(program, tmp_path / "floats.pt2")
    refused(tmp_path / "floats.pt2", r"takes float32 \(2, 3, 16, 16\); the pictures are uint8")
