"""DeepSpeed ZeRO 0-3 behind one small engine. What DeepSpeed 0.19 does not publish is in here and in sharded_state.

A fresh run and a resumed one begin by the same path: the module's weights are loaded before `initialize`, which primes
the lazy Adam state and sets its step to 0; `checkpoint.load_checkpoint` may follow.

"bf16" means fp32 masters, gradients and reductions, with the forward and backward passes under bf16 autocast.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.config import RequestError
from pipelines.train.deepspeed_options import merge_options
from pipelines.train.sharded_state import ShardedState

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # a rank may wait as long for another that writes a checkpoint
_BUCKET = 50_000_000  # elements in a communication bucket: 200 MB


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. Gradients that are not finite skip the step on every rank."""

    applied: bool
    grad_norm: float  # L2 over all parameters, before clipping; inf or nan where the step was skipped


def deepspeed_config(
    *,
    stage: int,
    precision: str,
    global_batch_size: int,
    micro_batch_size: int,
    world: int,
    gradient_clipping: float = 1.0,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration, with every setting written out whose default has changed between releases.

    `gradient_clipping` is the largest L2 norm of all gradients together; 0 turns it off. `options` is the user's
    `deepspeed:` section. Initialises nothing. Raises RequestError.
    """
    if stage not in STAGES:
        raise RequestError(f"zero_stage={stage}: expected 0, 1, 2 or 3")
    if precision not in PRECISIONS:
        raise RequestError(f"precision={precision}: expected fp32 or bf16")
    if micro_batch_size < 1 or global_batch_size % (micro_batch_size * world):
        raise RequestError(
            f"global_batch_size={global_batch_size}: expected a multiple of micro_batch_size x workers"
            f" = {micro_batch_size} x {world}"
        )
    config = {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": global_batch_size // (micro_batch_size * world),
        "gradient_clipping": float(gradient_clipping),
        "fp16": {"enabled": False},
        "bf16": {"enabled": False, "check_grad_overflow": True},
        # No "safe" modules: they would have their gradients reduced in bf16.
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "managed_gradient_accumulation": True,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": True,
            "use_multi_rank_bucket_allreduce": True,
            "allgather_partitions": True,
            "compute_grad_norm": True,
            "memory_efficient_linear": True,
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": _BUCKET,
            "round_robin_gradients": False,
            "parameter_alignment": False,
            "stage3_prefetch_bucket_size": _BUCKET,
            "stage3_param_persistence_threshold": 10_000,  # biases and norms stay whole
        },
    }
    return merge_options(config, options or {})


def initialize(
    module: nn.Module,
    config: dict[str, Any],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_decay: bool = True,
) -> Engine:
    """Wraps `module`, whose weights are already loaded, with torch's own AdamW under `config`.

    Without `decoupled_decay` it is Adam, whose state is the same.

    The process group exists, and LOCAL_RANK, RANK and WORLD_SIZE are set. Rank 0's weights are broadcast. Frozen
    parameters become buffers of the same name: they are replicated, and no optimizer state belongs to them.
    """
    deepspeed = import_deepspeed()
    _freeze(module)
    wrong = [name for name, p in module.named_parameters() if p.dtype != torch.float32 or not p.is_contiguous()]
    if wrong:
        raise RequestError(f"denoiser: parameter {wrong[0]} is not float32 and contiguous, as masters must be")
    persistent = set(module.state_dict()) - {name for name, _ in module.named_parameters()}
    clip = config["gradient_clipping"]
    stage = config["zero_optimization"]["stage"]
    if stage == 0:  # DeepSpeed reports no norm at stage 0, and would step through a NaN: Engine.step clips itself
        config = {**config, "gradient_clipping": 0.0}

    kind = torch.optim.AdamW if decoupled_decay else torch.optim.Adam

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        # Fused: on the flat buffers of a DiT-S the plain one took ten times as long on two cores.
        return kind(parameters, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    linear = nn.functional.linear
    inner, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    # DeepSpeed's own groups take torch's default, 10 minutes with NCCL, whatever the first one was made with.
    for group in (torch.distributed.group.WORLD, inner.seq_data_parallel_group):
        torch.distributed.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT, group)
    return Engine(inner, clip, persistent, linear)


def all_gather(value: Any) -> list[Any]:
    """The small values of all ranks, in the order of the ranks."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def import_deepspeed() -> Any:
    """The package, kept from what would cost each worker seconds to minutes and serves nothing here."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    compiler = torch.compile
    without_mlflow = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]  # its autotuner's
    try:
        import deepspeed
        import deepspeed.ops

        # Its Muon, which no one uses here, has functions compiled on import: all of torch's compiler, for a second.
        torch.compile = lambda function=None, **_: function or (lambda inner: inner)  # type: ignore[assignment]
        import deepspeed.runtime.zero.muon.muon_optimizer
    finally:
        torch.compile = compiler
        if without_mlflow:
            del sys.modules["mlflow"]
    # No probing of compilers; and where there is a compiler, no C++ built at run time (2 minutes on two cores).
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


class Engine:
    """One rank's training engine: `loss = f(engine(...)); engine.backward(loss); engine.step(learning_rate)`."""

    def __init__(
        self, inner: DeepSpeedEngine, gradient_clipping: float, persistent_buffers: set[str], linear: Any
    ) -> None:
        self.inner = inner
        self.module: nn.Module = inner.module
        self.device: torch.device = torch.device(inner.device)
        self.state = ShardedState(inner, persistent_buffers)
        self._gradient_clipping = gradient_clipping
        self._linear = linear

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass, under autocast where the precision is bf16."""
        return self.inner(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """`loss` is the mean over this rank's micro-batch; the mean over micro-batches and ranks is taken here."""
        self.inner.backward(loss)

    def step(self, learning_rate: float) -> Step | None:
        """Call once for each micro-batch. None inside an accumulation, else what the optimizer step did."""
        for group in self.inner.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        if not self.inner.is_gradient_accumulation_boundary():
            self.inner.step()
            return None
        if self.state.stage == 0:
            return self._unsharded_step()
        self.inner.step()
        norm = self.inner.get_global_grad_norm()
        assert norm is not None
        return Step(applied=self.inner.was_step_applied(), grad_norm=float(norm))

    def _unsharded_step(self) -> Step:
        parameters = list(self.module.parameters())
        norm = nn.utils.clip_grad_norm_(parameters, self._gradient_clipping or math.inf)
        # Gradients are reduced already, so that every rank sees the same norm and decides alike.
        applied = bool(torch.isfinite(norm))
        if not applied:
            self.module.zero_grad(set_to_none=True)  # AdamW leaves a parameter without gradient alone
        self.inner.step()
        return Step(applied=applied, grad_norm=float(norm))

    def close(self) -> None:
        """Frees DeepSpeed's hooks and buffers; another engine may then be made in this process."""
        self.inner.destroy()
        nn.functional.linear = self._linear  # ZeRO-3 puts its own there, with other rounding, and leaves it


def _freeze(module: nn.Module) -> None:
    """Frozen parameters => buffers of the same name."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                del owner._parameters[name]
                owner.register_buffer(name, parameter.data)
