"""What a denoiser costs: parameters, FLOPs and activation memory, found without weights and without computing.

The model really runs, forward and backward, on fake tensors that have shapes and no data: so a U-Net or a class of
the user's own is counted as a DiT is. A multiply-add is 2 FLOPs (the DiT paper's "Gflops" are multiply-adds).
"""

import contextlib
import copy
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ldm.dit import fused_attention


class UntraceableError(RuntimeError):
    """The denoiser cannot run on fake tensors, as where its path depends on values."""


@dataclass(frozen=True)
class Cost:
    """What one denoiser costs for latents of one shape, in one precision."""

    parameters: int
    trainable_parameters: int
    buffer_bytes: int
    """Of what is no parameter, such as a table of positions."""
    forward_flops: int
    """Of one image, forward: matmuls, convolutions and attention; 2 for a multiply-add."""
    activation_bytes: int
    """What one more image adds to the peak of a forward and backward pass."""
    fixed_bytes: int
    """What the peak has whatever the batch, beside weights and their gradients: autocast's copies of the weights."""

    @property
    def training_flops(self) -> int:
        """Of one image, forward and backward: 3 x forward. What MFU is a share of, recomputed activations or not."""
        return 3 * self.forward_flops

    def hardware_flops(self, activation_checkpointing: bool) -> int:
        """What is really computed for one image: checkpointed blocks run forward twice, 4 x forward."""
        return (4 if activation_checkpointing else 3) * self.forward_flops

    def peak_bytes(self, batch: int) -> int:
        """The most that a forward and backward pass holds beside weights, gradients and optimizer."""
        return self.fixed_bytes + batch * self.activation_bytes


def cost(
    denoiser: nn.Module,
    latent_shape: tuple[int, int, int],
    precision: Literal["fp32", "bf16"],
    *,
    has_labels: bool,
    timestep_dtype: torch.dtype = torch.int64,
    on_gpu: bool = True,
) -> Cost:
    """Costs of `denoiser`, built on the meta device, for latents (C, H, W); bf16 is autocast over fp32 weights.

    on_gpu: attention keeps no products of queries and keys, as it does on a CPU.

    The denoiser is left as it was. A module that checkpoints its activations is counted so.
    Raises UntraceableError where it cannot run without data.
    """
    parameters = list(denoiser.parameters())
    with _fake(denoiser) as fake, fused_attention() if on_gpu else contextlib.nullcontext():
        flops = _forward_flops(fake, _inputs(1, latent_shape, has_labels, timestep_dtype))
        few, many = (
            _peak(fake, _inputs(batch, latent_shape, has_labels, timestep_dtype), precision) for batch in (2, 4)
        )
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        buffer_bytes=sum(b.nbytes for b in denoiser.buffers()),
        forward_flops=flops,
        activation_bytes=(many - few) // 2,
        fixed_bytes=max(0, 2 * few - many),
    )


def forward_flops(
    denoiser: nn.Module,
    latent_shape: tuple[int, int, int],
    *,
    has_labels: bool,
    timestep_dtype: torch.dtype = torch.int64,
) -> int:
    """`Cost.forward_flops` alone, in a fraction of the time. Raises UntraceableError."""
    with _fake(denoiser) as fake:
        return _forward_flops(fake, _inputs(1, latent_shape, has_labels, timestep_dtype))


@contextlib.contextmanager
def _fake(denoiser: nn.Module) -> Iterator[nn.Module]:
    """A copy without data, which is left to run; whatever the user's own forward raises is an UntraceableError."""
    copied = copy.deepcopy(denoiser)
    try:
        with torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True):
            yield _on_fake_cpu(copied)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UntraceableError(
            f"{type(denoiser).__name__}: cannot be counted, for it does not run on tensors without data "
            f"({type(error).__name__}: {reason[:200]})"
        ) from error


def _on_fake_cpu(denoiser: nn.Module) -> nn.Module:
    """The denoiser on a CPU that is not there. Each gradient is dropped as soon as it is whole."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    fake = denoiser._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
    for parameter in fake.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)
    return fake


def _inputs(batch: int, latent_shape: tuple[int, int, int], has_labels: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    labels = torch.zeros(batch, dtype=torch.int64) if has_labels else None
    return torch.zeros(batch, *latent_shape), torch.zeros(batch, dtype=dtype), labels


def _forward_flops(fake: nn.Module, inputs: tuple[Any, ...]) -> int:
    # Attention as plain matmuls, which the counter knows on every device; their number is the same.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        fake(*inputs)
    return counter.get_total_flops()


def _peak(fake: nn.Module, inputs: tuple[Any, ...], precision: str) -> int:
    """The most bytes that are alive at one time beside weights, inputs and the gradients of the weights."""
    given = [*fake.parameters(), *fake.buffers(), *(t for t in inputs if t is not None)]
    with LiveBytes(given) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = fake(*inputs)
        output.float().square().mean().backward()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make, each once, until nothing refers to them: the peak of their bytes.

    given: what is there already, and is not counted.
    """

    def __init__(self, given: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        for tensor in given:
            self._follow(tensor, 0)

    def _follow(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        held = storage.nbytes() if size is None else size

        def freed(_: Any) -> None:
            self.live -= held
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.live += held
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return result
