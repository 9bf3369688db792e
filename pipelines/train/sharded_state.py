"""This rank's share of the training state under ZeRO 0-3, as live views by parameter name.

DeepSpeed 0.19 publishes none of this: where the fp32 masters and Adam's moments lie, Adam's step counter, and how a
change of the masters reaches the next forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Fragment:
    """A flat range of one parameter that this rank holds. The three tensors are live views: (count,) float32."""

    name: str
    start: int
    count: int
    shape: tuple[int, ...]  # of the whole parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def narrow(self, start: int, count: int) -> Fragment:
        """The part of this fragment at the parameter's flat range [start, start + count)."""
        assert self.start <= start and start + count <= self.start + self.count, (self.name, start, count)
        views = (t.narrow(0, start - self.start, count) for t in (self.master, self.exp_avg, self.exp_avg_sq))
        return Fragment(self.name, start, count, self.shape, *views)


class ShardedState:
    """What a checkpoint holds of the training state, as live views of this rank's memory.

    `fragments` are this rank's share: over all ranks they hold every element of every parameter once. `held` is all
    that this rank holds and must load: the same, but whole parameters at stage 0. After writing into `held`, call
    `publish`, a collective.
    """

    def __init__(self, inner: DeepSpeedEngine, persistent_buffers: set[str]) -> None:
        self.stage = int(inner.zero_optimization_stage())
        self.rank, self.world = int(inner.global_rank), int(inner.world_size)
        self._inner = inner
        self._adam: dict[Tensor, dict[str, Tensor]] = inner.basic_optimizer.state
        names = {parameter: name for name, parameter in inner.module.named_parameters()}
        self.shapes: dict[str, torch.Size] = {n: getattr(p, "ds_shape", p.shape) for p, n in names.items()}
        self.held: list[Fragment] = list((_whole, _flat, _flat, _partitioned)[self.stage](inner, names, self._prime))
        self.fragments: list[Fragment] = list(self._shares()) if self.stage == 0 else self.held
        self.buffers: dict[str, Tensor] = {
            name: buffer for name, buffer in inner.module.named_buffers() if name in persistent_buffers
        }
        self.optimizer_step = 0

    @property
    def optimizer_step(self) -> int:
        """Adam's own counter t: the number of steps that it has taken."""
        return int(next(iter(self._adam.values()))["step"].item())

    @optimizer_step.setter
    def optimizer_step(self, step: int) -> None:
        for state in self._adam.values():
            state["step"].fill_(step)

    @torch.no_grad()
    def publish(self) -> None:
        """Makes the next forward pass use the masters. Collective: call it on every rank."""
        optimizer = self._inner.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _prime(self, master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Makes the lazy Adam state of `master` by one step at learning rate 0 on zero gradients: no weight moves."""
        gradient = master.grad  # where the optimizer is offloaded, a buffer that DeepSpeed holds views of
        master.grad = torch.zeros_like(master)
        primer = torch.optim.AdamW([master], lr=0.0, fused=True)
        primer.step()
        master.grad = gradient
        state = self._adam[master] = primer.state[master]
        return master.detach().view(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)

    def _shares(self) -> Iterator[Fragment]:
        for whole in self.held:
            first, last = (whole.count * r // self.world for r in (self.rank, self.rank + 1))
            if first < last:
                yield whole.narrow(first, last - first)


_Prime = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def _whole(inner: DeepSpeedEngine, names: dict[Tensor, str], prime: _Prime) -> Iterator[Fragment]:
    """Stage 0: every rank holds every parameter."""
    for parameter, name in names.items():
        yield Fragment(name, 0, parameter.numel(), tuple(parameter.shape), *prime(parameter))


def _flat(inner: DeepSpeedEngine, names: dict[Tensor, str], prime: _Prime) -> Iterator[Fragment]:
    """Stages 1 and 2: each parameter group is one flat buffer, cut into equal parts; a part is a rank's master."""
    optimizer = inner.optimizer
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        views = prime(flat)
        for parameter in group:
            mapping = parameter._hp_mapping  # None where no element lies in this rank's part
            if mapping is not None:
                here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                assert here.numel == there.numel
                parts = (view.narrow(0, here.start, here.numel) for view in views)
                yield Fragment(names[parameter], there.start, there.numel, tuple(parameter.shape), *parts)


def _partitioned(inner: DeepSpeedEngine, names: dict[Tensor, str], prime: _Prime) -> Iterator[Fragment]:
    """Stage 3: each parameter is cut into equal parts, the last ones padded; the parts lie in flat sub-groups."""
    optimizer = inner.optimizer
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        views = prime(flat)
        for parameter in group:
            _, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = inner.global_rank * padded
            count = min(padded, parameter.ds_numel - start)
            for view in views:  # DeepSpeed leaves the padding uninitialised
                view.narrow(0, offset + max(count, 0), padded - max(count, 0)).zero_()
            if count > 0:
                parts = (view.narrow(0, offset, count) for view in views)
                yield Fragment(names[parameter], start, count, tuple(parameter.ds_shape), *parts)
