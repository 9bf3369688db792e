"""One DiT's weights in three layouts: ours, diffusers' DiTTransformer2DModel, and the original (facebookresearch/DiT).

A layout is a table: our module => their modules, whose rows one after the other are ours. The numbers are the same in
all three but for the order of the pixels of a patch, so that a tensor goes there and back with the same bits.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.config import RequestError
from ldm.dit import position_embedding

Layout = dict[str, tuple[str, ...]]

PATCH = "patch_embedding"
CLASSES = "label_embedding"


def original_layout(depth: int) -> Layout:
    """Of the checkpoints of facebookresearch/DiT."""
    layout: Layout = {
        PATCH: ("x_embedder.proj",),
        "timestep_embedding.hidden": ("t_embedder.mlp.0",),
        "timestep_embedding.out": ("t_embedder.mlp.2",),
        CLASSES: ("y_embedder.embedding_table",),
        "final.linear": ("final_layer.linear",),
        "final.modulation": ("final_layer.adaLN_modulation.1",),
    }
    for block in (f"blocks.{i}" for i in range(depth)):
        layout |= {
            f"{block}.qkv": (f"{block}.attn.qkv",),
            f"{block}.attention_out": (f"{block}.attn.proj",),
            f"{block}.mlp.0": (f"{block}.mlp.fc1",),
            f"{block}.mlp.2": (f"{block}.mlp.fc2",),
            f"{block}.modulation": (f"{block}.adaLN_modulation.1",),
        }
    return layout


def diffusers_layout(depth: int) -> Layout:
    """Of DiTTransformer2DModel, whose embeddings of timestep and class stand in block 0 (and again in each other)."""
    layout: Layout = {
        PATCH: ("pos_embed.proj",),
        **{ours: (f"transformer_blocks.0.{theirs}",) for ours, theirs in _REPEATED.items()},
        "final.linear": ("proj_out_2",),
        "final.modulation": ("proj_out_1",),
    }
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        layout |= {
            f"{ours}.qkv": tuple(f"{theirs}.attn1.to_{part}" for part in "qkv"),
            f"{ours}.attention_out": (f"{theirs}.attn1.to_out.0",),
            f"{ours}.mlp.0": (f"{theirs}.ff.net.0.proj",),
            f"{ours}.mlp.2": (f"{theirs}.ff.net.2",),
            f"{ours}.modulation": (f"{theirs}.norm1.linear",),
        }
    return layout


_REPEATED = {
    "timestep_embedding.hidden": "norm1.emb.timestep_embedder.linear_1",
    "timestep_embedding.out": "norm1.emb.timestep_embedder.linear_2",
    CLASSES: "norm1.emb.class_embedder.embedding_table",
}


def to_ours(theirs: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Their tensors => ours, in fp32. Raises RequestError where one is missing or left over, in the words of `from`."""
    theirs = dict(theirs)
    ours = {}
    for name, modules in layout.items():
        for kind in ("weight",) if name == CLASSES else ("weight", "bias"):
            parts = [_take(theirs, f"{module}.{kind}").float() for module in modules]
            ours[f"{name}.{kind}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if theirs:
        raise RequestError(f"holds tensors that no DiT has ({', '.join(sorted(theirs))[:120]})")
    patch = ours[f"{PATCH}.weight"]
    if patch.ndim != 4:
        raise RequestError(f"holds {layout[PATCH][0]}.weight of shape {list(patch.shape)}, expected (D, C, p, p)")
    # A convolution of stride p is a linear map of the patch: (D, C, p, p) => (D, p * p * C).
    ours[f"{PATCH}.weight"] = patch.permute(0, 2, 3, 1).flatten(1).contiguous()
    return ours


def to_theirs(ours: Mapping[str, Tensor], layout: Layout, patch_size: int) -> dict[str, Tensor]:
    """The inverse of `to_ours`: the same bits."""
    theirs: dict[str, Tensor] = {}
    for name, modules in layout.items():
        for kind in ("weight",) if name == CLASSES else ("weight", "bias"):
            tensor = ours[f"{name}.{kind}"]
            if (name, kind) == (PATCH, "weight"):
                tensor = tensor.unflatten(1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2)
            parts = tensor.chunk(len(modules))
            theirs |= {f"{module}.{kind}": part.contiguous() for module, part in zip(modules, parts, strict=True)}
    return theirs


def repeat_embeddings(theirs: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """diffusers has the embeddings of timestep and class in each block: those of block 0 in all."""
    first = {key: value for key, value in theirs.items() if key.startswith("transformer_blocks.0.norm1.emb.")}
    again = {key.replace(".0.", f".{i}.", 1): value.clone() for i in range(1, depth) for key, value in first.items()}
    return theirs | again


def drop_repeated_embeddings(theirs: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The inverse. Raises RequestError where a block has embeddings of its own, as a fine-tune may have given it."""
    kept = dict(theirs)
    for i in range(1, depth):
        for key in [key for key in theirs if key.startswith(f"transformer_blocks.{i}.norm1.emb.")]:
            first = theirs.get(key.replace(f".{i}.", ".0.", 1))
            if first is None or not torch.equal(kept.pop(key), first):
                raise RequestError(
                    f"holds another {key} than block 0: a DiT has one embedding of timestep and class for all blocks"
                )
    return kept


def drop_positions(theirs: dict[str, Tensor], name: str, hidden_size: int) -> int:
    """Takes the fixed positions (1, T, D) out, which are computed here; returns the side of the square of patches.

    Raises RequestError where they are missing, or others.
    """
    positions = _take(theirs, name)
    rows = math.isqrt(positions.numel() // hidden_size)
    expected = position_embedding(hidden_size, (rows, rows))[None]
    if positions.shape != expected.shape or not torch.allclose(positions.float(), expected, atol=1e-3):
        raise RequestError(f"holds a {name} that is not the fixed sine-cosine one of a square of patches")
    return rows


def _take(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise RequestError(f"holds no {name}, as a DiT has")
    tensor = tensors.pop(name)
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise RequestError(f"holds {name} as {tensor.dtype} ({tensor.layout}), expected plain floating-point numbers")
    return tensor
