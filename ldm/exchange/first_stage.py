"""The normalisation of latents, moved into the autoencoder: decode(x * std + mean) as a pipeline's decode(x / factor).

A pipeline of diffusers knows one `scaling_factor`; ours normalises each channel by its mean and standard deviation.
That is an affine map of the channels, and an AutoencoderKL has a 1x1 convolution there (`quant_conv`,
`post_quant_conv`), or can have one, which takes it in exactly. Neither the denoiser nor its noise changes.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder import Autoencoder
from ldm.config import RequestError
from ldm.latents.receipt import Statistics


def check_class(class_name: str, statistics: Statistics) -> None:
    """Raises RequestError where an autoencoder has no layer for a mean and standard deviation of each channel."""
    one_factor = class_name.startswith("Autoencoder") and _is_one_factor(statistics)
    if class_name != "AutoencoderKL" and not one_factor:
        raise RequestError(
            f"to=diffusers: an {class_name} has no layer that could take in the mean and deviation of each "
            "latent channel, and DiTPipeline knows one scaling factor for all; only an AutoencoderKL can be exported"
        )


def normalized(autoencoder: Autoencoder, statistics: Statistics) -> nn.Module:
    """A diffusers autoencoder whose latents, times its scaling_factor, are normalised; this one stays as it is.

    Raises RequestError, see `check_class`.
    """
    check_class(autoencoder.class_name, statistics)
    model = copy.deepcopy(autoencoder.model).cpu().float()
    if _is_one_factor(statistics):
        _register(model, scaling_factor=1 / statistics.std[0], shift_factor=None)
        return model
    mean, std = torch.tensor(statistics.mean), torch.tensor(statistics.std)
    kl: Any = model
    kl.quant_conv = _after(kl.quant_conv, torch.cat([-mean / std, -2 * std.log()]), torch.cat([1 / std, std**0]))
    kl.post_quant_conv = _before(kl.post_quant_conv, mean, std)
    _register(model, scaling_factor=1.0, shift_factor=None, use_quant_conv=True, use_post_quant_conv=True)
    return model


def _is_one_factor(statistics: Statistics) -> bool:
    return not any(statistics.mean) and len(set(statistics.std)) == 1


def _register(model: nn.Module, **values: Any) -> None:
    known: Any = model.config
    model.register_to_config(**{k: v for k, v in values.items() if k in known})  # type: ignore[operator]


def _before(conv: nn.Module | None, shift: Tensor, scale: Tensor) -> nn.Conv2d:
    """conv(x * scale + shift), as one convolution."""
    weight, bias = _affine(conv, len(shift))
    return _convolution(weight * scale, bias + weight @ shift)


def _after(conv: nn.Module | None, shift: Tensor, scale: Tensor) -> nn.Conv2d:
    """conv(x) * scale + shift, as one convolution. Moments: mean, then log variance, which a scale shifts."""
    weight, bias = _affine(conv, len(shift))
    return _convolution(weight * scale[:, None], bias * scale + shift)


def _affine(conv: nn.Module | None, channels: int) -> tuple[Tensor, Tensor]:
    """(weight (C, C), bias (C,)) of a 1x1 convolution; None is the identity."""
    if not isinstance(conv, nn.Conv2d):
        return torch.eye(channels), torch.zeros(channels)
    assert conv.bias is not None
    return conv.weight[:, :, 0, 0].detach(), conv.bias.detach()


def _convolution(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    conv.load_state_dict({"weight": weight[:, :, None, None], "bias": bias})
    return conv
