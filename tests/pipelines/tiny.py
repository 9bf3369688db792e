"""A model whose parameter counts no world size divides, its batches, and how ranks' fragments make whole tensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.train import zero
from pipelines.train.ema import Ema

GLOBAL_BATCH = 12
WEIGHT_DECAY = 0.1
EPS = 1e-3  # far above rounding: with Adam's 1e-8, a gradient of almost 0 has a step of +1 or -1
KINDS = ("master", "exp_avg", "exp_avg_sq")


class Tiny(nn.Module):
    """(N, 7) -> (N, 3). One weight is large enough for ZeRO-3 to cut it; the small ones stay whole there."""

    scale: Tensor

    def __init__(self, seed: int, hidden: int = 103) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(7, 101)
        self.middle = nn.Linear(101, hidden)
        self.last = nn.Linear(hidden, 3)
        self.offset = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("forgotten", torch.zeros(5), persistent=False)
        for tensor in self.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.4 - 0.2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.middle(nn.functional.gelu(self.first(x))))
        return self.last(hidden) + self.offset + self.scale


def batch(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's part of a step's inputs and targets: the whole depends on the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = torch.randn(GLOBAL_BATCH, 7, generator=generator), torch.randn(GLOBAL_BATCH, 3, generator=generator)
    own = slice(rank * GLOBAL_BATCH // world, (rank + 1) * GLOBAL_BATCH // world)
    return x[own], y[own]


def engine(rank: int, world: int, stage: int, precision: str, seed: int = 0, **options: Any) -> zero.Engine:
    """An engine with two micro-batches in each step."""
    config = zero.deepspeed_config(
        stage=stage,
        precision=precision,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=GLOBAL_BATCH // world // 2,
        world=world,
        gradient_clipping=options.pop("gradient_clipping", 0.3),
    )
    return zero.initialize(Tiny(seed, **options), config, weight_decay=WEIGHT_DECAY, eps=EPS)


def train_step(run: zero.Engine, step: int, poison: bool = False) -> tuple[zero.Step, list[float]]:
    """One optimizer step; returns what it did, and the loss of each micro-batch of this rank."""
    x, y = batch(step, run.state.rank, run.state.world)
    losses, done = [], None
    for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
        assert done is None
        loss = (run(part_x).float() - part_y).square().mean()
        losses.append(loss.item())
        run.backward(loss * float("nan") if poison else loss)
        done = run.step(learning_rate=0.01 / (1 + step))
    assert done is not None
    return done, losses


def snapshot(run: zero.Engine, ema: Ema | None = None) -> list[tuple[str, str, int, Tensor]]:
    """This rank's fragments as (kind, name, start, values), copied."""
    pieces = [(kind, f.name, f.start, getattr(f, kind).clone()) for f in run.state.fragments for kind in KINDS]
    for name, averages in (ema.averages if ema else {}).items():
        pairs = zip(run.state.fragments, averages, strict=True)
        pieces += [(f"ema.{name}", f.name, f.start, average.clone()) for f, average in pairs]
    return pieces


def assemble(ranks: Iterable[list[tuple[str, str, int, Tensor]]]) -> dict[tuple[str, str], Tensor]:
    """The ranks' fragments => whole flat tensors by (kind, name); every element is there exactly once."""
    pieces: dict[tuple[str, str], dict[int, Tensor]] = {}
    for fragments in ranks:
        for kind, name, start, values in fragments:
            assert start not in pieces.setdefault((kind, name), {}), f"{kind} {name}: {start} is on two ranks"
            pieces[kind, name][start] = values
    whole = {}
    for key, parts in pieces.items():
        position = 0
        for start in sorted(parts):
            assert start == position, f"{key}: a gap or an overlap at {position}"
            position += parts[start].numel()
        whole[key] = torch.cat([parts[start] for start in sorted(parts)])
    return whole


def flip(file: Path) -> None:
    """Turns one bit near the end of a file."""
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
