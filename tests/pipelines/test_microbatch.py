"""`micro_batch_size=auto`: what a device refuses, what an estimate allows, and that all ranks take the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.autoencoder import Autoencoder
from ldm.config import RequestError
from ldm.denoiser import DenoiserConfig
from pipelines import cluster
from pipelines.train import microbatch
from pipelines.train.build import open_latents
from pipelines.train.checkpoint_files import write_marker
from pipelines.train.config import TrainConfig
from pipelines.train.memory import denoiser_cost, memory_of_run
from tests.pictures import kl_model, latent_dataset
from tests.pipelines import gloo

SHAPE = (4, 2, 2)


class Hungry(nn.Module):
    """A device with room for `room` samples: more raises what CUDA raises, in the forward or the backward pass."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.tried = room, list[int]()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        self.tried.append(len(x))
        if len(x) > 2 * self.room:
            raise torch.OutOfMemoryError("forward")
        y = self.linear(x) + torch.rand(())
        if len(x) > self.room:
            y.register_hook(self._refuse)
        return y

    def _refuse(self, gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("backward")


def largest(denoiser: Hungry, share: int) -> int | None:
    return microbatch.largest_that_fits(
        share,
        lambda size: microbatch.trial_pass(denoiser, size, SHAPE, labels=True, precision="bf16", reserved=100),
    )


def test_what_the_device_refuses_is_halved_to_a_divisor() -> None:
    denoiser = Hungry(4)
    weights, drawn = copy.deepcopy(denoiser.state_dict()), torch.get_rng_state()
    assert largest(denoiser, 12) == 3
    assert denoiser.tried == [12, 6, 3]  # refused in the forward pass, in the backward pass, taken
    assert all(torch.equal(tensor, weights[name]) for name, tensor in denoiser.state_dict().items())
    assert all(p.grad is None for p in denoiser.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert largest(Hungry(12), 12) == 12
    assert largest(Hungry(0), 12) is None
    assert [microbatch.halvings(n) for n in (1, 7, 90)] == [[1], [7, 1], [90, 45, 18, 9, 3, 1]]


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        microbatch.largest_that_fits(
            4, lambda n: microbatch.trial_pass(Hungry(9), n, (4, 2, 3), labels=False, precision="fp32", reserved=0)
        )


def scenario(rank: int, world: int, latents: str, output: str) -> dict[str, Any]:
    """What this rank takes, and whatever it is refused."""
    found: dict[str, Any] = {}
    config = TrainConfig(
        latents=latents,
        output=output,
        global_batch_size=24,
        num_workers=world,
        denoiser=DenoiserConfig(hidden_size=16, depth=1, num_heads=2, patch_size=1),
    )
    dataset = open_latents(config, None, {})

    def take(name: str, denoiser: nn.Module, by_trial: bool, checkpoint: str | None = None, **changes: Any) -> None:
        try:
            found[name] = microbatch.micro_batch_size(
                config.model_copy(update=changes), denoiser, dataset, torch.device("cpu"), checkpoint, by_trial=by_trial
            )
        except RequestError as error:
            found[name] = str(error)

    take("trial", Hungry(6 if rank else 3), True)
    take("no room", Hungry(9 * rank), True)
    take("given", Hungry(0), True, micro_batch_size=4)
    take("same world", Hungry(0), True, f"{output}/of-2")
    take("other world", Hungry(6), True, f"{output}/of-3")
    take("estimate", Hungry(0), False)
    costs = denoiser_cost(config, dataset, on_gpu=False)
    for name, size, room in (("tight", 6, 1.01), ("too tight", 1, 0.99)):  # shares of what `size` samples need
        needs = memory_of_run(config, costs, world=world, micro_batch=size, stage=config.zero_stage, on_gpu=False)
        needed = needs.total
        cluster.node_memory = lambda needed=needed * room: int(world * needed / 0.8)  # type: ignore[assignment]
        take(name, Hungry(0), False)
    return found


@pytest.mark.slow
def test_all_ranks_take_the_smallest_and_a_resume_what_it_had(tmp_path: Path) -> None:
    autoencoder = Autoencoder(kl_model())
    latent_dataset(str(tmp_path / "latents"), autoencoder)
    for world in (2, 3):
        write_marker(str(tmp_path / f"of-{world}"), {"world": world, "files": [], "progress": {"micro_batch_size": 2}})
    ranks = gloo.run(scenario, 2, str(tmp_path / "latents"), str(tmp_path))
    assert ranks[0] == ranks[1]
    taken = ranks[0]
    assert taken.pop("no room").startswith("micro_batch_size=auto: not even one sample fits beside weights, ")
    assert taken.pop("too tight").startswith("micro_batch_size=auto: not even one sample fits beside weights, ")
    assert taken == {"trial": 3, "given": 4, "same world": 2, "other world": 6, "estimate": 12, "tight": 6}
