"""What cannot be exported or imported is one line; what is read otherwise than written is said."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DiTTransformer2DModel

from ldm.autoencoder import load_autoencoder
from ldm.config import RequestError
from ldm.diffusion import DiffusionConfig
from ldm.dit import position_embedding
from ldm.exchange import ExportConfig, ImportConfig, export, import_model
from ldm.latents.manifest import Conditioning
from ldm.latents.receipt import Statistics
from ldm.snapshot import read_snapshot
from tests.ldm.exchanging import WEIGHTS, edit, exported, imported, inputs, replace_weights, their_folder, write
from tests.pictures import kl_model, some_fingerprint


@pytest.fixture
def snapshot(kl, kl_folder, tmp_path) -> str:
    return write(tmp_path / "snapshot", kl, str(kl_folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "to=diffusers: its DiT has no denoiser.qk_norm=True, only False"),
        ({"positions": "rotary"}, "to=diffusers: its DiT has no denoiser.positions=rotary, only sincos"),
        ({"mlp_ratio": 2.0}, "to=diffusers: its DiT has no denoiser.mlp_ratio=2.0, only 4.0"),
        ({"type": "unet"}, "to=diffusers: writes a DiT, but .* holds denoiser.type=unet"),
    ],
)
def test_what_diffusers_has_no_model_for(snapshot, changes, message):
    edit(Path(snapshot) / "snapshot.json", denoiser={**read_snapshot(snapshot).denoiser, **changes})
    with pytest.raises(RequestError, match=f"^{message}"):
        export(ExportConfig(snapshot=snapshot, to="diffusers", output=snapshot + "-x"))
    assert not Path(snapshot + "-x").exists()


def test_flows_and_pixels_have_no_pipeline_there(kl, kl_folder, tmp_path):
    url = write(tmp_path / "flow", kl, str(kl_folder), diffusion_config=DiffusionConfig(schedule="flow"))
    with pytest.raises(RequestError, match="its DDIMScheduler cannot sample prediction_type=velocity, only epsilon"):
        exported(url)
    pixels = load_autoencoder("identity")
    pixels.save(str(tmp_path / "identity"))
    options = {"latent_shape": (3, 4, 4), "fingerprint": some_fingerprint(pixels, 4)}
    even = Statistics((0.0,) * 3, (1.0,) * 3)
    url = write(tmp_path / "pixels", pixels, str(tmp_path / "identity"), statistics=even, **options)
    with pytest.raises(RequestError, match="an IdentityAutoencoder has no layer .* only an AutoencoderKL"):
        exported(url)


def test_latents_that_are_not_square(kl, kl_folder, tmp_path):
    url = write(tmp_path / "wide", kl, str(kl_folder), latent_shape=(4, 4, 8))
    with pytest.raises(RequestError, match="its DiT is square, the latents of .* are 4x8"):
        exported(url)


def test_nothing_is_overwritten(snapshot):
    folder = exported(snapshot)
    with pytest.raises(RequestError, match=f"^output={folder}: holds something already"):
        exported(snapshot)
    with pytest.raises(RequestError, match=f"^output={snapshot}: holds something already"):
        import_model(ImportConfig(source=str(folder), output=snapshot))


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


CLASS_TABLE = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
DAMAGES: dict[str, tuple[Any, str]] = {
    "another pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="LDMPipeline"),
        "model_index.json is of class LDMPipeline, expected DiTPipeline",
    ),
    "no JSON": (lambda f: (f / "transformer/config.json").write_text("{"), "config.json cannot be read as JSON"),
    "another transformer": (
        lambda f: edit(f / "transformer/config.json", _class_name="PixArtTransformer2DModel"),
        "transformer/config.json is of class PixArtTransformer2DModel, expected DiTTransformer2DModel",
    ),
    "another function": (
        lambda f: edit(f / "transformer/config.json", activation_fn="geglu"),
        "transformer/config.json: activation_fn=geglu: input should be 'gelu-approximate'",
    ),
    "another size": (
        lambda f: edit(f / "transformer/config.json", num_layers=3),
        "holds no transformer_blocks.2.attn1.to_q.weight, as a DiT has",
    ),
    "fewer blocks": (
        lambda f: edit(f / "transformer/config.json", num_layers=1),
        "holds tensors that no DiT has",
    ),
    "a patch that is not": (
        lambda f: edit(f / "transformer/config.json", patch_size=4),
        "holds final.linear.bias of shape .16., expected .64.: weights of another model",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "only weights in one file are loaded"),
    "a cut file": (_cut, "safetensors cannot be read"),
    "embeddings of its own": (
        lambda f: replace_weights(f, lambda w: w[CLASS_TABLE].add_(1)),
        "a DiT has one embedding of timestep and class for all blocks",
    ),
    "not finite": (
        lambda f: replace_weights(f, lambda w: w["proj_out_2.bias"].fill_(float("nan"))),
        "holds final.linear.bias with values that are not finite",
    ),
    "no numbers": (
        lambda f: replace_weights(f, lambda w: w.update({"proj_out_2.bias": w["proj_out_2.bias"].int()})),
        "holds proj_out_2.bias as torch.int32",
    ),
    "a size beyond reason": (
        lambda f: edit(f / "transformer/config.json", num_layers=10**9),
        "num_layers=1000000000: input should be less than or equal to 1024",
    ),
    "a factor of 0": (
        lambda f: edit(f / "vae/config.json", scaling_factor=0),
        "its autoencoder's scaling_factor=0: must be above 0",
    ),
    "an unknown schedule": (
        lambda f: edit(f / "scheduler/scheduler_config.json", beta_schedule="sigmoid"),
        "scheduler/scheduler_config.json: beta_schedule=sigmoid",
    ),
    "a flow": (
        lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
        "_class_name=FlowMatchEulerDiscreteScheduler: is no diffusion with betas that is read; DDIMScheduler, ",
    ),
    "a flow by its sigmas": (
        lambda f: edit(
            f / "scheduler/scheduler_config.json", _class_name="DPMSolverMultistepScheduler", use_flow_sigmas=True
        ),
        "scheduler/scheduler_config.json: use_flow_sigmas=true: is of a flow",
    ),
    "betas one by one": (
        lambda f: edit(f / "scheduler/scheduler_config.json", trained_betas=[0.1] * 1000),
        "trained_betas: gives betas one by one",
    ),
    "no autoencoder": (lambda f: shutil.rmtree(f / "vae"), "vae/: holds no config.json"),
    "another autoencoder": (
        lambda f: kl_model(latent_channels=8).save_pretrained(f / "vae"),
        "is of latents of 4 channels, but the autoencoder has 8",
    ),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    return their_folder(tmp_path_factory.mktemp("theirs") / "folder", kl_model(), num_embeds_ada_norm=5)


@pytest.mark.parametrize("case", DAMAGES)
def test_what_cannot_be_read_is_one_line(theirs, tmp_path, case):
    damage, message = DAMAGES[case]
    folder = Path(shutil.copytree(theirs, tmp_path / "folder"))
    damage(folder)
    with pytest.raises(RequestError, match=message) as caught:
        imported(folder)
    assert str(caught.value).startswith(f"from={folder}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not (tmp_path / "imported").exists()


def test_any_number_of_classes_of_theirs(theirs, tmp_path):
    folder = Path(shutil.copytree(theirs, tmp_path / "folder"))
    edit(folder / "model_index.json", id2label={str(i): f"class {i}" for i in range(5)})
    found, _ = imported(folder)
    assert found.conditioning == Conditioning("class", 5, tuple(f"class {i}" for i in range(5)))
    table = found.load_denoiser().get_parameter("label_embedding.weight")
    assert torch.equal(table, safetensors.torch.load_file(folder / WEIGHTS)[CLASS_TABLE])


def test_a_folder_as_it_was_published_years_ago(theirs, tmp_path, kl_folder):
    """Another class name, keys that are gone, weights as torch.save wrote them, the positions among them."""
    folder = Path(shutil.copytree(theirs, tmp_path / "folder"))
    expected, _ = imported(theirs, output=tmp_path / "expected")
    legacy = {"double_self_attention": False, "num_vector_embeds": None, "use_linear_projection": False}
    edit(folder / "transformer/config.json", _class_name="Transformer2DModel", **legacy)
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    weights["pos_embed.pos_embed"] = position_embedding(32, (2, 2))[None]
    pickled = folder / WEIGHTS.replace(".safetensors", ".bin")
    torch.save(weights, pickled)
    (folder / WEIGHTS).unlink()
    shutil.rmtree(folder / "vae")
    with pytest.raises(RequestError, match="vae/: holds no config.json; .*; or give autoencoder=$"):
        imported(folder)
    found, _ = imported(folder, autoencoder=str(kl_folder))
    assert found.weights_sha256 == expected.weights_sha256
    torch.save({**weights, "pos_embed.pos_embed": torch.zeros(1, 4, 32)}, pickled)
    with pytest.raises(RequestError, match="a pos_embed.pos_embed that is not the fixed sine-cosine one"):
        imported(folder, output=tmp_path / "x", autoencoder=str(kl_folder))
    torch.save({"a": 1}, pickled)
    with pytest.raises(RequestError, match=r"diffusion_pytorch_model\.bin holds no table of weights by name"):
        imported(folder, output=tmp_path / "x", autoencoder=str(kl_folder))


def test_half_precision_is_widened_and_said(theirs, tmp_path):
    folder = Path(shutil.copytree(theirs, tmp_path / "folder"))
    replace_weights(folder, lambda w: w.update({key: value.half() for key, value in w.items()}))
    found, report = imported(folder)
    assert {w.dtype for w in found.load_denoiser().state_dict().values()} == {torch.float32}
    assert "its weights are not all fp32; from here on they are" in report.notes


def test_weights_put_in_an_export_are_read_as_of_theirs(snapshot, kl):
    """After a fine-tune in diffusers, ldm.json is of weights that are gone: so are the frequencies it speaks of."""
    folder = exported(snapshot)
    replace_weights(folder, lambda w: w["proj_out_2.bias"].add_(1))
    edit(folder / "ldm.json", denoiser={"timestep_frequencies": "paper"})
    found, report = imported(folder)
    assert found.denoiser["timestep_frequencies"] == "diffusers"
    assert found.conditioning == Conditioning("class", 3, ("apple", "pear", "plum"))  # the rest repeats the null class
    assert any(note.startswith("ldm.json is of other weights") for note in report.notes)


def _tune_null(weights: dict[str, torch.Tensor]) -> None:
    for name in weights:
        if name.endswith("embedding_table.weight"):
            weights[name][1000].add_(1)


def test_a_null_class_that_was_tuned_there_leaves_the_padding_behind(snapshot):
    folder = exported(snapshot)
    replace_weights(folder, _tune_null)
    found, _ = imported(folder)
    assert found.conditioning == Conditioning("class", 3, ("apple", "pear", "plum"))
    models = (read_snapshot(snapshot).load_denoiser(), found.load_denoiser())
    before, after = (model.get_parameter("label_embedding.weight") for model in models)
    assert torch.equal(after[:3], before[:3])
    assert torch.equal(after[3], before[3] + 1)


def test_of_more_than_1000_tuned_classes_the_null_class_is_not_guessed(kl, kl_folder, tmp_path):
    folder = exported(write(tmp_path / "snapshot", kl, str(kl_folder), conditioning=Conditioning("class", 1003)))
    replace_weights(folder, _tune_null)
    with pytest.raises(RequestError, match=r"ldm.json is of other weights, and of 1003 classes: which row is the null"):
        imported(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"conditioning": {"type": "class", "num_classes": "many"}},
        {"conditioning": {"type": "class", "num_classes": -5}},
        {"conditioning": {"type": "class", "num_classes": 3, "names": ["one"]}},
        {"pictures": {"size": 8}},
        {"diffusion": {"schedule": "sigmoid"}},
        {"step": -1},
        {"more": 1},
        {"version": 2},
    ],
    ids=str,
)
def test_a_damaged_side_file_is_one_line(snapshot, changes):
    folder = exported(snapshot)
    edit(folder / "ldm.json", **changes)
    with pytest.raises(RequestError, match=rf"^from=.*: ldm\.json: {next(iter(changes))}") as caught:
        imported(folder)
    assert "\n" not in str(caught.value)


def test_an_inexact_export_says_so(snapshot):
    edit(
        Path(snapshot) / "snapshot.json", denoiser={**read_snapshot(snapshot).denoiser, "timestep_frequencies": "paper"}
    )
    report = export(ExportConfig(snapshot=snapshot, to="diffusers", output=snapshot + "-x"))
    (note,) = report.notes
    assert note.startswith("not exact: ") and "denoiser.timestep_frequencies=diffusers" in note
    x, t, labels = inputs(3)
    theirs = DiTTransformer2DModel.from_pretrained(Path(snapshot + "-x") / "transformer")
    with torch.no_grad():
        expected = read_snapshot(snapshot).load_denoiser()(x, t, labels)
        found = theirs(x, timestep=t, class_labels=labels).sample
    assert (found - expected).abs().max() > 0.01


def test_at_urls(kl, kl_folder, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    url = write(tmp_path / "snapshot", kl, str(kl_folder))
    export(ExportConfig(snapshot=url, to="diffusers", output=f"{s3}/theirs"))
    import_model(ImportConfig(source=f"{s3}/theirs", output=f"{s3}/again"))
    assert read_snapshot(f"{s3}/again").weights_sha256 == read_snapshot(url).weights_sha256
