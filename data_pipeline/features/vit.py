"""The frozen DINOv2 vision transformer: normalised frames in, patch features of the last block (or its keys) out.

Tensors are named as Meta names them; `weights.py` brings other layouts to these names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.features.attention import attention

LAYERS = ("last_block", "last_block_keys")


@dataclass(frozen=True, kw_only=True, slots=True)
class VitShape:
    """The sizes that fix every tensor of the network."""

    width: int
    depth: int
    heads: int
    hidden: int  # width inside the MLP (after the gate, where there is one)
    gated: bool = False  # SwiGLU (the giant model) instead of GELU
    patch_size: int = 14
    native_grid: int = 37  # patches along a side when the model was trained (518 / 14)


SHAPES: dict[str, VitShape] = {
    "dinov2_vits14": VitShape(width=384, depth=12, heads=6, hidden=1536),
    "dinov2_vitb14": VitShape(width=768, depth=12, heads=12, hidden=3072),
    "dinov2_vitl14": VitShape(width=1024, depth=24, heads=16, hidden=4096),
    "dinov2_vitg14": VitShape(width=1536, depth=40, heads=24, hidden=4096, gated=True),
}


class SelfAttention(nn.Module):
    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Shapes: (B, N, E) -> (B, N, E)."""
        batch, num_tokens, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, num_tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(batch, num_tokens, width))

    def keys(self, tokens: Tensor) -> Tensor:
        """What the tokens are compared by, all heads side by side. Shapes: (B, N, E) -> (B, N, E)."""
        width = self.proj.in_features
        middle = slice(width, 2 * width)  # queries, keys, values
        return functional.linear(tokens, self.qkv.weight[middle], self.qkv.bias[middle])


class Mlp(nn.Module):
    """Two layers with exact GELU between them, or SwiGLU with both halves in one matrix."""

    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.gated = shape.gated
        self.fc1 = nn.Linear(shape.width, shape.hidden * (2 if shape.gated else 1))
        self.fc2 = nn.Linear(shape.hidden, shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.fc1(tokens)
        if not self.gated:
            return self.fc2(functional.gelu(hidden))
        gate, value = hidden.chunk(2, dim=-1)
        return self.fc2(functional.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class Block(nn.Module):
    """Pre-norm block; LayerScale on both branches."""

    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=1e-6)
        self.attn = SelfAttention(shape)
        self.ls1 = LayerScale(shape.width)
        self.norm2 = nn.LayerNorm(shape.width, eps=1e-6)
        self.mlp = Mlp(shape)
        self.ls2 = LayerScale(shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class PatchEmbed(nn.Module):
    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, shape.width, kernel_size=shape.patch_size, stride=shape.patch_size)

    def forward(self, frames: Tensor) -> Tensor:
        """Shapes: (B, 3, H, W) -> (B, E, Y, X)."""
        return self.proj(frames)


class DinoVit(nn.Module):
    """Every tensor that the patch features depend on, and nothing else (no final norm, no mask token)."""

    def __init__(self, shape: VitShape) -> None:
        super().__init__()
        self.shape = shape
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.native_grid**2, shape.width))
        self.patch_embed = PatchEmbed(shape)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))

    def forward(self, frames: Tensor, layer: str = "last_block") -> Tensor:
        """One of LAYERS, CLS token dropped.

        last_block: the residual stream after the last block, before the final norm.
        last_block_keys: the keys of the last block's attention, with their bias, not scaled, all heads side by side.
        Shapes: frames (B, 3, H, W), H and W multiples of the patch size -> (B, P, E), P row by row.
        Units: frames normalised with ImageNet's mean and deviation.
        Source: SlotContrast and SSync, released code: vit_block12; VideoSAUR, released code: vit_block_keys12.
        """
        tokens = self._embed(frames)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        last: Block = self.blocks[-1]  # type: ignore[assignment]
        tokens = last.attn.keys(last.norm1(tokens)) if layer == "last_block_keys" else last(tokens)
        return tokens[:, 1:]

    def _embed(self, frames: Tensor) -> Tensor:
        patches = self.patch_embed(frames)
        grid = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2)
        cls_token = self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        return torch.cat([cls_token, tokens], dim=1) + resize_positions(self.pos_embed, (grid[0], grid[1]))


def resize_positions(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bring a position embedding to another patch grid; the CLS entry stays as it is.

    Shapes: (1, 1 + G*G, E) -> (1, 1 + Y*X, E).
    Source: SlotContrast, released code (timm's resampling).
    Differs: from DINOv2's own hub code, which scales by a factor with an offset of 0.1 and without antialiasing.
    """
    native = math.isqrt(pos_embed.shape[1] - 1)
    if grid == (native, native):
        return pos_embed
    cls_entry, patches = pos_embed[:, :1], pos_embed[:, 1:]
    image = patches.reshape(1, native, native, -1).permute(0, 3, 1, 2).float()  # resampled in float32 whatever the weights are
    image = functional.interpolate(image, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([cls_entry, image.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)
