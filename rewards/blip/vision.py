"""BLIP's vision transformer (Li et al., BLIP, 2022; Dosovitskiy et al., ViT, 2021), for inference.

Modules carry the names of the official checkpoints (`blocks.0.attn.qkv.weight`), so these load without renaming.
Pre-norm blocks, layer norm eps 1e-6, exact GELU, one fused projection for queries, keys and values. Stochastic depth
and dropout act in training only and are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class VisionTransformer(nn.Module):
    """Pictures `[B, 3, size, size]`, normalised, to tokens `[B, 1 + (size / patch)^2, width]`, class token first.

    Args:
        size, patch: sides in pixels. width: of the tokens. depth: number of blocks. heads: of each attention.
    """

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens of all patches after the last norm."""
        patches = self.patch_embed(pixels)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class PatchEmbedding(nn.Module):
    """A linear map of non-overlapping patches: `[B, 3, H, W]` to `[B, (H / patch) (W / patch), width]`, row by row."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings of the patches."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; the MLP is four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, N, width]` after the block."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Attention(nn.Module):
    """Self-attention with scale `1 / sqrt(width / heads)`; `qkv` gives queries, keys, values, each head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attention output `[B, N, width]`."""
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear maps with an exact GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, N, width]` to `[B, N, width]`."""
        return self.fc2(F.gelu(self.fc1(tokens)))
