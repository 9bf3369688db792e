"""What is done about steps that went wrong, on all ranks alike, and what is written down of them.

A gradient that is not finite is never applied: DeepSpeed reduces it to all ranks, who skip the step together. A loss
that is not finite is made into such a gradient (`poisoned`), for its own may be finite. The samples of a skipped step,
and of one whose loss stands out, are named in `OUTPUT/incidents/`, one JSON file each.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ldm import storage
from pipelines.train.record import write_note
from pipelines.train.signals import FatalError
from pipelines.train.tell import tell
from pipelines.train.zero import all_gather

_HORIZON = 100
"""Applied steps over which the usual loss and its deviation are averaged, and before which no loss stands out."""
_SPIKE = 8.0
"""Mean absolute deviations above the usual loss: about 6 standard deviations of a Gaussian."""
_NAMED = 16  # samples of a spike


@dataclass
class Usual:
    """The usual loss: exponential averages over applied steps. It is saved, so that a resumed run judges alike."""

    mean: float = 0.0
    deviation: float = 0.0
    steps: int = 0

    def stands_out(self, loss: float) -> bool:
        return self.steps >= _HORIZON and loss > self.mean + _SPIKE * self.deviation

    def add(self, loss: float) -> None:
        self.steps += 1
        weight = 1 / min(self.steps, _HORIZON)
        self.deviation += weight * (abs(loss - self.mean) - self.deviation) if self.steps > 1 else 0.0
        self.mean += weight * (loss - self.mean)


@dataclass
class Guard:
    """skipped_in_a_row, spikes: steps so far. limit: of steps skipped in a row."""

    output: str
    limit: int
    usual: Usual
    skipped_in_a_row: int = 0
    spikes: int = 0

    def state(self) -> dict[str, Any]:
        """JSON that `load` takes back."""
        return {"usual": asdict(self.usual), "skipped_in_a_row": self.skipped_in_a_row, "spikes": self.spikes}

    def load(self, state: dict[str, Any]) -> None:
        self.usual, self.skipped_in_a_row = Usual(**state["usual"]), state["skipped_in_a_row"]
        self.spikes = state["spikes"]

    def applied(self, loss: float, samples: Sequence["Samples"], where: dict[str, Any]) -> None:
        """Call after a step that was applied, with the loss of all ranks. Collective where the loss stands out."""
        self.skipped_in_a_row = 0
        if self.usual.stands_out(loss):
            self.spikes += 1
            worst = sorted(_gathered(samples), key=lambda pair: -pair[1])[:_NAMED]
            usual = {"usual_loss": self.usual.mean, "usual_deviation": self.usual.deviation}
            self._write("loss-spike", worst, {**where, "loss": loss, **usual})
        self.usual.add(loss)

    def skipped(self, samples: Sequence["Samples"], where: dict[str, Any], checkpoint: str | None) -> None:
        """Call after a step that was skipped. Collective. Raises FatalError where it is the last one allowed.

        Named are the samples whose loss is not finite; all of the batch where no loss tells.
        """
        self.skipped_in_a_row += 1
        found = _gathered(samples)
        wrong = [pair for pair in found if not math.isfinite(pair[1])] or found
        self._write("not-finite", wrong, where)
        if self.skipped_in_a_row >= self.limit:
            good = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
            raise FatalError(
                f"skip_limit={self.limit}: so many steps in a row had a loss or gradient that is not finite, the last "
                f"at batch {where['batch']}; {good}; their samples are named in {self._folder}"
            )

    @property
    def _folder(self) -> str:
        return storage.join(self.output, "incidents")

    def _write(self, kind: str, samples: Sequence[tuple[int, float]], what: dict[str, Any]) -> None:
        """Under a name of its own for each batch: what a resumed run does again is written again, not twice."""
        if torch.distributed.get_rank() == 0:
            named = [{"id": identity, "loss": _json(loss)} for identity, loss in samples]
            tell(f"batch {what['batch']}: {kind}, {len(named)} samples named in {self._folder}")
            known = {key: _json(value) for key, value in what.items()}
            name = f"batch-{what['batch']:010d}-{kind}.json"
            write_note(storage.join(self._folder, name), {"kind": kind, **known, "samples": named})


Samples = tuple[Tensor, Tensor]
"""ids int64 (n,), losses (n,) of a micro-batch."""


def poisoned(loss: Tensor) -> Tensor:
    """The loss, or NaN with gradients of NaN where it is not finite."""
    return loss * torch.where(torch.isfinite(loss), 1.0, math.nan)


def _gathered(samples: Sequence[Samples]) -> list[tuple[int, float]]:
    """(id, loss) of the samples of all ranks. Collective."""
    own = [pair for ids, losses in samples for pair in zip(ids.tolist(), losses.tolist(), strict=True)]
    return [pair for of_rank in all_gather(own) for pair in of_rank]


def _json(value: Any) -> Any:
    """JSON knows no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
