"""Checkpoints beside the training: the step waits for a copy to the host, a thread does the rest.

The thread's collectives have a process group of their own: a slow upload meets neither the training's collectives nor
their time limit. One save runs at a time. What became of it is looked at where the next one begins and at the end, so
on every rank at the same point.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldm.config import RequestError
from pipelines.train.checkpoint import Part, prune, save_checkpoint, sweep_unfinished, together
from pipelines.train.checkpoint_files import CheckpointError
from pipelines.train.ema import Ema
from pipelines.train.sharded_state import ShardedState
from pipelines.train.tell import tell

FAILURES = 3
"""That many failed saves in a row end the training."""
_PATIENCE = timedelta(hours=12)
"""How long one rank waits for another's upload. A rank that dies is noticed at once."""

AfterCommit = Callable[[str, dict[str, Any]], None]
"""Called on rank 0, in the thread, with the URL of the new checkpoint and its progress."""


class Saver:
    """Saves of one training run. Making one, and each of its methods, is collective."""

    def __init__(
        self,
        output: str,
        state: ShardedState,
        ema: Ema,
        *,
        before_commit: Callable[[], None],
        after_commit: AfterCommit,
        keep_last: int,
        keep_every: int | None = None,
        checkpoint: str | None = None,
    ) -> None:
        """`checkpoint` is the one that the run went on from, if any.

        before_commit is called on rank 0, in the thread: there what a resume will not do again is made to last.
        """
        self.checkpoint = checkpoint  # the newest that is committed, as far as all ranks know
        self.metrics: dict[str, float] = {}
        self._output, self._before_commit, self._after_commit = output, before_commit, after_commit
        self._keep_last, self._keep_every = keep_last, keep_every
        self._host = _HostCopy(state, ema)
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._running: _Save | None = None
        sweep_unfinished(output)
        self._failed = self._failed_in_a_row = 0
        self._failure: Exception | None = None  # of the save before

    def save(self, progress: Mapping[str, Any]) -> None:
        """Begins to save this moment; waits for the save before it, and for the copy to the host.

        `progress` holds "step" at least. Raises CheckpointError where three saves in a row have failed.
        """
        began = time.monotonic()
        self._settle()
        if self._failed_in_a_row >= FAILURES:
            failure = self._failure
            raise CheckpointError(f"{FAILURES} saves in a row failed; {self._last_good}; {failure}") from failure
        waited = time.monotonic() - began
        part = self._host.take()
        self.metrics = {
            "perf/checkpoint_wait_seconds": waited,  # for the save before
            "perf/checkpoint_stall_seconds": time.monotonic() - began,
            "train/failed_saves": self._failed,
        }
        self._running = _Save(self._write, part, dict(progress))

    def wait(self) -> None:
        """Waits for the last save. Raises CheckpointError where it failed."""
        failure = self._settle()
        if failure is not None:
            raise CheckpointError(f"the last save failed; {self._last_good}; {failure}") from failure

    def close(self) -> None:
        """`wait`, and frees the process group."""
        try:
            self.wait()
        finally:
            dist.destroy_process_group(self._group)

    @property
    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "there is no good checkpoint"

    def _settle(self) -> Exception | None:
        """Waits for the save that runs, if any, and counts it; returns why it failed."""
        save, self._running = self._running, None
        if save is None:
            return None
        save.join()
        if save.broken is not None:
            raise RuntimeError(f"a save was cut off: {save.broken}") from save.broken
        self.checkpoint = save.url or self.checkpoint
        self._failed += save.failure is not None
        self._failed_in_a_row = 0 if save.failure is None else self._failed_in_a_row + 1
        self._failure = save.failure
        return save.failure

    def _write(self, save: _Save) -> None:
        """The thread's work. A failure is the same decision on every rank."""
        part, progress = save.part, save.progress

        def finish(url: str) -> None:
            if part.rank == 0:
                self._after_commit(url, progress)
                prune(self._output, self._keep_last, self._keep_every)

        if part.rank == 0:
            self._before_commit()
        try:
            url = save.url = save_checkpoint(self._output, part, progress, self._all_gather)
            together(url, part.rank, self._all_gather, lambda: finish(url))
        except (CheckpointError, RequestError) as error:
            save.failure = error
            if part.rank == 0:
                tell(f"the save of step {progress['step']:,} failed: {error}")

    def _all_gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


class _Save(threading.Thread):
    """One save under way. After `join`: its url if it was committed, its failure if all ranks agree on one; `broken`
    is what kept them from agreeing, such as the loss of a rank."""

    def __init__(self, write: Callable[[_Save], None], part: Part, progress: dict[str, Any]) -> None:
        super().__init__(name="checkpoint", daemon=True)  # a training that failed does not wait for it
        self.part, self.progress = part, progress
        self.url: str | None = None
        self.failure: Exception | None = None
        self.broken: BaseException | None = None
        self._write = write
        self.start()

    def run(self) -> None:
        try:
            self._write(self)
        except BaseException as error:
            self.broken = error


class _HostCopy:
    """Copies of this rank's part in the memory of the host, the same memory for each: pinned where it is on a GPU."""

    def __init__(self, state: ShardedState, ema: Ema) -> None:
        self._state, self._ema = state, ema
        live = Part.of(state, ema)
        self._columns = {kind: [_like(tensor) for tensor in column] for kind, column in live.columns.items()}
        self._buffers = {name: _like(buffer) for name, buffer in live.buffers.items()}

    @torch.no_grad()
    def take(self) -> Part:
        """This moment's part. The one before is overwritten."""
        live = Part.of(self._state, self._ema)
        pairs = [
            pair for kind, column in live.columns.items() for pair in zip(self._columns[kind], column, strict=True)
        ]
        pairs += [(self._buffers[name], buffer) for name, buffer in live.buffers.items()]
        for host, tensor in pairs:
            host.copy_(tensor, non_blocking=True)
        for device in {tensor.device for _, tensor in pairs if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return replace(live, columns=self._columns, buffers=self._buffers)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
