"""Exponential moving averages of the weights, kept by each rank for its own fp32 fragments: nothing is gathered.

The averages are fp32 always: a bf16 average with decay 0.9999 never moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.train.sharded_state import ShardedState


@dataclass(frozen=True)
class EmaProfile:
    """One average: its name, and the decay that it warms up to."""

    name: str
    decay: float

    def decay_at(self, updates: int) -> float:
        """min(decay, (1 + k) / (10 + k)) after k updates: the first weights, which are noise, fade fast."""
        return min(self.decay, (1 + updates) / (10 + updates))


class Ema:
    """The averages of all profiles; `averages[name]` lies beside `state.fragments`, tensor by tensor."""

    def __init__(self, state: ShardedState, profiles: Sequence[EmaProfile]) -> None:
        self.profiles = tuple(profiles)
        assert len({p.name for p in self.profiles}) == len(self.profiles), "two profiles of one name"
        self._masters = [fragment.master for fragment in state.fragments]
        self.updates: dict[str, int] = {p.name: 0 for p in self.profiles}
        self.averages: dict[str, list[Tensor]] = {
            p.name: [master.clone() for master in self._masters] for p in self.profiles
        }

    @torch.no_grad()
    def update(self) -> None:
        """Call once for each optimizer step that was applied: average <- decay * average + (1 - decay) * master."""
        for profile in self.profiles:
            weight = 1.0 - profile.decay_at(self.updates[profile.name])
            if self._masters:  # a rank may hold nothing of a small model
                torch._foreach_lerp_(self.averages[profile.name], self._masters, weight)
            self.updates[profile.name] += 1
