"""A snapshot as a folder that diffusers' `DiTPipeline.from_pretrained` loads.

OUTPUT/model_index.json   the pipeline, and the names of the classes; written last
       transformer/       DiTTransformer2DModel: the weights, bit for bit
       scheduler/         DDIMScheduler with our schedule
       vae/               the autoencoder, with the normalisation of the latents in it
       ldm.json           what diffusers has no place for, so that an import gives the snapshot's denoiser again
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ldm import storage
from ldm.config import Config, Location, RequestError, validate
from ldm.denoiser import DenoiserConfig
from ldm.dit import DiTConfig, TimestepEmbedding
from ldm.exchange import classes
from ldm.exchange.first_stage import check_class, normalized
from ldm.exchange.layouts import CLASSES, diffusers_layout, repeat_embeddings, to_theirs
from ldm.exchange.schedule import to_scheduler
from ldm.exchange.side_file import SIDE_FILE, SideFile
from ldm.latents.cache import hash_file
from ldm.latents.manifest import Conditioning
from ldm.snapshot import Snapshot, read_snapshot

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
ONLY_OURS = ("mlp_ratio", "mlp", "norm", "qk_norm", "positions")
"""Options of our DiT that DiTTransformer2DModel does not have; their defaults are what it has."""


class ExportConfig(Config):
    """Writes a snapshot as a folder of diffusers."""

    snapshot: Location = Field(description="what `ldm train` wrote, or `ldm convert from=…`")
    to: Literal["diffusers"] = Field(description="diffusers: a folder for DiTPipeline.from_pretrained")
    output: Location = Field(description="directory or URL of the folder; empty or new")


@dataclass(frozen=True)
class ExportReport:
    """notes: what the folder does otherwise than the snapshot, a line each; none where it is exact."""

    output: str
    parameters: int
    notes: tuple[str, ...]


def export(config: ExportConfig) -> ExportReport:
    """Writes the folder. Raises RequestError where diffusers has no such model."""
    import diffusers

    snapshot = check(config)
    dit = validate(DenoiserConfig, snapshot.denoiser)
    weights = snapshot.load_denoiser().state_dict()
    diffusers.utils.logging.set_verbosity_error()
    with torch.device("meta"):
        transformer = diffusers.DiTTransformer2DModel(**_transformer_config(dit, snapshot))
    table = classes.to_pipeline(weights.get(f"{CLASSES}.weight"), dit.hidden_size)
    theirs = to_theirs({**weights, f"{CLASSES}.weight": table}, diffusers_layout(dit.depth), dit.patch_size)
    transformer.load_state_dict(repeat_embeddings(theirs, dit.depth), assign=True)
    scheduler = diffusers.DDIMScheduler(**to_scheduler(snapshot.diffusion_config))
    vae = normalized(snapshot.load_autoencoder(), snapshot.statistics)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        diffusers.DiTPipeline(transformer, vae, scheduler).save_pretrained(folder, safe_serialization=True)
        _add_names(folder / "model_index.json", snapshot.conditioning)
        (folder / SIDE_FILE).write_text(_side_file(snapshot, hash_file(folder / WEIGHTS)).model_dump_json(indent=1))
        files = [path for path in folder.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.name == "model_index.json", path)):
            storage.commit_file(path, storage.join(config.output, *path.relative_to(folder).parts))
    return ExportReport(config.output, sum(w.numel() for w in weights.values()), _notes(dit, snapshot, weights))


def check(config: ExportConfig) -> Snapshot:
    """Checks the request without loading weights. Raises RequestError."""
    storage.check_writable("output", config.output)
    if storage.list_dir(config.output):
        raise RequestError(f"output={config.output}: holds something already; give an empty or new folder")
    snapshot = read_snapshot(config.snapshot)
    if snapshot.denoiser["type"] != "dit":
        raise RequestError(
            f"to=diffusers: writes a DiT, but {config.snapshot} holds denoiser.type={snapshot.denoiser['type']}"
        )
    dit = validate(DenoiserConfig, snapshot.denoiser)
    for name in ONLY_OURS:
        if getattr(dit, name) != DiTConfig.model_fields[name].default:
            raise RequestError(
                f"to=diffusers: its DiT has no denoiser.{name}={getattr(dit, name)}, "
                f"only {DiTConfig.model_fields[name].default}; {config.snapshot} cannot be written as one"
            )
    _, height, width = snapshot.latent_shape
    if height != width:
        raise RequestError(f"to=diffusers: its DiT is square, the latents of {config.snapshot} are {height}x{width}")
    to_scheduler(snapshot.diffusion_config)
    check_class(snapshot.fingerprint["autoencoder"]["class"], snapshot.statistics)
    return snapshot


def _transformer_config(dit: DenoiserConfig, snapshot: Snapshot) -> dict[str, Any]:
    channels, size, _ = snapshot.latent_shape
    return {
        "num_attention_heads": dit.num_heads,
        "attention_head_dim": dit.hidden_size // dit.num_heads,
        "in_channels": channels,
        "out_channels": 2 * channels if dit.learned_sigma else channels,
        "num_layers": dit.depth,
        "sample_size": size,
        "patch_size": dit.patch_size,
        "num_embeds_ada_norm": max(classes.NULL, snapshot.conditioning.num_classes),
        "norm_eps": dit.mlp_norm_eps,
    }


def _add_names(file: Path, conditioning: Conditioning) -> None:
    """`id2label`, by which `pipeline.get_label_ids` finds a class. A comma there separates synonyms."""
    values = json.loads(file.read_text())
    values["id2label"] = {str(classes.pipeline_label(i)): name for i, name in enumerate(conditioning.names)} or None
    file.write_text(json.dumps(values, indent=2))


def _side_file(snapshot: Snapshot, weights_sha256: str) -> SideFile:
    return SideFile(
        weights_sha256=weights_sha256,
        denoiser=validate(DenoiserConfig, snapshot.denoiser),
        diffusion=snapshot.diffusion_config,
        conditioning=snapshot.conditioning,
        pictures=snapshot.fingerprint["pictures"],
        step=snapshot.step,
        images_seen=snapshot.images_seen,
    )


def _notes(dit: DenoiserConfig, snapshot: Snapshot, weights: dict[str, Tensor]) -> tuple[str, ...]:
    notes = []
    if dit.timestep_frequencies == "paper":
        deviation = _timestep_deviation(dit, weights, snapshot.diffusion_config.num_train_timesteps)
        notes.append(
            "not exact: diffusers spaces the frequencies of the timestep by 1/127, this model by 1/128, and weights "
            f"cannot make up for it; the embedding of the timestep is off by {deviation:.0%} of its deviation. For an "
            "exact export train, or fine-tune with init_from=, with denoiser.timestep_frequencies=diffusers"
        )
    if snapshot.conditioning.num_classes > classes.NULL:
        notes.append(f"the null class of DiTPipeline is {classes.NULL}: classes from there on have their number plus 1")
    return tuple(notes)


@torch.no_grad()
def _timestep_deviation(dit: DenoiserConfig, weights: dict[str, Tensor], steps: int) -> float:
    """Of the timesteps' embeddings (steps, D): root mean square of the change over that about the mean."""
    prefix = "timestep_embedding."
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    answers = []
    for frequencies in ("paper", "diffusers"):
        embedding = TimestepEmbedding(dit.hidden_size, frequencies=frequencies)
        embedding.load_state_dict(own)
        answers.append(embedding(torch.arange(steps)))
    ours, theirs = answers
    return float((theirs - ours).norm() / (ours - ours.mean(dim=0)).norm())
