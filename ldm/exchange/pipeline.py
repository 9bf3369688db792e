"""diffusers' DiTPipeline folders: those of others, and those that `export` wrote."""

import json
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from ldm import storage
from ldm.autoencoder import FILES, is_name
from ldm.config import C, Config, RequestError, validate
from ldm.denoiser import DenoiserConfig
from ldm.diffusion import DiffusionConfig
from ldm.exchange import classes
from ldm.exchange.export import WEIGHTS
from ldm.exchange.foreign import ForeignModel
from ldm.exchange.layouts import CLASSES, diffusers_layout, drop_positions, drop_repeated_embeddings, to_ours
from ldm.exchange.original import load_weights_only, state_dict
from ldm.exchange.schedule import from_scheduler
from ldm.exchange.side_file import SIDE_FILE, SideFile
from ldm.latents.cache import hash_file
from ldm.latents.manifest import Conditioning

INDEX, TRANSFORMER, SCHEDULER = "model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"
NAMES = (INDEX, TRANSFORMER, WEIGHTS, SCHEDULER, *(f"vae/{name}" for name in FILES), SIDE_FILE)
PICKLED = WEIGHTS.replace(".safetensors", ".bin")  # as older folders have it; torch reads it weights-only
CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second: published before the first was


POSITIONS = "pos_embed.pos_embed"  # computed; some older files hold it


class TransformerConfig(Config):
    """What of a transformer/config.json decides the function; a value that our DiT does not have is refused."""

    model_config = ConfigDict(extra="ignore")

    num_attention_heads: int = Field(16, ge=1, le=1024, description="heads")
    attention_head_dim: int = Field(72, ge=1, le=1024, description="width of a head")
    in_channels: int = Field(4, ge=1, description="C")
    out_channels: int | None = Field(None, ge=1, description="C, or 2C with a learned sigma")
    num_layers: int = Field(28, ge=1, le=1024, description="blocks")
    sample_size: int = Field(32, ge=1, le=1024, description="side of the latents")
    patch_size: int = Field(2, ge=1, description="latent pixels")
    norm_eps: float = Field(1e-5, gt=0, description="of the norm before the MLP")
    norm_type: Literal["ada_norm_zero"] = Field("ada_norm_zero", description="adaLN-zero")
    activation_fn: Literal["gelu-approximate"] = Field("gelu-approximate", description="of the MLP")
    attention_bias: Literal[True] = Field(True, description="of queries, keys and values")
    norm_elementwise_affine: Literal[False] = Field(False, description="norms have no weights")


def fetch_pipeline(source: str, temporary: Path) -> Path:
    """The local folder of a path, URL or hub id. Raises RequestError where there is none."""
    if storage.exists(storage.join(source, INDEX)):
        if storage.is_local(source):
            return storage.local_path(source)
        for name in (*NAMES, PICKLED):
            if name == PICKLED and (temporary / WEIGHTS).exists():
                continue
            if storage.exists(url := storage.join(source, name)):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                storage.fetch(url, temporary / name)
        return temporary
    if "/" not in source or not is_name(source):
        raise RequestError(f"holds no {INDEX}; give a folder of diffusers' DiTPipeline, its hub id, or a .pt file")
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=list(NAMES)))
        if not (folder / WEIGHTS).exists():
            huggingface_hub.snapshot_download(source, allow_patterns=[PICKLED])
        return folder
    except (OSError, ValueError) as error:
        text = str(error).splitlines()[0][:160]
        raise RequestError(f"is no local folder and cannot be loaded from the hub ({text})") from None


