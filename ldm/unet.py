"""The classic U-Net of latent diffusion (Rombach et al. 2022, arXiv 2112.10752), in diffusers' implementation.

Shapes: x (N, C, H, W); t, labels (N,). The class embedding is added to that of the timestep.
"""

from typing import Annotated, Any, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from ldm.config import Config, RequestError

Counts = tuple[Annotated[int, Field(ge=1)], ...]


class UNetConfig(Config):
    """How large a U-Net, in the terms of LDM. The defaults are LDM-8 of its class-conditional ImageNet."""

    model_channels: int = Field(256, ge=1, description="channels of the first level")
    channel_multipliers: Counts = Field(
        (1, 2, 4), min_length=1, description="channels of each level over model_channels; each but the last halves"
    )
    num_res_blocks: int = Field(2, ge=1, description="residual blocks of a level, going down; one more going up")
    attention_resolutions: Counts = Field(
        (1, 2, 4), description="downsampling factors of the levels that attend, powers of 2; the middle always attends"
    )
    head_channels: int = Field(32, ge=1, description="channels of an attention head; divides those of its level")
    norm_groups: int = Field(32, ge=1, description="groups of the group norms; divides model_channels")

    @model_validator(mode="before")
    @classmethod
    def _without_dropout(cls, values: Any) -> Any:
        """Older snapshots say `dropout: 0`."""
        if not isinstance(values, dict) or "dropout" not in values:
            return values
        if values["dropout"] != 0:
            raise ValueError("has no dropout, for nothing seeds what it would draw; leave it out")
        return {key: value for key, value in values.items() if key != "dropout"}

    @field_validator("attention_resolutions")
    @classmethod
    def _are_levels(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        levels = [2**level for level in range(len(info.data.get("channel_multipliers", ())))]
        if levels and not set(value) <= set(levels):
            raise ValueError(f"channel_multipliers gives levels at the factors {', '.join(map(str, levels))}")
        return value

    @field_validator("head_channels")
    @classmethod
    def _divides_levels(cls, value: int, info: ValidationInfo) -> int:
        width, multipliers = info.data.get("model_channels"), info.data.get("channel_multipliers")
        attending = info.data.get("attention_resolutions")
        if width is None or multipliers is None or attending is None:
            return value  # already reported
        for level, multiplier in enumerate(multipliers):
            if (2**level in attending or level == len(multipliers) - 1) and width * multiplier % value:
                raise ValueError(f"does not divide the {width * multiplier} channels of the level at factor {2**level}")
        return value

    @field_validator("norm_groups")
    @classmethod
    def _divides_channels(cls, value: int, info: ValidationInfo) -> int:
        if (width := info.data.get("model_channels", value)) % value:
            raise ValueError(f"does not divide model_channels={width}")
        return value


class UNet(nn.Module):
    """A denoiser of any latent size that the levels divide. A fresh one answers exactly 0.

    Raises RequestError where the levels do not divide the latents.
    """

    def __init__(
        self, config: UNetConfig, *, in_channels: int, sample_size: tuple[int, int], num_classes: int | None
    ) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        factors = [2**level for level in range(len(config.channel_multipliers))]
        _check_levels(factors[-1], sample_size)
        attends = [factor in config.attention_resolutions for factor in factors]
        self.unet = UNet2DModel(
            in_channels=in_channels,
            out_channels=in_channels,
            block_out_channels=tuple(config.model_channels * m for m in config.channel_multipliers),
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            layers_per_block=config.num_res_blocks,
            attention_head_dim=config.head_channels,
            norm_num_groups=config.norm_groups,
            num_class_embeds=None if num_classes is None else num_classes + 1,
        )
        self._initialize()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x (N, C, H, W), t (N,), labels (N,) int64 or, where unconditional, None => (N, C, H, W) as x."""
        if self.unet.class_embedding is not None:
            assert labels is not None, "a class-conditional denoiser needs labels; num_classes is the null"
        else:
            assert labels is None, "an unconditional denoiser takes labels=None"
        return cast(Tensor, self.unet(x, t, labels, return_dict=False)[0]).to(x.dtype)

    @property
    def blocks(self) -> list[nn.Module]:
        """Residual blocks and attentions, which hold most of the activations."""
        levels = [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]
        return [block for level in levels for part in ("resnets", "attentions") for block in getattr(level, part, ())]

    def _initialize(self) -> None:
        """As LDM's code: zeros wherever a block or the model ends."""
        for name, module in self.unet.named_modules():
            if name == "conv_out" or name.endswith((".conv2", ".to_out.0")):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        if self.unet.class_embedding is not None:
            nn.init.normal_(self.unet.class_embedding.weight, std=0.02)


def _check_levels(factor: int, sample_size: tuple[int, int]) -> None:
    height, width = sample_size
    if height % factor or width % factor:
        raise RequestError(
            f"denoiser.unet.channel_multipliers: its levels halve the latents to 1/{factor}, which does not divide "
            f"{height}x{width}; give fewer levels"
        )
