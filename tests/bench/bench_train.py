"""How fast training is.

    python tests/bench/bench_train.py matmul [rounds] [threads]     12 rounds of two threads; needs a C++ compiler
    python tests/bench/bench_train.py allocator [rounds]            3 rounds

matmul: a step of DiT-S/2 beside the machine's own bf16 matmul.
allocator: the same step (bf16, eager) with glibc's malloc as it is and as `import ldm` sets it, processes in turn.

All sides take turns in one process; the first round warms up; figures are medians, ratios are medians of the rounds'
ratios. With one thread its CPU seconds are counted, so that other work on the machine hardly does.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.denoiser import DenoiserConfig, build_denoiser, compile_denoiser
from ldm.diffusion import Diffusion, DiffusionConfig

BATCH, CLASSES, SHAPE = 16, 1000, (4, 32, 32)
ROWS, WIDTHS, CALLS = 4096, (384, 1536), 20  # the matmul
Seconds = dict[str, list[float]]


def matmul(rounds: int = 12, threads: int = 2) -> None:
    """Forward, backward and AdamW of fp32 weights on one batch of 16; bf16 is autocast."""
    torch.set_num_threads(threads)
    x, weight = torch.randn(ROWS, WIDTHS[0]).bfloat16(), torch.randn(WIDTHS[1], WIDTHS[0]).bfloat16()
    sides: dict[str, Callable[[], object]] = {"matmul": lambda: [F.linear(x, weight) for _ in range(CALLS)]}
    for precision in ("fp32", "bf16"):
        for way in ("eager", "compiled"):
            name = f"{precision} {way}"
            sides[name] = training_step(precision, compiled=way == "compiled")
            started = time.perf_counter()
            sides[name]()
            print(f"{name:13} first step {time.perf_counter() - started:6.1f} s", flush=True)
    report(take_turns(sides, rounds, threads), flop_per_image())


def allocator(rounds: int = 3) -> None:
    for _ in range(rounds):
        for name, said in (("glibc's own", {"GLIBC_TUNABLES": ""}), ("ldm's", {})):  # said: then ldm changes nothing
            print(f"{name:12}", end="", flush=True)
            subprocess.run([sys.executable, __file__, "step"], env={**os.environ, **said}, check=True)


def step(steps: int = 10) -> None:
    torch.set_num_threads(2)
    side = training_step("bf16", compiled=False)
    take_turns({"step": side}, 1, 2, quiet=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = take_turns({"step": side}, steps, 2, quiet=True)["step"]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    faults = (usage.ru_minflt - before) / (steps + 1)
    print(f"{statistics.median(seconds):.3f} s a step, {faults:,.0f} page faults, peak {usage.ru_maxrss // 1024:,} MiB")


def report(seconds: Seconds, image: int) -> None:
    call = 2 * ROWS * WIDTHS[0] * WIDTHS[1]
    rate = [CALLS * call / s for s in seconds.pop("matmul")]
    print(f"matmul: F.linear {ROWS}x{WIDTHS[0]}x{WIDTHS[1]} in bf16, {call / 1e9:.2f} GFLOP, ", end="")
    print(f"{statistics.median(rate) / 1e9:.0f} GFLOP/s ({min(rate) / 1e9:.0f} to {max(rate) / 1e9:.0f})")
    print(f"FLOP of an image: 3 x its forward pass = {image / 1e9:.2f} GFLOP (2 x multiply-adds of all matmuls,")
    print("  attention's two included; backward is twice forward; the optimizer and all else count nothing)")
    print(f"share = {BATCH} images x FLOP / seconds of the step / FLOP/s of the matmul in the same round")
    for name, side in seconds.items():
        shares = [BATCH * image / s / r for s, r in zip(side, rate, strict=True)]
        median = statistics.median(side)
        print(
            f"{name:13} {median:7.3f} s, {BATCH / median:6.2f} images/s, {BATCH * image / median / 1e9:5.0f} GFLOP/s, ",
            end="",
        )
        print(f"share {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")


def training_step(precision: str, *, compiled: bool) -> Callable[[], None]:
    """A whole step of a DiT-S/2 of its own, its data at hand."""
    denoiser, diffusion = dit(), Diffusion(DiffusionConfig())
    if compiled:
        compile_denoiser(denoiser)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(BATCH, *SHAPE, generator=generator) for _ in "xn")
    t, labels = (torch.randint(CLASSES, (BATCH,), generator=generator) for _ in "tl")

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = diffusion.loss(denoiser, x0, noise, t, labels).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dit() -> nn.Module:
    return build_denoiser(DenoiserConfig(), in_channels=SHAPE[0], sample_size=SHAPE[1:], num_classes=CLASSES)


def flop_per_image() -> int:
    """Forward and backward: three times the forward pass's products, of which autograd does two more for each."""
    with torch.device("meta"):
        denoiser, label = dit(), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            denoiser(torch.empty(1, *SHAPE), label, label)
    return 3 * counter.get_total_flops()


def take_turns(sides: dict[str, Callable[[], object]], rounds: int, threads: int, *, quiet: bool = False) -> Seconds:
    clock = time.thread_time if threads == 1 else time.perf_counter
    seconds: Seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = clock()
            side()
            if number:
                seconds[name].append(clock() - started)
    if not quiet:
        print(f"{rounds} rounds, {threads} threads, load {os.getloadavg()[0]:.1f}")
    return seconds


if __name__ == "__main__":
    {"matmul": matmul, "allocator": allocator, "step": step}[sys.argv[1]](*map(int, sys.argv[2:]))