def read_pipeline(folder: Path) -> ForeignModel:
    """The model of a DiTPipeline folder, but for its autoencoder. Raises RequestError, without the folder's name."""
    index = _read_json(folder, INDEX, "DiTPipeline")
    config = _validate(TransformerConfig, _read_json(folder, TRANSFORMER, *CLASS_NAMES), TRANSFORMER)
    theirs = _read_weights(folder)
    if POSITIONS in theirs:
        drop_positions(theirs, POSITIONS, config.num_attention_heads * config.attention_head_dim)
    weights = to_ours(drop_repeated_embeddings(theirs, config.num_layers), diffusers_layout(config.num_layers))
    denoiser = _denoiser_values(config)
    latent_shape = (config.in_channels, config.sample_size, config.sample_size)
    notes = []
    if any(tensor.dtype != torch.float32 for tensor in theirs.values()):
        notes.append("its weights are not all fp32; from here on they are")
    side = _read_side(folder, notes)
    table = weights.pop(f"{CLASSES}.weight")
    if side is not None:
        own_table = classes.from_pipeline(table, side.conditioning.num_classes)
        return ForeignModel(
            weights if own_table is None else {**weights, f"{CLASSES}.weight": own_table},
            _validate(DenoiserConfig, denoiser | side.denoiser.model_dump(include=_FROM_SIDE), TRANSFORMER),
            side.diffusion,
            side.conditioning,
            latent_shape,
            notes,
            side.pictures,
            side.step,
            side.images_seen,
        )
    num_classes = classes.count_classes(table)
    notes.append(f"{len(table)} rows of classes are {num_classes} and the null class")
    return ForeignModel(
        {**weights, f"{CLASSES}.weight": torch.cat([table[:num_classes], table[-1:]])},
        _validate(DenoiserConfig, {**denoiser, "timestep_frequencies": "diffusers"}, TRANSFORMER),
        _read_diffusion(folder),
        Conditioning("class", num_classes, _class_names(index, num_classes)),
        latent_shape,
        notes,
    )


_FROM_SIDE = {"timestep_frequencies", "label_dropout"}
"""What neither transformer/config.json nor the weights say."""


def _denoiser_values(config: TransformerConfig) -> dict[str, Any]:
    outputs = config.in_channels if config.out_channels is None else config.out_channels
    if outputs not in (config.in_channels, 2 * config.in_channels):
        raise RequestError(
            f"{TRANSFORMER}: out_channels={outputs}: must be in_channels={config.in_channels} or twice it"
        )
    return {
        "hidden_size": config.num_attention_heads * config.attention_head_dim,
        "depth": config.num_layers,
        "num_heads": config.num_attention_heads,
        "patch_size": config.patch_size,
        "learned_sigma": outputs == 2 * config.in_channels,
        "mlp_norm_eps": config.norm_eps,
    }


def _read_diffusion(folder: Path) -> DiffusionConfig:
    values = _read_json(folder, SCHEDULER)
    try:
        return from_scheduler(values)
    except RequestError as error:
        raise RequestError(f"{SCHEDULER}: {error}") from None


def _read_side(folder: Path, notes: list[str]) -> SideFile | None:
    """What `export` wrote beside, if it did and the weights are still those."""
    if not (folder / SIDE_FILE).exists() or not (folder / WEIGHTS).exists():
        return None
    side = _validate(SideFile, _read_json(folder, SIDE_FILE), SIDE_FILE)
    if side.weights_sha256 == hash_file(folder / WEIGHTS):
        return side
    if (count := side.conditioning.num_classes) > classes.NULL:
        raise RequestError(
            f"{SIDE_FILE} is of other weights, and of {count} classes: which row is the null class, {classes.NULL} "
            "or the last, is not known; give the folder as it was exported"
        )
    notes.append(f"{SIDE_FILE} is of other weights and not used: the folder is read as one of diffusers' own")
    return None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).exists():
        if not (folder / PICKLED).exists():
            raise RequestError(f"holds no {WEIGHTS}; only weights in one file are loaded")
        try:
            return state_dict(load_weights_only(folder / PICKLED))
        except RequestError as error:
            raise RequestError(f"{PICKLED} {error}") from None
    try:
        return safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise RequestError(f"{WEIGHTS} cannot be read ({' '.join(str(error).split())[:120]})") from None


def _read_json(folder: Path, name: str, *class_names: str) -> dict[str, Any]:
    """A JSON object; with class_names only one whose `_class_name` is among them."""
    try:
        values = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"{name} cannot be read as JSON ({type(error).__name__})") from None
    if not isinstance(values, dict):
        raise RequestError(f"{name} holds no object")
    if class_names and values.get("_class_name") not in class_names:
        raise RequestError(f"{name} is of class {values.get('_class_name')}, expected {class_names[0]}")
    return values


def _validate(model: type[C], values: dict[str, Any], name: str) -> C:
    try:
        return validate(model, values)
    except RequestError as error:
        raise RequestError(f"{name}: {str(error)[:200]}") from None


def _class_names(index: dict[str, Any], num_classes: int) -> tuple[str, ...]:
    """`id2label`, if it names each class."""
    names = index.get("id2label")
    found = [names.get(str(i)) for i in range(num_classes)] if isinstance(names, dict) else []
    known = tuple(name for name in found if isinstance(name, str))
    return known if len(known) == num_classes else ()
