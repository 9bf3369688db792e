"""The `deepspeed:` section: which of DeepSpeed's settings an expert may change, and what to give in place of others.

Only settings that leave alone what is learned, and what checkpoints and averages read, may be given.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic

from ldm.config import RequestError

_ZERO = "zero_optimization"


def _keys(names: str, prefix: str = "") -> list[str]:
    return [prefix + name for name in names.split()]


ALLOWED = frozenset(
    _keys("log_level memory_breakdown steps_per_print wall_clock_breakdown")
    + _keys("enabled verbose prof_all debug prof_ops", "comms_logger.")
    + _keys(
        """
        allgather_bucket_size allgather_partitions contiguous_gradients enable_sanity_checks ignore_unused_parameters
        log_trace_cache_warnings memory_efficient_linear offload_optimizer.device offload_optimizer.pin_memory
        offload_param.device offload_param.pin_memory overlap_comm reduce_bucket_size reduce_scatter
        stage3_allgather_sequential stage3_max_live_parameters stage3_max_reuse_distance
        stage3_model_persistence_threshold stage3_module_granularity_threshold stage3_param_persistence_threshold
        stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size
        use_multi_rank_bucket_allreduce
        """,
        f"{_ZERO}.",
    )
)
"""Dotted keys. What DeepSpeed reports of itself is seen with log_level=info."""

_SCALARS = {
    "log_level": ("debug", "info", "warning", "error"),
    "memory_breakdown": (True, False),
    "wall_clock_breakdown": (True, False),
}

_ADVICE = {
    "give global_batch_size": _keys("train_batch_size"),
    "give micro_batch_size": _keys(
        "train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation autotuning"
    ),
    "give gradient_clip": _keys("gradient_clipping"),
    "give optimizer, learning_rate, adam_betas and weight_decay: checkpoints hold the state of Adam": _keys(
        "optimizer zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"
    ),
    "give learning_rate_schedule, warmup_images and learning_rate_images": _keys("scheduler"),
    "give precision": _keys("fp16 bf16 bfloat16 amp torch_autocast data_types"),
    "leave it out: gradients and weights are exchanged in fp32, so that every stage gives the same": _keys(
        """communication_data_type seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor
        gradient_allreduce_op disable_allgather"""
    )
    + _keys(
        """zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients
        zero_hpz_partition_size""",
        f"{_ZERO}.",
    ),
    "give activation_checkpointing=true": _keys("activation_checkpointing"),
    "give compile=true": _keys("compile"),
    "give checkpoint_every and keep_last: the checkpoints are the trainer's": _keys("checkpoint datastates")
    + _keys(
        """elastic_checkpoint load_from_fp32_weights pipeline_loading_checkpoint
        stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save""",
        f"{_ZERO}.",
    ),
    "give num_workers": _keys("elasticity"),
    "give tracking": _keys("tensorboard wandb csv_monitor comet"),
    "leave it out: which samples make a batch is the trainer's": _keys(
        "dataloader_drop_last data_efficiency curriculum_learning"
    ),
    "leave it out: it would change the model": _keys(
        """compression_training expert_parallel hybrid_engine pipeline tensor_parallel weight_quantization
        quantize_training sequence_parallel_size use_data_before_expert_parallelism"""
    ),
    "leave it out: nothing is offloaded to NVMe": _keys("aio"),
    "give zero_stage": _keys("stage", f"{_ZERO}."),
    "leave it out: checkpoints know one order of the weights in DeepSpeed's buffers": _keys(
        "parameter_alignment round_robin_gradients", f"{_ZERO}."
    ),
    "leave it out: clipping and the guard need the norm": _keys("compute_grad_norm", f"{_ZERO}."),
    f"give {_ZERO}.offload_optimizer.device=cpu": _keys(
        """cpu_offload cpu_offload_use_pin_memory zenflow offload_optimizer.super_offload offload_optimizer.ratio
        offload_optimizer.fast_init""",
        f"{_ZERO}.",
    ),
    f"give {_ZERO}.offload_param.device=cpu": _keys("cpu_offload_param", f"{_ZERO}."),
}
OWNED = {key: advice for advice, keys in _ADVICE.items() for key in keys}
"""Dotted keys that the trainer sets itself, and what to give in their place."""


def merge_options(config: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, as the trainer makes it, with the `deepspeed:` section `options` merged in, deeply.

    Imports DeepSpeed where there are options, and initialises nothing. Raises RequestError.
    """
    if not options:
        return config
    merged = dict(config) | {_ZERO: dict(config[_ZERO])}
    for key, value in _leaves(options):
        _check_key(key, value)
        *parents, name = key.split(".")
        inside = merged
        for parent in parents:
            inside[parent] = inside = dict(inside.get(parent) or {})
        inside[name] = value
    _check_offload(merged[_ZERO])
    _check_values(merged)
    return merged


def _leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value), the value read as JSON: values of the command line arrive as text."""
    for name, value in options.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and key not in OWNED:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, _read(value)


def _read(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check_key(key: str, value: Any) -> None:
    shown = f"deepspeed.{key}" + ("" if isinstance(value, Mapping) else f"={json.dumps(value)}")
    if key in OWNED:
        raise RequestError(f"{shown}: is set by the trainer; {OWNED[key]}")
    if key not in ALLOWED:
        near = difflib.get_close_matches(key, ALLOWED, n=1, cutoff=0.75) or [
            k for k in ALLOWED if k.endswith(f".{key}")
        ]
        hint = f"the nearest is deepspeed.{near[0]}" if near else "leave it out"
        raise RequestError(f"{shown}: is no setting of DeepSpeed that may be given here; {hint}")
    if key in _SCALARS and value not in _SCALARS[key]:
        raise RequestError(f"{shown}: should be one of {', '.join(map(json.dumps, _SCALARS[key]))}")
    if key == "steps_per_print" and not (type(value) is int and value > 0):
        raise RequestError(f"{shown}: should be a number of steps, 1 or more")


def _check_offload(zero: dict[str, Any]) -> None:
    for what, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = (zero.get(what) or {}).get("device", "none")
        key = f"deepspeed.{_ZERO}.{what}.device={device}"
        if device not in ("none", "cpu"):
            raise RequestError(f"{key}: is not supported; give cpu, or none")
        if device == "cpu" and zero["stage"] not in stages:
            right = " or ".join(map(str, stages))
            raise RequestError(f"{key}: zero_stage={zero['stage']} has nothing to offload; give zero_stage={right}")


def _check_values(merged: dict[str, Any]) -> None:
    """Has DeepSpeed read its own configuration."""
    from pipelines.train.zero import import_deepspeed

    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    # The batch is checked already, and for the world that will be: here there is one process.
    alone = {k: v for k, v in merged.items() if k not in ("train_batch_size", "gradient_accumulation_steps")}
    try:
        DeepSpeedConfig(alone)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        section = f"{_ZERO}." if "Zero" in error.title else "comms_logger."
        key = ".".join(str(part) for part in problem["loc"])
        raise RequestError(f"deepspeed.{section}{key}={problem['input']}: {problem['msg']}") from None
