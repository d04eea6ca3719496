"""BLIP's text encoder grounded in a picture (Li et al., BLIP, 2022): BERT with a cross-attention in every layer.

Modules carry the names of the official checkpoints (`encoder.layer.0.crossattention.self.query.weight`), so these
load without renaming. Post-norm layers, layer norm eps 1e-12, exact GELU, no token types, no pooler. Every text token
sees every other one, and every image token with its class token. Dropout acts in training only and is left out.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12


class TextEncoder(nn.Module):
    """Token ids and image tokens to text tokens that have seen the picture.

    Args:
        vocabulary: number of token ids. positions: longest text. width: of the text tokens. depth: number of layers.
        heads: of each attention. hidden: width inside the MLPs. image_width: of the image tokens.
    """

    def __init__(
        self,
        vocabulary: int,
        positions: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        image_width: int,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(vocabulary, positions, width)
        self.encoder = Layers(Layer(width, heads, hidden, image_width) for _ in range(depth))

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Text tokens `[B, L, width]` after the last layer.

        Args:
            ids: `[B, L]` token ids. mask: `[B, L]`, 1 for text and 0 for padding. image: `[B, N, image_width]`.
        """
        return self.encoder(self.embeddings(ids), mask.bool()[:, None, None, :], image)


class Layers(nn.Module):
    """Layers one after another."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)

    def forward(self, tokens: Tensor, visible: Tensor, image: Tensor) -> Tensor:
        """Tokens `[B, L, width]` after the last one; arguments as in `Layer`."""
        for layer in self.layer:
            tokens = layer(tokens, visible, image)
        return tokens


class Embeddings(nn.Module):
    """Sum of word and position embeddings, normalised."""

    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings `[B, L, width]` of ids `[B, L]`."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings(positions))


class Layer(nn.Module):
    """Self-attention over the text, cross-attention to the image, MLP; each added to its input and then normalised."""

    def __init__(self, width: int, heads: int, hidden: int, image_width: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads, width)
        self.crossattention = Attention(width, heads, image_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = AddAndNorm(hidden, width)

    def forward(self, tokens: Tensor, visible: Tensor, image: Tensor) -> Tensor:
        """Tokens `[B, L, width]` after the layer; `visible` `[B, 1, 1, L]` is false at padding."""
        tokens = self.attention(tokens, tokens, visible)
        tokens = self.crossattention(tokens, image, None)
        return self.output(F.gelu(self.intermediate["dense"](tokens)), tokens)


class Attention(nn.Module):
    """Attention from text tokens to a source, added to the text tokens and normalised."""

    def __init__(self, width: int, heads: int, source_width: int) -> None:
        super().__init__()
        self.self = Heads(width, heads, source_width)
        self.output = AddAndNorm(width, width)

    def forward(self, tokens: Tensor, source: Tensor, visible: Tensor | None) -> Tensor:
        """Tokens `[B, L, width]` after attending to `source` `[B, N, source_width]`."""
        return self.output(self.self(tokens, source, visible), tokens)


class Heads(nn.Module):
    """Multi-head attention with scale `1 / sqrt(width / heads)`, without an output projection."""

    def __init__(self, width: int, heads: int, source_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)

    def forward(self, tokens: Tensor, source: Tensor, visible: Tensor | None) -> Tensor:
        """Mixed values `[B, L, width]`; where `visible` is false the source is not seen."""
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.query(tokens), self.key(source), self.value(source))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return mixed.transpose(1, 2).flatten(2)


class AddAndNorm(nn.Module):
    """`norm(dense(x) + residual)`."""

    def __init__(self, source_width: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(source_width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """`[B, L, source_width]` and residual `[B, L, width]` to `[B, L, width]`."""
        return self.LayerNorm(self.dense(x) + residual)
