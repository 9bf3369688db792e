"""Checkpoints of facebookresearch/DiT against a straight implementation of that model, after its published code."""

import argparse
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.config import RequestError
from ldm.diffusion import DiffusionConfig
from ldm.exchange import ImportConfig, ImportReport, import_model
from ldm.exchange.original import _ratio
from ldm.latents.manifest import Conditioning
from ldm.latents.receipt import Statistics
from ldm.sampling import SampleConfig, sample
from ldm.snapshot import Snapshot, read_snapshot

HIDDEN, HEADS, DEPTH, PATCH, SIZE, CLASSES = 32, 2, 2, 2, 4, 10


def checkpoint(outputs: int = 8, seed: int = 0, hidden_size: int = HIDDEN) -> dict[str, Tensor]:
    """Random weights by the names of that model; `outputs` channels, 8 with a learned sigma."""
    d, generator = hidden_size, torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (d, 4, PATCH, PATCH),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.2.weight": (d, d),
        "y_embedder.embedding_table.weight": (CLASSES + 1, d),
        "final_layer.linear.weight": (PATCH * PATCH * outputs, d),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
    }
    for i in range(DEPTH):
        shapes |= {
            f"blocks.{i}.attn.qkv.weight": (3 * d, d),
            f"blocks.{i}.attn.proj.weight": (d, d),
            f"blocks.{i}.mlp.fc1.weight": (4 * d, d),
            f"blocks.{i}.mlp.fc2.weight": (d, 4 * d),
            f"blocks.{i}.adaLN_modulation.1.weight": (6 * d, d),
        }
    for name in [name for name in shapes if "embedding_table" not in name]:
        shapes[name.replace(".weight", ".bias")] = shapes[name][:1]
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights | {"pos_embed": sine_cosine(d)}


