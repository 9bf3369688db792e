"""Small runs of training: how they are asked for, what they leave, and whether two of them are the same."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.config import parse
from pipelines.train import TrainConfig, TrainReport
from pipelines.train.checkpoint import newest_checkpoint, read_full

SMALL: dict[str, Any] = {
    "max_steps": 8,
    "checkpoint_every": 2,
    "log_every": 2,
    "global_batch_size": 8,
    "num_workers": 2,
    "learning_rate": 1e-2,
    "device": "cpu",
    "validation": {"grid": 0},
    "denoiser": {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 1},
}


def config(latents: str, output: Path | str, **changes: Any) -> TrainConfig:
    values = {"latents": latents, "output": str(output), "tracking": {"enabled": False}, **SMALL}
    return parse(TrainConfig, [("test", values), ("changes", changes)])


def state(output: Path | str) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint holds of weights, moments and average."""
    checkpoint = newest_checkpoint(str(output))
    assert checkpoint is not None
    kinds = ("master", "exp_avg", "exp_avg_sq", "ema.main")
    return {f"{kind}/{name}": tensor for kind in kinds for name, tensor in read_full(checkpoint, kind).items()}


def assert_bitwise(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@dataclass(frozen=True)
class Run:
    """A run of 8 steps that nothing disturbed."""

    output: Path
    uri: str  # of its tracking
    report: TrainReport

    def rewound(self, output: Path) -> Path:
        """A copy that stands at step 4, where the later checkpoints were lost but their points are logged."""
        shutil.copytree(self.output, output)
        for step in (6, 8):
            shutil.rmtree(output / "checkpoints" / f"step-{step:010d}")
        return output


def tracked(uri: str) -> dict[str, Any]:
    return {"enabled": True, "uri": uri, "experiment": "test", "system_metrics_s": 0.5}
