"""A snapshot as an MLflow model: what `mlflow.pyfunc.load_model` calls. Its code is that of this package.

model = mlflow.pyfunc.load_model("models:/ldm@champion")
pictures = model.predict({"seed": [0, 1], "label": [3, 5], "num_inference_steps": [20, 20]})
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ldm.config import RequestError, validate
from ldm.drawing import PictureSampler, load_sampler
from ldm.plan import SamplerConfig
from ldm.sampling import SampleConfig, check_guidance
from ldm.snapshot import Snapshot, read_snapshot

BATCH_SIZE: int = SampleConfig.model_fields["batch_size"].default
"""Rows of each call of the denoiser: those of `ldm sample`, whose pictures these are to the bit."""


class Pictures:
    """A snapshot that draws."""

    def __init__(self, snapshot: Snapshot, sampler: PictureSampler) -> None:
        self.snapshot, self.sampler = snapshot, sampler

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> npt.NDArray[np.uint8]:
        """Columns seed, label (of a model with classes) and num_inference_steps (optional) => uint8 (N, H, W, 3).

        params: other keys of `SamplerConfig`, for all rows. Raises RequestError for settings that cannot work.
        """
        seeds = _whole_numbers(model_input, "seed")
        labels = _whole_numbers(model_input, "label") if self.snapshot.conditioning.type == "class" else None
        self._check(seeds, labels)
        check_guidance((params or {}).get("guidance_scale", 1.0), self.snapshot)
        default: int = SamplerConfig.model_fields["num_inference_steps"].default
        steps = torch.full_like(seeds, default)
        if "num_inference_steps" in model_input:
            steps = _whole_numbers(model_input, "num_inference_steps")
        pictures = torch.empty((len(seeds), 3, *self.snapshot.picture_shape()), dtype=torch.uint8)
        for number in steps.unique().tolist():
            rows = torch.nonzero(steps == number)[:, 0]
            settings = validate(SamplerConfig, {**(params or {}), "num_inference_steps": number})
            pictures[rows] = self.sampler.draw(None if labels is None else labels[rows], seeds[rows], settings)
        return pictures.permute(0, 2, 3, 1).contiguous().numpy()

    def _check(self, seeds: torch.Tensor, labels: torch.Tensor | None) -> None:
        if (wrong := seeds[(seeds < 0) | (seeds > 2**53 - 1)]).numel():
            raise RequestError(f"seed={wrong[0]}: must be from 0 to 2**53 - 1")
        classes = self.snapshot.conditioning.num_classes
        if labels is not None and (wrong := labels[(labels < 0) | (labels >= classes)]).numel():
            raise RequestError(f"label={wrong[0]}: is no class of this model; give 0 to {classes - 1}")


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Pictures:
    """model_config: `device` and `denoiser_type`, as of `ldm sample`."""
    options = model_config or {}
    sampler = load_sampler(path, BATCH_SIZE, options.get("device") or "auto", options.get("denoiser_type"))
    return Pictures(read_snapshot(path), sampler)


def _whole_numbers(columns: Any, name: str) -> torch.Tensor:
    """A column of a table or dict => int64 (N,)."""
    if name not in columns:
        raise RequestError(f"{name}: is missing; give a column of whole numbers")
    values = np.atleast_1d(np.asarray(columns[name]))
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise RequestError(f"{name}: is {values.dtype} {values.shape}; must be a column of whole numbers")
    return torch.from_numpy(values.astype(np.int64))
