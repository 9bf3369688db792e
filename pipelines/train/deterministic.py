"""The same bits again on the same GPUs, at a price in speed."""

from __future__ import annotations

import os

import torch


def use_deterministic(device: str) -> None:
    """Has this process use kernels that give the same bits on the same model of GPU and number of workers.

    Call it before the first work on the GPU: cuBLAS and NCCL read their variables then. An operation that has no such
    kernel raises RuntimeError. On the CPU there is nothing to do: with as many threads and workers, and gloo, it is
    exact already.
    """
    if device == "cpu":
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["NCCL_ALGO"] = "^NVLS"  # sums inside the switch come in no fixed order
    torch.use_deterministic_algorithms(True)
    # Filling costs a pass over the memory, and would make NaN of the padding that DeepSpeed leaves as it is.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False  # it would choose by timing
    torch.backends.cudnn.deterministic = True
    # Flash attention has a deterministic backward pass, the other fused kernels have none; fp32 takes the plain one.
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