def sine_cosine(d: int) -> Tensor:
    """pos_embed (1, T, d): of each patch the sines and cosines of its column, then of its row."""
    omega = 10000.0 ** -(np.arange(d // 4) / (d // 4))
    rows = [
        [wave for place in (column, row) for wave in (*np.sin(place * omega), *np.cos(place * omega))]
        for row in range(SIZE // PATCH)
        for column in range(SIZE // PATCH)
    ]
    return torch.tensor(np.array(rows), dtype=torch.float32)[None]


def original_dit(w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """x (N, 4, SIZE, SIZE), t, y (N,) => (N, outputs, SIZE, SIZE)."""

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(value: Tensor) -> Tensor:
        return F.layer_norm(value, (HIDDEN,), eps=1e-6)

    tokens = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH)
    tokens = tokens.flatten(2).transpose(1, 2) + w["pos_embed"]
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t[:, None].float() * frequencies[None]
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
    condition = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))
    condition = F.silu(condition + w["y_embedder.embedding_table.weight"][y])
    for i in range(DEPTH):
        parts = linear(f"blocks.{i}.adaLN_modulation.1", condition)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        q, k, v = linear(f"blocks.{i}.attn.qkv", norm(tokens) * (1 + scale1) + shift1).chunk(3, dim=-1)
        heads = []
        for head in range(HEADS):
            own = slice(head * HIDDEN // HEADS, (head + 1) * HIDDEN // HEADS)
            scores = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(HIDDEN // HEADS)
            heads.append(scores.softmax(dim=-1) @ v[..., own])
        tokens = tokens + gate1 * linear(f"blocks.{i}.attn.proj", torch.cat(heads, dim=-1))
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(tokens) * (1 + scale2) + shift2)
        tokens = tokens + gate2 * linear(f"blocks.{i}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", condition)[:, None].chunk(2, dim=-1)
    patches = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)
    side = SIZE // PATCH
    patches = patches.reshape(len(x), side, side, PATCH, PATCH, -1)
    return torch.einsum("nhwpqc->nchpwq", patches).reshape(len(x), -1, SIZE, SIZE)


def imported(file: Path, vae: Path, **options: Any) -> tuple[Snapshot, ImportReport]:
    output = file.parent / "imported"
    options = {"num_heads": HEADS, "autoencoder": str(vae), **options}
    report = import_model(ImportConfig(source=str(file), output=str(output), **options))
    return read_snapshot(str(output)), report


@pytest.mark.parametrize("outputs", [4, 8])
def test_it_answers_as_the_original(kl_folder, tmp_path, outputs):
    weights = checkpoint(outputs)
    torch.save(weights, tmp_path / "DiT.pt")
    found, report = imported(tmp_path / "DiT.pt", kl_folder)
    x = torch.randn(4, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    t, y = torch.tensor([0, 1, 500, 999]), torch.tensor([0, 3, 9, 10])
    expected = original_dit(weights, x, t, y)
    assert expected.shape[1] == outputs and expected.std() > 0.1
    with torch.no_grad():
        answer = found.load_denoiser()(x, t, y)
    torch.testing.assert_close(answer, expected[:, :4], rtol=0, atol=1e-5 * expected.abs().max().item())
    assert found.conditioning == Conditioning("class", CLASSES)
    assert found.diffusion_config == DiffusionConfig()
    assert found.statistics == Statistics((0.0,) * 4, (1 / 0.18215,) * 4)
    assert found.denoiser["learned_sigma"] == (outputs == 8)
    assert any("uses the epsilon half" in note for note in report.notes) == (outputs == 8)


def test_it_samples(kl_folder, tmp_path):
    torch.save(checkpoint(), tmp_path / "DiT.pt")
    names = tmp_path / "names.json"
    names.write_text(str([f"class {i}" for i in range(CLASSES)]).replace("'", '"'))
    found, _ = imported(tmp_path / "DiT.pt", kl_folder, class_names=str(names))
    assert found.conditioning.names[3] == "class 3"
    settings = {"num_images": 2, "num_inference_steps": 4, "guidance_scale": 2.0, "batch_size": 2}
    sample(SampleConfig(snapshot=found.url, output=str(tmp_path), labels=("class 3", "4"), **settings))
    picture = np.asarray(Image.open(tmp_path / "000000.png"))
    assert picture.shape == (8, 8, 3) and picture.std() > 1


def test_what_its_train_script_writes(kl_folder, tmp_path):
    """{model, ema, opt, args}: the EMA is taken; args is a plain namespace, the only object let through."""
    model, ema = checkpoint(seed=1), checkpoint(seed=2)
    arguments = argparse.Namespace(model="DiT-S/2", epochs=1400, global_batch_size=256)
    torch.save({"model": model, "ema": ema, "opt": {"state": {}}, "args": arguments}, tmp_path / "0050000.pt")
    found, report = imported(tmp_path / "0050000.pt", kl_folder)
    table = found.load_denoiser().get_parameter("label_embedding.weight")
    assert torch.equal(table, ema["y_embedder.embedding_table.weight"])
    assert "the checkpoint's EMA weights are taken" in report.notes


class Trap:
    """What a hostile pickle does: calls a function when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (Trap(), {}, "holds objects that are no weights, and running what a file says is refused"),
        ({"x_embedder.proj.weight": 3}, {}, "holds no table of weights by name"),
        ({}, {}, "holds no x_embedder.proj.weight of 4 dimensions; it is no DiT checkpoint"),
        (torch.zeros(3), {}, "holds no table of weights by name"),
        ({**checkpoint(), "pos_embed": torch.randn(1, 4, HIDDEN)}, {}, "pos_embed that is not the fixed sine-cosine"),
        (
            {**checkpoint(), "blocks.0.attn.q_norm.weight": torch.ones(16)},
            {},
            "tensors that no DiT has .blocks.0.attn",
        ),
        ({**checkpoint(), "blocks.1.mlp.fc2.bias": torch.zeros(3)}, {}, "holds blocks.1.mlp.2.bias of shape"),
        ({**checkpoint(), "blocks.1.mlp.fc2.bias": torch.full((HIDDEN,), torch.inf)}, {}, "not finite"),
        (checkpoint(), {"num_heads": 5}, "^num_heads=5: does not divide hidden_size=32"),
    ],
)
def test_what_cannot_be_read_is_one_line(kl_folder, tmp_path, monkeypatch, content, options, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "DiT.pt")
    with pytest.raises(RequestError, match=message) as caught:
        imported(tmp_path / "DiT.pt", kl_folder, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert not (tmp_path / "executed").exists() and not (tmp_path / "imported").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"a": 1}, protocol=2)])
def test_files_that_are_no_checkpoint(kl_folder, tmp_path, content):
    (tmp_path / "DiT.pt").write_bytes(content)
    with pytest.raises(RequestError, match="^from=") as caught:
        imported(tmp_path / "DiT.pt", kl_folder)
    assert "\n" not in str(caught.value)


def test_what_the_file_does_not_say_is_asked_for(kl_folder, tmp_path):
    torch.save(checkpoint(), tmp_path / "DiT.pt")
    with pytest.raises(RequestError, match="^autoencoder: missing; a .pt has none"):
        imported(tmp_path / "DiT.pt", kl_folder, autoencoder=None)
    with pytest.raises(RequestError, match="^num_heads: missing; a DiT of width 32 is none of the published ones"):
        imported(tmp_path / "DiT.pt", kl_folder, num_heads=None)
    with pytest.raises(RequestError, match="^from=absent.pt: is not there"):
        import_model(ImportConfig(source="absent.pt", output=str(tmp_path / "x"), autoencoder=str(kl_folder)))


def test_every_width_of_an_mlp_is_that_of_its_ratio():
    for hidden_size in range(8, 200, 4):
        for width in range(1, 6 * hidden_size):
            assert int(hidden_size * _ratio(width, hidden_size)) == width
