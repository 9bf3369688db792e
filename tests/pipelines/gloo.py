"""Runs a function on N real gloo processes, so that what needs only ranks needs no Ray."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


def run(function: Callable[..., Any], world: int, *args: Any, timeout: float = 240, start: str = "spawn") -> list[Any]:
    """`[function(rank, world, *args) for rank in range(world)]`, each in a new process of one gloo group.

    `function` lives at the top of a module. The first failure ends the other ranks, and raises RuntimeError with the
    child's traceback; so does a rank that has not returned after `timeout` seconds.
    """
    context = multiprocessing.get_context(start)
    with tempfile.TemporaryDirectory() as directory:
        pipes, processes = [], []
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(sender, function, rank, world, directory, args), daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _results(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _results(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            raise RuntimeError(f"ranks {late} did not return in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                failure, value = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if failure:
                raise RuntimeError(f"rank {rank} failed:\n{failure}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _child(
    sender: Connection, function: Callable[..., Any], rank: int, world: int, directory: str, args: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        import torch

        torch.set_num_threads(1)
        # A file is a rendezvous without a port that another process could take first.
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world
        )
        message = ("", function(rank, world, *args))
    except BaseException:
        message = (traceback.format_exc(), None)
    sender.send_bytes(pickle.dumps(message))
    sender.close()
    os._exit(0)  # tearing down a group whose other ranks are gone can hang
