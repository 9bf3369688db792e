"""The weights that a run begins with when it begins from a snapshot (`init_from=`): also with other classes, another
latent size or another head, each said in a line."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import RequestError, differences, validate
from ldm.denoiser import BUILT_IN, DenoiserConfig
from ldm.diffusion import CONVENTIONAL_BETAS, DiffusionConfig
from ldm.dit import DiTConfig
from ldm.snapshot import Snapshot
from ldm.unet import UNetConfig

MEANT = ("timestep_frequencies", "mlp_norm_eps")
"""What of a DiT may change: its weights keep their shapes, and training can make up for it."""

BETAS = ("beta_start", "beta_end")
PROCESS = ("schedule", "num_train_timesteps", "zero_terminal_snr", *BETAS, "prediction_type")
"""What of a diffusion the denoiser's answers depend on; the rest is how it is trained and sampled."""

_ARCHITECTURE = {"dit": tuple(key for key in DiTConfig.model_fields if key != "learned_sigma"), "unet": ("unet",)}
"""What the shapes and the meaning of the other weights depend on."""
_CLASSES = {"dit": "label_embedding.weight", "unet": "unet.class_embedding.weight"}
_TIME_BIAS = {"dit": "timestep_embedding.out.bias", "unet": "unet.time_embedding.linear_2.bias"}


def check_fit(
    snapshot: Snapshot,
    config: DenoiserConfig,
    diffusion: DiffusionConfig,
    latent_shape: tuple[int, ...],
    num_classes: int,
) -> tuple[str, ...]:
    """What changes on the way from a snapshot to this denoiser, a line each.

    Raises RequestError, with what differs, where the weights do not fit.
    """
    found, asked = _with_defaults(snapshot.denoiser), config.model_dump(mode="json")
    built_in = asked["type"] in BUILT_IN
    if found["type"] == "custom" and not built_in:
        found["type"] = asked["type"]  # a snapshot never names the class
    keys = _ARCHITECTURE.get(asked["type"], ("options",)) if found["type"] == asked["type"] else ()
    keys = ("type", *(key for key in keys if key not in MEANT))

    def fixed(denoiser: dict[str, Any], shape: tuple[int, ...], classes: int) -> dict[str, Any]:
        # The weights of ours depend on neither the size of the latents nor, but for one table, the classes.
        latents = {"latent_channels": shape[0]} if built_in else {"latent_shape": list(shape), "num_classes": classes}
        return {key: denoiser[key] for key in keys} | latents

    was = fixed(found, snapshot.latent_shape, snapshot.conditioning.num_classes)
    if lines := differences(was, fixed(asked, latent_shape, num_classes)):
        raise RequestError(f"init_from={snapshot.url}: does not fit this run ({'; '.join(lines)})")
    return (*_diffusion_notes(snapshot, diffusion), *_notes(snapshot, found, asked, latent_shape, num_classes))


def initial_weights(snapshot: Snapshot, config: DenoiserConfig, fresh: nn.Module) -> dict[str, Tensor]:
    """The snapshot's weights in the shapes of `fresh`, a denoiser of this config, whose own fill what is new."""
    weights = dict(snapshot.load_denoiser(denoiser_type=config.type).state_dict())
    expected = fresh.state_dict()
    if config.type in BUILT_IN:
        _resize_classes(weights, expected, _CLASSES[config.type], _TIME_BIAS[config.type])
    if config.type == "dit":
        pixels = config.patch_size**2
        for name in ("final.linear.weight", "final.linear.bias"):
            weights[name] = _resize_head(weights[name], torch.zeros_like(expected[name]), pixels)
    return weights


def _resize_classes(weights: dict[str, Tensor], fresh: dict[str, Tensor], table: str, time_bias: str) -> None:
    """Rows are kept where both have the class; the null class is the last of both. In place."""
    old, new = weights.pop(table, None), fresh.get(table)
    if new is None:
        if old is not None:  # unconditional is the null class, which is added to each timestep
            weights[time_bias] = weights[time_bias] + old[-1]
        return
    weights[table] = new.clone()
    if old is not None:
        kept = min(len(old), len(new)) - 1
        weights[table][:kept], weights[table][-1] = old[:kept], old[-1]


def _resize_head(old: Tensor, new: Tensor, pixels: int) -> Tensor:
    """(pixels * C or 2C, …): of each pixel the channels that both have, the rest as in `new`. Returns `new`."""
    source, target = old.unflatten(0, (pixels, -1)), new.unflatten(0, (pixels, -1))
    channels = min(source.shape[1], target.shape[1])
    target[:, :channels] = source[:, :channels]
    return new


def _with_defaults(denoiser: dict[str, Any]) -> dict[str, Any]:
    """Of a snapshot, which may be older than an option."""
    defaults = DenoiserConfig().model_dump(mode="json")
    unet = validate(UNetConfig, denoiser.get("unet", {})).model_dump(mode="json")
    return defaults | denoiser | {"unet": unet}


def _diffusion_notes(snapshot: Snapshot, diffusion: DiffusionConfig) -> Iterator[str]:
    found, asked = _resolved(snapshot.diffusion_config), _resolved(diffusion)
    for key, was in found.items():
        if was == asked[key] or (key in BETAS and snapshot.diffusion_config.schedule != diffusion.schedule):
            continue
        rest = ": training has to make up for it" if key in PROCESS else ""
        yield f"diffusion.{key} was {was} and is {asked[key]}{rest}"


def _resolved(diffusion: DiffusionConfig) -> dict[str, Any]:
    """Its values, with the schedule's own betas where none are given."""
    usual = dict(zip(BETAS, CONVENTIONAL_BETAS.get(diffusion.schedule, (None, None)), strict=True))
    values = diffusion.model_dump(mode="json")
    return values | {key: values[key] or beta for key, beta in usual.items()}


def _notes(
    snapshot: Snapshot, found: dict[str, Any], asked: dict[str, Any], latent_shape: tuple[int, ...], num_classes: int
) -> Iterator[str]:
    if asked["type"] == "dit":
        for key in MEANT:
            if found[key] != asked[key]:
                yield f"{key} was {found[key]} and is {asked[key]}: training has to make up for it"
        if found["learned_sigma"]:
            fate = "kept as it is, neither used nor trained" if asked["learned_sigma"] else "dropped"
            yield f"the learned sigma of its head is {fate}"
        elif asked["learned_sigma"]:
            yield "a learned sigma is added to its head, as zeros, neither used nor trained"
    if tuple(snapshot.latent_shape) != tuple(latent_shape):
        was, now = ("x".join(map(str, shape[1:])) for shape in (snapshot.latent_shape, latent_shape))
        positions = f"; the {asked['positions']} positions are computed anew" if asked["type"] == "dit" else ""
        yield f"latents of {was} become {now}{positions}"
    if snapshot.conditioning.num_classes != num_classes:
        yield _class_note(snapshot.conditioning.num_classes, num_classes)


def _class_note(was: int, now: int) -> str:
    if now == 0:
        return f"{was} classes become none: the null class is what is left"
    if was == 0:
        return f"no classes become {now}: their {now} rows and the null class are fresh"
    kept, fresh = min(was, now), max(0, now - was)
    rest = f", {fresh} rows are fresh" if fresh else ""
    return f"{was} classes become {now}: the rows of classes 0 to {kept - 1} and of the null class are kept{rest}"
