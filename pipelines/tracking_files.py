"""Files by whose names and content MLflow knows what to show: pictures with a slider, tables, models that load."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm import __version__, images, storage
from ldm.snapshot import Snapshot

_SMALL_SIDE = 256
DATA = "snapshot"
"""Folder of a logged model that holds the snapshot as `ldm train` wrote it."""


def grid_names(key: str, pixels: npt.NDArray[np.uint8], step: int, milliseconds: int) -> tuple[str, str]:
    """Names of a picture at a step, and of its small copy, as `MlflowClient.log_image(key=…, step=…)` gives them.

    The name is the whole protocol: MLflow's page reads key and step out of it, and shows the small copy first. Unlike
    there, the last part is no random number, so that a file that is sent twice is one file.
    """
    content = hashlib.sha256(pixels.tobytes()).hexdigest()[:32]
    name = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{milliseconds}+{content}"
    return f"{name}.png", f"{name}+compressed.webp"


def encode_picture(name: str, pixels: npt.NDArray[np.uint8]) -> bytes:
    """uint8 (3, H, W) => a PNG, or for a name that ends in .webp a small copy."""
    if not name.endswith(".webp"):
        return images.to_png(pixels)
    small, target = Image.fromarray(pixels.transpose(1, 2, 0)), io.BytesIO()
    small.thumbnail((_SMALL_SIDE, _SMALL_SIDE))
    small.save(target, format="WEBP")
    return target.getvalue()


def table_file(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows => the JSON of `MlflowClient.log_table`; a column that a row lacks is empty there."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    data = [[row.get(name) for name in columns] for row in rows]
    return json.dumps({"columns": columns, "data": data}).encode()


def model_files(snapshot: Snapshot, model_id: str, run_id: str) -> dict[str, Callable[[Path], Any]]:
    """A snapshot as an MLflow model, name => what writes the file there; what names the others comes last.

    Its code is `ldm.pyfunc` of the installed package: nothing in it is a pickle, and nothing of it is executed.
    """
    names = sorted(storage.list_tree(snapshot.url), key=lambda name: (name.endswith(".json"), name))
    files: dict[str, Callable[[Path], Any]] = {
        f"{DATA}/{name}": partial(storage.fetch, storage.join(snapshot.url, name)) for name in names
    }
    files["requirements.txt"] = lambda path: path.write_text(f"ldm-pipelines=={__version__}\n")
    files["MLmodel"] = lambda path: _describe(snapshot, model_id, run_id).save(str(path))
    return files


def _describe(snapshot: Snapshot, model_id: str, run_id: str) -> Any:
    """The content of the file `MLmodel`: loader, and signature."""
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import add_to_model
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    columns = [ColSpec(DataType.long, "seed"), ColSpec(DataType.long, "num_inference_steps", required=False)]
    if snapshot.conditioning.type == "class":
        columns.insert(1, ColSpec(DataType.long, "label"))
    sampler = "euler" if snapshot.diffusion_config.schedule == "flow" else "ddim"
    params = [
        ParamSpec("sampler", DataType.string, sampler),
        ParamSpec("eta", DataType.double, 0.0),
        ParamSpec("guidance_scale", DataType.double, 1.0),
    ]
    pictures = TensorSpec(np.dtype(np.uint8), (-1, *snapshot.picture_shape(), 3))
    signature = ModelSignature(Schema(columns), Schema([pictures]), ParamSchema(params))
    model = Model(run_id=run_id, model_id=model_id, signature=signature)
    options = {"device": "auto", "denoiser_type": None}
    return add_to_model(model, loader_module="ldm.pyfunc", data=DATA, model_config=options)
