"""Classes by number or name, and whether a model can be guided by them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.config import RequestError
from ldm.latents.manifest import Conditioning
from ldm.snapshot import Snapshot


def resolve_labels(
    labels: Sequence[str] | None, conditioning: Conditioning, count: int, first: int = 0
) -> Tensor | None:
    """Class numbers or names, taken in turn, of `count` pictures from number `first` => int64 (count,).

    None for an unconditional model. Raises RequestError.
    """
    if conditioning.type == "none":
        if labels:
            raise RequestError(f"labels={','.join(labels)}: the model is unconditional; leave it out")
        return None
    numbers = range(conditioning.num_classes) if not labels else [_class_number(x, conditioning) for x in labels]
    return torch.tensor([numbers[i % len(numbers)] for i in range(first, first + count)], dtype=torch.int64)


def check_guidance(guidance_scale: float, snapshot: Snapshot) -> None:
    """Raises RequestError where the model cannot be guided."""
    if guidance_scale == 1:
        return
    if snapshot.conditioning.type == "none":
        raise RequestError(f"guidance_scale={guidance_scale}: the model is unconditional; must be 1")
    if snapshot.denoiser.get("label_dropout") == 0:
        raise RequestError(
            f"guidance_scale={guidance_scale}: the model was trained without the null class "
            "(denoiser.label_dropout=0); must be 1"
        )


def _class_number(label: str, conditioning: Conditioning) -> int:
    if label in conditioning.names:
        return conditioning.names.index(label)
    if label.isdecimal() and int(label) < conditioning.num_classes:
        return int(label)
    known = f"0 to {conditioning.num_classes - 1}" + (
        f", or {', '.join(conditioning.names)}"[:200] if conditioning.names else ""
    )
    raise RequestError(f"labels={label}: is no class of this model; give {known}")
